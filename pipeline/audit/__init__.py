"""What a model's accuracy under a mixing noise is made of: the nine protocols of PAPER.md, section 5."""
