"""benchmarks noise: the aims stand in its rows and beside what was measured, on the card that they were stated for."""

from __future__ import annotations

import json
import re

import pytest
import torch

from benchmarks import noise, noise_contestants, noise_step
from benchmarks.harness import Contestant, Row, Timing, summarise
from benchmarks.noise_aims import AIMS, CARD, DTYPE, MEGABYTES, Aim, aims_of, aims_table, judged, stated
from benchmarks.noise_contestants import Made

MARKS = {
    "environment": {"device": CARD},
    "conditions": {"device": "cuda", "dtype": DTYPE, "megabytes": float(MEGABYTES)},
}


def rows_of(part: str, seconds: dict[str, tuple[float, ...]]) -> list[Row]:
    contestants = [Contestant(name, lambda: 1, "") for name in seconds]
    timings = [Timing(name, turn, 100, own, own) for name, times in seconds.items() for turn, own in enumerate(times)]
    return summarise("noise", part, "elements", contestants, timings)


def kept(rows: list[Row]) -> list[dict]:
    return [json.loads(row.to_json(MARKS | stated(row.part, row.contestant, MARKS))) for row in rows]


def test_a_row_keeps_its_aims_and_they_are_judged_by_what_was_measured():
    seconds = {"eager": (4.2,) * 3, "torch.compile": (2.1,) * 3, "operator": (1.0, 1.0, 1.25), "copy": (0.8,) * 3}
    written = kept(rows_of("gaussian", seconds))
    assert [len(row.get("aims", ())) for row in written] == [0, 0, 3, 0]
    assert written[2]["aims"][0] == {"over": "copy", "quantity": "rate", "limit": 0.85}
    lines = aims_table([(Row.from_json(row), aims_of(row)) for row in written])
    assert {line[0] for line in lines} == {"gaussian"} and [line[1:] for line in lines] == [
        ["operator's rate over copy's", "0.800 (0.640 to 0.800)", "at least 0.85", "NOT met, by 5.9 %"],
        ["operator's rate over torch.compile's", "2.100 (1.680 to 2.100)", "at least 2.2", "NOT met, by 4.5 %"],
        ["operator's rate over eager's", "4.200 (3.360 to 4.200)", "at least 4", "met"],
    ]


@pytest.mark.parametrize(
    ("part", "plain", "own", "verdicts"),
    [
        ("norm_noise, gaussian", "LayerNorm alone", {"operator": 1.1}, ["met"]),
        ("norm_noise, optimal_q", "LayerNorm alone", {"operator": 1.21}, ["NOT met, by 10.0 %"]),
        ("model, forward and back", "none", {"gaussian": 1.004, "optimal_q": 1.0302}, ["met", "NOT met, by 2.0 %"]),
        ("norm_noise, gaussian, and back", "LayerNorm alone", {"operator": 9.0}, []),
        ("image_noise, gaussian", "copy", {"operator": 1 / 0.75}, ["met"]),
        ("circular_shift", "copy", {"operator": 1 / 0.89}, ["NOT met, by 1.1 %"]),
    ],
)
def test_of_a_time_the_aim_is_the_most(part, plain, own, verdicts):
    rows = kept(rows_of(part, {plain: (1.0, 1.0)} | {name: (seconds, seconds) for name, seconds in own.items()}))
    found = list(judged([(Row.from_json(row), aims_of(row)) for row in rows]))
    assert [one.verdict for one in found] == verdicts
    assert all(one.aim.over == plain and one.contestant in own for one in found)


def test_the_median_of_times_is_not_one_over_that_of_rates():
    """Of an even number of rounds."""
    rows = rows_of("model, forward and back", {"none": (1.0, 1.0), "gaussian": (1.0, 2.0)})
    (one,) = judged([(rows[0], ()), (rows[1], (Aim("none", "time", 1.01),))])
    assert one.measured == (1.5, 1.0, 2.0)


@pytest.mark.parametrize(
    ("environment", "conditions"),
    [
        ({"device": "NVIDIA H100 80GB HBM3"}, {}),
        ({"device": f"{CARD} MIG 1g.18gb"}, {}),
        ({}, {"device": "cpu"}),
        ({}, {"dtype": "float32"}),
        ({}, {"megabytes": 64.0}),
    ],
)
def test_elsewhere_no_aim_was_stated(environment, conditions):
    marks = {"environment": {"device": CARD} | environment, "conditions": MARKS["conditions"] | conditions}
    assert stated("gaussian", "operator", MARKS) and not stated("gaussian", "operator", marks)
    assert not stated("gaussian", "eager", MARKS) and not stated("salt_and_pepper", "operator", MARKS)


@pytest.mark.parametrize(
    "aims",
    [[{"over": "copy"}], ["copy"], [{"over": "copy", "quantity": "bytes", "limit": 1}], 7]
    + [[{"over": "copy", "quantity": "rate", "limit": limit}] for limit in (0, "much", True, float("nan"))],
)
def test_a_damaged_aim_is_refused(aims):
    with pytest.raises(ValueError, match=r"^aims: "):
        aims_of({"aims": aims})


def test_each_aim_is_of_a_part_and_contestants_that_there_are(monkeypatch):
    options = noise.NoiseOptions(megabytes=1, dtype=DTYPE)
    monkeypatch.setattr(noise_contestants, "compiled", lambda function: function)
    parts = {part.name: part for part in noise._parts(options, torch.device("cpu"))}
    for (part, contestant), aims in AIMS.items():
        if part.startswith("model"):
            assert contestant in noise_step.KINDS and {aim.over for aim in aims} == {"none"}
        else:
            names = {found.name for found in parts[part].contestants()}
            assert {contestant, *(aim.over for aim in aims)} <= names


def test_the_docstrings_aims_are_those_that_are_judged():
    words = " ".join((noise.__doc__ or "").split())
    for text, key, over in (
        ("gaussian_noise at least 85 % of a device copy", "gaussian", "copy"),
        ("at least 2.2 times torch.compile", "gaussian", "torch.compile"),
        ("At least 4 times eager torch", "gaussian", "eager"),
        ("linear_mix (circular_shift, optimal_q) at least 90 %", "circular_shift", "copy"),
        ("linear_mix (circular_shift, optimal_q) at least 90 %", "optimal_q", "copy"),
        ("image_noise at least 75 % of a copy", "image_noise, gaussian", "copy"),
    ):
        assert text in words
        number = float(re.findall(r"[\d.]+", text)[0])
        (limit,) = (aim.limit for aim in AIMS[key, "operator"] if aim.over == over)
        assert limit == (number / 100 if "%" in text else number)
    assert "at most 10 % more time than LayerNorm alone" in words and "at most 1 % of a compiled step" in words


def test_what_is_measured_on_the_aims_card_keeps_and_prints_them(capsys):
    """Without the card: a part whose work is nothing."""

    def contestants() -> list[Contestant]:
        made = Made(torch.zeros(8), torch.zeros(8), False)
        return [Contestant(name, lambda: 8, "", lambda: made) for name in ("eager", "operator", "copy")]

    part = noise.Part("optimal_q", (8,), contestants)
    rows = [json.loads(line) for line in noise._measure(part, 3, lambda text: None, dict(MARKS))]
    assert [row.get("aims") for row in rows] == [None, [{"over": "copy", "quantity": "rate", "limit": 0.9}], None]
    noise._print_aims(rows, torch.device("cuda"))
    text = capsys.readouterr().out
    assert "aims, set before a GPU was at hand" in text and "at least 0.9" in text and "met" in text
    others = [{name: value for name, value in row.items() if name != "aims"} for row in rows]
    noise._print_aims(others, torch.device("cuda"))
    assert capsys.readouterr().out == f"no aims here: they were stated for one {CARD}, {DTYPE}, 1,000 MB\n"
    noise._print_aims(others, torch.device("cpu"))
    assert capsys.readouterr().out == ""
