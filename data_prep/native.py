"""The C of csrc/, where `make setup` found a compiler: jpeg.py and resize.py are its specification."""

from __future__ import annotations

import ctypes
import sys
from functools import cache
from pathlib import Path

LIBRARY = Path(__file__).parent / "csrc" / "libdata_prep.so"
ABI = 2
MAX_SPANS = 8
IN_DOUBT, WELL_FORMED, ASK_REFERENCE = 0, 1, -1


class Found(ctypes.Structure):
    """struct nn_jpeg."""

    _fields_ = (
        ("frame", ctypes.c_int32),
        ("precision", ctypes.c_int32),
        ("width", ctypes.c_int32),
        ("height", ctypes.c_int32),
        ("components", ctypes.c_int32),
        ("spans", ctypes.c_int32),
        ("id", ctypes.c_uint8 * 3),
        ("horizontal", ctypes.c_uint8 * 3),
        ("vertical", ctypes.c_uint8 * 3),
        ("quantization", ctypes.c_uint8 * 3),
        ("exif", ctypes.c_uint64 * 2 * MAX_SPANS),
    )


@cache
def library() -> ctypes.CDLL | None:
    """None where it was not built; said once, since sharding is slower then."""
    mend = "run `make setup`; until then Python checks JPEGs (100 us, not 10) and reduces pictures (15 ms, not 0.2)"
    if not LIBRARY.is_file():
        print(f"note: {LIBRARY.name} is not built: {mend}", file=sys.stderr)
        return None
    try:
        loaded = ctypes.CDLL(str(LIBRARY))
        if loaded.nn_abi() != ABI:
            raise OSError("it was built from another version of its source")
    except (OSError, AttributeError) as error:
        print(f"note: {LIBRARY} cannot be used ({error}): {mend}", file=sys.stderr)
        return None
    loaded.nn_jpeg_check.argtypes = (ctypes.c_char_p, ctypes.c_size_t, ctypes.POINTER(Found))
    loaded.nn_area_resize.restype = None
    return loaded


def jpeg_check(data: bytes) -> tuple[int, Found]:
    """(IN_DOUBT, WELL_FORMED or ASK_REFERENCE, what was found); the latter too where there is no library."""
    found, loaded = Found(), library()
    if loaded is None:
        return ASK_REFERENCE, found
    return loaded.nn_jpeg_check(data, len(data), ctypes.byref(found)), found
