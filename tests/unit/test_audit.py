"""`python -m pipeline audit` on whole checkpoints and shards: what it writes, and what it refuses in one line."""

import dataclasses
import hashlib
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from small_shards import CLASSES, jpeg

from data_prep.distribute import ShardOptions, shard
from data_prep.foreign import IndexOptions, index
from data_prep.manifest import read_manifest, write_manifest
from pipeline import checkpoint as ckpt
from pipeline.__main__ import main
from pipeline.audit import subject
from pipeline.audit.class_order import class_ordered
from pipeline.audit.markdown import escaped
from pipeline.audit.protocols import Settings
from pipeline.audit.rows import NAMES, Row
from pipeline.audit.run import AuditConfig, audit
from pipeline.audit.subject import noises_of, subject_of
from pipeline.audit.table import terminal_lines
from pipeline.checkpoint import WEIGHTS_NAME
from pipeline.config import TrainConfig
from pipeline.data.augment import AugmentConfig
from pipeline.data.loader import DataConfig, open_split
from pipeline.evaluate import EvaluateConfig, evaluate
from pipeline.models import ModelConfig, create_model
from pipeline.noise.config import NoiseConfig
from pipeline.parallel import Ranks
from pipeline.published import HEADLINES
from pipeline.sections import to_json

ALONE = Ranks(0, 1, launched=False)
MODEL = ModelConfig("vit_tiny_patch16_224", {"depth": 2, "embed_dim": 24, "num_heads": 2, "patch_size": 8})
SMALLER = ModelConfig(MODEL.name, MODEL.options | {"depth": 1})
SPREAD = 0.6
SMALL = Settings(ks=(2, 4, 8), shuffles=2, victims=6)


NOISY = NoiseConfig("gaussian", 0.2)


def make_run(
    folder: Path, noise: NoiseConfig | None = NOISY, seed: int = 0, model: ModelConfig = MODEL, epochs: int = 90
) -> Path:
    """A run folder with one checkpoint of an untrained model of the small split's three classes. noise None: without.

    Its answers are spread over the classes, and other pictures in a group change them.
    """
    config = TrainConfig(
        run=folder,
        seed=4,
        epochs=epochs,
        model=model,
        data=DataConfig(image_size=32),
        noise=noise or NoiseConfig(),
        augment=AugmentConfig(eval_crop_share=0.5),
    )
    torch.manual_seed(seed)
    net = create_model(config.model, len(CLASSES), 32)
    for parameter in net.parameters():  # timm's begin so small that every picture would have one answer
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=SPREAD)
    generation = ckpt.temporary_folder(config.run, 12)
    generation.mkdir(parents=True)
    save_file(net.state_dict(), generation / WEIGHTS_NAME)
    ckpt.write_json(generation / ckpt.CONFIG_NAME, to_json(config) | {"classes": list(CLASSES), "step": 12})
    ckpt.publish_generation(config.run, 12, keep=2)
    return config.run


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return make_run(tmp_path_factory.mktemp("run") / "r<u>n")


def config_of(run: Path, data: object, **options) -> AuditConfig:
    return AuditConfig(run, str(data), **{"protocols": SMALL, "batch": 8, "workers": 0} | options)


@pytest.fixture(scope="module")
def done(run, raw_split, tmp_path_factory):
    """(what was found, its folder)."""
    out = tmp_path_factory.mktemp("out") / "audit"
    twin = make_run(tmp_path_factory.mktemp("twin") / "twin", noise=None, seed=1, epochs=80)
    return audit(config_of(run, raw_split, twin=twin, output=out), ALONE, ["r<u>n", "val"]), out


def test_other_pictures_change_the_counts(done):
    """Else no count of a protocol could be a wrong one."""
    rows = done[0].rows
    of = {(row.protocol, row.k): row.counts for row in rows}
    assert any(len({of[1, 1][0], of[3, k][0], of[4, k][0]}) == 3 for k in SMALL.ks)
    assert 0 < of[1, 1][0] < 24


def test_counts_are_those_of_evaluate(done, run, raw_split):
    """The plain count, and the same noise in the order that both know."""
    found, _ = done
    plain = evaluate(EvaluateConfig(run, raw_split, batch=24, workers=0, output=run / "x.json"), ALONE).accuracies[0]
    assert found.plain.counts == (plain.correct_top1,) and found.plain.n == 24
    noise = NoiseConfig("optimal_q", site="blocks.1.attn", group_size=4)
    config = EvaluateConfig(run, raw_split, noise=noise, orders=("shuffled",), batch=24, workers=0)
    shuffled = evaluate(config, ALONE).accuracies[1]
    (row,) = [row for row in found.rows if (row.protocol, row.k) == (4, 4)]
    assert row.counts[0] == shuffled.correct_top1
    assert [row.differing for row in found.rows if row.protocol == 2] == [0]


def test_the_json_holds_rows_verdict_and_circumstances(done, run):
    found, out = done
    body = json.loads((out / "audit.json").read_text())
    assert [row["protocol"] for row in body["rows"]] == [row.protocol for row in found.rows]
    assert {1, 2, 3, 4, 5, 6, 7, 8, 9} == {row["protocol"] for row in body["rows"]}
    assert body["verdict"] == [{"kind": finding.kind, "words": finding.words} for finding in found.verdict]
    (weights,) = (run / "checkpoints").glob("step-*/" + WEIGHTS_NAME)
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


def test_the_terminal_has_one_table_and_the_verdict(run, raw_split, tmp_path, capsys):
    words = ["--ks", "2", "--shuffles", "1", "--workers", "0", "--output", str(tmp_path), "--victims", "5"]
    assert main(["audit", str(run), str(raw_split), *words]) == 0
    out = capsys.readouterr().out
    assert out.startswith("features of 24 pictures before blocks.1.attn")
    assert out.count("audit of vit_tiny_patch16_224") == 1
    assert "not run" in out and "Verdict" in out and "Per image, noise off" in out
    assert json.loads((tmp_path / "audit.json").read_text())["config"]["protocols"]["ks"] == [2]


def test_results_go_into_the_run_folder_by_default(run, raw_split):
    audit(config_of(run, raw_split, protocols=Settings(ks=(2,), shuffles=1, victims=2)), ALONE)
    assert (run / "audit" / "audit.html").is_file()
    shutil.rmtree(run / "audit")


# Which noise, and where


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


def test_sites_and_noises_are_crossed(run):
    found = noises_of(subject_of(run, False), ["optimal_q", "circular_shift"], 0.3, ("blocks.0", "blocks.1"), True)
    assert [(n.site, n.kind, n.strength) for n in found] == [
        ("blocks.0", "optimal_q", None),
        ("blocks.0", "circular_shift", 0.3),
        ("blocks.1", "optimal_q", None),
        ("blocks.1", "circular_shift", 0.3),
    ]
    assert not any(n.spare_prefix_tokens for n in found)


# The order within a class


def ordered(manifest: Path, any_order: bool = False) -> tuple[list[str], str]:
    """File names in class order, and what is said of it."""
    reader = open_split(str(manifest), DataConfig(image_size=32, workers=1), AugmentConfig(), 0)
    found = class_ordered(str(manifest), read_manifest(manifest), reader, any_order)
    return [SOURCE[hashlib.sha256(reader.read(sample)).hexdigest()] for sample in found.ids.tolist()], found.words


SOURCE = {
    hashlib.sha256(jpeg(8 * label + i)).hexdigest(): f"{name}/{i}.jpg"
    for label, name in enumerate(CLASSES)
    for i in range(8)
}
IN_ORDER = sorted(SOURCE.values())


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("pictures")
    for label, name in enumerate(CLASSES):
        (root / name).mkdir()
        for i in range(8):
            (root / name / f"{i}.jpg").write_bytes(jpeg(8 * label + i))
    return root


def sharded(pictures: Path, out: Path, **options) -> Path:
    return shard(ShardOptions(str(pictures), str(out), processes=1, samples_per_shard=7, **options)).path


def test_shuffled_shards_are_audited_in_the_order_of_the_file_names(pictures, tmp_path):
    names, words = ordered(sharded(pictures, tmp_path))
    assert names == IN_ORDER and "as the tars' members are called" in words


def test_shards_that_kept_their_order_need_no_names(pictures, tmp_path):
    names, words = ordered(sharded(pictures, tmp_path, keep_order=True))
    assert names == IN_ORDER and "as the shards have it" in words


@pytest.mark.parametrize("name", ["ant_7", "7"])
def test_names_with_the_class_in_front_and_skipped_pictures_are_known_too(name, pictures, tmp_path):
    shutil.copytree(pictures, tmp_path / "source")
    for folder in (tmp_path / "source").iterdir():
        for path in list(folder.iterdir()):
            path.rename(folder / f"{path.stem if name == '7' else f'{folder.name}_{path.stem}'}.JPEG")
    (tmp_path / "source" / "bee" / f"{name.replace('ant', 'bee')}.JPEG").write_bytes(b"no picture")
    names, words = ordered(sharded(tmp_path / "source", tmp_path / "out", on_error="skip"))
    assert names == [name for name in IN_ORDER if name != "bee/7.jpg"] and "members are called" in words


def odd_names(pictures: Path, out: Path) -> Path:
    """Dots and blanks do not survive in a tar's names."""
    shutil.copytree(pictures, out / "source")
    (out / "source" / "ant" / "0.jpg").rename(out / "source" / "ant" / "z. 0.jpg")
    return sharded(out / "source", out / "shards")


def foreign(pictures: Path, out: Path) -> Path:
    manifest = sharded(pictures, out)
    manifest.unlink()
    for path in out.glob("*.idx"):
        path.unlink()
    return index(IndexOptions((str(out),), hash=True, processes=1)).path


@pytest.mark.parametrize(
    ("split", "why"),
    [(foreign, r"a source of kind 'webdataset-tars' has an order of its own"), (odd_names, "its shards were shuffled")],
)
def test_an_order_that_is_not_known_is_refused_and_taken_on_demand(split, why, pictures, tmp_path):
    manifest = split(pictures, tmp_path / "split")
    with pytest.raises(ValueError, match=rf"{why}.*--keep-order.*--any-order \(not with --paper\)") as refused:
        ordered(manifest)
    assert "\n" not in str(refused.value)
    names, words = ordered(manifest, any_order=True)
    assert sorted(names) == IN_ORDER and [n[:3] for n in names] == [n[:3] for n in IN_ORDER]
    assert words.startswith("by sample id: ")


# --paper


@pytest.fixture
def small_paper(monkeypatch, tmp_path) -> Path:
    """A file of weights of a ViT that is smaller than the paper's, of three classes."""
    monkeypatch.setitem(HEADLINES, 224, HEADLINES[224]._replace(model="vit_tiny_patch16_224"))
    monkeypatch.setattr(subject, "synsets", lambda name: CLASSES)
    torch.manual_seed(0)
    model = create_model(ModelConfig("vit_tiny_patch16_224"), len(CLASSES), 224)
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    return tmp_path / "weights.safetensors"


def test_paper_sets_the_official_run_and_prints_what_is_published(small_paper, pictures, tmp_path, capsys):
    data = sharded(pictures, tmp_path / "shards")
    words = ["--paper", "224", "--ks", "10", "--shuffles", "1", "--victims", "2", "--workers", "0"]
    assert main(["audit", str(small_paper), str(data), *words]) == 0
    body = json.loads((tmp_path / "audit" / "audit.json").read_text())
    (noise,) = body["noises"]
    assert (noise["kind"], noise["site"], noise["spare_prefix_tokens"]) == ("optimal_q", "blocks.11.attn", True)
    assert body["published"]["marked"] == "published"
    assert body["weights_sha256"] == hashlib.sha256(small_paper.read_bytes()).hexdigest()
    out = capsys.readouterr().out
    assert "normalised as timm has it for these weights" in " ".join(out.split())
    assert "84.53 % published" in out and "93.87 % published" in out
    page = (tmp_path / "audit" / "audit.html").read_text()
    assert "84.53 (published)" in page and "93.87 (published)" in page


def test_the_published_settings_are_the_paper_s():
    assert {r: tuple(p) for r, p in HEADLINES.items()} == {
        224: ("vit_base_patch16_224.augreg_in21k_ft_in1k", 84.53, 93.87),
        384: ("vit_base_patch16_384.augreg_in21k_ft_in1k", 86.01, 95.65),
    }


def test_paper_squashes_and_takes_the_model_s_own_normalisation(small_paper):
    official = subject.published_subject(small_paper, 224)
    assert (official.augment.eval_crop, official.augment.interpolation) == ("squash", "bilinear")
    assert official.data.image_size == 224
    assert official.model.pretrained_cfg["mean"] == (0.5, 0.5, 0.5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch": 0}, "batch is 0"),
        ({"workers": -1}, "workers is -1"),
        ({"noises": ()}, "noises is empty"),
        ({"sites": ("",)}, "sites has an empty name: give places"),
        ({"sites": ("blocks.0, ",)}, "sites has an empty name: give places"),
        ({"noises": ("circular_shift",)}, "circular_shift needs --strength"),
        ({"strength": 0.3}, "circular_shift alone takes --strength"),
        ({"paper": 224, "any_order": True}, "--paper is the official run, which settles --any-order"),
        ({"paper": 224, "sites": ("blocks.0",)}, "settles --sites"),
        ({"paper": 384, "twin": Path("t")}, "settles --twin"),
        ({"paper": 224, "protocols": Settings(ks=(2,))}, "of k = 10: name it among --ks"),
    ],
)
def test_options_that_do_not_go_together_are_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        AuditConfig(Path("x"), "y", **options)


# Bad input: one line with the mend


def refused(words: list[str], capsys) -> str:
    assert main(["audit", *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1, error
    return error


def test_other_classes_are_named(run, raw_split, tmp_path, capsys):
    other = tmp_path / "other"
    shutil.copytree(raw_split.parent, other)
    manifest = dataclasses.replace(read_manifest(other / raw_split.name), classes=("ant", "bear", "cat"))
    write_manifest(dataclasses.replace(manifest, folder=other))
    error = refused([str(run), str(other / raw_split.name)], capsys)
    assert "the first that differ are number 1, 'bear' and 'bee'" in error
    assert not (run / "audit").exists()


def test_unlabelled_data_is_refused(run, pictures, tmp_path, capsys):
    (tmp_path / "all" / "pictures").mkdir(parents=True)
    for path in (pictures / "ant").iterdir():
        shutil.copy(path, tmp_path / "all" / "pictures")
    error = refused([str(run), str(sharded(tmp_path / "all", tmp_path / "shards"))], capsys)
    assert "has one class, 'pictures': pictures without labels have no accuracy" in error


def test_fewer_pictures_than_k_and_a_k_below_two_are_refused(run, raw_split, capsys):
    error = refused([str(run), str(raw_split), "--ks", "2", "25"], capsys)
    assert "there are 24 pictures, fewer than k = 25: name smaller groups with --ks" in error
    assert "ks has 0: a group mixes at least 2" in refused([str(run), str(raw_split), "--ks", "0"], capsys)


def test_an_unknown_order_is_refused_by_the_command(run, pictures, tmp_path, capsys):
    manifest = foreign(pictures, tmp_path / "foreign")
    body = dataclasses.replace(read_manifest(manifest), classes=CLASSES)
    write_manifest(body)
    words = [str(run), str(manifest), "--ks", "2", "--shuffles", "1", "--victims", "2", "--workers", "0"]
    assert "ImageFolder's order within a class is not known" in refused(words, capsys)
    assert main(["audit", *words, "--any-order", "--output", str(tmp_path / "out")]) == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--sites", "blocks.7"], "noise.site 'blocks.7' is no module"),
        (["--scratch", "nowhere"], "scratch nowhere is no folder"),
        (["--twin", "nowhere"], "no checkpoint at nowhere"),
        (["--paper", "224"], "is no file: --paper takes timm's vit_base_patch16_224"),
    ],
)
def test_what_is_not_there_is_named(words, message, run, raw_split, capsys):
    small = ["--ks", "10"] if "--paper" in words else ["--ks", "2"]
    assert message in refused([str(run), str(raw_split), *small, *words], capsys)


def test_other_weights_and_other_classes_than_the_paper_s(small_paper, raw_split, tmp_path, capsys, monkeypatch):
    error = refused([str(small_paper), str(raw_split), "--paper", "384"], capsys)
    assert "weights.safetensors" in error and "another model" in error
    monkeypatch.setattr(subject, "synsets", lambda name: ("ant", "cow", "cat"))
    error = refused([str(small_paper), str(raw_split), "--paper", "224"], capsys)
    assert "has not ImageNet's classes" in error and "the first that differ are number 1, 'bee' and 'cow'" in error
    assert "name shards of ImageNet's validation pictures" in error


# The clean twin


@pytest.mark.parametrize(
    ("own", "twin", "message"),
    [
        ({}, {}, "has a noise of its own, gaussian 0.2 at image"),
        (
            {"noise": None},
            {"noise": None},
            "was trained without noise: name the noisy checkpoint first",
        ),
        ({}, {"noise": None, "model": SMALLER}, "is no twin: its model.options is {'depth': 1,"),
    ],
)
def test_what_is_no_clean_twin_is_refused(own, twin, message, raw_split, tmp_path, capsys):
    words = [str(make_run(tmp_path / "own", **own)), str(raw_split), "--ks", "2", "--twin"]
    assert message in refused([*words, str(make_run(tmp_path / "twin", **twin))], capsys)


def test_a_twin_without_an_average_is_refused_where_the_average_is_asked_for(run, raw_split, tmp_path, capsys):
    own = Path(shutil.copytree(run, tmp_path / "own"))
    (generation,) = (own / "checkpoints").glob("step-*")
    shutil.rmtree(own / "checkpoints")
    averaged = ckpt.temporary_folder(own, 12)
    shutil.copytree(run / "checkpoints" / generation.name, averaged)
    shutil.copy(averaged / WEIGHTS_NAME, averaged / ckpt.EMA_NAME)
    ckpt.publish_generation(own, 12, keep=2)
    clean = make_run(tmp_path / "clean", None)
    error = refused([str(own), str(raw_split), "--ks", "2", "--ema", "--twin", str(clean)], capsys)
    assert str(clean) in error and "holds no averaged weights" in error


def test_what_else_differs_between_twins_is_said(done):
    remark = done[0].rows[-1].remark
    assert "beside the noise they differ in epochs 90 here, 80 there" in remark
    assert re.match(r"\d+ pictures only here right, \d+ only there; p = \S+ \(McNemar, exact\); ", remark)


# The table and where it goes


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


def test_an_output_that_is_a_file_is_refused_before_anything_is_asked(tmp_path, capsys):
    file = tmp_path / "file"
    file.write_text("mine")
    for output in (file, file / "sub"):
        error = refused(["nowhere", "nothing", "--output", str(output)], capsys)
        assert f"--output {output}: {file} is a file; name a folder" in error
    assert file.read_text() == "mine"


def test_one_process_alone(run, raw_split):
    with pytest.raises(ValueError, match="audit runs in one process, here are 2 ranks: start it without torchrun"):
        audit(config_of(run, raw_split), Ranks(0, 2, launched=True))
