"""The official NoisyViT fine-tuning at 384 pixels, ViT-B/16."""

from pipeline.recipes._vit import finetune_384_recipe

RECIPE = finetune_384_recipe("b", hardware="1 GPU of 24 GB or more, and the network for timm's weights")
