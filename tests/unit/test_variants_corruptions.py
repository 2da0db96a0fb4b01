"""ImageNet-C cell by cell, its mean and mCE."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from variant_world import (
    ALL,
    CLASSES,
    PICTURES,
    SEVERITIES,
    WNIDS,
    World,
    evaluated,
    replace_logits,
)

from pipeline.__main__ import main
from pipeline.variants.corruptions import ALEXNET_ERRORS, CORRUPTIONS, EXTRA, GROUPS, Corruptions, find_cells


@pytest.fixture(scope="module")
def cells(world, tmp_path_factory) -> tuple[Path, dict[tuple[str, str], Path]]:
    """Folders of class folders, to be linked into an ImageNet-C: each cell shows the pictures in another order."""
    root = tmp_path_factory.mktemp("cells")
    return root, {}


def cell(world: World, cells, shift: int) -> tuple[Path, int]:
    """(class folders, top-1): as ImageNet-C's, names and labels stay, what is seen differs."""
    root, made = cells
    labels = world.labels(7, ALL)
    if shift not in made:
        for i, label in enumerate(labels.tolist()):
            folder = root / str(shift) / CLASSES[label]
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"ILSVRC2012_val_{i + 1:08d}.JPEG").symlink_to(world.picture((i + shift) % PICTURES))
        made[shift] = root / str(shift)
    shown = replace_logits(world, np.roll(world.logits, -shift, 0))
    return made[shift], shown.counts(labels)[0]


def corrupted(world: World, cells, root: Path, names, grouped: bool) -> dict[tuple[str, str], int]:
    """Builds an ImageNet-C of links; returns the top-1 of each cell."""
    right = {}
    for n, name in enumerate(names):
        group = next(group for group, members in GROUPS.items() if name in members)
        folder = root / group / name if grouped else root / name
        folder.mkdir(parents=True)
        for s in SEVERITIES:
            source, right[name, s] = cell(world, cells, (5 * n + int(s)) % 7)
            (folder / s).symlink_to(source)
    return right


def test_c_is_read_cell_by_cell(world, cells, tmp_path):
    right = corrupted(world, cells, tmp_path / "c", ("snow", "fog", "spatter"), grouped=False)
    assert len(set(right.values())) > 3
    found = evaluated(world, tmp_path, batch=50, imagenet_c=tmp_path / "c")
    assert {key: row.correct_top1 for key, row in found.cells.items()} == right
    assert all(row.pictures == PICTURES for row in found.cells.values())
    for name in ("snow", "fog", "spatter"):
        assert found.corruptions.mean_of(name) == pytest.approx(sum(right[name, s] for s in SEVERITIES) / 300)
    body = json.loads((tmp_path / "found.json").read_text())["imagenet_c"]
    shown = {(cell["corruption"], str(cell["severity"])): cell["correct_top1"] for cell in body["cells"]}
    assert shown == right


def test_the_mean_is_over_the_fifteen_corruptions_and_no_extra_one():
    rng = np.random.RandomState(0)
    shares = {(name, s): float(rng.rand()) for name in (*CORRUPTIONS, "spatter") for s in SEVERITIES}
    found = Corruptions(shares, by_alexnet=False)
    assert found.missing == ()
    assert found.mean == pytest.approx(
        np.mean([shares[name, s] for name in CORRUPTIONS for s in SEVERITIES]), rel=1e-12
    )
    assert found.mce is None  # AlexNet's errors are of other classes


def test_c_in_groups_as_it_is_downloaded_has_the_same_cells(world, cells, tmp_path):
    every = (*CORRUPTIONS, *EXTRA)
    for grouped in (False, True):
        corrupted(world, cells, tmp_path / str(grouped), every, grouped)
    assert (tmp_path / "True" / "blur" / "defocus_blur" / "3").is_dir()
    flat, grouped = ({key: path.resolve() for key, path in find_cells(tmp_path / n).items()} for n in ("False", "True"))
    assert list(flat) == list(grouped) == [(name, s) for name in every for s in SEVERITIES]
    assert flat == grouped


def test_what_c_lacks_is_said_and_no_mean_is_made_of_the_rest(world, cells, tmp_path, capsys):
    corrupted(world, cells, tmp_path / "c", ("snow", "fog"), grouped=False)
    (tmp_path / "c" / "fog" / "3").unlink()
    assert (
        main(["robustness", "--checkpoint", str(world.run), "--imagenet-c", str(tmp_path / "c"), "--workers", "0"]) == 0
    )
    printed = capsys.readouterr().out
    assert "fog/3, brightness, contrast" in printed and "so there is no mean over all" in printed
    body = json.loads((world.run / "robustness_step12_imagenet-c.json").read_text())["imagenet_c"]
    assert body["mean_top1"] is None and body["mce"] is None and body["mean_top1_of"]["fog"] is None
    assert body["mean_top1_of"]["snow"] > 0
    assert set(body["missing"]) == {*CORRUPTIONS, "fog/3"} - {"snow", "fog"}


def test_c_with_pictures_missing_from_one_cell_is_refused_before_any_is_evaluated(world, cells, tmp_path, monkeypatch):
    corrupted(world, cells, tmp_path / "c", ("snow", "fog"), grouped=False)
    monkeypatch.setattr("pipeline.variants.robustness.load_model", lambda *args: pytest.fail("too late"))
    copy = tmp_path / "c" / "fog" / "3"
    copy.unlink()
    labels = world.labels(7, ALL)
    world.lay(copy, labels, WNIDS, "ILSVRC2012_val_{:08d}.JPEG")
    next(copy.glob("*/ILSVRC2012_val_00000060.JPEG")).unlink()
    with pytest.raises(ValueError, match=r"fog/3 has 59 pictures, .*snow/1 60, not all by the same names"):
        evaluated(world, tmp_path, imagenet_c=tmp_path / "c")


def test_mce_is_the_error_over_alexnet_s():
    """AlexNet itself has 100 %; a model with half its errors 50 %, though its mean error is not half of 1."""
    for share in (1.0, 0.5):
        top1 = {(name, s): 1 - share * ALEXNET_ERRORS[name] for name in CORRUPTIONS for s in SEVERITIES}
        found = Corruptions(top1, by_alexnet=True)
        assert found.mce == pytest.approx(share)
        assert found.mean == pytest.approx(1 - share * np.mean(list(ALEXNET_ERRORS.values())))
    assert replace(found, by_alexnet=False).mce is None
    del top1["fog", "2"]
    assert Corruptions(top1, by_alexnet=True).mce is None


def test_corruptions_and_groups_are_the_published_ones():
    assert len(CORRUPTIONS) == len(set(CORRUPTIONS)) == 15 and len(EXTRA) == 4
    assert ALEXNET_ERRORS.keys() == set(CORRUPTIONS)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda c: (c / "blur" / "fog").mkdir(parents=True), r"c/blur holds fog, which is no corruption of that group"),
        (lambda c: [(c / p / "1").mkdir(parents=True) for p in ("fog", "weather/fog")], "holds fog twice"),
        (lambda c: (c / "fog" / "6").mkdir(parents=True), r"c/fog holds 6, not severities 1 to 5"),
        (lambda c: (c / "fog").mkdir(parents=True), r"c/fog holds nothing, not severities"),
        (lambda c: (c / "rain" / "1").mkdir(parents=True), "holds rain, which is no corruption of ImageNet-C"),
    ],
)
def test_a_wrong_imagenet_c_is_named_with_its_mend(tmp_path, make, message):
    make(tmp_path / "c")
    with pytest.raises(ValueError, match=message):
        find_cells(tmp_path / "c")
