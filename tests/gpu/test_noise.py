"""The CUDA kernels on a GPU, beside their specification. Run by `make gpu PART=check`; needs torch and timm alone."""

import itertools

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from pipeline.noise import native, ops, reference
from pipeline.noise.config import NoiseConfig
from pipeline.noise.reference import Purpose, stream_of

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")

EPOCH = torch.tensor(3)
STREAM = stream_of("blocks.1", Purpose.NOISE)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = (
    (4, 197, 768),
    (3, 1, 1),
    (5, 7, 3),
    (2, 1, 127),
    (1, 1, 2049),
    (6, 64, 14, 14),
    (0, 5, 6),
    (70000, 2, 3),
    (1024, 32, 1024),
)
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


# Kernels of their own: columns side by side (channels_last), rows with gaps; and what is copied into order.
STRIDED = {
    "channels last": lambda x: x.view(6, 16, 14, 14).to(memory_format=torch.channels_last),
    "channels last, odd": lambda x: x[:, : 16 * 49].view(6, 16, 7, 7).to(memory_format=torch.channels_last),
    "a slice of the tokens": lambda x: x.view(6, 49, 64)[:, 5:40],
    "a slice of the channels": lambda x: x.view(6, 49, 64)[:, :, 8:32],
    "each second sample": lambda x: x.view(6, 49, 64)[::2],
    "gaps": lambda x: x.view(6, 49, 64)[..., ::2],
    "turned about": lambda x: x.view(6, 4, 49, 16).transpose(1, 3),
    "all its own": lambda x: x.view(6, 4, 7, 7, 16).permute(0, 3, 1, 4, 2),
    "one sample for all": lambda x: x.view(6, 49, 64)[:1].expand(6, -1, -1),
}


@ALL_KINDS
@pytest.mark.parametrize("layout", STRIDED)
@pytest.mark.parametrize(("dtype", "first_token"), itertools.product(DTYPES, (0, 2)), ids=str)
def test_values_do_not_depend_on_the_memory_layout_which_stays(config, layout, dtype, first_token):
    x = STRIDED[layout](batch((6, 49 * 64), dtype))
    found = ops.apply_noise(x, config, ids_of(x), 7, EPOCH, first_token)
    assert torch.equal(found, ops.apply_noise(x.contiguous(), config, ids_of(x), 7, EPOCH, first_token))
    assert found.stride() == torch.empty_like(x).stride()


@pytest.mark.parametrize("group_size", [1, 2, 7, 8, 9, 12, 13, 50, None])
@pytest.mark.parametrize("kind", ["circular_shift", "optimal_q"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_groups_of_any_size(kind, dtype, group_size):
    """Up to 8 or 12 rows of a group are held in registers; more are read twice."""
    config = NoiseConfig(kind=kind, strength=0.3 if kind == "circular_shift" else None, group_size=group_size)
    x = batch((53, 3, 40), dtype)
    found, expected = (apply(x, config, ids_of(x), 7, EPOCH, 1) for apply in (ops.apply_noise, reference.apply_noise))
    eps = torch.finfo(dtype).eps
    assert ((found.float() - expected.float()).abs() <= 4 * eps * (1 + expected.float().abs())).all()


IMAGE_KINDS = {
    "none": NoiseConfig(),
    "gaussian": NoiseConfig(kind="gaussian", strength=0.7),
    "salt_and_pepper": NoiseConfig(kind="salt_and_pepper", strength=0.3),
    "circular_shift": NoiseConfig(kind="circular_shift", strength=0.3, group_size=3),
    "optimal_q": NoiseConfig(kind="optimal_q", group_size=3),
}


@pytest.mark.parametrize("config", IMAGE_KINDS.values(), ids=IMAGE_KINDS)
@pytest.mark.parametrize("size", [(224, 224), (32, 32), (1, 1), (7, 33), (20, 300)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("flipped", [False, True])
def test_image_noise_is_its_specification(config, size, dtype, flipped):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (8, *size, 3), generator=generator, dtype=torch.uint8).cuda()
    mean, std = torch.tensor([0.485, 0.456, 0.406]).cuda(), torch.tensor([0.229, 0.224, 0.225]).cuda()
    flip = torch.arange(8, device="cuda") % 2 == 0 if flipped else None
    draw = (ids_of(images), 7, EPOCH)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        found = ops.image_noise(images, mean, std, config, *draw, flip, dtype, memory_format)
        expected = reference.image_noise(images, mean, std, config, *draw, flip, dtype)
        assert found.is_contiguous(memory_format=memory_format)
        bound = 2e-6 + torch.finfo(dtype).eps * expected.float().abs()
        bound = bound + (0.7 * NORMAL_BOUND if config.kind == "gaussian" else 0)
        assert ((found.float() - expected.float()).abs() <= bound).all()


NORM_KINDS = {name: KINDS[name] for name in ("gaussian", "circular_shift", "optimal_q")}


def normed(apply, config: NoiseConfig, x: torch.Tensor, first_token: int) -> tuple[torch.Tensor, ...]:
    """The result and the gradients of x, weight and bias."""
    weight, bias = (batch((x.shape[-1],), torch.float32) + shift for shift in (1, 0))
    inputs = tuple(t.clone().requires_grad_() for t in (x, weight, bias))
    y = apply(*inputs, 1e-6, config, ids_of(x), 7, EPOCH, first_token)
    return (y.detach(), *torch.autograd.grad(y, inputs, batch(x.shape, x.dtype).flip(0)))


@pytest.mark.parametrize("config", NORM_KINDS.values(), ids=NORM_KINDS)
@pytest.mark.parametrize("shape", [(8, 197, 384), (6, 50, 768), (6, 3, 1024), (4, 7, 8), (0, 3, 16)], ids=str)
@pytest.mark.parametrize(("dtype", "first_token"), itertools.product(DTYPES, (0, 1)), ids=str)
def test_norm_noise_is_its_specification_there_and_back(config, shape, dtype, first_token):
    x = batch(shape, dtype) * 3 + 1
    found, expected = (normed(apply, config, x, first_token) for apply in (ops.norm_noise, reference.norm_noise))
    tokens = 1 + shape[0] * shape[1]
    for one, other, scale in zip(found, expected, (10, 10, 10 * tokens, 10 * tokens), strict=True):
        limit = 3e-6 * scale + torch.finfo(one.dtype).eps * other.float().abs() + 0.7 * NORMAL_BOUND
        assert ((one.float() - other.float()).abs() <= limit).all()


OPERATORS = {
    "gaussian_noise": lambda x, s, ids: (x, s, ids, EPOCH.cuda(), 7, STREAM, 1),
    "salt_and_pepper": lambda x, s, ids: (
        x,
        -s.expand(len(x), 1).clone(),
        s.expand(len(x), 1).clone(),
        s,
        ids,
        EPOCH.cuda(),
        7,
        STREAM,
        1,
    ),
    "linear_mix": lambda x, s, ids: (x, s, False, 3, 1, False, False),
}


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("channels_last", [False, True])
def test_opcheck(name, channels_last):
    x = batch((6, 5, 4, 3), torch.float32)
    x = (x.to(memory_format=torch.channels_last) if channels_last else x).requires_grad_()
    strength = torch.tensor(0.3, dtype=torch.float64, device="cuda")
    torch.library.opcheck(getattr(torch.ops.noisynn, name).default, OPERATORS[name](x, strength, ids_of(x)))


@pytest.mark.parametrize("kind", [0, 1, 2])
def test_opcheck_norm_noise(kind):
    x = batch((6, 5, 16), torch.bfloat16).requires_grad_()
    weight, bias = (batch((16,), torch.float32).requires_grad_() for _ in range(2))
    strength = torch.tensor(0.3, dtype=torch.float64, device="cuda")
    arguments = (x, weight, bias, 1e-6, kind, strength, ids_of(x), EPOCH.cuda(), 7, STREAM, 3, 1, False)
    torch.library.opcheck(torch.ops.noisynn.norm_noise.default, arguments)


@ALL_KINDS
def test_activation_checkpointing_gives_the_same_bits(config):
    results = []
    for recompute in (False, True):
        x = batch((6, 9, 64), torch.bfloat16).requires_grad_()

        def part(t: torch.Tensor) -> torch.Tensor:
            return ops.apply_noise(t * 2, config, ids_of(t), 7, EPOCH).sin()

        y = checkpoint(part, x, use_reentrant=False) if recompute else part(x)
        y.square().sum().backward()
        results.append((y.detach(), x.grad))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def test_the_integers_are_the_reference_s():
    """By salt-and-pepper, whose decisions are on integers: the same entries at each of 32 thresholds."""
    x = torch.zeros(4, 1 << 16, device="cuda")
    for level in range(1, 33):
        found = ops.salt_and_pepper(x, level / 32, ids_of(x), 7, EPOCH, STREAM, extremes=None)
        words = reference.random_words(1 << 16, ids_of(x), 7, EPOCH.cuda(), STREAM)
        marked = ops.salt_and_pepper(
            x[:, None], level / 32, ids_of(x), 7, EPOCH, STREAM, extremes=(torch.tensor([-1.0]), torch.tensor([1.0]))
        )[:, 0]
        assert torch.equal(marked == 1, words < round(level / 64 * 2**32))
        assert torch.equal(marked != 0, words < round(level / 32 * 2**32))
        assert torch.equal(found, x)


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
