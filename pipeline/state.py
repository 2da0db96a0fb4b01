"""What a run saves and goes on from: written into a generation by all ranks, compared before it is loaded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from pipeline import checkpoint as ckpt
from pipeline.config import TrainConfig
from pipeline.data.loader import TrainLoader
from pipeline.models import WEIGHTS_NAME
from pipeline.parallel import is_lost_peer
from pipeline.sections import to_json

# What may differ between a run and its resume without changing what is computed. Paths of the data may, since the
# samples themselves are compared; micro_batch and processes are looked at on their own.
_FREE = {"run", "resume", "micro_batch", "stop_after_steps", "log_every"}
_FREE |= {
    "data.train",
    "data.val",
    "data.workers",
    "data.label_map",
    "data.cache",
    "data.check_crc",
    "data.on_bad_sample",
    "parallel.processes",
}
_FREE |= {"checkpoint.every_epochs", "checkpoint.keep", "model.init_from", "model.new_head", "model.pretrained"}


def save_run(
    config: TrainConfig, accelerator: Any, model: nn.Module, loader: TrainLoader, classes: tuple[str, ...], step: int
) -> None:
    """One generation: engine state by all ranks, then weights, configuration and progress by rank 0.

    Errors: OSError naming the folder, where it cannot be written; the generations before it stay whole.
    """
    folder = ckpt.temporary_folder(config.run, step)
    main = loader.layout.rank == 0
    try:
        if main:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
        accelerator.wait_for_everyone()
        accelerator.save_state(str(folder / ckpt.ENGINE_FOLDER))
        weights = _portable(model, config)
        if main:
            save_file(weights, folder / WEIGHTS_NAME)
            ckpt.write_json(folder / ckpt.CONFIG_NAME, to_json(config) | {"classes": list(classes), "step": step})
            ckpt.write_json(folder / ckpt.PROGRESS_NAME, _progress(config, loader, step))
            if config.data.label_map is not None:
                shutil.copyfile(config.data.label_map, folder / ckpt.LABEL_MAP_NAME)
        accelerator.wait_for_everyone()
        if main:
            ckpt.publish_generation(config.run, step, config.checkpoint.keep)
    except (OSError, RuntimeError, SafetensorError) as error:
        if is_lost_peer(error):
            raise
        free = shutil.disk_usage(config.run).free
        shutil.rmtree(folder, ignore_errors=True)
        reason = str(error).strip().splitlines()[0]
        raise OSError(
            f"the checkpoint of step {step} could not be written to {folder.parent} ({free:,} bytes free): {reason}; "
            "make room there and go on with --resume"
        ) from error
    accelerator.wait_for_everyone()


def _progress(config: TrainConfig, loader: TrainLoader, step: int) -> dict[str, Any]:
    layout = {"world_size": loader.layout.world_size, "micro_batch": loader.layout.micro_batch}
    samples = {"samples_sha256": loader.reader.samples_sha256}
    return {"step": step, "loader": loader.state_dict()} | layout | samples


def _portable(model: nn.Module, config: TrainConfig) -> dict[str, Tensor]:
    """float32 on the CPU: safetensors that timm loads anywhere. Called by all ranks.

    Under DeepSpeed's bfloat16 the model holds rounded weights; the optimiser's own, in float32, are the run's.
    """
    weights = {k: (v.float() if v.is_floating_point() else v) for k, v in model.state_dict().items()}
    if config.parallel.engine == "deepspeed" and config.parallel.precision == "bf16":
        from deepspeed.utils import safe_get_full_fp32_param

        for name, parameter in model.named_parameters():
            full = safe_get_full_fp32_param(parameter)
            assert full is not None, f"the optimiser holds no float32 weights of {name}"
            weights[name] = full
    return {k: v.detach().cpu().contiguous() for k, v in weights.items()}


def checked_progress(generation: Path, config: TrainConfig, loader: TrainLoader) -> dict[str, Any]:
    """The generation's progress, its place taken by the loader.

    Errors: ValueError where this run would not be the same one, naming the options that differ.
    """
    progress = json.loads((generation / ckpt.PROGRESS_NAME).read_text())
    before = json.loads((generation / ckpt.CONFIG_NAME).read_text())
    now = to_json(config)
    changed = {
        name: (old, _flat(now).get(name))
        for name, old in _flat(before).items()
        if name in _flat(now) and name not in _FREE and old != _flat(now)[name]
    }
    if changed:
        listed = ", ".join(f"{name} was {old}, is {new}" for name, (old, new) in changed.items())
        raise ValueError(
            f"cannot resume {generation}: {listed}; keep them, or start a new run with --model.init-from {config.run}"
        )
    if progress["samples_sha256"] != loader.reader.samples_sha256:
        raise ValueError(f"cannot resume {generation}: {config.data.train} holds other samples than it was trained on")
    if _label_map(generation / ckpt.LABEL_MAP_NAME) != _label_map(config.data.label_map):
        raise ValueError(f"cannot resume {generation}: data.label_map gives other labels than it was trained on")
    layout = loader.layout
    if config.parallel.engine == "deepspeed" and progress["world_size"] != layout.world_size:
        raise ValueError(
            f"cannot resume: {generation} holds DeepSpeed's state of {progress['world_size']} ranks, this run has "
            f"{layout.world_size}: start {progress['world_size']}, or a new run with --model.init-from {config.run}"
        )
    spread = (progress["world_size"], progress["micro_batch"])
    running = config.noise.group_size is None and config.noise.mixes_samples and config.noise.active(training=True)
    if running and spread != (layout.world_size, layout.micro_batch):
        raise ValueError(
            f"cannot resume: noise.group_size None mixes the micro-batch, so keep {spread[0]} ranks of {spread[1]}"
        )
    loader.load_state_dict(progress["loader"])
    return progress


def _label_map(path: Path | None) -> Any:
    return json.loads(path.read_text()) if path is not None and path.is_file() else None


def _flat(body: dict[str, Any]) -> dict[str, Any]:
    """Options by their names on the command line: {"noise": {"kind": ...}} -> {"noise.kind": ...}."""
    flat: dict[str, Any] = {}
    for name, value in body.items():
        if isinstance(value, dict) and name != "options":
            flat |= {f"{name}.{inner}": v for inner, v in value.items()}
        else:
            flat[name] = value
    return flat
