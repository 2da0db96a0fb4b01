"""Writes generations beside training: a step waits for a copy of the state in memory, and for nothing else."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import threading
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from pipeline.checkpoint.config import CheckpointConfig
from pipeline.checkpoint.draft import LocalDraft
from pipeline.checkpoint.generations import PROGRESS_NAME
from pipeline.checkpoint.place import clean_place, place_of, url_of
from pipeline.checkpoint.portable import Portable, part_name
from pipeline.checkpoint.snapshot import NotFinite, Snapshot
from pipeline.checkpoint.store import StoreDraft
from pipeline.checkpoint.tensors import Written, write_stream
from pipeline.pieces import EMA, WEIGHT, Piece

WEIGHTS_NAME, EMA_NAME = "model.safetensors", "ema.safetensors"

_POLL_SECONDS = 0.02
_LONGEST_POLL_SECONDS = 1.0
_WRITTEN, _NOT_FINITE, _FAILED = "json", "not-finite", "failed"  # suffixes of the ranks' marks


class SaveTimes(NamedTuple):
    """What a save cost the training step, in seconds: the last one still under way, and the copy itself."""

    waited_seconds: float
    blocked_seconds: float


class Saved(NamedTuple):
    """A generation that was published. The seconds are the background thread's."""

    step: int
    name: str
    bytes: int
    seconds: float


class _Job(NamedTuple):
    """What a save's thread is given."""

    step: int
    draft: LocalDraft | StoreDraft
    record: dict[str, Any]
    files: dict[str, bytes]


class Abandoned(Exception):
    """The run ends and waits no longer."""


class CheckpointWriter:
    """One on each rank. Between its making and the first `save` the ranks must have met once, in any collective.

    A save that fails does not raise: `take_failures` tells, and training goes on. `last_saved`: rank 0's last success.
    Errors: ValueError where `checkpoint.folder` cannot be used.
    """

    def __init__(self, run: Path, config: CheckpointConfig, rank: int, world_size: int) -> None:
        self.run, self.config, self.rank, self.world_size = run, config, rank, world_size
        self.last_saved: Saved | None = None
        self._failures: list[str] = []
        self._snapshot = Snapshot()
        self._thread: threading.Thread | None = None
        self._given_up = threading.Event()
        self._attempt = 0  # the same on all ranks, since all save together: no two saves share a folder
        self._url = place_of(run, config) if rank == 0 else url_of(run, config)
        if rank == 0:
            clean_place(run, self._url)

    def prepare(self, pieces: list[Piece]) -> None:
        """Makes the host buffer beforehand, so that the first save is no longer than the later ones."""
        self._snapshot.prepare(pieces)

    def save(
        self,
        step: int,
        pieces: list[Piece],
        buffers: dict[str, Tensor],
        record: dict[str, Any],
        files: dict[str, bytes],
        score: float | None = None,
    ) -> SaveTimes:
        """Copies the state and begins to write it. Called by all ranks; buffers, record and files are rank 0's.

        `record` becomes progress.json, with `step`, `score` (higher is better, else None), `world_size` and the
        generation's number; `files` stand beside it under their names.
        """
        begin = time.perf_counter()
        self.wait()
        self._given_up.clear()
        waited = time.perf_counter()
        self._attempt += 1
        self._snapshot.take(pieces, buffers if self.rank == 0 else {})
        score = score if score is not None and math.isfinite(score) else None
        record = json.loads(json.dumps(record)) | {"step": step, "score": score}  # the caller's may change from here on
        job = _Job(step, self._draft(step), record, dict(files))
        self._thread = threading.Thread(target=self._run, args=(job,), name=f"checkpoint-{step}", daemon=True)
        self._thread.start()
        return SaveTimes(waited - begin, time.perf_counter() - waited)

    def wait(self, timeout_seconds: float | None = None) -> bool:
        """Until nothing is under way on this rank; False where time ran out before."""
        if self._thread is not None:
            self._thread.join(timeout_seconds)
            if self._thread.is_alive():
                return False
            self._thread = None
        return True

    def abandon(self) -> None:
        """Gives up what is under way, such as waiting for a rank that is dead; `wait` then returns soon."""
        self._given_up.set()

    def take_failures(self) -> list[str]:
        """A line for each save that failed on this rank since the last call."""
        taken, self._failures = self._failures, []
        return taken

    def _draft(self, step: int) -> LocalDraft | StoreDraft:
        if self._url is not None:
            return StoreDraft(self._url, step, self._attempt)
        return LocalDraft(self.run, step, self._attempt)

    def _go_on(self) -> None:
        if self._given_up.is_set():
            raise Abandoned

    def _run(self, job: _Job) -> None:
        begin = time.perf_counter()
        try:
            self._write_part(job)
            if self.rank == 0:
                name, size = self._finish(job)
                self.last_saved = Saved(job.step, name, size, time.perf_counter() - begin)
        except Exception as error:  # whatever it is: training goes on, and the generations before stay
            self._fail(job, error)

    def _write_part(self, job: _Job) -> None:
        try:
            self._check_buffers()
            written = self._write(job.draft, part_name(self.rank, self.world_size), self._snapshot.write)
            job.draft.mark(f"rank-{self.rank:05d}.{_WRITTEN}", json.dumps(written._asdict()).encode())
        except Exception as error:
            reason = _NOT_FINITE if isinstance(error, NotFinite) else _FAILED
            with contextlib.suppress(OSError):  # where that fails too, rank 0's time limit ends its waiting
                job.draft.mark(f"rank-{self.rank:05d}.{reason}")
            if self.rank == 0:  # the others write into the folder, which goes next, until they have said how it went
                with contextlib.suppress(Exception):
                    self._settled(job.draft, but=[0])
            raise

    def _check_buffers(self) -> None:
        for name, tensor in self._snapshot.buffers.items():
            if tensor.is_floating_point() and not np.isfinite(tensor.numpy()).all():
                raise NotFinite(f"buffer {name}")

    def _write(self, draft: LocalDraft | StoreDraft, name: str, write: Callable[..., Written]) -> Written:
        with draft.create(name) as file:
            written = write(file, self._go_on)
        draft.check(name, written, self._go_on)
        return written

    def _finish(self, job: _Job) -> tuple[str, int]:
        """Rank 0's: waits for the parts, puts the weights together and publishes. Returns the name and the bytes."""
        draft = job.draft
        files = self._parts(draft)
        portable = Portable(draft, list(files))
        for kind, name in ((WEIGHT, WEIGHTS_NAME), (EMA, EMA_NAME)):
            if kind in portable.kinds():
                header, data = portable.file(kind, self._snapshot.buffers)
                files[name] = self._write(
                    draft, name, lambda file, go_on, h=header, d=data: write_stream(file, h, d, go_on)
                )
        record = job.record | {"generation": draft.next_number(), "world_size": self.world_size}
        texts = job.files | {PROGRESS_NAME: (json.dumps(record, indent=1) + "\n").encode()}
        for name, body in texts.items():
            files[name] = self._write(draft, name, lambda file, go_on, b=body: write_stream(file, b, (), go_on))
        self._go_on()
        sums = {name: written.sha256 for name, written in files.items()}
        name = draft.publish(sums, self.config.keep, self.config.keep_best)
        return name, sum(written.bytes for written in files.values())

    def _parts(self, draft: LocalDraft | StoreDraft) -> dict[str, Written]:
        """All ranks' parts, once they are written. Errors: NotFinite, OSError, TimeoutError naming the ranks."""
        marks = self._settled(draft)
        if ranks := self._marked(marks, _NOT_FINITE):
            raise NotFinite(f"the part of {_listed(ranks)}")
        if ranks := self._marked(marks, _FAILED):
            raise OSError(f"{_listed(ranks)} could not write, and said why")
        bodies = (json.loads(draft.read_mark(f"rank-{r:05d}.{_WRITTEN}")) for r in range(self.world_size))
        return {part_name(r, self.world_size): Written(**body) for r, body in enumerate(bodies)}

    def _settled(self, draft: LocalDraft | StoreDraft, but: Collection[int] = ()) -> set[str]:
        """The marks of all ranks `but` these, once none of them writes any more. Errors: TimeoutError, Abandoned."""
        limit = time.monotonic() + self.config.part_timeout_seconds
        pause = _POLL_SECONDS
        while True:
            marks = draft.marks()
            known = {rank for reason in (_WRITTEN, _NOT_FINITE, _FAILED) for rank in self._marked(marks, reason)}
            missing = sorted(set(range(self.world_size)) - known - set(but))
            if not missing:
                return marks
            if time.monotonic() > limit:
                raise TimeoutError(f"no part came from {_listed(missing)} in {self.config.part_timeout_seconds:.0f} s")
            if self._given_up.wait(pause):
                raise Abandoned
            pause = min(2 * pause, _LONGEST_POLL_SECONDS)

    def _marked(self, marks: set[str], suffix: str) -> list[int]:
        return [rank for rank in range(self.world_size) if f"rank-{rank:05d}.{suffix}" in marks]

    def _fail(self, job: _Job, error: Exception) -> None:
        draft, free, older = job.draft, None, None
        with contextlib.suppress(Exception):  # a disk that fails may fail here too, and the line is to be told
            free, older = draft.free_bytes(), draft.older()
        if self.rank == 0:
            with contextlib.suppress(Exception):
                draft.discard()
        self._failures.append(
            f"the checkpoint of step {job.step} was not written to {draft.where}: "
            f"{_reason(error, self._needed_bytes(), free)}; the run goes on, "
            + (f"{older} stays whole" if older else "with no checkpoint yet")
        )

    def _needed_bytes(self) -> int:
        """Of the whole generation, as far as a rank can tell: all ranks' parts are about as large as its own."""
        return self.world_size * (self._snapshot.nbytes + self._snapshot.portable_bytes)


def _listed(ranks: list[int]) -> str:
    shown = ", ".join(str(r) for r in ranks[:5]) + (", ..." if len(ranks) > 5 else "")
    return f"rank {shown}" if len(ranks) == 1 else f"ranks {shown}"


def _reason(error: Exception, needed: int, free: int | None) -> str:
    if isinstance(error, Abandoned):
        return "the run ends, and waited no longer for it"
    if isinstance(error, NotFinite):
        return f"{error} is not finite, and such a state never replaces a good one: go back to an earlier checkpoint"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        room = "" if free is None else f", {free:,} are free"
        return f"{os.strerror(error.errno)} (about {needed:,} bytes are needed{room}): make room there"
    if isinstance(error, OSError) and error.errno:
        return os.strerror(error.errno)
    return str(error).partition("\n")[0] or type(error).__name__
