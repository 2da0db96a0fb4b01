"""The engine in one process: states made ahead, averages, shares, and DDP's step at each precision."""

import math

import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3
from torch.nn import functional

from pipeline.data.order import Layout
from pipeline.engine import create_engine
from pipeline.engine.ema import Ema, decay_at
from pipeline.engine.states import by_element, create_states, set_step_count, step_count
from pipeline.engine.stretches import even_share
from pipeline.parallel import ParallelConfig

OPTIMIZERS = {"adamw": {}, "sgd": {"momentum": 0.9}, "lamb": {}, "muon": {}}


def small_vit() -> torch.nn.Module:
    torch.manual_seed(0)
    sizes = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "num_heads": 3, "depth": 2}
    return timm.create_model("vit_tiny_patch16_224", num_classes=5, **sizes)


def optimizer_of(model: torch.nn.Module, name: str = "adamw") -> torch.optim.Optimizer:
    return create_optimizer_v2(model, opt=name, lr=1e-2, weight_decay=0.05, **OPTIMIZERS[name])


def engine_of(model: torch.nn.Module, accumulation=1, clip=1.0, ema=0.9, optimizer="adamw", **options):
    config = ParallelConfig(**{"strategy": "ddp", "precision": "fp32"} | options)
    layout = Layout(0, 1, 8 // accumulation, accumulation)
    return create_engine(model, optimizer_of(model, optimizer), config, layout, clip, ema)


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(8, 3, 16, 16, generator=generator), torch.randint(0, 5, (8,), generator=generator)


def train(
    engine, steps: range, accumulation: int = 1, times: float = 1.0, plus: float = 0.0
) -> list[tuple[float, bool, float]]:
    engine.module.train()
    found = []
    for step in steps:
        parts = [part.chunk(accumulation) for part in batch(step)]
        losses = []
        for index, (x, y) in enumerate(zip(*parts, strict=True)):
            loss = functional.cross_entropy(engine.module(x).float(), y) * times + plus
            engine.backward(loss, last=index == accumulation - 1)
            losses.append(loss.item() / accumulation)
        found.append((sum(losses), *engine.step()))
    return found


def state_of(engine) -> list[dict[str, torch.Tensor]]:
    return [{kind: tensor.clone() for kind, tensor in piece.tensors.items()} for piece in engine.pieces()]


def same(first, second) -> bool:
    return all(torch.equal(a[kind], b[kind]) for a, b in zip(first, second, strict=True) for kind in a | b)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_states_made_ahead_change_nothing(name):
    models = [small_vit(), small_vit()]
    optimizers = [optimizer_of(model, name) for model in models]
    options = [{key: value for key, value in group.items() if key != "params"} for group in optimizers[0].param_groups]
    create_states(optimizers[0], [list(group["params"]) for group in optimizers[0].param_groups])
    assert all(torch.equal(a, b) for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True))
    assert options == [
        {key: group[key] for key in before} for group, before in zip(optimizers[0].param_groups, options, strict=True)
    ]
    for parameter in models[0].parameters():
        states = by_element(optimizers[0], parameter)
        assert states and not any(state.any() for state in states.values())
    for step in range(3):
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad()
            x, y = batch(step)
            functional.cross_entropy(model(x), y).backward()
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True))
    assert step_count(optimizers[0]) == (0 if name == "sgd" else 3)
    set_step_count(optimizers[0], 7)
    assert step_count(optimizers[0]) == (0 if name == "sgd" else 7)


def test_the_average_is_timm_s():
    model = small_vit()
    named = [(name, value) for name, value in model.named_parameters()]
    peer = ModelEmaV3(model, decay=0.7, use_warmup=True, foreach=False)
    ema = Ema(0.7, even_share(named, 0, 1))
    for update in range(1, 8):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
        assert decay_at(update, 0.7) == pytest.approx(peer.get_decay(update), abs=1e-15)
        peer.update(model, step=update)
        ema.update()
    for average, expected in zip(ema.averages, peer.module.parameters(), strict=True):
        torch.testing.assert_close(average, expected.flatten(), rtol=1e-6, atol=1e-6)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=8), st.integers(1, 9))
def test_shares_hold_each_element_once(sizes, world_size):
    parameters = [(str(index), torch.zeros(count)) for index, count in enumerate(sizes)]
    for rank in range(world_size):
        share = even_share(parameters, rank, world_size)
        assert sum(stretch.length for stretch in share) <= -(-sum(sizes) // world_size)
        for stretch in share:
            stretch.of(stretch.owner).add_(1)
    assert all((tensor == 1).all() for _, tensor in parameters)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_filling_pieces_goes_on_to_the_bit(precision):
    engine = engine_of(small_vit(), precision=precision)
    train(engine, range(3))
    saved, scalars = state_of(engine), engine.scalars()
    assert scalars["optimizer_steps"] == scalars["ema_updates"] == 3
    expected = train(engine, range(3, 6))
    other = engine_of(small_vit(), precision=precision)
    for piece, tensors in zip(other.pieces(), saved, strict=True):
        for kind, tensor in tensors.items():
            piece.tensors[kind].copy_(tensor)
    other.load_scalars(scalars)
    other.loaded()
    assert train(other, range(3, 6)) == expected
    assert same(state_of(engine), state_of(other)) and engine.scalars() == other.scalars()
    weights, average = engine.full_weights(), engine.full_weights("ema")
    assert list(weights) == list(average) == list(small_vit().state_dict())
    assert all(value.dtype == torch.float32 for value in weights.values())


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("spoilt", [{"times": math.nan}, {"plus": math.inf}])
def test_a_bad_step_changes_nothing_but_the_scale(precision, spoilt):
    engine = engine_of(small_vit(), precision=precision)
    train(engine, range(2))
    before, scalars = state_of(engine), engine.scalars()
    ((_, applied, norm),) = train(engine, range(2, 3), **spoilt)
    assert not applied and math.isnan(norm)
    assert same(before, state_of(engine))
    if precision == "fp16":
        assert engine.scalars()["loss_scale"] == scalars["loss_scale"] / 2
        scalars |= {"loss_scale": scalars["loss_scale"] / 2, "loss_scale_good_steps": 0}
    assert engine.scalars() == scalars
    assert train(engine, range(2, 3))[0][1]
    assert not same(before, state_of(engine))


def test_accumulation_is_the_mean_and_clipping_bounds_the_step():
    whole, parts = engine_of(small_vit()), engine_of(small_vit(), accumulation=4)
    for one, four in zip(train(whole, range(5)), train(parts, range(5), accumulation=4), strict=True):
        assert one[0] == pytest.approx(four[0], abs=1e-5) and one[2] == pytest.approx(four[2], rel=1e-3)
    free, clipped = (engine_of(small_vit(), clip=clip, optimizer="sgd") for clip in (None, 1e-3))
    norms = [train(engine, range(1))[0][2] for engine in (free, clipped)]
    assert norms[0] == norms[1] > 1  # the norm is that before clipping
    start = small_vit().state_dict()
    moved = [
        math.sqrt(sum(float((value - start[name]).square().sum()) for name, value in engine.full_weights().items()))
        for engine in (free, clipped)
    ]
    assert moved[1] < 0.05 * moved[0]


def test_frozen_parameters_and_buffers_are_no_pieces():
    model = timm.create_model("resnet18", num_classes=5)
    model.conv1.weight.requires_grad_(False)
    frozen = model.conv1.weight.clone()
    engine = engine_of(model, precision="bf16")
    train(engine, range(2))
    names = {piece.name for piece in engine.pieces()}
    assert names | set(engine.buffers()) == set(model.state_dict()) and not names & set(engine.buffers())
    assert "conv1.weight" in engine.buffers() and "bn1.running_mean" in engine.buffers()
    assert torch.equal(engine.full_weights()["conv1.weight"], frozen)
    assert engine.full_weights("ema")["bn1.num_batches_tracked"] == 2


def test_what_a_model_cannot_do_is_one_line():
    model = torch.nn.Linear(3, 2)
    with pytest.raises(ValueError, match=r"parallel.activation_checkpointing: Linear has no blocks"):
        engine_of(model, activation_checkpointing=True)
    with pytest.raises(ValueError, match=r"parallel.strategy is zero1, and no launcher"):
        engine_of(model, strategy="zero1")
    with pytest.raises(ValueError, match="the state has no 'ema'"):
        engine_of(small_vit(), ema=None).full_weights("ema")


def test_checkpointed_activations_give_the_same_step():
    plain, again = engine_of(small_vit()), engine_of(small_vit(), activation_checkpointing=True)
    assert train(plain, range(3)) == train(again, range(3))
    assert again.scalars() == plain.scalars()
