"""The sample ledger: what each rank notes comes back as the global order, and a resume leaves no step twice."""

import json

import pytest

from pipeline.ledger import SampleLedger, cut_ledger, read_ledger


def write(run, world_size, steps):
    """Two samples a rank and step: step s takes 10 s, 10 s + 1, ..."""
    ledgers = [SampleLedger(run, rank, world_size) for rank in range(world_size)]
    for step in steps:
        for rank, ledger in enumerate(ledgers):
            ledger.note([10 * step + 2 * rank])
            ledger.note([10 * step + 2 * rank + 1])
            ledger.end_step(step, epoch=0)
    for ledger in ledgers:
        ledger.close()


def test_ranks_lines_are_joined_in_the_global_order(tmp_path):
    write(tmp_path, 2, [1, 2])
    assert read_ledger(tmp_path) == {1: [10, 11, 12, 13], 2: [20, 21, 22, 23]}


def test_a_resume_by_fewer_ranks_drops_what_all_had_noted_beyond(tmp_path):
    write(tmp_path, 2, [1, 2, 3])
    with open(tmp_path / "ledger" / "rank-00001.jsonl", "a") as file:
        file.write('{"step": 4, "ep')  # killed within the line
    cut_ledger(tmp_path, done_steps=1)
    write(tmp_path, 1, [2, 3])
    assert read_ledger(tmp_path) == {1: [10, 11, 12, 13], 2: [20, 21], 3: [30, 31]}


def test_a_rank_s_missing_line_and_a_line_twice_are_seen(tmp_path):
    write(tmp_path, 2, [1])
    path = tmp_path / "ledger" / "rank-00001.jsonl"
    line = path.read_text()
    path.write_text(line + line)
    with pytest.raises(ValueError, match=r"rank-00001.jsonl has step 1 twice"):
        read_ledger(tmp_path)
    path.write_text("")
    with pytest.raises(ValueError, match=r"step 1 was noted by 1 ranks of \[2\]"):
        read_ledger(tmp_path)


def test_a_line_says_where_it_belongs(tmp_path):
    write(tmp_path, 1, [5])
    line = json.loads((tmp_path / "ledger" / "rank-00000.jsonl").read_text())
    assert line == {"step": 5, "epoch": 0, "world_size": 1, "sample_ids": [50, 51]}
