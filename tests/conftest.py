"""What all layers of tests share: the repository's root, real pictures as shards, and how a command is called."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent
Command = Callable[..., subprocess.CompletedProcess[str]]


@dataclass(frozen=True)
class Digits:
    """scikit-learn's digits as ImageFolder and as shards."""

    pictures: Path
    train: Path  # manifests
    val: Path


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Digits:
    from data_prep.digits import DigitsOptions, write_digits
    from data_prep.distribute import ShardOptions, shard

    folder = tmp_path_factory.mktemp("digits")
    write_digits(DigitsOptions(folder / "pictures"))
    manifests = [
        shard(ShardOptions(folder / "pictures" / split, folder / "shards", split=split, samples_per_shard=256)).path
        for split in ("train", "val")
    ]
    return Digits(folder / "pictures", *manifests)


def run_command(*words: str, timeout: float = 300, **environment: str) -> subprocess.CompletedProcess[str]:
    """`python -m words` from the repository's root, as a user calls it."""
    return subprocess.run(
        [sys.executable, "-m", *words],
        cwd=REPOSITORY,
        env=os.environ | {"COLUMNS": "100"} | environment,
        capture_output=True,
        text=True,
        timeout=timeout,
    )


@pytest.fixture(scope="session")
def command() -> Command:
    return run_command
