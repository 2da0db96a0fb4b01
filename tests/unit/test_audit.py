"""`python -m pipeline audit` on whole checkpoints and shards: what it writes, and what it refuses in one line."""

import hashlib
import json
import re
import shutil
from dataclasses import replace

import pytest
from audit_runs import ALONE, SMALL, config_of, make_run

from pipeline.__main__ import main
from pipeline.audit.markdown import escaped
from pipeline.audit.protocols import Settings
from pipeline.audit.rows import NAMES, Row
from pipeline.audit.run import audit
from pipeline.audit.subject import noises_of, subject_of
from pipeline.audit.table import terminal_lines
from pipeline.checkpoint import WEIGHTS_NAME
from pipeline.evaluate import EvaluateConfig, evaluate
from pipeline.noise.config import NoiseConfig


@pytest.fixture(scope="module")
def done(audited_run, raw_split, tmp_path_factory):
    """(what was found, its folder)."""
    out = tmp_path_factory.mktemp("out") / "audit"
    twin = make_run(tmp_path_factory.mktemp("twin") / "twin", noise=None, seed=1, epochs=80)
    return audit(config_of(audited_run, raw_split, twin=twin, output=out), ALONE, ["r<u>n", "val"]), out


def test_other_pictures_change_the_counts(done):
    """Else no count of a protocol could be a wrong one."""
    rows = done[0].rows
    of = {(row.protocol, row.k): row.counts for row in rows}
    assert any(len({of[1, 1][0], of[3, k][0], of[4, k][0]}) == 3 for k in SMALL.ks)
    assert 0 < of[1, 1][0] < 24


def test_counts_are_those_of_evaluate(done, audited_run, raw_split):
    """The plain count, and the same noise in the order that both know."""
    found, _ = done
    plain = evaluate(
        EvaluateConfig(audited_run, raw_split, batch=24, workers=0, output=audited_run / "x.json"), ALONE
    ).accuracies[0]
    assert found.plain.counts == (plain.correct_top1,) and found.plain.n == 24
    noise = NoiseConfig("optimal_q", site="blocks.1.attn", group_size=4)
    config = EvaluateConfig(audited_run, raw_split, noise=noise, orders=("shuffled",), batch=24, workers=0)
    shuffled = evaluate(config, ALONE).accuracies[1]
    (row,) = [row for row in found.rows if (row.protocol, row.k) == (4, 4)]
    assert row.counts[0] == shuffled.correct_top1
    assert [row.differing for row in found.rows if row.protocol == 2] == [0]


def test_the_json_holds_rows_verdict_and_circumstances(done, audited_run):
    found, out = done
    body = json.loads((out / "audit.json").read_text())
    assert [row["protocol"] for row in body["rows"]] == [row.protocol for row in found.rows]
    assert {1, 2, 3, 4, 5, 6, 7, 8, 9} == {row["protocol"] for row in body["rows"]}
    assert body["verdict"] == [{"kind": finding.kind, "words": finding.words} for finding in found.verdict]
    (weights,) = (audited_run / "checkpoints").glob("step-*/" + WEIGHTS_NAME)
    assert body["weights_sha256"] == hashlib.sha256(weights.read_bytes()).hexdigest()
    assert body["command"] == "python -m pipeline audit 'r<u>n' val"
    assert {"torch", "timm", "commit", "device"} <= body["environment"].keys()
    assert body["headline"]["top1_per_image"] == found.plain.value and body["step"] == 12
    assert body["class_order"] == "by file name, as the tars' members are called"
    assert sorted(path.name for path in out.iterdir()) == ["audit.html", "audit.json", "audit.md"]


def test_the_page_is_one_file_and_says_which_figures_are_transductive(done):
    found, out = done
    page = (out / "audit.html").read_text()
    assert not re.search(r"(src|href|srcset)=\"(?!data:)", page) and "<script" not in page
    assert "r&lt;u&gt;n" in page and "r<u>n" not in page
    assert page.count('aria-label="transductive"') == sum(row.transductive for row in found.rows)
    assert page.index(found.verdict[0].words) < page.index("The nine protocols")
    assert found.weights_sha256 in page and found.environment["commit"] in page
    text = (out / "audit.md").read_text()
    assert text.count("\n| 3 | class order |") == 3
    assert text.count("\n### ") == 2 and "optimal\\_q at blocks.1.attn" in text and "r\\<u\\>n" in text
    assert all(escaped(finding.words) in text for finding in found.verdict)


def test_the_terminal_has_one_table_and_the_verdict(audited_run, raw_split, tmp_path, capsys):
    words = ["--ks", "2", "--shuffles", "1", "--workers", "0", "--output", str(tmp_path), "--victims", "5"]
    assert main(["audit", str(audited_run), str(raw_split), *words]) == 0
    out = capsys.readouterr().out
    assert out.startswith("features of 24 pictures before blocks.1.attn")
    assert out.count("audit of vit_tiny_patch16_224") == 1
    assert "not run" in out and "Verdict" in out and "Per image, noise off" in out
    assert json.loads((tmp_path / "audit.json").read_text())["config"]["protocols"]["ks"] == [2]


def test_results_go_into_the_run_folder_by_default(audited_run, raw_split):
    audit(config_of(audited_run, raw_split, protocols=Settings(ks=(2,), shuffles=1, victims=2)), ALONE)
    assert (audited_run / "audit" / "audit.html").is_file()
    shutil.rmtree(audited_run / "audit")


def test_the_default_place_is_that_of_the_checkpoint_s_own_mixing_noise_else_the_official_one(tmp_path):
    own = NoiseConfig("circular_shift", 0.3, "blocks.0", "train", spare_prefix_tokens=False)
    trained = subject_of(make_run(tmp_path / "shift", own), ema=False)
    (noise,) = noises_of(trained, ["optimal_q"], None, (), all_tokens=False)
    assert (noise.kind, noise.site, noise.spare_prefix_tokens, noise.during) == ("optimal_q", "blocks.0", False, "eval")
    blurred = subject_of(make_run(tmp_path / "gaussian", NoiseConfig("gaussian", 0.2)), ema=False)
    plain = subject_of(make_run(tmp_path / "plain", None), ema=False)
    for checkpoint in (plain, blurred):
        (noise,) = noises_of(checkpoint, ["optimal_q"], None, (), all_tokens=False)
        assert (noise.site, noise.spare_prefix_tokens) == ("blocks.1.attn", True)


def test_sites_and_noises_are_crossed(audited_run):
    found = noises_of(
        subject_of(audited_run, False), ["optimal_q", "circular_shift"], 0.3, ("blocks.0", "blocks.1"), True
    )
    assert [(n.site, n.kind, n.strength) for n in found] == [
        ("blocks.0", "optimal_q", None),
        ("blocks.0", "circular_shift", 0.3),
        ("blocks.1", "optimal_q", None),
        ("blocks.1", "circular_shift", 0.3),
    ]
    assert not any(n.spare_prefix_tokens for n in found)


def test_what_else_differs_between_twins_is_said(done):
    remark = done[0].rows[-1].remark
    assert "beside the noise they differ in epochs 90 here, 80 there" in remark
    assert re.match(r"\d+ pictures only here right, \d+ only there; p = \S+ \(McNemar, exact\); ", remark)


@pytest.mark.parametrize("noises", [1, 2])
def test_the_terminal_s_table_fits_80_columns_and_cuts_no_figure(noises):
    names = [f"optimal_q at blocks.{number} (during eval, all tokens)" for number in range(noises)]
    rows = [Row(1, NAMES[1], 1, "any", counts=(42_265,), n=50_000)]
    for noise in names:
        shuffled = Row(4, NAMES[4], 50, "shuffled", noise, None, True, counts=(9_000, 9_100, 9_300), n=50_000)
        swayed = Row(7, NAMES[7], 50, "a, rest b", noise, None, True, "answered_b", (500,), 500, beside=60)
        rows += [shuffled, replace(shuffled, protocol=5, name=NAMES[5], class_mates=1.0, counts=(9_000,)), swayed]
    rows += [Row(6, NAMES[6], 50, "class", None, None, True, counts=(49_999,), n=50_000, class_mates=1.0)]
    lines = [text for text, _ in terminal_lines(rows)]
    assert max(map(len, lines)) <= 80
    assert [line for line in lines if line in names] == names
    first = lines.index(names[0])
    assert [line.split()[0] for line in lines[2:first]] == ["1", "6"]  # those without noise stand apart
    figures = ("84.53", "84.21 to 84.84", "50,000", "100.00 (12.00)", "shuffled x 3", "99.99 to 100.00", "+15.47")
    assert all(any(figure in line for line in lines) for figure in figures)
