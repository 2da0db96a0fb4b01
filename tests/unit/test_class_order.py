"""Which order pictures have within a class, for audit and evaluate, and what is done where nobody knows."""

import dataclasses
import hashlib
import json
import shutil
from pathlib import Path

import pytest
from audit_runs import refused, sharded
from small_shards import CLASSES, jpeg

from data_prep.foreign import IndexOptions, index
from data_prep.manifest import read_manifest, write_manifest
from pipeline.__main__ import main
from pipeline.data.augment import AugmentConfig
from pipeline.data.class_order import class_ordered
from pipeline.data.loader import DataConfig, open_split
from pipeline.evaluate import EvaluateConfig, evaluate
from pipeline.noise.config import NoiseConfig
from pipeline.parallel import Ranks

ALONE = Ranks(0, 1, launched=False)
SOURCE = {
    hashlib.sha256(jpeg(8 * label + i)).hexdigest(): f"{name}/{i}.jpg"
    for label, name in enumerate(CLASSES)
    for i in range(8)
}
IN_ORDER = sorted(SOURCE.values())


def ordered(manifest: Path, any_order: bool = False) -> tuple[list[str], str]:
    """File names in class order, and what is said of it."""
    reader = open_split(str(manifest), DataConfig(image_size=32, workers=1), AugmentConfig(), 0)
    found = class_ordered(str(manifest), read_manifest(manifest), reader, any_order)
    return [SOURCE[hashlib.sha256(reader.read(sample)).hexdigest()] for sample in found.ids.tolist()], found.words


def test_shuffled_shards_are_audited_in_the_order_of_the_file_names(named_pictures, tmp_path):
    names, words = ordered(sharded(named_pictures, tmp_path))
    assert names == IN_ORDER and "as the tars' members are called" in words


def test_shards_that_kept_their_order_need_no_names(named_pictures, tmp_path):
    names, words = ordered(sharded(named_pictures, tmp_path, keep_order=True))
    assert names == IN_ORDER and "as the shards have it" in words


@pytest.mark.parametrize("name", ["ant_7", "7"])
def test_names_with_the_class_in_front_and_skipped_pictures_are_known_too(name, named_pictures, tmp_path):
    shutil.copytree(named_pictures, tmp_path / "source")
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
def test_an_order_that_is_not_known_is_refused_and_taken_on_demand(split, why, named_pictures, tmp_path):
    manifest = split(named_pictures, tmp_path / "split")
    with pytest.raises(ValueError, match=rf"{why}.*--keep-order.*--any-order") as refused:
        ordered(manifest)
    assert "\n" not in str(refused.value)
    names, words = ordered(manifest, any_order=True)
    assert sorted(names) == IN_ORDER and [n[:3] for n in names] == [n[:3] for n in IN_ORDER]
    assert words.startswith("by sample id: ")


def test_an_unknown_order_is_refused_by_the_command(audited_run, named_pictures, tmp_path, capsys):
    manifest = foreign(named_pictures, tmp_path / "foreign")
    body = dataclasses.replace(read_manifest(manifest), classes=CLASSES)
    write_manifest(body)
    words = [str(audited_run), str(manifest), "--ks", "2", "--shuffles", "1", "--victims", "2", "--workers", "0"]
    assert "ImageFolder's order within a class is not known" in refused(words, capsys)
    assert main(["audit", *words, "--any-order", "--output", str(tmp_path / "out")]) == 0


def test_evaluate_answers_shuffled_shards_as_those_in_order(audited_run, named_pictures, tmp_path):
    """Which of a class's pictures meet in a group must not hang on how the shards were written."""
    noise = NoiseConfig(kind="optimal_q", site="blocks.0", group_size=5, spare_prefix_tokens=False)
    found = []
    for name, keep_order in (("shuffled", False), ("kept", True)):
        data = str(sharded(named_pictures, tmp_path / name, keep_order=keep_order))
        config = EvaluateConfig(audited_run, data, noise, ("class",), workers=0, output=tmp_path / f"{name}.json")
        evaluate(config, ALONE)
        body = json.loads(config.output.read_text())
        assert body["class_order"].startswith("by file name")
        found.append(body["accuracies"][1] | {"near_ties": None})
    shuffled, kept = found
    assert shuffled["correct_top1"] == kept["correct_top1"]
    assert shuffled["mean_loss"] == pytest.approx(kept["mean_loss"], rel=1e-6)


def test_evaluate_refuses_class_order_where_it_is_not_known(audited_run, named_pictures, tmp_path):
    data = str(odd_names(named_pictures, tmp_path / "split"))
    noise = NoiseConfig(kind="optimal_q", site="blocks.0", group_size=4)
    with pytest.raises(ValueError, match=r"order within a class is not known: .* --any-order$"):
        evaluate(EvaluateConfig(audited_run, data, noise, workers=0), ALONE)
    shuffled = EvaluateConfig(audited_run, data, noise, ("shuffled",), workers=0, output=tmp_path / "shuffled.json")
    assert len(evaluate(shuffled, ALONE).accuracies) == 2
    any_order = EvaluateConfig(audited_run, data, noise, any_order=True, workers=0, output=tmp_path / "any.json")
    assert len(evaluate(any_order, ALONE).accuracies) == 3
    assert json.loads((tmp_path / "any.json").read_text())["class_order"].startswith(
        "by sample id: its shards were shuffled"
    )
