"""Results of each question to be reported, made here, and the pages of them."""

from __future__ import annotations

import html
import json
import re
from pathlib import Path
from typing import Any

from benchmarks import __main__ as command
from benchmarks.harness import Contestant, Timing, summarise
from benchmarks.projection import Network, project

ENVIRONMENT = {
    "torch": "2.14.1",
    "timm": "1.0.31",
    "device": "CPU (2 cores)",
    "cpu": "AMD EPYC",
    "commit": "c0ffeec0ff",
}
OLD, NEW = "2026-11-01T10:00:00+00:00", "2026-11-02T10:00:00+00:00"


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
