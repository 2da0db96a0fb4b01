"""benchmarks report: each kind of result has its table; what does not compare is never in one."""

from __future__ import annotations

import html
import json
import re

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

from benchmarks.memory import MemoryRow
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
        (accuracy_rows(), lambda row: row.update(code="other"), "code tested ("),
        (cifar_rows(), lambda row: row.update(code="other"), "code tested ("),
    ],
)
def test_what_cannot_be_or_is_of_other_code_is_no_part_of_a_mean(tmp_path, capsys, lines, change, complaint):
    marked = [changed(line, lambda row: row.update(code="tested")) for line in lines]
    marked[-1] = changed(marked[-1], change)
    error = refused(capsys, "report", "--results", folder_of(tmp_path, *marked), "--output", tmp_path / "out")
    assert complaint in error and error.count("\n") == 1, error


DAMAGES = {
    "accuracy": (
        accuracy_rows(),
        [
            (lambda row: row.pop("found"), "it lacks 'found'"),
            (lambda row: row.update(seed="zero"), 'seed is "zero"'),
            (lambda row: row.update(seed=True), "seed is true"),
            (lambda row: row.update(part=7), "part is 7"),
            (lambda row: row.update(part="vit_tiny_patch16_224:depth"), "'depth' is no NAME=VALUE"),
            (lambda row: row.update(trained_with={"kind": "gaussian"}), "it lacks 'strength'"),
            (lambda row: row.update(trained_with=["gaussian"]), 'trained_with is ["gaussian"]'),
            (lambda row: row.update(found=["off"]), '"off" stands where during'),
            (lambda row: row["found"].pop(0), "it lacks what is found with the noise off"),
            (lambda row: row["found"][1].update(class_mates=None), "class_mates is null"),
            (lambda row: row["found"][1].update(class_mates=float("nan")), "class_mates is NaN"),
            (lambda row: row["found"][2].update(point=None), "null stands where kind, strength, site should"),
            (lambda row: row["found"][2].update(order="alphabetical"), 'order is "alphabetical"'),
            (lambda row: row["found"][2].update(during="after"), 'during is "after"'),
            (lambda row: row["found"][2].update(correct_top1="many"), 'correct_top1 is "many"'),
            (lambda row: row["conditions"].update(lr="fast"), "lr is 'fast'"),
        ],
    ),
    "cifar": (
        cifar_rows(),
        [
            (lambda row: row.pop("audit"), "it lacks 'audit'"),
            (lambda row: row.update(seed="zero"), 'seed is "zero"'),
            (lambda row: row.update(contestant="third"), 'contestant is "third"'),
            (lambda row: row["conditions"].update(noise=None), "noise is null"),
            (lambda row: row["places"].pop("blocks.7"), "it lacks 'blocks.7'"),
            (lambda row: row["places"].update({"blocks.7": ["residual"]}), 'blocks.7 is ["residual"]'),
            (lambda row: row["audit"].pop(0), "it lacks protocol 1"),
            (lambda row: row["audit"].pop(3), "it lacks protocol 3, official"),
            (lambda row: row["audit"].pop(2), "it lacks protocol 2, official"),
            (lambda row: row["audit"][0].update(value=None), "value is null"),
            (lambda row: row["audit"][2].update(differing=None), "differing is null"),
            (lambda row: row["audit"][3].update(class_mates=None), "class_mates is null"),
            (lambda row: row["audit"][3].update(counts=["many"]), 'count 1 is "many"'),
            (lambda row: row["audit"][3].update(counts=[101]), "101 of 100 right"),
        ],
    ),
}


@pytest.mark.parametrize("question", DAMAGES)
def test_what_a_line_of_counts_lacks_is_said_in_one_line(tmp_path, capsys, question):
    lines, changes = DAMAGES[question]
    for change, complaint in changes:
        folder = folder_of(tmp_path, *lines[:-1], changed(lines[-1], change))
        said = refused(capsys, "report", "--results", folder, "--output", tmp_path / "out")
        assert f"{folder}/shards.jsonl, line {len(lines)} is damaged (" in said, said
        assert complaint in said and "take it out, or measure it again" in said and said.count("\n") == 1, said


@pytest.mark.parametrize("lines", [accuracy_rows(), cifar_rows()], ids=["accuracy", "cifar"])
def test_latest_takes_all_of_the_newest_code_whenever_it_was_measured(tmp_path, capsys, lines):
    """The older code's grid is whole too, and one of its cells stands between the newer one's."""

    def of(code: str, days: range) -> list[str]:
        changes = ({"code": code, "time_utc": f"2026-11-{day:02}T00:00:00+00:00"} for day in days)
        return [changed(line, lambda row, new=new: row.update(new)) for line, new in zip(lines, changes, strict=False)]

    older, newer = of("older", range(1, 1 + len(lines))), of("newer", range(2, 2 + len(lines)))
    missing = newer.pop()  # of it there is the older code's alone
    alone = tables(report(folder_of(tmp_path, *newer))[0])
    folder = folder_of(tmp_path, *older, *newer)
    assert tables(report(folder, "--latest")[0]) == alone
    capsys.readouterr()
    assert "--latest takes the newest" in refused(capsys, "report", "--results", folder, "--output", tmp_path / "o")
    both = folder_of(tmp_path, *older, *newer, missing)
    assert tables(report(both, "--latest")[0]) == tables(report(both)[0]) != alone


def test_the_audits_memory_is_a_table_and_an_older_run_of_any_memory_is_superseded(tmp_path):
    def run(time: str, seconds: float, own_bytes: int) -> list[str]:
        sizes = {"image_size": 96, "images": 400, "batch": 50, "victims": 40}
        kept = circumstances(time, model="vit_tiny_patch16_224", site="blocks.11.attn", **sizes)
        rows = timed({"whole passes": 10.0, "features kept": seconds}, kept, "audit", "grid")
        for pictures in (400, 1600):
            row = MemoryRow("audit", "memory", f"{pictures:,} pictures", "so", own_bytes, 2 * pictures * 10**5, 1)
            rows.append(row.to_json(kept))
        return rows

    page, text = report(folder_of(tmp_path, *run(OLD, 5.0, 9 * 10**6), *run(NEW, 2.0, 7 * 10**6)))
    speed, memory = tables(page)
    assert [line[0] for line in speed[1:]] == ["whole passes", "features kept"] and speed[2][-1] == "5 (5 to 5)"
    assert [line[:4] for line in memory[1:]] == [
        ["400 pictures", "1", "7.0", "80.0"],
        ["1,600 pictures", "1", "7.0", "320.0"],
    ]
    heading = "vit_tiny_patch16_224 at 96 px, noise at blocks.11.attn, 400 pictures, batches of 50"
    assert re.findall("<h3>(.*?)</h3>", page)[0] == heading and f"### {heading}" in text
    assert page.count(heading) == 1 and "4 results of" in text  # all of the older run


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
        (lambda row: row.update(conditions="quiet"), "line 1 does not say when or where"),
        (lambda row: row.update(note={"of": "today"}), "line 1 does not say when or where"),
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
    assert tables(report(tmp_path / "results", "--latest")[0]) == [table]
