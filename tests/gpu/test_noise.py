"""The CUDA kernels on a GPU, beside their specification. Run by `make gpu PART=check`; needs torch and timm alone."""

import itertools

import pytest
import torch

from pipeline.noise import native, ops, reference
from pipeline.noise.config import NoiseConfig
from pipeline.noise.reference import Purpose, stream_of

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")

EPOCH = torch.tensor(3)
STREAM = stream_of("blocks.1", Purpose.NOISE)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = ((4, 197, 768), (3, 1, 1), (5, 7, 3), (2, 1, 127), (1, 1, 2049), (6, 64, 14, 14), (0, 5, 6), (70000, 2, 3))
KINDS = {
    "gaussian": NoiseConfig(kind="gaussian", strength=0.7, site="blocks.1"),
    "salt_and_pepper": NoiseConfig(kind="salt_and_pepper", strength=0.3, site="blocks.1", group_size=2),
    "circular_shift": NoiseConfig(kind="circular_shift", strength=0.3, site="blocks.1", group_size=2),
    "optimal_q": NoiseConfig(kind="optimal_q", site="blocks.1", group_size=2),
}
# The special function unit: lg2 is off by 2^-22, which near a radius of 0 is 6e-4; the angle by 2^-20.9 of 5 radii.
NORMAL_BOUND, NORMAL_MEAN_BOUND = 1e-3, 2e-6
ALL_KINDS = pytest.mark.parametrize("config", KINDS.values(), ids=KINDS)


def batch(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to("cuda", dtype)


def ids_of(x: torch.Tensor) -> torch.Tensor:
    return torch.arange(len(x), device=x.device) * 977 + (1 << 31)


def test_the_kernels_are_loaded():
    assert native.is_loaded("cuda"), "libnoisynn_cuda.so is not there: `make setup` needs nvcc"


@ALL_KINDS
@pytest.mark.parametrize(("shape", "dtype", "first_token"), itertools.product(SHAPES, DTYPES, (0, 1)), ids=str)
def test_kernels_are_their_specification(config, shape, dtype, first_token):
    x = batch(shape, dtype)
    found = ops.apply_noise(x, config, ids_of(x), 7, EPOCH, first_token)
    expected = reference.apply_noise(x, config, ids_of(x), 7, EPOCH, first_token)
    assert (found.shape, found.dtype) == (x.shape, dtype)
    assert torch.equal(found[:, :first_token], x[:, :first_token])
    if config.kind == "salt_and_pepper":
        assert torch.equal(found, expected)
        return
    eps = torch.finfo(dtype).eps
    limit = 2 * eps * (1 + expected.float().abs() + x.float().abs())
    if config.kind == "gaussian":
        limit = limit + 0.7 * NORMAL_BOUND
    assert ((found.float() - expected.float()).abs() <= limit).all()


def test_normals_are_within_their_bounds():
    x = torch.zeros(64, 1 << 18, device="cuda")
    difference = (
        ops.gaussian_noise(x, 1.0, ids_of(x), 1, EPOCH, STREAM)
        - reference.gaussian_noise(x, 1.0, ids_of(x), 1, EPOCH, STREAM)
    ).abs()
    assert difference.max() < NORMAL_BOUND and difference.mean() < NORMAL_MEAN_BOUND


@ALL_KINDS
def test_gradients_and_layouts(config):
    x = batch((6, 5, 4, 8), torch.float32)
    upstream = batch((6, 5, 4, 8), torch.float32).flip(0)
    gradients = []
    for apply in (ops.apply_noise, reference.apply_noise):
        leaf = x.clone().to(memory_format=torch.channels_last).requires_grad_()
        apply(leaf, config, ids_of(x), 7, EPOCH, 1).backward(upstream)
        gradients.append(leaf.grad)
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-6)


def test_more_than_2_to_the_32_elements():
    free, _ = torch.cuda.mem_get_info()
    size = (1 << 32) + 4096
    if free < 5 * size:
        pytest.skip(f"no GPU memory for it: {5 * size >> 30} GiB are needed")
    x = torch.zeros(1, size, dtype=torch.bfloat16, device="cuda")
    y = ops.gaussian_noise(x, 1.0, torch.zeros(1, dtype=torch.int64, device="cuda"), 0, EPOCH, STREAM)
    tail = y[0, -4096:].float()
    assert 0.9 < tail.std() < 1.1
    assert (y[0, : 1 << 20] == y[0, 1 << 32 : (1 << 32) + 4096].repeat(256)).float().mean() < 0.05


@ALL_KINDS
def test_compiled_it_is_the_same_noise(config):
    torch._dynamo.reset()
    x = batch((8, 50, 64), torch.bfloat16)
    ids, stream = ids_of(x), ops.noise_stream(config)

    def forward(t: torch.Tensor, epoch: torch.Tensor, strength: torch.Tensor) -> torch.Tensor:
        return ops.apply_noise(t, config, ids, 7, epoch, 1, None, strength, stream)

    compiled = torch.compile(forward, fullgraph=True)
    for number in range(3):
        epoch = torch.tensor(number, device="cuda")
        strength = torch.tensor(0.1 * number, dtype=torch.float64, device="cuda")
        assert torch.equal(compiled(x, epoch, strength), forward(x, epoch, strength))
