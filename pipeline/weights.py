"""Starting weights: of this project's checkpoints, and of timm's .safetensors, .pth and .npz files.

Nothing is unpickled but tensors. Position embeddings are resampled by timm where the resolution is another.
"""

from __future__ import annotations

import argparse
import json
import pickle
import sys
import zipfile
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.models import clean_state_dict
from torch import Tensor, nn

from pipeline.checkpoint import EMA_NAME, WEIGHTS_NAME, Generation, latest_generation

_PICKLES = (".pth", ".pt", ".bin", ".tar")
_PATCHES = "patch_embed.proj.weight"
_TAKE_THE_LAST = "leave out --model.init-ema, or --ema where that asked for them, to take the last weights"


def timm_settings(model: nn.Module) -> dict[str, Any]:
    """timm's record of a model: its mean and std, the name of its classifier, and more."""
    return cast(Any, model).pretrained_cfg


def classifier_names(model: nn.Module) -> tuple[str, ...]:
    """The modules that make the classifier, as timm names them."""
    classifier = timm_settings(model).get("classifier", "head")
    return (classifier,) if isinstance(classifier, str) else tuple(classifier)


def weights_file(source: Path, ema: bool = False) -> Path:
    """The weights under a file, a checkpoint folder, or a run folder (its newest checkpoint), whose sums are checked.

    Errors: FileNotFoundError, ValueError naming the folder and the mend.
    """
    if source.is_file():
        return source
    if not source.exists():
        raise FileNotFoundError(f"no weights at {source}: name a run folder, a checkpoint in it or a file of weights")
    folder = latest_generation(source) if (source / "checkpoints").is_dir() else source
    if folder is None:
        raise FileNotFoundError(f"{source} holds no finished checkpoint: train there first, or name another")
    name = EMA_NAME if ema else WEIGHTS_NAME
    try:
        generation = Generation(folder)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{folder} is no finished checkpoint (it has no sums): name another") from error
    if ema and name not in generation.sums:
        raise FileNotFoundError(f"{folder} holds no averaged weights: {_TAKE_THE_LAST}")
    generation.verify([name])
    return generation.path(name)


def load_weights(model: nn.Module, path: Path, new_head: bool = False, ema: bool = False) -> None:
    """Loads all of a file into the model, but for the classifier with `new_head`, which leaves it as it was made.

    ema: the average in a .pth that has both. Errors: ValueError naming the first tensors that do not fit, and the mend.
    """
    if path.suffix == ".npz":
        _load_npz(model, path, new_head)
        return
    weights = read_weights(path, ema)
    own = model.state_dict()
    head = {key for key in own if key.startswith(tuple(f"{name}." for name in classifier_names(model)))}
    if new_head:
        weights = {k: v for k, v in weights.items() if k not in head}
    weights = _fitted(model, weights, path, head)
    missing = sorted(own.keys() - weights.keys() - (head if new_head else set()))
    unexpected = sorted(weights.keys() - own.keys())
    shapes = [k for k in sorted(own.keys() & weights.keys()) if own[k].shape != weights[k].shape]
    if not missing and not unexpected and shapes and set(shapes) <= head:
        raise _other_classes(path, len(weights[shapes[0]]), len(own[shapes[0]]))
    if missing or unexpected or shapes:
        faults = [f"{len(missing)} tensors missing ({', '.join(missing[:3])})"] if missing else []
        faults += [f"{len(unexpected)} unknown ({', '.join(unexpected[:3])})"] if unexpected else []
        faults += [f"{k}: {tuple(weights[k].shape)} instead of {tuple(own[k].shape)}" for k in shapes[:3]]
        raise ValueError(f"{path} is a checkpoint of another model: {'; '.join(faults)}. {_origin(path)}")
    model.load_state_dict(weights, strict=not new_head)


def read_weights(path: Path, ema: bool = False) -> dict[str, Tensor]:
    """Names and tensors of a .safetensors or .pth file, as timm reads them: of its state_dict, without prefixes.

    Errors: ValueError naming the file.
    """
    if path.suffix not in _PICKLES:
        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} is not a readable safetensors file: {error}") from error
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # timm's own checkpoints hold their options
            body = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, OSError, EOFError, ValueError, KeyError) as error:
        raise ValueError(
            f"{path} is not a readable .pth file of tensors alone, and nothing else is unpickled: where you trust it, "
            "save its state_dict by safetensors"
        ) from error
    keys = ("state_dict_ema", "model_ema") if ema else ("state_dict", "model")
    found = next((body[key] for key in keys if body.get(key) is not None), None) if isinstance(body, dict) else None
    if ema and found is None:
        raise ValueError(f"{path} holds no averaged weights ({' or '.join(keys)}): {_TAKE_THE_LAST}")
    state = body if found is None else found
    if not isinstance(state, dict) or not state or not all(isinstance(v, Tensor) for v in state.values()):
        raise ValueError(f"{path} holds no state_dict of tensors: save it as model.state_dict()")
    return clean_state_dict(state)


def _fitted(model: nn.Module, weights: dict[str, Tensor], path: Path, head: set[str]) -> dict[str, Tensor]:
    """Where another resolution or an older layout explains what does not fit: the weights as timm converts them.

    Errors: ValueError for another patch size, which timm would resample too, silently.
    """
    own = model.state_dict()
    if _fits(own, weights, head):
        return weights
    if _PATCHES in own and _PATCHES in weights and weights[_PATCHES].ndim == 4:
        _check_patches(path, tuple(weights[_PATCHES].shape[2:]), tuple(own[_PATCHES].shape[2:]))
    convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if convert is None:
        return weights
    try:
        converted = convert(dict(weights), model)
    except (KeyError, IndexError, AttributeError, AssertionError, ValueError, RuntimeError):
        return weights  # what does not fit is then named
    return converted if _fits(own, converted, head) else weights


def _fits(own: dict[str, Tensor], weights: dict[str, Tensor], head: set[str]) -> bool:
    """But for the classifier."""
    shapes = [{k: v.shape for k, v in tensors.items() if k not in head} for tensors in (own, weights)]
    return shapes[0] == shapes[1]


def _check_patches(path: Path, there: tuple[int, ...], here: tuple[int, ...]) -> None:
    if there != here:
        there_text, here_text = (" x ".join(map(str, size)) for size in (there, here))
        raise ValueError(
            f"{path} has patches of {there_text} pixels, the model of {here_text}: give --model.name or "
            "--model.options the patch size it was trained with"
        )


def _other_classes(path: Path, there: int, here: int) -> ValueError:
    return ValueError(
        f"{path} was trained on {there} classes, the data has {here}: pass --model.new-head to start a new classifier, "
        "or take the data it was trained on"
    )


def _origin(path: Path) -> str:
    config = path.with_name("config.json")
    if not config.is_file():
        return "Give --model.name and --model.options the values it was trained with"
    model = json.loads(config.read_text())["model"]
    return f"It was trained as --model.name {model['name']} --model.options {model['options'] or 'none'}"


def _load_npz(model: nn.Module, path: Path, new_head: bool) -> None:
    """Google's ViT weights (augreg and its kin), by timm's own reader, which passes over what it does not look for."""
    vit = cast(Any, model)
    if not hasattr(model, "load_pretrained") or not hasattr(model, "blocks"):
        raise ValueError(f"{path}: timm reads .npz weights into ViTs, not into a {type(model).__name__}")
    try:
        with np.load(path, allow_pickle=False) as file:
            prefix, patches, depth, classes = _npz_facts(file)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is not a readable .npz file of a ViT: {error}") from error
    _check_patches(path, patches[:2], tuple(vit.patch_embed.proj.weight.shape[2:]))
    if (depth, patches[3]) != (len(vit.blocks), vit.embed_dim):
        raise ValueError(
            f"{path} is a checkpoint of another model: {depth} blocks of width {patches[3]}, the model has "
            f"{len(vit.blocks)} of {vit.embed_dim}"
        )
    if not new_head and classes != vit.num_classes:
        raise _other_classes(path, classes, vit.num_classes)
    head = {name: {k: v.clone() for k, v in model.get_submodule(name).state_dict().items()} for name in _heads(model)}
    try:
        vit.load_pretrained(str(path), prefix=prefix)
    except (KeyError, ValueError, RuntimeError, AssertionError) as error:
        raise ValueError(f"{path} does not fit {type(model).__name__}: {error}") from error
    for name, state in head.items() if new_head else ():
        model.get_submodule(name).load_state_dict(state)


def _heads(model: nn.Module) -> list[str]:
    return [name for name in classifier_names(model) if name in dict(model.named_modules())]


def _npz_facts(file: Any) -> tuple[str, tuple[int, ...], int, int]:
    """(prefix of the names, shape of the patch kernel (height, width, 3, width), blocks, classes)."""
    kernel = next((key for key in file.files if key.endswith("embedding/kernel")), None)
    if kernel is None:
        raise ValueError("it has no embedding/kernel")
    prefix = kernel.removesuffix("embedding/kernel")
    stacked = f"{prefix}Transformer/encoderblock/LayerNorm_0/scale"
    numbered = {key.split("encoderblock_")[1].split("/")[0] for key in file.files if "encoderblock_" in key}
    depth = len(file[stacked]) if stacked in file.files else len(numbered)
    bias = f"{prefix}head/bias"
    return prefix, file[kernel].shape, depth, len(file[bias]) if bias in file.files else 0
