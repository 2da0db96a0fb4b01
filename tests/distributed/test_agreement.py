"""What all ranks decide alike: a signal to one of them, and one's clock, speak for all."""

import json

from tests.conftest import REPOSITORY

COMMAND = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2")
RANK = """
import json
from pathlib import Path

import torch.distributed as dist
from pipeline.agreement import Agreement

dist.init_process_group("gloo")
rank = dist.get_rank()
agreement = Agreement(2, timeout_seconds=30)
proposals = [(0, False), (15 * rank, False), (0, rank == 0), (10 + rank, True), (0, False)]
answers = []
for stop, save in proposals:
    agreement.propose(stop, save)
    answers.append(list(agreement.decided()))
answers.append(list(agreement.now(12 * (1 - rank))))
Path(__file__).with_name(f"answer-{rank}").write_text(json.dumps(answers))
dist.destroy_process_group()
"""


def test_both_ranks_decide_what_either_proposes(warm, tmp_path):
    (tmp_path / "rank.py").write_text(RANK)
    done = warm.run(*COMMAND, str(tmp_path / "rank.py"), PYTHONPATH=str(REPOSITORY))
    assert done.returncode == 0, done.stderr
    expected = [[0, False], [15, False], [0, True], [11, True], [0, False], [12, False]]
    assert [json.loads((tmp_path / f"answer-{rank}").read_text()) for rank in range(2)] == [expected, expected]
