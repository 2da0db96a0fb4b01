"""benchmarks cifar: a small real training where the smallest GPU environment's packages are all there is."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from bare_environment import CODE, run_bare
from hypothesis import given
from hypothesis import strategies as st
from small_cifar import CLASSES, TEST, pack, write_folder

from benchmarks import __main__ as command
from benchmarks import cells, cifar, cifar_audit, cifar_summary
from benchmarks.cifar import CifarOptions, train_twin
from benchmarks.cifar_data import read_pictures
from benchmarks.cifar_summary import CLEAN, NOISY, Parting
from benchmarks.cifar_training import OnDevice, moved
from benchmarks.harness import read_rows
from pipeline.flops import forward_flops
from pipeline.models import create_model
from pipeline.noise.config import NoiseConfig

PLACES = ("official", "residual")
SMALL = CifarOptions(epochs=2, width=16, depth=2, batch=16, dtype="float32", compile=False, device="cpu")


@pytest.fixture(autouse=True)
def quiet_place(monkeypatch):
    monkeypatch.delenv("NOISYNN_SAMPLES", raising=False)
    monkeypatch.delenv("NOISYNN_TRACEBACK", raising=False)
    monkeypatch.setattr(command.signal, "signal", lambda *arguments: None)
    monkeypatch.setattr(cells, "code_digest", lambda: CODE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_folder(tmp_path_factory.mktemp("pictures") / "small")


@pytest.fixture(scope="module")
def archive(folder) -> Path:
    return pack(folder)


@pytest.fixture(scope="module")
def data(folder) -> OnDevice:
    return moved(read_pictures(folder, None, None), torch.device("cpu"))


def words(source: Path, output: Path, *more: str) -> list[str]:
    text = "--epochs 2 --seeds 1 --width 16 --depth 2 --batch 16 --no-compile --device cpu --dtype float32"
    return ["cifar", *text.split(), "--data", str(source), "--output", str(output), *more]


@pytest.fixture(scope="module")
def run(archive, tmp_path_factory) -> tuple[Path, str]:
    """(rows, standard output) of a run in the smallest environment."""
    output = tmp_path_factory.mktemp("run") / "cifar.jsonl"
    return output, run_bare(words(archive, output))


# ---- the whole ----


def test_both_twins_are_trained_and_audited(run, archive):
    rows = read_rows(run[0])
    assert [(row["part"], row["contestant"]) for row in rows] == [("seed 0", CLEAN), ("seed 0", NOISY)]
    noise = "optimal_q at blocks.1.attn (during train, prefix tokens spared, k = 8)"
    assert [row["conditions"]["noise"] for row in rows] == ["none", noise]
    for row in rows:
        assert row["places"] == {"blocks.1.attn": "official", "blocks.1": "residual"}
        found = {(of["protocol"], row["places"].get(of["site"]), of["k"]): of for of in row["audit"]}
        both = [(protocol, place, k) for protocol, k in ((2, 1), (3, 10), (4, 10), (5, 10)) for place in PLACES]
        assert {(1, None, 1), (6, None, 10), *both} < found.keys()
        for (protocol, _, k), of in found.items():
            assert of["transductive"] == (k > 1)
            if of["measure"] == "top1" and protocol != 9:
                assert of["n"] == len(CLASSES) * TEST
                assert of["interval"][0] <= of["value"] <= of["interval"][1]
        assert found[1, None, 1]["class_mates"] is None
        assert found[6, None, 10]["class_mates"] == found[3, "official", 10]["class_mates"] == 1
        assert 0 < found[4, "residual", 10]["class_mates"] < 0.6
        assert [found[2, place, 1]["differing"] for place in PLACES] == [0, 0]
        assert str(archive.parent) not in json.dumps(row["conditions"])
    assert rows[0]["last_epoch_loss"] != rows[1]["last_epoch_loss"]


def test_the_summary_has_the_headline_first(run):
    table, _, rest = run[1].partition("k = 1 equals")
    lines = [line for line in table.splitlines() if " | " in line]
    assert [line.split(" | ")[:2] for line in lines[1:4]] == [
        ["per image, noise off", CLEAN],
        ["per image, noise off", NOISY],
        ["optimal Q, official place, class order", CLEAN],
    ]
    assert len(lines) == 1 + 2 * 8
    assert rest.startswith(" noise off to the last picture")
    assert f"{cifar_summary.part(read_rows(run[0])).sentence()}\n" in rest


def test_a_second_run_trains_nothing_and_shows_the_first(run, archive, monkeypatch, capsys):
    before = run[0].read_bytes()
    monkeypatch.setattr(cifar, "train_twin", None)  # what is called would fail
    assert command.main(words(archive, run[0])) == 0
    text = capsys.readouterr().out
    assert "has 2 of 2 cells already (seed 0, clean; seed 0, noisy): nothing is left to measure" in text
    assert run[1].rpartition("rows with")[0].splitlines()[-1] in text  # the sentence
    assert run[0].read_bytes() == before


def test_a_run_that_is_cut_goes_on_and_comes_to_the_same(run, folder, tmp_path, monkeypatch, capsys):
    output = tmp_path / "cifar.jsonl"

    def cut(options, data, seed, twin, on_turn):
        if twin == NOISY:
            raise KeyboardInterrupt
        return train_twin(options, data, seed, twin, on_turn)

    monkeypatch.setattr(cifar, "train_twin", cut)
    assert command.main(words(folder, output)) == 130
    assert [row["contestant"] for row in read_rows(output)] == [CLEAN]
    monkeypatch.setattr(cifar, "train_twin", train_twin)
    capsys.readouterr()
    assert command.main(words(folder, output)) == 0
    assert "has 1 of 2 cells already (seed 0, clean): these are not measured again" in capsys.readouterr().out
    for whole, pieced in zip(read_rows(run[0]), read_rows(output), strict=True):
        assert (whole["audit"], whole["last_epoch_loss"]) == (pieced["audit"], pieced["last_epoch_loss"])


def test_bad_sources_and_options_end_with_one_line(archive, folder, tmp_path, capsys):
    output = tmp_path / "cifar.jsonl"
    cut = tmp_path / "cut.tar.xz"
    cut.write_bytes(archive.read_bytes()[: archive.stat().st_size // 2])
    bare = [word for word in words(folder, output) if word not in ("--data", str(folder))]
    for arguments, complaint in (
        (bare, "error: no pictures to train on: give --data FOLDER_OR_ARCHIVE"),
        (bare, "or set NOISYNN_SAMPLES to a folder with cifar10-jpeg.tar.xz"),
        (words(tmp_path / "absent.tar", output), "absent.tar cannot be read"),
        (words(cut, output), "cut.tar.xz cannot be read"),
        (words(folder, output, "--train-images", "10"), "--train-images 10: give a multiple of the 4 classes"),
        (words(folder, output, "--test-images", "44"), "--test-images 44: test/ant has 10 pictures; lower it"),
        (words(folder, output, "--batch", "64"), "--batch 64 is more than the 48 pictures: lower it"),
        (words(folder, output, "--batch", "12"), "--batch 12: a multiple of 8"),
        (words(folder, output, "--patch", "5"), "--patch 5: does not divide the pictures' side of 16"),
        (words(folder, output, "--width", "100"), "--width 100: at most 64, or a multiple of it"),
        (words(folder, output, "--minutes", "0"), "--minutes 0.0: a finite time above 0"),
        (words(folder, output, "--lr", "0"), "optim.lr is 0.0: it must be above 0"),
        (words(folder, output, "--noise", "pink"), "'pink' is none of optimal_q"),
        (words(folder, output, "--lr", "1e30"), "lower --lr"),
    ):
        assert command.main(arguments) == 2, arguments
        error = capsys.readouterr().err
        assert complaint in error and error.count("\n") == 1, error
    assert not output.exists()


# ---- twins ----


@pytest.mark.parametrize("strength", [0.0, 0.5])
def test_noise_alone_is_between_the_twins(data, monkeypatch, strength):
    noise = NoiseConfig("gaussian", strength, site="blocks.1.attn")
    monkeypatch.setattr(CifarOptions, "noise_of", lambda options, twin: noise if twin == NOISY else NoiseConfig())
    trained = [train_twin(SMALL, data, 1, twin, print) for twin in (CLEAN, NOISY)]
    clean, noisy = (one.model.state_dict() for one in trained)
    distance = max((clean[name] - noisy[name]).abs().max().item() for name in clean)
    assert clean.keys() == noisy.keys()
    assert distance < 1e-5 if strength == 0 else distance > 1e-3
    assert len(trained[0].epoch_seconds) == SMALL.epochs


@pytest.mark.parametrize("name", ["optimal_q", "circular_shift", "gaussian", "salt_and_pepper"])
def test_each_named_noise_is_at_the_official_place_in_training(name):
    noise = replace(SMALL, noise=name).noise_of(NOISY)
    assert (noise.kind, noise.site, noise.during, noise.group_size) == (name, "blocks.1.attn", "train", 8)
    assert SMALL.noise_of(CLEAN) == NoiseConfig()


def test_the_docstrings_arithmetic():
    forward = forward_flops(CifarOptions().model, 10, 32)
    assert forward == pytest.approx(1.42e9, rel=0.01)
    assert forward == pytest.approx(2 * 6 * (12 * 384**2 * 65 + 2 * 65**2 * 384), rel=0.01)
    assert 3 * forward * 50_000 == pytest.approx(213e12, rel=0.01)
    assert 6 * 40 * 3 * forward * 50_000 == pytest.approx(51e15, rel=0.01)


# ---- audit and summary ----


@pytest.fixture
def model(data):
    torch.manual_seed(0)
    model = create_model(SMALL.model, data.classes, data.side)
    torch.nn.init.normal_(model.head.weight)  # timm starts it near 0, so that all answers would be alike
    return model


def test_the_audit_counts_what_the_model_answers(data, model):
    found = cifar_audit.audit(model, data.tested, SMALL.depth, shuffle_seed=0)
    settings = model.pretrained_cfg
    x = data.tested.images.permute(0, 3, 1, 2) / 255
    mean, std = (torch.tensor(settings[name]).view(3, 1, 1) for name in ("mean", "std"))
    with torch.no_grad():
        logits = model((x - mean) / std)
    labels = torch.from_numpy(data.tested.labels)
    counts = {row.protocol: row.counts for row in found if row.protocol in (1, 6)}
    assert counts[1] == ((logits.argmax(1) == labels).sum(),)
    votes = logits.view(4, TEST, -1).mean(1).argmax(1)  # the labels are class by class
    assert counts[6] == (TEST * (votes == torch.arange(4)).sum(),)
    assert not model.training


def test_groups_are_of_the_order_that_is_asked_for(data, model):
    noise = cifar_audit.places(SMALL.depth)["residual"]
    tested = data.tested
    model.eval()
    alike = np.arange(40).reshape(4, 10).T.ravel()  # one of each class in turn
    plain = cifar_audit.logits_of(model, NoiseConfig(), tested, alike)
    assert torch.allclose(plain, cifar_audit.logits_of(model, NoiseConfig(), tested, np.arange(40)), atol=1e-6)
    mixed = cifar_audit.logits_of(model, noise, tested, alike)
    first = cifar_audit.Tested(tested.images[alike[:10]], tested.labels[alike[:10]])
    assert torch.allclose(mixed[alike[:10]], cifar_audit.logits_of(model, noise, first, np.arange(10)), atol=1e-6)
    assert not torch.allclose(mixed, plain, atol=1e-2)


def test_a_k_of_1_that_is_no_identity_is_noticed(run, capsys):
    rows = read_rows(run[0])
    wrong = next(of for of in rows[0]["audit"] if of["protocol"] == 2 and of["site"] == "blocks.1")
    wrong["differing"] = 3
    cifar_summary.print_summary(rows)
    text = capsys.readouterr().out
    assert "FAULT: k = 1 is not noise off (seed 0, clean, residual: 3 answers differ): do not use" in text
    assert "equals noise off" not in text


def parting(clean, alone, ordered, shuffled=(0.0, 0.0, 0.0), place="residual") -> Parting:
    return Parting(place, 1.0, clean, alone, ordered, shuffled)


figures = st.lists(st.floats(0, 100), min_size=3, max_size=3).map(tuple)


@given(figures, figures, figures)
def test_a_gain_is_the_sum_of_its_parts(clean, alone, ordered):
    of = parting(clean, alone, ordered)
    assert of.gain == pytest.approx(of.from_training + of.transductive, abs=1e-9)


@pytest.mark.parametrize(
    ("of", "parts", "absent"),
    [
        (
            parting((60.0, 61.0, 62.0), (61.0, 61.5, 63.0), (90.0, 95.0, 97.0), (30.0, 31.0, 32.0)),
            [
                "(residual stream, all tokens, k = 10, class order) has 94.00 %, the clean twin per image 61.00 %",
                "of this gain 32.17 of the 33.00 points are transductive, from the 9 others of a group",
                "of which 100.0 % are of the picture's class (shuffled: 31.00 %)",
                "training with noise gave +0.83 points per image (+0.50 to +1.00 over 3 seeds).",
            ],
            "not told apart",
        ),
        (
            parting((60.0, 61.0), (59.0, 61.5), (70.0, 70.0)),
            ["all 9.50 points are transductive", "gave -0.25 points per image (-1.00 to +0.50 over 2 seeds: not told"],
            "of the 9.50",
        ),
        (
            parting((60.0,), (62.0,), (61.0,), place="official"),
            ["(official place, ", "of this gain nothing is transductive", "gave +2.00 points per image (one seed)."],
            "others of a group",
        ),
        (parting((60.0,), (62.0,), (60.0,)), ["has 60.00 %", "60.00 %: there is no gain to divide."], "transductive"),
    ],
)
def test_the_sentence_follows_from_the_figures(of, parts, absent):
    sentence = of.sentence()
    assert all(part in sentence for part in parts), sentence
    assert absent not in sentence.partition(": ")[2], sentence
    assert sentence.count(".\n") == 0 and sentence.endswith(".")


def row(seed: int, twin: str, per_image: int, official: int, residual: int) -> dict:
    counts = {(1, None): per_image, (3, "a"): official, (3, "b"): residual, (4, "a"): 1, (4, "b"): 2, (6, None): 3}
    audit = [
        {"protocol": protocol, "site": site, "value": count / 100, "class_mates": None if protocol == 1 else 0.9}
        for (protocol, site), count in counts.items()
    ]
    return {"seed": seed, "contestant": twin, "audit": audit, "places": {"a": "official", "b": "residual"}}


def test_parts_are_of_the_place_that_gains_most_and_of_seeds_with_both_twins():
    rows = [row(0, CLEAN, 50, 51, 52), row(0, NOISY, 53, 60, 70), row(1, CLEAN, 54, 55, 56)]
    found = cifar_summary.part(rows)
    assert (found.place, found.class_mate_share) == ("residual", 0.9)
    assert (found.clean, found.alone, found.ordered, found.shuffled) == ((50,), (53,), (70,), (2,))
    found = cifar_summary.part([*rows, row(1, NOISY, 51, 90, 60)])
    assert (found.place, found.clean, found.ordered) == ("official", (50, 54), (60, 90))
    assert cifar_summary.part(rows[2:]) is None
