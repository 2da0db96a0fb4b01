"""The headers of a tar and nothing else: names and places of its files, hostile or damaged ones refused.

tarfile takes 25 us a member, of which ImageNet's archives have 1.3 million, and takes a damaged header for the end.
Formats: v7, USTAR, GNU (long names, base-256 sizes), pax (path and size).
"""

from __future__ import annotations

import mmap
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

BLOCK = 512
_BATCH = 1024  # headers that are checked at once
_FILLING = 1 << 20  # bytes behind the end marker that are looked at together
_LARGE_MEMBERS = 32 << 10  # bytes on the mean, from which reading ahead would read the whole tar
_REGULAR = frozenset(b"0\x007")
_LONG_NAME, _LONG_LINK, _PAX, _GLOBAL_PAX, _FOLDER = b"LKxg5"
_EXTENDING = frozenset((_LONG_NAME, _LONG_LINK, _PAX, _GLOBAL_PAX))
_OTHERS = {
    ord("1"): "a hard link",
    ord("2"): "a symbolic link",
    ord("3"): "a device",
    ord("4"): "a device",
    ord("6"): "a pipe",
    ord("S"): "a sparse file",
}
_MAX_DIGITS = 20  # of a size in pax records: 64 bits
_MAX_EXTENDED = 1 << 20  # bytes of a long name or of pax records; more is an attack
_PLAIN = rb"[A-Za-z0-9_][A-Za-z0-9_,=+@ -]*(?:[./][A-Za-z0-9_,=+@ -]+)*"
_PLAIN_NAMES = re.compile(rb"(?:" + _PLAIN + rb"\n)*")
# The webdataset library, and torch, run code that these may hold when they decode them; webdataset unpacks .gz first.
_EXECUTABLE = re.compile(rb"\.(?:pyd|pickle|pkl|pth|pt|ckpt|joblib|dill)(?:\.gz)*\n", re.IGNORECASE)
_OCTAL = re.compile(rb" *([0-7]*) *(?:\0.*)?", re.DOTALL)
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
_MEND = "do not trust this archive, or fetch it again"


class Member(NamedTuple):
    """A plain file in a tar."""

    name: str  # "./" at its front removed
    offset: int  # bytes from the start of the file, whatever tar in it the member is of
    size: int  # bytes


class Bytes(Protocol):
    """What is read by slices alone: a map of a file, or ranges of an object in a store."""

    def __getitem__(self, part: slice, /) -> bytes: ...


def read_members(path: Path) -> Iterator[Member]:
    """The plain files of a tar on this machine, in its order; folders are passed over. Errors: as members_in."""
    with open(path, "rb") as file:
        size = file.seek(0, 2)
        if size == 0:
            raise ValueError(f"{path} is empty: fetch it again")
        with mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as data:
            yield from members_in(data, 0, size, str(path))


def members_in(data: Bytes, start: int, end: int, where: str) -> Iterator[Member]:
    """The plain files of the tar that lies from `start` to `end` of `data`, in its order; folders are passed over.

    Errors: ValueError naming the tar and the member: names that lead out of the folder or into a program (absolute,
    `..`, `pipe:`, control characters), links, devices, members that other libraries unpickle, names that occur twice,
    damaged headers, sizes past the end, what readers would take in different ways, a tar without its end marker, as a
    cut leaves it, or with more behind it, or compressed.
    """
    _refuse_compressed(data[start : start + 6], where)
    walk = _Walk(data, start, end, where)
    while batch := walk.next_batch():
        yield from batch
        if isinstance(data, mmap.mmap) and sum(member.size for member in batch) > _LARGE_MEMBERS * len(batch):
            data.madvise(mmap.MADV_RANDOM)


def _refuse_compressed(magic: bytes, where: str) -> None:
    for start, kind in _COMPRESSED.items():
        if magic.startswith(start):
            raise ValueError(f"{where} is compressed ({kind}), so no picture in it can be reached alone: unpack it")


class _Walk:
    """Reads headers one after another, and hands members out once the checksums of their batch were taken."""

    def __init__(self, data: Bytes, start: int, end: int, where: str) -> None:
        self.data, self.position, self.end, self.where = data, start, end, where
        self.seen: set[int] = set()  # hashes of names: of two million members, 100 MB less than the names
        self.name: bytes | None = None  # of an extended header, for the next member
        self.size: int | None = None
        self.ended = False

    def next_batch(self) -> list[Member]:
        """Up to _BATCH members; none at the end."""
        while not self.ended:
            pending = self.name is not None or self.size is not None
            if isinstance(self.data, mmap.mmap) and not pending and (plain := self._plain_batch(self.data)):
                return plain
            if members := self._any_batch():
                return members
        return []

    def _any_batch(self) -> list[Member]:
        """The members of up to _BATCH headers, of whatever kind; there may be none."""
        blocks: list[bytes] = []
        places: list[int] = []
        members: list[Member] = []
        try:
            while not self.ended and len(blocks) < _BATCH:
                block = self.data[self.position : self.position + BLOCK]
                if (self.position + BLOCK > self.end or not block[0]) and self._is_end(block):
                    break
                blocks.append(block)
                places.append(self.position)
                self._step(block, members)
        except ValueError:
            self._check(blocks, places)  # a damaged header is what is wrong then, not what it says
            raise
        self._check(blocks, places)
        return members

    def _plain_batch(self, data: mmap.mmap) -> list[Member] | None:
        """As next_batch, up to an extended header; 1 us each instead of 3. None where one is not plain, or at the end.

        Only sizes are read one by one, to find the next header; numpy then checks what `_step` checks singly.
        """
        start = position = self.position
        places: list[int] = []
        sizes: list[int] = []
        while len(places) < _BATCH and position + BLOCK <= self.end and data[position]:
            if data[position + 156] in _EXTENDING:
                break
            try:
                size = int(data[position + 124 : position + 135], 8)
            except ValueError:
                return None
            places.append(position)
            sizes.append(size)
            position += BLOCK + size + -size % BLOCK
            if size < 0 or position > self.end:
                return None
        if not places or start % BLOCK:
            return None
        table = np.frombuffer(data, np.dtype((np.void, BLOCK)), len(data) // BLOCK)[np.array(places) // BLOCK]
        table = table.view(np.uint8).reshape(-1, BLOCK)
        digits = table[:, 124:135]
        if not (
            _sums_are_plainly_right(table)
            and ((digits >= ord("0")) & (digits < ord("8"))).all()
            and np.isin(table[:, 135], (0, ord(" "))).all()  # a twelfth digit would belong to the size
            and np.isin(table[:, 156], list(_REGULAR)).all()
            and not table[:, 345].any()
        ):
            return None
        names = np.ascontiguousarray(table[:, :100]).view("S100").ravel().tolist()
        lines = b"\n".join([*names, b""])
        hashes = set(map(hash, names))
        if not _PLAIN_NAMES.fullmatch(lines) or _EXECUTABLE.search(lines):
            return None
        if len(hashes) < len(names) or not self.seen.isdisjoint(hashes):
            return None
        self.seen |= hashes
        self.position = position
        offsets = [place + BLOCK for place in places]
        return list(map(Member._make, zip(lines[:-1].decode().split("\n"), offsets, sizes, strict=True)))

    def _is_end(self, block: bytes) -> bool:
        if len(block) == BLOCK and self.position + BLOCK <= self.end and any(block):
            return False
        second = self.data[self.position + BLOCK : self.position + 2 * BLOCK]
        whole = self.position + 2 * BLOCK <= self.end and len(second) == BLOCK
        if not whole or any(block) or any(second):
            raise ValueError(f"{self.where} ends without its end marker, as a cut file does: fetch it again")
        for place in range(self.position + 2 * BLOCK, self.end, _FILLING):
            if self.data[place : min(place + _FILLING, self.end)].strip(b"\0"):
                raise ValueError(
                    f"{self.where} goes on behind its end marker, where other readers stop: take apart tars that were "
                    "joined into one file, or fetch it again"
                )
        if self.name is not None or self.size is not None:
            raise ValueError(f"{self.where} ends with a long name or pax header of no member: {_MEND}")
        self.ended = True
        return True

    def _check(self, blocks: list[bytes], places: list[int]) -> None:
        """Errors: ValueError at the first header whose checksum is wrong."""
        if not blocks:
            return
        table = np.frombuffer(b"".join(blocks), np.uint8).reshape(-1, BLOCK)
        if _sums_are_plainly_right(table):
            return
        for block, place, total in zip(blocks, places, _sums(table).tolist(), strict=True):
            try:
                right = int(block[148:156].strip(b" \0"), 8) == total
            except ValueError:
                right = False
            if not right:
                raise ValueError(f"{self.where} is damaged at byte {place:,} (a header's checksum): fetch it again")

    def _step(self, block: bytes, members: list[Member]) -> None:
        """Takes in one header, and moves behind what it describes."""
        kind = block[156]
        extends = kind in _EXTENDING
        size = self.size if self.size is not None and not extends else self._size_of(block)
        offset = self.position + BLOCK
        after = offset + size + -size % BLOCK
        if size < 0 or after > self.end:
            raise ValueError(
                f"{self.where}: {_name_of(block)!r} declares {size:,} bytes, but {self.end - offset:,} are left: it is "
                "cut, or hostile"
            )
        self.position = after
        if extends:
            self._extend(kind, offset, size)
            return
        name = self.name if self.name is not None else _name_of(block)
        self.name = self.size = None
        if kind == _FOLDER or (kind in _REGULAR and name.endswith(b"/")):  # v7's way of naming a folder
            if size:
                # Some readers pass over these bytes, to others they are the next headers.
                raise ValueError(f"{self.where}: the folder {name!r} declares {size:,} bytes: {_MEND}")
        elif kind in _REGULAR:
            members.append(Member(self._checked(name), offset, size))
        else:
            what = _OTHERS.get(kind, f"of the unknown type {chr(kind)!r}")
            raise ValueError(f"{self.where}: {_name_of(block)!r} is {what}, no plain file: remove it from the tar")

    def _size_of(self, block: bytes) -> int:
        """In octal digits or in base 256."""
        field = block[124:136]
        if field[0] in (0x80, 0xFF):
            return int.from_bytes(field[1:], "big", signed=field[0] == 0xFF)
        digits = _OCTAL.fullmatch(field)
        if digits is None:
            raise ValueError(f"{self.where}: {_name_of(block)!r} declares the size {field!r}, no number: {_MEND}")
        return int(digits[1] or b"0", 8)

    def _extend(self, kind: int, offset: int, size: int) -> None:
        if size > _MAX_EXTENDED:
            raise ValueError(f"{self.where}: a name of {size:,} bytes at byte {offset:,}: {_MEND}")
        if kind == _LONG_LINK:
            return
        text = self.data[offset : offset + size]
        if kind == _LONG_NAME:
            self.name = text.split(b"\0", 1)[0]
            return
        where = f"{self.where}: pax header at byte {offset:,}"
        for key, value in _pax_records(text, where):
            if key.startswith(b"GNU.sparse"):
                raise ValueError(f"{where}: a sparse file: remove it from the tar")
            if key not in (b"path", b"size"):
                continue
            if kind == _GLOBAL_PAX:
                raise ValueError(
                    f"{where} sets the {key.decode()} of all that follow, which readers differ in: {_MEND}"
                )
            if key == b"path":
                self.name = value
            elif value.isdigit() and len(value) <= _MAX_DIGITS:
                self.size = int(value)
            else:
                raise ValueError(f"{where} declares the size {value[:40]!r}, no number of bytes: {_MEND}")

    def _checked(self, name: bytes) -> str:
        name = name.removeprefix(b"./")
        if not _PLAIN_NAMES.fullmatch(name + b"\n"):
            _refuse_hostile(name, self.where)
        if _EXECUTABLE.search(name + b"\n"):
            raise ValueError(f"{self.where}: {name.decode()!r} may hold a program that other readers run: remove it")
        key = hash(name)
        if key in self.seen:
            raise ValueError(f"{self.where}: {name.decode()!r} occurs twice: remove one of them")
        self.seen.add(key)
        return name.decode()


def _sums(table: np.ndarray) -> np.ndarray:
    """The checksums that headers (n, 512) must have: the sum of all bytes, their own field taken as blanks."""
    return table.sum(1, dtype=np.int64) - table[:, 148:156].sum(1, dtype=np.int64) + 8 * ord(" ")


def _sums_are_plainly_right(table: np.ndarray) -> bool:
    """Whether all checksums of headers (n, 512) are right and written as six digits, as nearly every writer does."""
    stored = table[:, 148:154].astype(np.int64) - ord("0")
    digits = (stored >= 0) & (stored < 8)
    return bool(digits.all() and (stored @ (8 ** np.arange(5, -1, -1)) == _sums(table)).all())


def _refuse_hostile(name: bytes, where: str) -> None:
    """Errors: ValueError for a name that is not plainly a relative path; unusual letters are let through."""
    try:
        text = name.decode()
    except UnicodeDecodeError:
        raise ValueError(f"{where}: the name {name!r} is not UTF-8: {_MEND}") from None
    parts = text.split("/")
    if not text or "" in parts or "." in parts or ".." in parts:
        raise ValueError(f"{where}: the name {text!r} is absolute, or leads out of its folder: {_MEND}")
    if any(part.lower().startswith("pipe:") for part in parts):
        raise ValueError(f"{where}: the name {text!r} would start a program in other readers: {_MEND}")
    if any(ord(letter) < 32 or ord(letter) == 127 for letter in text) or "\\" in text:
        raise ValueError(f"{where}: the name {text!r} holds control characters or backslashes: {_MEND}")


def _name_of(block: bytes) -> bytes:
    name = block[:100].split(b"\0", 1)[0]
    # GNU's own format keeps other things where USTAR has the front part of a long name.
    if block[345] and block[257:263] == b"ustar\0":
        return block[345:500].split(b"\0", 1)[0] + b"/" + name
    return name


def _pax_records(text: bytes, where: str) -> Iterator[tuple[bytes, bytes]]:
    position = 0
    while position < len(text):
        digits, _, _ = text[position : position + 20].partition(b" ")
        end = position + int(digits) if digits.isdigit() else position
        record = text[position + len(digits) + 1 : end]
        key, equals, value = record.partition(b"=")
        if end <= position or end > len(text) or not equals or not value.endswith(b"\n"):
            raise ValueError(f"{where} is damaged: fetch it again")
        yield key, value[:-1]
        position = end
