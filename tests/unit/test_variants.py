"""ImageNet's V2, A, R and Sketch on twins of their published layouts: counts by hand from the model's logits."""

import json

import numpy as np
import pytest
from variant_world import (
    ALL,
    CLASSES,
    PICTURES,
    SOME,
    SUBSET,
    WNIDS,
    counted,
    evaluated,
    replace_logits,
)

from pipeline.__main__ import main
from pipeline.intervals import wilson


def test_the_model_tells_pictures_apart(world):
    """Else every test here could pass with any labels."""
    assert len(set(world.logits.argmax(1).tolist())) >= 9


def test_v2_folders_are_class_indices_not_text(world, tmp_path):
    labels = world.labels(1, ALL)
    root = world.lay(
        tmp_path / "imagenetv2-matched-frequency-format-val", labels, {i: str(i) for i in ALL}, "{:040x}.jpeg"
    )
    found = evaluated(world, tmp_path, imagenet_v2=root)
    (row,) = found.rows
    assert counted(row) == world.counts(labels)
    assert (row.name, row.classes, row.pictures) == ("ImageNet-V2", 12, PICTURES)
    as_text = np.array([sorted(map(str, ALL)).index(str(label)) for label in labels.tolist()])
    assert world.counts(as_text)[0] < row.correct_top1  # ImageFolder's labels would have been seen


def test_a_and_r_are_answered_among_their_own_classes(world, tmp_path):
    labels = world.labels(2, SOME)
    for option, suffix in (("a", "{:05d}_it.jpg"), ("r", "art_{}.jpg")):
        root = world.lay(tmp_path / f"imagenet-{option}", labels, WNIDS, suffix)
        (root / "README.txt").write_text("as published")
        (row,) = evaluated(world, tmp_path, **{f"imagenet_{option}": root}).rows
        assert counted(row) == world.counts(labels, SOME)
        assert row.classes == len(SUBSET)
        assert row.correct_top1 > world.counts(labels)[0]  # among all classes some would have been answered otherwise


def test_sketch_has_all_classes(world, tmp_path):
    labels = world.labels(3, ALL)
    found = evaluated(world, tmp_path, imagenet_sketch=world.lay(tmp_path / "sketch", labels, WNIDS, "sketch_{}.JPEG"))
    assert counted(found.rows[0]) == world.counts(labels)
    assert found.notes == ("the checkpoint's 12 classes are not ImageNet's: no set is as published",)


def test_a_row_says_how_sure_it_is_and_what_it_is_of(world, tmp_path):
    labels = world.labels(3, ALL)
    evaluated(world, tmp_path, imagenet_sketch=world.lay(tmp_path / "sketch", labels, WNIDS, "sketch_{}.JPEG"))
    body = json.loads((tmp_path / "found.json").read_text())
    (row,) = body["sets"]
    top1, top5 = world.counts(labels)
    assert (row["top1"], row["top5"], row["top1_interval"]) == (top1 / 60, top5 / 60, list(wilson(top1, 60)))
    # Guo et al.: 15 equal bins of the confidence.
    shares = np.exp(world.logits) / np.exp(world.logits).sum(1, keepdims=True)
    right, bins = world.logits.argmax(1) == labels, np.ceil(shares.max(1) * 15).astype(int)
    gaps = [abs((right[bins == b] - shares.max(1)[bins == b]).sum()) for b in range(16)]
    assert row["calibration_error"] == pytest.approx(sum(gaps) / 60, abs=1e-6)
    assert (body["step"], body["imagenet_c"], len(body["weights_sha256"])) == (12, None, 64)


def test_logits_in_another_order_are_found_by_their_names(world, tmp_path):
    """A checkpoint whose classes are not sorted: indices and folders still mean the sorted WordNet ids."""
    order = np.random.RandomState(0).permutation(12)
    other = world.save("unsorted", tuple(CLASSES[i] for i in order))
    labels, some = world.labels(4, ALL), world.labels(5, SOME)
    v2 = world.lay(tmp_path / "v2", labels, {i: str(i) for i in ALL}, "{}.jpeg")
    a = world.lay(tmp_path / "a", some, WNIDS, "{}.jpg")
    val = world.lay(tmp_path / "val", labels, WNIDS, "ILSVRC2012_val_{:08d}.JPEG")
    real = tmp_path / "real.json"
    real.write_text(json.dumps([[label] for label in labels.tolist()]))
    logits_of = np.argsort(order)  # class -> column
    twin = replace_logits(world, world.logits[:, logits_of])
    rows = evaluated(world, tmp_path, other, imagenet_v2=v2, imagenet_a=a, val=str(val), real=real).rows
    by_name = {row.name: counted(row) for row in rows}
    assert by_name["ImageNet-V2"] == by_name["ImageNet"] == twin.counts(labels)
    assert by_name["ImageNet-A"] == twin.counts(some, SOME)
    assert by_name["ImageNet-ReaL"][0] == by_name["ImageNet"][0]
    assert twin.counts(labels) != world.counts(labels)


def test_the_command_prints_one_line_a_set(world, sets, validation, capsys, tmp_path):
    arguments = ["robustness", "--checkpoint", str(world.run), "--output", str(tmp_path / "new" / "it.json")]
    arguments += [
        "--imagenet-v2",
        str(sets / "v2"),
        "--imagenet-a",
        str(sets / "imagenet-a"),
        "--val",
        str(validation[0]),
    ]
    assert main([*arguments, "--real", str(validation[2])]) == 0
    printed = capsys.readouterr().out
    lines = [line.split("│")[1:-1] for line in printed.splitlines() if "│" in line]
    names, pictures, classes, top1 = (
        [cell.strip() for cell in column] for column in list(zip(*lines, strict=True))[:4]
    )
    assert names == ["ImageNet", "ReaL", "V2", "A"]
    assert (pictures, classes) == (["60", "40", "60", "60"], ["12", "12", "12", "7"])
    assert float(top1[2]) == round(100 * world.counts(world.labels(1, ALL))[0] / 60, 2)
    assert (tmp_path / "new" / "it.json").is_file()
