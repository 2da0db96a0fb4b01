"""What the ViT recipes on ImageNet-1k share."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal

from pipeline.config import Recipe, TrainConfig
from pipeline.data.augment import AugmentConfig
from pipeline.data.loader import DataConfig
from pipeline.models import ModelConfig
from pipeline.noise.config import NoiseConfig
from pipeline.optim import OptimConfig
from pipeline.parallel import ParallelConfig
from pipeline.published import HEADLINES, TABLES

Size = Literal["ti", "s", "b", "l"]
NAMES: dict[Size, str] = {"ti": "tiny", "s": "small", "b": "base", "l": "large"}
LAST_BLOCK: dict[Size, int] = {"ti": 11, "s": 11, "b": 11, "l": 23}
COLUMNS: dict[Size, str] = {"ti": "ViT-T", "s": "ViT-S", "b": "ViT-B", "l": "ViT-L"}  # of the paper's table
# timm's, per image, of its weights at 384 pixels.
TIMM_384: dict[Size, float] = {"ti": 78.42, "s": 83.80, "b": 86.01, "l": 87.08}


def plain_vit(size: Size, micro_batch: int) -> TrainConfig:
    """ViT-*/16 from scratch as big_vision's vit_s16_i1k: 90 epochs, fixed positions, the mean of all tokens.

    Its decoupled weight decay of 1e-4 a step is 0.1 here, since torch multiplies it by the learning rate of 1e-3.
    """
    return TrainConfig(
        run=Path(f"runs/vit_{size}16_in1k"),
        epochs=90,
        global_batch=1024,
        micro_batch=micro_batch,
        log_every=50,
        model=ModelConfig(
            name=f"vit_{NAMES[size]}_patch16_224",
            options={"class_token": False, "global_pool": "avg", "fc_norm": False, "weight_init": "jax"},
            pos_embed="sincos2d",
        ),
        data=DataConfig(image_size=224, workers=8),
        augment=AugmentConfig(
            scale=(0.05, 1.0),
            randaugment="rand-m10-n2",
            mixup_alpha=0.2,
            interpolation="bilinear",
            eval_crop_share=0.875,
        ),
        optim=OptimConfig(lr=1e-3, weight_decay=0.1, warmup_samples=10_000 * 1024, clip_grad_norm=1.0),
        parallel=ParallelConfig(precision="bf16"),
    )


def noisy_vit(size: Size, micro_batch: int) -> TrainConfig:
    """The same with the circular shift at the official place, the input of the last block's attention, in training."""
    site = f"blocks.{LAST_BLOCK[size]}.attn"
    noise = NoiseConfig(kind="circular_shift", strength=0.3, site=site, during="train", group_size=8)
    return replace(plain_vit(size, micro_batch), run=Path(f"runs/noisy_vit_{size}16_in1k"), noise=noise)


def noisy_vit_recipe(size: Size, micro_batch: int, hardware: str) -> Recipe:
    known = {"s": "the same schedule without noise gives 76.5 % (big_vision)"}
    name = f"noisy_vit_{size}16_in1k"
    return Recipe(
        purpose=f"NoisyViT-{size.capitalize()}/16 from scratch on ImageNet-1k, 90 epochs: vit_s16_in1k's noisy twin.",
        source=(
            "schedule, model and augmentation as big_vision's vit_s16_i1k, which is tuned for S/16; noise: NoisyNN's "
            "circular shift, alpha 0.3, at its official place, on all tokens, since this model has no class token"
        ),
        command=f"python -m pipeline train {name} --parallel.processes 8 --data.train TRAIN --data.val VAL",
        hardware=hardware,
        hours="not measured",
        expected_top1=f"not measured; {known.get(size, 'no figure is known for this schedule at this size')}",
        config=noisy_vit(size, micro_batch),
    )


def official_finetune(size: Size, image_size: Literal[224, 384]) -> TrainConfig:
    """NoisyNN's published fine-tuning of timm's augreg weights: its code at commit 719ccf6, its settings for B."""
    suffix = "" if image_size == 224 else "_384"
    return TrainConfig(
        run=Path(f"runs/noisy_vit_{size}16_in1k_finetune{suffix}"),
        epochs=50,
        global_batch=16,
        micro_batch=16,
        label_smoothing=0.1,
        log_every=100,
        model=ModelConfig(name=f"vit_{NAMES[size]}_patch16_{image_size}.augreg_in21k_ft_in1k", pretrained=True),
        data=DataConfig(image_size=image_size, workers=8),
        noise=NoiseConfig(kind="optimal_q", site=f"blocks.{LAST_BLOCK[size]}.attn", during="eval", group_size=None),
        # Magnitude and count of RandAugment: torchvision's defaults, which the official code leaves as they are.
        augment=AugmentConfig(scale=(0.05, 1.0), flip=0.0, randaugment="rand-m9-n2", eval_crop="squash"),
        optim=OptimConfig(lr=1e-6, min_lr=1e-7, weight_decay=1e-4, warmup_epochs=10, clip_grad_norm=None),
        parallel=ParallelConfig(strategy="ddp", precision="bf16"),
    )


def finetune_384_recipe(size: Size, hardware: str) -> Recipe:
    name = f"noisy_vit_{size}16_in1k_finetune_384"
    table = TABLES[COLUMNS[size]]
    published = (
        f"{HEADLINES[384].noisy:.2f} % at 384 pixels"
        if size == "b"
        else f"{table['circular_shift']:.2f} % over {table['none']:.2f} % without noise (the paper's table)"
    )
    return Recipe(
        purpose=f"NoisyNN's fine-tuning of ViT-{size.capitalize()}/16 at 384 pixels on ImageNet-1k.",
        source=(
            "github.com/Shawey94/NoisyNN at 719ccf6: AdamW 1e-6, batch 16, 50 epochs, 10 of warm-up, no flip; "
            "validation squashes the picture; noise off in training, optimal Q on at inference over the running batch"
            + ("" if size == "b" else "; its command is given for B, and these are the same settings")
        ),
        command=f"python -m pipeline train {name} --data.train TRAIN --data.val VAL",
        hardware=hardware,
        hours="not measured",
        expected_top1=(
            f"per image about the {TIMM_384[size]:.2f} % of the weights it starts from (timm's results table); not "
            f"measured. Published: {published}; it is transductive"
        ),
        config=official_finetune(size, 384),
    )
