"""Runs under seeded plans of faults: signals anywhere, dead and hung ranks, NaN, full disks, damaged checkpoints.

Whatever happens, the same command goes on, and nothing is lost: 30 plans here, 300 by `make soak`.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from fault_plans import DEATHS, HANGS, plan_of

HERE = Path(__file__).parent
REPOSITORY = HERE.parent.parent
RUNNER = HERE / "fault_runner.py"
# Sums of floats in another order: two ranks' or one's. A repeated or lost step differs by more than 1e-3.
LAYOUT_TOLERANCE = 1e-6


@pytest.fixture(scope="session")
def few_digits(digits, tmp_path_factory) -> list[str]:
    """260 of them to train on and 60 to validate: eight steps an epoch."""
    from data_prep.distribute import ShardOptions, shard

    folder = tmp_path_factory.mktemp("few")
    for split, count in (("train", 26), ("val", 6)):
        for name in sorted((digits.pictures / split).iterdir()):
            (folder / split / name.name).mkdir(parents=True)
            for picture in sorted(name.iterdir())[:count]:
                shutil.copy(picture, folder / split / name.name)
    return [
        str(shard(ShardOptions(folder / split, folder / "shards", split=split, samples_per_shard=100)).path)
        for split in ("train", "val")
    ]


def carry_out(few_digits: list[str], folder: Path, seeds: Sequence[int]) -> list[dict]:
    done = subprocess.run(
        [sys.executable, str(RUNNER), str(folder), *few_digits, *map(str, seeds)],
        capture_output=True,
        text=True,
        timeout=60 * len(seeds),
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def check(costs: list[dict]) -> None:
    for cost in costs:
        assert not cost["problems"], cost
        assert cost["results"], cost
        counts = ("samples_lost", "samples_repeated", "generations_lost", "shared_memory_left", "temporary_left")
        assert [cost[name] for name in counts] == [0] * 5, cost
        starts = cost["plan"]["starts"]
        if any(start["fault"] == "nan_one" for start in starts):
            skipped = [done.get("skipped_steps", 0) for done in cost["starts"]]
            assert max(skipped) == 1, cost  # a later start counts on
            continue  # its weights have taken a step less
        same_layout = {start["world_size"] for start in starts} == {2}
        assert cost["largest_difference"] <= (0.0 if same_layout else LAYOUT_TOLERANCE), cost


def test_thirty_plans_lose_nothing(few_digits, tmp_path) -> None:
    costs = carry_out(few_digits, tmp_path, range(30))
    assert len(costs) == 30
    check(costs)
    print(summary(costs))
    kinds = {start["fault"] for cost in costs for start in cost["plan"]["starts"]}
    assert len(kinds) >= 10, "the plans try every kind of fault"


@pytest.mark.soak
def test_three_hundred_plans_lose_nothing(few_digits, tmp_path) -> None:
    """Ends after NOISYNN_SOAK_MINUTES (30); what is done by then is kept in runs/soak, and the same command goes on."""
    kept = REPOSITORY / "runs" / "soak" / "fault_plans.jsonl"
    kept.parent.mkdir(parents=True, exist_ok=True)
    done = [json.loads(line) for line in kept.read_text().splitlines()] if kept.exists() else []
    left = [seed for seed in range(300) if seed not in {cost["plan"]["seed"] for cost in done}]
    end = time.monotonic() + 60 * float(os.environ.get("NOISYNN_SOAK_MINUTES", "30"))
    for first in range(0, len(left), 10):
        if time.monotonic() > end:
            pytest.skip(f"{len(done)} of 300 plans are done: the same command goes on")
        costs = carry_out(few_digits, tmp_path, left[first : first + 10])
        check(costs)
        with open(kept, "a") as file:
            file.writelines(json.dumps(cost) + "\n" for cost in costs)
        done += costs
    check(done)
    print(summary(done))


def summary(costs: list[dict]) -> str:
    """What all of them have cost."""
    names = ("samples_lost", "samples_repeated", "generations_lost", "shared_memory_left", "temporary_left")
    left = sum(start["left"] for cost in costs for start in cost["starts"])
    broken = [
        outcome["seconds"]
        for cost in costs
        for start, outcome in zip(cost["plan"]["starts"], cost["starts"], strict=True)
        if start["fault"] in (*DEATHS, *HANGS)
    ]
    counts = ", ".join(f"{name} {sum(cost[name] for cost in costs)}" for name in names)
    return f"{len(costs)} plans: {counts}, processes left {left}, longest time to exit {max(broken):.1f} s"


def test_plans_are_functions_of_their_seed() -> None:
    assert plan_of(7, 16) == plan_of(7, 16) != plan_of(8, 16)
    for seed in range(300):
        plan = plan_of(seed, 16)
        assert plan.starts[-1].fault is None and plan.starts[0].fault is not None
