"""What all layers of tests share: the repository's root, real pictures as shards, and how a command is called."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from warm import WarmPython

# In CI nothing may be missing that can be installed: only these reasons to skip are let through.
_ALLOWED_SKIPS = ("no GPU", "no real pictures", "no right to mount")
REPOSITORY = Path(__file__).parent.parent
Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    report = yield
    if os.environ.get("CI") and report.skipped and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        if not reason.removeprefix("Skipped: ").startswith(_ALLOWED_SKIPS):
            report.outcome = "failed"
            report.longrepr = f"{item.nodeid} was skipped in CI: {reason}; setup.sh must install what it needs"
    return report


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


@pytest.fixture(scope="session")
def imagenet_sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """250 original ImageNet pictures as an ImageFolder, where NOISYNN_SAMPLES names the folder of their archive."""
    archive = Path(os.environ.get("NOISYNN_SAMPLES", "")) / "imagenet-sample.tar"
    if not archive.is_file():
        pytest.skip("no real pictures: NOISYNN_SAMPLES names no folder with imagenet-sample.tar")
    folder = tmp_path_factory.mktemp("imagenet")
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    return folder / "imagenet-sample"


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


@pytest.fixture(scope="session")
def warm() -> Iterator[WarmPython]:
    """`warm.run` is `command` in a tenth of the time, on one thread: forked from a process that has imported torch."""
    python = WarmPython()
    yield python
    python.close()
