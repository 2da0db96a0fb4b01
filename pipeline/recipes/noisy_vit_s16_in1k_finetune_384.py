"""The official NoisyViT fine-tuning at 384 pixels, ViT-S/16."""

from pipeline.recipes._vit import finetune_384_recipe

RECIPE = finetune_384_recipe("s", hardware="1 GPU of 16 GB or more, and the network for timm's weights")
