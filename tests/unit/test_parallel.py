"""What can be said of ranks without starting any."""

import signal

import pytest

from pipeline.data.order import Layout
from pipeline.parallel import (
    ParallelConfig,
    _explain,
    assert_engine,
    deepspeed_config,
    is_lost_peer,
    ranks_from_environment,
)


@pytest.mark.parametrize(
    ("statuses", "status", "said"),
    [
        ({0: 1, 1: -signal.SIGKILL}, 137, "rank 1 was ended by SIGKILL"),  # rank 0 lost its peer
        ({0: -signal.SIGTERM, 1: 2}, 2, ""),  # rank 1 has said what is wrong; the agent ended rank 0
        ({0: -signal.SIGTERM, 3: 1}, 1, ""),
        ({0: -signal.SIGTERM, 1: -signal.SIGABRT}, 134, "rank 1 was ended by SIGABRT"),
        ({0: -signal.SIGTERM}, 143, "stopped by SIGTERM: the same command with --resume goes on"),
        ({0: -signal.SIGINT, 1: -signal.SIGTERM}, 130, "stopped by SIGINT"),
    ],
)
def test_the_cause_is_told_from_what_followed(statuses, status, said, capsys):
    assert _explain(statuses) == status
    assert said in capsys.readouterr().err


def test_a_lost_peer_is_told_from_other_errors():
    assert is_lost_peer(RuntimeError("[../gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:1"))
    assert not is_lost_peer(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_lost_peer(ConnectionError("Connection closed by peer"))


def test_another_engine_than_the_one_asked_for_is_an_error():
    class DistributedDataParallel:
        pass

    with pytest.raises(RuntimeError, match=r"parallel.engine is deepspeed.*DistributedDataParallel"):
        assert_engine(DistributedDataParallel(), ParallelConfig(engine="deepspeed"), 2)
    assert_engine(DistributedDataParallel(), ParallelConfig(engine="ddp"), 2)


def test_deepspeed_gets_numbers():
    config = deepspeed_config(ParallelConfig(zero_stage=2), Layout(0, 4, 8, 3), clip_grad_norm=None)
    assert config["train_batch_size"] == 96 == 4 * 8 * 3
    assert (config["train_micro_batch_size_per_gpu"], config["gradient_accumulation_steps"]) == (8, 3)
    assert config["zero_optimization"]["stage"] == 2 and config["gradient_clipping"] == 0.0
    assert "auto" not in str(config)


def test_torchrun_s_variables_name_the_rank():
    ranks = ranks_from_environment({"RANK": "3", "WORLD_SIZE": "8"})
    assert (ranks.rank, ranks.world_size, ranks.launched) == (3, 8, True)
    assert ranks_from_environment({}).launched is False
