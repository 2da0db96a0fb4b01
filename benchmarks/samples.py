"""The 250 ImageNet pictures that NOISYNN_SAMPLES points at, as a folder or as shards, for benchmarks without data."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple, TypeVar

from data_prep.manifest import manifest_path

VARIABLE, ARCHIVE = "NOISYNN_SAMPLES", "imagenet-sample.tar"
_ROOT = Path(__file__).resolve().parent.parent

Made = TypeVar("Made")


class Source(NamedTuple):
    """A manifest to read, and what its pictures are, for the result."""

    manifest: Path
    pictures: str
    restart_manifest: Path | None = None
    """Of the same samples, their JPEGs rewritten with restart markers. None: there are none."""


class Pictures(NamedTuple):
    """An ImageFolder to read, and what it holds."""

    folder: Path
    images: int
    text: str


@contextlib.contextmanager
def repeated_samples(images: int, mend: str, parent: Path | None = None) -> Iterator[Pictures]:
    """The archive's pictures as an ImageFolder, each repeated until there are `images`; the folder goes afterwards.

    mend: what a user without the archive can name instead. Errors: ValueError where there is no archive.
    """
    archive = Path(os.environ.get(VARIABLE) or "no-folder") / ARCHIVE
    if not archive.is_file():
        raise ValueError(f"no pictures to read: give {mend}, or set {VARIABLE} to a folder with {ARCHIVE}")
    with tempfile.TemporaryDirectory(prefix="noisynn-benchmark-", dir=parent) as name:
        folder = Path(name) / "source"
        count, repeats = _unpack(archive, folder, images)
        text = f"{ARCHIVE}: {count} real pictures, each {repeats} times"
        print(text)
        yield Pictures(folder, count * repeats, text)


@contextlib.contextmanager
def sharded_samples(images: int, shards: int, processes: int, short_side: int | None = None) -> Iterator[Source]:
    """Shards the archive's pictures, each repeated until there are `images`: plainly, as .beton, with restart markers.

    short_side: pixels that larger pictures are reduced to; None keeps all sizes. What cannot be written beside the
    plain shards is named on standard error. Errors: ValueError where there is no archive, or where sharding fails.
    """
    with repeated_samples(images, "--manifest YOUR.manifest.json (of `python -m data_prep shard`)") as pictures:
        per_shard = -(-pictures.images // shards)
        options = ["--samples-per-shard", str(per_shard), "--processes", str(processes)]
        if short_side is not None:
            options += ["--short-side", str(short_side)]
        manifest = _sharded(pictures.folder, "shards", options)
        _or_said("the .beton", lambda: run_data_prep("beton", str(manifest), "--processes", str(processes)))
        restart = _or_said(
            "restart markers", lambda: _sharded(pictures.folder, "restart", [*options, "--restart-markers"])
        )
        reduced = "" if short_side is None else f", short side at most {short_side} pixels"
        yield Source(manifest, pictures.text + reduced, restart)


def _sharded(pictures: Path, name: str, options: list[str]) -> Path:
    out = pictures.with_name(name)
    run_data_prep("shard", "--source", str(pictures), "--out", str(out), *options)
    return manifest_path(out, "train")


def _or_said(what: str, write: Callable[[], Made]) -> Made | None:
    """What `write` gives; None, and one line on standard error, where this machine cannot write it."""
    try:
        return write()
    except ValueError as error:
        print(f"not measured: {what}: {error}", file=sys.stderr)
        return None


def _unpack(archive: Path, target: Path, images: int) -> tuple[int, int]:
    """Pictures by class folder; returns (how many differ, how often each is there). Repeats are hard links."""
    try:
        with tarfile.open(archive) as tar:
            tar.extractall(target.with_name("unpacked"), filter="data")
    except tarfile.TarError as error:
        raise ValueError(f"{archive} cannot be unpacked: {error}; fetch it again, or give --manifest") from error
    pictures = sorted(path for path in target.with_name("unpacked").rglob("*") if path.is_file())
    if not pictures:
        raise ValueError(f"{archive} holds no pictures: fetch it again, or give --manifest")
    repeats = -(-images // len(pictures))
    for path in pictures:
        folder = target / path.parent.name
        folder.mkdir(parents=True, exist_ok=True)
        for i in range(repeats):
            os.link(path, folder / f"{path.stem}-{i}{path.suffix}")
    return len(pictures), repeats


def run_data_prep(*words: str) -> None:
    """Runs the command as a user does: benchmarks read data_prep's files, and import nothing but its manifest."""
    command = (sys.executable, "-m", "data_prep", *words)
    done = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        reason = done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
        raise ValueError(f"`python -m data_prep {words[0]}` failed: {reason[0].removeprefix('error: ')}")
