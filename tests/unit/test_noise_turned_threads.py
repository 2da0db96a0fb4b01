"""What each thread of a GPU does where a sample lies column by column (channels_last), walked on the CPU."""

import ctypes
import itertools

import pytest
import torch

from pipeline.noise import reference
from tests.unit.test_noise_threads import (
    EPOCH,
    FORMATS,
    SEED,
    STREAM,
    DrawSource,
    Extremes,
    batch,
    check,
    grid_of,
    ids_of,
)

# (samples, rows, columns) of the logical order: whole blocks and units; rows that begin inside a block; tails of both.
SHAPES = [(3, 16, 8), (2, 8, 49), (3, 5, 7), (2, 64, 196), (1, 9, 1), (4, 2, 6), (2, 33, 130)]
CASES = pytest.mark.parametrize(
    ("shape", "dtype", "spared", "small_grid"),
    list(itertools.product(SHAPES, FORMATS, (0, 2), (False, True))),
    ids=str,
)


class Turned(ctypes.Structure):
    _fields_ = (
        ("samples", ctypes.c_int64),
        ("rows", ctypes.c_uint32),
        ("columns", ctypes.c_uint32),
        ("spared_rows", ctypes.c_uint32),
        ("x_sample", ctypes.c_int64),
        ("x_column", ctypes.c_int64),
        ("y_sample", ctypes.c_int64),
        ("y_column", ctypes.c_int64),
        ("aligned", ctypes.c_bool),
        ("strength", ctypes.c_void_p),
    )


class TurnedWalk(ctypes.Structure):
    _fields_ = (
        ("format", ctypes.c_int32),
        ("grid_x", ctypes.c_uint32),
        ("grid_y", ctypes.c_uint32),
        ("x", ctypes.c_void_p),
        ("y", ctypes.c_void_p),
        ("turned", Turned),
        ("source", DrawSource),
        ("extremes", Extremes),
    )


def walked(
    library: ctypes.CDLL,
    name: str,
    x: torch.Tensor,
    strength: float,
    spared: int,
    extremes: tuple[torch.Tensor, torch.Tensor] | None = None,
    small_grid: bool = False,
) -> torch.Tensor:
    """The result on x (samples, rows, columns), whose rows are neighbours in memory; in x's own layout, no gaps."""
    samples, rows, columns = x.shape
    assert x.stride(1) == 1
    memory = torch.full((x.numel() + 64,), 77.0, dtype=x.dtype)
    y = memory[: x.numel()].view(samples, columns, rows).transpose(1, 2)
    number, ids = torch.tensor(strength, dtype=torch.float64), ids_of(x)
    low, high = extremes or (torch.zeros(samples, 1, dtype=torch.float64),) * 2
    steps = (x.stride(0), x.stride(2), y.stride(0), y.stride(2))
    aligned = all(step * x.element_size() % 16 == 0 for step in steps)
    aligned = aligned and x.data_ptr() % 16 == 0 and y.data_ptr() % 16 == 0
    turned = Turned(samples, rows, columns, spared, *steps, aligned, number.data_ptr())
    library.nn_turned_tasks.restype = ctypes.c_int64
    grid = (1, 1) if small_grid else grid_of(library, samples, library.nn_turned_tasks(ctypes.byref(turned)))
    walk = TurnedWalk(
        FORMATS[x.dtype],
        *grid,
        x.data_ptr(),
        y.data_ptr(),
        turned,
        DrawSource.of(ids, EPOCH, SEED, STREAM),
        Extremes(low.data_ptr(), high.data_ptr(), low.shape[1], 0),
    )
    getattr(library, f"nn_walk_{name}_turned")(ctypes.byref(walk))
    assert (memory[x.numel() :] == 77).all(), "something was written behind the end"
    return y


def turned_batch(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return batch(shape, dtype).transpose(1, 2).contiguous().transpose(1, 2)


@CASES
def test_gaussian_noise(library, shape, dtype, spared, small_grid):
    x = turned_batch(shape, dtype)
    found = walked(library, "gaussian", x, 0.7, spared, small_grid=small_grid)
    expected = reference.gaussian_noise(x, 0.7, ids_of(x), SEED, EPOCH, STREAM, spared)
    check(found, expected, x, 4e-6)
    assert torch.equal(found[:, :spared], x[:, :spared])


@CASES
def test_salt_and_pepper(library, shape, dtype, spared, small_grid):
    x = turned_batch(shape, dtype)
    for parts in {1, shape[1]}:
        extremes = tuple(
            (torch.arange(len(x) * parts, dtype=torch.float64) * sign).reshape(len(x), parts) for sign in (-0.5, 0.5)
        )
        found = walked(library, "salt_and_pepper", x, 0.4, spared, extremes, small_grid)
        placed = tuple(extreme.reshape(len(x), parts, 1) for extreme in extremes)
        expected = reference.salt_and_pepper(x, 0.4, ids_of(x), SEED, EPOCH, STREAM, None, spared, placed)
        assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
def test_gaps_between_columns_are_read_over(library, dtype):
    """As a slice of the channels of a channels_last tensor."""
    wide = turned_batch((4, 24, 49), dtype)
    for x in (wide[:, 8:24], wide[::2, :5]):
        found = walked(library, "gaussian", x, 0.7, 0)
        expected = reference.gaussian_noise(x, 0.7, ids_of(x), SEED, EPOCH, STREAM)
        check(found, expected, x, 4e-6)


@pytest.mark.parametrize("name", ["gaussian", "salt_and_pepper"])
def test_without_strength_all_is_copied_to_the_bit(library, name):
    x = turned_batch((5, 13, 21), torch.bfloat16)
    x[0, 0, 0] = -0.0
    found = walked(library, name, x, 0.0, 0)
    assert torch.equal(found, x) and torch.equal(found.signbit(), x.signbit())
