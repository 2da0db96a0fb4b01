"""The audit: bad input ends with one line and the mend."""

import dataclasses
import shutil
from pathlib import Path

import pytest
from audit_runs import SMALLER, config_of, make_run, refused, sharded

from data_prep.manifest import read_manifest, write_manifest
from pipeline import checkpoint as ckpt
from pipeline.audit.protocols import Settings
from pipeline.audit.run import AuditConfig, audit
from pipeline.checkpoint import WEIGHTS_NAME
from pipeline.parallel import Ranks

ALONE = Ranks(0, 1, launched=False)


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


def test_what_is_named_twice_is_run_once():
    twice = AuditConfig(
        Path("x"), "y", Settings(ks=(4, 2, 4)), ("optimal_q", "optimal_q"), sites=("blocks.1", "image", "blocks.1")
    )
    assert (twice.protocols.ks, twice.noises, twice.sites) == ((2, 4), ("optimal_q",), ("blocks.1", "image"))


def test_an_audit_of_other_pictures_stands_until_the_user_says_otherwise(raw_split, sizes_split, tmp_path):
    run = make_run(tmp_path / "run")
    audit(config_of(run, raw_split), ALONE)
    result = run / "audit" / "audit.json"
    kept = result.read_text()
    with pytest.raises(ValueError, match=rf"^{result} holds a result of other pictures: .* with --output$"):
        audit(config_of(run, sizes_split), ALONE)
    assert result.read_text() == kept
    audit(config_of(run, sizes_split, output=run / "audit"), ALONE)
    assert result.read_text() != kept


def test_a_folder_that_cannot_be_made_is_refused_before_the_first_pass(audited_run, raw_split, capsys):
    error = refused([str(audited_run), str(raw_split), "--ks", "2", "--output", "/proc/nowhere"], capsys)
    assert "--output /proc/nowhere" in error and "name another" in error


def test_other_classes_are_named(audited_run, raw_split, tmp_path, capsys):
    other = tmp_path / "other"
    shutil.copytree(raw_split.parent, other)
    manifest = dataclasses.replace(read_manifest(other / raw_split.name), classes=("ant", "bear", "cat"))
    write_manifest(dataclasses.replace(manifest, folder=other))
    error = refused([str(audited_run), str(other / raw_split.name)], capsys)
    assert "the first that differ are number 1, 'bear' and 'bee'" in error
    assert not (audited_run / "audit").exists()


def test_unlabelled_data_is_refused(audited_run, named_pictures, tmp_path, capsys):
    (tmp_path / "all" / "pictures").mkdir(parents=True)
    for path in (named_pictures / "ant").iterdir():
        shutil.copy(path, tmp_path / "all" / "pictures")
    error = refused([str(audited_run), str(sharded(tmp_path / "all", tmp_path / "shards"))], capsys)
    assert "has one class, 'pictures': pictures without labels have no accuracy" in error


def test_fewer_pictures_than_k_and_a_k_below_two_are_refused(audited_run, raw_split, capsys):
    error = refused([str(audited_run), str(raw_split), "--ks", "2", "25"], capsys)
    assert "there are 24 pictures, fewer than k = 25: name smaller groups with --ks" in error
    assert "ks has 0: a group mixes at least 2" in refused([str(audited_run), str(raw_split), "--ks", "0"], capsys)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--sites", "blocks.7"], "noise.site 'blocks.7' is no module"),
        (["--scratch", "nowhere"], "scratch nowhere is no folder"),
        (["--twin", "nowhere"], "no checkpoint at nowhere"),
        (["--paper", "224"], "is no file: --paper takes timm's vit_base_patch16_224"),
    ],
)
def test_what_is_not_there_is_named(words, message, audited_run, raw_split, capsys):
    small = ["--ks", "10"] if "--paper" in words else ["--ks", "2"]
    assert message in refused([str(audited_run), str(raw_split), *small, *words], capsys)


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


def test_a_twin_without_an_average_is_refused_where_the_average_is_asked_for(audited_run, raw_split, tmp_path, capsys):
    own = Path(shutil.copytree(audited_run, tmp_path / "own"))
    (generation,) = (own / "checkpoints").glob("step-*")
    shutil.rmtree(own / "checkpoints")
    averaged = ckpt.temporary_folder(own, 12)
    shutil.copytree(audited_run / "checkpoints" / generation.name, averaged)
    shutil.copy(averaged / WEIGHTS_NAME, averaged / ckpt.EMA_NAME)
    ckpt.publish_generation(own, 12, keep=2)
    clean = make_run(tmp_path / "clean", None)
    error = refused([str(own), str(raw_split), "--ks", "2", "--ema", "--twin", str(clean)], capsys)
    assert str(clean) in error and "holds no averaged weights" in error


def test_an_output_that_is_a_file_is_refused_before_anything_is_asked(tmp_path, capsys):
    file = tmp_path / "file"
    file.write_text("mine")
    for output in (file, file / "sub"):
        error = refused(["nowhere", "nothing", "--output", str(output)], capsys)
        assert f"--output {output}: {file} is a file; name a folder" in error
    assert file.read_text() == "mine"


def test_one_process_alone(audited_run, raw_split):
    with pytest.raises(ValueError, match="audit runs in one process, here are 2 ranks: start it without torchrun"):
        audit(config_of(audited_run, raw_split), Ranks(0, 2, launched=True))
