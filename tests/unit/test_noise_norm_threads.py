"""What each warp of a GPU does for norm_noise, walked on the CPU: every row once, the reference's floats, both ways."""

import ctypes
import itertools

import pytest
import torch

from pipeline.noise import reference
from pipeline.noise.config import NoiseConfig
from tests.unit.test_noise_norm import EPSILON, affine, batch, check_close, ids_of, outcome
from tests.unit.test_noise_threads import FORMATS, DrawSource

EPOCH = torch.tensor(3)
WAYS = ("gaussian", "circular_shift", "optimal_q")
SHAPES = [(6, 5, 48), (5, 3, 384), (2, 1, 8), (3, 2, 1024), (7, 2, 256), (4, 3, 264)]


class Rows(ctypes.Structure):
    _fields_ = (
        ("samples", ctypes.c_uint32),
        ("tokens", ctypes.c_uint32),
        ("width", ctypes.c_uint32),
        ("spared", ctypes.c_uint32),
        ("epsilon", ctypes.c_float),
        ("share", ctypes.c_float),
        ("strength", ctypes.c_void_p),
    )


class NormWalk(ctypes.Structure):
    _fields_ = (
        ("format", ctypes.c_int32),
        ("way", ctypes.c_int32),
        ("warps", ctypes.c_uint32),
        *((name, ctypes.c_void_p) for name in ("x", "gradient", "y", "means", "scales", "dweight", "dbias")),
        ("weight", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("rows", Rows),
        ("group_size", ctypes.c_uint32),
        ("source", DrawSource),
    )


def marked(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Memory with a mark, and a margin of 64 behind what is asked for."""
    size = int(torch.Size(shape).numel())
    return torch.full((size + 64,), 77.0, dtype=dtype)


def walked(
    library: ctypes.CDLL, config: NoiseConfig, x: torch.Tensor, first_token: int, warps: int
) -> tuple[torch.Tensor, ...]:
    """The result and the gradients of x, weight and bias, as outcome gives them."""
    samples, tokens, width = x.shape
    weight, bias = affine(x)
    gradient, ids = batch(x.shape, x.dtype, 3), ids_of(x)
    strength = torch.tensor(1.0 if config.strength is None else config.strength, dtype=torch.float64)
    y, dx = marked(*x.shape, dtype=x.dtype), marked(*x.shape, dtype=x.dtype)
    means, scales = marked(samples, tokens), marked(samples, tokens)
    dweight, dbias = marked(warps, width), marked(warps, width)
    walk = NormWalk(FORMATS[x.dtype], WAYS.index(config.kind), warps, x.data_ptr(), gradient.data_ptr(), y.data_ptr())
    walk.means, walk.scales, walk.dweight, walk.dbias = (t.data_ptr() for t in (means, scales, dweight, dbias))
    walk.weight, walk.bias, walk.group_size = weight.data_ptr(), bias.data_ptr(), config.group_size or samples
    walk.rows = Rows(samples, tokens, width, first_token, EPSILON, 1 / width, strength.data_ptr())
    stream = reference.stream_of(config.site, reference.Purpose.NOISE)
    walk.source = DrawSource.of(ids, EPOCH, 7, stream)
    library.nn_walk_norm(ctypes.byref(walk))
    walk.y = dx.data_ptr()
    walk.way = 0 if config.detach else walk.way
    library.nn_walk_norm_backward(ctypes.byref(walk))
    for memory in (y, dx, means, scales, dweight, dbias):
        assert (memory[-64:] == 77).all(), "something was written behind the end"
    parts = (t[:-64].reshape(warps, width).sum(0) for t in (dweight, dbias))
    return y[:-64].reshape(x.shape), dx[:-64].reshape(x.shape), *parts


CASES = list(itertools.product(SHAPES, FORMATS, (0, 1)))


@pytest.mark.parametrize("kind", WAYS)
@pytest.mark.parametrize(("shape", "dtype", "first_token"), CASES, ids=str)
@pytest.mark.parametrize("warps", [1, 4, 1000])
def test_the_warps_are_the_specification(library, kind, shape, dtype, first_token, warps):
    strength = {"gaussian": 0.7, "circular_shift": 0.3}.get(kind)
    x = batch(shape, dtype)
    for group_size in (3, 99):
        config = NoiseConfig(kind=kind, strength=strength, site="blocks.1.attn", group_size=group_size)
        found = walked(library, config, x, first_token, warps)
        expected = outcome(reference.norm_noise, config, x, first_token)
        sums = 10.0 * (1 + shape[0] * shape[1])
        for one, other, scale in zip(found, expected, (10.0, 10.0, sums, sums), strict=True):
            check_close(one, other, scale)


@pytest.mark.parametrize("kind", WAYS)
def test_without_strength_it_is_layer_norm(library, kind):
    x = batch((6, 5, 48))
    strength = 0.0 if kind != "optimal_q" else None
    config = NoiseConfig(kind=kind, strength=strength, group_size=1 if strength is None else 3)
    found = walked(library, config, x, 0, 4)
    plain = torch.nn.functional.layer_norm(x, (48,), *affine(x), EPSILON)
    check_close(found[0], plain, 10)
