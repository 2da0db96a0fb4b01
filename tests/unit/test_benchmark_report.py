"""`python -m benchmarks report`: what it shows, what it refuses to put side by side, and the README's figures."""

from __future__ import annotations

import html
import json
import re
import statistics
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from benchmark_runs import quiet, refused
from report_results import (
    ENVIRONMENT,
    circumstances,
    folder_of,
    report,
    tables,
    timed,
)
from test_report import make_inputs, make_run

from benchmarks.harness import RESULTS, read_rows
from benchmarks.report import ReportOptions, write_report
from benchmarks.report.questions import chosen
from benchmarks.report.readme import PLOTS, refreshed
from benchmarks.report.results import read_results
from pipeline.audit.rows import Row
from pipeline.config import TrainConfig
from pipeline.noise.config import NoiseConfig
from pipeline.page import drawing

REPOSITORY = Path(__file__).parent.parent.parent
README = REPOSITORY / "README.md"


@pytest.fixture(autouse=True)
def quiet_place(monkeypatch):
    quiet(monkeypatch)


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
    results, mend = read_results(RESULTS), "run: python -m benchmarks report --readme README.md"
    plots = RESULTS.relative_to(README.parent).as_posix()
    assert refreshed(text, results, latest=False, name="README.md", plots=plots) == text, mend
    for name, draw in PLOTS.items():
        for mode, theme in drawing.THEMES.items():
            file = f"{plots}/{name}-{mode}.svg"
            assert file in text
            assert (README.parent / file).read_text() == drawing.svg_text(partial(draw, results, False), theme), mend


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


def test_a_run_folder_is_shown_with_its_interval_and_command(tmp_path):
    config = make_inputs(tmp_path)
    folder = folder_of(tmp_path, *timed({"plain write": 1.0}, circumstances()))
    page, text = report(folder, "--runs", str(config.pretrain), str(config.finetune))
    side_by_side = [table for table in tables(page) if table[0][0] == "run"]
    assert [line[4:7] for table in side_by_side for line in table[1:]] == [
        ["96.50", "94.21 to 97.90", "400"],
        ["97.00", "94.83 to 98.28", "400"],
    ]
    assert page.count("python -m pipeline train") >= 4 and "## Runs of the trainer" in text


def test_runs_stand_in_one_table_where_they_were_asked_the_same_pictures(tmp_path, capsys):
    base = TrainConfig(run=tmp_path / "a", epochs=1, global_batch=64, noise=NoiseConfig())
    elsewhere = replace(base.data, val="other/val.manifest.json")
    configs = [base, replace(base, run=tmp_path / "b"), replace(base, run=tmp_path / "c", data=elsewhere)]
    for config, correct in zip(configs, (380, 384, 390), strict=True):
        make_run(config.run, config, classes=10, correct=correct)
    folder = folder_of(tmp_path, *timed({"plain write": 1.0}, circumstances()))
    runs = [str(config.run) for config in configs]
    page, text = report(folder, "--runs", *runs)
    together, alone = [table for table in tables(page) if table[0][0] == "run"]
    assert [line[4] for line in together[1:]] == ["95.00", "96.00"] and [line[4] for line in alone[1:]] == ["97.50"]
    assert [line[2] for line in together[1:]] == ["5a5a5a5a5a"] * 2
    assert page.count("<td>shards/train.manifest.json</td>") == 3
    assert "side by side: shards/val.manifest.json, 400 pictures of 10 classes" in page
    assert "side by side: other/val.manifest.json, 400 pictures of 10 classes" in page
    assert page.count("their figures do not compare") == text.count("their figures do not compare") == 2
    assert "their figures do not compare" not in report(folder, "--runs", *runs[:2])[0]
    (record,) = (tmp_path / "b").glob("checkpoints/*/progress.json")
    record.write_text("{}")
    capsys.readouterr()
    said = refused(capsys, "report", "--results", folder, "--output", tmp_path / "o", "--runs", *runs)
    assert f"{record} does not say what {tmp_path / 'b'} was trained on" in said and said.count("\n") == 1


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


def test_wrong_folders_and_readmes_are_refused(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    out = ("--output", tmp_path / "out")
    assert "holds no" in refused(capsys, "report", "--results", tmp_path / "empty", *out)
    assert "is no folder" in refused(capsys, "report", "--results", tmp_path / "none", *out)
    (tmp_path / "r.md").write_text("no figures")
    assert "r.md has no `<!-- figures: accuracy -->`" in refused(capsys, "report", "--readme", tmp_path / "r.md", *out)
    (tmp_path / "r.md").write_text("<!-- figures: speed -->\n<!-- end -->")
    assert "there are accuracy, audit, gpu-cifar, gpu-noise, gpu-train, loader, train:" in refused(
        capsys, "report", "--readme", tmp_path / "r.md", *out
    )
    folder = folder_of(tmp_path, *timed({"plain write": 1.0}, circumstances()))
    (tmp_path / "r.md").write_text("<!-- figures: train -->\n<!-- end -->")
    said = refused(capsys, "report", "--results", folder, "--readme", tmp_path / "r.md", *out)
    assert "train, aims, lack step: trainer ddp over bare ddp: measure them" in said
    assert not (tmp_path / "out").exists() and (tmp_path / "r.md").read_text().startswith("<!-- figures: train")


def test_latest_keeps_a_grid_whole_that_was_measured_in_several_runs(tmp_path):
    """The kept one is of one code and of four runs; its README is the same."""
    results = read_results(RESULTS)
    grid = chosen(results, "accuracy", latest=True)
    assert len({result["time_utc"] for result in grid.chosen}) > 1 and grid == chosen(results, "accuracy", latest=False)
    text, plots = README.read_text(), RESULTS.relative_to(README.parent).as_posix()
    assert refreshed(text, results, latest=True, name="README.md", plots=plots) == text


@pytest.mark.parametrize(
    ("lacks", "words"),
    [
        (lambda row: row["trained_with"] is None, "per image, noise off, lack vit_tiny_patch16_224:"),
        (
            lambda row: row["trained_with"] == {"kind": "gaussian", "strength": 0.2, "site": "last"},
            "per image, noise off; trained with gaussian 0.2, lack vit_tiny_patch16_224:",
        ),
    ],
    ids=["the headline", "a line that the other model has"],
)
def test_a_readme_is_refused_where_a_model_lacks_a_figure(tmp_path, capsys, lacks, words):
    rows = read_rows(RESULTS / "accuracy.jsonl")
    left = [row for row in rows if not (row["part"].startswith("vit") and lacks(row))]
    assert len(left) == len(rows) - 3
    folder = folder_of(tmp_path, *map(json.dumps, left), name="accuracy.jsonl")
    readme = tmp_path / "README.md"
    readme.write_text(f"<!-- figures: accuracy -->\n<!-- end -->\n{folder}")
    said = refused(capsys, "report", "--results", folder, "--output", tmp_path / "out", "--readme", readme)
    assert f"the README's figures of accuracy, {words}" in said and said.count("\n") == 1
    assert "python -m benchmarks accuracy" in said and readme.read_text().count("\n") == 2


def test_a_readme_is_written_anew_between_its_marks_alone(tmp_path):
    words = README.read_text()
    (tmp_path / "README.md").write_text(words.replace("2,866", "9,999").replace("# NoisyNN", "# Mine"))
    results = read_results(RESULTS)
    found = refreshed((tmp_path / "README.md").read_text(), results, False, "README.md", "benchmarks/results")
    assert found == words.replace("# NoisyNN", "# Mine")


def test_the_same_results_give_the_same_pages(tmp_path):
    folder = folder_of(tmp_path, *timed({"plain write": 1.0, "shard, 1": 4.0}, circumstances()))
    assert report(folder) == report(folder)
