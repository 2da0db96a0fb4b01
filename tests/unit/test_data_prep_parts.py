"""data_prep's parts one by one: manifest and index, sources, plan, pictures, digits, workers."""

import dataclasses
import io
import json
import os
import signal
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from PIL import Image

from data_prep import images, manifest, plan, sources, workers
from data_prep.digits import VAL_PER_CLASS, DigitsOptions, choose_splits, write_digits


def encoded(array_or_image, format="JPEG", **options) -> bytes:
    image = array_or_image if isinstance(array_or_image, Image.Image) else Image.fromarray(array_or_image)
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


@pytest.fixture
def gradient() -> np.ndarray:
    """uint8 (48, 64, 3), smooth, so that a JPEG of it stays close."""
    y, x = np.mgrid[0:48, 0:64]
    return np.stack([x * 4, y * 5, 255 - x * 2 - y], axis=-1).astype(np.uint8)


# ---- manifest and index ----


@pytest.fixture
def whole(tmp_path) -> manifest.Manifest:
    return manifest.Manifest(
        split="train",
        classes=("a", "ü"),
        class_counts=(3, 2),
        shards=(manifest.ShardRecord("train-000000.tar", 5, 10240, "ab", "cd"),),
        source={"kind": "image-folder"},
        options={"seed": 0},
        repaired=(manifest.Note("a_1", "a/1.png: PNG, mode P"),),
        skipped=(manifest.Note("a_2", "a/2.jpg: the file is empty"),),
        beton=manifest.BetonRecord("train.beton", 5, 99, "ef", "jpg", None, None),
        folder=tmp_path,
    )


def test_manifest_round_trip(whole):
    path = manifest.write_manifest(whole)
    again = manifest.read_manifest(path)
    assert again == whole
    assert again.folder == whole.folder
    assert again.num_samples == 5
    assert again.shards[0].index_name == "train-000000.idx"
    without = dataclasses.replace(whole, beton=None)
    assert manifest.read_manifest(manifest.write_manifest(without)) == without


def _drop(name):
    return lambda body: body.pop(name)


def _put(name, value):
    return lambda body: body.__setitem__(name, value)


@pytest.mark.parametrize(
    "damage",
    [
        _put("format", "other"),
        _put("version", 99),
        _put("num_samples", 6),
        _put("class_counts", [3, 3]),
        _put("class_counts", ["3", "2"]),
        _put("class_counts", [6, -1]),
        _put("class_counts", [5]),
        _put("classes", [1, 2]),
        _put("shards", None),
        _put("shards", [5]),
        _put("shards", []),
        _put("beton", 5),
        _put("source", []),
        _put("unknown", 1),
        _drop("shards"),
        _drop("classes"),
        lambda body: body["shards"][0].update(name="../x.tar"),
        lambda body: body["shards"][0].update(name="/x.tar"),
        lambda body: body["shards"][0].update(name=7),
        lambda body: body["shards"][0].update(samples="5"),
        lambda body: body["shards"][0].update(extra=1),
        lambda body: body["beton"].update(name="../x.beton"),
    ],
)
def test_damaged_manifest_is_refused_by_name(whole, damage):
    path = manifest.write_manifest(whole)
    body = json.loads(path.read_text())
    damage(body)
    path.write_text(json.dumps(body))
    with pytest.raises(ValueError, match=path.name):
        manifest.read_manifest(path)


def test_manifest_cut_anywhere_is_refused(whole):
    path = manifest.write_manifest(whole)
    text = path.read_bytes()
    for length in range(0, len(text) - 1, 7):
        path.write_bytes(text[:length])
        with pytest.raises(ValueError, match=path.name):
            manifest.read_manifest(path)


def test_index_round_trip_and_every_damage(tmp_path):
    entries = [manifest.IndexEntry(512, 700, 3, 0xDEADBEEF), manifest.IndexEntry(1 << 40, 2**32 - 1, -1, 0)]
    data = manifest.pack_index(entries)
    assert manifest.unpack_index(data, tmp_path) == entries
    assert manifest.check_index(data, tmp_path) == (2, True)
    assert manifest.check_index(manifest.pack_index(entries, crc_known=False), tmp_path) == (2, False)
    for position in range(len(data)):
        flipped = bytearray(data)
        flipped[position] ^= 1 << (position % 8)
        with pytest.raises(ValueError, match="shard"):
            manifest.check_index(bytes(flipped), tmp_path)
        with pytest.raises(ValueError, match="shard"):
            manifest.check_index(data[:position], tmp_path)


def test_atomic_file_leaves_all_or_nothing(tmp_path):
    path = tmp_path / "x"
    with manifest.atomic_file(path) as file:
        file.write(b"one")
        assert not path.exists()
    with pytest.raises(RuntimeError), manifest.atomic_file(path) as file:
        file.write(b"two")
        raise RuntimeError
    assert path.read_bytes() == b"one"
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_manifest_needs_the_standard_library_only_and_data_prep_no_torch():
    code = (
        "import sys; import data_prep.manifest; assert not {'numpy', 'PIL', 'tyro'} & set(sys.modules); "
        "import data_prep.__main__; assert not {'torch', 'ffcv', 'sklearn'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=os.path.dirname(os.path.dirname(manifest.__file__)))


# ---- sources and plan ----


def touch(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x")
    return path


def test_image_folder_lists_as_torchvision_does(tmp_path):
    names = ["b/2.JPEG", "b/10.png", "b/sub/1.jpg", "b/Z.webp", "a/x.bmp", "a/sub.d/x.jpeg", "C/1.jpg"]
    for name in [*names, "a/.DS_Store", ".git/config"]:
        touch(tmp_path / name)
    listing = sources.ImageFolder(tmp_path).scan()
    from torchvision.datasets.folder import find_classes, make_dataset

    classes, _ = find_classes(str(tmp_path))
    classes.remove(".git")  # torchvision takes hidden folders for classes
    theirs = make_dataset(
        str(tmp_path), {name: classes.index(name) for name in classes}, (*sources.PICTURE_SUFFIXES, ".x")
    )
    assert list(listing.classes) == classes == ["C", "a", "b"]
    assert [(str(tmp_path / s.path), s.label) for s in listing.samples] == theirs
    assert len(listing.samples) == len(names)


def test_keys_trace_back_and_are_unique(tmp_path):
    names = [
        "n01/n01_7.JPEG",
        "n01/n01_8.JPEG",
        "n02/a.b.jpg",
        "n02/a_b.jpg",
        "n02/a_b.png",
        "n02/é.jpg",
        "n02/sub/q.jpg",
    ]
    names += [f"n02/{'long' * 40}{i}.jpg" for i in range(3)]
    for name in names:
        touch(tmp_path / name)
    samples = sources.ImageFolder(tmp_path).scan().samples
    keys = {s.path: s.key for s in samples}
    assert keys["n01/n01_7.JPEG"] == "n01_7"
    assert keys["n02/sub/q.jpg"] == "n02_sub_q"
    assert len(set(keys.values())) == len(names)
    assert all(key.isascii() and not set(key) & set("./") and len(key) <= 96 for key in keys.values())


def test_links_are_followed_but_not_in_circles(tmp_path):
    touch(tmp_path / "store" / "1.jpg")
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "a").symlink_to(tmp_path / "store")
    assert [s.path for s in sources.ImageFolder(tmp_path / "set").scan().samples] == ["a/1.jpg"]
    (tmp_path / "store" / "loop").symlink_to(tmp_path / "store")
    with pytest.raises(ValueError, match=r"loop.*remove it"):
        sources.ImageFolder(tmp_path / "set").scan()


def test_listing_digest_sees_names_labels_and_order():
    one, two = sources.Sample("k", "a/1.jpg", 0), sources.Sample("l", "a/2.jpg", 0)
    relabelled = dataclasses.replace(one, label=1)
    digests = {sources.Listing(("a",), s).sha256() for s in [(one, two), (two, one), (one,), (relabelled, two)]}
    assert len(digests) == 4


def test_plan_is_a_stable_shuffled_partition():
    shards = plan.plan_shards(1000, 64, seed=3)
    assert [len(s) for s in shards] == [64] * 15 + [40]
    flat = [i for s in shards for i in s]
    assert sorted(flat) == list(range(1000))
    assert flat != list(range(1000))
    assert plan.plan_shards(1000, 100, seed=3)[0][:64] == shards[0]  # the order does not depend on the shard's size
    assert plan.plan_shards(1000, 64, seed=4) != shards
    assert plan.plan_shards(5, 2, seed=3, keep_order=True) == [[0, 1], [2, 3], [4]]
    # Golden: a sample id is for ever. If this fails, LAYOUT_VERSION of distribute.py must change.
    assert plan.plan_shards(10, 10, seed=0)[0] == [3, 7, 5, 2, 8, 4, 9, 1, 6, 0]


# ---- pictures ----


def test_plain_jpegs_pass_through_byte_for_byte(gradient):
    for data in (
        encoded(gradient),
        encoded(gradient, progressive=True),
        encoded(gradient[..., 0]),
        encoded(gradient) + b"trailing bytes",
        encoded(gradient, exif=b"Exif\0\0broken"),
        encoded(gradient[:1, :1]),
        encoded(gradient, "MPO", save_all=True, append_images=[Image.fromarray(gradient[::-1])]),
    ):
        assert images.prepare_picture(data, 50) == (data, None)


def test_exif_rotation_is_not_applied(gradient):
    exif = Image.Exif()
    exif[0x0112] = 6  # "turn by 90 degrees"
    for format in ("JPEG", "PNG"):
        data, _ = images.prepare_picture(encoded(gradient, format, exif=exif), 50)
        assert images.decode_rgb(data).shape == gradient.shape


def quirks(gradient):
    grey = gradient[..., 0]
    colour = Image.fromarray(gradient)
    rgba = np.dstack([gradient, np.full(grey.shape, 9, np.uint8)])
    as_grey = np.repeat(grey[..., None], 3, -1)
    return {
        "PNG, mode RGB": (encoded(gradient, "PNG"), gradient),
        "PNG, mode RGBA": (encoded(rgba, "PNG"), gradient),
        "PNG, mode P": (p := encoded(colour.quantize(64), "PNG"), np.asarray(Image.open(io.BytesIO(p)).convert("RGB"))),
        "PNG, mode I;16": (encoded((grey.astype(np.uint16) << 8) + 255, "PNG"), as_grey),
        "PNG, mode 1": (encoded(Image.fromarray(grey > 128), "PNG"), np.where(as_grey > 128, 255, 0)),
        "JPEG, mode CMYK": (c := encoded(colour.convert("CMYK")), np.asarray(Image.open(io.BytesIO(c)).convert("RGB"))),
        "WEBP, mode RGB": (encoded(gradient, "WEBP", lossless=True), gradient),
        "BMP, mode RGB": (encoded(gradient, "BMP"), gradient),
        "GIF, mode P": (encoded(grey, "GIF"), as_grey),
    }


def test_quirks_become_rgb_jpegs_that_look_the_same(gradient):
    for reason, (data, looks) in quirks(gradient).items():
        jpeg, why = images.prepare_picture(data, 50)
        assert why == reason
        with Image.open(io.BytesIO(jpeg)) as image:
            assert (image.format, image.mode) == ("JPEG", "RGB")
            difference = np.abs(np.asarray(image).astype(int) - looks)
        assert difference.mean() < 3, reason
        assert images.prepare_picture(jpeg, 50) == (jpeg, None)


def _png_header(width, height) -> bytes:
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    start = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    return start + struct.pack(">I", 10) + b"IDAT"


def test_pictures_that_cannot_be_used_are_refused(gradient):
    jpeg = encoded(gradient)
    for data, reason in [
        (b"", "empty"),
        (b"hello, I am no picture", "not a picture"),
        (jpeg[:-200], "truncated"),
        (jpeg[:-20], "truncated"),
        (encoded(gradient, "PNG")[:-60], "decoded"),
        (_png_header(9000, 9000), "81.0 megapixels"),
        (_png_header(60000, 60000), "megapixels"),
        (encoded(np.zeros((1, 70000, 3), np.uint8), "PNG"), "written as a JPEG"),
        (encoded(np.ones((4, 4), np.float32), "TIFF"), "floating-point"),
    ]:
        with pytest.raises(images.PictureError, match=reason):
            images.prepare_picture(data, 50)


def test_size_limit_is_the_header_s(gradient):
    data = encoded(gradient)
    megapixels = gradient.shape[0] * gradient.shape[1] / 1e6
    assert images.prepare_picture(data, megapixels) == (data, None)
    with pytest.raises(images.PictureError, match="64x48"):
        images.prepare_picture(data, megapixels * 0.99)


# ---- digits ----


def test_val_is_spread_evenly_through_each_class():
    labels = np.random.RandomState(0).randint(0, 3, 500)
    chosen = np.array(choose_splits(labels)) == "val"
    for label in range(3):
        (places,) = np.nonzero(chosen[labels == label])
        count = (labels == label).sum()
        assert len(places) == VAL_PER_CLASS
        assert np.diff(places).min() >= count // VAL_PER_CLASS and np.diff(places).max() <= count // VAL_PER_CLASS + 1
        assert places[0] < 5 and places[-1] >= count - 5


def test_digits_do_not_overwrite_anything_else(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "1.jpg").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"mine.*remove it"):
        write_digits(DigitsOptions(tmp_path / "mine"))
    assert [p.name for p in tmp_path.rglob("*.jpg")] == ["1.jpg"]


# ---- workers ----


def square(number):
    return number * number


def die_at_three(number):
    if number == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def fail_at_three(number):
    if number == 3:
        raise ValueError("three is bad")
    return number


def test_map_ordered_keeps_order_and_passes_errors_on():
    assert list(workers.map_ordered(square, range(20), 2)) == [n * n for n in range(20)]
    with pytest.raises(ValueError, match="three is bad"):
        list(workers.map_ordered(fail_at_three, range(20), 2))


def test_a_dead_worker_is_one_error_and_no_hang():
    with pytest.raises(ChildProcessError, match="died"):
        list(workers.map_ordered(die_at_three, range(20), 2))
