"""Generations on a disk: nothing half-written ever stands under a final name.

A generation is built in a temporary folder, every file fsynced, its sha256 sums written in the format of `sha256sum`,
then renamed to `checkpoints/step-NNNNNNNN`; only then does the pointer `checkpoints/latest` move, and only after that
are older generations removed. Killed at any point, the newest finished generation is still whole.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from data_prep.manifest import atomic_file, publish, remove_orphans, sync_folder

SUMS_NAME = "SHA256SUMS"
POINTER_NAME = "latest"
CONFIG_NAME = "config.json"
PROGRESS_NAME = "progress.json"
LABEL_MAP_NAME = "label_map.json"
STATE_FOLDER = "state"

MEND = ": move the checkpoint's folder away, and the one before it is taken"


DAMAGED = sys.maxsize


class Found(NamedTuple):
    """What a finished generation says of itself. `number`: 1 for a run's first, and so on, whatever its step.

    Where that is damaged the number is DAMAGED, the highest: who looks for the newest meets it, and does not take an
    older one without a word. Made by hand, without any record, it is 0.
    """

    number: int
    step: int
    name: str
    score: float | None


def generation_name(step: int) -> str:
    return f"step-{step:08d}"


def checkpoints_folder(run: Path) -> Path:
    return run / "checkpoints"


def temporary_name(step: int, attempt: int) -> str:
    return f".{generation_name(step)}.{attempt}.tmp"


def given_up(names: Iterable[str], attempt: int) -> list[str]:
    """Temporary folders of earlier saves of this process, which a late rank may have made again."""
    found = ((name, name.split(".")[-2]) for name in names if name.startswith(".step-") and name.endswith(".tmp"))
    return [name for name, number in found if number.isdecimal() and int(number) < attempt]


def temporary_folder(run: Path, step: int, attempt: int = 0) -> Path:
    """Where a generation is built; the same path on all ranks. `attempt`: how many saves this process has begun."""
    return checkpoints_folder(run) / temporary_name(step, attempt)


def write_json(path: Path, body: Any) -> None:
    with atomic_file(path) as file:
        file.write((json.dumps(body, indent=1) + "\n").encode())


def publish_generation(
    run: Path, step: int, keep: int, keep_best: int = 0, attempt: int = 0, known: Mapping[str, str] | None = None
) -> Path:
    """Seals the temporary folder, gives it its final name, moves the pointer and removes older generations.

    `known`: sha256 of files that were fsynced and hashed as they were written; the others are read here.
    """
    temporary = temporary_folder(run, step, attempt)
    final = temporary.with_name(generation_name(step))
    _seal(temporary, known or {})
    if final.exists():  # the same step again, after a resume from an earlier one
        replaced = _hidden(final, "replaced")
        shutil.rmtree(replaced, ignore_errors=True)
        os.replace(final, replaced)
        publish(temporary, final)
        _remove(replaced)
    else:
        publish(temporary, final)
    with atomic_file(final.with_name(POINTER_NAME)) as file:
        file.write(f"{final.name}\n".encode())
    for name in superfluous(list_generations(run), final.name, keep, keep_best):
        _remove(final.with_name(name))
    return final


def superfluous(found: Iterable[Found], latest: str, keep: int, keep_best: int) -> list[str]:
    """Which generations to remove: not the newest `keep`, not the `keep_best` by score, never the latest."""
    ordered = sorted(found, key=lambda g: (g.number % DAMAGED, g.step))  # the damaged ones go first
    best = sorted((g for g in ordered if g.score is not None), key=lambda g: (g.score, g.number, g.step), reverse=True)
    stay = {latest} | {g.name for g in ordered[-keep:]} | {g.name for g in best[:keep_best]}
    return [g.name for g in ordered if g.name not in stay]


def clean(run: Path) -> None:
    """Removes what killed saves have left, and brings back a generation that was to be replaced by its like.

    By one process alone, while nobody saves.
    """
    folder = checkpoints_folder(run)
    for replaced in folder.glob(".step-*.replaced"):
        final = folder / replaced.name[1:].removesuffix(".replaced")
        if not final.exists():
            os.replace(replaced, final)
    for left in folder.glob(".step-*"):
        shutil.rmtree(left, ignore_errors=True)
    remove_orphans(folder, POINTER_NAME)


def _hidden(final: Path, suffix: str) -> Path:
    return final.with_name(f".{final.name}.{suffix}")


def _remove(generation: Path) -> None:
    """Takes the name away first: killed while deleting, half a generation never stands under it.

    What cannot be deleted, such as files that somebody reads on NFS, is left to `clean`: the new one is written.
    """
    hidden = generation.with_name(f".{generation.name.strip('.')}.old")
    shutil.rmtree(hidden, ignore_errors=True)
    with contextlib.suppress(OSError):
        os.replace(generation, hidden)
        shutil.rmtree(hidden)


def _seal(folder: Path, known: Mapping[str, str]) -> None:
    lines = []
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = str(path.relative_to(folder))
        lines.append(f"{known.get(name) or _synced_sha256(path)}  {name}\n")
    for subfolder in (path for path in folder.rglob("*") if path.is_dir()):
        sync_folder(subfolder)
    with atomic_file(folder / SUMS_NAME) as file:
        file.write("".join(lines).encode())


def _synced_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        return hashlib.file_digest(file, "sha256").hexdigest()


def list_generations(run: Path) -> list[Found]:
    """The finished ones, oldest first."""
    folder = checkpoints_folder(run)
    return sorted(_found(path) for path in folder.glob("step-*") if (path / SUMS_NAME).is_file())


def _found(path: Path) -> Found:
    progress = path / PROGRESS_NAME
    return found_of(path.name, sums_of(path), progress.read_bytes() if progress.is_file() else None)


def found_of(name: str, sums: Mapping[str, str], progress: bytes | None) -> Found:
    """From a generation's name, its sums and its progress.json, None where it has none."""
    digits = name.removeprefix("step-")
    step = int(digits) if digits.isdecimal() else -1
    if progress is None and PROGRESS_NAME not in sums:
        return Found(0, step, name, None)
    if progress is None or sums.get(PROGRESS_NAME) != hashlib.sha256(progress).hexdigest():
        return Found(DAMAGED, step, name, None)
    body = json.loads(progress)
    return Found(body["generation"], step, name, body["score"])


def newest_name(found: Iterable[Found]) -> str | None:
    """Of those whose record is not damaged."""
    sound = sorted(g for g in found if g.number != DAMAGED)
    return sound[-1].name if sound else None


def next_number(found: Iterable[Found]) -> int:
    return 1 + max((g.number % DAMAGED for g in found), default=0)


def latest_name(run: Path) -> str:
    """What the pointer names; it may be gone."""
    pointer = checkpoints_folder(run) / POINTER_NAME
    return pointer.read_text(errors="replace").strip() if pointer.is_file() else ""


def newest_first(found: Iterable[Found], latest: str) -> list[Found]:
    """By their numbers; those without any by what the pointer names, then by step."""
    return sorted(found, key=lambda g: (g.number, g.name == latest, g.step), reverse=True)


def read_sums(text: str) -> dict[str, str]:
    """SHA256SUMS -> {name: sha256}."""
    return dict(line.partition("  ")[::-2] for line in text.split("\n")[:-1])


def sums_of(folder: Path) -> dict[str, str]:
    # Not read_text: it would take a damaged "\r" for "\n".
    return read_sums((folder / SUMS_NAME).read_bytes().decode(errors="replace"))


def recorded_sha256(folder: Path, name: str) -> str:
    """What a generation's own list says of one of its files: tells two checkpoints apart that have one path."""
    listed = sums_of(folder)
    if name not in listed:
        raise ValueError(f"{folder / SUMS_NAME} does not list {name}: take another checkpoint")
    return listed[name]


def verify_generation(folder: Path, include: Callable[[str], bool] = lambda name: True) -> None:
    """Re-hashes a generation's files before anything of it is loaded, each read once.

    Errors: ValueError or FileNotFoundError naming the file that is missing, not what was written, or not in the sums.
    """
    if not (folder / SUMS_NAME).is_file():
        raise FileNotFoundError(f"{folder} is no finished checkpoint (it has no {SUMS_NAME}): name another")
    listed = sums_of(folder)
    refuse_unlisted(folder, listed, include)
    for name, digest in listed.items():
        if include(name):
            verify_file(folder / name, digest)


def refuse_unlisted(folder: Path, listed: Collection[str], include: Callable[[str], bool] = lambda name: True) -> None:
    """Errors: ValueError naming a file that is not in the sums."""
    found = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} - {SUMS_NAME}
    if unlisted := sorted(name for name in found - set(listed) if include(name)):
        raise ValueError(f"{folder / unlisted[0]} is not in {SUMS_NAME}, so it cannot be checked{MEND}")


def verify_file(path: Path, digest: str) -> None:
    """Errors: FileNotFoundError, ValueError naming the file and the mend."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing{MEND}")
    with open(path, "rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != digest:
            raise ValueError(f"{path} is damaged (its sha256 is wrong){MEND}")
