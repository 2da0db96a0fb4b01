"""ImageNet's variants on twins of their published layouts: counts by hand from the model's logits, refusals by name."""

import json
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from small_shards import EXACT, jpeg
from source_pictures import shard_source
from timm.data import RealLabelsImagenet

from pipeline import checkpoint as ckpt
from pipeline.__main__ import main
from pipeline.config import TrainConfig
from pipeline.data.loader import DataConfig
from pipeline.intervals import wilson
from pipeline.models import ModelConfig
from pipeline.parallel import Ranks
from pipeline.sections import to_json
from pipeline.variants import RobustnessConfig, evaluate_variants
from pipeline.variants.classes import synsets, wordnet_classes
from pipeline.variants.corruptions import ALEXNET_ERRORS, CORRUPTIONS, EXTRA, GROUPS, Corruptions, find_cells
from pipeline.variants.layouts import find_layout, notes_on
from pipeline.variants.real import count_real, read_real

ALONE = Ranks(0, 1, launched=False)
CLASSES = tuple(f"n{1000 * i + 7:08d}" for i in range(12))  # twelve, so that as text 10 comes before 2
SUBSET = tuple(CLASSES[i] for i in (1, 2, 4, 7, 8, 10, 11))
PICTURES = 60
SEVERITIES = "12345"
MODEL = ModelConfig(name="vit_tiny_patch16_224", options={"depth": 1, "embed_dim": 24, "num_heads": 2, "patch_size": 8})
IMAGENET = wordnet_classes(synsets("imagenet"), "it")


class World:
    """Sixty pictures, and a model that answers them with most of twelve classes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "pool").mkdir()
        for i in range(PICTURES):
            self.picture(i).write_bytes(jpeg(i))
        torch.manual_seed(0)
        model = timm.create_model(MODEL.name, num_classes=12, img_size=32, **MODEL.options).eval()
        mean, std = (torch.tensor(model.pretrained_cfg[name]).view(3, 1, 1) for name in ("mean", "std"))
        # EXACT's evaluation: the middle, half as wide, and nothing resized.
        middles = [np.asarray(Image.open(self.picture(i)))[16:48, 16:48] for i in range(PICTURES)]
        pixels = torch.from_numpy(np.stack(middles)).permute(0, 3, 1, 2) / 255
        with torch.no_grad():
            x = (pixels - mean) / std
            features = model.forward_head(model.forward_features(x), pre_logits=True)
            weight = torch.randn(12, features.shape[1]) / features.std(0)
            model.head.weight.copy_(weight)
            model.head.bias.copy_(-weight @ features.mean(0))
            self.logits = model(x).double().numpy()
        self.weights = model.state_dict()
        self.run = self.save("run", CLASSES)

    def picture(self, i: int) -> Path:
        return self.folder / "pool" / f"{i}.jpg"

    def save(self, name: str, classes: tuple[str, ...]) -> Path:
        """A run with one checkpoint, whose logits are of `classes`."""
        config = TrainConfig(run=self.folder / name, seed=4, model=MODEL, data=DataConfig(image_size=32), augment=EXACT)
        folder = ckpt.temporary_folder(config.run, 12)
        folder.mkdir(parents=True)
        save_file(self.weights, folder / ckpt.WEIGHTS_NAME)
        ckpt.write_json(folder / ckpt.CONFIG_NAME, to_json(config) | {"classes": list(classes), "step": 12})
        ckpt.publish_generation(config.run, 12, keep=2)
        return config.run

    def labels(self, seed: int, classes: list[int]) -> np.ndarray:
        """Of the pictures, int64 (60,): for about half the model's answer among `classes`; each has one."""
        own = np.array(classes)[self.logits[:, classes].argmax(1)]
        rng = np.random.RandomState(seed)
        labels = np.where(rng.rand(PICTURES) < 0.5, own, rng.choice(classes, PICTURES))
        labels[: len(classes)] = classes
        return labels

    def counts(self, labels: np.ndarray, classes: list[int] | None = None) -> tuple[int, int]:
        """(top-1, top-5) among the columns `classes`, by counting the logits above the label's."""
        logits = self.logits if classes is None else self.logits[:, classes]
        column = labels if classes is None else np.searchsorted(classes, labels)
        own = logits[np.arange(PICTURES), column]
        gaps = np.abs(logits - own[:, None])
        assert ((gaps == 0) | (gaps > 1e-4)).all(), "choose other pictures"
        rank = (logits > own[:, None]).sum(1)
        return int((rank == 0).sum()), int((rank < 5).sum())

    def lay(self, root: Path, labels: np.ndarray, folders: dict[int, str], name: str) -> Path:
        """Pictures as <root>/<folder of the label>/<name with its number>."""
        for i, label in enumerate(labels.tolist()):
            folder = root / folders[label]
            folder.mkdir(parents=True, exist_ok=True)
            (folder / name.format(i + 1)).symlink_to(self.picture(i))
        return root


WNIDS = dict(enumerate(CLASSES))
ALL = list(range(12))
SOME = [CLASSES.index(name) for name in SUBSET]


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    return World(tmp_path_factory.mktemp("world"))


def evaluated(world: World, output: Path, run: Path | None = None, batch: int = 7, **sets):
    config = RobustnessConfig(checkpoint=run or world.run, batch=batch, workers=1, output=output / "found.json", **sets)
    return evaluate_variants(config, ALONE)


def counted(row) -> tuple[int, int | None]:
    return row.correct_top1, row.correct_top5


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


def replace_logits(world: World, logits: np.ndarray) -> World:
    twin = object.__new__(World)
    twin.logits = logits
    return twin


# ReaL


@pytest.fixture(scope="module")
def validation(world, tmp_path_factory) -> tuple[Path, np.ndarray, Path]:
    """(class folders, labels, real.json), the published names; a third of the lists is empty, others have several."""
    root = tmp_path_factory.mktemp("validation")
    labels = world.labels(6, ALL)
    rng = np.random.RandomState(6)
    lists = [
        sorted({label, *rng.choice(12, i % 3).tolist()}) if i % 3 else [] for i, label in enumerate(labels.tolist())
    ]
    (root / "real.json").write_text(json.dumps(lists))
    return world.lay(root / "val", labels, WNIDS, "ILSVRC2012_val_{:08d}.JPEG"), labels, root / "real.json"


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


# ImageNet-C


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
    body = json.loads((world.run / "robustness.json").read_text())["imagenet_c"]
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


# Bad input


@pytest.fixture(scope="module")
def sets(world, tmp_path_factory) -> Path:
    """One of each layout, under its usual name."""
    root = tmp_path_factory.mktemp("sets")
    world.lay(root / "v2", world.labels(1, ALL), {i: str(i) for i in ALL}, "{}.jpeg")
    world.lay(root / "imagenet-a", world.labels(2, SOME), WNIDS, "{}.jpg")
    world.lay(root / "sketch", world.labels(3, ALL), WNIDS, "sketch_{}.JPEG")
    (root / "c" / "fog").mkdir(parents=True)
    for s in SEVERITIES:
        (root / "c" / "fog" / s).symlink_to(root / "sketch")
    (root / "empty").mkdir()
    return root


@pytest.mark.parametrize(
    ("option", "folder", "message"),
    [
        (
            "imagenet_a",
            "v2",
            r"--imagenet-a .*/v2 holds class indices \(0, 1, 10 and 9 more: ImageNet-V2's layout, give it as --imag",
        ),
        ("imagenet_sketch", "v2", r"--imagenet-sketch .*give it as --imagenet-v2"),
        ("imagenet_v2", "imagenet-a", r"--imagenet-v2 .* holds 7 WordNet ids \(give it as --imagenet-a, -r or -sketch"),
        (
            "imagenet_v2",
            "c/fog",
            r"--imagenet-v2 .*has 5 class indices, without 0, 6, 7 and 4 more; the checkpoint's 12 classes are 0 to 11",
        ),
        (
            "imagenet_a",
            "sketch",
            r"--imagenet-a .*sketch has all 12 classes of the checkpoint, ImageNet-A some alone: is it --imagenet-s",
        ),
        (
            "imagenet_sketch",
            "imagenet-a",
            r"has 7 of the checkpoint's 12 classes, without n00000007.*: unpack all of ImageNet-Sk",
        ),
        (
            "imagenet_a",
            ".",
            r"--imagenet-a .* holds c, empty, imagenet-a and 2 more \(name the one in it that holds the classes",
        ),
        ("imagenet_r", "c", r"--imagenet-r .* holds corruptions \(fog: ImageNet-C's layout, give it as --imagenet-c\)"),
        ("imagenet_r", "c/fog", r"--imagenet-r .* holds severities 1 to 5 \(of one corruption"),
        ("imagenet_a", "empty", r"--imagenet-a .* holds no folders \(unpack the set there\)"),
        ("imagenet_v2", "empty", r"--imagenet-v2 .* holds no folders"),
        ("imagenet_c", "empty", "holds no folders: unpack ImageNet-C there"),
        (
            "imagenet_c",
            "sketch",
            r"--imagenet-c .* holds n00000007, which is no corruption of ImageNet-C: name the folder that holds",
        ),
        ("imagenet_c", "c/fog", r"--imagenet-c .* holds 1, which is no corruption"),
        ("imagenet_c", ".", r"--imagenet-c .* holds c, which is no corruption"),
        ("val", "imagenet-a", r"--val .* has 7 of the checkpoint's 12 classes"),
        ("imagenet_a", "sketch/n00000007", r"lies in no class's folder: name the folder that holds one folder a class"),
    ],
)
def test_a_wrong_layout_is_named_with_its_mend(world, sets, tmp_path, option, folder, message):
    where = sets / folder
    with pytest.raises(ValueError, match=message):
        evaluated(world, tmp_path, **{option: str(where) if option == "val" else where})


def test_a_folder_that_is_not_there(world, tmp_path, capsys):
    assert main(["robustness", "--checkpoint", str(world.run), "--imagenet-a", str(tmp_path / "gone")]) == 2
    assert capsys.readouterr().err == (
        f"error: {tmp_path}/gone does not exist: name the folder that holds one folder a class\n"
    )


def test_classes_that_the_checkpoint_has_not_are_named(world, tmp_path):
    folders = WNIDS | {3: "n09999999"}
    root = world.lay(tmp_path / "a", world.labels(2, [1, 3, 5]), folders, "{}.jpg")
    with pytest.raises(
        ValueError, match=r"has classes that the checkpoint has not \(n09999999\): name ImageNet-A as it"
    ):
        evaluated(world, tmp_path, imagenet_a=root)


@pytest.mark.parametrize(
    ("option", "other", "pictures"), [("imagenet_a", "imagenet_r", 7_500), ("imagenet_r", "imagenet_a", 30_000)]
)
def test_of_imagenet_s_classes_a_and_r_must_have_the_200_published_ones(tmp_path, option, other, pictures):
    """Names alone are looked at here, so folders suffice."""
    names, letter = synsets(option), option[-1]
    for name in names:
        (tmp_path / "whole" / name).mkdir(parents=True)
    layout = find_layout(option, tmp_path / "whole", IMAGENET)
    assert layout.classes == names and [IMAGENET.names[i] for i in layout.columns] == list(names)
    with pytest.raises(
        ValueError, match=rf"has the classes of ImageNet-{letter.upper()}: give it as --imagenet-{letter}"
    ):
        find_layout(other, tmp_path / "whole", IMAGENET)
    (tmp_path / "whole" / names[5]).rmdir()
    extra = next(name for name in IMAGENET.names if name not in names)
    (tmp_path / "whole" / extra).mkdir()
    with pytest.raises(
        ValueError, match=rf"has 200 classes, not the 200 .*\(it lacks {names[5]}; {extra} are not in it"
    ):
        find_layout(option, tmp_path / "whole", IMAGENET)
    assert notes_on(layout, 7_499, IMAGENET) == (
        f"ImageNet-{letter.upper()}: 7,499 pictures, of {pictures:,} that were published",
    )
    assert notes_on(layout, pictures, IMAGENET) == ()


def test_a_checkpoint_of_other_classes_is_refused(world, sets, tmp_path):
    other = world.save("named", tuple(f"class{i}" for i in range(12)))
    with pytest.raises(ValueError, match=r"named has classes that are no WordNet ids \(class0, class1, class2\)"):
        evaluated(world, tmp_path, other, imagenet_v2=sets / "v2")


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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "no set to evaluate: give at least one of --val, --imagenet-v2, --imagenet-a, --imagenet-r"),
        ({"real": Path("real.json")}, r"--real real\.json labels the validation set anew: give that as --val"),
        ({"imagenet_a": Path("a"), "batch": 0}, "batch is 0"),
        ({"imagenet_a": Path("a"), "workers": -1}, "workers is -1"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        RobustnessConfig(checkpoint=Path("run"), **options)


def test_a_picture_that_cannot_be_decoded_ends_it_by_name(world, tmp_path):
    root = world.lay(tmp_path / "a", world.labels(2, SOME), WNIDS, "{}.jpg")
    bad = next(root.glob("*/17.jpg"))
    bad.unlink()
    bad.write_bytes(jpeg(1)[:300])
    with pytest.raises(ValueError, match=rf"{bad}\): cannot be decoded"):
        evaluated(world, tmp_path, imagenet_a=root)
    assert not (tmp_path / "found.json").exists()


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
