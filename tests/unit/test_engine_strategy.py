"""Which strategy is chosen, by arithmetic alone."""

import pytest
import torch
from timm.optim import create_optimizer_v2

from pipeline.engine import check_engine
from pipeline.engine.strategy import StateSize, bytes_on_device, choose_strategy, resolve_strategy
from pipeline.parallel import ParallelConfig

VIT_S, VIT_L, BILLION = 22_050_664, 304_326_632, 10**9
GB = 10**9


def size(elements, world_size=8, half=True, state=2, ema=False, offload=False) -> StateSize:
    return StateSize(elements, world_size, half, state, ema, offload)


@pytest.mark.parametrize(
    ("strategy", "given", "bytes_an_element"),
    [
        ("ddp", size(1000, half=False), 4 + 4 + 8),
        ("ddp", size(1000), 4 + 4 + 2 + 8),
        ("ddp", size(1000, ema=True), 4 + 4 + 2 + 8 + 4 / 8),
        ("zero1", size(1000), 2 + 2 + 12 / 8),
        ("zero1", size(1000, half=False, state=1), 4 + 4 + 8 / 8),
        ("zero2", size(1000, ema=True), 2 + (2 + 12 + 4) / 8),
        ("zero3", size(1000), (2 + 2 + 12) / 8),
        ("zero3", size(1000, world_size=1), 2 + 2 + 12),
        ("zero1", size(1000, ema=True, offload=True), 2 + 2),
    ],
)
def test_bytes_of_each_strategy(strategy, given, bytes_an_element):
    assert bytes_on_device(strategy, given) == 1000 * bytes_an_element


@pytest.mark.parametrize(
    ("given", "memory", "by_element", "chosen", "said"),
    [
        (size(VIT_S), 80 * GB, True, "ddp", "the state takes 0.40 GB of 80 GB on each of 8 devices"),
        (size(VIT_L), 24 * GB, True, "ddp", "5.48 GB of 24 GB"),
        (
            size(VIT_L),
            10 * GB,
            True,
            "zero1",
            "1.67 GB of 10 GB on each of 8 devices; ddp would take 5.48 GB, over 5.00",
        ),
        (size(VIT_L), 3 * GB, True, "zero2", "zero1 would take 1.67 GB"),
        (size(VIT_L), 2 * GB, True, "zero3", "0.61 GB"),
        (size(BILLION), 2 * GB, True, "zero3", "more than the 1.00 GB that would be comfortable"),
        (size(BILLION), 2 * GB, True, "zero3", "nothing but --parallel.offload takes more off it"),
        (size(VIT_L, world_size=1), 8 * GB, True, "ddp", "no other rank to share it with"),
        (size(VIT_L), 8 * GB, False, "ddp", "ZeRO cannot run this optimizer"),
        (size(VIT_L, offload=True), 80 * GB, True, "zero1", "1.22 GB"),
    ],
)
def test_the_first_that_fits_comfortably_is_chosen(given, memory, by_element, chosen, said):
    strategy, why = choose_strategy(given, memory, by_element)
    assert strategy == chosen
    assert said in why and why.startswith(f"strategy {chosen}: ") and "\n" not in why


def made(name: str) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """A model with BatchNorm, and its optimiser."""
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    return model, create_optimizer_v2(model, opt=name, lr=1e-3)


def resolve(name: str, **options):
    return resolve_strategy(made(name)[1], 8, ParallelConfig(**options), 2, False, torch.device("cpu"))


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("lamb", {"strategy": "zero1"}, "Lamb needs each tensor whole, and parallel.strategy zero1 flattens them"),
        ("muon", {"strategy": "zero3"}, "Muon needs each tensor whole"),
        ("lamb", {"offload": True}, "parallel.offload flattens them"),
        ("adafactor", {"strategy": "ddp"}, "the state of Adafactor cannot be checkpointed"),
        ("adamw", {"strategy": "zero3", "compile": True}, "parallel.compile and zero3"),
        ("adamw", {"strategy": "zero2", "precision": "fp16"}, "parallel.precision fp16"),
        ("adamw", {"strategy": "zero1"}, "bf16 with zero1: not for BatchNorm"),
        ("adamw", {"strategy": "ddp", "activation_checkpointing": True}, "Sequential has no blocks"),
    ],
)
def test_what_does_not_go_together_is_one_line(name, options, said):
    with pytest.raises(ValueError, match=said) as error:
        check_engine(*made(name), ParallelConfig(**options))
    assert "\n" not in str(error.value)


def test_a_named_strategy_is_taken_without_a_word():
    assert resolve("adamw", strategy="zero2") == ("zero2", None)
    assert resolve("sgd", strategy="zero3", precision="fp32") == ("zero3", None)
    check_engine(*made("adamw"), ParallelConfig(strategy="zero1", precision="fp32", compile=True))
    assert resolve("lamb", strategy="ddp", precision="fp16", compile=True) == ("ddp", None)
