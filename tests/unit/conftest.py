"""Splits that more than one test module reads; written once a session, in 0.2 s each."""

import os
import shutil
from pathlib import Path

import pytest
from small_shards import SIDE, make

# As pipeline/data/beton.py: else the process hangs at its end on one core, since tests fork after ffcv's import.
os.environ.setdefault("NUMBA_THREADING_LAYER", "workqueue")


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
