"""What each thread of a GPU does, walked on the CPU: every element once, the same integers, the reference's floats."""

import ctypes
import itertools

import pytest
import torch

from pipeline.noise import reference
from pipeline.noise.reference import Purpose, stream_of

EPOCH = torch.tensor(3)
STREAM = stream_of("blocks.1", Purpose.NOISE)
SEED, THREADS = 7, 256
LINEAR = ("circular_shift", "circular_shift_held", "optimal_q", "optimal_q_held")
FORMATS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
# (samples, tokens, channels): whole units, tails, unaligned samples, more units than one block has threads.
SHAPES = [(4, 3, 8), (3, 1, 1), (5, 7, 3), (2, 1, 127), (3, 5, 64), (1, 1, 2049), (2, 9, 1000), (6, 2, 4)]


class Common(ctypes.Structure):
    _fields_ = (
        ("samples", ctypes.c_int64),
        ("size", ctypes.c_int64),
        ("spared", ctypes.c_int64),
        ("x_sample", ctypes.c_int64),
        ("y_sample", ctypes.c_int64),
        ("row", ctypes.c_int64),
        ("pitch", ctypes.c_int64),
        ("aligned", ctypes.c_bool),
        ("strength", ctypes.c_void_p),
    )


class DrawSource(ctypes.Structure):
    _fields_ = (
        ("sample_ids", ctypes.c_void_p),
        ("epoch", ctypes.c_void_p),
        ("stream", ctypes.c_uint32),
        ("first_keys", ctypes.c_uint32 * 10),
    )

    @classmethod
    def of(cls, ids: torch.Tensor, epoch: torch.Tensor, seed: int, stream: int) -> "DrawSource":
        keys = (ctypes.c_uint32 * 10)(*((seed + number * 0x9E3779B9) & 0xFFFFFFFF for number in range(10)))
        return cls(ids.data_ptr(), epoch.data_ptr(), stream, keys)


class MixPlan(ctypes.Structure):
    _fields_ = (
        ("groups", ctypes.c_int64),
        ("group_size", ctypes.c_int64),
        ("transposed", ctypes.c_bool),
        ("scale", ctypes.c_float),
        ("last_scale", ctypes.c_float),
    )


class Extremes(ctypes.Structure):
    _fields_ = (
        ("low", ctypes.c_void_p),
        ("high", ctypes.c_void_p),
        ("parts", ctypes.c_int64),
        ("part_size", ctypes.c_uint32),
    )


class Walk(ctypes.Structure):
    _fields_ = (
        ("format", ctypes.c_int32),
        ("grid_x", ctypes.c_uint32),
        ("grid_y", ctypes.c_uint32),
        ("x", ctypes.c_void_p),
        ("y", ctypes.c_void_p),
        ("common", Common),
        ("source", DrawSource),
        ("extremes", Extremes),
        ("plan", MixPlan),
    )


def batch(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def grid_of(library: ctypes.CDLL, rows: int, tasks: int) -> tuple[int, int]:
    x, y = ctypes.c_uint32(), ctypes.c_uint32()
    library.nn_grid(ctypes.c_int64(rows), ctypes.c_int64(tasks), ctypes.byref(x), ctypes.byref(y))
    return x.value, y.value


def units_of(size: int) -> int:
    return -(-size // 8)


def common_of(x: torch.Tensor, y: torch.Tensor, spared: int, strength: torch.Tensor) -> Common:
    """For x (samples, ...), contiguous but for gaps between its rows (axis 1) and samples; y is contiguous."""
    size = x[0].numel()
    gaps = not x.is_contiguous()
    row, pitch = (x.shape[2], x.stride(1)) if gaps else (size, size)
    steps = (x.stride(0), size, pitch)
    aligned = all(step * x.element_size() % 16 == 0 for step in steps)
    aligned = aligned and x.data_ptr() % 16 == 0 and y.data_ptr() % 16 == 0
    return Common(len(x), size, spared, x.stride(0), size, row, pitch, aligned, strength.data_ptr())


def walked(
    library: ctypes.CDLL,
    name: str,
    x: torch.Tensor,
    strength: float,
    first_token: int = 0,
    group_size: int = 1,
    transposed: bool = False,
    extremes: tuple[torch.Tensor, torch.Tensor] | None = None,
    small_grid: bool = False,
) -> torch.Tensor:
    """The kernel's result; its memory is filled with a mark before, and a margin behind it is checked."""
    samples, size = len(x), x[0].numel()
    memory = torch.full((x.numel() + 64,), 77.0, dtype=x.dtype)
    y = memory[: x.numel()]
    ids = torch.arange(samples) * 977 + (1 << 31)
    number = torch.tensor(strength, dtype=torch.float64)
    low, high = extremes or (torch.zeros(samples, 1, dtype=torch.float64),) * 2
    parts = low.shape[1]
    rows = -(-samples // group_size) if name in LINEAR else samples
    grid = (1, 1) if small_grid else grid_of(library, rows, units_of(size))
    spared = first_token * (size // x.shape[1])
    plan = MixPlan()
    library.nn_mix_plan(
        ctypes.c_int64(samples), ctypes.c_int64(group_size), ctypes.c_bool(transposed), ctypes.byref(plan)
    )
    walk = Walk(
        FORMATS[x.dtype],
        *grid,
        x.data_ptr(),
        y.data_ptr(),
        common_of(x, y, spared, number),
        DrawSource.of(ids, EPOCH, SEED, STREAM),
        Extremes(low.data_ptr(), high.data_ptr(), parts, size // parts),
        plan,
    )
    getattr(library, f"nn_walk_{name}")(ctypes.byref(walk))
    assert (memory[x.numel() :] == 77).all(), "something was written behind the end"
    return y.reshape(x.shape)


def ids_of(x: torch.Tensor) -> torch.Tensor:
    return torch.arange(len(x)) * 977 + (1 << 31)


CASES = pytest.mark.parametrize(
    ("shape", "dtype", "first_token", "small_grid"),
    list(itertools.product(SHAPES, FORMATS, (0, 1), (False, True))),
    ids=str,
)


def check(found: torch.Tensor, expected: torch.Tensor, x: torch.Tensor, bound: float) -> None:
    eps = torch.finfo(x.dtype).eps if x.dtype != torch.float32 else 4 * torch.finfo(torch.float32).eps
    limit = bound + eps * (1 + expected.float().abs() + x.float().abs())
    assert ((found.float() - expected.float()).abs() <= limit).all()
    assert (found == expected).float().mean() > 0.97 or x.dtype == torch.float32


def of_words(call, words: torch.Tensor) -> torch.Tensor:
    out = torch.empty(len(words), dtype=torch.float32)
    call(ctypes.c_void_p(words.data_ptr()), ctypes.c_int64(len(words)), ctypes.c_void_p(out.data_ptr()))
    return out


def some_words() -> torch.Tensor:
    """uint32 (2^20,): both ends, each power of two and its neighbours, and drawn ones."""
    powers = [(1 << bit) + step for bit in range(32) for step in (-1, 0, 1)]
    drawn = reference.random_words((1 << 20) - len(powers), torch.tensor([1]), 0, EPOCH, STREAM)[0]
    return torch.cat((torch.tensor(powers), drawn)).clamp(0, 0xFFFFFFFF).to(torch.uint32)


def test_uniforms_are_within_2_units_of_the_reference_s(library):
    words = some_words()
    expected = reference.uniforms(words.to(torch.int64))
    difference = (of_words(library.nn_uniforms, words) - expected).abs()
    unit = torch.nextafter(expected, torch.full_like(expected, 2.0)) - expected
    assert (difference <= 2 * unit).all()
    assert (difference == 0).all()  # as it happens: the product is exact, so both round the word and the sum


def test_normals_are_within_the_bound_of_the_reference_s(library):
    """Without the GPU's approximations, of which tests/gpu states the bound: what stands around them."""
    words = some_words()
    found = of_words(library.nn_normals, words)
    expected = reference.normals(words.to(torch.int64))
    assert torch.isfinite(found).all()
    assert (found - expected).abs().max() < 4e-6


@CASES
def test_gaussian_noise(library, shape, dtype, first_token, small_grid):
    x = batch(shape, dtype)
    found = walked(library, "gaussian_noise", x, 0.7, first_token, small_grid=small_grid)
    expected = reference.gaussian_noise(x, 0.7, ids_of(x), SEED, EPOCH, STREAM, first_token)
    check(found, expected, x, 4e-6)
    assert torch.equal(found[:, :first_token], x[:, :first_token])


@CASES
def test_salt_and_pepper(library, shape, dtype, first_token, small_grid):
    x = batch(shape, dtype)
    for parts in {1, shape[1] if shape[2] >= 8 else 1}:
        extremes = tuple(
            (torch.arange(len(x) * parts, dtype=torch.float64) * sign).reshape(len(x), parts) for sign in (-0.5, 0.5)
        )
        found = walked(library, "salt_and_pepper", x, 0.4, first_token, extremes=extremes, small_grid=small_grid)
        placed = tuple(extreme.reshape(len(x), parts, 1) for extreme in extremes)
        expected = reference.salt_and_pepper(
            x, 0.4, ids_of(x), SEED, EPOCH, STREAM, first_token=first_token, extremes=placed
        )
        assert torch.equal(found, expected)


@CASES
@pytest.mark.parametrize("group_size", [1, 2, 3, 99])
def test_linear_noises(library, shape, dtype, first_token, small_grid, group_size):
    x = batch(shape, dtype)
    options = {"first_token": first_token, "small_grid": small_grid, "group_size": group_size}
    found = walked(library, "optimal_q", x, 1.0, **options)
    check(found, reference.optimal_q(x, group_size, first_token), x, 0)
    assert min(group_size, len(x)) <= library.nn_held(ctypes.c_int32(FORMATS[dtype]))
    assert torch.equal(walked(library, "optimal_q_held", x, 1.0, **options), found)
    shifted = reference.circular_shift(x, 0.3, group_size, first_token)
    for name in ("circular_shift", "circular_shift_held"):
        check(walked(library, name, x, 0.3, **options), shifted, x, 0)
    back = torch.cat([group.flip(0) for group in x.split(group_size)])
    back = reference.circular_shift(back, 0.3, group_size, first_token)
    expected = torch.cat([group.flip(0) for group in back.split(group_size)])
    for name in ("circular_shift", "circular_shift_held"):
        check(walked(library, name, x, 0.3, transposed=True, **options), expected, x, 0)
    if group_size == 1:
        assert torch.equal(found, x)


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
def test_as_many_samples_as_a_thread_can_hold(library, dtype):
    held = library.nn_held(ctypes.c_int32(FORMATS[dtype]))
    x = batch((2 * held + 3, 2, 21), dtype)
    found = walked(library, "optimal_q_held", x, 1.0, group_size=held)
    assert torch.equal(found, walked(library, "optimal_q", x, 1.0, group_size=held))
    check(found, reference.optimal_q(x, held), x, 0)
    for transposed in (False, True):
        options = {"group_size": held, "transposed": transposed}
        found = walked(library, "circular_shift_held", x, 0.3, **options)
        assert torch.equal(found, walked(library, "circular_shift", x, 0.3, **options))


@pytest.mark.parametrize("name", ["gaussian_noise", "salt_and_pepper", *LINEAR])
@pytest.mark.parametrize("dtype", FORMATS, ids=str)
@pytest.mark.parametrize("first_token", [0, 1])
def test_rows_with_gaps_between_them(library, name, dtype, first_token):
    """As a slice of the tokens or channels of a wider tensor: read where it lies."""
    wide = batch((6, 9, 48), dtype)
    for x in (wide[:, 2:7], wide[:, :, 8:32], wide[::2, 1:, :16]):
        options = {"first_token": first_token, "group_size": 2 if name in LINEAR else 1}
        found = walked(library, name, x, 0.3, **options)
        assert torch.equal(found, walked(library, name, x.contiguous(), 0.3, **options))


@pytest.mark.parametrize("name", ["gaussian_noise", "salt_and_pepper", *LINEAR])
def test_without_strength_all_is_copied_to_the_bit(library, name):
    x = batch((5, 3, 21), torch.bfloat16)
    x[0, 0, 0] = -0.0
    found = walked(library, name, x, 0.0, group_size=2)
    assert torch.equal(found, x) and torch.equal(found.signbit(), x.signbit())


def visits(library, rows, size, grid, block, thread) -> list[tuple[int, int, int]]:
    found: list[tuple[int, int, int]] = []
    callback = ctypes.CFUNCTYPE(None, ctypes.c_int64, ctypes.c_int64, ctypes.c_int32)(
        lambda row, at, count: found.append((row, at, count))
    )
    library.nn_visits(
        ctypes.c_int64(rows), ctypes.c_int64(size), *(ctypes.c_uint32(v) for v in (*grid, *block, thread)), callback
    )
    return found


@pytest.mark.parametrize(("rows", "size"), [(1, 1), (3, 8), (2, 2049), (7, 4095), (70001, 5), (1, 70000)])
def test_every_element_is_visited_once(library, rows, size):
    grid = grid_of(library, rows, units_of(size))
    assert grid[1] <= 65535
    seen = torch.zeros(rows, -(-size // 8), dtype=torch.int32)
    if (
        rows > 1000
    ):  # the walk over all 65,535 rows of blocks takes minutes: the first and last, and those twice visited
        blocks = [(0, 0), (0, 1), (0, 70001 - 65535 - 1), (0, 70001 - 65535), (0, 65534)]
        for block in blocks:
            rows_seen = [row for row, _, _ in visits(library, rows, size, grid, block, 0)]
            assert rows_seen == list(range(rows - 1 - block[1], -1, -grid[1]))  # the last first
        return
    for block in itertools.product(range(grid[0]), range(grid[1])):
        for thread in range(THREADS):
            for row, at, count in visits(library, rows, size, grid, block, thread):
                assert at % 8 == 0 and 1 <= count <= 8 and at + count <= size
                assert count == 8 or at + count == size
                seen[row, at // 8] += 1
    assert (seen == 1).all()


@pytest.mark.parametrize("size", [(1 << 32) + 13, (1 << 34) - 3, 1 << 33])
def test_places_beyond_2_to_the_32_are_reached(library, size):
    """By the arithmetic of the last threads: no place is cut to 32 bits, and the last element is somebody's."""
    units = units_of(size)
    x, y = grid_of(library, 2, units)
    last = (units - 1) % (x * THREADS)
    found = visits(library, 2, size, (x, y), (last // THREADS, 0), last % THREADS)
    assert found[-1] == (1, (units - 1) * 8, size - (units - 1) * 8)
    assert [at for _, at, _ in found] == list(range(last * 8, size, x * THREADS * 8))
    assert found[-1][1] // 4 < 1 << 32  # its block is still counted in 32 bits
