"""What the native decoders can do alone, and how much of it reaches Python through the loader."""

from __future__ import annotations

import collections
import contextlib
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from benchmarks.harness import Contestant, Row, figures, ratio
from benchmarks.loader_contestants import SEED, Entrant, Work, project_entrants
from pipeline.data import native
from pipeline.data.augment import AugmentConfig
from pipeline.data.loader import DataConfig, open_split
from pipeline.data.order import Layout, Order, training_micro_batches
from pipeline.data.source import OpenFile

PART = "decode alone"
_UNCHECKED = "unchecked"
_AHEAD = 4  # batches that are handed in at once: the threads never wait for one


@contextlib.contextmanager
def decode_contestants(work: Work) -> Iterator[list[Contestant]]:
    """The same epoch by one thread, by all threads, and by the loader; none where there is no native library."""
    if native.library() is None or work.workers == 0:
        print("not measured: decode alone: it needs the native library (`make setup`) and --workers", file=sys.stderr)
        yield []
        return
    entrants = project_entrants(work)
    form, manifest = ("restart_tars", work.restart_manifest) if work.restart_manifest else ("tars", work.manifest)
    entrant: Entrant = entrants[form]
    plan = _Plan(work, manifest)
    with contextlib.ExitStack() as stack:
        contestants = []
        for threads, verify in ((1, True), (work.workers, True), (work.workers, False)):
            pool = native.Pool(threads)
            stack.callback(pool.close)
            settings = (
                f"the pool of pipeline.data.native alone on {form}, {threads} threads, jobs handed to it directly, "
                f"checksums {'compared' if verify else 'not compared'}"
            )
            name = f"threads_{threads}" if verify else _UNCHECKED
            contestants.append(Contestant(name, partial(plan.decode, pool, verify), settings))
        loader = entrant.open()
        stack.callback(entrant.close, loader)
        contestants.append(Contestant("loader", lambda: sum(len(batch[1]) for batch in loader), entrant.settings))
        yield list({contestant.name: contestant for contestant in contestants}.values())


class _Plan:
    """The epochs of a training, one after another, as items for the native pool."""

    def __init__(self, work: Work, manifest: Path) -> None:
        config = DataConfig(train=str(manifest), image_size=work.image_size, workers=work.workers)
        augment = AugmentConfig(interpolation=work.interpolation)
        self._source = open_split(str(manifest), config, augment, SEED).source
        self._augment = augment
        self._size = work.image_size
        self._order = Order(work.samples, SEED)
        self._layout = Layout(rank=0, world_size=1, micro_batch=work.batch, accumulation=1)
        self._buffers = np.empty((_AHEAD, work.batch, work.image_size, work.image_size, 3), np.uint8)
        self._files: dict[int, OpenFile] = {}  # open for good
        self._epochs = 0

    def decode(self, pool: native.Pool, verify: bool) -> int:
        """An epoch; each call has crops of its own. Returns the pictures. Errors: ValueError for one that fails."""
        epoch, a = self._epochs, self._augment
        self._epochs += 1
        view = native.View(
            self._size, SEED, epoch, a.scale, a.ratio, a.flip, a.interpolation, a.eval_crop, a.eval_crop_share, verify
        )
        jobs: collections.deque[native.Job] = collections.deque()
        done = 0
        for i, ids in enumerate(training_micro_batches(self._order, epoch, self._layout, 0)):
            if len(jobs) == _AHEAD:
                done += _pictures(jobs.popleft())
            jobs.append(pool.submit(self._items(ids), view, self._buffers[i % _AHEAD]))
        return done + sum(map(_pictures, jobs))

    def _items(self, ids: np.ndarray) -> np.ndarray:
        records = self._source.index.records(ids)
        items = np.zeros(len(ids), native.ITEM)
        numbers = self._source.index.files_of(ids).tolist()
        for number in set(numbers) - self._files.keys():
            self._files[number] = self._source.file(number)
        items["fd"] = [self._files[number].descriptor for number in numbers]
        for name in ("offset", "size", "crc32"):
            items[name] = records[name]
        items["kind"], items["sample_id"] = native.ENCODED, ids
        return items


def _pictures(job: native.Job) -> int:
    status = job.wait()
    if (left := (status != native.OK) & (status != native.ASK_REFERENCE)).any():
        raise ValueError(f"the native decoder gave status {status[left][0]} for a picture whose CRC was right")
    return int((status == native.OK).sum())  # what is none of its own is left to Pillow


def print_share(rows: Sequence[Row], threads: int) -> None:
    """How much of the decoders' rate reaches Python, and what of it checksums take."""
    of_part = {row.contestant: row for row in rows if row.part == PART}
    if not of_part:
        return
    loader = of_part["loader"]
    share = figures(ratio(loader, of_part[f"threads_{threads}"]))
    alone = loader.items_per_second.median / (of_part["threads_1"].items_per_second.median * threads)
    print(f"of {threads} threads' decoding alone reaches Python: {share}; of {threads} times one thread's: {alone:.3g}")
    cpu = of_part[f"threads_{threads}"].cpu_seconds_per_item.median / of_part[_UNCHECKED].cpu_seconds_per_item.median
    print(f"CPU with checksums compared, over that without: {cpu:.3f}")
