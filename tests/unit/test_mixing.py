"""Random erasing, Mixup and CutMix: timm's arithmetic and distributions, keyed by sample."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from timm.data import Mixup
from timm.data import mixup as timm_mixup
from timm.data.random_erasing import RandomErasing
from torch import Tensor

from pipeline.data.augment import AugmentConfig
from pipeline.data.mixing import cutmix_box, draw_erased, draw_pairs, erase, erased_box, mix, targets_of

SEED, EPOCH, CLASSES, SIDE = 1, 2, 5, 16
MIXUP = AugmentConfig(mixup_alpha=0.4)
CUTMIX = AugmentConfig(cutmix_alpha=1.0)
BOTH = AugmentConfig(mixup_alpha=0.8, cutmix_alpha=1.0, mixup_prob=0.8, switch_prob=0.5)
ALL = pytest.mark.parametrize("config", [MIXUP, CUTMIX, BOTH], ids=["mixup", "cutmix", "both"])


def inputs(n: int = 8, side: int = SIDE) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(n, 3, side, side + 4, generator=generator)
    return images, torch.randint(0, CLASSES, (n,), generator=generator), torch.randperm(1000, generator=generator)[:n]


def mixed(images: Tensor, labels: Tensor, ids: Tensor, config: AugmentConfig, seed=SEED, epoch=EPOCH, smoothing=0.1):
    return mix(images, labels, ids, seed, epoch, config, CLASSES, smoothing)


def pairs_of(config: AugmentConfig, n: int = 3000, size=(SIDE, SIDE), seed=SEED, epoch=EPOCH):
    return draw_pairs(torch.arange(n), seed, epoch, config, size)


# Targets


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_targets_are_timm_s_and_give_torch_s_smoothed_loss(smoothing):
    labels, logits = torch.tensor([0, 3, 3]), torch.randn(3, CLASSES)
    targets = targets_of(labels, CLASSES, smoothing)
    assert torch.allclose(targets, timm_mixup.mixup_target(labels, CLASSES, 1.0, smoothing), atol=1e-7)
    theirs = torch.nn.functional.cross_entropy(logits, labels, label_smoothing=smoothing)
    assert torch.nn.functional.cross_entropy(logits, targets).item() == pytest.approx(theirs.item(), rel=1e-6)


# Mixup and CutMix


@ALL
def test_a_pair_is_mixed_as_timm_mixes_it(config, monkeypatch):
    """timm's Mixup in mode `pair`, given the same shares and boxes, on the two pictures of each pair."""
    images, labels, ids = inputs(16)
    found, targets = mixed(images, labels, ids, config)
    pairs = draw_pairs(ids[0::2], SEED, EPOCH, config, images.shape[2:])
    assert len({pair.box is None for pair in pairs}) == (2 if config is BOTH else 1)
    for i, pair in enumerate(pairs):
        timm = Mixup(mixup_alpha=1.0, cutmix_alpha=1.0, mode="pair", label_smoothing=0.1, num_classes=CLASSES)
        drawn = np.array([pair.share], np.float32), np.array([pair.box is not None])
        monkeypatch.setattr(timm, "_params_per_elem", lambda size, drawn=drawn: drawn)
        monkeypatch.setattr(timm_mixup, "cutmix_bbox_and_lam", lambda *a, pair=pair, **k: (pair.box, pair.share))
        two = slice(2 * i, 2 * i + 2)
        wanted, wanted_targets = timm(images[two].clone(), labels[two])
        # Two float32 products and a sum of numbers of order 1.
        torch.testing.assert_close(found[two], wanted, rtol=0, atol=1e-6)
        torch.testing.assert_close(targets[two], wanted_targets, rtol=0, atol=1e-6)


def test_cutmix_takes_pixels_to_the_bit_and_counts_them():
    images, labels, ids = inputs()
    found, targets = mixed(images, labels, ids, CUTMIX, smoothing=0.0)
    for i in range(8):
        own, other = (found[i] == images[i]).all(0), (found[i] == images[i ^ 1]).all(0)
        assert (own ^ other).all() and other.any()
        share = own.float().mean().item()
        wanted = share * targets_of(labels[i : i + 1], CLASSES) + (1 - share) * targets_of(labels[[i ^ 1]], CLASSES)
        assert torch.allclose(targets[i], wanted[0], atol=1e-6)


@pytest.mark.parametrize("share", [0.0, 0.13, 0.5, 0.97, 1.0])
def test_the_box_is_timm_s_for_the_same_centre(share, monkeypatch):
    for row, column in ((0.3, 0.9), (1.0, 0.001), (0.5, 0.5)):
        size = (21, 34)
        centres = iter(min(int(draw * side), side - 1) for draw, side in zip((row, column), size, strict=True))
        monkeypatch.setattr(np.random, "randint", lambda *a, centres=centres, **k: next(centres))
        assert cutmix_box(share, row, column, size) == timm_mixup.rand_bbox((3, *size), share)


def test_shares_follow_the_beta_distribution():
    shares = [pair.share for pair in pairs_of(MIXUP)]
    assert stats.kstest(shares, stats.beta(0.4, 0.4).cdf).pvalue > 1e-3
    assert stats.kstest(shares, stats.beta(0.7, 0.7).cdf).pvalue < 1e-3


def test_pairs_are_distributed_as_timm_s():
    """Whether at all, by which, and what is left of a picture: with the corrected areas of cut boxes."""
    ours = pairs_of(BOTH, size=(32, 32))
    np.random.seed(0)
    timm = Mixup(0.8, 1.0, prob=0.8, switch_prob=0.5, mode="pair")
    shares, boxed = timm._params_per_elem(3000)
    corrected = [timm_mixup.cutmix_bbox_and_lam((3, 32, 32), share)[1] for share in shares[boxed & (shares < 1)]]
    untouched = sum(pair.box is None and pair.share == 1 for pair in ours) / 3000
    assert abs(untouched - 0.2) < 0.03 and abs(sum(pair.box is not None for pair in ours) / 3000 - 0.4) < 0.04
    assert stats.ks_2samp([pair.share for pair in ours if pair.box], corrected).pvalue > 1e-3
    by_mixup = [pair.share for pair in ours if pair.box is None and pair.share < 1]
    assert stats.ks_2samp(by_mixup, shares[~boxed & (shares < 1)]).pvalue > 1e-3


@pytest.mark.parametrize(("switch_prob", "boxes"), [(0.0, 0), (1.0, 200)])
def test_the_ends_of_the_switch(switch_prob, boxes):
    config = AugmentConfig(mixup_alpha=0.8, cutmix_alpha=1.0, switch_prob=switch_prob)
    assert sum(pair.box is not None for pair in pairs_of(config, 200)) == boxes
    never = AugmentConfig(mixup_alpha=0.8, cutmix_alpha=1.0, mixup_prob=0.0)
    assert all(pair.share == 1 and pair.box is None for pair in pairs_of(never, 200))


@ALL
def test_mixing_is_keyed_by_the_pair_s_first_sample(config):
    ids = inputs()[2]
    size = (SIDE, SIDE)
    drawn = draw_pairs(ids, SEED, EPOCH, config, size)
    assert draw_pairs(ids.flip(0), SEED, EPOCH, config, size) == drawn[::-1]
    for other in ((ids + 5000, SEED, EPOCH), (ids, SEED + 1, EPOCH), (ids, SEED, EPOCH + 1)):
        assert not set(draw_pairs(*other, config, size)) & {pair for pair in drawn if pair.share < 1}


@ALL
def test_mixing_split_over_ranks_is_the_whole(config):
    images, labels, ids = inputs()
    whole = mixed(images, labels, ids, config)
    for parts in (2, 4):
        split = zip(images.chunk(parts), labels.chunk(parts), ids.chunk(parts), strict=True)
        pieces = [mixed(*part, config) for part in split]
        for i in range(2):
            assert torch.equal(torch.cat([piece[i] for piece in pieces]), whole[i])


@ALL
def test_the_inputs_stay_as_they_are(config):
    images, labels, ids = inputs()
    before = images.clone()
    found, targets = mixed(images, labels, ids, config)
    assert torch.equal(images, before) and not torch.equal(found, images)
    assert targets.dtype == torch.float32 and torch.allclose(targets.sum(1), torch.ones(8))


def test_without_mixing_nothing_happens_to_the_pictures():
    images, labels, ids = inputs(7)  # no pairs are needed
    found, targets = mixed(images, labels, ids, AugmentConfig(), smoothing=0.1)
    assert found is images and torch.equal(targets, targets_of(labels, CLASSES, 0.1))
    with pytest.raises(AssertionError, match="cut a pair"):
        mixed(images, labels, ids, MIXUP)


# Never edit these: a run resumed by a later version must draw the same.
def test_mixing_golden_values():
    found = draw_pairs(torch.tensor([0, 7, 1281166, 1 << 32]), 7, 3, BOTH, (224, 224))
    assert [(round(pair.share, 6), pair.box) for pair in found] == [
        (0.401399, None),
        (0.60802, (75, 224, 0, 132)),
        (0.804668, (41, 140, 77, 176)),
        (0.55959, (97, 224, 0, 174)),
    ]


# Random erasing


ERASING = AugmentConfig(erasing=0.5)
FILLS = pytest.mark.parametrize("fill", ["const", "rand", "pixel"])


def test_erased_boxes_follow_timm_s_rule():
    """timm's RandomErasing with its draws replaced by ours gives the same box."""

    @settings(max_examples=100, deadline=None)
    @given(st.integers(1, 40), st.integers(1, 40), st.lists(st.floats(0.001, 0.999), min_size=40, max_size=40))
    def same(height: int, width: int, draws: list[float]) -> None:
        attempts = np.array(draws).reshape(10, 4)
        stream = iter(attempts)
        current: list[float] = []

        def uniform(low: float, high: float) -> float:
            if low == 0.02:
                current[:] = next(stream)
                return low + (high - low) * current[0]
            return low + (high - low) * current[1]

        ends = iter(())

        def randint(low: int, high: int) -> int:
            nonlocal ends
            draw = next(ends, None)
            if draw is None:
                ends = iter((current[3],))
                draw = current[2]
            return int(draw * (high + 1))

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(random, "random", lambda: 0.0)
            patch.setattr(random, "uniform", uniform)
            patch.setattr(random, "randint", randint)
            erased = RandomErasing(1.0, mode="const", device="cpu")(torch.ones(1, height, width))[0] == 0
        ours = torch.zeros(height, width, dtype=torch.bool)
        if (box := erased_box(attempts, (height, width))) is not None:
            ours[box.top : box.bottom, box.left : box.right] = True
        assert torch.equal(ours, erased)

    same()


def test_erasing_happens_with_its_probability_in_boxes_of_2_to_33_percent():
    boxes = draw_erased(torch.arange(4000), SEED, EPOCH, ERASING, (64, 64))
    assert abs(len(boxes) / 4000 - 0.5) < 5 * 0.5 / math.sqrt(4000)
    areas = [(box.bottom - box.top) * (box.right - box.left) / 64**2 for box in boxes.values()]
    assert 0.015 < min(areas) < 0.03 and 0.3 < max(areas) < 0.35
    assert len(draw_erased(torch.arange(50), SEED, EPOCH, AugmentConfig(erasing=1.0), (64, 64))) == 50


@FILLS
def test_erased_pictures_are_a_function_of_the_sample(fill):
    config = AugmentConfig(erasing=0.5, erasing_fill=fill)
    images, _, ids = inputs(12)
    whole = erase(images, ids, SEED, EPOCH, config)
    changed = (whole != images).flatten(1).any(1)
    assert 2 < changed.sum() < 11
    order = torch.randperm(12, generator=torch.Generator().manual_seed(3))
    assert torch.equal(erase(images[order], ids[order], SEED, EPOCH, config), whole[order])
    pieces = [erase(*part, SEED, EPOCH, config) for part in zip(images.split(5), ids.split(5), strict=True)]
    assert torch.equal(torch.cat(pieces), whole)
    for seed, epoch in ((SEED + 1, EPOCH), (SEED, EPOCH + 1)):
        assert not torch.equal(erase(images, ids, seed, epoch, config), whole)


@FILLS
def test_the_three_fills_are_timm_s(fill):
    images, _, ids = inputs(64, side=32)
    boxes = draw_erased(ids, SEED, EPOCH, ERASING, images.shape[2:])
    found = erase(images, ids, SEED, EPOCH, AugmentConfig(erasing=0.5, erasing_fill=fill))
    fills = []
    for row, box in boxes.items():
        inside = found[row, :, box.top : box.bottom, box.left : box.right]
        outside = torch.ones(images.shape[2:], dtype=torch.bool)
        outside[box.top : box.bottom, box.left : box.right] = False
        assert torch.equal(found[row][:, outside], images[row][:, outside])
        fills.append(inside.flatten(1))
    if fill == "const":
        assert all((values == 0).all() for values in fills)
    elif fill == "rand":
        assert all((values == values[:, :1]).all() for values in fills)
        fills = [values[:, 0] for values in fills]
    if fill != "const":
        assert stats.kstest(torch.cat([values.flatten() for values in fills]).numpy(), "norm").pvalue > 1e-3


def test_erasing_off_hands_the_pictures_on():
    images, _, ids = inputs()
    assert erase(images, ids, SEED, EPOCH, AugmentConfig()) is images


# Never edit these: a run resumed by a later version must draw the same.
def test_erasing_golden_values():
    found = draw_erased(torch.tensor([0, 7, 1281166, 1 << 32]), 7, 3, AugmentConfig(erasing=1.0), (224, 224))
    assert list(found.values()) == [(90, 192, 164, 209), (53, 147, 39, 214), (18, 160, 93, 160), (4, 124, 108, 213)]
