"""Header check, decode check and repair of one picture. EXIF rotation is not applied (as in timm and torchvision)."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Iterator

import numpy as np
from PIL import Image, UnidentifiedImageError

# What turns up in data sets under the name .jpg. Other decoders of Pillow's (EPS runs Ghostscript) are never tried.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
# Pillow itself refuses anything larger, in the header already.
PILLOW_MAX_MEGAPIXELS = 178
REPAIR_QUALITY = 95
# Baseline, extended sequential and progressive: the Huffman-coded DCT frames that every JPEG decoder reads.
COMMON_FRAMES = frozenset({0xC0, 0xC1, 0xC2})
ALL_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}


class PictureError(ValueError):
    """A picture that cannot be used. The message is the reason alone: the caller knows the file's name."""


def prepare_picture(data: bytes, max_megapixels: float) -> tuple[bytes, str | None]:
    """Checks a picture, and repairs it where need be.

    Returns (JPEG bytes, reason of the repair). A baseline or progressive JPEG, RGB or grey, passes through byte for
    byte, with None as the reason; anything else that can be read becomes an RGB JPEG.
    Errors: PictureError where it cannot be read whole, or its header declares more than `max_megapixels`.
    """
    with _opened(data, max_megapixels) as image:
        try:
            image.load()
        except MemoryError:
            raise
        except Exception as error:  # Pillow's decoders raise whatever they like; each means: not readable
            raise PictureError(f"cannot be decoded ({error})") from error
        if image.format in ("JPEG", "MPO") and image.mode in ("RGB", "L") and jpeg_frame(data) in COMMON_FRAMES:
            return data, None
        return _encode(_to_rgb(image)), _describe(image, data)


def decode_rgb(data: bytes, max_megapixels: float = PILLOW_MAX_MEGAPIXELS) -> np.ndarray:
    """Decodes a picture with Pillow. Returns uint8 (H, W, 3). Errors: PictureError."""
    with _opened(data, max_megapixels) as image:
        try:
            return np.asarray(image.convert("RGB"))
        except Exception as error:  # as above
            raise PictureError(f"cannot be decoded ({error})") from error


def picture_size(data: bytes) -> tuple[int, int]:
    """(width, height) in pixels, from the header. Errors: PictureError."""
    with _opened(data, PILLOW_MAX_MEGAPIXELS) as image:
        return image.size


@contextlib.contextmanager
def _opened(data: bytes, max_megapixels: float) -> Iterator[Image.Image]:
    """Opens a picture and checks its header's size; nothing is decoded yet."""
    if not data:
        raise PictureError("the file is empty")
    with warnings.catch_warnings():
        # Pillow warns of odd EXIF, palettes and sizes; what matters of these is checked here.
        warnings.simplefilter("ignore")
        try:
            image = Image.open(io.BytesIO(data), formats=FORMATS)
        except Image.DecompressionBombError as error:
            raise PictureError(f"its header declares more than {PILLOW_MAX_MEGAPIXELS} megapixels") from error
        except UnidentifiedImageError as error:  # its message holds an address of memory: not for a manifest
            raise PictureError("is not a picture") from error
        except Exception as error:  # as in prepare_picture
            raise PictureError(f"has a broken header ({type(error).__name__}: {error})") from error
        with image:
            megapixels = image.width * image.height / 1e6
            if megapixels > max_megapixels:
                raise PictureError(
                    f"its header declares {image.width}x{image.height} ({megapixels:.1f} megapixels), "
                    f"over the limit of {max_megapixels:g} (--max-megapixels)"
                )
            yield image


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "I" or image.mode.startswith("I;16"):
        # convert("RGB") clips 16-bit grey at 255, which turns nearly all of it white; keep the high byte instead.
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 0xFFFF:
            raise PictureError("holds 32-bit values, which have no agreed range")
        return Image.fromarray((values >> 8).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise PictureError("holds floating-point values, which have no agreed range")
    return image.convert("RGB")


def _encode(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    try:
        image.save(buffer, "JPEG", quality=REPAIR_QUALITY, subsampling="4:4:4")
    except (OSError, ValueError) as error:
        raise PictureError(f"cannot be written as a JPEG ({image.width}x{image.height}: {error})") from error
    return buffer.getvalue()


def _describe(image: Image.Image, data: bytes) -> str:
    if image.format in ("JPEG", "MPO") and image.mode in ("RGB", "L"):
        return f"JPEG with frame type {jpeg_frame(data):#x}" if jpeg_frame(data) else "JPEG with stray bytes"
    return f"{image.format}, mode {image.mode}"


def jpeg_frame(data: bytes) -> int | None:
    """Marker of a JPEG's frame header (0xC0 baseline, 0xC2 progressive, ...), None where it is not found."""
    position = 2
    while position + 4 <= len(data) and data[position] == 0xFF:
        marker = data[position + 1]
        if marker in ALL_FRAMES:
            return marker
        # 0xFF may be repeated before a marker, as filling.
        position += 1 if marker == 0xFF else 2 + int.from_bytes(data[position + 2 : position + 4], "big")
    return None
