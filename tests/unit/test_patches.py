"""The patch projection as one product: against the convolution, on the CPU; and which models get it, and when."""

import copy
import pickle

import pytest
import timm
import torch
from timm.optim import param_groups_layer_decay
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.nn.functional import conv2d
from torch.utils.flop_counter import FlopCounterMode

from pipeline import patches
from pipeline.models import ModelConfig, create_model, timm_model
from pipeline.patches import PatchProjection, multiply_patches, patch_product

SIZE = 32
SMALL = {"depth": 2, "embed_dim": 24, "num_heads": 2, "patch_size": 8}
VIT = ModelConfig("vit_tiny_patch16_224", SMALL)
# As torch.testing has them for one product, whose length here is at most 3 x 64.
TOLERANCES = {torch.float64: (1e-12, 1e-12), torch.float32: (1e-5, 1e-5), torch.bfloat16: (1.6e-2, 1e-2)}
# (batch, channels, height, width), (P, Q): odd numbers of rows and columns, and pixels beyond the last whole patch.
CASES = [
    ((2, 3, 24, 40), (8, 8)),
    ((3, 3, 16, 16), (16, 16)),
    ((1, 3, 15, 21), (3, 3)),
    ((2, 3, 27, 45), (8, 8)),
    ((2, 5, 14, 13), (2, 4)),
]


def drawn(shape, patch, dtype=torch.float64, width: int = 7) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, weight and bias, the sums of about 1."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    weight = torch.randn((width, shape[1], *patch), generator=generator, dtype=torch.float64)
    bias = torch.randn(width, generator=generator, dtype=torch.float64)
    return x.to(dtype), (weight / weight[0].numel() ** 0.5).to(dtype), bias.to(dtype)


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """The product on this CPU too."""
    monkeypatch.setattr(PatchProjection, "forward", lambda self, x: patch_product(x, self.weight, self.bias))


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize(("shape", "patch"), CASES)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("with_bias", [True, False])
def test_the_product_is_the_convolution(shape, patch, dtype, memory_format, with_bias):
    x, weight, bias = drawn(shape, patch, dtype)
    given = bias if with_bias else None
    y = patch_product(x.to(memory_format=memory_format), weight, given)
    expected = conv2d(x.double(), weight.double(), None if given is None else given.double(), stride=patch)
    rtol, atol = TOLERANCES[dtype]
    assert y.dtype == dtype and y.shape == expected.shape
    torch.testing.assert_close(y.double(), expected, rtol=rtol, atol=atol)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_tokens_are_a_view_of_the_result_and_the_product_takes_the_parameter_itself(device, monkeypatch):
    x, weight, bias = (tensor.to(device) for tensor in drawn((2, 3, 24, 40), (8, 8)))
    taken, linear = [], patches.functional.linear
    monkeypatch.setattr(patches.functional, "linear", lambda *given: taken.append(given[1]) or linear(*given))
    y = patch_product(x, weight, bias)
    assert y.shape == (2, 7, 3, 5) and y.device == weight.device
    tokens = y.flatten(2).transpose(1, 2)
    assert tokens._base is y._base and tokens.is_contiguous()
    assert taken[0]._base is weight


@pytest.mark.parametrize(("shape", "patch"), [((2, 3, 6, 9), (3, 3)), ((1, 2, 5, 7), (2, 3))])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_its_gradients(shape, patch, memory_format):
    x, weight, bias = drawn(shape, patch, width=4)
    leaves = [tensor.requires_grad_() for tensor in (x.to(memory_format=memory_format), weight, bias)]
    assert torch.autograd.gradcheck(patch_product, leaves)
    seed = torch.randn(conv2d(*leaves, stride=patch).shape, dtype=torch.float64)
    ours = torch.autograd.grad(patch_product(*leaves), leaves, seed)
    for own, expected in zip(ours, torch.autograd.grad(conv2d(*leaves, stride=patch), leaves, seed), strict=True):
        torch.testing.assert_close(own, expected, rtol=1e-12, atol=1e-12)
    assert ours[1].is_contiguous()


def test_autocast_rounds_it_as_a_linear_layer():
    x, weight, bias = drawn((2, 3, 24, 40), (8, 8), torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y, expected = patch_product(x, weight, bias), conv2d(x, weight, bias, stride=8)
    assert y.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(y, expected, rtol=1.6e-2, atol=1e-2)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("vit_tiny_patch16_224", SMALL),
        ("deit_tiny_distilled_patch16_224", SMALL),
        ("beit_base_patch16_224", SMALL),
        ("vit_base_patch14_dinov2", SMALL | {"patch_size": 14}),
        ("swin_tiny_patch4_window7_224", {"embed_dim": 24, "depths": (1,), "num_heads": (1,), "window_size": 4}),
        ("samvit_base_patch16", {"embed_dim": 24, "depth": 1, "num_heads": 2, "img_size": 64}),
    ],
)
def test_models_of_patches_answer_alike_by_either_way(name, options, request):
    size = options.get("img_size", 70 if "dinov2" in name else SIZE)  # 5 rows of 14 pixels
    torch.manual_seed(0)
    plain = timm.create_model(name, num_classes=4, **options | {"img_size": size}).eval()
    torch.manual_seed(0)
    model = create_model(ModelConfig(name, options), 4, size).eval()
    projection = model.patch_embed.proj
    assert isinstance(projection, nn.Conv2d) and type(projection) is PatchProjection
    own, theirs = model.state_dict(), plain.state_dict()
    assert list(own) == list(theirs) and all(torch.equal(own[key], theirs[key]) for key in own)
    x = torch.randn(2, 3, size, size)
    expected = plain(x)
    assert torch.equal(model(x), expected)  # on the CPU to the bit
    request.getfixturevalue("as_on_a_gpu")
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "name", ["resnet18", "convnext_tiny", "vit_tiny_r_s16_p8_224", "mvitv2_tiny", "xcit_nano_12_p16_224"]
)
def test_other_models_keep_their_convolutions(name):
    with torch.device("meta"):
        model = timm.create_model(name)
        before = {name: type(module) for name, module in model.named_modules()}
        multiply_patches(model)
    changed = [name for name, module in model.named_modules() if type(module) is not before[name]]
    # The hybrid's patches are pixels of a ResNet's map, side by side as well.
    assert changed == (["patch_embed.proj"] if name == "vit_tiny_r_s16_p8_224" else [])


@pytest.mark.parametrize(
    "change", [{"padding": 1}, {"stride": 4}, {"dilation": 2}, {"groups": 3}, {"kernel_size": 1, "stride": 1}]
)
def test_other_convolutions_stay(change):
    model = nn.Module()
    model.patch_embed = nn.Module()
    model.patch_embed.proj = nn.Conv2d(3, 6, **{"kernel_size": 8, "stride": 8} | change)
    multiply_patches(model)
    assert type(model.patch_embed.proj) is nn.Conv2d


@pytest.mark.parametrize("cuda", [True, False])
def test_a_gpu_multiplies_and_nothing_else_does(cuda):
    """By fake tensors, whose device is said and need not be there: without a backward pass, which would look for it."""
    model = create_model(VIT, 4, SIZE).train()
    with FakeTensorMode():
        device = "cuda" if cuda else "cpu"
        own = {k: torch.empty(v.shape, device=device) for k, v in model.named_parameters()}
        x = torch.empty(2, 3, SIZE, SIZE, device=device)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            functional_call(model, own, (x,))
    counted = {str(operator) for operator in counter.get_flop_counts()["Global"]}
    assert "aten.addmm" in counted
    assert any("convolution" in operator for operator in counted) is not cuda


def trained(model: nn.Module, checkpointing: bool = False, compiled: bool = False) -> list[torch.Tensor]:
    """The loss of a step and its gradients."""
    model.set_grad_checkpointing(checkpointing)
    generator = torch.Generator().manual_seed(1)
    x, labels = torch.randn(4, 3, SIZE, SIZE, generator=generator), torch.arange(4)
    run = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
    loss = nn.functional.cross_entropy(run(x), labels)
    return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]


@pytest.mark.parametrize("how", [{}, {"checkpointing": True}, {"compiled": True}], ids=str)
def test_a_step_by_the_product_is_the_step_by_the_convolution(how, as_on_a_gpu):
    torch.manual_seed(0)
    model = create_model(VIT, 4, SIZE).train()
    torch.manual_seed(0)
    plain = timm_model(VIT, 4, SIZE).train()
    for own, expected in zip(trained(model, **how), trained(plain), strict=True):
        torch.testing.assert_close(own, expected, rtol=1e-4, atol=1e-6)


def test_copies_and_groups_of_parameters_are_as_timm_s():
    torch.manual_seed(0)
    model, plain = create_model(VIT, 4, SIZE), timm_model(VIT, 4, SIZE)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(other.patch_embed.proj) is PatchProjection
        assert all(torch.equal(a, b) for a, b in zip(other.parameters(), model.parameters(), strict=True))
    model.load_state_dict(plain.state_dict())
    assert torch.equal(model.patch_embed.proj.weight, plain.patch_embed.proj.weight)
    groups = []
    for each in (model, plain):
        names = {id(parameter): name for name, parameter in each.named_parameters()}
        found = param_groups_layer_decay(each, weight_decay=0.05, layer_decay=0.7)
        groups.append([(g["lr_scale"], g["weight_decay"], [names[id(p)] for p in g["params"]]) for g in found])
    assert groups[0] == groups[1]
