"""Goodput: Daly's and Young's formulas in their limits, and options that cannot be."""

import math

import pytest

from benchmarks.goodput import GoodputOptions, expected_goodput, measure_goodput, young_interval


def test_without_failures_only_checkpoints_cost():
    assert expected_goodput(interval=90, checkpoint=10, start=5, between_failures=1e9) == pytest.approx(0.9, abs=1e-6)


def test_a_failure_costs_a_start_and_half_an_interval():
    """To first order in 1 / M: 1 - C / T - (T / 2 + R) / M."""
    interval, start, failing = 60.0, 20.0, 100_000.0
    expected = 1 - (interval / 2 + start) / failing
    assert expected_goodput(interval, 0.0, start, failing) == pytest.approx(expected, abs=1e-6)


def test_young_s_interval_loses_least():
    checkpoint, failing = 2.0, 10_000.0
    best = young_interval(checkpoint, failing)
    assert best == pytest.approx(200.0)
    here, below, above = (expected_goodput(best * k, checkpoint, 0.0, failing) for k in (1, 0.5, 2))
    assert here > below and here > above and math.isfinite(here)


def test_what_cannot_be_measured_is_refused(tmp_path):
    with pytest.raises(ValueError, match="seconds-between-failures 0"):
        GoodputOptions(tmp_path / "a", tmp_path / "b", seconds_between_failures=0)
    with pytest.raises(ValueError, match="no manifest"):
        measure_goodput(GoodputOptions(tmp_path / "a", tmp_path / "b", output=tmp_path / "o.jsonl"), [])
