"""Noise at named modules of real timm models: exactly the reference's, at that module's input and nowhere else."""

import pytest
import timm
import torch

from pipeline.noise.config import NoiseConfig
from pipeline.noise.inject import NoiseInjector, check_site, prefix_tokens
from pipeline.noise.ops import apply_noise

SEED = 11
IDS = torch.tensor([40, 3, 1 << 33, 7])
SIZE = 32
GAUSSIAN = {"kind": "gaussian", "strength": 0.5}
KINDS = [GAUSSIAN, {"kind": "salt_and_pepper", "strength": 0.3}, {"kind": "circular_shift", "strength": 0.3}]
KINDS += [{"kind": "optimal_q"}]


def vit(**options) -> torch.nn.Module:
    torch.manual_seed(0)
    small = {"depth": 2, "embed_dim": 48, "num_heads": 3, "img_size": SIZE, "patch_size": 8, "num_classes": 5}
    return timm.create_model("vit_tiny_patch16_224", **(small | options)).eval()


def cnn() -> torch.nn.Module:
    torch.manual_seed(0)
    return timm.create_model("resnet18", num_classes=5).eval()


def swin() -> torch.nn.Module:
    small = {"img_size": 64, "embed_dim": 24, "depths": (2, 2), "num_heads": (1, 2), "window_size": 4}
    return timm.create_model("swin_tiny_patch4_window7_224", num_classes=5, **small).eval()


def pictures(batch: int = 4, size: int = SIZE) -> torch.Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(5))


def inject(model: torch.nn.Module, site: str, during: str = "eval", **options) -> NoiseInjector:
    config = NoiseConfig(site=site, during=during, **({"group_size": 2} | (options or GAUSSIAN)))
    injector = NoiseInjector(model, config, SIZE, SEED)
    injector.set_batch(IDS, epoch=3)
    return injector


def input_of(model: torch.nn.Module, site: str, x: torch.Tensor) -> torch.Tensor:
    """What arrives at a module, after all hooks registered before."""
    seen = []
    part = model.get_submodule(site)
    handle = part.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach().clone()))
    with torch.no_grad():
        model(x)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("options", KINDS, ids=lambda o: o["kind"])
@pytest.mark.parametrize(
    ("build", "site", "first_token"),
    [
        (vit, "blocks.1", 1),
        (vit, "blocks.1.attn", 1),
        (cnn, "layer4.1", 0),
        (lambda: vit(reg_tokens=4), "blocks.1.attn", 5),
        (lambda: vit(class_token=False, global_pool="avg"), "blocks.1", 0),
    ],
    ids=["vit block", "vit attn", "cnn block", "vit registers", "vit without class token"],
)
def test_the_module_s_input_changes_exactly_by_the_reference(build, site, first_token, options):
    model, x = build(), pictures()
    clean = input_of(model, site, x)
    injector = inject(model, site, during="train", **options)
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()  # so that the clean input is the same in both phases
    noisy = input_of(model, site, x)
    expected = apply_noise(clean, injector.config, IDS, SEED, torch.tensor(3), first_token)
    if isinstance(injector._replaced.get("blocks.1.norm1"), torch.nn.LayerNorm):  # in one pass with LayerNorm
        torch.testing.assert_close(noisy, expected, rtol=0, atol=1e-5)
        torch.testing.assert_close(noisy[:, :first_token], clean[:, :first_token], rtol=0, atol=1e-5)
    else:
        assert torch.equal(noisy, expected)
        assert torch.equal(noisy[:, :first_token], clean[:, :first_token])
    assert not torch.allclose(noisy, clean, atol=1e-3)
    assert [place.first_token for place in injector.sites] == [first_token]


def test_only_what_comes_after_the_site_changes():
    model, x = vit(), pictures()
    before = {site: input_of(model, site, x) for site in ("blocks.0", "blocks.1", "blocks.1.attn", "blocks.1.mlp")}
    inject(model, "blocks.1.attn")
    for site, same in (("blocks.0", True), ("blocks.1", True), ("blocks.1.attn", False), ("blocks.1.mlp", False)):
        assert torch.equal(input_of(model, site, x), before[site]) == same, site


def test_all_tokens_where_none_are_to_be_spared():
    model, x = vit(), pictures()
    clean = input_of(model, "blocks.1", x)
    inject(model, "blocks.1", kind="optimal_q", spare_prefix_tokens=False)
    noisy = input_of(model, "blocks.1", x)
    expected = apply_noise(clean, NoiseConfig(kind="optimal_q", group_size=2), IDS, SEED, torch.tensor(0), 0)
    assert torch.equal(noisy, expected)
    assert not torch.equal(noisy[:, 0], clean[:, 0])


@pytest.mark.parametrize("build", [vit, cnn])
def test_state_dict_keys_stay_timm_s(build):
    model, plain = build(), build()
    inject(model, "image")
    inject(model, "blocks.1" if build is vit else "layer4.1")
    assert list(model.state_dict()) == list(plain.state_dict())
    plain.load_state_dict(model.state_dict(), strict=True)


def test_unknown_site_offers_the_nearest():
    with pytest.raises(ValueError) as error:
        check_site(vit(), "block.1.attn", SIZE)
    assert "'block.1.attn'" in str(error.value) and "blocks.1.attn" in str(error.value)
    with pytest.raises(ValueError, match=r"layer4\.1"):
        check_site(cnn(), "layer4.5", SIZE)


def test_a_module_that_is_not_run_is_refused():
    # timm's fused attention never calls this dropout.
    with pytest.raises(ValueError, match="gets no tensor") as error:
        check_site(vit(), "blocks.1.attn.attn_drop", SIZE)
    assert "blocks.1.attn" in str(error.value)


def test_windowed_attention_is_refused_with_the_nearest_that_is():
    model = swin()
    with pytest.raises(ValueError) as error:
        check_site(model, "layers.0.blocks.1.attn", 64)
    text = str(error.value)
    assert "first axis of its input is not the batch" in text
    assert text.endswith("nearest that is: layers.0.blocks.1")
    assert check_site(model, "layers.0.blocks.1", 64)[0] == 3


@pytest.mark.parametrize(
    ("name", "site", "shape"),
    [("convnext_atto", "stages.3.blocks.1", (3, 320, 2, 2)), ("swin_tiny_patch4_window7_224", "layers.3", None)],
)
def test_sites_of_other_families(name, site, shape):
    """Shapes alone: the weights never exist."""
    with torch.device("meta"):
        model = timm.create_model(name)
    size = 224 if "swin" in name else 64
    found = check_site(model, site, size)
    assert found[0] == 3 and shape in (None, found)
    with pytest.raises(ValueError, match="is no module"):
        check_site(model, "blocks.11.attn", size)


def test_checking_a_site_leaves_the_model_as_it_is():
    model = cnn()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model.train()
    check_site(model, "layer4.1", SIZE)
    assert model.training and next(model.parameters()).device.type == "cpu"
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())  # BatchNorm's counts too
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_prefix_tokens_that_cannot_be_spared_are_refused():
    model = vit(qk_norm=True)
    with pytest.raises(ValueError, match=r"blocks\.1\.attn\.q_norm.*cannot be spared.*spare_prefix_tokens"):
        inject(model, "blocks.1.attn.q_norm")
    inject(model, "blocks.1.attn.q_norm", kind="optimal_q", spare_prefix_tokens=False)


def test_patches_without_a_class_token_are_all_noisy():
    model, x = vit(), pictures()
    clean = input_of(model, "patch_embed.norm", x)
    assert clean.shape[1] == 16  # the class token comes later
    assert inject(model, "patch_embed.norm").sites[0].first_token == 0
    assert (input_of(model, "patch_embed.norm", x) != clean).all()
    assert prefix_tokens(model, "patch_embed", (3, 3, SIZE, SIZE)) == 0


@pytest.mark.parametrize(("during", "in_training", "in_evaluation"), [("train", 1, 0), ("eval", 0, 1), ("both", 1, 1)])
def test_during(during, in_training, in_evaluation):
    model, x = vit(), pictures()
    clean = input_of(model, "blocks.0", x)
    inject(model, "blocks.0", during=during)
    for training, noisy in ((True, in_training), (False, in_evaluation)):
        model.train(training)
        assert torch.equal(input_of(model, "blocks.0", x), clean) != bool(noisy)


def test_off_is_the_plain_model_and_comes_on_again_after_an_error():
    model, x = vit(), pictures()
    clean = model(x)
    injector = inject(model, "blocks.0")
    noisy = model(x)
    assert not torch.equal(noisy, clean)
    with injector.off():
        assert torch.equal(model(x), clean)
    assert torch.equal(model(x), noisy)
    with pytest.raises(RuntimeError), injector.off():
        raise RuntimeError
    assert torch.equal(model(x), noisy)


def test_kind_none_and_noise_at_the_image_register_nothing():
    model = vit()
    none = NoiseInjector(model, NoiseConfig(site="no such site"), SIZE, SEED)
    assert none.at_image() is None
    assert inject(model, "image").at_image() is not None
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert inject(model, "blocks.0").at_image() is None


def test_evaluation_noise_is_another_and_does_not_depend_on_the_epoch():
    model, x = vit(), pictures()
    injector = inject(model, "blocks.0", during="both", spare_prefix_tokens=False, **GAUSSIAN)

    def seen(training: bool, epoch: int) -> torch.Tensor:
        model.train(training)
        injector.set_batch(IDS, epoch)
        return input_of(model, "blocks.0", x)

    assert torch.equal(seen(False, 0), seen(False, 7))
    assert not torch.equal(seen(True, 0), seen(True, 7))
    # At epoch 0 only the seed tells training from evaluation: no draw may be the same.
    assert not (seen(True, 0) == seen(False, 0)).any()


def test_a_second_forward_has_the_same_noise_to_the_bit():
    model, x = vit(), pictures()
    injector = inject(model, "blocks.0")
    torch.manual_seed(1)
    first = model(x)
    torch.manual_seed(2)  # no hidden generator
    assert torch.equal(model(x), first)
    injector.set_batch(IDS + 1, epoch=3)
    assert not torch.equal(model(x), first)


def test_a_sample_s_logits_do_not_depend_on_its_batch():
    model, x = vit(), pictures()
    injector = inject(model, "blocks.0")
    whole = model(x)
    for i in range(4):
        injector.set_batch(IDS[i : i + 1], epoch=0)
        # The noise is the same to the bit; matrix products of another batch size differ in their last bits.
        torch.testing.assert_close(model(x[i : i + 1])[0], whole[i], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", KINDS, ids=lambda o: o["kind"])
def test_activation_checkpointing_gives_the_same_gradients(options):
    """The forward pass is computed anew in backward: it must draw the noise again, not another."""
    x, found = pictures(), []
    for checkpointing in (False, True):
        model = vit()
        inject(model, "blocks.1", during="train", **options)
        model.set_grad_checkpointing(checkpointing)
        model.train()
        torch.manual_seed(3 + checkpointing)
        model(x).square().sum().backward()
        found.append({name: p.grad for name, p in model.named_parameters()})
    for name, grad in found[0].items():
        assert grad.abs().sum() > 0 or name == "cls_token", name
        assert torch.equal(found[1][name], grad), name


def test_remove_takes_away_its_own_hook_alone():
    model, x = vit(), pictures()
    clean = input_of(model, "blocks.0", x)
    first, second = inject(model, "blocks.0"), inject(model, "blocks.0", kind="optimal_q")
    assert len(model.blocks[0]._forward_pre_hooks) == 2
    first.remove()
    first.remove()  # twice does no harm
    assert len(model.blocks[0]._forward_pre_hooks) == 1
    expected = apply_noise(clean, second.config, IDS, SEED, torch.tensor(0), 1)
    assert torch.equal(input_of(model, "blocks.0", x), expected)
    second.remove()
    assert torch.equal(input_of(model, "blocks.0", x), clean)


def test_forgetting_set_batch_is_an_error():
    model = vit()
    NoiseInjector(model, NoiseConfig(site="blocks.0", during="eval", **GAUSSIAN), SIZE, SEED)
    with pytest.raises(AssertionError, match="set_batch"):
        model(pictures())


def test_sample_ids_of_another_batch_are_an_error():
    model = vit()
    inject(model, "blocks.0")
    with pytest.raises(ValueError, match=r"blocks\.0.*3 rows, 4 sample ids"):
        model(pictures(3))


@pytest.mark.parametrize("options", KINDS, ids=lambda o: o["kind"])
def test_a_compiled_noisy_vit_is_the_eager_one_and_compiles_once_in_12_epochs(options):
    torch._dynamo.reset()
    graphs = torch._dynamo.utils.counters["stats"]
    graphs.clear()
    model, x = vit(), pictures()
    injector = inject(model, "blocks.*", during="train", pick="random_one", **options)
    model.train()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for epoch in range(12):
        injector.set_batch(IDS + epoch, epoch, 3 * epoch, epoch / 12)
        assert torch.equal(compiled(x), model(x)), epoch
    assert graphs["unique_graphs"] == 1
