"""Augmentation: boxes that follow torchvision's rule, keyed by (seed, epoch, sample id) alone; timm's evaluation."""

import math
import random

import numpy as np
import pytest
import timm.data
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps
from scipy import stats
from torchvision.transforms import RandomResizedCrop

from pipeline.data.augment import (
    AugmentConfig,
    Crop,
    apply_colours,
    apply_training,
    evaluation_transform,
    training_crops,
)

PROPERTY = settings(max_examples=200, deadline=None)
SIDES = st.one_of(st.integers(1, 12), st.integers(1, 10_000))
TRIALS = 4000


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    coarse = np.random.RandomState(seed).randint(0, 256, (4, 5, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def crops(width: int, height: int, config: AugmentConfig, seed: int = 0, epoch: int = 0, n: int = TRIALS) -> list[Crop]:
    return training_crops([(width, height)] * n, np.arange(n), seed, epoch, config)


# Boxes


@PROPERTY
@given(
    SIDES,
    SIDES,
    st.floats(0.001, 1),
    st.floats(0.001, 1),
    st.floats(0.05, 20),
    st.floats(1, 20),
    st.integers(0, 2**40),
    st.integers(0, 9),
)
@example(1, 1, 0.08, 1.0, 3 / 4, 16 / 9, 0, 0)
@example(1, 10_000, 0.08, 1.0, 3 / 4, 16 / 9, 0, 0)
@example(10_000, 1, 0.08, 1.0, 3 / 4, 16 / 9, 0, 0)
@example(100, 1, 0.08, 1.0, 0.05, 2.0, 0, 0)  # only ratios far below 0.5: the width rounds to 0
def test_boxes_lie_inside_the_picture(width, height, one, other, low_ratio, spread, sample_id, epoch):
    config = AugmentConfig(scale=(min(one, other), max(one, other)), ratio=(low_ratio, low_ratio * spread))
    (crop,) = training_crops([(width, height)], np.array([sample_id]), 0, epoch, config)
    check_inside(crop, width, height)


def check_inside(crop: Crop, width: int, height: int) -> None:
    assert crop.width >= 1 and crop.height >= 1
    assert crop.left >= 0 and crop.left + crop.width <= width
    assert crop.top >= 0 and crop.top + crop.height <= height


def torchvision_boxes(width: int, height: int, config: AugmentConfig) -> list[tuple[int, int, int, int]]:
    """(left, top, width, height) of torchvision's own draws."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        image = Image.new("RGB", (width, height))
        draws = [RandomResizedCrop.get_params(image, list(config.scale), list(config.ratio)) for _ in range(TRIALS)]
    return [(left, top, w, h) for top, left, h, w in draws]


def measures(boxes: list[tuple[int, ...]], width: int, height: int) -> dict[str, np.ndarray]:
    left, top, w, h = np.array([box[:4] for box in boxes]).T
    # A box as wide as the picture has no place to choose.
    free_x, free_y = width - w > 20, height - h > 20
    return {
        "area": w * h / (width * height),
        "log ratio": np.log(w / h),
        "left": (left / np.maximum(width - w, 1))[free_x],
        "top": (top / np.maximum(height - h, 1))[free_y],
    }


# The last picture is so long that most draws find no box in ten attempts and take the largest central one.
@pytest.mark.parametrize(("width", "height"), [(500, 375), (375, 500), (900, 120)])
def test_boxes_are_distributed_as_torchvision_s(width, height):
    config = AugmentConfig()
    theirs = measures(torchvision_boxes(width, height, config), width, height)
    ours = measures(crops(width, height, config), width, height)
    for name in theirs:
        if min(len(ours[name]), len(theirs[name])) > 100:
            assert stats.ks_2samp(ours[name], theirs[name]).pvalue > 1e-3, name  # fixed draws: no chance at run time


def test_the_comparison_with_torchvision_can_fail():
    theirs = measures(torchvision_boxes(500, 375, AugmentConfig()), 500, 375)
    others = {"area": {"scale": (0.12, 1.0)}, "log ratio": {"ratio": (0.7, 4 / 3)}}
    for name, changed in others.items():
        ours = measures(crops(500, 375, AugmentConfig(**changed)), 500, 375)
        assert stats.ks_2samp(ours[name], theirs[name]).pvalue < 1e-6, name


def test_places_reach_both_edges():
    config = AugmentConfig(scale=(0.5, 0.5), ratio=(1.0, 1.0))
    boxes = crops(24, 24, config)  # 17 x 17: 8 places each way
    for places in ([b.left for b in boxes], [b.top for b in boxes]):
        counts = np.bincount(places, minlength=8)
        assert len(counts) == 8
        # Each place has a chance of 1/8: 500 of 4,000, with a standard error of 21.
        assert np.abs(counts - 500).max() < 5 * 21


@pytest.mark.parametrize(("size", "box"), [((1000, 10), (493, 0, 13, 10)), ((10, 1000), (0, 493, 10, 13))])
def test_the_fallback_is_the_largest_central_box(size, box):
    """torchvision's: 10 x 4/3 = 13.3 -> 13 pixels, in the middle."""
    config = AugmentConfig(scale=(1.0, 1.0))  # the whole area never fits an allowed ratio
    assert all(crop[:4] == box for crop in crops(*size, config, n=20))


def test_boxes_are_keyed_by_sample_id_alone():
    config = AugmentConfig()
    rng = np.random.RandomState(0)
    ids = np.array([5, 2, 99, 1 << 35, 0, 7])
    sizes = [(int(w), int(h)) for w, h in rng.randint(30, 600, (6, 2))]
    whole = training_crops(sizes, ids, 3, 4, config)
    order = rng.permutation(6)
    assert training_crops([sizes[i] for i in order], ids[order], 3, 4, config) == [whole[i] for i in order]
    for i in range(6):
        assert training_crops(sizes[i : i + 1], ids[i : i + 1], 3, 4, config) == whole[i : i + 1]


def test_boxes_differ_by_sample_epoch_and_seed():
    config = AugmentConfig()
    base = crops(500, 375, config, n=50)
    assert len(set(base)) == 50
    for other in (crops(500, 375, config, seed=1, n=50), crops(500, 375, config, epoch=1, n=50)):
        assert not set(base) & set(other)


# Never edit these: every reader, and a run resumed by a later version, must draw the same boxes.
def test_boxes_golden_values():
    found = training_crops([(500, 375)] * 4, np.array([0, 1, 1281166, 1 << 32]), 7, 3, AugmentConfig())
    assert [tuple(crop) for crop in found] == [
        (210, 98, 270, 215, True),
        (77, 102, 341, 268, False),
        (73, 30, 379, 324, False),
        (107, 44, 217, 224, False),
    ]


@pytest.mark.parametrize("probability", [0.0, 0.25, 0.5, 1.0])
def test_flips(probability):
    flips = np.array([crop.flip for crop in crops(64, 64, AugmentConfig(flip=probability))])
    error = math.sqrt(probability * (1 - probability) / TRIALS)
    assert abs(flips.mean() - probability) <= 5 * error  # 0 and 1 exactly


def test_flips_have_nothing_to_do_with_the_box():
    found = crops(500, 375, AugmentConfig())
    lefts = {flip: [c.left for c in found if c.flip == flip] for flip in (True, False)}
    assert stats.ks_2samp(lefts[True], lefts[False]).pvalue > 1e-3


# Pixels


def test_a_box_of_the_output_s_size_is_cut_out_to_the_bit():
    image = picture(60, 50)
    pixels = np.asarray(image)[9 : 9 + 32, 5 : 5 + 32]
    for interpolation in ("bilinear", "bicubic"):
        config = AugmentConfig(interpolation=interpolation)
        assert np.array_equal(apply_training(image, Crop(5, 9, 32, 32, False), 32, config), pixels)
        assert np.array_equal(apply_training(image, Crop(5, 9, 32, 32, True), 32, config), pixels[:, ::-1])


def test_resizing_is_pillow_s_with_antialiasing():
    image = picture(300, 200)
    for name, resampling in (("bilinear", Image.Resampling.BILINEAR), ("bicubic", Image.Resampling.BICUBIC)):
        found = apply_training(image, Crop(0, 0, 300, 200, False), 24, AugmentConfig(interpolation=name))
        assert np.array_equal(found, image.resize((24, 24), resampling))


RANDAUGMENT = AugmentConfig(randaugment="rand-m9-mstd0.5-inc1")
COLOURS = pytest.mark.parametrize(
    "config",
    [RANDAUGMENT, AugmentConfig(three_augment=True, color_jitter=0.3), AugmentConfig(color_jitter=0.4)],
    ids=["randaugment", "3-augment", "jitter"],
)


@COLOURS
def test_colours_are_reproducible_and_differ_by_key(config):
    image = picture(32, 32)
    first = [np.asarray(apply_colours(image, i, 0, 0, config)) for i in range(12)]
    random.seed(99)
    np.random.seed(99)
    torch.manual_seed(99)
    for i in reversed(range(12)):
        assert np.array_equal(apply_colours(image, i, 0, 0, config), first[i])
    assert len({pixels.tobytes() for pixels in first}) > 8  # some draw the identity
    for seed, epoch in ((1, 0), (0, 1)):
        other = [np.asarray(apply_colours(image, i, seed, epoch, config)) for i in range(12)]
        assert sum(not np.array_equal(a, b) for a, b in zip(first, other, strict=True)) > 8


def test_three_augment_is_grey_solarised_or_blurred():
    """timm's policy `3a`, each of the three about as often."""
    image, config = picture(32, 32), AugmentConfig(three_augment=True)
    pixels, solarised = np.asarray(image), np.asarray(ImageOps.solarize(image, 128))
    counts = dict.fromkeys(("grey", "solarised", "blurred"), 0)

    def roughness(of: np.ndarray) -> int:
        return np.abs(np.diff(of.astype(int), axis=0)).sum()

    for i in range(300):
        found = np.asarray(apply_colours(image, i, 0, 0, config))
        if (found == found[..., :1]).all():
            counts["grey"] += 1
        elif np.array_equal(found, solarised):
            counts["solarised"] += 1
        else:
            assert roughness(found) <= roughness(pixels)
            counts["blurred"] += 1
    assert all(70 < count < 130 for count in counts.values()), counts  # 100 expected, a standard error of 8


def test_colour_jitter_stays_within_its_share():
    """A grey picture's brightness alone changes: contrast and saturation leave a plain grey as it is."""
    grey = Image.new("RGB", (8, 8), (100, 100, 100))
    levels = [np.asarray(apply_colours(grey, i, 0, 0, AugmentConfig(color_jitter=0.3))).mean() for i in range(200)]
    assert 69 <= min(levels) < 75 and 125 < max(levels) <= 131


@COLOURS
def test_colours_leave_the_global_generators_as_they_were(config):
    def states() -> tuple:
        return random.getstate(), [np.array(part) for part in np.random.get_state()], torch.get_rng_state().tolist()

    before = states()
    apply_colours(picture(32, 32), 5, 0, 0, config)
    after = states()
    assert before[0] == after[0] and before[2] == after[2]
    assert all(np.array_equal(a, b) for a, b in zip(before[1], after[1], strict=True))
    with pytest.raises(AttributeError):
        apply_colours(None, 5, 0, 0, config)
    assert random.getstate() == before[0]


@COLOURS
def test_what_changes_colours_is_training_s(config):
    image, evaluation = picture(32, 32), config.for_evaluation()
    assert config.changes_colours and not evaluation.changes_colours
    assert apply_colours(image, 5, 0, 0, evaluation) is image
    assert evaluation_transform(evaluation, 24)(image).shape == (3, 24, 24)


@pytest.mark.parametrize("size", [(80, 60), (60, 81), (32, 32), (20, 200)])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"interpolation": "bilinear", "eval_crop_share": 0.875},
        {"eval_crop": "squash"},
        {"eval_crop_share": 1.0},
    ],
    ids=str,
)
def test_evaluation_is_timm_s_own(options, size):
    """timm's evaluation transform with its normalising undone gives the same pixels, to the bit."""
    config, image = AugmentConfig(**options), picture(*size)
    ours = np.asarray(evaluation_transform(config, 32)(image))
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    squash = config.eval_crop == "squash"
    theirs = timm.data.create_transform(
        input_size=(3, 32, 32),
        interpolation=config.interpolation,
        mean=mean,
        std=std,
        crop_pct=1.0 if squash else config.eval_crop_share,
        crop_mode=config.eval_crop,
    )(image)
    undone = (theirs * torch.tensor(std)[:, None, None] + torch.tensor(mean)[:, None, None]) * 255
    assert ours.dtype == np.uint8 and ours.shape == (3, 32, 32)
    assert np.array_equal(ours, undone.round().byte().numpy())


def test_squash_shows_the_whole_picture():
    image = picture(80, 40)
    found = np.asarray(evaluation_transform(AugmentConfig(eval_crop="squash"), 32)(image)).transpose(1, 2, 0)
    assert np.array_equal(found, image.resize((32, 32), Image.Resampling.BICUBIC))


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"scale": (0.0, 1.0)}, "augment.scale"),
        ({"scale": (0.5, 0.4)}, "augment.scale"),
        ({"scale": (0.5, 1.1)}, "augment.scale"),
        ({"ratio": (0.0, 1.0)}, "augment.ratio"),
        ({"ratio": (2.0, 1.0)}, "augment.ratio"),
        ({"flip": -0.1}, "augment.flip"),
        ({"flip": 1.1}, "augment.flip"),
        ({"randaugment": "rand-m9", "three_augment": True}, "augment.randaugment and augment.three_augment"),
        ({"color_jitter": -0.1}, "augment.color_jitter"),
        ({"erasing": 1.1}, "augment.erasing"),
        ({"mixup_prob": -0.1}, "augment.mixup_prob"),
        ({"switch_prob": math.nan}, "augment.switch_prob"),
        ({"cutmix_alpha": math.inf}, "augment.cutmix_alpha"),
        ({"mixup_alpha": -1.0}, "augment.mixup_alpha"),
        ({"mixup_alpha": math.nan}, "augment.mixup_alpha"),
        ({"eval_crop_share": 0.0}, "augment.eval_crop_share"),
        ({"eval_crop_share": 1.5}, "augment.eval_crop_share"),
    ],
    ids=str,
)
def test_out_of_range_options_are_refused_by_name(options, name):
    with pytest.raises(ValueError, match=name):
        AugmentConfig(**options)
