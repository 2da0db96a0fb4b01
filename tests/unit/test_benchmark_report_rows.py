"""benchmarks report: each kind of result has its table; what does not compare is never in one."""

from __future__ import annotations

import html
import json

import pytest
from benchmark_runs import quiet, refused
from report_results import (
    NEW,
    OLD,
    accuracy_rows,
    cifar_rows,
    circumstances,
    draws_rows,
    folder_of,
    memory_rows,
    report,
    scaling_rows,
    tables,
    timed,
)

from benchmarks.report.results import read_results
from benchmarks.report.trials import accuracy_blocks


@pytest.fixture(autouse=True)
def quiet_place(monkeypatch):
    quiet(monkeypatch)


def changed(line: str, change) -> str:
    row = json.loads(line)
    change(row)
    return json.dumps(row)


@pytest.mark.parametrize(
    ("lines", "change", "complaint"),
    [
        (accuracy_rows(), lambda row: row["found"][0].update(correct_top1=2000), "is damaged (2000 of 1000 right)"),
        (accuracy_rows(), lambda row: row["found"][0].update(num_images=0, correct_top1=0), "damaged (0 of 0 right)"),
        (accuracy_rows(), lambda row: row.pop("found"), "is damaged (it lacks 'found')"),
        (accuracy_rows(), lambda row: row.update(code="other"), "code tested ("),
        (cifar_rows(), lambda row: row.pop("audit"), "is damaged (it lacks 'audit')"),
        (cifar_rows(), lambda row: row.update(code="other"), "code tested ("),
    ],
)
def test_what_cannot_be_or_is_of_other_code_is_no_part_of_a_mean(tmp_path, capsys, lines, change, complaint):
    marked = [changed(line, lambda row: row.update(code="tested")) for line in lines]
    marked[-1] = changed(marked[-1], change)
    error = refused(capsys, "report", "--results", folder_of(tmp_path, *marked), "--output", tmp_path / "out")
    assert complaint in error and error.count("\n") == 1, error


def test_dates_stand_at_lines_of_one_result_alone(tmp_path):
    """Three seeds of three days and three lines: no line is of one day."""
    lines = [
        changed(line, lambda row, day=day: row.update(time_utc=f"2026-11-0{day + 1}T00:00:00+00:00"))
        for day, line in enumerate(accuracy_rows())
    ]
    (block,) = accuracy_blocks(read_results(folder_of(tmp_path, *lines)))
    assert "measured" not in block.header and len(block.sources) == 3


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (scaling_rows(), ["0.5 (0.4 to 0.6)", "0.410 to 0.590", "512", "Reckoned, not measured"]),
        (draws_rows(True), ["All passed.", "normals: moment 1", "1,000,000,000"]),
        (draws_rows(False), ["FAILED: normals: moment 1."]),
        (memory_rows(), ["FFCV", "900.0", "50.0"]),
        (cifar_rows(), ["per image, noise off", "70.00 (70.00 to 70.00)", "90.00 (90.00 to 90.00)", "transductive"]),
        (accuracy_rows(), ["51.00 (48.52 to 53.48)", "70.00 (70.00 to 70.00)", "optimal q", "79.34", "secondary text"]),
    ],
    ids=["scaling", "draws", "draws that fail", "memory", "cifar", "accuracy"],
)
def test_each_kind_of_row_has_its_table_and_plot(tmp_path, lines, expected):
    page, text = report(folder_of(tmp_path, *lines))
    for figure in expected:
        assert figure in html.unescape(page), figure
        assert figure in text or "|" in figure, figure
    assert page.count("<picture>") >= (0 if "cifar" in lines[0] else 1)


def test_a_question_without_an_entry_is_shown_with_all_its_figures(tmp_path):
    row = {"question": "novelty", "part": "of note", "contestant": "one", "figure": 12.345, "words": "a <tag>"}
    page, text = report(folder_of(tmp_path, json.dumps(row | circumstances()), name="novelty.jsonl"))
    (table,) = tables(page)
    assert table == [["contestant", "figure", "words"], ["one", "12.35", "a <tag>"]]
    assert "<h2>Novelty</h2>" in page and "| one | 12.35 | a &lt;tag> |" in text


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda row: row.pop("time_utc"), "line 1 has no 'time_utc'"),
        (lambda row: row.pop("timings"), "line 1 is no timing"),
        (lambda row: row.update(time_utc="yesterday"), "line 1 does not say when or where"),
        (lambda row: row.update(environment="here"), "line 1 does not say when or where"),
        (lambda row: row.update(question="loader"), "line 1 has no condition 'image_size'"),
    ],
)
def test_a_damaged_line_is_named(tmp_path, capsys, change, expected):
    row = json.loads(timed({"plain write": 1.0}, circumstances())[0])
    change(row)
    folder = folder_of(tmp_path, json.dumps(row))
    said = refused(capsys, "report", "--results", folder, "--output", tmp_path / "out")
    assert f"{folder}/shards.jsonl, {expected}" in said and said.count("\n") == 1 and "take" in said


@pytest.mark.parametrize(
    ("environment", "conditions", "named"),
    [
        ({"torch": "2.15.0"}, {}, ("torch 2.14.1", "2.15.0")),
        ({"timm": "1.1.0"}, {}, ("timm 1.0.31", "1.1.0")),
        ({"device": "NVIDIA H100"}, {}, ("device CPU (2 cores)", "NVIDIA H100")),
        ({"cpu": "Intel"}, {}, ("cpu AMD EPYC", "Intel")),
        ({}, {"processes": 3}, ("processes 2", "and 3")),
        ({}, {"versions_of_peers": {"ffcv": "2"}}, ("ffcv 1", "and 2")),
    ],
)
def test_what_does_not_compare_is_not_put_into_one_table(tmp_path, capsys, environment, conditions, named):
    first = circumstances(OLD, versions_of_peers={"ffcv": "1"})
    second = circumstances(NEW, environment, **{"versions_of_peers": {"ffcv": "1"}} | conditions)
    lines = timed({"plain write": 1.0, "shard, 1": 4.0}, first) + timed({"plain write": 1.0}, second)
    folder = folder_of(tmp_path, *lines)
    said = refused(capsys, "report", "--results", folder, "--output", tmp_path / "out")
    assert said.count("\n") == 1 and said.startswith(f"error: {folder}/shards.jsonl: shards, passing: ")
    assert all(text in said for text in (*named, "2026-11-01", "2026-11-02", "--latest"))
    assert not (tmp_path / "out").exists()
    (table,) = tables(report(folder, "--latest")[0])
    assert [line[0] for line in table[1:]] == ["plain write"]


def test_ratios_to_different_contestants_are_not_mixed(tmp_path, capsys):
    lines = timed({"plain write": 1.0, "shard, 1": 4.0}, circumstances(OLD))
    lines += timed({"shard, 2": 2.0, "plain write": 1.0}, circumstances(NEW))
    said = refused(capsys, "report", "--results", folder_of(tmp_path, *lines), "--output", tmp_path / "out")
    assert "compared with plain write" in said and "shard, 2" in said


def test_the_newest_result_wins_and_the_older_is_named(tmp_path, capsys):
    lines = timed({"plain write": 1.0, "shard, 1": 4.0}, circumstances(NEW))
    lines += timed({"plain write": 2.0, "shard, 1": 3.0}, circumstances(OLD))  # the order in the file does not matter
    page, text = report(folder_of(tmp_path, *lines))
    (table,) = tables(page)
    assert [line[:3] for line in table[1:]] == [
        ["plain write", "3", "100 (90.9 to 111)"],
        ["shard, 1", "3", "25 (22.7 to 27.8)"],
    ]
    assert table[2][-1] == "0.25 (0.25 to 0.25)" and '<tr class="headline">' in page
    assert "2 of <code>python -m benchmarks shards --note &#39;of 2026-11-01&#39;</code>" in page
    assert "- 2 results of `python -m benchmarks shards --note 'of 2026-11-01'`" in text
    assert "4 results, 2 of them superseded" in capsys.readouterr().out


def test_a_part_that_is_measured_again_may_stand_beside_the_rest(tmp_path):
    """Of the same versions and conditions; both runs are named."""
    lines = timed({"plain write": 1.0, "shard, 1": 4.0}, circumstances(OLD))
    lines += timed({"plain write": 1.0, "ShardWriter, 1": 5.0}, circumstances(NEW, {"commit": "another"}))
    page, _ = report(folder_of(tmp_path, *lines))
    (table,) = tables(page)
    assert [[line[0], line[-1]] for line in table[1:]] == [
        ["shard, 1", "2026-11-01 10:00 UTC"],
        ["plain write", "2026-11-02 10:00 UTC"],
        ["ShardWriter, 1", "2026-11-02 10:00 UTC"],
    ]
    assert page.count('href="#shards-run-') == 2 and "commit another" in page
    (table,) = tables(report(tmp_path / "results", "--latest")[0])
    assert [line[0] for line in table[1:]] == ["plain write", "ShardWriter, 1"]
