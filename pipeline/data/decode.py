"""JPEG (or any picture Pillow reads) -> RGB, with its header checked before anything is decoded."""

from __future__ import annotations

import io

from PIL import Image

MAX_PIXELS = 50_000_000
# Frame headers of a JPEG; 0xC4, 0xC8 and 0xCC among their numbers are tables.
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_FORMATS = ("JPEG", "PNG", "WEBP")  # what shards hold; Pillow's others include some that start programs (EPS)


def decode_rgb(data: bytes, where: str) -> Image.Image:
    """Decodes to an RGB Pillow image. EXIF rotation is not applied (as timm and torchvision).

    `where` names shard and sample. Errors: ValueError for what is no picture, is cut off, or is over 50 megapixels.
    """
    try:
        image = Image.open(io.BytesIO(data), formats=_FORMATS)
        if image.width * image.height > MAX_PIXELS:
            raise ValueError(f"{image.width}x{image.height} pixels are over the limit of {MAX_PIXELS:,}")
        return image.convert("RGB")
    except MemoryError:
        raise
    except Exception as error:  # Pillow's decoders raise whatever they like; each means: not readable
        raise ValueError(
            f"{where}: cannot be decoded ({error}); check the shards with `python -m data_prep verify`"
        ) from error


def jpeg_size(data: bytes) -> tuple[int, int] | None:
    """(width, height) from a JPEG's frame header, None where there is none; 3 us, where Pillow takes 100."""
    position = 2
    while position + 9 <= len(data) and data[position] == 0xFF:
        marker = data[position + 1]
        if marker in _FRAMES:
            height, width = data[position + 5 : position + 7], data[position + 7 : position + 9]
            return int.from_bytes(width, "big"), int.from_bytes(height, "big")
        # 0xFF may be repeated before a marker, as filling.
        position += 1 if marker == 0xFF else 2 + int.from_bytes(data[position + 2 : position + 4], "big")
    return None
