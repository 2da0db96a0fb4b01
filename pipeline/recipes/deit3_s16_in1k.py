"""DeiT-III's ViT-S/16 on ImageNet-1k: LAMB, binary cross-entropy, 3-Augment, 800 epochs."""

from pathlib import Path

from pipeline.config import Recipe, TrainConfig
from pipeline.data.augment import AugmentConfig
from pipeline.data.loader import DataConfig
from pipeline.loss import LossConfig
from pipeline.models import ModelConfig
from pipeline.optim import OptimConfig
from pipeline.parallel import ParallelConfig

RECIPE = Recipe(
    purpose="DeiT-III's ViT-S/16 from scratch on ImageNet-1k, without noise: a base of today's kind.",
    source=(
        "facebookresearch/deit, README_revenge.md (Touvron et al. 2022, arXiv 2204.07118): LAMB 4e-3, batch 2048, 800 "
        "epochs, 5 of warm-up, weight decay 0.05, mixup 0.8 and CutMix 1.0, drop path 0.05, 3-Augment with jitter 0.3, "
        "binary cross-entropy of targets above 0. Here each epoch shows every sample once (there a third of them three "
        "times: repeated augmentation), each pair is mixed by itself (there a batch), and drop path rises to 0.05 "
        "(there it is 0.05 in every block). Its average of the weights is left out: its figure is not the average's"
    ),
    command="python -m pipeline train deit3_s16_in1k --parallel.processes 8 --data.train TRAIN --data.val VAL",
    hardware="8 GPUs of 40 GB or more",
    hours="not measured",
    expected_top1="81.4 % says the source, with repeated augmentation; not measured here",
    config=TrainConfig(
        run=Path("runs/deit3_s16_in1k"),
        epochs=800,
        global_batch=2048,
        micro_batch=128,
        log_every=50,
        loss=LossConfig(kind="bce", bce_threshold=0.0),
        model=ModelConfig(name="deit3_small_patch16_224", options={"init_values": 1e-4}, drop_path=0.05),
        data=DataConfig(image_size=224, workers=8),
        augment=AugmentConfig(
            three_augment=True, color_jitter=0.3, mixup_alpha=0.8, cutmix_alpha=1.0, eval_crop_share=1.0
        ),
        # The source's LAMB clips at 1 by itself.
        optim=OptimConfig(
            optimizer="lamb", lr=4e-3, min_lr=1e-5, weight_decay=0.05, warmup_epochs=5, clip_grad_norm=1.0
        ),
        parallel=ParallelConfig(strategy="ddp", precision="bf16"),
    ),
)
