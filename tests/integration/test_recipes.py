"""Every recipe builds and takes two steps on fake data, in one process."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from data_prep.distribute import ShardOptions, shard
from pipeline.evaluate import EvaluateConfig, evaluate
from pipeline.parallel import Ranks
from pipeline.recipes import all_recipes, load_recipe, recipe_names

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
    assert {"demo", "noisy_vit_s16_in1k", "noisy_vit_b16_in1k_finetune", "noisy_resnet50_in1k"} <= set(recipe_names())
    for name, recipe in all_recipes().items():
        for field in ("purpose", "source", "command", "hardware", "hours", "expected_top1"):
            assert getattr(recipe, field), (name, field)
        assert "not measured" in recipe.expected_top1 or "measured by" in recipe.expected_top1, name


@pytest.mark.parametrize("name", recipe_names())
def test_two_steps_on_fake_data(name, fake_data, tmp_path, command) -> None:
    """The recipe's own model, noise, augmentation and optimiser; a batch of two, two steps, no public weights."""
    config = load_recipe(name).config
    # Two pictures a batch: ViT-B in bfloat16 on two CPU cores takes seconds for each.
    options = ["--run", str(tmp_path / "run"), "--global-batch", "2", "--micro-batch", "2", "--stop-after-steps", "2"]
    options += ["--log-every", "1", "--parallel.processes", "1", "--data.workers", "0"]
    options += ["--data.train", str(fake_data["train"]), "--data.val", str(fake_data["val"])]
    if config.parallel.engine == "ddp":  # bfloat16 is tried by the other; without the CPU's help it takes a minute more
        options += ["--parallel.precision", "fp32"]
    if config.model.pretrained:
        options += ["--model.no-pretrained", "--model.no-new-head"]
    if config.noise.group_size is not None:
        options += ["--noise.group-size", "2"]
    # As torchrun starts a lone rank: the checking process before it would take seconds of imports for each recipe.
    done = command("pipeline", "train", name, *options, **LONE_RANK)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["steps"] == 2 and results["num_eval_images"] == 4
    resolved = json.loads((tmp_path / "run" / "config.json").read_text())
    assert resolved["model"]["name"] == config.model.name
    assert resolved["noise"]["kind"] == config.noise.kind != "none"
    if (config.parallel.engine, config.parallel.precision) == ("deepspeed", "bf16"):
        # The engine's model is rounded to bfloat16; what is saved are the optimiser's float32 weights.
        weights = load_file(tmp_path / "run" / "checkpoints" / "step-00000002" / "model.safetensors")
        assert not torch.equal(weights["head.weight"], weights["head.weight"].bfloat16().float())


def test_the_last_checkpoint_of_a_recipe_is_evaluated_with_its_noise(fake_data, tmp_path, command) -> None:
    options = ["--run", str(tmp_path / "run"), "--global-batch", "8", "--micro-batch", "8", "--stop-after-steps", "1"]
    options += ["--data.train", str(fake_data["train"]), "--data.val", str(fake_data["val"])]
    done = command("pipeline", "train", "demo", *options, **LONE_RANK)
    assert done.returncode == 0, done.stderr
    noise = dataclasses.replace(load_recipe("noisy_vit_b16_in1k_finetune").config.noise, site="blocks.5.attn")
    config = EvaluateConfig(tmp_path / "run", fake_data["val"], noise=noise, batch=2, workers=0)
    per_image, ordered, shuffled = evaluate(config, Ranks(0, 1, launched=False))
    assert per_image.num_images == ordered.num_images == shuffled.num_images == 4
    assert not per_image.transductive and ordered.transductive and ordered.class_mate_share == 1.0
