"""Scalars and pictures of a run, as TensorBoard events and as JSON lines; throughput and the share of data waits."""

from __future__ import annotations

import contextlib
import json
import math
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from data_prep.manifest import atomic_file

METRICS_NAME = "metrics.jsonl"

T = TypeVar("T")


class RunLog:
    """Writes one run's metrics. Rank 0 alone has one.

    After a resume with `done_steps`, what a killed run had logged beyond them is dropped from both files.
    """

    def __init__(self, run: Path, done_steps: int) -> None:
        self._path = run / METRICS_NAME
        self._failed = False
        if self._path.exists():
            kept = [line for line in self._path.read_text().splitlines() if _step(line) <= done_steps]
            with atomic_file(self._path) as file:
                file.write("".join(f"{line}\n" for line in kept).encode())
        self._file = open(self._path, "a", buffering=1)  # noqa: SIM115  (closed in close)
        self._writer = SummaryWriter(str(run), purge_step=done_steps + 1 if done_steps else None)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """A value that is not a number is left out: JSON has none, and no curve can show it."""
        values = {tag: value for tag, value in values.items() if math.isfinite(value)}
        with self._told_once():
            self._file.write(json.dumps({"step": step} | values) + "\n")
            for tag, value in values.items():
                self._writer.add_scalar(tag, value, step)

    def histograms(self, step: int, weights: dict[str, Tensor]) -> None:
        """One for each tensor, under weights/NAME."""
        with self._told_once():
            for name, weight in weights.items():
                self._writer.add_histogram(f"weights/{name}", weight, step)

    def pictures(self, tag: str, step: int, images: Tensor) -> None:
        """images: uint8 (B, H, W, 3), drawn as a near-square grid, black where it has more places than pictures."""
        columns = math.ceil(len(images) ** 0.5)
        rows = math.ceil(len(images) / columns)
        images = torch.cat((images, images.new_zeros(rows * columns - len(images), *images.shape[1:])))
        grid = images.unflatten(0, (rows, columns)).permute(0, 2, 1, 3, 4).flatten(0, 1).flatten(1, 2)
        with self._told_once():
            self._writer.add_image(tag, grid.numpy(), step, dataformats="HWC")
            self._writer.flush()

    def close(self) -> None:
        with self._told_once():
            self._writer.close()
        with self._told_once():
            self._file.close()

    @contextlib.contextmanager
    def _told_once(self) -> Iterator[None]:
        """A curve with a gap is no reason to end a run of days."""
        try:
            yield
        except OSError as error:
            if not self._failed:
                print(f"warning: {self._path.parent} takes no metrics ({error}): the run goes on", file=sys.stderr)
            self._failed = True


def _step(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError):
        return float("inf")  # the half line of a killed run


class Throughput:
    """Images a second and the share of time spent waiting for data, since the last `take`."""

    def __init__(self) -> None:
        self._reset()

    def _reset(self) -> None:
        self._start = time.perf_counter()
        self._waited = 0.0
        self._images = 0

    def timed(self, batches: Iterable[T]) -> Iterator[T]:
        """Passes batches on and counts the time until each one comes."""
        iterator = iter(batches)
        while True:
            start = time.perf_counter()
            try:
                batch = next(iterator)
            except StopIteration:
                return
            self._waited += time.perf_counter() - start
            yield batch

    def count(self, images: int) -> None:
        self._images += images

    def take(self) -> tuple[float, float]:
        """(images a second, share of time waiting for data)."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds = max(time.perf_counter() - self._start, 1e-9)
        result = self._images / seconds, self._waited / seconds
        self._reset()
        return result
