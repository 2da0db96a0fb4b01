"""What each thread of a GPU does for image_noise, walked on the CPU: every pixel once, the reference's floats."""

import ctypes
import itertools

import pytest
import torch

from pipeline.noise import reference
from pipeline.noise.config import NoiseConfig
from pipeline.noise.operators import IMAGE_KINDS
from pipeline.noise.ops import noise_stream
from tests.unit.test_noise_image import KINDS, MEAN, STD, pictures
from tests.unit.test_noise_threads import EPOCH, FORMATS, SEED, DrawSource, MixPlan, grid_of

# Whole stretches of eight; rows that begin inside a block; a width below a stretch, and one above a block of threads.
SIZES = [(8, 32), (3, 24), (3, 1024), (5, 7), (1, 1), (6, 20), (2, 4100), (9, 17)]


class Pictures(ctypes.Structure):
    _fields_ = (
        ("pixels", ctypes.c_void_p),
        ("flip", ctypes.c_void_p),
        ("mean", ctypes.c_void_p),
        ("std", ctypes.c_void_p),
        ("samples", ctypes.c_int64),
        ("height", ctypes.c_int64),
        ("width", ctypes.c_int64),
        ("plane", ctypes.c_uint32),
        ("aligned", ctypes.c_bool),
        ("channels_last", ctypes.c_bool),
        ("strength", ctypes.c_void_p),
    )


class ImageWalk(ctypes.Structure):
    _fields_ = (
        ("format", ctypes.c_int32),
        ("grid_x", ctypes.c_uint32),
        ("grid_y", ctypes.c_uint32),
        ("kind", ctypes.c_int32),
        ("y", ctypes.c_void_p),
        ("pictures", Pictures),
        ("source", DrawSource),
        ("plan", MixPlan),
    )


def walked(
    library: ctypes.CDLL,
    config: NoiseConfig,
    images: torch.Tensor,
    flip: torch.Tensor | None,
    dtype: torch.dtype,
    channels_last: bool,
    small_grid: bool,
) -> torch.Tensor:
    """(samples, 3, height, width); its memory is filled with a mark before, and a margin behind it is checked."""
    samples, height, width, _ = images.shape
    memory = torch.full((images.numel() + 64,), 77.0, dtype=dtype)
    ids = torch.arange(samples) * 977 + (1 << 31)
    strength = torch.tensor(1.0 if config.strength is None else config.strength, dtype=torch.float64)
    aligned = width % 8 == 0 and images.data_ptr() % 8 == 0 and memory.data_ptr() % 16 == 0
    flips = None if flip is None else flip.data_ptr()
    of = Pictures(images.data_ptr(), flips, MEAN.data_ptr(), STD.data_ptr(), samples, height, width, height * width)
    of.aligned, of.channels_last, of.strength = aligned, channels_last, strength.data_ptr()
    library.nn_image_tasks.restype = ctypes.c_int64
    plan, group = MixPlan(), config.group_size or samples
    library.nn_mix_plan(ctypes.c_int64(samples), ctypes.c_int64(group), ctypes.c_bool(False), ctypes.byref(plan))
    rows = -(-samples // group) if config.kind in ("circular_shift", "optimal_q") else samples
    grid = (1, 1) if small_grid else grid_of(library, rows, library.nn_image_tasks(ctypes.byref(of)))
    source = DrawSource.of(ids, EPOCH, SEED, noise_stream(config))
    walk = ImageWalk(FORMATS[dtype], *grid, IMAGE_KINDS.index(config.kind), memory.data_ptr(), of, source, plan)
    library.nn_walk_image(ctypes.byref(walk))
    assert (memory[images.numel() :] == 77).all(), "something was written behind the end"
    shape = (samples, height, width, 3) if channels_last else (samples, 3, height, width)
    y = memory[: images.numel()].view(shape)
    return y.permute(0, 3, 1, 2) if channels_last else y


@pytest.mark.parametrize("config", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize(("size", "dtype", "channels_last"), itertools.product(SIZES, FORMATS, (False, True)), ids=str)
@pytest.mark.parametrize("small_grid", [False, True])
def test_the_threads_are_the_specification(library, config, size, dtype, channels_last, small_grid):
    images, ids = pictures(5, *size), torch.arange(5) * 977 + (1 << 31)
    for flip in (None, torch.tensor([True, False, True, True, False])):
        found = walked(library, config, images, flip, dtype, channels_last, small_grid)
        expected = reference.image_noise(images, MEAN, STD, config, ids, SEED, EPOCH, flip, dtype)
        bound = 2e-6 + 0.7 * 4e-6 + (torch.finfo(dtype).eps * expected.float().abs() if dtype != torch.float32 else 0)
        assert ((found.float() - expected.float()).abs() <= bound).all()


@pytest.mark.parametrize("kind", ["gaussian", "salt_and_pepper", "circular_shift"])
def test_without_strength_it_is_normalised_alone(library, kind):
    images = pictures(5, 8, 32)
    found, plain = (
        walked(library, config, images, None, torch.float32, False, False)
        for config in (NoiseConfig(kind=kind, strength=0.0, group_size=2), NoiseConfig())
    )
    assert torch.equal(found, plain)


def test_salt_is_white_and_pepper_black_to_the_bit(library):
    levels = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 4, 16, 3).contiguous()
    black, white = walked(library, NoiseConfig(), levels, None, torch.float32, False, False)
    noisy = walked(
        library, NoiseConfig(kind="salt_and_pepper", strength=1.0), levels, None, torch.float32, False, False
    )
    for channel in range(3):
        assert set(noisy[:, channel].flatten().tolist()) == {black[channel, 0, 0].item(), white[channel, 0, 0].item()}
