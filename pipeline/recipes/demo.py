"""The demo: a small NoisyViT on 32 x 32 pictures, on two CPU cores."""

from pathlib import Path

from pipeline.config import Recipe, TrainConfig
from pipeline.data.augment import AugmentConfig
from pipeline.data.loader import DataConfig
from pipeline.models import ModelConfig
from pipeline.noise.config import NoiseConfig
from pipeline.optim import OptimConfig
from pipeline.parallel import ParallelConfig

RECIPE = Recipe(
    purpose="A small NoisyViT from scratch in two minutes, to see every part work.",
    source="this project; the model is timm's vit_tiny made shallower and narrower",
    command="make demo",
    hardware="2 CPU cores",
    hours="0.05",
    expected_top1="at least 95 % on scikit-learn's digits (measured by `make demo`)",
    config=TrainConfig(
        run=Path("runs/demo/pretrain"),
        epochs=30,
        global_batch=64,
        micro_batch=32,
        model=ModelConfig(
            name="vit_tiny_patch16_224",
            options={"patch_size": 8, "embed_dim": 96, "depth": 6, "num_heads": 3},
        ),
        data=DataConfig(
            train="runs/demo/shards/train.manifest.json",
            val="runs/demo/shards/val.manifest.json",
            image_size=32,
            workers=0,
        ),
        noise=NoiseConfig(kind="gaussian", strength=0.2, site="image", during="train"),
        # A mirrored digit is another sign, and a small crop of one shows nothing: neither is augmented.
        augment=AugmentConfig(scale=(0.8, 1.0), flip=0.0, eval_crop="squash"),
        optim=OptimConfig(lr=2e-3, weight_decay=0.05, warmup_epochs=1),
        parallel=ParallelConfig(strategy="zero1", processes=2, precision="fp32"),
    ),
)
