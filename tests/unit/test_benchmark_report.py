"""`python -m benchmarks report`: what it shows, what it refuses to put side by side, and the README's figures."""

from __future__ import annotations

import html
import json
import re
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from benchmark_runs import quiet, refused
from test_report import make_inputs

from benchmarks import __main__ as command
from benchmarks.harness import RESULTS, Contestant, Timing, read_rows, summarise
from benchmarks.projection import Network, project
from benchmarks.report import ReportOptions, write_report
from benchmarks.report.readme import refreshed
from benchmarks.report.results import read_results
from benchmarks.report.trials import accuracy_blocks
from pipeline.audit.rows import Row
from pipeline.page import drawing

REPOSITORY = Path(__file__).parent.parent.parent
README = REPOSITORY / "README.md"
ENVIRONMENT = {
    "torch": "2.14.1",
    "timm": "1.0.31",
    "device": "CPU (2 cores)",
    "cpu": "AMD EPYC",
    "commit": "c0ffeec0ff",
}
OLD, NEW = "2026-11-01T10:00:00+00:00", "2026-11-02T10:00:00+00:00"


@pytest.fixture(autouse=True)
def quiet_place(monkeypatch):
    quiet(monkeypatch)


def circumstances(time: str = NEW, environment: dict[str, str] | None = None, **conditions: Any) -> dict[str, Any]:
    return {
        "note": "quiet <machine>",
        "command": f"python -m benchmarks shards --note 'of {time[:10]}'",
        "time_utc": time,
        "environment": ENVIRONMENT | (environment or {}),
        "uncommitted_changes": False,
        "load_average_1_minute": 0.25,
        "conditions": {"pictures": "7 real pictures, each 3 times", "processes": 2} | conditions,
    }


def timed(names: dict[str, float], kept: dict[str, Any], question: str = "shards", part: str = "passing") -> list[str]:
    """Lines of contestants that take so many seconds for 100 pictures, and a tenth more and less."""
    contestants = [Contestant(name, lambda: 1, f"how {name} is set up") for name in names]
    timings = [
        Timing(name, turn, 100, seconds * factor, seconds)
        for turn, factor in enumerate((1.0, 0.9, 1.1), 1)
        for name, seconds in names.items()
    ]
    return [row.to_json(kept) for row in summarise(question, part, "images", contestants, timings)]


def folder_of(root: Path, *lines: str, name: str = "shards.jsonl") -> Path:
    folder = root / "results"
    folder.mkdir(exist_ok=True)
    (folder / name).write_text("".join(f"{line}\n" for line in lines))
    return folder


def report(folder: Path, *words: str) -> tuple[str, str]:
    """(report.html, report.md)"""
    out = folder.parent / "out"
    assert command.main(["report", "--results", str(folder), "--output", str(out), *words]) == 0
    return (out / "report.html").read_text(), (out / "report.md").read_text()


def tables(page: str) -> list[list[list[str]]]:
    """Lines of cells, their text."""
    found = []
    for table in re.findall(r"<table.*?>(.*?)</table>", page, re.DOTALL):
        lines = re.findall(r"<tr.*?>(.*?)</tr>", table, re.DOTALL)
        cells = [re.findall(r"<t[hd].*?>(.*?)</t[hd]>", line, re.DOTALL) for line in lines]
        found.append([[html.unescape(cell) for cell in line] for line in cells])
    return found


@pytest.fixture(scope="module")
def kept(tmp_path_factory) -> tuple[str, str]:
    """The pages of the results that are kept in the repository; their plots are drawn in test_pages.py."""
    out = tmp_path_factory.mktemp("kept")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(drawing, "svg_text", lambda draw, theme: "<svg/>")
        write_report(ReportOptions(output=out), [])
    return (out / "report.html").read_text(), (out / "report.md").read_text()


def test_timings_are_shown_without_torch(tmp_path):
    folder = folder_of(tmp_path, *timed({"plain write": 1.0, "shard, 1": 4.0}, circumstances()))
    code = (
        "import sys; from benchmarks.__main__ import main; "
        f"status = main(['report', '--results', {str(folder)!r}, '--output', {str(tmp_path / 'out')!r}]); "
        "sys.exit(status or ('torch' in sys.modules and 'torch was imported'))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_readmes_figures_are_those_of_the_kept_results():
    text = README.read_text()
    assert text.count("<!-- figures: ") >= 2
    found = refreshed(text, read_results(RESULTS), latest=False, name="README.md")
    assert found == text, "run: python -m benchmarks report --readme README.md"


def test_every_kept_timing_is_shown_or_superseded(kept):
    """Medians are formed anew from the rounds; a median that is not shown is of an older run, which is named."""
    page, text = kept
    cells = [cell for table in tables(page) for line in table for cell in line]
    checked = 0
    for path in RESULTS.glob("*.jsonl"):
        for row in read_rows(path):
            if "timings" not in row:
                continue
            median = statistics.median(t["items"] / t["wall_seconds"] for t in row["timings"])
            seconds = statistics.median(t["wall_seconds"] for t in row["timings"])
            whole = f"{median:,.0f} ("
            shown = any(cell.startswith((whole, f"{seconds:.3g} (", f"{1e3 * seconds:.3g} (")) for cell in cells)
            machine = f"{row['environment']['device']}, {row['environment']['cpu']}"
            older = f"{row['time_utc'][:10]} {row['time_utc'][11:16]} UTC; {machine}; commit"  # not: load
            assert shown or (older in html.unescape(page) and older in text), (path.name, row["contestant"])
            checked += shown
            assert row["command"] in html.unescape(page) and row["command"] in text
    assert checked > 100


def test_each_table_names_its_command_and_each_run_what_it_ran_on(kept):
    page, text = kept
    blocks = re.split(r"<h4>", page)[1:]
    of_figures = [block for block in blocks if "<table" in block]
    assert len(of_figures) > 20 and all('<a href="#' in block and "<code>python -m" in block for block in of_figures)
    targets = set(re.findall(r'href="#([\w-]+)"', page))
    assert targets <= set(re.findall(r'id="([\w-]+)"', page))
    commits = {row["environment"]["commit"] for path in RESULTS.glob("*.jsonl") for row in read_rows(path)}
    for commit in commits:
        assert f"commit {commit[:10]}" in page and f"commit {commit[:10]}" in text
    assert "load 0.6 at start" in page and "AMD EPYC" in page and "torch 2.14.1" in page


def test_a_page_holds_all_that_it_shows(kept):
    page, text = kept
    assert re.findall(r'(?:src|srcset)="(?!data:image/svg\+xml;base64,)', page) == []
    assert re.findall(r'href="(?!#)', page) == [] and "<script" not in page
    assert "http://" not in page.replace("http://www.w3.org", "") and "@import" not in page
    assert text.count("<picture>") == page.count("<picture>") > 20


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


def test_a_question_without_an_entry_is_shown_with_all_its_figures(tmp_path):
    row = {"question": "novelty", "part": "of note", "contestant": "one", "figure": 12.345, "words": "a <tag>"}
    page, text = report(folder_of(tmp_path, json.dumps(row | circumstances()), name="novelty.jsonl"))
    (table,) = tables(page)
    assert table == [["contestant", "figure", "words"], ["one", "12.35", "a <tag>"]]
    assert "<h2>Novelty</h2>" in page and "| one | 12.35 | a &lt;tag> |" in text


def scaling_rows() -> list[str]:
    spread = {"median": 0.5, "min": 0.4, "max": 0.6}
    conditions = {"strategy": "ddp", "model": "m", "image_size": 64, "batch": 8, "steps": 1, "device": "cpu"}
    kept = circumstances(**conditions) | {"question": "scaling", "n": 5}
    names = ("step_seconds", "images_per_second", "efficiency")
    measured = [
        {"part": "measured", "ranks": n, "interval": [0.41, 0.59]} | dict.fromkeys(names, spread) for n in (1, 2)
    ]
    basis = {"step_from": "given", "gradient_bytes": 10**8, "assumptions": Network().assumptions}
    projected = [{"part": "projected"} | project(0.06, 1e8, gpus, Network())._asdict() | basis for gpus in (8, 512)]
    return [json.dumps(kept | row) for row in measured + projected]


def draws_rows(passed: bool) -> list[str]:
    kept = circumstances(device="cpu", draws=10**9, family={"tests": 2, "level": 1e-4, "passed": passed})
    row = {"question": "draws", "n": 10**9, "statistic": 1.0, "law": "a law", "p_value": 0.5, "p_holm": 1.0}
    tests = (("normals", "moment 1", passed), ("words", "bits", True))
    return [json.dumps(kept | row | {"part": part, "test": test, "passed": p}) for part, test, p in tests]


def memory_rows() -> list[str]:
    conditions = {"image_size": 224, "batch": 8, "workers": 2, "interpolation": "bilinear"}
    row = {"question": "loader", "part": "memory", "settings": "so", "file_bytes": 0, "processes": 3}
    found = [row | {"contestant": name, "own_bytes": size} for name, size in (("ffcv", 9 * 10**8), ("tars", 5 * 10**7))]
    return [json.dumps(one | circumstances(**conditions)) for one in found]


def cifar_rows() -> list[str]:
    names = ("epochs", "batch", "width", "depth", "patch")
    shared = dict.fromkeys(names, 8) | {"dtype": "float32", "device": "cpu"}
    sites = {"blocks.7.attn": "official", "blocks.7": "residual"}
    protocols = [(1, None, 1, 70), (6, None, 10, 90)]
    protocols += [(protocol, site, 1 if protocol == 2 else 10, 80) for site in sites for protocol in (2, 3, 4, 5)]
    rows = []
    for twin, noise in (("clean", "none"), ("noisy", "optimal_q")):
        audit = [
            {"protocol": p, "site": site, "k": k, "n": 100, "counts": [c], "value": c / 100, "interval": [0, 1]}
            | {"class_mates": 1.0 if k > 1 else None, "differing": 0}
            for p, site, k, c in protocols
        ]
        own = {"question": "cifar", "part": "seed 0", "contestant": twin, "seed": 0, "audit": audit, "places": sites}
        rows.append(json.dumps(own | circumstances(**shared, seed=0, noise=noise, noisy_twin="optimal_q")))
    return rows


def accuracy_rows() -> list[str]:
    names = ("epochs", "batch", "lr", "group_train", "group_eval")
    shared = dict.fromkeys(names, 10) | {"dtype": "float32", "device": "cpu", "model": "vit_tiny_patch16_224"}
    point = {"kind": "optimal_q", "strength": None, "site": "last"}
    off = {"during": "off", "point": None, "order": "any", "k": 1, "num_images": 1000, "transductive": False}
    off |= {"class_mates": None}
    mates = {"k": 10, "transductive": True, "class_mates": 1.0}
    rows = []
    for seed in range(3):
        in_order = off | mates | {"order": "class"}
        found = [off | {"correct_top1": 500 + 10 * seed}, in_order | {"during": "vote", "correct_top1": 600}]
        found.append(in_order | {"during": "eval", "point": point, "correct_top1": 700})
        row = {"question": "accuracy", "part": "vit_tiny_patch16_224", "contestant": "none", "seed": seed}
        kept = circumstances(**shared, noise="none", seed=seed, asked_with=[point])
        rows.append(json.dumps(row | {"trained_with": None, "found": found} | kept))
    return rows


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


def test_a_run_folder_is_shown_with_its_interval_and_command(tmp_path):
    config = make_inputs(tmp_path)
    folder = folder_of(tmp_path, *timed({"plain write": 1.0}, circumstances()))
    page, text = report(folder, "--runs", str(config.pretrain), str(config.finetune))
    side_by_side = next(table for table in tables(page) if table[0][0] == "run")
    assert [line[3:6] for line in side_by_side[1:]] == [
        ["96.50", "94.21 to 97.90", "400"],
        ["97.00", "94.83 to 98.28", "400"],
    ]
    assert page.count("python -m pipeline train") >= 4 and "## Runs of the trainer" in text


def test_the_audit_of_a_run_folder_is_shown_with_its_verdict(tmp_path, capsys):
    run = make_inputs(tmp_path).pretrain
    rows = [Row(1, "noise off", 1, "any", counts=(386,), n=400)]
    for protocol, order, count in ((3, "class order", 400), (4, "shuffled", 148)):
        rows.append(Row(protocol, order, 10, order, "optimal_q", "blocks.5", True, counts=(count,), n=400))
    body = {
        "rows": [row.to_json() for row in rows],
        "verdict": [{"kind": "all transductive", "words": "All of it is."}],
    }
    body |= {"command": "python -m pipeline audit here", "environment": ENVIRONMENT}
    (run / "audit").mkdir()
    path = run / "audit" / "audit.json"
    path.write_text(json.dumps(body))
    folder = folder_of(tmp_path, *timed({"plain write": 1.0}, circumstances()))
    page, text = report(folder, "--runs", str(run))
    audit = next(table for table in tables(page) if table[0][0] == "protocol")
    assert [line[0] for line in audit[1:]] == ["1. noise off", "3. class order", "4. shuffled"]
    assert "96.50" in audit[1] and "37.00" in audit[3] and "-59.50" in audit[3]
    assert "All of it is." in page and "python -m pipeline audit here" in text
    path.write_text(json.dumps(body | {"rows": [{"protocol": 1}]}))
    capsys.readouterr()
    said = refused(capsys, "report", "--results", folder, "--output", tmp_path / "o", "--runs", run)
    assert f"error: {path} is damaged" in said and "pipeline audit" in said and said.count("\n") == 1


def test_runs_of_different_versions_are_not_put_into_one_table(tmp_path, capsys):
    config = make_inputs(tmp_path)
    path = config.finetune / "results.json"
    body = json.loads(path.read_text())
    path.write_text(json.dumps(body | {"environment": body["environment"] | {"torch": "2.15.0"}}))
    words = ("report", "--results", RESULTS, "--output", tmp_path / "o", "--runs", config.pretrain, config.finetune)
    said = refused(capsys, *words)
    assert f"{config.finetune}: torch 2.15.0" in said and "has 2.14.1" in said and "--output" in said
    assert "name each run folder once" in refused(capsys, *words[:-1], config.pretrain)


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


def test_wrong_folders_and_readmes_are_refused(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    out = ("--output", tmp_path / "out")
    assert "holds no" in refused(capsys, "report", "--results", tmp_path / "empty", *out)
    assert "is no folder" in refused(capsys, "report", "--results", tmp_path / "none", *out)
    (tmp_path / "r.md").write_text("no figures")
    assert "r.md has no `<!-- figures: accuracy -->`" in refused(capsys, "report", "--readme", tmp_path / "r.md", *out)
    (tmp_path / "r.md").write_text("<!-- figures: speed -->\n<!-- end -->")
    assert "there are accuracy, loader, train" in refused(capsys, "report", "--readme", tmp_path / "r.md", *out)
    folder = folder_of(tmp_path, *timed({"plain write": 1.0}, circumstances()))
    (tmp_path / "r.md").write_text("<!-- figures: train -->\n<!-- end -->")
    said = refused(capsys, "report", "--results", folder, "--readme", tmp_path / "r.md", *out)
    assert "train, aims, lack step: trainer ddp over bare ddp: measure them" in said
    assert not (tmp_path / "out").exists() and (tmp_path / "r.md").read_text().startswith("<!-- figures: train")


def test_a_readme_is_written_anew_between_its_marks_alone(tmp_path):
    words = README.read_text()
    (tmp_path / "README.md").write_text(words.replace("2,866", "9,999").replace("# NoisyNN", "# Mine"))
    results = read_results(RESULTS)
    found = refreshed((tmp_path / "README.md").read_text(), results, False, "README.md")
    assert found == words.replace("# NoisyNN", "# Mine")


def test_the_same_results_give_the_same_pages(tmp_path):
    folder = folder_of(tmp_path, *timed({"plain write": 1.0, "shard, 1": 4.0}, circumstances()))
    assert report(folder) == report(folder)
