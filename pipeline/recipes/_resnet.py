"""What the official CNN runs share."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pipeline.config import Recipe, TrainConfig
from pipeline.data.augment import AugmentConfig
from pipeline.data.loader import DataConfig
from pipeline.models import ModelConfig
from pipeline.noise.config import NoiseConfig
from pipeline.optim import OptimConfig
from pipeline.parallel import ParallelConfig
from pipeline.published import TABLES

Depth = Literal[18, 34, 50, 101]


def noisy_resnet_recipe(depth: Depth, micro_batch: int, hardware: str) -> Recipe:
    """torchvision's weights, a fresh classifier, the circular shift at the input of the last residual block, always."""
    name, published = f"noisy_resnet{depth}_in1k", TABLES[f"R{depth}"]
    clean, noisy = published["none"], published["circular_shift"]
    site = "layer4.1" if depth == 18 else "layer4.2"  # ResNet-18's stage 4 has two blocks, the others' three
    return Recipe(
        purpose=f"NoisyNN's ResNet-{depth} on ImageNet-1k: torchvision's weights, a fresh classifier, noise always on.",
        source=(
            "github.com/Shawey94/NoisyNN at 719ccf6: AdamW 1e-3, cosine, batch 512, 100 epochs, alpha 0.4 at stage 4's "
            "last block, the noise kept out of the gradient. There the shift goes round the running batch; here round "
            "groups of 64, so that the result does not depend on the number of ranks"
        ),
        command=f"python -m pipeline train {name} --parallel.processes 8 --data.train TRAIN --data.val VAL",
        hardware=f"{hardware}, and the network for torchvision's weights",
        hours="not measured",
        expected_top1=f"not measured; published {noisy:.2f} % over {clean:.2f} % (the paper), with noise at inference",
        config=TrainConfig(
            run=Path(f"runs/{name}"),
            epochs=100,
            global_batch=512,
            micro_batch=micro_batch,
            model=ModelConfig(name=f"resnet{depth}.tv_in1k", pretrained=True, new_head=True),
            data=DataConfig(image_size=224, workers=8),
            noise=NoiseConfig(
                kind="circular_shift", strength=0.4, site=site, during="both", group_size=64, detach=True
            ),
            augment=AugmentConfig(scale=(0.08, 1.0), interpolation="bilinear", eval_crop_share=0.875),
            optim=OptimConfig(lr=1e-3, weight_decay=1e-4, warmup_epochs=0, clip_grad_norm=None),
            parallel=ParallelConfig(strategy="ddp", precision="bf16"),
        ),
    )
