"""LayerNorm and noise in one pass beside the two in turn, and the module that puts it before a block's part."""

import copy
import itertools

import pytest
import timm
import torch
from torch.utils.checkpoint import checkpoint

from pipeline.noise import operators, ops, reference
from pipeline.noise.config import NoiseConfig
from pipeline.noise.inject import NoiseInjector
from pipeline.noise.norm import NormNoise, as_products_take, norm_before
from pipeline.noise.reference import Purpose, stream_of
from tests.unit.test_noise_ops import found_by_each_instruction_set, needs_kernels

EPOCH = torch.tensor(3)
SITE = "blocks.1.attn"
STREAM = stream_of(SITE, Purpose.NOISE)
KINDS = {
    "gaussian": NoiseConfig(kind="gaussian", strength=0.7, site=SITE),
    "circular_shift": NoiseConfig(kind="circular_shift", strength=0.3, site=SITE, group_size=3),
    "optimal_q": NoiseConfig(kind="optimal_q", site=SITE, group_size=3),
}
ALL_KINDS = pytest.mark.parametrize("config", KINDS.values(), ids=KINDS)
DTYPES = pytest.mark.parametrize("dtype", ops.DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
# Whole vectors and remainders; a last group that is smaller; a single token; the widest row; none.
SHAPES = [(6, 5, 48), (5, 3, 384), (2, 1, 8), (3, 2, 1024), (0, 4, 16), (4, 0, 16)]
EPSILON = 1e-6


def batch(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (x * 3 + 1).to(dtype)


def ids_of(x: torch.Tensor) -> torch.Tensor:
    return torch.arange(len(x)) * 977 + (1 << 31)


def affine(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    wide = torch.promote_types(x.dtype, torch.float32)
    return batch(x.shape[-1:], wide, 1), batch(x.shape[-1:], wide, 2)


def outcome(apply, config: NoiseConfig, x: torch.Tensor, first_token: int) -> tuple[torch.Tensor, ...]:
    """The result and the gradients of x, weight and bias."""
    inputs = tuple(t.clone().requires_grad_() for t in (x, *affine(x)))
    y = apply(*inputs, EPSILON, config, ids_of(x), 7, EPOCH, first_token)
    gradients = torch.autograd.grad(y, inputs, batch(x.shape, x.dtype, 3))
    return (y.detach(), *gradients)


def check_close(found: torch.Tensor, expected: torch.Tensor, scale: float) -> None:
    """Within a few roundings of the wide format at `scale`, and one of the format itself."""
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    wide = torch.promote_types(found.dtype, torch.float32)
    bound = scale * (3e-6 if wide == torch.float32 else 1e-14)
    if found.dtype != wide:
        bound = bound + torch.finfo(found.dtype).eps * expected.to(wide).abs()
    difference = (found.to(wide) - expected.to(wide)).abs()
    assert (difference <= bound).all(), f"{(difference - bound).max():.3g} over the bound"


@ALL_KINDS
@DTYPES
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("first_token", [0, 1, 99])
def test_one_pass_is_its_specification_there_and_back(config, dtype, shape, first_token):
    x = batch(shape, dtype)
    found = outcome(ops.norm_noise, config, x, first_token)
    expected = outcome(reference.norm_noise, config, x, first_token)
    scales = (10.0, 10.0, 10.0 * (1 + x.shape[0] * x.shape[1]), 10.0 * (1 + x.shape[0] * x.shape[1]))
    for one, other, scale in zip(found, expected, scales, strict=True):
        check_close(one, other, scale)


@ALL_KINDS
@DTYPES
@pytest.mark.parametrize("first_token", [0, 1])
def test_what_stands_in_without_kernels_is_the_same(config, dtype, first_token):
    x = batch((5, 3, 48), dtype)
    kind, strength = operators.NORM_KINDS.index(config.kind), torch.tensor(config.strength or 1.0, dtype=torch.float64)
    y, mean, scale = operators._plain_norm_noise(
        x, *affine(x), EPSILON, kind, strength, ids_of(x), EPOCH, 7, STREAM, 3, first_token, False
    )
    expected = outcome(reference.norm_noise, config, x, first_token)
    check_close(y, expected[0], 10)
    gradient = batch(x.shape, x.dtype, 3)
    found = operators._plain_norm_noise_backward(gradient, x, affine(x)[0], mean, scale, kind, strength, 3, first_token)
    for one, other, bound in zip(
        (found[0], found[1].sum(0), found[2].sum(0)), expected[1:], (10, 150, 150), strict=True
    ):
        check_close(one, other, bound)


@pytest.mark.parametrize(
    ("config", "shape"),
    [
        (NoiseConfig(kind="salt_and_pepper", strength=0.3, site=SITE, group_size=3), (6, 5, 48)),
        (KINDS["gaussian"], (6, 5, 20)),
        (KINDS["gaussian"], (2, 3, 1032)),
        (KINDS["optimal_q"], (4, 3, 48)),
        (KINDS["gaussian"], (4, 48)),
    ],
    ids=["salt and pepper", "odd width", "too wide", "a last group of one", "no tokens"],
)
def test_what_one_pass_cannot_do_is_done_in_two(config, shape):
    x = batch(shape)
    found, expected = (outcome(apply, config, x, 0) for apply in (ops.norm_noise, reference.norm_noise))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("kind", ["circular_shift", "optimal_q"])
@pytest.mark.parametrize(("samples", "group_size"), [(4, 1), (1, 8), (1, None), (7, 3)])
def test_a_sample_on_its_own_gets_torch_s_layer_norm_to_the_bit(kind, samples, group_size):
    config = NoiseConfig(kind=kind, strength=0.3 if kind == "circular_shift" else None, group_size=group_size)
    x = batch((samples, 5, 48))
    plain = torch.nn.functional.layer_norm(x, (48,), *affine(x), EPSILON)
    found = ops.norm_noise(x, *affine(x), EPSILON, config, ids_of(x), 7, EPOCH)
    assert torch.equal(found[-1], plain[-1])


@ALL_KINDS
@pytest.mark.parametrize("parts", [2, 4])
def test_ranks_equal_one_rank_to_the_bit(config, parts):
    x = batch((12, 5, 64), torch.bfloat16)
    whole, *_ = outcome(ops.norm_noise, config, x, 1)
    weights = affine(x)
    split = [
        ops.norm_noise(a, *weights, EPSILON, config, b, 7, EPOCH, 1)
        for a, b in zip(x.chunk(parts), ids_of(x).chunk(parts), strict=True)
    ]
    assert torch.equal(torch.cat(split), whole)


@ALL_KINDS
def test_threads_change_nothing(config):
    x, threads = batch((12, 40, 64)), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = outcome(ops.norm_noise, config, x, 1)
        torch.set_num_threads(2)
        assert all(map(torch.equal, outcome(ops.norm_noise, config, x, 1), one))
    finally:
        torch.set_num_threads(threads)


_HASH = """
import hashlib, torch
from pipeline.noise import ops
from tests.unit.test_noise_norm import KINDS, batch, outcome
digest = hashlib.sha256()
for config in KINDS.values():
    for dtype in ops.DTYPES:
        for shape in ((6, 5, 48), (5, 3, 392)):
            for t in outcome(ops.norm_noise, config, batch(shape, dtype), 1):
                digest.update(t.contiguous().view(torch.uint8).numpy().tobytes())
print(digest.hexdigest())
"""


@needs_kernels
def test_every_instruction_set_gives_the_same_bits():
    found = found_by_each_instruction_set(_HASH)
    assert len(set(found.values())) == 1, found


@ALL_KINDS
@pytest.mark.parametrize("first_token", [0, 1])
def test_gradcheck(config, first_token):
    x = batch((5, 3, 8), torch.float64)
    inputs = tuple(t.requires_grad_() for t in (x, *affine(x)))
    assert torch.autograd.gradcheck(
        lambda *t: ops.norm_noise(*t, EPSILON, config, ids_of(x), 7, EPOCH, first_token), inputs
    )


@pytest.mark.parametrize("kind", ["circular_shift", "optimal_q"])
def test_a_detached_noise_is_passed_by_on_the_way_back(kind):
    options = {"kind": kind, "strength": KINDS[kind].strength, "group_size": 3}
    x = batch((6, 3, 16))
    found = outcome(ops.norm_noise, NoiseConfig(**options, detach=True), x, 0)
    expected = outcome(reference.norm_noise, NoiseConfig(**options, detach=True), x, 0)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-4)
    assert not torch.allclose(found[1], outcome(ops.norm_noise, NoiseConfig(**options), x, 0)[1])


@ALL_KINDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(config, dtype):
    x = batch((5, 3, 16), dtype).requires_grad_()
    weight, bias = (t.requires_grad_() for t in affine(x))
    kind, strength = operators.NORM_KINDS.index(config.kind), torch.tensor(0.3, dtype=torch.float64)
    draw = (strength, ids_of(x), EPOCH, 7, STREAM)
    torch.library.opcheck(torch.ops.noisynn.norm_noise.default, (x, weight, bias, 1e-6, kind, *draw, 3, 1, False))
    y, mean, scale = torch.ops.noisynn.norm_noise(x, weight, bias, 1e-6, kind, *draw, 3, 1, False)
    inputs = (y.detach(), x.detach(), weight.detach(), mean, scale)
    torch.library.opcheck(torch.ops.noisynn.norm_noise_backward.default, (*inputs, kind, strength, 3, 1))


@ALL_KINDS
def test_only_what_layer_norm_keeps_is_kept_for_the_backward_pass(config):
    kept: list[int] = []
    x = batch((6, 50, 64)).requires_grad_()
    weight, bias = affine(x)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        ops.norm_noise(x, weight, bias, 1e-6, config, ids_of(x), 7, EPOCH)
    assert sum(kept) <= x.numel() + 2 * 6 * 50 + 2 * 64 + 2


def test_bad_input_is_refused_by_name():
    x = batch((4, 3, 16))
    weight, bias = affine(x)
    for arguments, message in (
        ((x.int(), weight, bias), "int32: convert it to one of float32"),
        ((x, weight[:5], bias), r"LayerNorm of \(5,\) weights and \(16,\) biases on rows of 16"),
    ):
        with pytest.raises(ValueError, match=message):
            ops.norm_noise(*arguments, 1e-6, KINDS["gaussian"], ids_of(x), 7, EPOCH)


# The module


def vit(**options) -> torch.nn.Module:
    small = {"img_size": 32, "patch_size": 16, "embed_dim": 48, "depth": 2, "num_heads": 2, "num_classes": 5}
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", **(small | options)).eval()


def pictures() -> torch.Tensor:
    return torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(5))


def inject(model: torch.nn.Module, config: NoiseConfig) -> NoiseInjector:
    injector = NoiseInjector(model, config, 32, 7)
    injector.set_batch(torch.arange(6), epoch=3)
    return injector


@pytest.mark.parametrize(
    ("site", "norm"),
    [("blocks.0.attn", "blocks.0.norm1"), ("blocks.1.mlp", "blocks.1.norm2"), ("blocks.1", None), ("norm", None)],
)
def test_which_norm_feeds_a_site(site, norm):
    assert norm_before(vit(), site) == norm


def test_norms_that_feed_more_than_the_site_are_left_alone():
    beit = timm.create_model("beit_base_patch16_224", img_size=32, embed_dim=48, depth=1, num_heads=2)
    assert norm_before(beit, "blocks.0.attn") == "blocks.0.norm1"
    parallel = timm.create_model("vit_base_patch16_xp_224", img_size=32, embed_dim=48, depth=1, num_heads=2)
    assert norm_before(parallel, "blocks.0.attn") is None or type(parallel.blocks[0].norm1) is torch.nn.LayerNorm
    swin = timm.create_model("swin_tiny_patch4_window7_224", img_size=64, embed_dim=24, depths=(2,), num_heads=(1,))
    assert norm_before(swin, "layers.0.blocks.0.mlp") is None


@ALL_KINDS
def test_the_model_keeps_its_names_parameters_and_plain_answers(config):
    model = vit()
    names, parameters = list(model.state_dict()), list(model.parameters())
    plain = model(pictures())
    injector = inject(model, NoiseConfig(**(config.__dict__ | {"during": "eval"})))
    assert isinstance(model.blocks[1].norm1, NormNoise) and isinstance(model.blocks[1].norm1, torch.nn.LayerNorm)
    assert list(model.state_dict()) == names
    assert all(map(lambda a, b: a is b, model.parameters(), parameters))
    assert not torch.equal(model(pictures()), plain)
    with injector.off():
        assert torch.equal(model(pictures()), plain)
    injector.remove()
    assert type(model.blocks[1].norm1) is not NormNoise
    assert torch.equal(model(pictures()), plain)


@ALL_KINDS
def test_it_is_the_noise_that_a_hook_would_give(config, monkeypatch):
    """A site that no norm feeds alone gets its noise by a hook: the same, but for roundings."""
    during = NoiseConfig(**(config.__dict__ | {"during": "eval"}))
    fused, hooked = vit(), vit()
    inject(fused, during)
    monkeypatch.setattr("pipeline.noise.inject.norm_before", lambda model, site: None)
    inject(hooked, during)
    assert type(hooked.blocks[1].norm1) is not NormNoise
    torch.testing.assert_close(fused(pictures()), hooked(pictures()), rtol=0, atol=1e-5)


def test_two_injectors_at_one_site_both_act_and_each_takes_away_its_own():
    model, x = vit(), pictures()
    plain = model(x)
    gaussian = NoiseConfig(kind="gaussian", strength=0.5, site=SITE, during="eval")
    mix = NoiseConfig(kind="optimal_q", site=SITE, during="eval", group_size=2)
    first = inject(model, gaussian)
    noisy = model(x)
    second = inject(model, mix)
    assert not torch.equal(model(x), noisy)
    with second.off():
        assert torch.equal(model(x), noisy)
    first.remove()
    hooked = model(x)
    assert not torch.equal(hooked, plain) and not torch.equal(hooked, noisy)
    second.remove()
    assert torch.equal(model(x), plain) and type(model.blocks[1].norm1) is not NormNoise


def test_remove_leaves_the_weights_that_the_model_has_by_then():
    model = vit()
    injector = inject(model, NoiseConfig(kind="gaussian", strength=0.5, site=SITE, during="eval"))
    model.load_state_dict({name: value + 1 for name, value in model.state_dict().items()}, assign=True)
    loaded = model.blocks[1].norm1.weight
    injector.remove()
    assert model.blocks[1].norm1.weight is loaded


def test_a_second_derivative_is_refused():
    x = batch((4, 3, 16)).requires_grad_()
    y = ops.norm_noise(x, *affine(x), EPSILON, KINDS["gaussian"], ids_of(x), 7, EPOCH)
    (gradient,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        gradient.square().sum().backward()


@pytest.mark.parametrize("kind", ["circular_shift", "optimal_q"])
def test_a_last_sample_on_its_own_does_not_change_the_others(kind):
    config = NoiseConfig(kind=kind, strength=0.3 if kind == "circular_shift" else None, group_size=4)
    x = batch((9, 5, 48), torch.bfloat16)
    nine, eight = (ops.norm_noise(t, *affine(t), EPSILON, config, ids_of(t), 7, EPOCH, 1) for t in (x, x[:8]))
    assert torch.equal(nine[:8], eight)


@pytest.mark.parametrize("kind", ["gaussian", "salt_and_pepper", "circular_shift", "optimal_q"])
def test_autocast_s_noise_is_on_what_the_next_product_takes(kind):
    model = vit()
    seen = []
    strength = {"gaussian": 0.5, "salt_and_pepper": 0.1, "circular_shift": 0.3}.get(kind)
    inject(model, NoiseConfig(kind=kind, strength=strength, site=SITE, during="eval", group_size=2))
    model.blocks[1].attn.register_forward_pre_hook(lambda module, args: seen.append(args[0].dtype))
    for context in (torch.autocast("cpu", torch.bfloat16), torch.no_grad()):
        with context:
            model(pictures())
    model.to(torch.bfloat16)(pictures().to(torch.bfloat16))
    assert seen == [torch.bfloat16, torch.float32, torch.bfloat16]


def test_autocast_leaves_float64_alone():
    taken = {torch.float64: torch.float64, torch.float32: torch.bfloat16, torch.bfloat16: torch.bfloat16}
    with torch.autocast("cpu", torch.bfloat16):
        assert {dtype: as_products_take(torch.ones(2, dtype=dtype)).dtype for dtype in taken} == taken
    assert as_products_take(torch.ones(2)).dtype == torch.float32


@pytest.mark.parametrize("kind", ["gaussian", "salt_and_pepper", "circular_shift"])
def test_under_autocast_noise_of_no_strength_is_the_plain_model_to_the_bit(kind):
    model, plain = vit(), vit()
    inject(model, NoiseConfig(kind=kind, strength=0.0, site="blocks.*.attn", during="eval", group_size=2))
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = (one(pictures()) for one in (model, plain))
        found.float().square().sum().backward()
        expected.float().square().sum().backward()
    assert torch.equal(found, expected)
    for (name, one), other in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad), name


def test_a_copy_of_the_model_has_noise_of_its_own():
    """As timm's EMA makes one: the copy's injector is another, with the same batch."""
    model = vit()
    injector = inject(model, NoiseConfig(kind="gaussian", strength=0.5, site=SITE, during="eval"))
    twin = copy.deepcopy(model)
    assert torch.equal(twin(pictures()), model(pictures()))
    with injector.off():
        assert not torch.equal(twin(pictures()), model(pictures()))


def test_activation_checkpointing_gives_the_same_gradients():
    gradients = []
    for recompute in (False, True):
        model = vit()
        inject(model, NoiseConfig(kind="optimal_q", site="blocks.*.attn", during="eval", group_size=2))
        x = pictures()
        y = checkpoint(model, x, use_reentrant=False) if recompute else model(x)
        y.square().sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(itertools.starmap(torch.equal, zip(*gradients, strict=True)))
