"""The schedule's values at every step, and what weight decay falls on."""

import itertools
import math

import pytest
import timm
import torch

from pipeline.data.order import Layout
from pipeline.optim import PER_TENSOR, OptimConfig, create_optimizer, create_schedule

STEPS = 20  # an epoch
LAYOUT = Layout(rank=1, world_size=2, micro_batch=4, accumulation=2)  # 16 samples a step
VIT = {"depth": 3, "embed_dim": 24, "num_heads": 2, "img_size": 32, "patch_size": 8, "num_classes": 4}


def vit() -> torch.nn.Module:
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", **VIT)


def rates(config: OptimConfig, epochs: int = 10, order: list[int] | None = None) -> list[float]:
    """The rate of each step of a run, as the training loop sets it; and of the step after the last."""
    optimizer = create_optimizer(torch.nn.Linear(3, 2), config)
    schedule = create_schedule(optimizer, config, epochs * STEPS, STEPS, LAYOUT)
    found = {}
    for step in order or range(epochs * STEPS + 1):
        schedule.step_update(step)
        (found[step],) = {group["lr"] for group in optimizer.param_groups}
    return [found[step] for step in sorted(found)]


def test_warm_up_then_peak_then_cosine_to_the_end():
    config = OptimConfig(lr=1e-3, min_lr=1e-5, warmup_epochs=2)
    found, warmup = rates(config), 2 * STEPS
    assert found[0] == pytest.approx(1e-3 / warmup)  # above 0: the first step counts
    assert all(a < b for a, b in itertools.pairwise(found[: warmup + 1]))
    assert found[warmup] == max(found) == pytest.approx(1e-3)  # the peak is reached
    assert all(a > b for a, b in itertools.pairwise(found[warmup:]))
    assert found[-1] == pytest.approx(1e-5)
    middle = warmup + (len(found) - 1 - warmup) // 2
    assert found[middle] == pytest.approx((1e-3 + 1e-5) / 2)
    for step in range(warmup, len(found)):
        share = (step - warmup) / (len(found) - 1 - warmup)
        assert found[step] == pytest.approx(1e-5 + 0.5 * (1e-3 - 1e-5) * (1 + math.cos(math.pi * share)))


def test_without_warm_up_the_first_step_has_the_peak():
    found = rates(OptimConfig(lr=0.1, warmup_epochs=0))
    assert found[0] == pytest.approx(0.1)
    assert found[-1] == 0
    assert found[-2] > 0  # the last real step still learns


def test_parts_of_an_epoch_of_warm_up():
    found = rates(OptimConfig(lr=1.0, warmup_epochs=0.25))
    assert found[:6] == pytest.approx([0.2, 0.36, 0.52, 0.68, 0.84, 1.0])


def test_the_rate_depends_on_the_step_alone():
    """So a resumed run needs no state of the schedule."""
    config = OptimConfig(lr=1e-3, warmup_epochs=2)
    steps = [150, 3, 60, 199, 0, 40]
    whole = rates(config)
    assert rates(config, order=steps) == [whole[step] for step in sorted(steps)]


def test_cool_down_stays_at_the_lowest_rate():
    config = OptimConfig(lr=1e-3, min_lr=1e-5, warmup_epochs=1, cooldown_epochs=3)
    found = rates(config)
    assert found[-1 - 3 * STEPS :] == [1e-5] * (3 * STEPS + 1)
    assert found[-2 - 3 * STEPS] > 1e-5
    # Before it, a run that is so much shorter.
    assert found[: 7 * STEPS] == rates(OptimConfig(lr=1e-3, min_lr=1e-5, warmup_epochs=1), epochs=7)[:-1]


def test_lengths_in_samples_are_rounded_to_steps_of_the_global_batch():
    in_samples = OptimConfig(lr=1.0, warmup_epochs=7, warmup_samples=40 * 16 + 7, cooldown_samples=20 * 16 - 7)
    assert rates(in_samples) == rates(OptimConfig(lr=1.0, warmup_epochs=2, cooldown_epochs=1))
    assert rates(OptimConfig(warmup_samples=0)) == rates(OptimConfig(warmup_epochs=0))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"warmup_epochs": 10}, "warmup_epochs 10 and"),
        ({"warmup_epochs": 12.5}, "warmup_epochs 12.5 and"),
        ({"warmup_samples": 200 * 16}, "warmup_samples 3200 and"),
        ({"warmup_epochs": 4, "cooldown_epochs": 6}, "cooldown_epochs 6 "),
        ({"warmup_epochs": 4, "cooldown_samples": 120 * 16}, "cooldown_samples 1920 "),
    ],
)
def test_a_run_without_a_step_between_warm_up_and_cool_down_is_refused(options, named):
    with pytest.raises(ValueError, match=r"leave nothing of a run of 200 steps \(10 epochs\)") as error:
        rates(OptimConfig(**options))
    assert f"optim.{named}" in str(error.value) and "\n" not in str(error.value)


# Layer decay


def test_layer_decay_is_timm_s_and_survives_the_schedule():
    model, config = vit(), OptimConfig(lr=1e-3, min_lr=1e-5, warmup_epochs=2, layer_decay=0.5)
    optimizer = create_optimizer(model, config)
    scales = {id(p): group["lr_scale"] for group in optimizer.param_groups for p in group["params"]}
    by_name = {name: scales[id(p)] for name, p in model.named_parameters()}
    # Embeddings, three blocks, then the last norm and the head.
    expected = {"patch_embed.proj.weight": 4, "blocks.0.mlp.fc1.weight": 3, "blocks.2.norm1.bias": 1, "head.weight": 0}
    assert {name: by_name[name] for name in expected} == {name: 0.5**depth for name, depth in expected.items()}
    schedule = create_schedule(optimizer, config, 200, STEPS, LAYOUT)
    plain = rates(OptimConfig(lr=1e-3, min_lr=1e-5, warmup_epochs=2))
    for step in (0, 7, 40, 123, 200):
        schedule.step_update(step)
        for group in optimizer.param_groups:
            assert group["lr"] == pytest.approx(plain[step] * group["lr_scale"], rel=1e-12), step


# The optimizers


@pytest.mark.parametrize(("optimizer", "lr"), [("adamw", 0.01), ("sgd", 0.05), ("lamb", 0.2), ("muon", 0.02)])
def test_every_optimizer_learns_under_its_schedule(optimizer, lr):
    model = vit()
    config = OptimConfig(optimizer=optimizer, lr=lr, warmup_epochs=0.1, layer_decay=0.9)
    made = create_optimizer(model, config)
    schedule = create_schedule(made, config, 20, STEPS, LAYOUT)
    torch.manual_seed(1)
    labels = torch.arange(16) % 4
    images = 2 * torch.randn(4, 3, 32, 32)[labels] + torch.randn(16, 3, 32, 32)
    losses = []
    for step in range(20):
        schedule.step_update(step)
        loss = torch.nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        made.step()
        made.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0], losses


def test_muon_takes_the_matrices_and_adamw_the_rest():
    model = vit()
    made = create_optimizer(model, OptimConfig(optimizer="muon", momentum=0.95))
    model(torch.randn(2, 3, 32, 32)).sum().backward()
    made.step()
    for name, parameter in model.named_parameters():
        state = made.state[parameter]
        matrix = parameter.ndim >= 2 and name not in ("cls_token", "pos_embed")
        assert ("momentum_buffer" in state, "exp_avg" in state) == (matrix, not matrix), name
    assert all(group["momentum"] == 0.95 for group in made.param_groups)


def test_lamb_does_not_clip_by_itself():
    """optim.clip_grad_norm does, once, on the gradients of all ranks."""
    made = create_optimizer(vit(), OptimConfig(optimizer="lamb"))
    assert made.defaults["max_grad_norm"] is None


def test_frozen_parameters_are_in_no_group():
    model = vit()
    for parameter in model.blocks[0].parameters():
        parameter.requires_grad_(False)
    for layer_decay in (None, 0.5):
        made = create_optimizer(model, OptimConfig(layer_decay=layer_decay))
        grouped = {id(p) for group in made.param_groups for p in group["params"]}
        assert grouped == {id(p) for p in model.parameters() if p.requires_grad}
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(ValueError, match=r"model\.freeze leaves nothing to train"):
        create_optimizer(model, OptimConfig())


def test_optimizers_that_need_whole_tensors_are_those_that_change_when_a_tensor_is_cut():
    """What ZeRO does to them: its partitions are stretches of flattened parameters."""

    def updated(optimizer: str, parts: int) -> torch.Tensor:
        torch.manual_seed(0)
        start, gradient = torch.randn(64, 8), torch.randn(64, 8)
        cut = [torch.nn.Parameter(part.clone()) for part in start.chunk(parts)]
        made = create_optimizer(torch.nn.ParameterList(cut), OptimConfig(optimizer=optimizer, lr=0.1))
        for part, its_gradient in zip(cut, gradient.chunk(parts), strict=True):
            part.grad = its_gradient.clone()
        made.step()
        return torch.cat([part.detach() for part in cut])

    for optimizer in ("adamw", "sgd", "lamb", "muon"):
        assert torch.equal(updated(optimizer, 1), updated(optimizer, 4)) == (optimizer not in PER_TENSOR), optimizer


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("vit_tiny_patch16_224", {"depth": 1, "embed_dim": 24, "num_heads": 2, "img_size": 32, "reg_tokens": 2}),
        ("resnet18", {}),
        ("convnext_atto", {}),
    ],
)
@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "lamb", "muon"])
def test_no_weight_decay_on_biases_and_norms(name, options, optimizer):
    model = timm.create_model(name, num_classes=4, **options)
    made = create_optimizer(model, OptimConfig(optimizer=optimizer, weight_decay=0.3))
    decay = {id(p): group["weight_decay"] for group in made.param_groups for p in group["params"]}
    assert len(decay) == sum(1 for _ in model.parameters())  # each once
    norms = (torch.nn.LayerNorm, torch.nn.BatchNorm2d, timm.layers.LayerNorm2d)
    spared = {id(p) for module in model.modules() if isinstance(module, norms) for p in module.parameters()}
    spared |= {id(p) for key, p in model.named_parameters() if key.endswith("bias")}
    tokens = {id(p) for key, p in model.named_parameters() if key in ("cls_token", "pos_embed", "reg_token")}
    for key, parameter in model.named_parameters():
        if id(parameter) in spared | tokens:
            assert decay[id(parameter)] == 0, key
        elif parameter.ndim > 1:
            assert decay[id(parameter)] == 0.3, key
    assert set(decay.values()) == {0, 0.3}


def test_the_options_reach_the_optimizer():
    model = torch.nn.Linear(3, 2)
    adamw = create_optimizer(model, OptimConfig(lr=0.02, betas=(0.8, 0.9), weight_decay=0.1))
    assert isinstance(adamw, torch.optim.AdamW)
    assert all((g["lr"], g["betas"]) == (0.02, (0.8, 0.9)) for g in adamw.param_groups)
    sgd = create_optimizer(model, OptimConfig(optimizer="sgd", lr=0.02, momentum=0.7))
    assert isinstance(sgd, torch.optim.SGD)
    assert all((g["momentum"], g["nesterov"]) == (0.7, True) for g in sgd.param_groups)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"lr": 0.0}, "lr"),
        ({"lr": math.nan}, "lr"),
        ({"min_lr": -1e-9}, "min_lr"),
        ({"lr": 1e-3, "min_lr": 1e-2}, "min_lr"),
        ({"weight_decay": -0.1}, "weight_decay"),
        ({"weight_decay": math.nan}, "weight_decay"),
        ({"warmup_epochs": -1}, "warmup_epochs"),
        ({"warmup_epochs": math.nan}, "warmup_epochs"),
        ({"warmup_samples": -1}, "warmup_samples"),
        ({"cooldown_epochs": -1}, "cooldown_epochs"),
        ({"cooldown_samples": -1}, "cooldown_samples"),
        ({"clip_grad_norm": 0.0}, "clip_grad_norm"),
        ({"momentum": 1.0}, "momentum"),
        ({"betas": (0.9, 1.0)}, "betas"),
        ({"layer_decay": 0.0}, "layer_decay"),
        ({"layer_decay": 1.1}, "layer_decay"),
        ({"ema_decay": 1.0}, "ema_decay"),
        ({"ema_decay": math.nan}, "ema_decay"),
    ],
    ids=str,
)
def test_out_of_range_options_are_refused_by_name(options, name):
    with pytest.raises(ValueError, match=rf"optim\.{name} is"):
        OptimConfig(**options)
