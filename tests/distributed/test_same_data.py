"""Ranks that have opened different data stop at once, instead of training on both, or waiting for each other."""

import pytest

from tests.conftest import REPOSITORY

RANK = """
import sys
from pathlib import Path

import torch.distributed as dist
from pipeline.parallel import Ranks, require_same_on_all_ranks

dist.init_process_group("gloo")
rank = dist.get_rank()
digests, answer = {"data.train": "a", "data.val": sys.argv[1 + rank]}, "agreed"
try:
    require_same_on_all_ranks(digests, Ranks(rank, 2, launched=True))
except ValueError as error:
    answer = str(error)
Path(__file__).with_name(f"answer-{rank}").write_text(answer)  # lines of two processes could run into one
dist.destroy_process_group()
"""


@pytest.mark.parametrize(
    ("digests", "answer"),
    [
        (("b", "b"), "agreed"),
        (("b", "c"), "rank 1 has other samples or labels in data.val than rank 0: give all nodes the same files"),
    ],
)
def test_all_ranks_are_told(warm, tmp_path, digests, answer):
    (tmp_path / "rank.py").write_text(RANK)
    torchrun = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    done = warm.run(*torchrun, str(tmp_path / "rank.py"), *digests, PYTHONPATH=str(REPOSITORY))
    assert done.returncode == 0, done.stderr
    assert [(tmp_path / f"answer-{rank}").read_text() for rank in range(2)] == [answer, answer]
