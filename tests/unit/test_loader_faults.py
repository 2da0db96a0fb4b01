"""Bit flips, cuts and swaps over tars and .betons: refused by name, or without effect; never accepted in silence."""

import pytest
from loader_faults import trials

CONTAINERS = pytest.mark.parametrize(
    ("split", "form"), [("jpg_split", "wds"), ("jpg_split", "ffcv"), ("raw_split", "ffcv")]
)


def check(ends: dict[str, int], flips: int, cuts: int, swaps: int) -> None:
    """The trials must have met what they are for: most of a shard's bits are pictures."""
    assert ends["flip refused"] > 0.5 * flips, ends
    # A cut behind the last picture of a file that is open takes nothing away.
    assert ends["cut refused"] > 0.8 * cuts and ends["cut refused"] + ends["cut harmless"] == cuts
    assert ends["swap refused"] == swaps, ends


@CONTAINERS
def test_no_fault_is_accepted_in_silence(request, tmp_path, split, form):
    counts = 60, 40, 12
    check(trials(request.getfixturevalue(split), tmp_path / "copy", form, *counts), *counts)


@pytest.mark.soak
@CONTAINERS
def test_no_fault_of_a_thousand_is_accepted_in_silence(request, tmp_path, split, form):
    counts = 1000, 500, 100
    ends = trials(request.getfixturevalue(split), tmp_path / "copy", form, *counts)
    print(f"{split} as {form}: {dict(ends)}")
    check(ends, *counts)
