"""NoisyCNN: ResNet-18 with the circular shift at the input of its last residual block."""

from pipeline.recipes._resnet import noisy_resnet_recipe

RECIPE = noisy_resnet_recipe(18, micro_batch=64, hardware="8 GPUs of 16 GB or more")
