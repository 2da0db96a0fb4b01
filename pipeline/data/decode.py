"""JPEG (or any picture Pillow reads) -> RGB, with its header checked before anything is decoded."""

from __future__ import annotations

import io

from PIL import Image

MAX_PIXELS = 50_000_000
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
            f"{where}: cannot be decoded ({error}); mend or remove it where it came from; of shards "
            "`python -m data_prep verify` names all such"
        ) from error
