"""Fine-tuning to another data set: ImageNet-21k weights, a new classifier, a higher resolution."""

from pathlib import Path

from pipeline.config import Recipe, TrainConfig
from pipeline.data.augment import AugmentConfig
from pipeline.data.loader import DataConfig
from pipeline.models import ModelConfig
from pipeline.optim import OptimConfig
from pipeline.parallel import ParallelConfig

_BATCH = 512

RECIPE = Recipe(
    purpose="A ViT-B/32 of ImageNet-21k to your own data set, at 384 pixels; the settings are those for CIFAR-10.",
    source=(
        "big_vision's configs/transfer.py: SGD 0.003 without weight decay, batch 512, 10,000 steps, 500 of warm-up. "
        "Here crops are inception's (there, for CIFAR, a random crop of the resized picture). Other sets take another "
        "--samples and --optim.lr: 500 steps for 3,000 pictures, 20,000 steps at 0.03 for ImageNet"
    ),
    command=(
        "python -m pipeline train transfer --data.train TRAIN --data.val VAL; from weights of your own: "
        "--model.no-pretrained --model.name NAME --model.init-from WEIGHTS; to train the classifier alone: "
        "--model.freeze all_but_head"
    ),
    hardware="1 GPU of 24 GB or more, and the network for timm's weights",
    hours="not measured",
    expected_top1="98.55 % on CIFAR-10 says the source; not measured here",
    config=TrainConfig(
        run=Path("runs/transfer"),
        samples=10_000 * _BATCH,
        global_batch=_BATCH,
        micro_batch=128,
        model=ModelConfig(name="vit_base_patch32_224.augreg_in21k", pretrained=True, new_head=True),
        data=DataConfig(image_size=384, workers=8),
        augment=AugmentConfig(scale=(0.05, 1.0), interpolation="bilinear", eval_crop_share=384 / 448),
        optim=OptimConfig(optimizer="sgd", lr=0.003, weight_decay=0.0, warmup_samples=500 * _BATCH, clip_grad_norm=1.0),
        parallel=ParallelConfig(precision="bf16"),
    ),
)
