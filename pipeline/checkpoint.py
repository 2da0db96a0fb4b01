"""Checkpoints as generations: nothing half-written ever stands under a final name.

A generation is built in a temporary folder, every file fsynced, its sha256 sums written in the format of `sha256sum`,
then renamed to `checkpoints/step-NNNNNNNN`; only then does the pointer `checkpoints/latest` move, and only after that
are older generations removed. Killed at any point, the newest finished generation is still whole.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.manifest import atomic_file, publish, sync_folder

SUMS_NAME = "SHA256SUMS"
POINTER_NAME = "latest"
CONFIG_NAME = "config.json"
PROGRESS_NAME = "progress.json"
LABEL_MAP_NAME = "label_map.json"
ENGINE_FOLDER = "engine"

_MEND = ": move the checkpoint's folder away, and the one before it is taken"


@dataclass(frozen=True)
class CheckpointConfig:
    """When checkpoints are written and how many stay."""

    every_epochs: int = 1
    keep: int = 2

    def __post_init__(self) -> None:
        if self.every_epochs < 1:
            raise ValueError(f"checkpoint.every_epochs is {self.every_epochs}: at least 1")
        if self.keep < 1:
            raise ValueError(f"checkpoint.keep is {self.keep}: at least 1, the newest is never removed")


def generation_name(step: int) -> str:
    return f"step-{step:08d}"


def temporary_folder(run: Path, step: int) -> Path:
    """Where the generation of this step is built; the same path on all ranks."""
    return run / "checkpoints" / f".{generation_name(step)}.tmp"


def write_json(path: Path, body: Any) -> None:
    with atomic_file(path) as file:
        file.write((json.dumps(body, indent=1) + "\n").encode())


def publish_generation(run: Path, step: int, keep: int) -> Path:
    """Seals the temporary folder, gives it its final name, moves the pointer and removes older generations."""
    temporary = temporary_folder(run, step)
    final = temporary.with_name(generation_name(step))
    _seal(temporary)
    if final.exists():
        _remove(final)  # the same step again, after a resume from an earlier one
    publish(temporary, final)
    with atomic_file(final.with_name(POINTER_NAME)) as file:
        file.write(f"{final.name}\n".encode())
    for old in _generations(run)[:-keep]:
        if old != final:
            _remove(old)
    return final


def _remove(generation: Path) -> None:
    """Takes the final name away first: killed while deleting, half a generation never stands under it."""
    hidden = generation.with_name(f".{generation.name}.old")
    shutil.rmtree(hidden, ignore_errors=True)
    os.replace(generation, hidden)
    shutil.rmtree(hidden)


def _seal(folder: Path) -> None:
    lines = []
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        with open(path, "rb") as file:
            lines.append(f"{hashlib.file_digest(file, 'sha256').hexdigest()}  {path.relative_to(folder)}\n")
            os.fsync(file.fileno())
    for subfolder in (path for path in folder.rglob("*") if path.is_dir()):
        sync_folder(subfolder)
    with atomic_file(folder / SUMS_NAME) as file:
        file.write("".join(lines).encode())


def _generations(run: Path) -> list[Path]:
    return sorted(p for p in (run / "checkpoints").glob("step-*") if (p / SUMS_NAME).is_file())


def latest_generation(run: Path) -> Path | None:
    """The generation that the pointer names, else the newest finished one, else None."""
    found = _generations(run)
    pointer = run / "checkpoints" / POINTER_NAME
    named = pointer.read_text(errors="replace").strip() if pointer.is_file() else ""
    return next((g for g in found if g.name == named), found[-1] if found else None)


def recorded_sha256(folder: Path, name: str) -> str:
    """What a generation's own list says of one of its files: tells two checkpoints apart that have one path."""
    for line in (folder / SUMS_NAME).read_text().splitlines():
        digest, _, listed = line.partition("  ")
        if listed == name:
            return digest
    raise ValueError(f"{folder / SUMS_NAME} does not list {name}: take another checkpoint")


def verify_generation(folder: Path, include: Callable[[str], bool] = lambda name: True) -> None:
    """Re-hashes a generation's files before anything of it is loaded.

    Errors: ValueError or FileNotFoundError naming the file that is missing, not what was written, or not in the sums.
    """
    sums = folder / SUMS_NAME
    if not sums.is_file():
        raise FileNotFoundError(f"{folder} is no finished checkpoint (it has no {SUMS_NAME}): name another")
    listed = dict(line.partition("  ")[::-2] for line in sums.read_text(errors="replace").splitlines())
    found = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} - {SUMS_NAME}
    if unlisted := sorted(name for name in found - listed.keys() if include(name)):
        raise ValueError(f"{folder / unlisted[0]} is not in {SUMS_NAME}, so it cannot be checked{_MEND}")
    for name, digest in listed.items():
        if not include(name):
            continue
        path = folder / name
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing{_MEND}")
        with open(path, "rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != digest:
                raise ValueError(f"{path} is damaged (its sha256 is wrong){_MEND}")
