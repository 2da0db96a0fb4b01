"""Check, repair and reduction of one picture. EXIF rotation is not applied (as in timm and torchvision).

A plainly well-formed JPEG is recognised without decoding it (data_prep.jpeg); all else is decoded by Pillow first.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

from data_prep.jpeg import (
    COMMON_FRAMES,
    Header,
    exif_is_sound,
    grey_to_rgb,
    jpeg_header,
    well_formed,
    without_segments,
)
from data_prep.resize import reduce_by_area

# What turns up in data sets under the name .jpg. Other decoders of Pillow's (EPS runs Ghostscript) are never tried.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
# Pillow itself refuses anything larger, in the header already.
PILLOW_MAX_MEGAPIXELS = 178
REPAIR_QUALITY = 95
DEFAULT_QUALITY = 90  # of reduced pictures, as ffcv's
LARGEST_SIDE = 65500  # pixels; libjpeg writes no more


class PictureError(ValueError):
    """A picture that cannot be used. The message is the reason alone: the caller knows the file's name."""


@dataclass(frozen=True)
class PictureOptions:
    """Which pictures are refused, and which are made smaller."""

    max_megapixels: float = 50.0
    """Largest picture, by its header, that is decoded at all."""
    max_side: int | None = None
    """Longest side in pixels; larger pictures are reduced to it. None keeps all sizes."""
    short_side: int | None = None
    """Shorter side in pixels; pictures whose shorter side is longer are reduced to it. None keeps all sizes."""
    jpeg_quality: int | None = None
    """Quality of pictures that are reduced (90 if None); others are not encoded anew."""
    chroma: Literal["4:2:0", "4:2:2", "4:4:4"] | None = None
    """Chroma subsampling of pictures that are reduced (4:2:0 if None)."""

    def __post_init__(self) -> None:
        if not 0 < self.max_megapixels <= PILLOW_MAX_MEGAPIXELS:
            raise ValueError(
                f"--max-megapixels {self.max_megapixels:g}: must be over 0, at most {PILLOW_MAX_MEGAPIXELS}"
            )
        if self.max_side is not None and self.short_side is not None:
            raise ValueError("--max-side and --short-side exclude one another: give one of them")
        for name, side in (("--max-side", self.max_side), ("--short-side", self.short_side)):
            if side is not None and not 1 <= side <= LARGEST_SIDE:
                raise ValueError(f"{name} {side}: must be 1 to {LARGEST_SIDE}")
        if self.jpeg_quality is not None and not 1 <= self.jpeg_quality <= 100:
            raise ValueError(f"--jpeg-quality {self.jpeg_quality}: must be 1 to 100")
        if self.chroma not in (None, "4:2:0", "4:2:2", "4:4:4"):
            raise ValueError(f"--chroma {self.chroma}: must be 4:2:0, 4:2:2 or 4:4:4")
        if self.max_side is None and self.short_side is None:
            for name, value in (("--jpeg-quality", self.jpeg_quality), ("--chroma", self.chroma)):
                if value is not None:
                    raise ValueError(
                        f"{name} {value} would change nothing: only pictures that --max-side or --short-side "
                        "reduces are encoded anew"
                    )

    def reduced_size(self, width: int, height: int) -> tuple[int, int] | None:
        """(width, height) of the reduced picture in pixels; None where it stays as it is."""
        if self.max_side is not None:
            side, limit = max(width, height), self.max_side
        elif self.short_side is not None:
            side, limit = min(width, height), self.short_side
        else:
            return None
        if side <= limit:
            return None
        # Rounded down as ffcv does, but never to nothing; the side that is limited comes out exactly.
        sides = (limit if old == side else max(1, int(limit / side * old)) for old in (width, height))
        return next(sides), next(sides)


class Prepared(NamedTuple):
    """A picture as it goes into a shard."""

    data: bytes  # a JPEG of three components
    width: int  # pixels
    height: int
    reason: str | None  # of the repair; None where none was needed
    resized: bool


def prepare_picture(data: bytes, options: PictureOptions) -> Prepared:
    """Checks a picture, repairs it where need be, and reduces it where it is over the options' side.

    A JPEG of three components, baseline or progressive, passes through byte for byte; a grey one gets neutral chroma,
    a broken EXIF segment is dropped, both without touching the pixels; anything else that can be read becomes an
    RGB JPEG.
    Errors: PictureError where it cannot be read whole, or its header declares more than `max_megapixels`.
    """
    header = well_formed(data)
    if header is None:
        return _prepare_decoded(data, options)
    _check_size(header.width, header.height, options.max_megapixels)
    grey = len(header.components) == 1
    size = options.reduced_size(header.width, header.height)
    if size is not None:
        pixels = _decode_bgr(data)
        if pixels is None:
            return _prepare_decoded(data, options)
        return Prepared(
            _encode_bgr(reduce_by_area(pixels, size), options), *size, "JPEG, mode L" if grey else None, True
        )
    mended = _without_broken_exif(data, header)
    reason = None if mended is data else "JPEG, broken EXIF"
    if grey:
        colour = grey_to_rgb(mended)
        if colour is None:
            return _prepare_decoded(data, options)
        mended, reason = colour, "JPEG, mode L" if reason is None else "JPEG, mode L, broken EXIF"
    return Prepared(mended, header.width, header.height, reason, False)


def _prepare_decoded(data: bytes, options: PictureOptions) -> Prepared:
    """prepare_picture for what only a decoder can judge."""
    with _opened(data, options.max_megapixels) as image:
        _load(image)
        header = jpeg_header(data) if image.format in ("JPEG", "MPO") else None
        passes = header is not None and image.mode == "RGB" and header.frame in COMMON_FRAMES
        size = options.reduced_size(*image.size)
        if size is not None:
            pixels = np.asarray(_to_rgb(image))[..., ::-1]
            encoded = _encode_bgr(reduce_by_area(pixels, size), options)
            return Prepared(encoded, *size, None if passes else _describe(image, header), True)
        if passes and header is not None:
            mended = _without_broken_exif(data, header)
            return Prepared(mended, *image.size, None if mended is data else "JPEG, broken EXIF", False)
        return Prepared(_encode_repaired(image), *image.size, _describe(image, header), False)


def reduced_rgb(data: bytes, options: PictureOptions) -> np.ndarray:
    """The pixels of a picture, reduced where it is over the options' side. Returns uint8 (H, W, 3).

    Errors: PictureError as in prepare_picture.
    """
    header = well_formed(data)
    if header is not None:
        _check_size(header.width, header.height, options.max_megapixels)
        pixels = _decode_bgr(data)
        if pixels is not None:
            size = options.reduced_size(header.width, header.height)
            return _opencv().cvtColor(pixels if size is None else reduce_by_area(pixels, size), _opencv().COLOR_BGR2RGB)
    with _opened(data, options.max_megapixels) as image:
        _load(image)
        size = options.reduced_size(*image.size)
        rgb = np.asarray(_to_rgb(image))
        return rgb if size is None else reduce_by_area(rgb, size)


def decode_rgb(data: bytes, max_megapixels: float = PILLOW_MAX_MEGAPIXELS) -> np.ndarray:
    """Decodes a picture with Pillow. Returns uint8 (H, W, 3). Errors: PictureError."""
    with _opened(data, max_megapixels) as image:
        try:
            return np.asarray(image.convert("RGB"))
        except Exception as error:  # as in _load
            raise PictureError(f"cannot be decoded ({error})") from error


def picture_size(data: bytes) -> tuple[int, int]:
    """(width, height) in pixels, from the header; a JPEG's first bytes suffice. Errors: PictureError."""
    header = jpeg_header(data)
    if header is not None and header.frame in COMMON_FRAMES and header.width and header.height:
        _check_size(header.width, header.height, PILLOW_MAX_MEGAPIXELS)
        return header.width, header.height
    with _opened(data, PILLOW_MAX_MEGAPIXELS) as image:
        return image.size


def _check_size(width: int, height: int, max_megapixels: float) -> None:
    megapixels = width * height / 1e6
    if megapixels > max_megapixels:
        raise PictureError(
            f"its header declares {width}x{height} ({megapixels:.1f} megapixels), "
            f"over the limit of {max_megapixels:g} (--max-megapixels)"
        )


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
        except Exception as error:  # as in _load
            raise PictureError(f"has a broken header ({type(error).__name__}: {error})") from error
        with image:
            _check_size(image.width, image.height, max_megapixels)
            yield image


def _load(image: Image.Image) -> None:
    try:
        image.load()
    except MemoryError:
        raise
    except Exception as error:  # Pillow's decoders raise whatever they like; each means: not readable
        raise PictureError(f"cannot be decoded ({error})") from error


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


def _encode_repaired(image: Image.Image) -> bytes:
    options: dict[str, Any] = {"quality": REPAIR_QUALITY}
    layers = getattr(image, "layer", None)
    if image.mode == "L" and layers and layers[0][3] in getattr(image, "quantization", {}):
        # A grey JPEG's own steps: its values fall on them again, so that next to nothing is lost.
        options = {"qtables": [image.quantization[layers[0][3]]]}  # type: ignore[attr-defined]
    buffer = io.BytesIO()
    try:
        _to_rgb(image).save(buffer, "JPEG", subsampling="4:4:4", **options)
    except (OSError, ValueError) as error:
        if isinstance(error, PictureError):
            raise
        raise PictureError(f"cannot be written as a JPEG ({image.width}x{image.height}: {error})") from error
    return buffer.getvalue()


def _describe(image: Image.Image, header: Header | None) -> str:
    if image.format in ("JPEG", "MPO") and image.mode == "RGB":
        return f"JPEG with frame type {header.frame:#x}" if header else "JPEG with stray bytes"
    return f"{image.format}, mode {image.mode}"


def _without_broken_exif(data: bytes, header: Header) -> bytes:
    """The JPEG without its EXIF where Pillow stumbles over that; otherwise the very same object."""
    if not header.exif or (len(header.exif) == 1 and exif_is_sound(data, header.exif[0])):
        return data
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        warnings.filterwarnings("ignore", "Image appears to be a malformed MPO")
        try:
            with Image.open(io.BytesIO(data), formats=("JPEG",)) as image:
                # Not getexif(): opening has read it already, and swallowed what it met.
                directory = Image.Exif()
                directory.load(image.info["exif"])
                dict(directory)  # entries are read one by one, when asked for
        except Exception:  # whatever it is, each user of Pillow would meet it
            return without_segments(data, header.exif)
    return data


@cache
def _opencv() -> Any:
    import cv2  # a tenth of a second; only reduced pictures need it

    cv2.setNumThreads(1)  # the processes share the cores already
    return cv2


def _decode_bgr(data: bytes) -> np.ndarray | None:
    """A JPEG's pixels, uint8 (H, W, 3); None where OpenCV cannot read it."""
    cv2 = _opencv()
    return cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)


def _encode_bgr(pixels: np.ndarray, options: PictureOptions) -> bytes:
    cv2 = _opencv()
    sampling = {
        "4:2:0": cv2.IMWRITE_JPEG_SAMPLING_FACTOR_420,
        "4:2:2": cv2.IMWRITE_JPEG_SAMPLING_FACTOR_422,
        "4:4:4": cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444,
    }[options.chroma or "4:2:0"]
    quality = DEFAULT_QUALITY if options.jpeg_quality is None else options.jpeg_quality
    settings = [cv2.IMWRITE_JPEG_QUALITY, quality, cv2.IMWRITE_JPEG_SAMPLING_FACTOR, sampling]
    written, encoded = cv2.imencode(".jpg", pixels, settings)
    if not written:
        raise PictureError(f"cannot be written as a JPEG ({pixels.shape[1]}x{pixels.shape[0]})")
    return encoded.tobytes()
