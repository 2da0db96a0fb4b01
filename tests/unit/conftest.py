"""Splits that more than one test module reads, written once a session in 0.2 s each; and the GPU's threads."""

import ctypes
import os
import shutil
from pathlib import Path

import pytest
from audit_runs import make_run
from fault_store import FaultStore
from small_shards import SIDE, jpeg, make
from source_pictures import CLASSES, PER_CLASS, picture, shard_source
from variant_world import World, lay_sets, lay_validation

import pipeline.noise

# As pipeline/data/beton.py: else the process hangs at its end on one core, since tests fork after ffcv's import.
os.environ.setdefault("NUMBA_THREADING_LAYER", "workqueue")


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """3 classes of 8 pictures of several sizes; among them a PNG named .JPEG and a grey JPEG."""
    root = tmp_path_factory.mktemp("source")
    for label, name in enumerate(CLASSES):
        (root / name).mkdir()
        for i in range(PER_CLASS):
            seed = label * PER_CLASS + i
            image = picture(seed, 32 + seed, 40)
            path = root / name / f"{i}.JPEG"
            if i == 1:
                image.save(path, "PNG")
            else:
                (image.convert("L") if i == 2 else image).save(path, "JPEG", quality=90)
    return root


@pytest.fixture(scope="module")
def shards(source, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("shards")
    shard_source(source, out)
    return out


@pytest.fixture
def copy(shards, tmp_path) -> Path:
    return Path(shutil.copytree(shards, tmp_path / "copy"))


@pytest.fixture(scope="session")
def jpg_split(tmp_path_factory) -> Path:
    return make(tmp_path_factory.mktemp("jpg"), [(SIDE, SIDE)], "jpg")


@pytest.fixture(scope="session")
def raw_split(tmp_path_factory) -> Path:
    return make(tmp_path_factory.mktemp("raw"), [(SIDE, SIDE)], "raw")


@pytest.fixture(scope="session")
def sizes_split(tmp_path_factory) -> Path:
    return make(tmp_path_factory.mktemp("sizes"), [(300, 220), (220, 330), (256, 256)], "jpg")


@pytest.fixture
def split_copy(jpg_split, tmp_path) -> Path:
    """A copy to damage; the manifest's path."""
    return Path(shutil.copytree(jpg_split.parent, tmp_path / "copy")) / jpg_split.name


@pytest.fixture(scope="session")
def library() -> ctypes.CDLL:
    """The GPU's threads on the CPU: pipeline/noise/csrc/host_walk.cpp."""
    path = Path(pipeline.noise.__file__).parent / "csrc" / "libnoisynn_walk.so"
    assert path.is_file(), f"`make setup` has built no {path.name}"
    return ctypes.CDLL(str(path))


@pytest.fixture(scope="session")
def audited_run(tmp_path_factory) -> Path:
    return make_run(tmp_path_factory.mktemp("run") / "r<u>n")


@pytest.fixture(scope="session")
def named_pictures(tmp_path_factory) -> Path:
    """Three classes of eight pictures, 0.jpg to 7.jpg each."""
    root = tmp_path_factory.mktemp("pictures")
    for label, name in enumerate(CLASSES):
        (root / name).mkdir()
        for i in range(8):
            (root / name / f"{i}.jpg").write_bytes(jpeg(8 * label + i))
    return root


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> World:
    return World(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="session")
def validation(world, tmp_path_factory):
    return lay_validation(world, tmp_path_factory.mktemp("validation"))


@pytest.fixture(scope="session")
def sets(world, tmp_path_factory) -> Path:
    return lay_sets(world, tmp_path_factory.mktemp("sets"))


@pytest.fixture
def store():
    """A store whose requests can be made to fail."""
    store = FaultStore()
    with store.serving():
        yield store
