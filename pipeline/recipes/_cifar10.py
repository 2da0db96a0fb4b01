"""What the CIFAR-10 recipes share: small models that two CPU cores train in minutes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from pipeline.config import TrainConfig
from pipeline.data.augment import AugmentConfig
from pipeline.data.loader import DataConfig
from pipeline.models import ModelConfig
from pipeline.noise.config import NoiseConfig
from pipeline.optim import OptimConfig
from pipeline.parallel import ParallelConfig

SHARDS = "runs/cifar10/shards"
PREPARE = (
    f"python -m data_prep shard --source CIFAR10/train --split train --out {SHARDS} && "
    f"python -m data_prep shard --source CIFAR10/test --split val --out {SHARDS} --keep-order"
)
HARDWARE = "2 CPU cores"
HOURS = "about 0.1 to 0.2, from the cost of a step; the whole is not measured"


def small_vit() -> TrainConfig:
    return TrainConfig(
        run=Path("runs/cifar10/vit"),
        epochs=10,
        global_batch=256,
        micro_batch=128,
        label_smoothing=0.1,
        model=ModelConfig(
            name="vit_tiny_patch16_224",
            options={"patch_size": 8, "embed_dim": 128, "depth": 4, "num_heads": 4},
        ),
        data=DataConfig(
            train=f"{SHARDS}/train.manifest.json", val=f"{SHARDS}/val.manifest.json", image_size=32, workers=1
        ),
        augment=AugmentConfig(scale=(0.4, 1.0), eval_crop="squash"),
        optim=OptimConfig(lr=2e-3, weight_decay=0.05, warmup_epochs=1),
        parallel=ParallelConfig(strategy="ddp", processes=2, precision="fp32"),
    )


def small_resnet() -> TrainConfig:
    return replace(
        small_vit(),
        run=Path("runs/cifar10/resnet"),
        epochs=5,
        # Its stem takes a quarter of the side away, as on ImageNet.
        model=ModelConfig(name="resnet10t"),
        optim=OptimConfig(lr=3e-3, weight_decay=0.05, warmup_epochs=1),
    )


def at_the_last(site: str) -> NoiseConfig:
    """The noise of the noisy twins, in training alone."""
    return NoiseConfig(kind="circular_shift", strength=0.3, site=site, during="train", group_size=8)
