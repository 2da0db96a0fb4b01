"""Pictures as files in folders: the pixels that shards of them give, and every odd file said by name."""

import io
import os
import resource
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from small_shards import CLASSES, EXACT, jpeg
from source_pictures import shard_source

from pipeline.data import native
from pipeline.data.augment import AugmentConfig
from pipeline.data.folder import FolderSource, class_folders, names_sha256, open_folder, pictures_in
from pipeline.data.loader import DataConfig, EvaluationLoader, open_split
from pipeline.data.reader import PictureReader

RESIZED = AugmentConfig(eval_crop_share=0.9)
PER_CLASS = 4


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """Three classes of plain JPEGs of several sizes."""
    root = tmp_path_factory.mktemp("folders")
    for label, name in enumerate(CLASSES):
        (root / name).mkdir()
        for i in range(PER_CLASS):
            seed = PER_CLASS * label + i
            (root / name / f"{i}.JPEG").write_bytes(jpeg(seed, 64 + 7 * seed, 90 - 2 * seed))
    return root


@pytest.fixture
def folder(tmp_path) -> Path:
    """One class with one picture, to put odd files beside."""
    (tmp_path / "ant").mkdir()
    (tmp_path / "ant" / "b.jpg").write_bytes(jpeg(1))
    return tmp_path


def opened(root: Path, folders=CLASSES, augment: AugmentConfig = RESIZED, workers: int = 2) -> PictureReader:
    return open_folder(root, folders, folders, DataConfig(image_size=32, workers=workers), augment, seed=0)


def all_images(reader: PictureReader) -> np.ndarray:
    return reader.batch(np.arange(len(reader)), None).images.numpy().copy()


@pytest.mark.parametrize(
    "augment", [RESIZED, EXACT, AugmentConfig(eval_crop="squash")], ids=["crop", "exact", "squash"]
)
def test_the_pixels_are_those_of_the_same_pictures_in_shards(root, tmp_path, augment):
    shard_source(root, tmp_path)
    shards = open_split(str(tmp_path / "train.manifest.json"), DataConfig(image_size=32), augment, 0)
    folders = opened(root, augment=augment)
    assert folders.classes == shards.classes and len(folders) == len(shards) == 12
    # Shards have an order of their own: the bytes say which picture is which.
    place = {shards.read(i): i for i in range(12)}
    ids = np.array([place[folders.read(i)] for i in range(12)])
    np.testing.assert_array_equal(folders.labels_of(np.arange(12)), shards.labels_of(ids))
    np.testing.assert_array_equal(all_images(folders), shards.batch(ids, None).images.numpy())


def test_jpegs_are_decoded_by_native_threads(root, monkeypatch):
    assert native.library() is not None and opened(root).threaded
    monkeypatch.setattr(PictureReader, "_by_pillow", lambda *args: pytest.fail("Pillow was asked"))
    assert all_images(opened(root)).std() > 0


def test_without_the_native_library_they_are_the_same(root, monkeypatch):
    expected = all_images(opened(root))
    monkeypatch.setattr(native, "library", lambda: None)
    np.testing.assert_array_equal(all_images(opened(root)), expected)


def test_ids_go_class_by_class_in_the_order_that_was_given(root):
    reader = opened(root, ("cat", "ant"))
    assert reader.labels_of(np.arange(8)).tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    assert reader.where(5) == f"sample 5 ({root}/ant/1.JPEG)"
    assert reader.read(5) == (root / "ant" / "1.JPEG").read_bytes()
    for id_beyond in (-1, 8):
        with pytest.raises(IndexError, match="there are 8 samples"):
            reader.labels_of(np.array([id_beyond]))


@pytest.mark.parametrize(("batch", "ranks", "workers"), [(5, 1, 0), (1, 2, 2), (7, 3, 1)])
def test_a_pass_hands_out_every_picture_once(root, batch, ranks, workers):
    reader = opened(root)
    expected, seen = all_images(reader), {}
    for rank in range(ranks):
        for images, labels, ids, _ in EvaluationLoader(reader, np.arange(12), batch, 1, rank, ranks, workers):
            for image, label, i in zip(images.numpy(), labels.tolist(), ids.tolist(), strict=True):
                assert i not in seen and label == i // PER_CLASS
                np.testing.assert_array_equal(image, expected[i])
                seen[i] = rank
    assert sorted(seen) == list(range(12))


def test_no_file_stays_open(root):
    before = len(os.listdir("/proc/self/fd"))
    reader = opened(root)
    for i in range(0, 12, 4):
        reader.batch(np.arange(i, i + 4), None)
    assert len(os.listdir("/proc/self/fd")) == before


def test_the_limit_of_open_files_is_said_with_its_mend(root):
    reader = opened(root)
    reader.batch(np.arange(1), None)  # its threads have begun
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    first_free = os.dup(0)
    os.close(first_free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (first_free + 2, hard))  # those that are open above it stay
    try:
        with pytest.raises(
            OSError, match=r"open no more files: raise `ulimit -n`, or read fewer .*\(micro_batch, batch"
        ):
            reader.batch(np.arange(12), None)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


# Odd files


def encoded(image: Image.Image, form: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form)
    return buffer.getvalue()


SMOOTH = Image.open(io.BytesIO(jpeg(3)))
ODD = {
    "a PNG": (encoded(SMOOTH, "PNG"), SMOOTH),
    "a CMYK JPEG": (encoded(SMOOTH.convert("CMYK"), "JPEG"), None),
    "a grey JPEG": (encoded(SMOOTH.convert("L"), "JPEG"), None),
    "a palette PNG": (encoded(SMOOTH.convert("P"), "PNG"), None),
    "a WebP": (encoded(SMOOTH, "WEBP"), None),
}


@pytest.mark.parametrize("kind", ODD)
def test_other_pictures_named_jpeg_are_what_pillow_makes_of_them(folder, kind):
    data, known = ODD[kind]
    (folder / "ant" / "a.JPEG").write_bytes(data)
    expected = np.asarray((known or Image.open(io.BytesIO(data))).convert("RGB"))[16:48, 16:48]
    np.testing.assert_array_equal(all_images(opened(folder, ("ant",), EXACT))[0], expected)


@pytest.mark.parametrize("data", [jpeg(1)[:400], b"\xff\xd8no jpeg", b"GIF89a" + bytes(50)], ids=["cut", "junk", "gif"])
def test_a_picture_that_cannot_be_decoded_is_named(folder, data):
    (folder / "ant" / "c.JPEG").write_bytes(data)
    reader = opened(folder, ("ant",))
    with pytest.raises(ValueError, match=rf"sample 1 \({folder}/ant/c\.JPEG\): cannot be decoded .*mend or remove it"):
        reader.batch(np.arange(2), None)
    with pytest.raises(ValueError, match=r"ant/c\.JPEG"):
        list(EvaluationLoader(reader, np.arange(2), 1, 1, 0, 1, 0))


@pytest.mark.parametrize("change", [lambda b: b[:-9], lambda b: b + b"x"], ids=["shorter", "longer"])
def test_a_file_that_changes_after_it_was_listed_is_named(folder, change):
    path = folder / "ant" / "b.jpg"
    reader = opened(folder, ("ant",))
    before = path.read_bytes()
    path.write_bytes(change(before))
    with pytest.raises(ValueError, match=rf"ant/b\.jpg\) has \d+ bytes, and had {len(before)} when listed: unpack"):
        reader.batch(np.arange(1), None)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"ant/b\.jpg"):
        reader.batch(np.arange(1), None)


def test_hidden_files_are_passed_over_and_links_followed(folder):
    kept = folder / ".elsewhere"
    kept.mkdir()
    (kept / "x.png").write_bytes(ODD["a PNG"][0])
    (folder / "ant" / "._b.jpg").write_bytes(b"resource fork")
    (folder / "ant" / ".DS_Store").write_bytes(b"x")
    (folder / "README.txt").write_text("as -A and -R have")
    (folder / "ant" / "a.jpg").symlink_to(kept / "x.png")
    (folder / "bee").symlink_to(kept)
    assert class_folders(folder) == ("ant", "bee")
    assert pictures_in(folder / "ant") == ["a.jpg", "b.jpg"]
    images = all_images(opened(folder, ("ant", "bee"), EXACT))
    np.testing.assert_array_equal(images[0], images[2])


def test_odd_names_are_sorted_as_text_and_read(folder):
    names = ["10.jpg", "2.jpg", "a b.jpg", "pic \N{LATIN SMALL LETTER E WITH ACUTE}.jpg"]
    for name in names:
        (folder / "ant" / name).write_bytes(jpeg(5))
    assert pictures_in(folder / "ant") == [*names[:3], "b.jpg", names[3]]
    assert len(all_images(opened(folder, ("ant",)))) == 5


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda ant: (ant / "notes.txt").write_text("x"), r"ant/notes\.txt is no picture by its name"),
        (lambda ant: (ant / "more").mkdir(), r"ant/more is a folder inside a class's"),
        (lambda ant: (ant / "x.jpg").symlink_to(ant / "gone"), r"ant/x\.jpg is no file \(a broken link\?\)"),
        (lambda ant: (ant / "b.jpg").unlink(), r"class folder .*ant holds no pictures: unpack"),
        (lambda ant: (ant / "x.jpg").touch(), r"ant/x\.jpg has 0 bytes"),
    ],
    ids=["no picture", "folder", "broken link", "empty class", "empty file"],
)
def test_what_does_not_belong_into_a_class_is_refused_by_name(folder, make, message):
    make(folder / "ant")
    with pytest.raises(ValueError, match=message):
        opened(folder, ("ant",))


def test_what_is_no_folder_of_class_folders_is_refused_by_name(folder):
    with pytest.raises(FileNotFoundError, match=r"nothing does not exist: name the folder that holds one folder a"):
        class_folders(folder / "nothing")
    with pytest.raises(FileNotFoundError, match=r"b\.jpg is not a folder"):
        class_folders(folder / "ant" / "b.jpg")
    with pytest.raises(ValueError, match=r"ant/b\.jpg lies in no class's folder"):
        class_folders(folder / "ant")
    with pytest.raises(FileNotFoundError, match="bee"):
        opened(folder, ("bee",))


def test_the_digest_tells_names_sizes_labels_and_order_apart(folder):
    (folder / "bee").mkdir()
    (folder / "bee" / "c.jpg").write_bytes(jpeg(2))
    own = FolderSource(folder, ("ant", "bee"))
    found = [own.samples_sha256(), FolderSource(folder, ("bee", "ant")).samples_sha256()]
    assert FolderSource(folder, ("ant", "bee")).samples_sha256() == found[0]
    assert names_sha256(folder, ("ant", "bee"))[0] == 2
    names = [names_sha256(folder, ("ant", "bee")), names_sha256(folder, ("bee", "ant"))]
    (folder / "bee" / "c.jpg").write_bytes(jpeg(2) + b"\0")
    assert names_sha256(folder, ("ant", "bee")) == names[0]  # of names alone
    found.append(FolderSource(folder, ("ant", "bee")).samples_sha256())
    (folder / "bee" / "c.jpg").rename(folder / "bee" / "d.jpg")
    names.append(names_sha256(folder, ("ant", "bee")))
    found.append(FolderSource(folder, ("ant", "bee")).samples_sha256())
    assert len(set(found)) == 4 and len(set(names)) == 3
