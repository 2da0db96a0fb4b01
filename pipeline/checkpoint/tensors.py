"""Tensor files written as a stream: safetensors' format, hashed in the same pass, so that no file is held in memory.

The library writes a file from tensors that are all at hand; weights put together from many ranks' parts are not. What
is written here, it reads (https://github.com/huggingface/safetensors#format: u64 length, JSON header, data).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import IO, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

BLOCK_BYTES = 4 << 20  # large enough that hash and file release the interpreter for long, small enough for the cache

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


Blocks = Iterable[memoryview | bytes]


class Entry(NamedTuple):
    """One tensor of a file: its key, type and shape."""

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


class Written(NamedTuple):
    """A file as it must be found again."""

    sha256: str
    bytes: int


def piece_key(kind: str, name: str, start: int) -> str:
    """The key of a stretch: `exp_avg/blocks.0.attn.qkv.weight@1234`."""
    return f"{kind}/{name}@{start}"


def parse_key(key: str) -> tuple[str, str, int]:
    kind, _, rest = key.partition("/")
    name, _, start = rest.rpartition("@")
    return kind, name, int(start)


def header_of(entries: Iterable[Entry], metadata: Mapping[str, str]) -> bytes:
    """Length and JSON, padded to 8 bytes as the library does, so that the data is aligned."""
    body: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for entry in entries:
        start, end = end, end + entry.nbytes
        body[entry.key] = {"dtype": _DTYPES[entry.dtype], "shape": list(entry.shape), "data_offsets": [start, end]}
    text = json.dumps(body, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def read_header(read: Callable[[int, int], bytes]) -> tuple[dict[str, Any], int]:
    """A file's JSON header and where its data begins; `read(start, end)` gives bytes."""
    length = int.from_bytes(read(0, 8), "little")
    return json.loads(read(8, 8 + length)), 8 + length


def raw(tensor: Tensor) -> memoryview:
    """A CPU tensor's bytes, not copied where it is contiguous."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data


def blocks(data: memoryview) -> Iterator[memoryview]:
    for start in range(0, len(data), BLOCK_BYTES):
        yield data[start : start + BLOCK_BYTES]


def write_stream(file: IO[bytes], header: bytes, data: Blocks, go_on: Callable[[], None]) -> Written:
    """Header and data into a file, hashed on the way; `go_on` is asked before each block, and may raise."""
    digest = hashlib.sha256(header)
    file.write(header)
    size = len(header)
    for block in data:
        go_on()
        digest.update(block)
        file.write(block)
        size += len(block)
    return Written(digest.hexdigest(), size)


def all_finite(data: memoryview) -> bool:
    """Of float32 values. numpy, not torch: it leaves no threads behind and takes none from the training's step."""
    return bool(np.isfinite(np.frombuffer(data, dtype=np.float32)).all())
