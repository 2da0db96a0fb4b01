"""benchmarks report: what a GPU has measured has tables of its own, in the page and in the README, without any CPU."""

from __future__ import annotations

import html
import json
import re

import pytest
from benchmark_runs import quiet, refused
from report_results import NEW, OLD, cifar_rows, circumstances, folder_of, report, tables

from benchmarks.harness import Contestant, Timing, summarise
from benchmarks.noise_aims import CARD, stated
from benchmarks.report.readme import refreshed
from benchmarks.report.results import read_results

H100 = "NVIDIA H100 80GB HBM3"
BLOCKS = ("gpu-cifar", "gpu-noise", "gpu-train")
# Seconds of a round of 100 million elements, 0.4 GB; that of a model of 100 pictures.
NOISE = {
    "gaussian": {"eager": 0.4, "torch.compile": 0.2, "operator": 0.1, "copy": 0.08},
    "salt_and_pepper": {"eager": 0.5, "torch.compile": 0.3, "operator": 0.2, "copy": 0.08},
    "norm_noise, gaussian": {"eager": 0.4, "torch.compile": 0.2, "operator": 0.2, "LayerNorm alone": 0.1},
    "model, forward and back": {"none": 1.0, "gaussian": 1.004, "optimal_q": 1.05},
}
TRAIN = {"timm": 1.0, "clean": 0.99, "noisy": 1.02}
CPU = {"device": "CPU (2 cores)"}


@pytest.fixture(autouse=True)
def quiet_place(monkeypatch):
    quiet(monkeypatch)


def lines_of(question: str, part: str, seconds: dict[str, float], kept: dict, **own) -> list[str]:
    """Three rounds each, of a tenth more and less."""
    items, moved = (100, None) if part.startswith(("model", "vit")) else (10**8, 4)
    plain = next(iter(seconds))
    contestants = [Contestant(name, lambda: 1, f"{part}, with {name}", bytes_per_item=moved) for name in seconds]
    if plain == "none":
        contestants = [Contestant(name, lambda: 1, f"vit_small_patch16_224, {name}") for name in seconds]
    timings = [
        Timing(name, turn, items, one * factor, one)
        for turn, factor in enumerate((1.0, 0.9, 1.1))
        for name, one in seconds.items()
    ]
    rows = summarise(question, part, "images" if moved is None else "elements", contestants, timings)
    more = [stated(row.part, row.contestant, kept) if question == "noise" else {} for row in rows]
    return [row.to_json(kept | own | aims) for row, aims in zip(rows, more, strict=True)]


def noise_rows(card: str = CARD, time: str = NEW, device: str = "cuda", factor: float = 1.0) -> list[str]:
    lines = []
    for part, seconds in NOISE.items():
        if device == "cpu" and part.startswith("model"):
            continue
        conditions = {"rounds": 3, "dtype": "bfloat16", "device": device, "megabytes": 1000, "shape": [256, 3]}
        kept = circumstances(time, {"device": card}, **conditions)
        lines += lines_of("noise", part, {name: factor * one for name, one in seconds.items()}, kept)
    return lines


def train_rows(card: str = CARD, time: str = NEW, device: str = "cuda", factor: float = 1.0) -> list[str]:
    conditions = {"dtype": "bfloat16", "image_size": 224, "compile": True, "rounds": 3, "steps": 10, "noise": "g 0.1"}
    kept = circumstances(time, {"device": card}, **conditions, device=device)
    peak = None if device == "cpu" else {"median": 0.3, "min": 0.29, "max": 0.31}
    own = {"batch": 512, "mfu": peak, "aim_images_per_second": 100, "flops_per_image": 10**9}
    own |= {"peak_memory_bytes": 10**9, "compile_seconds": 1.0}
    seconds = {name: factor * one for name, one in TRAIN.items()}
    return lines_of("train", "vit_small_patch16_224", seconds, kept, **own)


def gpu_cifar_rows(card: str = CARD) -> list[str]:
    rows = []
    for line in cifar_rows():
        row = json.loads(line)
        for seed, right in ((0, 70), (1, 72)):
            own = json.loads(json.dumps(row))
            own |= {"seed": seed, "part": f"seed {seed}", "environment": row["environment"] | {"device": card}}
            own["conditions"] |= {"device": "cuda", "seed": seed}
            own["audit"][0] |= {"counts": [right], "value": right / 100}
            rows.append(json.dumps(own))
    return rows


ROWS = {
    "gpu-cifar": (gpu_cifar_rows, cifar_rows()),
    "gpu-noise": (noise_rows, noise_rows(CPU["device"], device="cpu", factor=100)),
    "gpu-train": (train_rows, train_rows(CPU["device"], device="cpu", factor=100)),
}


def block(folder, name: str) -> str:
    text = f"<!-- figures: {name} -->\n<!-- end -->\n"
    found = refreshed(text, read_results(folder), latest=False, name="README.md", plots="results")
    return found.partition("-->\n")[2].partition("<!-- end -->")[0].strip()


def table(text: str) -> list[list[str]]:
    lines = [line for line in text.splitlines() if line.startswith("|") and "---" not in line]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


@pytest.mark.parametrize("name", BLOCKS)
def test_without_a_gpus_rows_the_readme_says_that_nothing_is_measured(tmp_path, name):
    found = block(folder_of(tmp_path, *ROWS[name][1]), name)
    assert "has not been measured yet: `make gpu PART=" in found and "|" not in found


@pytest.mark.parametrize("name", BLOCKS)
def test_a_gpus_rows_and_a_cpus_never_meet(tmp_path, name):
    """The CPU's are newer, and change nothing of the GPU's; the page has both, in groups of their own."""
    on_gpu, on_cpu = ROWS[name]
    alone = block(folder_of(tmp_path, *on_gpu()), name)
    newer = [line.replace(NEW, "2026-11-03T10:00:00+00:00") for line in on_cpu]
    folder = folder_of(tmp_path, *on_gpu(), *newer)
    assert block(folder, name) == alone and CARD in alone and "CPU (2 cores)" not in alone
    text = report(folder)[1]
    groups = re.split("^### ", text, flags=re.MULTILINE)[1:]
    headings = [group.partition("\n")[0] for group in groups]
    assert len(groups) == 2 and sorted(CARD in heading for heading in headings) == [False, True]
    assert "Superseded" not in text


@pytest.mark.parametrize("name", BLOCKS)
def test_each_card_has_a_table_of_its_own(tmp_path, name):
    rows = ROWS[name][0]
    found = block(folder_of(tmp_path, *rows(CARD), *rows(H100)), name)
    first, second = found.index(f" on {CARD}"), found.index(f" on {H100}")
    tables_of = [table(found[first:second]), table(found[second:])]
    assert all(len(lines) > 3 for lines in tables_of) and len(tables_of[0]) == len(tables_of[1])
    for part in (found[first:second], found[second:]):
        assert "torch 2.14.1, timm 1.0.31; commit c0ffeec; quiet <machine>" in " ".join(part.split())


def test_the_readmes_noises_have_their_aims_with_what_was_measured(tmp_path):
    found = block(folder_of(tmp_path, *noise_rows()), "gpu-noise")
    header, gaussian, pepper, norm = table(found)
    assert header == ["", "GB/s", "rate over a copy's", "rate over torch.compile's", "rate over eager torch's", "aims"]
    assert gaussian[:5] == ["gaussian", "4 (3.64 to 4.44)", "0.8 (0.8 to 0.8)", "2 (2 to 2)", "4 (4 to 4)"]
    assert gaussian[5] == (
        "at least 0.85 times a copy's: NOT met, by 5.9 %; at least 2.2 times torch.compile's: NOT met, by 9.1 %; "
        "at least 4 times eager torch's: met"
    )
    assert pepper[0] == "salt_and_pepper" and pepper[5] == "" and norm[2] == ""
    assert norm[5] == "time at most 1.1 times LayerNorm alone's: NOT met, by 81.8 %, it is 2.000 (2.000 to 2.000)"
    words = " ".join(found.split())
    assert "bfloat16, tensors of 1,000 MB; n = 3 rounds in turn, median, and in brackets lowest to highest:" in words
    assert (
        "With noise at all its blocks, a step of ViT-S, forward and backward, at a batch of 256, takes so many times "
        "as long as without: 1.004 (1.004 to 1.004) with gaussian (aim: at most 1.01, met); 1.050 (1.050 to 1.050) "
        "with optimal_q (aim: at most 1.01, NOT met, by 4.0 %)."
    ) in words
    assert all(len(line) <= 124 for line in found.splitlines() if not line.startswith("|"))


def test_the_page_judges_the_noises_by_the_aims_that_their_rows_keep(tmp_path):
    page, text = report(folder_of(tmp_path, *noise_rows(), *noise_rows(H100)))
    of_aims = [found for found in tables(page) if found[0] == ["part", "what", "measured", "aim", ""]]
    assert len(of_aims) == 1  # of the H200 alone
    assert [line[0] for line in of_aims[0][1:]] == ["gaussian"] * 3 + ["norm_noise, gaussian"] + [
        "model, forward and back"
    ] * 2
    assert of_aims[0][1][2:] == ["0.800 (0.800 to 0.800)", "at least 0.85", "NOT met, by 5.9 %"]
    assert f"### bfloat16 on {CARD}, 1,000 MB" in text and f"### bfloat16 on {H100}, 1,000 MB" in text


def test_a_damaged_aim_is_named_with_its_line(tmp_path, capsys):
    lines = [line.replace('"limit": 0.85', '"limit": "high"') for line in noise_rows()]
    folder = folder_of(tmp_path, *lines)
    said = refused(capsys, "report", "--results", folder, "--output", tmp_path / "out")
    assert f"{folder}/shards.jsonl, line 3 is damaged (aims: " in said and said.count("\n") == 1


def test_a_size_of_noise_is_a_measurement_of_its_own(tmp_path):
    """A newer one of small tensors, which a cache holds, does not take the place of the large."""
    small = [
        line.replace('"megabytes": 1000', '"megabytes": 64') for line in noise_rows(time="2026-11-03T00:00:00+00:00")
    ]
    found = block(folder_of(tmp_path, *noise_rows(), *small), "gpu-noise")
    assert "tensors of 1,000 MB" in found and "tensors of 64 MB" in found


def test_noise_that_is_measured_in_part_is_shown(tmp_path):
    lines = noise_rows()
    found = block(folder_of(tmp_path, *lines[:4]), "gpu-noise")
    assert len(table(found)) == 2 and "With noise at all its blocks" not in found
    step = block(folder_of(tmp_path, *(line for line in lines if "model, forward" in line)), "gpu-noise")
    assert table(step) == [] and "with gaussian (aim: at most 1.01, met)" in " ".join(step.split())


def test_the_readmes_training_steps_have_their_aims_with_what_was_measured(tmp_path):
    folder = folder_of(tmp_path, *train_rows())
    header, timm, clean, noisy = table(block(folder, "gpu-train"))
    assert header == ["", "step", "images/s", "rate over timm's", "MFU, %", "aims"]
    assert timm == ["ViT-S, batch 512", "timm", "100 (91 to 111)", "1.000 (1.000 to 1.000)", "30.0 (29.0 to 31.0)", ""]
    assert clean[3] == "1.010 (1.010 to 1.010)" and clean[5] == "100 images/s: met; timm's: met"
    assert noisy[2] == "98 (89.1 to 109)"
    assert noisy[5] == "100 images/s: NOT met, by 2.0 %; timm's: NOT met, by 2.0 %"
    page = html.unescape(report(folder)[0])
    assert ">met; timm's: met<" in page and f"one device, {CARD}: bfloat16, 224 px, compiled" in page
    elsewhere = table(block(folder_of(tmp_path, *train_rows(H100)), "gpu-train"))
    assert [line[5] for line in elsewhere[1:]] == ["", "", ""]  # the aims are of an H200


def test_the_readmes_cifar_has_the_headline_first_and_says_what_is_transductive(tmp_path):
    found = block(folder_of(tmp_path, *gpu_cifar_rows()), "gpu-cifar")
    header, first, *others = table(found)
    assert header == ["", "k", "class mates in the group", "clean, 2 seeds", "noisy, 2 seeds"]
    assert first == ["**per image, noise off**", "", "", "**71.00 (70.00 to 72.00)**", "**71.00 (70.00 to 72.00)**"]
    assert len(others) == 7 and all(line[1:3] == ["10", "100.0 %"] for line in others)
    assert others[0][0] == "optimal Q, official place, class order"
    words = " ".join(found.split())
    assert "top-1 in percent, mean, and in brackets lowest to highest" in words
    assert "Every line with class mates is *transductive*" in words and "k = 1 equals noise off" in words
    assert "all 9.00 points are transductive" in words


def test_a_damaged_line_of_cifar_is_named_in_the_readme_too(tmp_path):
    lines = gpu_cifar_rows()
    row = json.loads(lines[-1])
    row["audit"][0]["counts"] = [101]
    with pytest.raises(ValueError, match=r"line 4 is damaged \(101 of 100 right\)"):
        block(folder_of(tmp_path, *lines[:-1], json.dumps(row)), "gpu-cifar")


def test_the_newest_of_a_card_wins(tmp_path):
    found = block(folder_of(tmp_path, *train_rows(time=NEW), *train_rows(time=OLD, factor=2.0)), "gpu-train")
    assert found == block(folder_of(tmp_path, *train_rows(time=NEW)), "gpu-train")
