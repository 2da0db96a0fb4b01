"""ReaL's labels: an answer is right if it is one of several, and pictures are found by their published names."""

import json
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import torch
from source_pictures import shard_source
from timm.data import RealLabelsImagenet
from variant_world import (
    ALL,
    IMAGENET,
    PICTURES,
    WNIDS,
    counted,
    evaluated,
)

from pipeline.variants.real import count_real, read_real


def test_real_accepts_any_answer_of_its_list_and_counts_no_empty_one(world, validation, tmp_path):
    root, labels, real = validation
    lists = json.loads(real.read_text())
    answers = world.logits.argmax(1).tolist()
    right = sum(answer in accepted for answer, accepted in zip(answers, lists, strict=True))
    plain, found = evaluated(world, tmp_path, val=str(root), real=real).rows
    assert counted(plain) == world.counts(labels)
    assert (found.name, found.pictures, *counted(found)) == ("ImageNet-ReaL", 40, right, None)
    assert found.calibration_error is None and found.top1 == right / 40 != plain.top1
    theirs = RealLabelsImagenet([f"ILSVRC2012_val_{i + 1:08d}.JPEG" for i in range(PICTURES)], real)
    theirs.add_result(torch.from_numpy(world.logits))
    assert found.top1 == pytest.approx(theirs.get_accuracy(1) / 100, rel=1e-12)


@pytest.mark.parametrize("per_shard", [7, 60])
def test_real_finds_the_pictures_names_in_shards(world, validation, tmp_path, per_shard):
    """Shards have their own order: the names in the tars say which list is a picture's."""
    root, _, real = validation
    shard_source(root, tmp_path / "shards", samples_per_shard=per_shard)
    manifest = str(tmp_path / "shards" / "train.manifest.json")
    in_shards, in_folders = (evaluated(world, tmp_path, val=where, real=real).rows for where in (manifest, str(root)))
    assert [counted(row) for row in in_shards] == [counted(row) for row in in_folders]
    assert in_shards[1].pictures == 40


def test_real_follows_a_name_with_its_class_behind(world, tmp_path):
    labels = world.labels(6, ALL)
    root = world.lay(tmp_path / "val", labels, WNIDS, "ILSVRC2012_val_{:08d}_n01440764.JPEG")
    (tmp_path / "real.json").write_text(json.dumps([[label] for label in labels.tolist()]))
    plain, found = evaluated(world, tmp_path, val=str(root), real=tmp_path / "real.json").rows
    assert found.correct_top1 == plain.correct_top1


def test_the_published_real_labels_are_read():
    """timm carries a copy: 46,837 pictures count."""
    real = read_real(Path(str(files("timm.data") / "_info" / "imagenet_real_labels.json")), IMAGENET)
    assert (len(real), sum(map(bool, real))) == (50_000, 46_837)
    assert real[1] == {795, 970}
    assert count_real(np.full(50_000, 795), real) == (sum(795 in those for those in real), 46_837)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ('{"a": 1}', "is no list of lists of class indices"),
        ("[[0], 3]", "entry 1 is 3, no list of class indices from 0 to 11"),
        ("[[0], [12]]", r"entry 1 is \[12\], no list"),
        ('[["n01440764"]]', 'entry 0 is .*"n01440764"'),
        ("[[true]]", "entry 0 is .*true"),
        ("[[0], [1]]", r"sample \d+ \(.*\) is number \d+, but --real has 2 entries"),
        (json.dumps([[]] * 60), "has no label for any picture"),
    ],
)
def test_a_real_json_that_is_none_is_refused(world, validation, tmp_path, text, message):
    (tmp_path / "real.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        evaluated(world, tmp_path, val=str(validation[0]), real=tmp_path / "real.json")


def test_a_real_json_of_another_length_is_refused_for_imagenet(tmp_path):
    (tmp_path / "real.json").write_text("[[1]]")
    with pytest.raises(ValueError, match=r"has 1 entries, not 50,000: fetch real\.json"):
        read_real(tmp_path / "real.json", IMAGENET)


def test_real_refuses_names_that_are_not_the_validation_set_s(world, validation, tmp_path):
    root = world.lay(tmp_path / "val", world.labels(6, ALL), WNIDS, "picture_{}.JPEG")
    refusal = r"sample 0 \(.*\) is called '[^']*picture_\d+', not ILSVRC2012_val_<number>"
    with pytest.raises(ValueError, match=refusal):
        evaluated(world, tmp_path, val=str(root), real=validation[2])
    shard_source(root, tmp_path / "shards")
    with pytest.raises(ValueError, match=refusal):
        evaluated(world, tmp_path, val=str(tmp_path / "shards" / "train.manifest.json"), real=validation[2])


def test_real_refuses_a_picture_that_is_there_twice(world, validation, tmp_path):
    root = world.lay(tmp_path / "val", world.labels(6, ALL), WNIDS, "ILSVRC2012_val_{:08d}.JPEG")
    first = next(root.glob("*/ILSVRC2012_val_00000001.JPEG"))
    other = next(folder for folder in root.iterdir() if folder != first.parent)
    (other / first.name).symlink_to(first)
    with pytest.raises(ValueError, match="are both number 1: name each picture once"):
        evaluated(world, tmp_path, val=str(root), real=validation[2])
