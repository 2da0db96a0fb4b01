"""Bad input of the trainer's commands: one message that names the thing and the mend, status 2, nothing written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import save_file

from pipeline.__main__ import main


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]):
    """Runs the command in this process (the checks come before any rank is started) and gives its message."""

    def run(*words: str) -> str:
        try:
            status = main(list(words))
        except SystemExit as stop:  # tyro's own refusal of an option
            status = stop.code if isinstance(stop.code, int) else 1
        printed = capsys.readouterr()
        assert status == 2, printed.out + printed.err
        assert "Traceback" not in printed.err
        assert printed.err.count("error") <= 1 and printed.err.strip()
        return " ".join(printed.err.replace("│", " ").split())

    return run


@pytest.fixture
def train(refused, digits, tmp_path):
    def run(*options: str) -> str:
        data = ("--data.train", str(digits.train), "--data.val", str(digits.val))
        message = refused("train", "demo", "--run", str(tmp_path / "run"), *data, *options)
        assert not (tmp_path / "run").exists(), "something was written"
        return message

    return run


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--data.train", "nowhere/train.manifest.json"], ["nowhere/train.manifest.json", "data_prep shard"]),
        (["--data.trian", "x"], ["--data.trian", "--data.train"]),
        (["--noise.kind", "pink"], ["pink", "gaussian"]),
        (["--noise.strength", "-1"], ["noise.strength", "-1"]),
        (["--noise.site", "blocks.55"], ["blocks.55", "blocks.5"]),
        (["--noise.kind", "circular_shift", "--noise.strength", "0.5"], ["noise.strength", "0.5"]),
        (["--noise.kind", "circular_shift", "--noise.group-size", "7"], ["multiple of 7", "1, 2, 4, 8, 16, 32"]),
        (["--global-batch", "61"], ["global_batch 61", "2 ranks", "60 or 62"]),
        (["--global-batch", "2048"], ["global_batch 2048", "1397"]),
        (["--optim.lr", "0"], ["optim.lr", "above 0"]),
        (["--optim.warmup-epochs", "30"], ["optim.warmup_epochs", "30"]),
        (["--model.name", "vit_tini_patch16_224"], ["vit_tini_patch16_224", "vit_"]),
        (["--model.options", "patch_size", "8", "colour", "3"], ["model.options", "colour"]),
        (["--model.new-head"], ["model.new_head", "model.init_from"]),
        (["--model.init-from", "nowhere"], ["nowhere", "run folder"]),
        (["--data.format", "ffcv"], ["no .beton", "data_prep beton"]),
        (["--data.label-map", "nowhere.json"], ["nowhere.json", "label_map"]),
        (["--augment.randaugment", "garbage"], ["augment.randaugment", "rand-m9"]),
        (["--model.options", "patch_size", "0"], ["model.options", "patch_size"]),
        (["--seed", "-1"], ["seed is -1"]),
        (["--augment.scale", "0", "1"], ["augment.scale", "0 < low"]),
    ],
)
def test_an_option_that_cannot_be(options, expected, train) -> None:
    message = train(*options)
    for text in expected:
        assert text in message


def test_a_label_map_that_leaves_a_class_out(train, tmp_path) -> None:
    (tmp_path / "map.json").write_text(json.dumps({str(i): "odd" for i in range(9)}))
    message = train("--data.label-map", str(tmp_path / "map.json"))
    assert "leaves out ['9']" in message


def test_a_checkpoint_of_another_model(train, tmp_path) -> None:
    import timm

    weights = tmp_path / "resnet.safetensors"
    save_file(timm.create_model("resnet18", num_classes=10).state_dict(), weights)
    message = train("--model.init-from", str(weights))
    assert str(weights) in message and "another model" in message and "--model.name" in message


def test_a_checkpoint_of_other_classes(train, tmp_path) -> None:
    import timm

    weights = tmp_path / "seven.safetensors"
    shape = {"img_size": 32, "patch_size": 8, "embed_dim": 96, "depth": 6, "num_heads": 3}
    save_file(timm.create_model("vit_tiny_patch16_224", num_classes=7, **shape).state_dict(), weights)
    message = train("--model.init-from", str(weights))
    assert "7 classes" in message and "10" in message and "--model.new-head" in message


def test_a_file_that_is_no_checkpoint(train, tmp_path) -> None:
    (tmp_path / "text.safetensors").write_text("not weights")
    assert "not a readable safetensors file" in train("--model.init-from", str(tmp_path / "text.safetensors"))


def test_a_cut_shard_is_refused_before_a_step(refused, digits, tmp_path) -> None:
    import shutil

    shutil.copytree(digits.train.parent, tmp_path / "shards")
    tar = sorted((tmp_path / "shards").glob("train-*.tar"))[1]
    tar.write_bytes(tar.read_bytes()[:-512])
    manifest = tmp_path / "shards" / digits.train.name
    message = refused("train", "demo", "--run", str(tmp_path / "run"), "--data.train", str(manifest))
    assert tar.name in message and "data_prep verify" in message
    assert not (tmp_path / "run").exists()


def test_evaluate_and_export_name_what_is_missing(refused, digits, tmp_path) -> None:
    message = refused("evaluate", "--checkpoint", str(tmp_path / "none"), "--data", str(digits.val))
    assert str(tmp_path / "none") in message and "run folder" in message
    (tmp_path / "empty" / "checkpoints").mkdir(parents=True)
    message = refused("export", "--checkpoint", str(tmp_path / "empty"), "--output", str(tmp_path / "x.safetensors"))
    assert "holds no finished checkpoint" in message
    assert not Path(tmp_path / "x.safetensors").exists()


def test_an_unknown_command(refused) -> None:
    assert "trian" in refused("trian") and "train" in refused("trian")
