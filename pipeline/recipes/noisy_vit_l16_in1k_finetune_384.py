"""The official NoisyViT fine-tuning at 384 pixels, ViT-L/16."""

from pipeline.recipes._vit import finetune_384_recipe

RECIPE = finetune_384_recipe("l", hardware="1 GPU of 48 GB or more, and the network for timm's weights")
