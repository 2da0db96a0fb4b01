"""Starting weights of every kind of file, at another resolution, with another head: what timm itself would load."""

from __future__ import annotations

import argparse
import pickle
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from pipeline import checkpoint as ckpt
from pipeline.models import ModelConfig, create_model, sincos2d
from pipeline.weights import load_weights, read_weights, weights_file

SMALL = {"depth": 2, "embed_dim": 24, "num_heads": 2, "patch_size": 16}


def vit(size: int = 64, classes: int = 4, name: str = "vit_tiny_patch16_224", **changes) -> nn.Module:
    return create_model(ModelConfig(name=name, options=SMALL | changes), classes, size)


def state(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone().contiguous() for key, value in model.state_dict().items()}


def one_line(error: pytest.ExceptionInfo) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


# Kinds of files


@pytest.mark.parametrize("ending", [".pth", ".pt", ".bin", ".pth.tar"])
@pytest.mark.parametrize(
    "wrapped",
    [
        lambda weights: weights,
        lambda weights: {"state_dict": weights, "epoch": 3, "args": argparse.Namespace(lr=0.1)},
        lambda weights: {"model": weights},
        lambda weights: {f"module.{key}": value for key, value in weights.items()},
        lambda weights: {"state_dict": {f"_orig_mod.module.{key}": value for key, value in weights.items()}},
        lambda weights: {"state_dict": weights, "state_dict_ema": {"wrong": torch.zeros(1)}},
    ],
    ids=["plain", "state_dict", "model", "module", "compiled", "beside an average"],
)
def test_pth_files_as_timm_reads_them(tmp_path, ending, wrapped):
    first, path = vit(), tmp_path / f"weights{ending}"
    torch.save(wrapped(state(first)), path)
    model = vit()
    load_weights(model, path)
    assert all(torch.equal(value, state(first)[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("key", ["state_dict_ema", "model_ema"])
def test_the_average_of_a_pth_file(tmp_path, key):
    first, average, path = vit(), vit(), tmp_path / "a.pth"
    torch.save({"state_dict": state(first), key: state(average)}, path)
    for ema, wanted in ((False, first), (True, average)):
        found = read_weights(path, ema)
        assert all(torch.equal(value, wanted.state_dict()[name]) for name, value in found.items())
    torch.save({"state_dict": state(first)}, path)
    with pytest.raises(ValueError, match=r"a\.pth holds no averaged weights") as error:
        create_model(ModelConfig(name="vit_tiny_patch16_224", options=SMALL, init_from=path, init_ema=True), 4, 64)
    assert "--model.init-ema" in one_line(error)


class Malicious:
    def __reduce__(self):
        return Path.touch, (Path("unpickled"),)


def test_nothing_but_tensors_is_unpickled(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": state(vit()), "more": Malicious()}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"a\.pth is not a readable \.pth file of tensors alone") as error:
        load_weights(vit(), tmp_path / "a.pth")
    one_line(error)
    (tmp_path / "b.pth").write_bytes(pickle.dumps(Malicious(), protocol=2))
    with pytest.raises(ValueError, match=r"b\.pth"):
        load_weights(vit(), tmp_path / "b.pth")
    np.savez(tmp_path / "c.npz", **{"embedding/kernel": np.array([Malicious()], dtype=object)})
    with pytest.raises(ValueError, match=r"c\.npz is not a readable \.npz"):
        load_weights(vit(), tmp_path / "c.npz")
    assert not (tmp_path / "unpickled").exists()


@pytest.mark.parametrize("body", [torch.zeros(3), {"state_dict": {}}, {"state_dict": {"a": 1}}, [1, 2]], ids=repr)
def test_a_pth_without_a_state_dict_is_refused(tmp_path, body):
    torch.save(body, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"a\.pth holds no state_dict of tensors") as error:
        load_weights(vit(), tmp_path / "a.pth")
    one_line(error)


@pytest.mark.parametrize("ending", [".pth", ".npz", ".safetensors"])
@pytest.mark.parametrize("damage", [lambda d: d[: len(d) // 2], lambda d: b"", lambda d: b"\xff" + d[1:]])
def test_damaged_files_are_refused_in_one_line(tmp_path, ending, damage):
    path = tmp_path / f"a{ending}"
    if ending == ".npz":
        np.savez(path, **google_weights(vit()))
    elif ending == ".pth":
        torch.save(state(vit()), path)
    else:
        save_file(state(vit()), path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=rf"a\{ending} is not a readable") as error:
        load_weights(vit(), path)
    one_line(error)


# Google's .npz


def google_weights(model: nn.Module) -> dict[str, np.ndarray]:
    """A timm ViT's weights by the names and axes of Google's files, as augreg's are."""
    w = {key: value.numpy() for key, value in model.state_dict().items()}
    heads, width = model.blocks[0].attn.num_heads, model.embed_dim
    out = {
        "embedding/kernel": w["patch_embed.proj.weight"].transpose(2, 3, 1, 0),
        "embedding/bias": w["patch_embed.proj.bias"],
        "cls": w["cls_token"],
        "Transformer/posembed_input/pos_embedding": w["pos_embed"],
        "Transformer/encoder_norm/scale": w["norm.weight"],
        "Transformer/encoder_norm/bias": w["norm.bias"],
        "head/kernel": w["head.weight"].T,
        "head/bias": w["head.bias"],
    }
    for i in range(len(model.blocks)):
        to, at = f"Transformer/encoderblock_{i}/", f"blocks.{i}."
        qkv_weight = w[f"{at}attn.qkv.weight"].reshape(3, heads, -1, width).transpose(0, 3, 1, 2)
        qkv_bias = w[f"{at}attn.qkv.bias"].reshape(3, heads, -1)
        for part, kernel, bias in zip(("query", "key", "value"), qkv_weight, qkv_bias, strict=True):
            out[f"{to}MultiHeadDotProductAttention_1/{part}/kernel"] = kernel
            out[f"{to}MultiHeadDotProductAttention_1/{part}/bias"] = bias
        out[f"{to}MultiHeadDotProductAttention_1/out/kernel"] = w[f"{at}attn.proj.weight"].T.reshape(heads, -1, width)
        out[f"{to}MultiHeadDotProductAttention_1/out/bias"] = w[f"{at}attn.proj.bias"]
        for name, norm in (("LayerNorm_0", "norm1"), ("LayerNorm_2", "norm2")):
            out[f"{to}{name}/scale"], out[f"{to}{name}/bias"] = w[f"{at}{norm}.weight"], w[f"{at}{norm}.bias"]
        for number, layer in enumerate(("fc1", "fc2")):
            out[f"{to}MlpBlock_3/Dense_{number}/kernel"] = w[f"{at}mlp.{layer}.weight"].T
            out[f"{to}MlpBlock_3/Dense_{number}/bias"] = w[f"{at}mlp.{layer}.bias"]
    return out


@pytest.fixture
def google(tmp_path) -> tuple[nn.Module, Path]:
    first = vit()
    np.savez(tmp_path / "augreg.npz", **google_weights(first))
    return first, tmp_path / "augreg.npz"


def test_npz_weights_start_a_model_exactly(google):
    first, path = google
    model = vit()
    load_weights(model, path)
    assert all(torch.equal(value, state(first)[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("classes", [4, 7])
def test_npz_weights_with_a_new_head(google, classes):
    first, path = google
    torch.manual_seed(1)
    model = vit(classes=classes)
    own = model.head.weight.clone()
    load_weights(model, path, new_head=True)
    assert torch.equal(model.head.weight, own)
    assert torch.equal(model.blocks[1].mlp.fc2.weight, first.blocks[1].mlp.fc2.weight)


def test_npz_weights_at_another_resolution_are_timm_s(google):
    _, path = google
    model, theirs = vit(size=96), vit(size=96)
    load_weights(model, path)
    theirs.load_pretrained(str(path))
    assert torch.equal(model.pos_embed, theirs.pos_embed) and model.pos_embed.shape[1] == 37


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"classes": 7}, "was trained on 4 classes, the data has 7"),
        ({"depth": 3}, "2 blocks of width 24, the model has 3 of 24"),
        ({"embed_dim": 48}, "2 blocks of width 24, the model has 2 of 48"),
        ({"patch_size": 8}, "patches of 16 x 16 pixels, the model of 8 x 8"),
    ],
)
def test_npz_weights_of_another_model_are_refused(google, changes, said):
    with pytest.raises(ValueError) as error:
        load_weights(vit(**changes), google[1])
    assert said in one_line(error)
    with pytest.raises(ValueError, match="into ViTs, not into a ResNet"):
        load_weights(create_model(ModelConfig(name="resnet18"), 4, 64), google[1])


# Another resolution


@pytest.mark.parametrize("ending", [".safetensors", ".pth"])
@pytest.mark.parametrize(
    ("options", "prefix"), [({}, 1), ({"reg_tokens": 4}, 5), ({"class_token": False, "global_pool": "avg"}, 0)], ids=str
)
def test_position_embeddings_from_224_to_384_are_timm_s(tmp_path, ending, options, prefix):
    first, path = vit(224, **options), tmp_path / f"a{ending}"
    (save_file if ending == ".safetensors" else torch.save)(state(first), path)
    model = create_model(ModelConfig(name="vit_tiny_patch16_224", options=SMALL | options, init_from=path), 4, 384)
    wanted = resample_abs_pos_embed(first.pos_embed, (24, 24), num_prefix_tokens=prefix)
    assert torch.equal(model.pos_embed, wanted) and model.pos_embed.shape[1] == 576 + prefix
    kept = {key: value for key, value in state(first).items() if key != "pos_embed"}
    assert all(torch.equal(model.state_dict()[key], value) for key, value in kept.items())
    assert model(torch.zeros(1, 3, 384, 384)).shape == (1, 4)


def test_it_is_what_timm_s_own_loading_gives(tmp_path):
    first, path = vit(224), tmp_path / "a.safetensors"
    save_file(state(first), path)
    overlay = {"file": path, "num_classes": 4}
    theirs = timm.create_model(
        "vit_tiny_patch16_224", num_classes=4, img_size=384, pretrained=True, pretrained_cfg_overlay=overlay, **SMALL
    )
    model = vit(384)
    load_weights(model, path)
    assert all(torch.equal(value, theirs.state_dict()[key]) for key, value in model.state_dict().items())


def test_another_resolution_and_another_head_together(tmp_path):
    first, path = vit(64), tmp_path / "a.safetensors"
    save_file(state(first), path)
    model = create_model(
        ModelConfig(name="vit_tiny_patch16_224", options=SMALL, init_from=path, new_head=True), classes := 9, 96
    )
    assert model.head.out_features == classes
    assert torch.equal(model.pos_embed, resample_abs_pos_embed(first.pos_embed, (6, 6)))
    with pytest.raises(ValueError, match="4 classes, the data has 9"):
        create_model(ModelConfig(name="vit_tiny_patch16_224", options=SMALL, init_from=path), 9, 96)


def test_another_patch_size_is_refused_in_one_line(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file(state(vit(64)), path)
    with pytest.raises(ValueError, match="patches of 16 x 16 pixels, the model of 8 x 8") as error:
        load_weights(vit(64, patch_size=8), path)
    assert "--model.options" in one_line(error)


def test_a_grid_that_is_no_square_is_refused_in_one_line(tmp_path):
    path, weights = tmp_path / "a.safetensors", state(vit(64))
    weights["pos_embed"] = torch.zeros(1, 1 + 15, 24)
    save_file(weights, path)
    with pytest.raises(ValueError, match=r"another model: pos_embed: \(1, 16, 24\) instead of \(1, 37, 24\)") as error:
        load_weights(vit(96), path)
    one_line(error)


# The project's own


def test_the_average_of_a_run(tmp_path):
    first, average = vit(), vit()
    folder = ckpt.temporary_folder(tmp_path, 1)
    folder.mkdir(parents=True)
    save_file(state(first), folder / ckpt.WEIGHTS_NAME)
    save_file(state(average), folder / ckpt.EMA_NAME)
    ckpt.publish_generation(tmp_path, 1, keep=2)
    for ema, wanted in ((False, first), (True, average)):
        config = ModelConfig(name="vit_tiny_patch16_224", options=SMALL, init_from=tmp_path, init_ema=ema)
        assert torch.equal(create_model(config, 4, 64).head.weight, wanted.head.weight)
    folder = ckpt.temporary_folder(tmp_path, 2)
    folder.mkdir()
    save_file(state(first), folder / ckpt.WEIGHTS_NAME)
    ckpt.publish_generation(tmp_path, 2, keep=2)
    with pytest.raises(FileNotFoundError, match=r"holds no averaged weights: leave out --model\.init-ema"):
        weights_file(tmp_path, ema=True)


# Fixed positions


def test_fixed_positions_are_sines_and_cosines_of_the_grid():
    table = sincos2d(3, 5, 8)
    assert table.shape == (15, 8)
    for y in range(3):
        for x in range(5):
            wanted = [f(v * w) for v in (x, y) for f in (np.sin, np.cos) for w in (1.0, 1e-4)]
            torch.testing.assert_close(table[y * 5 + x], torch.tensor(wanted, dtype=torch.float32), rtol=0, atol=1e-6)


def test_fixed_positions_in_a_model_are_not_trained():
    config = ModelConfig(name="vit_tiny_patch16_224", options=SMALL, pos_embed="sincos2d")
    model = create_model(config, 4, 64)
    assert not model.pos_embed.requires_grad and list(model.state_dict()) == list(vit().state_dict())
    assert torch.equal(model.pos_embed[0, 1:], sincos2d(4, 4, 24)) and not model.pos_embed[0, 0].any()
    with pytest.raises(ValueError, match=r"model\.pos_embed sincos2d is for ViTs .* not resnet18"):
        create_model(ModelConfig(name="resnet18", pos_embed="sincos2d"), 4, 64)
