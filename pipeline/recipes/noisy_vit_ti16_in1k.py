"""NoisyViT-Ti/16 on ImageNet-1k from scratch."""

from pipeline.recipes._vit import noisy_vit_recipe

RECIPE = noisy_vit_recipe("ti", micro_batch=128, hardware="8 GPUs of 24 GB or more")
