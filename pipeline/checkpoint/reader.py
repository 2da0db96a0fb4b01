"""Reads generations: the newest whole one, into any number of ranks and any strategy, slice by slice."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from pipeline.checkpoint.config import CheckpointConfig
from pipeline.checkpoint.generations import (
    CONFIG_NAME,
    MEND,
    PROGRESS_NAME,
    STATE_FOLDER,
    SUMS_NAME,
    Found,
    checkpoints_folder,
    latest_name,
    list_generations,
    newest_first,
    read_sums,
    refuse_unlisted,
    verify_file,
)
from pipeline.checkpoint.place import clean_place, place_of, url_of
from pipeline.checkpoint.portable import Portable, Stretch, part_name
from pipeline.checkpoint.store import Store, store_of
from pipeline.checkpoint.tensors import piece_key
from pipeline.checkpoint.writer import WEIGHTS_NAME
from pipeline.pieces import Piece

_FETCHED = "fetched"  # under RUN/checkpoints: what was read of a store


class Generation:
    """One finished generation. Nothing of it is trusted before `verify`, which reads each file once.

    `folder` is local. For checkpoints on a store it is RUN/checkpoints/fetched/NAME: files come into it when they are
    asked for.
    """

    def __init__(self, folder: Path) -> None:
        url = store_of(folder.parents[2]) if folder.parent.name == _FETCHED else None
        self.folder, self._store = folder, None if url is None else Store(url)
        self.name = folder.name
        self.sums = read_sums(self._text(SUMS_NAME))
        self._parts: Portable | None = None

    @property
    def record(self) -> dict[str, Any]:
        """What was given to `save`, with `step`, `score`, `generation` and `world_size`."""
        return json.loads(self._text(PROGRESS_NAME))

    @property
    def parts(self) -> list[str]:
        """The ranks' files. Errors: ValueError where one is not listed."""
        listed = sorted(name for name in self.sums if name.startswith(f"{STATE_FOLDER}/"))
        count = int(listed[0].rpartition("-of-")[2].partition(".")[0]) if listed else 0
        wanted = [part_name(rank, count) for rank in range(count)]
        if not listed or (missing := [name for name in wanted if name not in self.sums]):
            raise ValueError(f"{self.folder} has not all its ranks' parts ({missing[0] if listed else 'none'}){MEND}")
        return wanted

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the parameters whose state was saved."""
        return self._portable().shapes

    def kinds(self) -> set[str]:
        """What was saved of each: weight, ema, and the optimiser's own."""
        return self._portable().kinds()

    def verify(self, names: Collection[str] | None = None) -> None:
        """Re-hashes the files of these names, or all; several at a time.

        Errors: ValueError or FileNotFoundError naming the file that is missing, or not what was written.
        """
        if names is None and self._store is None:
            refuse_unlisted(self.folder, self.sums)
        chosen = sorted(self.sums.keys() | self.parts if names is None else names)
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            for _ in pool.map(self._verify_one, chosen):
                pass

    def path(self, name: str) -> Path:
        """A file of it on this machine. From a store it is verified as it comes."""
        if self._store is not None and not (self.folder / name).is_file():
            self._store.fetch(self.folder / name, self.name, name)
            verify_file(self.folder / name, self.sums[name])
        return self.folder / name

    def read(self, name: str, start: int, end: int) -> bytes:
        if self._store is not None and not (self.folder / name).is_file():
            return self._store.read(self.name, name, start=start, end=end)
        with open(self.folder / name, "rb", buffering=0) as file:
            return os.pread(file.fileno(), end - start, start)

    def files_for(self, pieces: list[Piece]) -> set[str]:
        """The ranks' files that `fill` reads for these pieces. Errors: as `fill`."""
        return {stretch.part for _, _, stretches in self._wanted(pieces) for stretch in stretches}

    def fill(self, pieces: list[Piece]) -> None:
        """Copies the saved state into the pieces' tensors, whoever saved which stretch; reads what is needed of it.

        Errors: ValueError naming tensors that are missing or of another shape, before anything is changed.
        """
        wanted = list(self._wanted(pieces))
        with contextlib.ExitStack() as stack:
            files: dict[str, Any] = {}
            for piece, kind, stretches in wanted:
                target, stop = piece.tensors[kind], piece.start + piece.tensors[kind].numel()
                for stretch in stretches:
                    if stretch.part not in files:
                        files[stretch.part] = stack.enter_context(self._opened(stretch.part))
                    first, last = max(piece.start, stretch.start), min(stop, stretch.stop)
                    view = files[stretch.part].get_slice(piece_key(kind, piece.name, stretch.start))
                    saved = view[first - stretch.start : last - stretch.start]
                    target.detach()[first - piece.start : last - piece.start].copy_(saved)

    def check_model(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Errors: ValueError unless it was saved of parameters of just these names and shapes."""
        saved = self.shapes
        faults = [f"it lacks {name}" for name in shapes if name not in saved]
        faults += [f"it has {name}" for name in saved if name not in shapes]
        for name in shapes.keys() & saved.keys():
            if tuple(shapes[name]) != saved[name]:
                faults.append(f"{name} is {saved[name]} there, {tuple(shapes[name])} here")
        if faults:
            raise ValueError(self._other_model(faults))

    def buffers(self) -> dict[str, Tensor]:
        """What was no parameter's piece: BatchNorm's statistics and the like, as rank 0 had them."""
        with self._opened(WEIGHTS_NAME) as file:
            return {name: file.get_tensor(name) for name in json.loads((file.metadata() or {}).get("buffers", "[]"))}

    def _portable(self) -> Portable:
        if self._parts is None:
            self._parts = Portable(self, self.parts)
        return self._parts

    def _wanted(self, pieces: list[Piece]) -> Iterator[tuple[Piece, str, list[Stretch]]]:
        """For each tensor of each piece, the saved stretches that cover it. Errors: ValueError."""
        saved = self._portable()
        faults = [f"it lacks {piece.name}" for piece in pieces if piece.name not in saved.shapes]
        for piece in pieces:
            if saved.shapes.get(piece.name, tuple(piece.shape)) != tuple(piece.shape):
                faults.append(f"{piece.name} is {saved.shapes[piece.name]} there, {tuple(piece.shape)} here")
        if faults:
            raise ValueError(self._other_model(faults))
        if absent := sorted({kind for piece in pieces for kind in piece.tensors} - saved.kinds()):
            raise ValueError(
                f"{self.folder} holds no {' nor '.join(absent)} (it holds {', '.join(sorted(saved.kinds()))}): "
                "keep the optimizer and the EMA it was trained with"
            )
        for piece in pieces:
            for kind, tensor in piece.tensors.items():
                stretches = saved.covering(kind, piece.name, piece.start, piece.start + tensor.numel())
                if stretches is None:
                    raise ValueError(f"{self.folder} lacks a part of {kind} {piece.name}{MEND}")
                yield piece, kind, stretches

    def _other_model(self, faults: list[str]) -> str:
        more = f" and {len(faults) - 3} more" if len(faults) > 3 else ""
        return f"{self.folder} is a checkpoint of another model: {'; '.join(faults[:3])}{more}"

    def _opened(self, name: str) -> Any:
        path = self.path(name)
        try:
            return safe_open(path, "pt")
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} is damaged ({error}){MEND}") from error

    def _text(self, name: str) -> str:
        if self._store is not None:
            return self._store.read(self.name, name).decode(errors="replace")
        return (self.folder / name).read_bytes().decode(errors="replace")

    def _verify_one(self, name: str) -> None:
        if name not in self.sums:
            raise ValueError(f"{self.folder / name} is not in {SUMS_NAME}, so it cannot be checked{MEND}")
        if self._store is not None and _is_stale(self.folder / name, self.sums[name]):
            self._store.fetch(self.folder / name, self.name, name)
        verify_file(self.folder / name, self.sums[name])


def _is_stale(path: Path, digest: str) -> bool:
    """Not there, or of an earlier generation of the same step."""
    if not path.is_file():
        return True
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() != digest


def newest_whole(run: Path, config: CheckpointConfig, tell: Callable[[str], None]) -> Generation | None:
    """The newest generation whose every file is as it was written; `tell` gets a line for each that is passed over.

    By one process alone, and not while the run is being saved: it clears away what killed saves have left. None where
    nothing was ever saved. Errors: ValueError where `checkpoint.folder` cannot be used, or no generation is whole;
    OSError where a disk or a store does not answer, which says nothing of what lies there.
    """
    url = place_of(run, config)
    clean_place(run, url)
    return _first_whole(run, url, None, tell)


def newest_record(run: Path, config: CheckpointConfig) -> Generation | None:
    """The newest generation whose configuration and record are as they were written, for a look before ranks start.

    Any process may call it at any time. Errors: as newest_whole.
    """
    return _first_whole(run, url_of(run, config), (CONFIG_NAME, PROGRESS_NAME), lambda line: None)


def _first_whole(
    run: Path, url: str | None, names: Collection[str] | None, tell: Callable[[str], None]
) -> Generation | None:
    damaged = False
    for found in _newest_first(run, url):
        try:
            generation = _generation(run, url, found.name)
            generation.verify(names)
        except (ValueError, FileNotFoundError) as error:
            damaged = True
            tell(f"{found.name} is passed over: {str(error).removesuffix(MEND)}")
            continue
        if url is not None:
            _forget_others(generation.folder)
        return generation
    if damaged:
        raise ValueError(
            f"no checkpoint of {run} is whole: bring one back, or move {checkpoints_folder(run)} away to begin anew"
        )
    return None


def _forget_others(fetched: Path) -> None:
    for other in fetched.parent.iterdir():
        if other != fetched:
            shutil.rmtree(other, ignore_errors=True)


def _generation(run: Path, url: str | None, name: str) -> Generation:
    folder = checkpoints_folder(run)
    return Generation(folder / name if url is None else folder / _FETCHED / name)


def latest_generation(run: Path) -> Path | None:
    """The folder of the newest finished generation, not yet verified, else None.

    From a store, all of it but the ranks' state is fetched.
    """
    url = store_of(run)
    found = _newest_first(run, url)
    if not found:
        return None
    generation = _generation(run, url, found[0].name)
    if url is not None:
        generation.verify([name for name in generation.sums if not name.startswith(f"{STATE_FOLDER}/")])
    return generation.folder


def _newest_first(run: Path, url: str | None) -> list[Found]:
    if url is None:
        return newest_first(list_generations(run), latest_name(run))
    store = Store(url)
    return newest_first(store.generations(), store.latest())
