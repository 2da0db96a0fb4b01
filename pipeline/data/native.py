"""Reading, decoding and cropping by native threads that do not hold Python's lock: csrc/, where `make setup` built it.

Pillow is the specification, to the bit: `augment.py` and `decode.py` say what the pictures must be.
"""

from __future__ import annotations

import ctypes
import os
import sys
import weakref
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np

from pipeline.noise.reference import Purpose, stream_of

LIBRARY = Path(__file__).parent / "csrc" / "libnoisynn_loader.so"
ABI = 2
ITEM = np.dtype(
    [
        ("fd", "<i4"),
        ("kind", "<i4"),
        ("offset", "<u8"),
        ("size", "<u4"),
        ("crc32", "<u4"),
        ("width", "<u4"),
        ("height", "<u4"),
        ("sample_id", "<i8"),
    ],
    align=True,
)
"""One sample: bytes [offset, offset + size) of an open file. width, height: where the container tells them, else 0."""
ENCODED, RAW = 0, 1
"""kind: a JPEG (or what ASK_REFERENCE is answered to), or RGB bytes (height, width, 3)."""
OK, WRONG_BYTES, READ_FAILED, ASK_REFERENCE, TOO_LARGE = 0, 1, 2, 3, 4
"""status: done; bytes that are not those written; pread failed; Pillow must do it; over decode.MAX_PIXELS."""
_INTERPOLATION = {"bilinear": 0, "bicubic": 1}


@dataclass(frozen=True)
class View:
    """What is made of each picture; the fields are AugmentConfig's."""

    size: int
    seed: int
    epoch: int | None
    """None: the evaluation transform, which draws nothing."""
    scale: tuple[float, float]
    ratio: tuple[float, float]
    flip: float
    interpolation: Literal["bilinear", "bicubic"]
    eval_crop: Literal["center", "squash"]
    eval_crop_share: float
    verify: bool = True
    """Whether checksums are looked at. False is there to measure what that costs."""


class _View(ctypes.Structure):
    """struct View of csrc/loader.h."""

    _fields_ = (
        ("size", ctypes.c_int32),
        ("training", ctypes.c_int32),
        ("seed", ctypes.c_uint32),
        ("epoch", ctypes.c_uint32),
        ("crop_stream", ctypes.c_uint32),
        ("flip_stream", ctypes.c_uint32),
        ("interpolation", ctypes.c_int32),
        ("squash", ctypes.c_int32),
        ("verify", ctypes.c_int32),
        ("unused", ctypes.c_int32),
        ("scale", ctypes.c_double * 2),
        ("ratio", ctypes.c_double * 2),
        ("flip", ctypes.c_double),
        ("eval_crop_share", ctypes.c_double),
    )


@cache
def library() -> ctypes.CDLL | None:
    """None where it was not built; said once, since the loader is several times slower then."""
    mend = "run `make setup`; until then Pillow reads the pictures, several times slower"
    if not LIBRARY.is_file():
        print(f"note: {LIBRARY.name} is not built: {mend}", file=sys.stderr)
        return None
    try:
        loaded = ctypes.CDLL(str(LIBRARY))
        if loaded.nn_loader_abi() != ABI:
            raise OSError("it was built from another version of its source")
    except (OSError, AttributeError) as error:
        print(f"note: {LIBRARY} cannot be used ({error}): {mend}", file=sys.stderr)
        return None
    pointer, i64 = ctypes.c_void_p, ctypes.c_int64
    loaded.nn_loader_lanes.restype = loaded.nn_loader_entropy_decoder.restype = ctypes.c_char_p
    loaded.nn_pool_open.restype = loaded.nn_job_submit.restype = pointer
    loaded.nn_job_submit.argtypes = (pointer, pointer, i64, ctypes.POINTER(_View), pointer, pointer, pointer)
    loaded.nn_training_crops.argtypes = (pointer, pointer, i64, ctypes.POINTER(_View), pointer)
    loaded.nn_make_picture.argtypes = (ctypes.c_char_p, pointer, ctypes.POINTER(_View), pointer, pointer)
    loaded.nn_decode_window.argtypes = (ctypes.c_char_p, ctypes.c_uint32, pointer, pointer, pointer)
    loaded.nn_crc32.argtypes = (ctypes.c_char_p, ctypes.c_size_t)
    loaded.nn_crc32.restype = ctypes.c_uint32
    for done in (loaded.nn_pool_close, loaded.nn_pool_free, loaded.nn_job_wait, loaded.nn_job_free):
        done.argtypes, done.restype = (pointer,), None
    loaded.nn_training_crops.restype = None
    if loaded.nn_loader_lanes() is None:
        raise ValueError(f"NOISYNN_LANES is {os.environ['NOISYNN_LANES']!r}: give AVX-512, AVX2 or `one lane`")
    return loaded


def _built() -> ctypes.CDLL:
    loaded = library()
    if loaded is None:
        raise RuntimeError(f"{LIBRARY.name} is not built: run `make setup`, or ask native.library() first")
    return loaded


def _as_struct(view: View) -> _View:
    return _View(
        view.size,
        view.epoch is not None,
        view.seed & 0xFFFFFFFF,
        (view.epoch or 0) & 0xFFFFFFFF,
        stream_of("image", Purpose.CROP),
        stream_of("image", Purpose.FLIP),
        _INTERPOLATION[view.interpolation],
        view.eval_crop == "squash",
        view.verify,
        0,
        tuple(view.scale),
        tuple(view.ratio),
        view.flip,
        view.eval_crop_share,
    )


class Pool:
    """Native threads. After a fork the child makes its own: threads do not survive one."""

    def __init__(self, threads: int) -> None:
        """threads=0: the caller of Job.wait does the work. Errors: OSError where threads cannot be started."""
        loaded = _built()
        self.handle = loaded.nn_pool_open(threads)
        if self.handle is None:
            raise OSError(f"{threads} reading threads cannot be started: lower data.workers")
        # Also at the interpreter's end.
        self._end = weakref.finalize(self, _end_pool, loaded, self.handle, os.getpid())

    def submit(self, items: np.ndarray, view: View, out: np.ndarray) -> Job:
        """Begins to fill `out`, uint8 (B, S, S, 3), C-contiguous, from items, ITEM (B,).

        Samples are worked on in the order in which they were submitted, across jobs. All rows but those of status OK
        become zero. Errors: ValueError for arrays of other shapes, RuntimeError after close().
        """
        size = view.size
        if items.dtype != ITEM or items.ndim != 1:
            raise ValueError(f"items are {items.dtype} {items.shape}: they must be of native.ITEM, in one dimension")
        if out.dtype != np.uint8 or out.shape != (len(items), size, size, 3) or not out.flags.c_contiguous:
            raise ValueError(
                f"out is {out.dtype} {out.shape}: it must be uint8 ({len(items)}, {size}, {size}, 3), packed"
            )
        if not out.flags.writeable:
            raise ValueError("out cannot be written to")
        if not self._end.alive:
            raise RuntimeError("the pool of reading threads is closed")
        return Job(self, np.ascontiguousarray(items), view, out)

    def close(self) -> None:
        """Ends the threads; samples that were not begun get the status ASK_REFERENCE."""
        self._end()


def _end_pool(loaded: ctypes.CDLL, handle: int, process: int) -> None:
    if os.getpid() == process:
        loaded.nn_pool_close(handle)
        loaded.nn_pool_free(handle)


class Job:
    """A batch that is being made. It keeps alive the pool, and the arrays that its threads read and write."""

    def __init__(self, pool: Pool, items: np.ndarray, view: View, out: np.ndarray) -> None:
        self._loaded = _built()
        self._kept: tuple | None = (pool, items, out)
        self._process = os.getpid()
        self._status = np.empty(len(items), np.int32)
        self.crops = np.zeros((len(items), 5), np.int32)
        """After wait(): left, top, width, height and flip of the box that was resized; zeros where it failed."""
        self._handle = self._loaded.nn_job_submit(
            pool.handle,
            items.ctypes.data,
            len(items),
            ctypes.byref(_as_struct(view)),
            out.ctypes.data,
            self._status.ctypes.data,
            self.crops.ctypes.data,
        )
        if self._handle is None:
            raise MemoryError("no memory for a batch of pictures")

    def wait(self) -> np.ndarray:
        """int32 (B,): the status of each sample. Other Python threads run meanwhile."""
        if self._handle is not None:
            if os.getpid() != self._process:
                raise RuntimeError("this batch was begun before a fork, by threads that this process does not have")
            self._loaded.nn_job_wait(self._handle)
            self._release()
        return self._status

    def _release(self) -> None:
        self._loaded.nn_job_free(self._handle)
        self._handle = None
        self._kept = None

    def __del__(self) -> None:
        # A thread may still be writing to these arrays.
        if getattr(self, "_handle", None) is not None and os.getpid() == self._process:
            self._loaded.nn_job_wait(self._handle)
            self._release()


# Single steps, for tests and for the curious.


def crc32(data: bytes) -> int:
    return _built().nn_crc32(data, len(data))


def training_crops(sizes: np.ndarray, sample_ids: np.ndarray, view: View) -> np.ndarray:
    """int32 (B, 5): left, top, width, height, flip. sizes: (B, 2), width and height; view.epoch is a number."""
    sizes, ids = np.ascontiguousarray(sizes, np.int32), np.ascontiguousarray(sample_ids, np.int64)
    crops = np.empty((len(ids), 5), np.int32)
    _built().nn_training_crops(
        sizes.ctypes.data, ids.ctypes.data, len(ids), ctypes.byref(_as_struct(view)), crops.ctypes.data
    )
    return crops


def make_picture(data: bytes, view: View, sample_id: int = 0, raw_size: tuple[int, int] | None = None):
    """(status, uint8 (S, S, 3), int32 (5,) crop) of one picture in memory; raw_size: (width, height) of RGB bytes."""
    item = np.zeros(1, ITEM)
    item["size"], item["sample_id"] = len(data), sample_id
    if raw_size is not None:
        item["kind"] = RAW
        item["width"], item["height"] = raw_size
    out, crop = np.zeros((view.size, view.size, 3), np.uint8), np.zeros(5, np.int32)
    status = _built().nn_make_picture(
        data, item.ctypes.data, ctypes.byref(_as_struct(view)), out.ctypes.data, crop.ctypes.data
    )
    return status, out, crop


def decode_window(data: bytes, window: tuple[int, int, int, int]) -> tuple[int, np.ndarray, bool]:
    """(status, uint8 (height, width, 3), whether a part was spared) of a JPEG's (left, top, width, height)."""
    out = np.zeros((window[3], window[2], 3), np.uint8)
    box, spliced = np.array(window, np.int32), np.zeros(1, np.int32)
    status = _built().nn_decode_window(data, len(data), box.ctypes.data, out.ctypes.data, spliced.ctypes.data)
    return status, out, bool(spliced[0])
