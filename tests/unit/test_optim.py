"""The schedule's values at every step, and what weight decay falls on."""

import itertools
import math

import pytest
import timm
import torch

from pipeline.optim import OptimConfig, create_optimizer, create_schedule

STEPS = 20  # an epoch


def rates(config: OptimConfig, epochs: int = 10, order: list[int] | None = None) -> list[float]:
    """The rate of each step of a run, as the training loop sets it; and of the step after the last."""
    optimizer = create_optimizer(torch.nn.Linear(3, 2), config)
    schedule = create_schedule(optimizer, config, epochs, STEPS)
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


@pytest.mark.parametrize("warmup_epochs", [10, 10.0, 12])
def test_a_warm_up_as_long_as_the_run_is_refused(warmup_epochs):
    with pytest.raises(ValueError, match=r"optim\.warmup_epochs .* run of 10 epochs"):
        rates(OptimConfig(warmup_epochs=warmup_epochs))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("vit_tiny_patch16_224", {"depth": 1, "embed_dim": 24, "num_heads": 2, "img_size": 32, "reg_tokens": 2}),
        ("resnet18", {}),
        ("convnext_atto", {}),
    ],
)
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
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
        ({"clip_grad_norm": 0.0}, "clip_grad_norm"),
    ],
    ids=str,
)
def test_out_of_range_options_are_refused_by_name(options, name):
    with pytest.raises(ValueError, match=rf"optim\.{name} is"):
        OptimConfig(**options)
