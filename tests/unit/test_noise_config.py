"""NoiseConfig: what is out of range is refused by the option's name; when noise acts; what a micro-batch must hold."""

import math

import pytest

from pipeline.noise.config import NoiseConfig

REFUSED = [
    ({"kind": "gaussian"}, "noise.strength is missing"),
    ({"kind": "salt_and_pepper"}, "noise.strength is missing"),
    ({"kind": "circular_shift"}, "noise.strength is missing"),
    ({"kind": "gaussian", "strength": -0.1}, "noise.strength is -0.1"),
    ({"kind": "gaussian", "strength": math.inf}, "noise.strength is infinite"),
    ({"kind": "gaussian", "strength": math.nan}, "noise.strength is nan"),
    ({"kind": "salt_and_pepper", "strength": -0.01}, "noise.strength"),
    ({"kind": "salt_and_pepper", "strength": 1.01}, "noise.strength"),
    ({"kind": "circular_shift", "strength": -0.1}, "noise.strength"),
    ({"kind": "circular_shift", "strength": 0.5}, "noise.strength"),
    ({"kind": "optimal_q", "strength": 0.3}, "noise.strength is 0.3, but optimal_q takes none"),
    ({"kind": "none", "strength": 0.3}, "noise.strength is 0.3, but none takes none"),
    ({"kind": "optimal_q", "group_size": 0}, "noise.group_size is 0"),
    ({"kind": "optimal_q", "group_size": -2}, "noise.group_size is -2"),
    ({"kind": "gaussian", "strength": 0.1, "detach": True}, "noise.detach"),
    ({"kind": "salt_and_pepper", "strength": 0.1, "detach": True}, "noise.detach"),
    ({"kind": "uniform"}, "noise.kind is 'uniform'"),
    ({"kind": "optimal_q", "during": "training"}, "noise.during is 'training'"),
    ({"kind": "gaussian", "strength": 0.1, "end_strength": -1.0}, "noise.end_strength is -1.0"),
    ({"kind": "optimal_q", "end_strength": 0.1}, "noise.end_strength is 0.1, but optimal_q takes none"),
    ({"kind": "gaussian", "strength": 0.1, "ramp": "step"}, "noise.ramp is 'step'"),
    ({"kind": "optimal_q", "pick": "any"}, "noise.pick is 'any'"),
    ({"kind": "optimal_q", "pick": "random_one", "site": "blocks.3"}, "noise.site 'blocks.3' is one place"),
    ({"kind": "optimal_q", "site": "image,blocks.3"}, "image cannot stand beside modules"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED, ids=[str(o) for o, _ in REFUSED])
def test_out_of_range_options_are_refused_by_name(options, message):
    with pytest.raises(ValueError) as error:
        NoiseConfig(**options)
    assert message in str(error.value)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"kind": "gaussian", "strength": 0},
        {"kind": "gaussian", "strength": 1e6},
        {"kind": "salt_and_pepper", "strength": 0.0},
        {"kind": "salt_and_pepper", "strength": 1.0},
        {"kind": "circular_shift", "strength": 0.0, "detach": True},
        {"kind": "circular_shift", "strength": math.nextafter(0.5, 0)},
        {"kind": "optimal_q", "group_size": 1, "detach": True},
        {"kind": "optimal_q", "group_size": None},
    ],
    ids=str,
)
def test_the_edges_of_the_ranges_are_accepted(options):
    NoiseConfig(**options)


@pytest.mark.parametrize(
    ("kind", "during", "training", "evaluating"),
    [
        ("optimal_q", "train", True, False),
        ("optimal_q", "eval", False, True),
        ("optimal_q", "both", True, True),
        ("none", "train", False, False),
        ("none", "eval", False, False),
        ("none", "both", False, False),
    ],
)
def test_when_noise_acts(kind, during, training, evaluating):
    config = NoiseConfig(kind=kind, during=during)
    assert (config.active(training=True), config.active(training=False)) == (training, evaluating)


@pytest.mark.parametrize(
    ("options", "mixes"),
    [
        ({"kind": "none"}, False),
        ({"kind": "gaussian", "strength": 1.0}, False),
        ({"kind": "optimal_q"}, True),
        ({"kind": "optimal_q", "group_size": None}, True),
        ({"kind": "optimal_q", "group_size": 1}, False),
        ({"kind": "circular_shift", "strength": 0.3}, True),
        ({"kind": "salt_and_pepper", "strength": 0.3, "site": "blocks.1"}, True),  # by the extremes of its group
        ({"kind": "salt_and_pepper", "strength": 0.3}, False),  # white and black
        ({"kind": "salt_and_pepper", "strength": 0.3, "group_size": 1}, False),
    ],
    ids=str,
)
def test_which_noises_mix_samples(options, mixes):
    assert NoiseConfig(**options).mixes_samples == mixes


def test_describe_says_what_a_reader_must_know():
    text = NoiseConfig(kind="circular_shift", strength=0.3, site="blocks.11.attn", during="eval").describe()
    for part in ("circular_shift", "0.3", "blocks.11.attn", "k = 8", "eval", "prefix tokens spared"):
        assert part in text
    assert NoiseConfig().describe() == "none"
    assert "k = micro-batch" in NoiseConfig(kind="optimal_q", group_size=None).describe()
    assert "all tokens" in NoiseConfig(kind="optimal_q", site="blocks.0", spare_prefix_tokens=False).describe()
    assert "tokens" not in NoiseConfig(kind="optimal_q").describe()  # an image has none
