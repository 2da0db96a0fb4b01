"""Small checkpoints to audit, and the pictures that they are audited on."""

from pathlib import Path

import torch
from safetensors.torch import save_file
from small_shards import CLASSES

from data_prep.distribute import ShardOptions, shard
from pipeline import checkpoint as ckpt
from pipeline.__main__ import main
from pipeline.audit.protocols import Settings
from pipeline.audit.run import AuditConfig
from pipeline.checkpoint import WEIGHTS_NAME
from pipeline.config import TrainConfig
from pipeline.data.augment import AugmentConfig
from pipeline.data.loader import DataConfig
from pipeline.models import ModelConfig, create_model
from pipeline.noise.config import NoiseConfig
from pipeline.parallel import Ranks
from pipeline.sections import to_json

ALONE = Ranks(0, 1, launched=False)
MODEL = ModelConfig("vit_tiny_patch16_224", {"depth": 2, "embed_dim": 24, "num_heads": 2, "patch_size": 8})
SMALLER = ModelConfig(MODEL.name, MODEL.options | {"depth": 1})
SPREAD = 0.6
SMALL = Settings(ks=(2, 4, 8), shuffles=2, victims=6)
NOISY = NoiseConfig("gaussian", 0.2)


def make_run(
    folder: Path, noise: NoiseConfig | None = NOISY, seed: int = 0, model: ModelConfig = MODEL, epochs: int = 90
) -> Path:
    """A run folder with one checkpoint of an untrained model of the small split's three classes. noise None: without.

    Its answers are spread over the classes, and other pictures in a group change them.
    """
    config = TrainConfig(
        run=folder,
        seed=4,
        epochs=epochs,
        model=model,
        data=DataConfig(image_size=32),
        noise=noise or NoiseConfig(),
        augment=AugmentConfig(eval_crop_share=0.5),
    )
    torch.manual_seed(seed)
    net = create_model(config.model, len(CLASSES), 32)
    for parameter in net.parameters():  # timm's begin so small that every picture would have one answer
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=SPREAD)
    generation = ckpt.temporary_folder(config.run, 12)
    generation.mkdir(parents=True)
    save_file(net.state_dict(), generation / WEIGHTS_NAME)
    ckpt.write_json(generation / ckpt.CONFIG_NAME, to_json(config) | {"classes": list(CLASSES), "step": 12})
    ckpt.publish_generation(config.run, 12, keep=2)
    return config.run


def config_of(run: Path, data: object, **options) -> AuditConfig:
    return AuditConfig(run, str(data), **{"protocols": SMALL, "batch": 8, "workers": 0} | options)


def sharded(pictures: Path, out: Path, **options) -> Path:
    return shard(ShardOptions(str(pictures), str(out), processes=1, samples_per_shard=7, **options)).path


def refused(words: list[str], capsys) -> str:
    assert main(["audit", *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1, error
    return error
