"""The operators beside their specification: the same integers, floats within stated bounds, and all that torch asks."""

import dataclasses
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from pipeline.noise import native, ops, reference
from pipeline.noise.config import NoiseConfig
from pipeline.noise.reference import Purpose, stream_of

EPOCH = torch.tensor(3)
STREAM = stream_of("blocks.1", Purpose.NOISE)
MASK32 = 0xFFFFFFFF
# Standard normals in float32, beside the reference in float32: its angle is rounded to 2^-24 turns of 6.28, and to a
# float again. 2.2e-6 was the most seen in 10^7 draws.
NORMAL_BOUND = 4e-6
KINDS = {
    "gaussian": NoiseConfig(kind="gaussian", strength=0.7, site="blocks.1"),
    "salt_and_pepper": NoiseConfig(kind="salt_and_pepper", strength=0.3, site="blocks.1", group_size=2),
    "circular_shift": NoiseConfig(kind="circular_shift", strength=0.3, site="blocks.1", group_size=2),
    "optimal_q": NoiseConfig(kind="optimal_q", site="blocks.1", group_size=2),
}
ALL_KINDS = pytest.mark.parametrize("config", KINDS.values(), ids=KINDS)
DTYPES = pytest.mark.parametrize("dtype", ops.DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
# Whole vectors, remainders of each kind, one element, none, and a sample longer than a task of the kernels.
SHAPES = [
    (4, 197, 8),
    (3, 1),
    (5, 7),
    (2, 3, 7, 5),
    (4, 1, 1, 1),
    (1, 64),
    (3, 65),
    (2, 127),
    (0, 5, 6),
    (3, 0),
    (2, 3, 16411),
]
needs_kernels = pytest.mark.skipif(not native.is_loaded("cpu"), reason="no C++ compiler: `make setup` built no kernels")


def batch(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def ids_of(x: torch.Tensor) -> torch.Tensor:
    return torch.arange(len(x)) * 977 + (1 << 31)


def both(config: NoiseConfig, x: torch.Tensor, first_token: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """(operator, reference)."""
    return tuple(  # type: ignore[return-value]
        apply(x, config, ids_of(x), 7, EPOCH, first_token) for apply in (ops.apply_noise, reference.apply_noise)
    )


def check_close(config: NoiseConfig, found: torch.Tensor, expected: torch.Tensor, x: torch.Tensor) -> None:
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    if config.kind == "salt_and_pepper":
        assert torch.equal(found, expected)
        return
    wide = torch.promote_types(x.dtype, torch.float32)
    eps = torch.finfo(wide).eps
    scale = expected.to(wide).abs() + x.to(wide).abs()
    bound = 4 * eps * (1 + scale)
    if config.kind == "gaussian":
        bound = bound + (config.strength or 0) * (NORMAL_BOUND if wide == torch.float32 else 1e-13)
    if x.dtype != wide:  # a value near the middle of two may be rounded either way
        bound = bound + torch.finfo(x.dtype).eps * expected.to(wide).abs()
    difference = (found.to(wide) - expected.to(wide)).abs()
    assert (difference <= bound).all(), f"{(difference - bound).max():.3g} over the bound"
    if x.dtype != wide and x.numel() > 1000:
        assert (found == expected).float().mean() > 0.99


# Beside the specification


@needs_kernels
def test_the_kernels_are_what_is_tested_here():
    assert torch._C._dispatch_has_kernel_for_dispatch_key("noisynn::gaussian_noise", "CPU")
    assert b"noisynn" in (native._LIBRARIES["cpu"]).read_bytes()


@pytest.mark.parametrize("count", [0, 1, 3, 4, 63, 64, 65, 1000])
def test_words_are_the_reference_s(count):
    ids = torch.tensor([0, 5, MASK32, 1 << 32, (1 << 62) + 3])
    for seed, epoch, stream in ((0, 0, 0), (MASK32, MASK32, MASK32), (0x243F6A88, 9, stream_of("image", Purpose.MASK))):
        expected = reference.random_words(count, ids, seed, torch.tensor(epoch), stream)
        assert torch.equal(ops.random_words(count, ids, seed, torch.tensor(epoch), stream), expected)


def test_known_answers_of_random123():
    # Counter (block 0, stream 0, id 0), key 0; and all ones, for which no block number is left: its block is 0 here.
    words = ops.random_words(4, torch.tensor([0]), 0, torch.tensor(0), 0)[0].tolist()
    assert [f"{word:08x}" for word in words] == ["6627e8d5", "e169c58d", "bc57ac4c", "9b00dbd8"]


@ALL_KINDS
@DTYPES
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_operators_are_their_specification(config, dtype, shape):
    x = batch(shape, dtype)
    found, expected = both(config, x)
    check_close(config, found, expected, x)


@ALL_KINDS
@DTYPES
@pytest.mark.parametrize("first_token", [1, 5, 9])
def test_spared_tokens_are_untouched_to_the_bit(config, dtype, first_token):
    x = batch((4, 9, 35), dtype)
    found, expected = both(config, x, first_token)
    assert torch.equal(found[:, :first_token], x[:, :first_token])
    check_close(config, found, expected, x)


def test_normals_are_within_the_bound_over_many_draws():
    x = torch.zeros(16, 1 << 18)
    found = ops.gaussian_noise(x, 1.0, ids_of(x), 1, EPOCH, STREAM)
    expected = reference.gaussian_noise(x, 1.0, ids_of(x), 1, EPOCH, STREAM)
    assert (found - expected).abs().max() < NORMAL_BOUND
    exact = reference.gaussian_noise(x.double(), 1.0, ids_of(x), 1, EPOCH, STREAM)
    # Beside float64 it is the uniform's 24 bits that count, where it is near 1 and the normal near 0.
    assert (found - exact).abs().max() < 4e-4
    assert (found - exact).abs().mean() < 2e-7


@pytest.mark.parametrize("group_size", [1, 2, 3, 5, 99, None])
@pytest.mark.parametrize("kind", ["circular_shift", "optimal_q"])
def test_groups_are_the_reference_s(kind, group_size):
    config = NoiseConfig(kind=kind, strength=0.4 if kind == "circular_shift" else None, group_size=group_size)
    x = batch((11, 5, 33))
    found, expected = both(config, x)
    check_close(config, found, expected, x)
    if group_size == 1:
        assert torch.equal(found, x)


def test_half_precision_does_not_overflow_in_between():
    x = torch.full((64, 40), 3000.0, dtype=torch.float16)
    assert torch.equal(ops.optimal_q(x), x)


def test_extremes_by_channel_are_black_and_white():
    x = batch((3, 3, 5, 7))
    low, high = torch.tensor([-1.0, -2, -3]).view(3, 1, 1), torch.tensor([4.0, 5, 6]).view(3, 1, 1)
    config = NoiseConfig(kind="salt_and_pepper", strength=0.5)
    found = ops.apply_noise(x, config, ids_of(x), 7, EPOCH, extremes=(low, high))
    assert torch.equal(found, reference.apply_noise(x, config, ids_of(x), 7, EPOCH, extremes=(low, high)))
    assert set(found[:, 2].flatten().tolist()) - set(x.flatten().tolist()) == {-3.0, 6.0}


@ALL_KINDS
def test_without_strength_nothing_changes_to_the_bit(config):
    x = batch((4, 9))
    x[0, 0] = -0.0
    off = ops.apply_noise(x, config, ids_of(x), 7, EPOCH, strength=torch.tensor(0.0, dtype=torch.float64))
    assert torch.equal(off, x) and torch.equal(off.signbit(), x.signbit())


# What a draw may depend on


@ALL_KINDS
@pytest.mark.parametrize("parts", [2, 4, 8])
def test_ranks_equal_one_rank_to_the_bit(config, parts):
    x = batch((16, 5, 33))
    ids = ids_of(x)
    whole = ops.apply_noise(x, config, ids, 7, EPOCH)
    split = [ops.apply_noise(a, config, b, 7, EPOCH) for a, b in zip(x.chunk(parts), ids.chunk(parts), strict=True)]
    assert torch.equal(torch.cat(split), whole)


@ALL_KINDS
def test_threads_change_nothing(config):
    x = batch((6, 3, 20000))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = ops.apply_noise(x, config, ids_of(x), 7, EPOCH)
        torch.set_num_threads(2)
        assert torch.equal(ops.apply_noise(x, config, ids_of(x), 7, EPOCH), one)
    finally:
        torch.set_num_threads(threads)


_HASH = """
import hashlib, torch
from pipeline.noise import ops, native
from tests.unit.test_noise_ops import KINDS, batch, ids_of, EPOCH
digest = hashlib.sha256()
for config in KINDS.values():
    for dtype in ops.DTYPES:
        for shape in ((4, 197, 33), (3, 65), (2, 3, 16411)):
            x = batch(shape, dtype)
            y = ops.apply_noise(x, config, ids_of(x), 7, EPOCH)
            digest.update(y.contiguous().view(torch.uint8).numpy().tobytes())
digest.update(ops.random_words(1001, torch.arange(5), 3, EPOCH, 9).numpy().tobytes())
print(digest.hexdigest())
"""


def found_by_each_instruction_set(script: str) -> dict[str, str]:
    """What a script prints with the kernels of each that this processor has, which are two at least."""

    def run(lanes: str) -> subprocess.CompletedProcess[str]:
        environment = os.environ | {"NOISYNN_LANES": lanes}
        return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)

    found, sets = {}, ("AVX-512", "AVX2", "one lane")
    with ThreadPoolExecutor() as pool:  # each takes seconds to start
        results = dict(zip(sets, pool.map(run, sets), strict=True))
    for lanes, done in results.items():
        if done.returncode and "this processor has no" in done.stderr:
            continue
        assert done.returncode == 0, done.stderr
        found[lanes] = done.stdout
    assert len(found) >= 2, found
    return found


@needs_kernels
def test_every_instruction_set_gives_the_same_bits():
    """A cluster of old and new processors draws one noise."""
    found = found_by_each_instruction_set(_HASH)
    assert len(set(found.values())) == 1, found


# Gradients


@ALL_KINDS
def test_gradcheck(config):
    x = batch((5, 3, 4), torch.float64).requires_grad_()
    ids = ids_of(x)
    low, high = torch.full((3,), -3.0), torch.full((3,), 3.0)
    extremes = (low, high) if config.kind == "salt_and_pepper" else None  # without, the extremes move with x
    for first_token in (0, 1):
        assert torch.autograd.gradcheck(
            lambda t, n=first_token: ops.apply_noise(t, config, ids, 7, EPOCH, n, extremes), (x,)
        )


@pytest.mark.parametrize(
    "config",
    [dataclasses.replace(config, group_size=3) for config in KINDS.values()]
    + [dataclasses.replace(KINDS[kind], group_size=3, detach=True) for kind in ("circular_shift", "optimal_q")],
    ids=NoiseConfig.describe,
)
def test_gradients_are_the_reference_s(config):
    upstream = batch((7, 5, 9), seed=1)
    gradients = []
    for apply in (ops.apply_noise, reference.apply_noise):
        x = batch((7, 5, 9)).requires_grad_()
        apply(x, config, ids_of(x), 7, EPOCH, 1).backward(upstream)
        gradients.append(x.grad)
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-6)


@ALL_KINDS
def test_nothing_that_can_be_drawn_again_is_kept_for_the_backward_pass(config):
    kept: list[int] = []
    x = batch((8, 50, 64)).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        ops.apply_noise(x, config, ids_of(x), 7, EPOCH)
    assert sum(kept) <= len(x) + 2


@ALL_KINDS
def test_activation_checkpointing_gives_the_same_bits(config):
    def step(recompute: bool) -> tuple[torch.Tensor, torch.Tensor]:
        x = batch((4, 9, 16)).requires_grad_()

        def part(t: torch.Tensor) -> torch.Tensor:
            return ops.apply_noise(t * 2, config, ids_of(t), 7, EPOCH).sin()

        y = checkpoint(part, x, use_reentrant=False) if recompute else part(x)
        y.square().sum().backward()
        return y.detach(), x.grad

    for one, other in zip(step(True), step(False), strict=True):
        assert torch.equal(one, other)


# What torch asks of an operator


OPERATORS = {
    "gaussian_noise": lambda x, s, ids: (x, s, ids, EPOCH, 7, STREAM, 1),
    "salt_and_pepper": lambda x, s, ids: (
        x,
        -s.expand(len(x), 1).clone(),
        s.expand(len(x), 1).clone(),
        s,
        ids,
        EPOCH,
        7,
        STREAM,
        1,
    ),
    "linear_mix": lambda x, s, ids: (x, s, False, 3, 1, False, False),
}


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("channels_last", [False, True])
def test_opcheck(name, channels_last):
    x = batch((6, 5, 4, 3))
    x = (x.to(memory_format=torch.channels_last) if channels_last else x).requires_grad_()
    arguments = OPERATORS[name](x, torch.tensor(0.3, dtype=torch.float64), torch.arange(6))
    torch.library.opcheck(getattr(torch.ops.noisynn, name).default, arguments)


def test_opcheck_random_words():
    torch.library.opcheck(torch.ops.noisynn.random_words.default, (torch.arange(5), EPOCH, 9, 1, 2))


@ALL_KINDS
def test_compiled_it_is_the_same_noise_and_compiles_once_in_12_epochs(config):
    torch._dynamo.reset()
    graphs = torch._dynamo.utils.counters["stats"]
    graphs.clear()
    stream, ids = ops.noise_stream(config), torch.arange(4)

    def forward(x: torch.Tensor, epoch: torch.Tensor, strength: torch.Tensor) -> torch.Tensor:
        return ops.apply_noise(x + 1, config, ids, 7, epoch, 1, None, strength, stream) * 2

    compiled = torch.compile(forward, backend="aot_eager", fullgraph=True)
    x = batch((4, 9, 16))
    for number in range(12):
        epoch, strength = torch.tensor(number), torch.tensor(0.01 * number, dtype=torch.float64)
        assert torch.equal(compiled(x, epoch, strength), forward(x, epoch, strength))
    assert graphs["unique_graphs"] == 1


# Bad input


@pytest.mark.parametrize(("wanted", "taken"), [(float("nan"), 0.0), (-1.0, 0.0), (2.0, 1.0)])
def test_a_probability_in_a_tensor_that_is_none_is_taken_as_the_nearest(wanted, taken):
    x = batch((4, 9))
    found, expected = (
        ops.salt_and_pepper(x, torch.tensor(p, dtype=torch.float64), ids_of(x), 1, EPOCH, STREAM)
        for p in (wanted, taken)
    )
    assert torch.equal(found, expected)


def test_group_sizes_beyond_the_batch_are_the_batch():
    x = batch((4, 3, 16))
    config = NoiseConfig(kind="optimal_q", group_size=1 << 62)
    assert torch.equal(ops.apply_noise(x, config, ids_of(x), 7, EPOCH), ops.optimal_q(x))


def test_one_axis_is_the_batch():
    x = batch((6,))
    for config in KINDS.values():
        found, expected = both(config, x)
        check_close(config, found, expected, x)


def test_bad_input_is_refused_by_name():
    x, ids = batch((4, 9)), torch.arange(4)
    draw = (ids, 1, EPOCH, STREAM)
    for call, message in (
        (lambda: ops.gaussian_noise(x.int(), 0.5, *draw), "int32: convert it to one of float32"),
        (lambda: ops.gaussian_noise(x, float("nan"), *draw), "std is nan"),
        (lambda: ops.gaussian_noise(x, float("inf"), *draw), "std is inf"),
        (lambda: ops.gaussian_noise(x, -0.1, *draw), "std is -0.1"),
        (lambda: ops.gaussian_noise(x, 0.5, ids[:3], 1, EPOCH, STREAM), "4 rows, 3 sample ids"),
        (lambda: ops.gaussian_noise(x, 0.5, ids.int(), 1, EPOCH, STREAM), "sample_ids are torch.int32"),
        (lambda: ops.gaussian_noise(x, 0.5, *draw, first_token=-1), "first_token is -1"),
        (lambda: ops.gaussian_noise(torch.tensor(1.0), 0.5, *draw), r"shape \(\)"),
        (lambda: ops.salt_and_pepper(x, 1.1, *draw), "probability is 1.1"),
        (lambda: ops.salt_and_pepper(x, 0.1, *draw, extremes=(ids, ids)), "extremes have 4 entries"),
        (lambda: ops.circular_shift(x, 0.5), "alpha is 0.5"),
        (lambda: ops.circular_shift(x, 0.3, group_size=0), "group_size is 0"),
        (lambda: ops.optimal_q(x, group_size=-2), "group_size is -2"),
        (lambda: ops.salt_and_pepper(x, 0.1, *draw, group_size=0), "group_size is 0"),
        (lambda: ops.gaussian_noise(x, 0.5, ids, 1, 3, STREAM), "epoch is 3: give a tensor of one int64"),
        (lambda: ops.gaussian_noise(x, 0.5, ids, 1, EPOCH.int(), STREAM), "give a tensor of one int64"),
        (lambda: ops.gaussian_noise(x, 0.5, ids, 1 << 32, EPOCH, STREAM), "seed is 4294967296"),
        (lambda: ops.gaussian_noise(x, 0.5, ids, 1, EPOCH, -1), "stream is -1"),
        (lambda: ops.gaussian_noise(x, torch.ones(3), *draw), "std has 3 numbers"),
        (lambda: ops.gaussian_noise(x, torch.ones((), requires_grad=True), *draw), "not learned"),
        (lambda: ops.apply_noise(x, NoiseConfig(), ids, 1, EPOCH), "noise.kind is 'none'"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
