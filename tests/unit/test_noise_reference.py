"""The reference noises: their distributions, what a draw may depend on, and the mixing matrices."""

import math

import pytest
import torch

from pipeline.noise.config import NoiseConfig
from pipeline.noise.reference import (
    Purpose,
    apply_noise,
    circular_shift,
    gaussian_noise,
    normals,
    optimal_q,
    salt_and_pepper,
    stream_of,
    uniforms,
)

EPOCH = torch.tensor(3)
STREAM = stream_of("image", Purpose.NOISE)
MASK32 = 0xFFFFFFFF
DRAWS = 1 << 20
SIGMAS = 5  # the draws are fixed by their seed: a bound of 5 standard errors holds or fails for ever

CONFIGS = [
    NoiseConfig(kind="gaussian", strength=0.7, site="blocks.1"),
    NoiseConfig(kind="salt_and_pepper", strength=0.3, site="blocks.1", group_size=2),
    NoiseConfig(kind="circular_shift", strength=0.3, site="blocks.1", group_size=2),
    NoiseConfig(kind="optimal_q", site="blocks.1", group_size=2),
]
ALL_KINDS = pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.kind)


def batch(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def noisy(config: NoiseConfig, x: torch.Tensor, ids: torch.Tensor, seed: int = 1, first_token: int = 0):
    return apply_noise(x, config, ids, seed, EPOCH, first_token)


# Distributions


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_uniforms_are_above_0_and_at_most_1(dtype):
    u = uniforms(torch.tensor([0, 1, 1 << 31, MASK32 - 1, MASK32]), dtype)
    assert u.dtype == dtype
    assert u[0].item() == 2.0**-33
    assert (u > 0).all() and (u <= 1).all()
    assert torch.isfinite(normals(torch.tensor([0, 0, MASK32, MASK32, 0, MASK32]), dtype)).all()


def test_gaussian_strength_is_a_standard_deviation_and_float32_follows_float64():
    ids = torch.arange(8)
    wide = gaussian_noise(torch.zeros(8, 999, dtype=torch.float64), 0.5, ids, 0, EPOCH, STREAM)
    single = gaussian_noise(torch.zeros(8, 999), 0.5, ids, 0, EPOCH, STREAM)
    # A float32 uniform is rounded to 2^-25 near 1: an angle is then off by 2 pi 2^-25, and a radius near 0 by about
    # sqrt(2 * 2^-24) = 3.5e-4 in the worst case.
    assert (wide - single).abs().max() < 0.5 * 1e-3
    assert (wide - single).abs().mean() < 0.5 * 1e-6
    assert single.dtype == torch.float32
    assert 0.47 < wide.std() < 0.53  # 5 standard errors of 7,992 draws are 0.02


def test_salt_and_pepper_frequencies():
    p, n = 0.2, DRAWS
    x = torch.linspace(-1, 1, n).reshape(64, -1)
    out = salt_and_pepper(x, p, torch.arange(64), 0, EPOCH, STREAM)
    for extreme in (1.0, -1.0):
        count = (out == extreme).sum().item() - 1  # one entry of x itself is the extreme
        assert abs(count - n * p / 2) < SIGMAS * math.sqrt(n * p / 2 * (1 - p / 2))
    changed = out != x
    assert out[changed].abs().eq(1).all()
    assert abs(changed.sum() - n * p) < SIGMAS * math.sqrt(n * p * (1 - p))


def test_salt_and_pepper_extremes_are_the_group_s_own():
    x = batch((7, 6, 5)) + torch.tensor([0.0, 0, 0, 100, 100, 100, 200])[:, None, None]
    out = salt_and_pepper(x, 1.0, torch.arange(7), 0, EPOCH, STREAM, group_size=3)
    for members in (slice(0, 3), slice(3, 6), slice(6, 7)):
        extremes = {x[members].min().item(), x[members].max().item()}
        assert set(out[members].unique().tolist()) == extremes
    none = salt_and_pepper(x, 0.0, torch.arange(7), 0, EPOCH, STREAM, group_size=3)
    assert torch.equal(none, x)


def test_salt_and_pepper_extremes_leave_out_spared_tokens():
    x = batch((4, 5, 3))
    x[:, 0] = 1000.0
    out = salt_and_pepper(x, 1.0, torch.arange(4), 0, EPOCH, STREAM, first_token=1)
    assert torch.equal(out[:, :1], x[:, :1])
    assert set(out[:, 1:].unique().tolist()) == {x[:, 1:].min().item(), x[:, 1:].max().item()}


def test_salt_and_pepper_extremes_carry_no_gradient():
    x = batch((4, 50)).requires_grad_()
    out = salt_and_pepper(x, 0.5, torch.arange(4), 0, EPOCH, STREAM, group_size=2)
    out.sum().backward()
    kept = out == x
    # The two extremes of a group keep their value wherever they are drawn, so equality alone does not tell.
    for group in (slice(0, 2), slice(2, 4)):
        inner = (x[group] != x[group].max()) & (x[group] != x[group].min())
        assert torch.equal(x.grad[group][inner], kept[group][inner].float())
        assert x.grad[group].max() == 1  # an extreme that also collected its copies' gradient would be far above
    assert 0.3 < kept.float().mean() < 0.7


# What a draw may depend on


@ALL_KINDS
def test_noise_does_not_depend_on_rank_split(config):
    """2, 4 or 8 parts (ranks, or micro-batches of one) equal the whole to the bit."""
    x, ids = batch((16, 5, 6)), torch.arange(100, 116)
    whole = noisy(config, x, ids)
    assert not torch.equal(whole, x)
    for parts in (2, 4, 8):
        pieces = zip(x.chunk(parts), ids.chunk(parts), strict=True)
        assert torch.equal(torch.cat([noisy(config, part, part_ids) for part, part_ids in pieces]), whole)


def test_gaussian_noise_does_not_depend_on_batch_mates_or_order():
    config, x, ids = CONFIGS[0], batch((6, 5, 7)), torch.tensor([9, 2, 7, 1 << 33, 0, 4])
    whole = noisy(config, x, ids)
    shuffled = torch.tensor([3, 0, 5, 1, 4, 2])
    assert torch.equal(noisy(config, x[shuffled], ids[shuffled]), whole[shuffled])
    for i in range(6):
        assert torch.equal(noisy(config, x[i : i + 1], ids[i : i + 1]), whole[i : i + 1])


def test_salt_and_pepper_places_do_not_depend_on_batch_mates_or_order():
    x, ids = batch((6, 40)), torch.arange(6)
    whole = salt_and_pepper(x, 0.5, ids, 1, EPOCH, STREAM, group_size=None)
    low, high = x.min(), x.max()
    for i in (5, 2):
        alone = salt_and_pepper(x[i : i + 1], 0.5, ids[i : i + 1], 1, EPOCH, STREAM, group_size=None)[0]
        assert torch.equal(alone == x[i].max(), (whole[i] == high) | (x[i] == x[i].max()) & (whole[i] == x[i]))
        assert torch.equal(alone == x[i].min(), (whole[i] == low) | (x[i] == x[i].min()) & (whole[i] == x[i]))


@pytest.mark.parametrize("config", CONFIGS[:2], ids=lambda c: c.kind)
def test_random_noise_differs_by_sample_epoch_and_seed_and_repeats(config):
    x, ids = batch((4, 60)).abs(), torch.arange(4)
    first = apply_noise(x, config, ids, 1, EPOCH)
    assert torch.equal(apply_noise(x, config, ids, 1, EPOCH), first)
    assert not torch.equal(apply_noise(x, config, ids, 2, EPOCH), first)
    assert not torch.equal(apply_noise(x, config, ids, 1, EPOCH + 1), first)
    assert not torch.equal(apply_noise(x, config, ids + 4, 1, EPOCH), first)
    same = x[:1].expand(2, -1).contiguous()
    two = apply_noise(same, config, torch.tensor([0, 1]), 1, EPOCH)
    assert not torch.equal(two[0], two[1])


# Linear noises against their matrices


def shift_matrix(k: int, alpha: float) -> torch.Tensor:
    """I + Q with Q = alpha (P - I); row i takes from i and from its right neighbour."""
    matrix = torch.zeros(k, k, dtype=torch.float64)
    for i in range(k):
        matrix[i, i] += 1 - alpha
        matrix[i, (i + 1) % k] += alpha
    return matrix


def optimal_matrix(k: int) -> torch.Tensor:
    """I + Q = (I + 11^T) / (k + 1)."""
    return (torch.eye(k, dtype=torch.float64) + torch.ones(k, k, dtype=torch.float64)) / (k + 1)


SIZES = pytest.mark.parametrize("k", [2, 3, 5, 10, 16])
# (k + 3) additions and one division of numbers of order 1 in float64.
FLOAT64 = {"rtol": 0, "atol": 1e-14}


@SIZES
@pytest.mark.parametrize("alpha", [0.1, 0.3, 0.4, 0.49])
def test_circular_shift_is_its_matrix(k, alpha):
    x = batch((k, 4, 3), torch.float64)
    torch.testing.assert_close(
        circular_shift(x, alpha), torch.einsum("ij,jnc->inc", shift_matrix(k, alpha), x), **FLOAT64
    )
    made = circular_shift(torch.eye(k, dtype=torch.float64), alpha)
    torch.testing.assert_close(made, shift_matrix(k, alpha), **FLOAT64)
    check_conditions(made)
    assert torch.det(made).item() == pytest.approx((1 - alpha) ** k - (-alpha) ** k, rel=1e-9)


@SIZES
def test_optimal_q_is_its_matrix(k):
    x = batch((k, 4, 3), torch.float64)
    torch.testing.assert_close(optimal_q(x), torch.einsum("ij,jnc->inc", optimal_matrix(k), x), **FLOAT64)
    made = optimal_q(torch.eye(k, dtype=torch.float64))
    torch.testing.assert_close(made, optimal_matrix(k), **FLOAT64)
    check_conditions(made)
    assert torch.det(made).item() == pytest.approx((k + 1.0) ** -(k - 1), rel=1e-9)


def check_conditions(matrix: torch.Tensor) -> None:
    """The paper's conditions: full rank, the diagonal the largest of its row, each row's L1 norm 1."""
    k = len(matrix)
    assert torch.linalg.matrix_rank(matrix) == k
    torch.testing.assert_close(matrix.abs().sum(1), torch.ones(k, dtype=torch.float64), **FLOAT64)
    others = matrix - torch.diag(torch.full((k,), math.inf, dtype=torch.float64))
    assert (matrix.diagonal() > others.max(1).values).all()


MIXES = pytest.mark.parametrize(
    ("mix", "matrix"),
    [(lambda x, **o: circular_shift(x, 0.3, **o), lambda k: shift_matrix(k, 0.3)), (optimal_q, optimal_matrix)],
    ids=["circular_shift", "optimal_q"],
)


@MIXES
def test_one_sample_is_returned_to_the_bit(mix, matrix):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x = batch((5, 3, 4), dtype)
        x[0, 0, 0] = -0.0
        for out in (mix(x, group_size=1), torch.cat([mix(row) for row in x.split(1)])):
            assert torch.equal(out, x)
            assert torch.equal(out.signbit(), x.signbit())


@MIXES
def test_a_smaller_last_group_uses_its_own_k(mix, matrix):
    x = batch((8, 6), torch.float64)
    expected = torch.cat([matrix(k) @ part for k, part in zip((3, 3, 2), x.split([3, 3, 2]), strict=True)])
    torch.testing.assert_close(mix(x, group_size=3), expected, **FLOAT64)
    seven = mix(x[:7], group_size=3)
    assert torch.equal(seven[6], x[6])  # a group of one: no mixing
    torch.testing.assert_close(seven[:6], expected[:6], **FLOAT64)
    torch.testing.assert_close(mix(x, group_size=99), matrix(8) @ x, **FLOAT64)


@ALL_KINDS
@pytest.mark.parametrize("first_token", [1, 5])
def test_spared_tokens_are_untouched_to_the_bit(config, first_token):
    x, ids = batch((4, 9, 6)), torch.arange(4)
    out = noisy(config, x, ids, first_token=first_token)
    assert torch.equal(out[:, :first_token], x[:, :first_token])
    assert (out[:, first_token:] != x[:, first_token:]).any()
    if config.kind != "salt_and_pepper":  # its extremes change with what is spared
        assert torch.equal(out[:, first_token:], noisy(config, x, ids)[:, first_token:])


@MIXES
def test_gradient_with_and_without_detach(mix, matrix):
    upstream = batch((6, 5), torch.float64, seed=1)
    for detach in (False, True):
        x = batch((6, 5), torch.float64).requires_grad_()
        out = mix(x, group_size=3, detach=detach)
        out.backward(upstream)
        plain = torch.cat([matrix(3).T @ part for part in upstream.split(3)])
        torch.testing.assert_close(x.grad, upstream if detach else plain, **FLOAT64)
        torch.testing.assert_close(out, mix(x, group_size=3), **FLOAT64)  # the value itself does not change


@MIXES
def test_gradcheck(mix, matrix):
    x = batch((5, 3, 2), torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda t: mix(t, group_size=2, first_token=1), (x,))


def test_gradcheck_gaussian():
    x = batch((3, 5), torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda t: gaussian_noise(t, 0.5, torch.arange(3), 0, EPOCH, STREAM), (x,))


# Formats and shapes


@ALL_KINDS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_the_float32_result_rounded_once(config, dtype):
    x, ids = batch((4, 5, 6), dtype), torch.arange(4)
    out = noisy(config, x, ids)
    assert out.dtype == dtype
    assert torch.equal(out, noisy(config, x.float(), ids).to(dtype))


@MIXES
def test_half_precision_does_not_overflow_in_between(mix, matrix):
    x = torch.full((64, 2), 3000.0, dtype=torch.float16)
    assert torch.equal(mix(x), x)  # rows of the matrix sum to 1; 64 * 3000 is over float16's 65,504


@ALL_KINDS
@pytest.mark.parametrize("shape", [(3, 1), (3, 7), (5, 3, 5), (3, 3, 7, 5), (4, 1, 1, 1)])
def test_odd_sizes_keep_their_shape(config, shape):
    x, ids = batch(shape), torch.arange(shape[0])
    out = noisy(config, x, ids)
    assert out.shape == x.shape and out.dtype == x.dtype
    assert torch.isfinite(out).all()


@ALL_KINDS
@pytest.mark.parametrize("group_size", [2, None])
def test_an_empty_batch_stays_empty(config, group_size):
    import dataclasses

    x = torch.empty(0, 5, 6)
    config = dataclasses.replace(config, group_size=group_size)
    assert noisy(config, x, torch.empty(0, dtype=torch.int64), first_token=1).shape == (0, 5, 6)


@ALL_KINDS
def test_values_do_not_depend_on_the_memory_layout(config):
    x, ids = batch((4, 5, 6)), torch.arange(4)
    strided = x.transpose(1, 2).contiguous().transpose(1, 2)
    assert not strided.is_contiguous()
    assert torch.equal(noisy(config, strided, ids), noisy(config, x, ids))


@ALL_KINDS
def test_rows_that_are_no_batch_are_refused(config):
    with pytest.raises(ValueError, match=r"blocks\.1.*6 rows, 4 sample ids"):
        noisy(config, batch((6, 3)), torch.arange(4))
