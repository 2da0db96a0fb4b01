"""Models and their starting weights: what does not fit is refused with what is wrong and how to mend it."""

import json
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from pipeline import checkpoint as ckpt
from pipeline.models import ModelConfig, create_model
from pipeline.weights import load_weights, weights_file

SIZE = 32
OPTIONS = {"depth": 1, "embed_dim": 24, "num_heads": 2, "patch_size": 8}


def vit(classes: int = 4, **changes) -> torch.nn.Module:
    config = ModelConfig(name="vit_tiny_patch16_224", options=OPTIONS | changes)
    return create_model(config, classes, SIZE)


def saved(model: torch.nn.Module, path: Path) -> Path:
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, path)
    return path


def started(path: Path, classes: int = 4, new_head: bool = False, **changes) -> torch.nn.Module:
    config = ModelConfig(name="vit_tiny_patch16_224", options=OPTIONS | changes, init_from=path, new_head=new_head)
    return create_model(config, classes, SIZE)


def equal(one: torch.nn.Module, other: torch.nn.Module, but: tuple[str, ...] = ()) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a if not k.startswith(but or ("\0",)))


def test_the_model_is_timm_s():
    model = vit()
    plain = timm.create_model("vit_tiny_patch16_224", num_classes=4, img_size=SIZE, **OPTIONS)
    assert list(model.state_dict()) == list(plain.state_dict())
    assert model(torch.zeros(2, 3, SIZE, SIZE)).shape == (2, 4)
    assert create_model(ModelConfig(name="resnet18"), 4, SIZE)(torch.zeros(2, 3, SIZE, SIZE)).shape == (2, 4)


@pytest.mark.parametrize(("name", "near"), [("vit_tiny_patch16", "vit_tiny_patch16_224"), ("resent18", "resnet18")])
def test_an_unknown_name_offers_the_nearest(name, near):
    with pytest.raises(ValueError) as error:
        create_model(ModelConfig(name=name), 4, SIZE)
    assert f"model.name '{name}'" in str(error.value) and near in str(error.value)


@pytest.mark.parametrize("options", [{"deepness": 3}, {"embed_dim": 25}, {"patch_size": "large"}])
def test_options_that_do_not_fit_are_refused(options):
    with pytest.raises(ValueError, match=r"model\.options .*vit_tiny_patch16_224"):
        vit(**options)


def test_weights_start_a_model_exactly(tmp_path):
    first = vit()
    path = saved(first, tmp_path / "a.safetensors")
    assert not equal(vit(), first)
    assert equal(started(path), first)


def test_other_classes_are_refused_with_both_numbers_and_the_mend(tmp_path):
    path = saved(vit(classes=4), tmp_path / "a.safetensors")
    with pytest.raises(ValueError) as error:
        started(path, classes=7)
    text = str(error.value)
    assert all(part in text for part in (str(path), "4 classes", "has 7", "--model.new-head"))


@pytest.mark.parametrize("classes", [4, 7])
def test_new_head_keeps_all_but_the_classifier(tmp_path, classes):
    first = vit(classes=4)
    path = saved(first, tmp_path / "a.safetensors")
    torch.manual_seed(1)
    model = started(path, classes=classes, new_head=True)
    assert model.head.weight.shape[0] == classes
    kept = {k: v for k, v in first.state_dict().items() if not k.startswith("head.")}
    assert len(kept) > 10 and all(torch.equal(model.state_dict()[k], v) for k, v in kept.items())
    if classes == 4:
        assert not torch.equal(model.head.weight, first.head.weight)


def test_new_head_of_a_cnn_is_its_own_classifier(tmp_path):
    first = create_model(ModelConfig(name="resnet18"), 4, SIZE)
    path = saved(first, tmp_path / "a.safetensors")
    model = create_model(ModelConfig(name="resnet18", init_from=path, new_head=True), 7, SIZE)
    assert model.fc.weight.shape[0] == 7
    assert equal(create_model(ModelConfig(name="resnet18", init_from=path), 4, SIZE), first)
    assert torch.equal(model.layer4[1].bn2.running_var, first.layer4[1].bn2.running_var)


def test_another_model_is_refused_naming_tensors(tmp_path):
    path = saved(vit(depth=2), tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"a\.safetensors is a checkpoint of another model: .*unknown \(blocks\.1\."):
        started(path)
    with pytest.raises(ValueError, match=r"another model: .*missing \(blocks\.2\."):
        started(path, depth=3)
    with pytest.raises(ValueError, match=r"another model: .*\(24,\) instead of \(48,\)"):
        started(saved(vit(), path), embed_dim=48)
    with pytest.raises(ValueError, match=r"another model.*--model\.name"):
        load_weights(create_model(ModelConfig(name="resnet18"), 4, SIZE), path)
    # A new head does not excuse a difference elsewhere.
    with pytest.raises(ValueError, match="another model"):
        started(path, depth=2, new_head=True)


def test_the_mend_names_what_the_checkpoint_was_trained_as(tmp_path):
    path = saved(vit(depth=2), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"model": {"name": "vit_x", "options": {"depth": 2}}}))
    with pytest.raises(ValueError, match=r"trained as --model\.name vit_x .*'depth': 2"):
        started(path)


def test_a_refused_checkpoint_changes_no_weight(tmp_path):
    path, model = saved(vit(depth=2), tmp_path / "a.safetensors"), vit()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ValueError):
        load_weights(model, path)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("damage", [lambda d: d[:-1], lambda d: d[: len(d) // 2], lambda d: b"", lambda d: b"\xff" + d])
def test_a_damaged_file_is_refused(tmp_path, damage):
    path = saved(vit(), tmp_path / "a.safetensors")
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=r"a\.safetensors is not a readable safetensors file"):
        started(path)


def test_weights_are_found_in_a_run_a_checkpoint_or_a_file(tmp_path):
    for step in (1, 2):
        folder = ckpt.temporary_folder(tmp_path, step)
        folder.mkdir(parents=True)
        saved(vit(), folder / "model.safetensors")
        ckpt.publish_generation(tmp_path, step, keep=2)
    one, two = (tmp_path / "checkpoints" / ckpt.generation_name(step) for step in (1, 2))
    assert weights_file(tmp_path) == two / "model.safetensors"
    assert weights_file(one) == one / "model.safetensors"
    assert weights_file(one / "model.safetensors") == one / "model.safetensors"
    data = bytearray((two / "model.safetensors").read_bytes())
    data[-1] ^= 1  # safetensors itself would read this as another weight
    (two / "model.safetensors").write_bytes(data)
    assert len(load_file(two / "model.safetensors")) > 10
    with pytest.raises(ValueError, match=r"step-00000002/model\.safetensors is damaged"):
        started(tmp_path)


def test_no_weights_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="no weights at"):
        weights_file(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match="no finished checkpoint"):
        weights_file(tmp_path)
    (tmp_path / "folder").mkdir()
    with pytest.raises(FileNotFoundError, match="folder is no finished checkpoint"):
        weights_file(tmp_path / "folder")
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(FileNotFoundError, match="no finished checkpoint"):
        weights_file(tmp_path)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"drop_path": 1.0}, "drop_path"),
        ({"drop_path": -0.1}, "drop_path"),
        ({"new_head": True}, "new_head"),
        ({"pretrained": True, "init_from": Path("x")}, "pretrained"),
    ],
    ids=str,
)
def test_options_that_contradict_are_refused_by_name(options, name):
    with pytest.raises(ValueError, match=rf"model\.{name} "):
        ModelConfig(**options)
