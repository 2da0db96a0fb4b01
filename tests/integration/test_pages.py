"""The pages that commands write, opened in a real Chromium: on a phone, on a desk, in the dark and on paper."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from browser import PAPER, Browser, chromium

REPOSITORY = Path(__file__).parent.parent.parent
PHONE, DESK = 375, 1280
RESULTS = REPOSITORY / "benchmarks" / "results"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with chromium(tmp_path_factory.mktemp("chromium")) as found:
        yield found


def benchmarks_report(folder: Path) -> Path:
    """Of all results that are kept, and a run."""
    from benchmarks.report import ReportOptions, write_report

    run = run_config(folder).pretrain
    write_report(ReportOptions(output=folder / "out", runs=(run,)), [])
    return folder / "out" / "report.html"


def run_report(folder: Path) -> Path:
    from pipeline.report import write_report

    config = run_config(folder)
    write_report(config, sys.stdout)
    return config.out / "report.html"


def audit_page(folder: Path) -> Path:
    """Long names and every kind of row, two noises, twin and published figures."""
    from pipeline.audit.findings import Audit
    from pipeline.audit.page import page_of
    from pipeline.audit.rows import NAMES, Row
    from pipeline.audit.verdict import verdict
    from pipeline.noise.config import NoiseConfig
    from pipeline.published import HEADLINES

    noises = (NoiseConfig("optimal_q", site="blocks.11.attn"), NoiseConfig("circular_shift", 0.3, "blocks.11.attn"))
    rows = [Row(1, NAMES[1], 1, "any", counts=(42_300,), n=50_000, remark="the headline")]
    for noise in (noise.describe() for noise in noises):
        rows.append(Row(2, NAMES[2], 1, "any", noise, "blocks.11.attn", counts=(42_300,), n=50_000, differing=0))
        for protocol, count in ((3, 47_500), (4, 20_000), (5, 19_000), (6, 46_000)):
            counts = (count, count + 9) if protocol == 4 else (count,)
            kept = noise if protocol != 6 else None
            for k in (2, 10):
                rows.append(Row(protocol, NAMES[protocol], k, "class", kept, None, True, counts=counts, n=50_000))
        swayed = Row(7, NAMES[7], 10, "shuffled", noise, None, True, "answered_b", counts=(90,), n=100, beside=3)
        rows += [swayed, Row(8, NAMES[8], 10, "class", noise, None, True, "running_mean", figure=0.953)]
    rows.append(Row(9, NAMES[9], 1, "any", remark="not run: name the clean twin with --twin"))
    audit = Audit(
        model="vit_base_patch16_224",
        source="runs/a-folder-with-a-long-name/checkpoints/step-00012345/model.safetensors",
        step=12_345,
        weights_sha256="ab" * 32,
        image_size=224,
        data="/data/shards/val.manifest.json",
        samples_sha256="cd" * 32,
        num_classes=1000,
        class_order="in the order of their files' names",
        noises=noises,
        rows=tuple(rows),
        verdict=tuple(verdict(rows)),
        twin=None,
        twin_weights_sha256=None,
        published=HEADLINES[224],
        features=("blocks.11.attn: 50,000 features of 604 kB, 30.2 GB in a file",),
        output=str(folder),
        command="python -m pipeline audit runs/a-folder-with-a-long-name /data/shards/val.manifest.json --paper",
        config={},
        seconds=1234.5,
        environment={"torch": "2.14.1", "device": "NVIDIA H100 80GB HBM3", "commit": "c0ffee" * 6},
    )
    path = folder / "audit.html"
    path.write_text(page_of(audit))
    return path


def run_config(folder: Path):
    from test_report import make_inputs

    return make_inputs(folder, name="pretraining-of-a-model-whose-folder-has-a-long-name")


MAKERS: dict[str, Callable[[Path], Path]] = {
    "benchmarks": benchmarks_report,
    "run": run_report,
    "audit": audit_page,
}


@pytest.fixture(scope="module", params=MAKERS)
def page(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(REPOSITORY / "tests" / "unit"))
        return MAKERS[request.param](tmp_path_factory.mktemp(request.param))


@pytest.mark.parametrize(("width", "scheme"), [(PHONE, "dark"), (DESK, "light"), (PAPER, "light")])
def test_a_page_is_whole_wherever_it_is_read(browser: Browser, page: Path, width: int, scheme: str) -> None:
    """No error, nothing fetched, every picture there, no text outside its box or the window."""
    seen = browser.look(page, width, scheme)
    assert seen.faults == []
    assert seen.pictures >= 1 and len(seen.text) > 1000


FAULTY = {
    "a script that throws": "<script>throw new Error('torn')</script>",
    "an error in the console": "<script>console.error('torn')</script>",
    "a picture that does not load": '<img src="data:image/png;base64,AAAA" alt="torn">',
    "a picture from the network": '<img src="http://127.0.0.1:9/torn.png">',
    "text beyond the window": '<p style="white-space: nowrap">' + "torn " * 100 + "</p>",
    "text beyond its box": '<p style="width: 3rem; white-space: nowrap">much longer than that</p>',
    "text below its box": '<p style="width: 9rem; height: 1rem; overflow: hidden">' + "torn " * 20 + "</p>",
    "a table that does not scroll": "<table><tr>" + "<td>torn-to-shreds</td>" * 40 + "</tr></table>",
}


@pytest.mark.parametrize("fault", FAULTY)
def test_the_browser_sees_each_fault(browser: Browser, tmp_path: Path, fault: str) -> None:
    page = tmp_path / "page.html"
    page.write_text(f"<!doctype html><html><body>{FAULTY[fault]}<p>well</p></body></html>")
    assert browser.look(page, PHONE).faults


def test_what_scrolls_by_itself_is_no_fault_on_a_screen_and_one_on_paper(browser: Browser, tmp_path: Path) -> None:
    table = "<table><tr>" + "<td>far-to-the-right</td>" * 40 + "</tr></table>"
    page = tmp_path / "page.html"
    page.write_text(
        f'<!doctype html><html><body><div class="wide" style="overflow-x: auto">{table}</div></body></html>'
    )
    assert browser.look(page, PHONE).faults == []
    assert browser.look(page, PAPER).overflowing
