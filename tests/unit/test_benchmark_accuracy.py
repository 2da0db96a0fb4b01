"""benchmarks accuracy: the grid of noises, sites and phases, what its cells keep, and its table."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from benchmark_runs import refused
from small_cifar import CLASSES, TEST, write_folder

from benchmarks import __main__ as command
from benchmarks import accuracy, accuracy_summary, cells
from benchmarks.accuracy import Found
from benchmarks.accuracy_grid import Model, Point, block_names, noise_of
from benchmarks.cifar_audit import InMemory
from benchmarks.cifar_data import read_pictures
from benchmarks.cifar_training import OnDevice, moved
from benchmarks.harness import read_rows
from pipeline.models import create_model
from pipeline.noise.config import NoiseConfig
from pipeline.published import published_top1

VIT = "vit_tiny_patch16_224:patch_size=8,embed_dim=16,depth=3,num_heads=2"
RESNET = "resnet10t:stem_width=4"
LINES = (
    2 + 2 * 2 + 2 * 2
)  # no noise, and voting; two noises in training, each off and on; two at two sites in evaluation


@pytest.fixture(autouse=True)
def quiet_place(monkeypatch):
    monkeypatch.delenv("NOISYNN_SAMPLES", raising=False)
    monkeypatch.delenv("NOISYNN_TRACEBACK", raising=False)
    monkeypatch.setattr(command.signal, "signal", lambda *arguments: None)
    monkeypatch.setattr(cells, "code_digest", lambda: "tested")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_folder(tmp_path_factory.mktemp("pictures") / "small")


def words(source: Path, output: Path, *more: str) -> list[str]:
    text = (
        f"--models {VIT} --noises gaussian optimal_q --eval-sites last residual --seeds 2 --epochs 1 --batch 16 "
        "--train-images None --test-images None --dtype float32 --device cpu"
    )
    return ["accuracy", *text.split(), "--data", str(source), "--output", str(output), *more]


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory) -> Path:
    """The rows of a whole grid, by two tasks that write into one file."""
    output = tmp_path_factory.mktemp("run") / "accuracy.jsonl"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command.signal, "signal", lambda *arguments: None)
        patch.setattr(cells, "code_digest", lambda: "tested")
        for task in "01":
            assert command.main(words(folder, output, "--task", task, "--num-tasks", "2")) == 0
    return output


def test_tasks_share_the_cells_of_the_grid(run):
    rows = read_rows(run)
    done = {(row["seed"], row["contestant"]) for row in rows}
    noises = (
        "none",
        "gaussian 0.2 at blocks.2.attn (during both, prefix tokens spared)",
        "optimal_q at blocks.2.attn (during both, prefix tokens spared, k = 8)",
    )
    assert len(rows) == len(done) == 6
    assert done == {(seed, noise) for seed in (0, 1) for noise in noises}


def test_the_same_command_measures_nothing_again(run, folder, monkeypatch, capsys):
    before = run.read_bytes()
    monkeypatch.setattr(accuracy, "train", None)  # what is called would fail
    assert command.main(words(folder, run)) == 0
    out = capsys.readouterr().out
    assert "6 of 6 cells already" in out and "nothing is left to measure" in out
    assert run.read_bytes() == before
    assert all(sentence[:60] in out for sentence in accuracy_summary.WHAT_IT_SHOWS)


def test_a_clean_cell_is_asked_with_the_whole_grid_and_a_noisy_one_with_its_own(run):
    n = len(CLASSES) * TEST
    for row in read_rows(run):
        found = [Found(**of) for of in row["found"]]
        asked = [(of.during, of.point and of.point["site"], of.order, of.k, of.transductive) for of in found]
        assert asked[:2] == [("off", None, "any", 1, False), ("vote", None, "class", 10, True)]
        assert all(of.num_images == n and 0 <= of.correct_top1 <= n for of in found)
        if row["trained_with"] is None:
            sites = ("last", "residual")
            mixed = [("eval", site, order, 10, True) for site in sites for order in ("class", "shuffled")]
            assert set(asked[2:]) == {*(("eval", site, "any", 1, False) for site in sites), *mixed}
            assert len(asked) == 8
        elif row["trained_with"]["kind"] == "gaussian":
            assert asked[2:] == [("both", "last", "any", 1, False)]
        else:
            assert asked[2:] == [("both", "last", "class", 10, True), ("both", "last", "shuffled", 10, True)]


def test_every_line_of_the_table_follows_from_the_rows(run):
    rows = read_rows(run)
    lines = accuracy_summary.lines_of(rows)
    assert len(lines) == LINES
    top1 = {
        (row["seed"], row["trained_with"] and row["trained_with"]["kind"]): 100
        * row["found"][0]["correct_top1"]
        / row["found"][0]["num_images"]
        for row in rows
    }
    by_name = {(line.noise, line.site, line.acts): line for line in lines}
    assert by_name["none", "", ""].per_image == (top1[0, None], top1[1, None])
    trained = by_name["optimal q", "last", "training"]
    assert trained.per_image == (top1[0, "optimal_q"], top1[1, "optimal_q"])
    assert trained.differences == tuple(top1[seed, "optimal_q"] - top1[seed, None] for seed in (0, 1))
    assert by_name["optimal q", "residual", "inference"].per_image == ()  # at k = 1 it is the clean model
    assert len(by_name["optimal q", "residual", "inference"].class_order) == 2
    assert by_name["none", "", ""].published == "79.34 (ViT-T)"
    assert by_name["gaussian 0.2", "last", "inference"].published == "79.10 (ViT-T)"
    beside = [(line.noise, line.site, line.acts) for line in lines if line.published]
    assert beside == [("none", "", ""), ("gaussian 0.2", "last", "inference")]


def test_a_published_figure_stands_at_the_papers_place_and_phase_alone():
    """A ViT's noise acts at inference, a CNN's always (PAPER.md, section 3)."""
    for model, acts, figure in ((VIT, "inference", "80.69 (ViT-T)"), (RESNET, "both", "79.62 (R18)")):
        rows = [grid_row(model, None), *(grid_row(model, shift(site)) for site in ("last", "image"))]
        lines = accuracy_summary.lines_of(rows)
        assert {(line.site, line.acts) for line in lines if line.noise == "circular shift 0.3"} == {
            (site, phase) for site in ("last", "image") for phase in ("training", "both", "inference")
        }
        beside = {(line.site, line.acts): line.published for line in lines if line.published}
        assert {key: text for key, text in beside.items() if key[0]} == {("last", acts): figure}


def shift(site: str) -> dict:
    return {"kind": "circular_shift", "strength": 0.3, "site": site}


def grid_row(model: str, trained_with: dict | None) -> dict:
    """Clean: asked at both sites."""
    counts = {"k": 10, "correct_top1": 5, "num_images": 10, "transductive": True, "class_mates": 1.0}
    off = counts | {"during": "off", "point": None, "order": "any"}
    during = "eval" if trained_with is None else "both"
    points = [shift("last"), shift("image")] if trained_with is None else [trained_with]
    found = [counts | {"during": during, "point": point, "order": "class"} for point in points]
    return {"part": model, "seed": 0, "trained_with": trained_with, "found": [off, *found]}


def untrained(folder) -> tuple[OnDevice, torch.nn.Module, InMemory]:
    """Pictures, a model whose head answers several classes, and who asks it."""
    data = moved(read_pictures(folder, None, None), torch.device("cpu"))
    torch.manual_seed(0)
    model = create_model(Model(VIT).config, data.classes, data.side)
    torch.nn.init.normal_(model.head.weight)
    return data, model, InMemory(model, data.tested, seed=0)


def test_salt_and_pepper_is_asked_of_a_picture_on_its_own_too(folder):
    """In its group it takes the extremes of all; alone its own: no other picture can change the answer."""
    _, model, respondent = untrained(folder)
    point = Point("salt_and_pepper", 0.5, "residual")
    noise = noise_of(point, model, "eval", 10)
    plain = respondent.answers(NoiseConfig(), np.arange(40))
    found = list(accuracy._with_noise("eval", point, noise, respondent, plain, 0))
    asked = [(of.order, of.k, of.transductive, of.class_mates is None) for of in found]
    assert asked == [("class", 10, True, False), ("shuffled", 10, True, False), ("any", 1, False, True)]
    alone = replace(noise, group_size=1)
    right = [respondent.answers(alone, np.array([i])).top1 for i in range(40)]
    assert found[-1].correct_top1 == sum(right) != plain.top1


def test_mixing_at_inference_is_done_by_hand_alike(folder):
    """Optimal Q into the last block, all tokens: its definition on the block's inputs, without an injector."""
    data, model, respondent = untrained(folder)
    noise = noise_of(Point("optimal_q", None, "residual"), model, "eval", 10)
    order = np.random.RandomState(0).permutation(40)
    found = respondent.answers(noise, order)

    def mix(module, args):
        groups = args[0].view(4, 10, *args[0].shape[1:])
        return (((groups + groups.sum(1, keepdim=True)) / 11).flatten(0, 1), *args[1:])

    mean, std = (torch.tensor(model.pretrained_cfg[name]).view(3, 1, 1) for name in ("mean", "std"))
    handle = model.blocks[2].register_forward_pre_hook(mix)
    with torch.no_grad():
        expected = model((data.tested.images[order].permute(0, 3, 1, 2) / 255 - mean) / std)
    handle.remove()
    assert np.array_equal(found.sample_ids, order)
    assert np.array_equal(found.predicted, expected.argmax(1).numpy())
    assert not np.array_equal(found.predicted, respondent.plain_logits[order].argmax(1).numpy())


@pytest.mark.parametrize(
    ("text", "sites"),
    [
        (VIT, {"embedding": "blocks.0", "block1": "blocks.1.attn", "last": "blocks.2.attn", "residual": "blocks.2"}),
        (RESNET, {"embedding": "layer1.0", "block1": "layer2.0", "last": "layer4.0", "residual": None}),
    ],
)
def test_a_sites_word_is_a_place_of_each_family(text, sites):
    model = create_model(Model(text).config, 4, 16)
    for word, place in sites.items():
        noise = noise_of(Point("optimal_q", None, word), model, "both", 8)
        assert (noise and noise.site) == place
    assert noise_of(Point("optimal_q", None, "image"), model, "both", 8).site == "image"
    chosen = noise_of(Point("optimal_q", None, "random"), model, "both", 8)
    assert (chosen.pick, len(chosen.site_patterns)) == ("random_one", len(block_names(model)))


def test_a_noise_that_is_no_identity_at_k_1_is_a_fault(folder):
    *_, respondent = untrained(folder)
    alone = respondent.answers(NoiseConfig("gaussian", 50.0, "blocks.2", "eval"), np.arange(40))
    plain = respondent.answers(NoiseConfig(), np.arange(40))
    with pytest.raises(ValueError, match=r"at k = 1 [1-9]\d* answers differ"):
        accuracy._check_identity(alone, plain, NoiseConfig("optimal_q", None, "blocks.2", "eval"))


def test_figures_have_intervals_over_seeds():
    assert accuracy_summary.shown(()) == ""
    assert accuracy_summary.shown((50.0,)) == "50.00"
    assert accuracy_summary.shown((50.0, 52.0, 54.0)) == "52.00 (47.03 to 56.97)"  # 4.303 x 2 / sqrt(3)
    assert accuracy_summary.shown((-1.0, 1.0), "+") == "+0.00 (-12.71 to +12.71)"
    assert accuracy_summary.shown((90.0, 100.0)) == "95.00 (31.47 to 100.00)"  # no share is above 100 %


def test_published_figures_are_of_the_model_or_of_the_smallest_of_its_family():
    assert published_top1("vit_base_patch16_224.augreg_in21k_ft_in1k", "circular_shift") == ("ViT-B", 89.99)
    assert published_top1("resnet50", "gaussian") == ("R50", 69.62)
    assert published_top1("resnet10t", "none") == ("R18", 63.90)
    assert published_top1("vit_tiny_patch16_224", "optimal_q") == ("ViT-T", None)
    assert published_top1("convnext_tiny", "none") is None


def test_bad_options_end_with_one_line(folder, tmp_path, capsys):
    output = tmp_path / "accuracy.jsonl"
    for more, complaint in (
        (("--models", "vit_tiny_patch16_224:depth"), "'depth' is no NAME=VALUE"),
        (("--models", "mixer_s32_224"), "is neither a ViT nor a ResNet"),
        (("--eval-sites", "block9"), "has block0 to block2"),
        (("--train-sites", "somewhere"), "site 'somewhere' is none of image, embedding"),
        (("--batch", "20"), "--batch 20: a multiple of --group-train 8"),
        (("--group-eval", "41"), "--group-eval 41 is more than the 40 test pictures"),
        (("--num-tasks", "2"), "which one is this?"),
        (("--group-eval", "1"), "--group-eval 1: at least 2"),
        (("--eval-sites", "last", "last"), "--eval-sites names last twice"),
        (("--circular-shift", "0.7", "--noises", "circular_shift"), "noise.strength is 0.7"),
        (("--lr", "1e30", "--seeds", "1"), "lower --lr"),
    ):
        error = refused(capsys, *words(folder, output, *more))
        assert complaint in error and error.count("\n") == 1, error
    assert not output.exists()


def test_the_results_are_json_that_names_its_conditions(run, folder):
    for row in read_rows(run):
        assert row["conditions"]["model"] == VIT
        assert str(folder.parent) not in json.dumps(row["conditions"])
        assert {"environment", "command", "code", "time_utc"} <= row.keys()
