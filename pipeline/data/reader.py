"""Reads, checks, decodes and augments the pictures of a split: by native threads, and by Pillow what they leave.

Both give the same bits: Pillow's are the specification. Native code does JPEGs and raw pixels; Pillow does PNG, WebP,
CMYK, whatever libjpeg warns of, and everything where the native library was not built.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from PIL import Image

from pipeline.data import native
from pipeline.data.augment import (
    AugmentConfig,
    apply_colours,
    apply_training,
    evaluation_transform,
    training_crops,
)
from pipeline.data.batch import Batch, Replaced
from pipeline.data.decode import decode_rgb
from pipeline.data.source import NoRoom, OpenFile, Source, WrongBytes, checked_bytes

REPLACEMENTS = 16  # samples that are tried in place of one: a whole shard that is bad ends the run


@dataclass(frozen=True)
class Labels:
    """What a split's labels are called, and how they come from the shards' own."""

    classes: tuple[str, ...]
    table: np.ndarray  # int64 (classes of the shards,)


@dataclass(frozen=True)
class Reading:
    """How pictures are read and what is made of them: fields of DataConfig, and the run's seed."""

    image_size: int
    augment: AugmentConfig
    seed: int
    threads: int  # native ones
    on_bad_sample: Literal["stop", "replace"]
    check_crc: bool


class PictureReader:
    """One split. Safe to fork, and to share between threads."""

    def __init__(
        self, source: Source, labels: Labels, shard_sizes: tuple[int, ...], samples_sha256: str, reading: Reading
    ) -> None:
        self.source = source
        self.classes = labels.classes
        self.shard_sizes = shard_sizes
        self.samples_sha256 = samples_sha256
        self.fetches = source.fetches
        self.augment = reading.augment
        self.seed = reading.seed
        self.reading = reading
        self.threaded = native.library() is not None and not reading.augment.changes_colours
        self._label_table = labels.table
        self._pool: tuple[int, native.Pool] | None = None  # with the process that it belongs to
        self._pool_lock = threading.Lock()
        self._buffers = Buffers((reading.image_size, reading.image_size, 3))

    def __len__(self) -> int:
        return len(self.source.index)

    def labels_of(self, sample_ids: np.ndarray) -> np.ndarray:
        return self._label_table[self.source.index.records(sample_ids)["label"]]

    def expect(self, shards: np.ndarray, keep: bool) -> None:
        self.source.expect(shards, keep)

    def batch(self, sample_ids: np.ndarray, epoch: int | None, in_hand: np.ndarray | None = None) -> Batch:
        """Errors: ValueError, OSError naming file and sample; with `replace` only after REPLACEMENTS of them."""
        ids = np.array(sample_ids, np.int64)
        # A forked process must leave the GPU alone.
        buffer = self._buffers.take(len(ids), pinned=in_hand is None and torch.cuda.is_available())
        images = buffer.numpy()
        records = self.source.index.records(ids)
        done = (
            self._natively(ids, records, epoch, images, in_hand)
            if native.library() is not None
            else np.zeros(len(ids), bool)
        )
        replaced = []
        for i in np.flatnonzero(~done).tolist():
            try:
                if in_hand is not None:
                    in_hand[0] = ids[i]
                images[i] = self._by_pillow(int(ids[i]), epoch)
            except ValueError as error:
                # A shard was whole when it came from its store: this machine's copy alone is damaged, and other ranks
                # would not replace what this one does.
                of_here = self.fetches and isinstance(error, WrongBytes)
                if epoch is None or self.reading.on_bad_sample == "stop" or of_here:
                    raise
                images[i], other = self._in_place_of(int(ids[i]), epoch, error)
                replaced.append(Replaced(int(ids[i]), other, str(error)))
                ids[i] = other
        if epoch is not None and self.augment.changes_colours:
            for image, sample_id in zip(images, ids.tolist(), strict=True):
                if in_hand is not None:
                    in_hand[0] = sample_id
                image[:] = apply_colours(Image.fromarray(image), sample_id, self.seed, epoch, self.augment)
        labels = self.labels_of(ids) if replaced else self._label_table[records["label"]]
        return Batch(buffer, torch.from_numpy(labels), torch.from_numpy(ids), tuple(replaced))

    def read(self, sample_id: int) -> bytes:
        """A sample's bytes as stored, checked where the batches are. Errors: ValueError naming file and sample."""
        return checked_bytes(self.source, sample_id, self.reading.check_crc)

    def where(self, sample_id: int) -> str:
        return self.source.where(sample_id)

    def close(self) -> None:
        """Ends this process's threads; they start again where the reader is used again."""
        with self._pool_lock:
            if self._pool is not None and self._pool[0] == os.getpid():
                self._pool[1].close()
            self._pool = None
        self.source.close()

    def _natively(
        self,
        ids: np.ndarray,
        records: np.ndarray,
        epoch: int | None,
        images: np.ndarray,
        in_hand: np.ndarray | None,
    ) -> np.ndarray:
        """Fills images (B, S, S, 3) and tells which samples are done, bool (B,)."""
        items = np.zeros(len(ids), native.ITEM)
        for name in ("offset", "size", "crc32"):
            items[name] = records[name]
        items["sample_id"] = ids
        form = self.source.form(ids)
        if form is not None:
            items["width"], items["height"] = form.sizes.T
            items["kind"] = np.where(form.raw, native.RAW, native.ENCODED)
        a = self.augment
        view = native.View(
            self.reading.image_size,
            self.seed,
            epoch,
            a.scale,
            a.ratio,
            a.flip,
            a.interpolation,
            a.eval_crop,
            a.eval_crop_share,
            self.reading.check_crc,
        )
        numbers = self.source.index.files_of(ids)
        pool = self._native_pool(in_hand is not None)
        if in_hand is None and (files := self._open_together(numbers)) is not None:
            items["fd"] = [files[number].descriptor for number in numbers.tolist()]
            return pool.submit(items, view, images).wait() == native.OK

        def submitted(i: int) -> native.Job:
            if in_hand is not None:
                in_hand[0] = ids[i]
            return pool.submit(items[i : i + 1], view, images[i : i + 1])

        done = np.zeros(len(ids), bool)
        for number in dict.fromkeys(numbers.tolist()):
            file = self.source.file(number)  # no other is open meanwhile: who waits for room may not hold any
            of_file = np.flatnonzero(numbers == number)
            items["fd"][of_file] = file.descriptor
            jobs: Iterable[native.Job] = map(submitted, of_file.tolist())
            if in_hand is None:
                jobs = list(jobs)
            done[of_file] = [job.wait()[0] == native.OK for job in jobs]
            del file
        return done

    def _open_together(self, numbers: np.ndarray) -> dict[int, OpenFile] | None:
        """All files of a batch, by number; None where a cache has no room for them now."""
        try:
            return {number: self.source.file(number, wait=False) for number in set(numbers.tolist())}
        except NoRoom:
            return None

    def _native_pool(self, in_worker: bool) -> native.Pool:
        """This process's own: threads do not survive a fork. A worker process is itself the thread."""
        with self._pool_lock:
            if self._pool is None or self._pool[0] != os.getpid():
                self._pool = os.getpid(), native.Pool(0 if in_worker else self.reading.threads)
            return self._pool[1]

    def _by_pillow(self, sample_id: int, epoch: int | None) -> np.ndarray:
        """uint8 (S, S, 3). Reads the sample anew: what is wrong with it is found here, and said."""
        picture = self._picture(sample_id)
        if epoch is None:
            return np.asarray(evaluation_transform(self.augment, self.reading.image_size)(picture)).transpose(1, 2, 0)
        crop = training_crops([picture.size], np.array([sample_id]), self.seed, epoch, self.augment)[0]
        return np.asarray(apply_training(picture, crop, self.reading.image_size, self.augment))

    def _picture(self, sample_id: int) -> Image.Image:
        data = checked_bytes(self.source, sample_id, self.reading.check_crc)
        form = self.source.form(np.array([sample_id]))
        if form is None:
            return decode_rgb(data, self.where(sample_id))
        size = tuple(form.sizes[0].tolist())
        if form.raw[0]:
            return Image.frombytes("RGB", size, data)
        picture = decode_rgb(data, self.where(sample_id))
        if picture.size != size:
            raise ValueError(
                f"{self.where(sample_id)}: the JPEG is {picture.size}, the metadata say {size} (width, height); "
                f"{self.source.mend(0)}"
            )
        return picture

    def _in_place_of(self, sample_id: int, epoch: int, error: Exception) -> tuple[np.ndarray, int]:
        """The rule of `replace`: the next sample id, after the last the first, whose picture can be read.

        It depends on the data alone, so it is the same on all ranks. The other sample comes whole: with its own label,
        crop, noise and id. Errors: ValueError where REPLACEMENTS after one another cannot be read.
        """
        for step in range(1, REPLACEMENTS + 1):
            other = (sample_id + step) % len(self)
            try:
                return self._by_pillow(other, epoch), other
            except ValueError:
                continue
        raise ValueError(f"{error}; nor can the {REPLACEMENTS} samples after it be read") from error


class Buffers:
    """Batches of uint8 pictures, used again once nobody holds them: fresh memory costs a page fault every 4 KB.

    With a GPU they are pinned, by torch's own allocator, which knows of copies that are still under way.
    """

    def __init__(self, shape: tuple[int, ...], most: int = 16) -> None:
        self._shape = shape
        self._most = most
        self._arrays: list[np.ndarray] = []
        self._lock = threading.Lock()

    def take(self, count: int, pinned: bool) -> torch.Tensor:
        """uint8 (count, *shape), with any content."""
        if pinned:
            return torch.empty((count, *self._shape), dtype=torch.uint8, pin_memory=True)
        with self._lock:
            self._arrays = [array for array in self._arrays if len(array) == count]
            for array, references in zip(self._arrays, _references(self._arrays), strict=True):
                if references == _IDLE:  # a tensor, or a view of one, would hold it too
                    return torch.from_numpy(array)
            array = np.empty((count, *self._shape), np.uint8)
            if len(self._arrays) < self._most:
                self._arrays.append(array)
        return torch.from_numpy(array)


def _references(arrays: list[np.ndarray]) -> list[int]:
    return [sys.getrefcount(array) for array in arrays]


_IDLE = _references([np.empty(0)])[0]  # of an array that a list alone holds: versions of Python count differently
