"""Pictures that are as they were written, CRC and all, and yet are none: named, and never another's pixels."""

import ast
import dataclasses
import hashlib
import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from small_shards import SIDE, jpeg, tars

from data_prep.manifest import pack_index, read_manifest, unpack_index, write_manifest

PACKAGE = Path(__file__).resolve().parents[2] / "pipeline" / "data"
SAMPLE = 9  # the third picture of the second shard


def rewritten(manifest_path: Path, data: bytes) -> None:
    """Puts other bytes in the place of a sample, with index and manifest that say so."""
    manifest = read_manifest(manifest_path)
    shard = manifest.shards[1]
    tar, index = manifest.folder / shard.name, manifest.folder / shard.index_name
    entries = unpack_index(index.read_bytes(), index)
    content = tar.read_bytes()
    entries[2] = entries[2]._replace(offset=len(content), size=len(data), crc32=zlib.crc32(data))
    tar.write_bytes(content + data)
    index.write_bytes(pack_index(entries))
    shard = dataclasses.replace(
        shard, bytes=len(content) + len(data), index_sha256=hashlib.sha256(index.read_bytes()).hexdigest()
    )
    write_manifest(dataclasses.replace(manifest, shards=(manifest.shards[0], shard, *manifest.shards[2:])))


def with_size(data: bytes, width: int, height: int) -> bytes:
    """The JPEG with another size in its frame header."""
    frame = data.index(b"\xff\xc0")
    return data[: frame + 5] + struct.pack(">HH", height, width) + data[frame + 9 :]


def png(width: int, height: int) -> bytes:
    """A few bytes that say they are a large picture."""
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + head
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk)) + bytes(64)


GOOD = jpeg(3)
BAD = {
    "nothing": b"",
    "garbage": np.random.RandomState(0).bytes(3000),
    "text": b"<html>404 Not Found</html>",
    "a JPEG cut in the middle": GOOD[: len(GOOD) // 2],
    "a JPEG without its end": GOOD[:-2],
    "a JPEG's header alone": GOOD[: GOOD.index(b"\xff\xda")],
    "a JPEG of 65,500 x 65,500": with_size(GOOD, 65500, 65500),
    "a JPEG without pixels": with_size(GOOD, 0, 0),
    "a PNG of 30,000 x 30,000": png(30_000, 30_000),
    "PostScript, which Pillow would run": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
    "a pickle": b"\x80\x04\x95\x1d\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x94\x8c\x06system\x94\x93\x94.",
}


@pytest.mark.parametrize("epoch", [None, 0])
@pytest.mark.parametrize("name", BAD)
def test_it_ends_the_run_by_name(split_copy, name, epoch):
    rewritten(split_copy, BAD[name])
    reader = tars(split_copy)
    reader.batch(np.array([8, 8, 8]), epoch)  # a good one, in a buffer that is used again
    with pytest.raises(ValueError, match=rf"sample {SAMPLE} .*train-000001\.tar, picture 2\).*cannot be decoded"):
        reader.batch(np.array([8, SAMPLE, 10]), epoch)


@pytest.mark.parametrize("name", BAD)
def test_the_next_stands_in_where_that_is_asked_for(split_copy, name):
    expected = tars(split_copy).batch(np.array([8, 10, 10]), 0)
    rewritten(split_copy, BAD[name])
    batch = tars(split_copy, on_bad_sample="replace").batch(np.array([8, SAMPLE, 10]), 0)
    assert batch.sample_ids.tolist() == [8, 10, 10] and batch.images.equal(expected.images)


def test_what_is_odd_but_a_picture_is_read(split_copy):
    """By Pillow: PNG, CMYK, a JPEG with stray bytes; to Pillow's own pixels."""
    image = Image.open(io.BytesIO(GOOD))
    assert image.size == (SIDE, SIDE)
    for form, mode in (("PNG", "RGB"), ("PNG", "P"), ("JPEG", "CMYK"), ("JPEG", "L"), ("WEBP", "RGBA")):
        buffer = io.BytesIO()
        image.convert(mode).save(buffer, form)
        folder = split_copy.parent
        kept = {path: path.read_bytes() for path in folder.iterdir() if path.is_file()}
        rewritten(split_copy, buffer.getvalue())
        found = tars(split_copy).batch(np.array([SAMPLE]), None).images[0].numpy()
        expected = np.asarray(Image.open(buffer).convert("RGB"))[16:48, 16:48]
        assert np.array_equal(found, expected), (form, mode)
        for path, data in kept.items():
            path.write_bytes(data)


def test_nothing_that_a_shard_holds_can_be_run():
    """The loader's modules have no way to: no unpickling, no shell, no unpacking of archives, no torch.load."""
    names = set()
    for path in PACKAGE.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                names.add(node.module)
            elif isinstance(node, ast.Attribute):
                names.add(f"{ast.unparse(node.value)}.{node.attr}")
            elif isinstance(node, ast.Name):
                names.add(node.id)
    assert {"numpy", "os.pread"} <= names, "the modules were not found"
    dangerous = {
        "pickle",
        "marshal",
        "shelve",
        "subprocess",
        "tarfile",
        "zipfile",
        "shutil.unpack_archive",
        "webdataset",
    }
    dangerous |= {
        "eval",
        "exec",
        "compile",
        "__import__",
        "os.system",
        "os.popen",
        "torch.load",
        "np.load",
        "numpy.load",
    }
    assert not names & dangerous
