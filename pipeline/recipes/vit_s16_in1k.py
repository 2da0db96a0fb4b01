"""ViT-S/16 on ImageNet-1k without noise: the clean base that the noisy twins stand beside."""

from pipeline.config import Recipe
from pipeline.recipes._vit import plain_vit

RECIPE = Recipe(
    purpose="ViT-S/16 from scratch on ImageNet-1k, 90 epochs, without noise: the clean base of noisy_vit_s16_in1k.",
    source=(
        "big_vision's configs/vit_s16_i1k.py (Beyer et al. 2022, arXiv 2205.01580): batch 1024, AdamW 1e-3, 10,000 "
        "steps of warm-up, weight decay 1e-4 decoupled, mixup 0.2, RandAugment(2, 10), crops from 5 %, no class token. "
        "Here mixup draws one coefficient a pair, all of train is used (there 99 %), and the head is one linear layer "
        "(there another with tanh comes before it)"
    ),
    command="python -m pipeline train vit_s16_in1k --parallel.processes 8 --data.train TRAIN --data.val VAL",
    hardware="8 GPUs of 40 GB or more",
    hours="not measured (6 to 7 on a TPU v3-8, says the source)",
    expected_top1="76.5 % says the source; not measured here",
    config=plain_vit("s", micro_batch=128),
)
