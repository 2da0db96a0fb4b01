"""JPEG without decoding: its header, whether it is plainly well-formed, its EXIF, and grey turned into colour.

The rules are those of the standard (ITU-T T.81) as libjpeg enforces them: what passes here, libjpeg decodes without an
error. What does not pass need not be broken; it takes a decoder to tell.
"""

from __future__ import annotations

import struct
from bisect import bisect_left
from collections.abc import Iterator
from functools import lru_cache
from itertools import islice
from operator import lshift
from typing import NamedTuple

import numpy as np

from data_prep.native import IN_DOUBT, WELL_FORMED, jpeg_check

# Frames whose pictures every JPEG decoder reads: baseline, extended sequential, progressive; all Huffman-coded.
SEQUENTIAL_FRAMES = frozenset({0xC0, 0xC1})
PROGRESSIVE_FRAME = 0xC2
COMMON_FRAMES = SEQUENTIAL_FRAMES | {PROGRESSIVE_FRAME}
ALL_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
SOI, EOI, SOS, DQT, DHT, DRI = 0xD8, 0xD9, 0xDA, 0xDB, 0xC4, 0xDD
APP0, APP1, APP2, APP13, APP14, COMMENT = 0xE0, 0xE1, 0xE2, 0xED, 0xEE, 0xFE
MAX_SIDE = 65500  # libjpeg's
MAX_SCANS = 100  # Far more than any encoder writes; the rest are attacks on the decoder's time.
MAX_BLOCKS_IN_MCU = 10
# Within entropy-coded data 0xFF stands before 0 (a plain 0xFF), restart markers, and more 0xFF (filling).
_ENDS_SCAN = np.array([not (byte in (0, 0xFF) or 0xD0 <= byte <= 0xD7) for byte in range(256)])
_TIFF_BYTES = (0, 1, 1, 2, 4, 8, 1, 1, 2, 4, 8, 4, 8)  # by the number of the entry's type; 0 is none
# Pillow computes with these while it opens a picture, and fails at text.
_RESOLUTION_TAGS = (0x011A, 0x011B, 0x0128)
# Both tables of the chroma that grey gets: one code, the bit 0, which says "no difference" (DC), "end of block" (AC).
_ZERO_TABLES = bytes([0xFF, DHT, 0, 38, *(0x01, 1, *[0] * 15, 0), *(0x11, 1, *[0] * 15, 0)])


class Component(NamedTuple):
    id: int
    horizontal: int  # sampling factors, 1 to 4
    vertical: int
    quantization: int  # number of the quantization table


class Header(NamedTuple):
    """What stands in a JPEG before and in its frame header."""

    frame: int  # the marker: 0xC0 baseline, 0xC2 progressive, ...
    precision: int  # bits a value
    width: int  # pixels
    height: int
    components: tuple[Component, ...]
    exif: tuple[tuple[int, int], ...]  # (start, end) of each EXIF segment, its marker included


class _Segment(NamedTuple):
    marker: int
    start: int  # of the marker's 0xFF
    body: int  # behind the length
    end: int


class _SoFar:
    """Which quantization and Huffman tables are defined, as bits by their number, and which components have data."""

    def __init__(self) -> None:
        self.quantization = self.dc = self.ac = 0
        self.begun: set[int] = set()


def jpeg_header(data: bytes) -> Header | None:
    """The header of a JPEG, of which the first bytes suffice. None where no frame header is found in them."""
    exif = []
    for segment in _segments(data, 2) if data.startswith(b"\xff\xd8") else ():
        if segment.marker == APP1 and data.startswith(b"Exif\0\0", segment.body):
            exif.append((segment.start, segment.end))
        elif segment.marker in ALL_FRAMES:
            return _frame(data, segment, tuple(exif))
    return None


def _segments(data: bytes, position: int) -> Iterator[_Segment]:
    """Segments from a position on, each whole, ending with a scan's header, the end marker, or where they break off."""
    size = len(data)
    while position + 2 <= size and data[position] == 0xFF:
        marker = data[position + 1]
        if marker == 0xFF:  # filling
            position += 1
            continue
        if marker == EOI:
            yield _Segment(marker, position, position + 2, position + 2)
            return
        end = position + 2 + int.from_bytes(data[position + 2 : position + 4], "big")
        # Markers up to 0xBF and from 0xD0 to 0xD8 have no length, and no business here.
        if marker < 0xC0 or 0xD0 <= marker <= SOI or end < position + 4 or end > size:
            return
        yield _Segment(marker, position, position + 4, end)
        if marker == SOS:
            return
        position = end


def _frame(data: bytes, segment: _Segment, exif: tuple[tuple[int, int], ...]) -> Header | None:
    body = data[segment.body : segment.end]
    if len(body) < 6 or len(body) != 6 + 3 * body[5]:
        return None
    precision, height, width, _ = struct.unpack_from(">BHHB", body)
    components = tuple(
        Component(body[at], body[at + 1] >> 4, body[at + 1] & 15, body[at + 2]) for at in range(6, len(body), 3)
    )
    return Header(segment.marker, precision, width, height, components, exif)


def well_formed(data: bytes) -> Header | None:
    """The header of a JPEG, grey or of three components, that decoders read without an error and to its end.

    None says only that it is in doubt. EXIF is for exif_is_sound to judge. Nothing is decoded, so wrong pixels are not
    seen here, as by no decoder.
    """
    verdict, found = jpeg_check(data)
    if verdict == IN_DOUBT:
        return None
    if verdict != WELL_FORMED:
        return well_formed_reference(data)
    parts = zip(found.id, found.horizontal, found.vertical, found.quantization, strict=True)
    components = tuple(map(Component._make, islice(parts, found.components)))
    exif = tuple((start, end) for start, end in found.exif[: found.spans])
    return Header(found.frame, found.precision, found.width, found.height, components, exif)


def well_formed_reference(data: bytes) -> Header | None:
    """The same, in Python alone: what csrc/jpeg_check.c must say of every input."""
    if not data.startswith(b"\xff\xd8"):
        return None
    position, header, scans, so_far = 2, None, 0, _SoFar()
    exif: list[tuple[int, int]] = []
    markers: list[int] = []
    single = False
    while scans <= MAX_SCANS:
        last = None
        for last in _segments(data, position):
            if last.marker in ALL_FRAMES:
                if header is not None or (header := _frame(data, last, ())) is None or not _is_common(header):
                    return None
            elif last.marker == APP1 and data.startswith(b"Exif\0\0", last.body):
                exif.append((last.start, last.end))
            elif not _is_sound(data, last, so_far):
                return None
        if last is None or header is None:
            return None
        if last.marker == EOI:
            return header._replace(exif=tuple(exif)) if len(so_far.begun) == len(header.components) else None
        if last.marker != SOS or single or not _is_scan(data[last.body : last.end], header, so_far):
            return None
        # libjpeg wants the end after a first scan that holds everything.
        single = scans == 0 and header.frame != PROGRESSIVE_FRAME and data[last.body] == len(header.components)
        if scans == 0:
            markers = _markers(data, last.end)
        if (next_one := bisect_left(markers, last.end)) == len(markers):
            return None
        position, scans = markers[next_one], scans + 1
    return None


def _markers(data: bytes, start: int) -> list[int]:
    """Positions from `start` on of the markers that end a scan's data."""
    # With numpy a third of the time of a regular expression: 30 us for 110 KB. All must be seen, for a damaged byte can
    # make a marker of plain data, and libjpeg gives up at some of them.
    values = np.frombuffer(data, np.uint8, offset=start)
    seconds = np.flatnonzero(values[:-1] == 0xFF) + 1
    return (seconds[_ENDS_SCAN[values[seconds]]] + (start - 1)).tolist()


def _is_common(header: Header) -> bool:
    parts = header.components
    tallest, widest = (max((c[i] for c in parts), default=0) for i in (2, 1))
    return (
        header.frame in COMMON_FRAMES
        and header.precision == 8
        and len(parts) in (1, 3)
        and len({c.id for c in parts}) == len(parts)
        and 1 <= header.width <= MAX_SIDE
        and 1 <= header.height <= MAX_SIDE
        # libjpeg enlarges by whole numbers only.
        and all(1 <= c.horizontal <= 4 and widest % c.horizontal == 0 for c in parts)
        and all(1 <= c.vertical <= 4 and tallest % c.vertical == 0 and c.quantization < 4 for c in parts)
    )


def _is_sound(data: bytes, segment: _Segment, so_far: _SoFar) -> bool:
    """Whether a segment other than EXIF and frames is one that libjpeg, and Pillow's own reading, accept."""
    marker, start, end = segment.marker, segment.body, segment.end
    if marker == DHT:
        found = _huffman_tables(data[start:end])
        if found is None:
            return False
        so_far.dc |= found[0]
        so_far.ac |= found[1]
        return True
    if marker == DQT:
        while start < end:
            if data[start] & 15 > 3:
                return False
            so_far.quantization |= 1 << (data[start] & 15)
            start += 129 if data[start] >> 4 else 65
        return start == end
    if marker == DRI:
        return end - start == 2
    # Pillow reads these, and gives up where they are shorter than it expects.
    if marker == APP0:
        return end - start >= 7 or not data.startswith(b"JFIF", start)
    if marker == APP14:
        return end - start >= 7 or not data.startswith(b"Adobe", start)
    if marker == APP2:  # MPF holds further pictures
        return not data.startswith(b"MPF\0", start) and (
            end - start >= 14 or not data.startswith(b"ICC_PROFILE\0", start)
        )
    if marker == APP13:
        return data[end - 6 : end - 2] != b"8BIM" or not data.startswith(b"Photoshop 3.0\0", start)
    return marker in (SOS, EOI, COMMENT) or APP0 <= marker <= 0xEF


@lru_cache(maxsize=256)  # nearly all JPEGs hold the same few
def _huffman_tables(body: bytes) -> tuple[int, int] | None:
    """Bits by the number of the (DC, AC) tables that a segment defines; None where one is not a prefix code."""
    dc = ac = position = 0
    while position < len(body):
        counts, number = body[position + 1 : position + 17], body[position]
        symbols = body[position + 17 : position + 17 + sum(counts)]
        # A code of n bits takes 2^-n of all there are; the one of ones alone must stay free.
        taken = sum(map(lshift, counts, range(15, -1, -1)))
        if len(counts) < 16 or len(symbols) != sum(counts) or len(symbols) > 256 or taken >= 1 << 16:
            return None
        if number & 0xEF > 3:
            return None
        if number < 4:
            if max(symbols, default=0) > 15:
                return None
            dc |= 1 << number
        else:
            ac |= 1 << (number & 15)
        position += 17 + len(symbols)
    return dc, ac


def _is_scan(body: bytes, header: Header, so_far: _SoFar) -> bool:
    """Whether a scan's header fits the frame, and the tables it needs are there."""
    count = body[0] if body else 0
    if not 1 <= count <= len(header.components) or len(body) != 4 + 2 * count:
        return False
    first, last, shift = body[-3:]
    progressive = header.frame == PROGRESSIVE_FRAME
    high, low = shift >> 4, shift & 15
    if progressive:
        if (count > 1 or first == 0) and (first, last) != (0, 0):
            return False
        if first > last or last > 63 or low > 13 or high not in (0, low + 1):
            return False
    elif (first, last, shift) != (0, 63, 0):
        return False
    by_id = {c.id: c for c in header.components}
    blocks = 0
    for at in range(1, 1 + 2 * count, 2):
        component = by_id.pop(body[at], None)
        if component is None or not so_far.quantization >> component.quantization & 1:
            return False
        blocks += component.horizontal * component.vertical
        dc, ac = body[at + 1] >> 4, body[at + 1] & 15
        # Refining DC takes plain bits, without a table.
        if (first == 0 and high == 0 and not so_far.dc >> dc & 1) or (last > 0 and not so_far.ac >> ac & 1):
            return False
        # Whole components, or the first bits of their DC, come once and before all else of theirs.
        if (first == 0 and high == 0) == (component.id in so_far.begun):
            return False
        so_far.begun.add(component.id)
    return count == 1 or blocks <= MAX_BLOCKS_IN_MCU


def exif_is_sound(data: bytes, segment: tuple[int, int]) -> bool:
    """Whether an EXIF segment's main directory is whole: its entries of known types, their values inside the segment.

    False says only that it is in doubt.
    """
    tiff = data[segment[0] + 10 : segment[1]]
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(tiff[:4])
    if order is None or len(tiff) < 14:
        return False
    (start,) = struct.unpack_from(order + "I", tiff, 4)
    if start < 8 or start + 2 > len(tiff):
        return False
    (count,) = struct.unpack_from(order + "H", tiff, start)
    end = start + 2 + 12 * count
    if end + 4 > len(tiff):
        return False
    for tag, kind, number, offset in struct.iter_unpack(order + "HHII", tiff[start + 2 : end]):
        # Several numbers in one entry are rare, and for most tags wrong.
        if not 1 <= kind <= 12 or (number != 1 and kind not in (1, 2, 7)):
            return False
        if tag in _RESOLUTION_TAGS and kind not in (3, 5):
            return False
        size = _TIFF_BYTES[kind] * number
        if number == 0 or (size > 4 and offset + size > len(tiff)):
            return False
    return True


def without_segments(data: bytes, spans: tuple[tuple[int, int], ...]) -> bytes:
    """The data without the segments at (start, end), which stand in order."""
    ends = [0, *(end for _, end in spans)]
    starts = [*(start for start, _ in spans), len(data)]
    return b"".join(data[end:start] for end, start in zip(ends, starts, strict=True))


def grey_to_rgb(data: bytes) -> bytes | None:
    """A grey JPEG as one of three components (YCbCr, 4:4:4) that decodes to the very same shades; nothing is decoded.

    The grey scan stays as it is; one scan of neutral chroma, 4 bits for 8x8 pixels, follows it. Bytes behind the end
    marker, and Adobe's segment, which would speak of other components, are left out.
    None where the JPEG is in doubt, is not grey, or is not sequential in one scan.
    """
    header = well_formed(data)
    if header is None or len(header.components) != 1 or header.frame not in SEQUENTIAL_FRAMES:
        return None
    parts, restarts = [data[:2]], False
    for segment in _segments(data, 2):
        if segment.marker in ALL_FRAMES:
            table = header.components[0].quantization
            chroma = b"".join(bytes((number, 0x11, table)) for number in (1, 2, 3))
            parts.append(_segment(segment.marker, data[segment.body : segment.body + 5] + b"\3" + chroma))
        elif segment.marker == SOS:
            # Component 1 with the tables that it had.
            parts.append(_segment(SOS, bytes((1, 1, data[segment.body + 2], 0, 63, 0))))
            scan = segment.end
        elif segment.marker != APP14:
            restarts |= segment.marker == DRI
            parts.append(data[segment.start : segment.end])
    end = _markers(data, scan)[0]
    if data[end + 1] != EOI:
        return None
    parts.append(data[scan:end])
    if restarts:
        parts.append(_segment(DRI, b"\0\0"))
    blocks = -(-header.width // 8) * -(-header.height // 8)
    # Two bits a block and component, all 0; the last byte is filled with ones.
    parts += [_ZERO_TABLES, _segment(SOS, bytes((2, 2, 0x11, 3, 0x11, 0, 63, 0)))]
    parts += [bytes(blocks // 2), b"\x0f" * (blocks % 2), b"\xff\xd9"]
    return b"".join(parts)


def _segment(marker: int, body: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, 2 + len(body)) + body
