"""benchmarks audit: its rows, and that a second run takes the first one's place."""

import pytest
from benchmark_runs import quiet
from report_results import report, tables

from benchmarks import __main__ as command
from benchmarks import audit
from benchmarks.harness import read_rows
from benchmarks.memory import Memory


@pytest.fixture(autouse=True)
def quiet_place(monkeypatch):
    quiet(monkeypatch)


def test_memory_has_rows_of_its_own_and_is_no_condition_of_the_others(tmp_path, monkeypatch, capsys):
    """Two runs of the same options, whose memory differs as measurements do."""
    output = tmp_path / "results" / "audit.jsonl"
    words = ["audit", "--parts", "nine", "--image-size", "16", "--images", "50", "--rounds", "1"]
    for megabytes in (3, 5):
        peak = Memory(megabytes * 10**6, 2 * 10**6, 1)
        monkeypatch.setattr(audit, "peak_in_new_process", lambda prepare, peak=peak: peak)
        assert command.main([*words, "--output", str(output)]) == 0
        assert f"{megabytes}.0" in capsys.readouterr().out
    first, second = (read_rows(output)[:5], read_rows(output)[5:])
    names = ["nine whole passes", "whole passes", "features kept", "50 pictures", "200 pictures"]
    assert [row["contestant"] for row in first] == [row["contestant"] for row in second] == names
    assert [row["part"] for row in first] == ["nine"] * 3 + ["memory"] * 2
    conditions = {"model": "vit_tiny_patch16_224", "site": "blocks.11.attn", "image_size": 16, "images": 50}
    assert all(row["conditions"] == conditions | {"batch": 50, "victims": 5} for row in first + second)
    page, _ = report(output.parent)
    speed, memory = tables(page)
    assert [line[0] for line in speed[1:]] == names[:3]
    assert [line[0::2][:2] for line in memory[1:]] == [["50 pictures", "5.0"], ["200 pictures", "5.0"]]
    assert "10 results, 5 of them superseded" in capsys.readouterr().out


def test_without_memory_there_are_timings_alone(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(audit, "peak_in_new_process", None)  # what is called would fail
    output = tmp_path / "audit.jsonl"
    words = ["audit", "--parts", "nine", "--image-size", "16", "--images", "50", "--rounds", "1", "--no-memory"]
    assert command.main([*words, "--output", str(output)]) == 0
    assert [row["part"] for row in read_rows(output)] == ["nine"] * 3
    assert "MB of its own" not in capsys.readouterr().out
