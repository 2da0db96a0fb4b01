"""Several sites in one model: which modules a pattern means, which of them is noisy in a step, and how strongly."""

import copy

import pytest
import torch

from pipeline.noise.config import NoiseConfig
from pipeline.noise.inject import NoiseInjector, check_site
from tests.unit.test_noise_inject import GAUSSIAN, IDS, SEED, inject, input_of, pictures, swin, vit


def test_names_and_patterns_mean_modules_in_the_model_s_order():
    model = vit(depth=4)

    def names(site: str) -> list[str]:
        return [place.name for place in inject(model, site).sites]

    assert names("blocks.*") == ["blocks.0", "blocks.1", "blocks.2", "blocks.3"]
    assert names("blocks.*.attn") == [f"blocks.{i}.attn" for i in range(4)]
    assert names("blocks.3.attn, blocks.1") == ["blocks.1", "blocks.3.attn"]
    for site, nearest in (("block.*.attn", r"blocks\.\d\.attn"), ("blocks.1,blocks.9", r"'blocks\.9' is no module")):
        with pytest.raises(ValueError, match=nearest):
            inject(model, site)


def test_a_pattern_passes_over_windows_and_takes_the_rest():
    model = swin()
    with pytest.raises(ValueError, match="fits no module"):
        check_site(model, "layers.*.blocks.*.attn", 64)
    config = NoiseConfig(site="layers.*.blocks.*", during="eval", **GAUSSIAN)
    assert len(NoiseInjector(model, config, 64, SEED).sites) == 4


def test_each_of_several_sites_draws_noise_of_its_own():
    model, x = vit(), pictures()
    clean = {site: input_of(model, site, x) for site in ("blocks.0", "blocks.1")}
    inject(model, "blocks.*")
    first = input_of(model, "blocks.0", x) - clean["blocks.0"]
    model = vit()
    inject(model, "blocks.1")
    second = input_of(model, "blocks.1", x) - clean["blocks.1"]
    assert not torch.isclose(first[:, 1:], second[:, 1:], atol=1e-4).float().mean() > 0.01


def test_two_sites_of_one_stream_are_refused(monkeypatch):
    monkeypatch.setattr("pipeline.noise.inject.noise_stream", lambda config: 5)
    with pytest.raises(ValueError, match=r"'blocks\.1' would draw the noise of 'blocks\.0'"):
        inject(vit(), "blocks.*")


def picked(injector: NoiseInjector, epoch: int, step: int) -> list[bool]:
    injector.set_batch(IDS, epoch, step)
    return [bool(place.strength != 0) for place in injector.sites]


def picked_in_evaluation(injector: NoiseInjector, epoch: int, step: int) -> list[bool]:
    injector.set_batch(IDS, epoch, step)
    return [bool(place.evaluation_strength != 0) for place in injector.sites]


def test_a_random_one_is_drawn_by_seed_epoch_and_step_alone():
    model = vit(depth=6).train()
    one, other = (inject(model, "blocks.*", during="train", pick="random_one", **GAUSSIAN) for _ in range(2))
    counts = torch.zeros(6)
    for step in range(600):
        found = picked(one, 1, step)
        assert sum(found) == 1
        other.set_batch(IDS[:1] + 5, 1, step)  # another rank, with other samples
        assert found == [bool(place.strength != 0) for place in other.sites]
        counts += torch.tensor(found)
    assert (counts - 100).abs().max() < 46  # 5 standard deviations of a count of 600 draws at 1/6
    epochs = [picked(one, epoch, 7) for epoch in range(40)]
    assert len({tuple(found) for found in epochs}) > 3
    # An evaluation's answer does not change with the batch.
    assert picked_in_evaluation(one, 3, 0) == picked_in_evaluation(one, 5, 9)


def test_only_the_picked_site_is_noisy():
    model, x = vit(depth=3), pictures()
    clean = {f"blocks.{i}": input_of(model, f"blocks.{i}", x) for i in range(3)}
    injector = inject(model, "blocks.*", pick="random_one", **GAUSSIAN)
    chosen = picked_in_evaluation(injector, 0, 0).index(True)
    for i in range(3):
        assert torch.equal(input_of(model, f"blocks.{i}", x), clean[f"blocks.{i}"]) == (i < chosen)


@pytest.mark.parametrize(("ramp", "middle"), [("linear", 0.5), ("cosine", 0.5)])
def test_strength_goes_its_way_and_evaluation_has_the_last_one(ramp, middle):
    model = vit().train()
    options = {"kind": "gaussian", "strength": 1.0, "end_strength": 0.0, "ramp": ramp}
    injector = inject(model, "blocks.0", during="both", **options)
    levels = []
    for progress in (0.0, 0.25, 0.5, 1.0):
        injector.set_batch(IDS, 0, 0, progress)
        levels.append(injector.sites[0].strength.item())
    assert levels == pytest.approx([1.0, 0.75 if ramp == "linear" else 0.85355339, middle, 0.0])
    injector.set_batch(IDS, 0)
    assert injector.sites[0].evaluation_strength == 0


class Fills(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts what is filled in."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten.fill_.Scalar
        return func(*args, **(kwargs or {}))


def test_levels_and_epochs_are_filled_in_where_they_change():
    model = vit().train()
    injector = inject(model, "blocks.*", during="both", kind="gaussian", strength=1.0, end_strength=0.0)
    sites = len(injector.sites)
    for epoch, progress, expected in (
        (3, 0.0, 0),
        (4, 0.0, 1),
        (4, 0.5, 2 * sites),
        (4, 0.5, 0),
        (0, 0.0, 1 + 2 * sites),
    ):
        with Fills() as fills:
            injector.set_batch(IDS, epoch, progress=progress)
        assert fills.count == expected, (epoch, progress)
        assert {site.strength.item() for site in injector.sites} == {1.0 - progress}
    twin = copy.deepcopy(injector)
    twin.set_batch(IDS, 0, progress=0.25)
    assert {site.strength.item() for site in twin.sites} == {0.75}
    assert {site.strength.item() for site in injector.sites} == {1.0}
