"""Every recipe fits together, on shapes alone; and one of each kind takes two steps on fake data, in one process."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from data_prep.distribute import ShardOptions, shard
from pipeline.config import TrainConfig
from pipeline.data.order import layout_of
from pipeline.evaluate import EvaluateConfig, evaluate
from pipeline.models import create_model
from pipeline.noise.drop_path import DropPathKeys
from pipeline.noise.inject import NoiseInjector
from pipeline.optim import PER_TENSOR, create_optimizer, create_schedule
from pipeline.parallel import Ranks
from pipeline.recipes import all_recipes, load_recipe, recipe_names
from pipeline.sections import from_json, to_json

IMAGENET, CIFAR10, DIGITS = 1_281_167, 50_000, 1_500  # pictures
SIZES = ("ti", "s", "b", "l")
ISSUE = {"demo", "vit_s16_in1k", "deit3_s16_in1k", "transfer", "cifar10_vit", "noisy_cifar10_vit"}
ISSUE |= {f"noisy_vit_{size}16_in1k" for size in SIZES} | {f"noisy_vit_{size}16_in1k_finetune_384" for size in SIZES}
ISSUE |= {f"noisy_resnet{depth}_in1k" for depth in (18, 34, 50, 101)}
ISSUE |= {"noisy_cifar10_resnet", "noisy_vit_b16_in1k_finetune"}
LONE_RANK = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}


@pytest.fixture(scope="module")
def fake_data(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("fake")
    random = np.random.RandomState(0)
    for split, count in (("train", 16), ("val", 4)):
        for name in ("n01", "n02"):
            (folder / split / name).mkdir(parents=True)
            for i in range(count // 2):
                pixels = random.randint(0, 256, (60, 80, 3), np.uint8)
                Image.fromarray(pixels).save(folder / split / name / f"{i}.jpg")
    return {
        split: shard(ShardOptions(folder / split, folder / "shards", split=split, processes=1)).path
        for split in ("train", "val")
    }


def test_a_recipe_says_what_a_person_must_know() -> None:
    assert set(recipe_names()) == ISSUE
    for name, recipe in all_recipes().items():
        for field in ("purpose", "source", "command", "hardware", "hours", "expected_top1"):
            assert getattr(recipe, field), (name, field)
        assert re.search(r"not measured|measured by|measured here", recipe.expected_top1), name
        assert re.search(rf"make demo|python -m pipeline train {name}( |;|$)", recipe.command), name


def test_what_recipes_share_is_no_recipe() -> None:
    folder = Path(__file__).parents[2] / "pipeline" / "recipes"
    shared = {path.stem for path in folder.glob("_*.py")} - {"__init__"}
    assert shared and not shared & set(recipe_names())
    assert set(recipe_names()) == {path.stem for path in folder.glob("*.py")} - shared - {"__init__"}


def test_runs_do_not_share_a_folder() -> None:
    runs = [recipe.config.run for recipe in all_recipes().values()]
    assert len(set(runs)) == len(runs)


def samples_of(config: TrainConfig) -> tuple[int, int]:
    """(pictures, classes) of the data that a recipe is for."""
    if config.data.image_size > 32:
        return IMAGENET, 1000
    return (DIGITS, 10) if "demo" in str(config.run) else (CIFAR10, 10)


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_fits_together(name: str) -> None:
    """The model with its noise, its groups of parameters, its schedule and its layout; nothing is computed."""
    config = load_recipe(name).config
    assert from_json(TrainConfig, json.loads(json.dumps(to_json(config))), name) == config
    count, classes = samples_of(config)
    with torch.device("meta"):
        model = create_model(config.model.without_start(), classes, config.data.image_size)
    injector = NoiseInjector(model, config.noise, config.data.image_size, config.seed)
    assert len(injector.sites) == (config.noise.kind != "none")
    DropPathKeys(model, config.seed)
    noise = config.noise
    grouped = noise.mixes_samples and noise.active(training=True) and noise.group_size is not None
    multiple = math.lcm(noise.group_size or 1 if grouped else 1, 2 if config.augment.mixes_samples else 1)
    ranks = 8 if "8 GPUs" in load_recipe(name).hardware else config.parallel.processes
    layout = layout_of(config.global_batch, config.micro_batch, 0, ranks, multiple)
    steps = count // config.global_batch
    total = steps * config.epochs if config.samples is None else config.samples // config.global_batch
    schedule = create_schedule(create_optimizer(model, config.optim), config.optim, total, steps, layout)
    schedule.step_update(total)
    if config.optim.optimizer in PER_TENSOR:
        assert config.parallel.strategy == "ddp"
    assert layout.global_batch == config.global_batch


@pytest.mark.parametrize("size", SIZES)
def test_a_noisy_vit_is_the_clean_one_but_for_its_noise(size: str) -> None:
    noisy, clean = load_recipe(f"noisy_vit_{size}16_in1k").config, load_recipe("vit_s16_in1k").config
    as_small = dataclasses.replace(noisy.model, name=clean.model.name)
    same = {"run": clean.run, "noise": clean.noise, "model": as_small, "micro_batch": clean.micro_batch}
    assert dataclasses.replace(noisy, **same) == clean and noisy.noise.kind == "circular_shift"


def test_the_cifar10_twins_differ_in_their_noise_alone() -> None:
    noisy, clean = (load_recipe(name).config for name in ("noisy_cifar10_vit", "cifar10_vit"))
    assert dataclasses.replace(noisy, run=clean.run, noise=clean.noise) == clean and noisy.noise.kind != "none"


@pytest.mark.parametrize("name", ["demo", "vit_s16_in1k", "noisy_resnet18_in1k", "deit3_s16_in1k"])
def test_two_steps_on_fake_data(name, fake_data, tmp_path, warm) -> None:
    """The recipe's own model, noise, augmentation, loss and optimiser; a batch of two, two steps, no public weights."""
    config = load_recipe(name).config
    options = ["--run", str(tmp_path / "run"), "--global-batch", "2", "--micro-batch", "2", "--stop-after-steps", "2"]
    options += ["--log-every", "1", "--parallel.processes", "1", "--data.workers", "0"]
    options += ["--data.train", str(fake_data["train"]), "--data.val", str(fake_data["val"])]
    # bfloat16 is tried by one of them: without the CPU's help it takes a minute more.
    strategy, precision = ("zero1", "bf16") if name == "vit_s16_in1k" else (config.parallel.strategy, "fp32")
    options += ["--parallel.strategy", strategy, "--parallel.precision", precision]
    if config.optim.warmup_samples is not None:
        options += ["--optim.warmup-samples", "4"]
    if config.model.pretrained:
        options += ["--model.no-pretrained", "--model.no-new-head"]
    if config.noise.group_size is not None:
        options += ["--noise.group-size", "2"]
    # As torchrun starts a lone rank: the checking process before it would take seconds of imports for each recipe.
    done = warm.run("pipeline", "train", name, *options, **LONE_RANK)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["steps"] == 2 and results["num_eval_images"] == 4
    resolved = json.loads((tmp_path / "run" / "config.json").read_text())
    assert resolved["model"]["name"] == config.model.name
    assert resolved["noise"]["kind"] == config.noise.kind
    if precision == "bf16":
        # The engine's model is rounded to bfloat16; what is saved are the optimiser's float32 weights.
        (weights,) = (tmp_path / "run" / "checkpoints").glob("step-*/model.safetensors")
        head = load_file(weights)["blocks.0.attn.qkv.weight"]
        assert not torch.equal(head, head.bfloat16().float())


def test_the_last_checkpoint_of_a_recipe_is_evaluated_with_its_noise(fake_data, tmp_path, warm) -> None:
    options = ["--run", str(tmp_path / "run"), "--global-batch", "8", "--micro-batch", "8", "--stop-after-steps", "1"]
    options += ["--data.train", str(fake_data["train"]), "--data.val", str(fake_data["val"])]
    done = warm.run("pipeline", "train", "demo", *options, **LONE_RANK)
    assert done.returncode == 0, done.stderr
    noise = dataclasses.replace(load_recipe("noisy_vit_b16_in1k_finetune").config.noise, site="blocks.5.attn")
    config = EvaluateConfig(tmp_path / "run", fake_data["val"], noise=noise, batch=2, workers=0)
    per_image, ordered, shuffled = evaluate(config, Ranks(0, 1, launched=False)).accuracies
    assert per_image.num_images == ordered.num_images == shuffled.num_images == 4
    assert not per_image.transductive and ordered.transductive and ordered.class_mate_share == 1.0
