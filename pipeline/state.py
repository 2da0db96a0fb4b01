"""What a run saves and goes on from: the record beside the state, and its comparison with the run that resumes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch.distributed as dist

from pipeline import checkpoint as ckpt
from pipeline.config import TrainConfig
from pipeline.data.loader import TrainLoader
from pipeline.engine import Engine
from pipeline.parallel import Ranks
from pipeline.sections import to_json

# What may differ between a run and its resume without changing what is computed, but for the last bits of float sums.
# Paths of the data may, since the samples themselves are compared.
_FREE = {
    "run",
    "resume",
    "micro_batch",
    "stop_after_steps",
    "stop_after_bad_steps",
    "walltime_minutes",
    "evaluate_every_epochs",
    "log_every",
    "ledger",
    "histograms",
    "profile_steps",
    "data.train",
    "data.val",
    "data.workers",
    "data.label_map",
    "data.cache",
    "data.check_crc",
    "data.on_bad_sample",
    "parallel.strategy",
    "parallel.offload",
    "parallel.compile",
    "parallel.activation_checkpointing",
    "parallel.processes",
    "parallel.timeout_seconds",
    "model.init_from",
    "model.init_ema",
    "model.new_head",
    "model.pretrained",
}


def is_free(option: str) -> bool:
    return option in _FREE or option.startswith("checkpoint.")


def record_of(
    config: TrainConfig, loader: TrainLoader, engine: Engine, step: int, evaluated: bool, skipped: int
) -> dict[str, Any]:
    """What is not a tensor: where the run is, and on what."""
    layout = loader.layout
    return {
        "step": step,
        "evaluated": evaluated,  # whether the epoch that ends at this step has been
        "skipped_steps": skipped,
        "resumed_from": None if config.resume in ("auto", "never") else config.resume,
        "loader": loader.state_dict(),
        "world_size": layout.world_size,
        "micro_batch": layout.micro_batch,
        "strategy": engine.strategy,
        "samples_sha256": loader.reader.samples_sha256,
        "scalars": engine.scalars(),
    }


def files_of(config: TrainConfig, label_map: bytes | None, classes: tuple[str, ...], step: int) -> dict[str, bytes]:
    """What stands beside the state, so that a checkpoint says what it is."""
    body = to_json(config) | {"classes": list(classes), "step": step}
    files = {ckpt.CONFIG_NAME: (json.dumps(body, indent=1) + "\n").encode()}
    if label_map is not None:
        files[ckpt.LABEL_MAP_NAME] = label_map
    return files


def choose_generation(config: TrainConfig, ranks: Ranks) -> ckpt.Generation | None:
    """The checkpoint to go on from, looked for by rank 0 and told to all. A damaged one is skipped with a line.

    Errors: ValueError, FileNotFoundError where `resume` names one that is not whole.
    """
    if config.resume == "never":
        return None
    found: list[Any] = [None]
    if ranks.rank == 0:
        try:
            found = [_whole(config)]
        except (ValueError, OSError) as error:
            found = [error]
    if ranks.world_size > 1:
        dist.broadcast_object_list(found)
    if isinstance(found[0], Exception):
        raise found[0]
    return None if found[0] is None else ckpt.Generation(Path(found[0]))


def _whole(config: TrainConfig) -> str | None:
    generation = ckpt.newest_whole(config.run, config.checkpoint, lambda line: print(line, flush=True))
    if config.resume != "auto" and not came_from(generation, config.resume):
        ckpt.verify_generation(Path(config.resume))
        return config.resume
    return None if generation is None else str(generation.folder)


def came_from(generation: ckpt.Generation | None, resume: str) -> bool:
    """Whether a run that `--resume PATH` began has saved it: started again, a job must not begin at PATH again."""
    return generation is not None and generation.record.get("resumed_from") == resume


def check_record(generation: ckpt.Generation, config: TrainConfig, loader: TrainLoader) -> None:
    """Compares a checkpoint with the run that would go on from it.

    The loader takes its place. Errors: ValueError where this run would not be the same one, naming what differs.
    """
    record, folder = generation.record, generation.folder
    before = json.loads((folder / ckpt.CONFIG_NAME).read_text())
    now = _flat(to_json(config))
    changed = {
        name: (old, now[name])
        for name, old in _flat(before).items()
        if name in now and not is_free(name) and old != now[name]
    }
    if changed:
        listed = ", ".join(f"{name} was {old}, is {new}" for name, (old, new) in changed.items())
        raise ValueError(
            f"cannot resume {folder}: {listed}; keep them, or start a new run with --model.init-from {config.run}"
        )
    if record["samples_sha256"] != loader.reader.samples_sha256:
        raise ValueError(f"cannot resume {folder}: {config.data.train} holds other samples than it was trained on")
    if _label_map(folder / ckpt.LABEL_MAP_NAME) != _label_map(config.data.label_map):
        raise ValueError(f"cannot resume {folder}: data.label_map gives other labels than it was trained on")
    spread = (record["world_size"], record["micro_batch"])
    running = config.noise.group_size is None and config.noise.mixes_samples and config.noise.active(training=True)
    if running and spread != (loader.layout.world_size, loader.layout.micro_batch):
        raise ValueError(
            f"cannot resume: noise.group_size None mixes the micro-batch, so keep {spread[0]} ranks of {spread[1]}"
        )
    loader.load_state_dict(record["loader"])


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
