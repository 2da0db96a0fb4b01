"""The same weights and pictures give timm's validate.py and `evaluate` the same answers, on 250 real ImageNet JPEGs.

The model has timm's random weights and a head fitted to the pictures, badly: public weights would have to be fetched.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from timm.data import create_dataset, create_loader, resolve_data_config
from timm.utils import AverageMeter, accuracy
from torch import Tensor, nn

from data_prep.distribute import ShardOptions, shard
from data_prep.manifest import Manifest
from pipeline.data.augment import AugmentConfig
from pipeline.data.loader import DataConfig, open_split
from pipeline.evaluator import Evaluator
from pipeline.noise.config import NoiseConfig
from pipeline.noise.inject import NoiseInjector
from pipeline.parallel import Ranks

# By the one pictures are resized with a bicubic filter, by the other with a bilinear one; each has its own crop share.
RIDGE = 1.0
MODELS = {"vit_tiny_patch16_224": {"depth": 2}, "test_resnet": {}}


@pytest.fixture(scope="module")
def manifest(imagenet_sample, tmp_path_factory) -> Manifest:
    out = tmp_path_factory.mktemp("shards")
    return shard(ShardOptions(imagenet_sample, out, split="val", samples_per_shard=100))


def data_config_of(model: nn.Module) -> dict:
    return resolve_data_config({"img_size": 224}, model=model)


def timm_batches(model: nn.Module, root: Path) -> tuple[list[tuple[Tensor, Tensor]], list[str]]:
    """The loader's batches as validate.py makes them, and the names of their pictures in that order."""
    data_config = data_config_of(model)
    dataset = create_dataset(root=str(root), name="", split="validation")
    loader = create_loader(
        dataset,
        input_size=data_config["input_size"],
        batch_size=64,
        use_prefetcher=False,
        interpolation=data_config["interpolation"],
        mean=data_config["mean"],
        std=data_config["std"],
        num_workers=0,
        crop_pct=data_config["crop_pct"],
        crop_mode=data_config["crop_mode"],
    )
    return list(loader), [Path(name).stem for name in dataset.filenames(basename=True)]


@torch.no_grad()
def fit_head(model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> None:
    """Ridge regression on the features of all pictures."""
    features = torch.cat([model.forward_head(model.forward_features(x), pre_logits=True) for x, _ in batches]).double()
    wanted = nn.functional.one_hot(torch.cat([labels for _, labels in batches])).double()
    middle = features.mean(0)
    features -= middle
    ridge = RIDGE * features.square().mean() * len(features) * torch.eye(features.shape[1]).double()
    head = torch.linalg.solve(features.T @ features + ridge, features.T @ (wanted - wanted.mean(0))).T
    model.get_classifier().weight.copy_(10 * head)
    model.get_classifier().bias.copy_(-10 * head @ middle)


@torch.no_grad()
def validate(model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> tuple[float, float, Tensor]:
    """validate.py's loop: (top-1, top-5, logits (n, classes)), percentages as it prints them."""
    top1, top5, outputs = AverageMeter(), AverageMeter(), []
    for x, target in batches:
        output = model(x)
        acc1, acc5 = accuracy(output.detach(), target, topk=(1, 5))
        top1.update(acc1.item(), x.size(0))
        top5.update(acc5.item(), x.size(0))
        outputs.append(output)
    return top1.avg, top5.avg, torch.cat(outputs)


@pytest.mark.parametrize("name", MODELS)
def test_timm_s_validation_answers_the_same_to_each_picture(name, manifest, imagenet_sample) -> None:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=len(manifest.classes), **MODELS[name]).eval()
    batches, names = timm_batches(model, imagenet_sample)
    fit_head(model, batches)
    top1, top5, outputs = validate(model, batches)

    data_config = data_config_of(model)
    assert (data_config["crop_mode"], data_config["input_size"]) == ("center", (3, 224, 224))
    augment = AugmentConfig(eval_crop_share=data_config["crop_pct"], interpolation=data_config["interpolation"])
    reader = open_split(str(manifest.path), DataConfig(workers=1), augment, seed=0)
    injector = NoiseInjector(model, NoiseConfig(), 224, seed=0)
    own = Evaluator(model, injector, reader, batch=37, workers=1).alone(Ranks(0, 1, launched=False))
    assert (100 * own.top1 / 250, 100 * own.top5 / 250) == pytest.approx((top1, top5), abs=1e-4)
    assert 25 < own.top1 < own.top5 < 250, "neither none nor all: else the agreement says little"

    # Shards are in an order of their own; there is one picture of each class.
    assert sorted(own.labels) == list(range(250)) and len(set(names)) == 250
    theirs = outputs.argmax(1).numpy()[own.labels]
    np.testing.assert_array_equal(own.predicted, theirs)
    assert len(own.near_ties) == 0 and len(set(theirs.tolist())) > 25
