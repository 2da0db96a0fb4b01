"""JPEGs rewritten without loss, with restart markers: a decoder can then leave out what lies beside a crop.

A JPEG's coefficients come one after another, each found only when those before it have been read. A restart marker is
a place to begin at. The rewritten JPEG is a plain one: the same coefficients and quantization in one sequential scan,
so the same pixels from any decoder, with Huffman tables of its own.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path
from typing import NamedTuple

from data_prep.jpeg import PROGRESSIVE_FRAME, Component, Header, well_formed

LIBRARY = Path(__file__).parent / "csrc" / "libdata_prep_jpeg.so"
ABI = 1
MAX_INTERVAL = 5  # MCUs; another one gives other shards, so it takes another parts.LAYOUT_VERSION
_TOO_LONG = -1  # of csrc/jpeg_restart.c
# Outcomes, as they are counted in a summary. All but the first mean: kept byte for byte.
REWRITTEN = "rewritten"
PROGRESSIVE = "kept, progressive"
ODD = "kept, odd sampling"
IN_DOUBT = "kept, not plainly well-formed"
REFUSED = "kept, libjpeg warns of it"
LONGER = "kept, would grow by a quarter"


class Rewritten(NamedTuple):
    data: bytes
    outcome: str  # REWRITTEN, or why the picture stays as it was


def restart_interval(mcus_in_row: int) -> int:
    """MCUs from one restart marker to the next: the largest divisor of a row's MCUs that is at most MAX_INTERVAL.

    A divisor, so that each row begins at a marker. Shorter segments leave out more beside a crop; each costs some 5
    bytes. What of the 250 ImageNet pictures, 108 KB each, lies in segments under a RandomResizedCrop and its margin:

    | interval                   | size    | bytes decoded |
    | -------------------------- | ------- | ------------- |
    | no markers                 | 100.0 % | 90.8 KB       |
    | a row                      | 100.1 % | 74.9 KB       |
    | largest divisor up to 8    | 102.0 % | 54.3 KB       |
    | one of 2 to 4, else a row  | 102.3 % | 52.9 KB       |
    | largest divisor up to 5    | 103.1 % | 51.4 KB       |
    | largest divisor up to 3    | 103.4 % | 51.1 KB       |
    | 1                          | 107.2 % | 50.8 KB       |

    Reduced to 256 pixels (29 KB), they become smaller, 99.0 %: the tables that OpenCV gives them fit less well.
    """
    return next(interval for interval in range(MAX_INTERVAL, 0, -1) if mcus_in_row % interval == 0)


def with_restart_markers(data: bytes) -> Rewritten:
    """Rewrites a sequential JPEG of three components, in one scan or several, that libjpeg reads without a warning.

    All APPn segments and comments stay, in their order; bytes behind the end marker do not. The same input gives the
    same bytes. Each result is read back and its coefficients compared: 4.5 ms in all for 108 KB, on one core, and 6
    to 12 bytes of memory a pixel.
    Errors: ValueError, as `rewriter`.
    """
    library = rewriter()
    header = well_formed(data)
    if header is None:
        return Rewritten(data, IN_DOUBT)
    if header.frame == PROGRESSIVE_FRAME:
        return Rewritten(data, PROGRESSIVE)
    if not _is_plain(header.components):
        return Rewritten(data, ODD)
    # Of a picture of one colour the markers would be most, and there is next to nothing to leave out.
    room = ctypes.create_string_buffer(len(data) + len(data) // 4 + 1024)
    written = library.nn_restart_rewrite(data, len(data), restart_interval(mcus_in_row(header)), room, len(room))
    if written > 0:
        return Rewritten(ctypes.string_at(room, written), REWRITTEN)
    return Rewritten(data, LONGER if written == _TOO_LONG else REFUSED)


def mcus_in_row(header: Header) -> int:
    """Of a scan that holds all components."""
    return -(-header.width // (8 * max(c.horizontal for c in header.components)))


def _is_plain(components: tuple[Component, ...]) -> bool:
    """Whether each of three components has all samples or the fewest, in width and in height.

    Others may end in a block that is there to fill the last MCU; it is made anew, and might count for a neighbour.
    """
    widest, tallest = max(c.horizontal for c in components), max(c.vertical for c in components)
    return len(components) == 3 and all(c.horizontal in (1, widest) and c.vertical in (1, tallest) for c in components)


@cache
def rewriter() -> ctypes.CDLL:
    """csrc/jpeg_restart.c, as built. Errors: ValueError where it cannot be used, with the mend."""
    mend = "apt-get install libjpeg-dev, then run `make setup`; or leave the option out"
    if not LIBRARY.is_file():
        raise ValueError(f"--restart-markers needs {LIBRARY.name}, which is not built: {mend}")
    try:
        loaded = ctypes.CDLL(str(LIBRARY))
        if loaded.nn_restart_abi() != ABI:
            raise OSError("it was built from another version of its source, or for another libjpeg")
    except (OSError, AttributeError) as error:
        raise ValueError(f"--restart-markers: {LIBRARY} cannot be used ({error}): {mend}") from error
    loaded.nn_restart_rewrite.restype = ctypes.c_ssize_t
    loaded.nn_restart_rewrite.argtypes = (
        ctypes.c_char_p,
        ctypes.c_size_t,
        ctypes.c_uint,
        ctypes.c_void_p,
        ctypes.c_size_t,
    )
    return loaded
