"""Long counts, run by `make soak` alone."""

from __future__ import annotations

import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
import scipy.stats
import torch

from data_prep.distribute import ShardOptions, shard
from data_prep.verify import VerifyOptions, verify
from pipeline.noise.reference import Purpose, gaussian_noise, stream_of

pytestmark = pytest.mark.soak


def test_every_bit_flip_in_a_shard_is_found(digits, tmp_path) -> None:
    shutil.copytree(digits.val.parent, tmp_path / "shards")
    manifest = tmp_path / "shards" / digits.val.name
    tars = sorted((tmp_path / "shards").glob("val-*.tar"))
    draw = random.Random(0)
    for number in range(300):
        tar = draw.choice(tars)
        good = tar.read_bytes()
        bad = bytearray(good)
        bad[draw.randrange(len(bad))] ^= 1 << draw.randrange(8)
        tar.write_bytes(bad)
        assert verify(VerifyOptions(manifest, quick=True, processes=1)), f"flip {number} in {tar.name}"
        tar.write_bytes(good)
    assert verify(VerifyOptions(manifest, processes=1)) == []


def test_a_sharding_killed_at_random_ends_as_an_undisturbed_one(digits, tmp_path) -> None:
    def command(out) -> list[str]:
        where = ["--source", str(digits.pictures / "train"), "--out", str(out), "--samples-per-shard", "64"]
        return [sys.executable, "-m", "data_prep", "shard", *where]

    def contents(folder) -> dict[str, bytes]:
        return {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file() and not p.name.startswith(".")}

    shard(ShardOptions(digits.pictures / "train", tmp_path / "good", samples_per_shard=64))
    draw = random.Random(0)
    killed = 0
    for number in range(20):
        out = tmp_path / f"out{number}"
        running = subprocess.Popen(command(out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(draw.uniform(0.3, 2.0))
        running.send_signal(signal.SIGKILL)
        killed += running.wait() == -signal.SIGKILL
        subprocess.run(command(out), check=True, stdout=subprocess.DEVNULL)
        assert contents(out) == contents(tmp_path / "good"), f"kill {number}"
    assert killed >= 5, "most runs ended before they were killed: nothing was tried"


def test_the_noise_is_normal_over_a_hundred_million_draws() -> None:
    """Kolmogorov-Smirnov on ten parts; the least of ten p-values is below 0.0001 once in a thousand seeds."""
    zeros, epoch = torch.zeros(100, 100_000), torch.zeros((), dtype=torch.int64)
    for part in range(10):
        ids = torch.arange(100 * part, 100 * (part + 1))
        draws = gaussian_noise(zeros, 1.0, ids, seed=1, epoch=epoch, stream=stream_of("image", Purpose.NOISE)).flatten()
        assert abs(draws.double().mean().item()) < 5 / 1e7**0.5
        assert abs(draws.double().var().item() - 1) < 5 * (2 / 1e7) ** 0.5
        assert scipy.stats.kstest(draws[:1_000_000].numpy(), "norm").pvalue > 1e-4
