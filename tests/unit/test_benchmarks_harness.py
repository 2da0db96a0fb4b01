"""The harness's arithmetic, by contestants whose rounds are known; no test depends on how fast anything is."""

import ast
import json
import multiprocessing
import signal
import sys
import time
from pathlib import Path

import pytest

from benchmarks import harness
from benchmarks.harness import Contestant, Timing, append_rows, check_output, compare, cpu_seconds, read_rows, summarise

REPOSITORY = Path(__file__).resolve().parents[2]


def differ(one, other) -> str | None:
    return None if one == other else f"{one} is not {other}"


def contestant(name: str, log: list[str], items: int = 1, **fields) -> Contestant:
    def one_round() -> int:
        log.append(name)
        return items

    return Contestant(name, one_round, "as the test says", **fields)


def test_contestants_alternate_after_a_warm_up():
    log: list[str] = []
    timings = compare([contestant(name, log) for name in "ABC"], rounds=3)
    assert "".join(log) == "ABC" + "ABC" * 3
    assert [(t.contestant, t.round) for t in timings] == [(c, r) for r in (1, 2, 3) for c in "ABC"]
    assert all(t.wall_seconds > 0 and t.items == 1 for t in timings)


def test_outputs_that_differ_are_refused_before_any_round():
    log: list[str] = []
    three = [
        contestant("bound", log),  # nothing to compare
        contestant("right", log, output=lambda: 42),
        contestant("wrong", log, output=lambda: 43),
    ]
    with pytest.raises(ValueError, match=r"right and wrong .* nothing was timed: 42 is not 43"):
        compare(three, 1, differ)
    assert log == []
    compare([*three[:2], contestant("same", log, output=lambda: 42)], 1, differ)
    assert len(log) == 6


def test_what_comes_between_rounds_is_outside_the_clock(monkeypatch):
    clock = iter(range(1000))
    monkeypatch.setattr(harness.time, "perf_counter", lambda: float(next(clock)))
    between = lambda: [next(clock) for _ in range(100)]  # noqa: E731
    timings = compare([contestant("A", [], between=between)], 2)
    assert [t.wall_seconds for t in timings] == [1.0, 1.0]


@pytest.mark.parametrize(("names", "rounds", "word"), [("AA", 1, "called A"), ("AB", 0, "--rounds 0")])
def test_bad_comparisons_are_refused(names, rounds, word):
    with pytest.raises(ValueError, match=word):
        compare([contestant(name, []) for name in names], rounds)


def test_medians_and_pairwise_ratios():
    # B does twice A's rate in the first two turns and four times in the third, whose machine was ten times slower:
    # pairs give 2, 2, 4, where the ratio of extremes over all turns would give anything from 0.4 to 20.
    timings = [
        Timing(name, turn, items=100, wall_seconds=seconds, cpu_seconds=2 * seconds)
        for turn, (a, b) in enumerate([(1.0, 0.5), (2.0, 1.0), (10.0, 2.5)], start=1)
        for name, seconds in (("A", a), ("B", b))
    ]
    pair = [contestant("A", []), contestant("B", [], bytes_per_item=8)]
    a, b = summarise("question", "part", "things", pair, timings)
    assert (a.n, a.compared_with, b.compared_with) == (3, "A", "A")
    assert a.wall_seconds == (2.0, 1.0, 10.0)
    assert a.items_per_second == (50.0, 10.0, 100.0)
    assert a.ratio == (1.0, 1.0, 1.0)
    assert b.ratio == (2.0, 2.0, 4.0)
    assert b.cpu_seconds_per_item == (0.02, 0.01, 0.05)
    assert a.gigabytes_per_second is None
    assert b.gigabytes_per_second == pytest.approx((800e-9, 320e-9, 1600e-9))


def _burn(seconds: float, done) -> None:
    start = time.process_time()
    while time.process_time() - start < seconds:
        pass
    done.set()
    signal.pause()


def test_cpu_time_counts_children_that_live_and_those_that_ended():
    before = cpu_seconds()
    context = multiprocessing.get_context("fork")
    done = context.Event()
    child = context.Process(target=_burn, args=(0.3, done))
    child.start()
    assert done.wait(60)
    living = cpu_seconds() - before
    child.kill()
    child.join()
    ended = cpu_seconds() - before
    assert living > 0.25 and ended >= living - 0.05  # ticks of 10 ms


def rows_of_a_run() -> list[str]:
    pair = [contestant("A", []), contestant("B", [], bytes_per_item=8)]
    circumstances = harness.circumstances_of(["-m", "benchmarks", "x", "--note", "two words"], "two words")
    return [row.to_json(circumstances) for row in summarise("x", "part", "things", pair, compare(pair, 2))]


def test_rows_are_added_and_say_what_they_depend_on(tmp_path):
    path = check_output(tmp_path / "new" / "x.jsonl", "x")
    assert not path.parent.exists()  # nothing is made before there is a result
    append_rows(path, rows_of_a_run())
    append_rows(path, rows_of_a_run())
    rows = read_rows(path)
    assert [row["contestant"] for row in rows] == ["A", "B", "A", "B"]
    row = rows[1]
    assert row["n"] == 2 == len(row["timings"])
    assert row["items_per_second"].keys() == {"median", "min", "max"}
    assert row["command"] == "python -m benchmarks x --note 'two words'"
    assert {"torch", "device", "commit", "cpu"} <= row["environment"].keys()
    assert [p.name for p in path.parent.iterdir()] == ["x.jsonl"]


def test_default_results_lie_beside_the_harness():
    assert check_output(None, "x") == REPOSITORY / "benchmarks" / "results" / "x.jsonl"


def test_a_failed_write_leaves_the_old_rows(tmp_path, monkeypatch):
    path = tmp_path / "x.jsonl"
    append_rows(path, ['{"question": "x"}'])

    def full(*arguments):
        raise OSError("no space left")

    monkeypatch.setattr("data_prep.manifest.os.replace", full)
    with pytest.raises(OSError, match="no space"):
        append_rows(path, ['{"question": "y"}'])
    assert [p.name for p in tmp_path.iterdir()] == ["x.jsonl"]
    assert read_rows(path) == [{"question": "x"}]


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b'{"question": "x"}\n{"quest', "line 2"),
        (b'{"question": "x"}', "line 1"),
        (b"[]\n", "line 1"),
        (b"\xff", "text"),
    ],
)
def test_a_file_of_something_else_is_not_added_to(tmp_path, content, word):
    path = tmp_path / "x.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=word):
        check_output(path, "x")
    assert path.read_bytes() == content


def test_places_that_cannot_be_written_are_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a folder"):
        check_output(tmp_path, "x")
    with pytest.raises(ValueError, match="no folder that can be written"):
        check_output(tmp_path / "file" / "x.jsonl", "x")


def test_two_writers_lose_no_line(tmp_path):
    path = tmp_path / "x.jsonl"
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_append_ten, args=(path, n)) for n in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
    assert sorted(row["n"] for row in read_rows(path)) == sorted(list(range(4)) * 10)


def _append_ten(path: Path, number: int) -> None:
    for _ in range(10):
        append_rows(path, [json.dumps({"question": "x", "n": number})])


def test_tables_show_every_figure_with_and_without_rich(capsys, monkeypatch):
    pair = [contestant("A", [], 5), contestant("B", [], 5, bytes_per_item=8)]
    timings = [Timing(name, turn, 5, 0.002, 0.001) for turn in (1, 2) for name in "AB"]
    rows = summarise("x", "part", "things", pair, timings)
    figures = ("2,500 (2,500 to 2,500)", "2 (2 to 2)", "200 (200 to 200)", "1 (1 to 1)", "2e-05 (2e-05 to 2e-05)")
    for installed in (True, False):
        if not installed:
            monkeypatch.setitem(sys.modules, "rich.console", None)
        harness.print_parts(rows)
        text = capsys.readouterr().out
        assert all(figure in text for figure in (*figures, "ms a round", "us each", "GB/s")), text


def _imported_at_the_top(path: Path) -> set[str]:
    names = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module or "")
    return names


def test_imports_go_one_way_and_kernels_are_measured_without_command_line_libraries():
    for path in (REPOSITORY / "benchmarks").glob("*.py"):
        own = {name for name in _imported_at_the_top(path) if name.startswith("data_prep")}
        # The contract, and which task of an array this is; only what measures data_prep itself needs more of it.
        assert own <= {"data_prep.manifest", "data_prep.tasks"} or path.stem in (
            "shards",
            "shard_peers",
            "plan_memory",
        ), path
    for path in (REPOSITORY / "benchmarks").glob("*.py"):  # options.py serves all of them
        assert not _imported_at_the_top(path) & {"tyro", "rich", "psutil"}, path
