"""benchmarks/cifar_data.py: pictures from folders and archives, and crops that are functions of the sample."""

import io
import os
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small_cifar import CLASSES, SIDE, TRAIN, jpeg, pack, write_folder

from benchmarks.cifar_data import ARCHIVE, cropped, draw_crops, padded, read_pictures
from pipeline.noise.reference import Purpose, random_words, stream_of

SAMPLES = os.environ.get("NOISYNN_SAMPLES", "")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_folder(tmp_path_factory.mktemp("pictures") / "small")


@pytest.fixture(scope="module")
def archive(folder) -> Path:
    return pack(folder)


def test_an_archive_and_a_folder_are_read_alike(archive, folder):
    pictures, of_folder = (read_pictures(source, None, None) for source in (archive, folder))
    assert pictures.sha256() == of_folder.sha256()
    assert (pictures.classes, pictures.side) == (CLASSES, SIDE)
    assert pictures.text == "small.tar.xz: 48 for training, 40 tested"
    assert pictures.train.labels.tolist() == [label for label in range(4) for _ in range(TRAIN)]
    decoded = np.asarray(Image.open(io.BytesIO(jpeg(label=2, number=5))).convert("RGB"))
    assert np.array_equal(pictures.train.images[2 * TRAIN + 5], decoded)
    few = read_pictures(archive, 8, 4)
    assert few.train.labels.tolist() == [0, 0, 1, 1, 2, 2, 3, 3] and few.test.labels.tolist() == [0, 1, 2, 3]
    assert np.array_equal(few.train.images[1], pictures.train.images[1])
    assert few.sha256() != pictures.sha256()


def test_the_sample_archive_is_read(monkeypatch):
    if not (Path(SAMPLES) / ARCHIVE).is_file():
        pytest.skip("no real pictures: NOISYNN_SAMPLES names no folder with cifar10-jpeg.tar.xz")
    monkeypatch.setenv("NOISYNN_SAMPLES", SAMPLES)
    pictures = read_pictures(None, 20, 10)
    assert len(pictures.classes) == 10 and pictures.classes[0] == "airplane"
    assert pictures.train.images.shape == (20, 32, 32, 3) and pictures.test.labels.tolist() == list(range(10))


def broken(folder: Path) -> None:
    (folder / "train" / "bee" / "0003.jpg").write_bytes(jpeg(1, 3)[:200])


def oblong(folder: Path) -> None:
    (folder / "test" / "bee" / "0003.jpg").write_bytes(jpeg(1, 3, width=8))


def of_another_size(folder: Path) -> None:
    (folder / "test" / "bee" / "0003.jpg").write_bytes(jpeg(1, 3, 8, 8))


def huge(folder: Path) -> None:
    (folder / "test" / "bee" / "0003.jpg").write_bytes(jpeg(1, 3, 300, 300))


def without_a_test_class(folder: Path) -> None:
    shutil.rmtree(folder / "test" / "dog")


def without_a_training_class(folder: Path) -> None:
    shutil.rmtree(folder / "train" / "dog")


def with_an_empty_class(folder: Path) -> None:
    for file in (folder / "test" / "dog").iterdir():
        file.unlink()


def without_test(folder: Path) -> None:
    shutil.rmtree(folder / "test")


def of_one_class(folder: Path) -> None:
    for name in CLASSES[1:]:
        for split in ("train", "test"):
            shutil.rmtree(folder / split / name)


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (broken, r"train/bee/0003.jpg cannot be decoded: .*; replace it, or leave it out"),
        (oblong, r"test/bee/0003.jpg is 8 x 16: give square pictures"),
        (of_another_size, r"test/bee/0003.jpg is 8 x 8, others are 16 x 16: make them of one size"),
        (huge, r"test/bee/0003.jpg is 300 x 300: give square pictures of at most 256 pixels"),
        (without_a_test_class, r"class 'dog' of train/ has no folder in test/: add it, or leave it out"),
        (without_a_training_class, r"class 'dog' of test/ has no folder in train/: add it, or leave it out"),
        (with_an_empty_class, r"test/dog holds no picture: fill it, or leave the class out"),
        (without_test, r"has no test/<class>/\*.jpg: lay it out as"),
        (of_one_class, r"has the one class 'ant': there is nothing to tell apart"),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_bad_pictures_are_named_with_the_mend(folder, tmp_path, damage, complaint, packed):
    source = Path(shutil.copytree(folder, tmp_path / "copy"))
    damage(source)
    if packed:
        with tarfile.open(tmp_path / "copy.tar", "w") as tar:
            tar.add(source, "at/any/depth")
        source = tmp_path / "copy.tar"
    with pytest.raises(ValueError, match=f"copy.*{complaint}"):
        read_pictures(source, None, None)


# ---- crops ----


def test_crops_are_functions_of_seed_epoch_and_sample():
    images = torch.randint(0, 256, (50, 8, 8, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    wide = padded(images)
    assert wide.shape == (50, 16, 16, 3) and not wide[:, :4].any() and torch.equal(wide[:, 4:12, 4:12], images)
    crops = draw_crops(50, seed=3, epoch=2, device=torch.device("cpu"))
    ids = torch.tensor([7, 49, 0, 7])
    found = cropped(wide, ids, crops)
    for row, sample in zip(found, ids.tolist(), strict=True):
        draw = [torch.tensor([sample]), 3, torch.tensor(2)]
        high, low = random_words(2, *draw, stream_of("image", Purpose.CROP))[0].tolist()
        top, left = high * 9 // 2**32, low * 9 // 2**32
        expected = wide[sample, top : top + 8, left : left + 8]
        if random_words(1, *draw, stream_of("image", Purpose.FLIP)).item() / 2**32 < 0.5:
            expected = expected.flip(1)
        assert torch.equal(row, expected)
    other = draw_crops(50, seed=3, epoch=3, device=torch.device("cpu"))
    assert not torch.equal(crops.top, other.top) and not torch.equal(crops.flip, other.flip)


def test_crops_are_spread_evenly():
    crops = draw_crops(9000, seed=0, epoch=0, device=torch.device("cpu"))
    for corner in (crops.top, crops.left):
        counts = torch.bincount(corner, minlength=9)
        assert len(counts) == 9 and (counts - 1000).abs().max() < 5 * 1000**0.5
    assert abs(crops.flip.sum().item() - 4500) < 5 * (9000 / 4) ** 0.5
    assert abs(np.corrcoef(crops.top, crops.left)[0, 1]) < 5 / 9000**0.5
