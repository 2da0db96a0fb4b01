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
        ({0: -signal.SIGTERM}, 143, "stopped by SIGTERM: the same command goes on from the newest checkpoint"),
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


class DistributedDataParallel:
    pass


class DeepSpeedEngine:
    def zero_optimization_stage(self) -> int:
        return 2


def test_another_engine_than_the_one_asked_for_is_an_error():
    with pytest.raises(RuntimeError, match=r"parallel.strategy is zero1.*DistributedDataParallel"):
        assert_engine(DistributedDataParallel(), "zero1", 2)
    with pytest.raises(RuntimeError, match=r"parallel.strategy is zero3, but DeepSpeed runs stage 2"):
        assert_engine(DeepSpeedEngine(), "zero3", 2)
    with pytest.raises(RuntimeError, match=r"parallel.strategy is ddp.*DeepSpeedEngine"):
        assert_engine(DeepSpeedEngine(), "ddp", 2)
    assert_engine(DistributedDataParallel(), "ddp", 2)
    assert_engine(object(), "ddp", 1)
    assert_engine(DeepSpeedEngine(), "zero2", 1)


def test_deepspeed_gets_numbers():
    config = deepspeed_config(ParallelConfig(precision="fp16", offload=True), 2, Layout(0, 4, 8, 3), None, 12_345)
    assert config["train_batch_size"] == 96 == 4 * 8 * 3
    assert (config["train_micro_batch_size_per_gpu"], config["gradient_accumulation_steps"]) == (8, 3)
    zero = config["zero_optimization"]
    assert zero["stage"] == 2 and config["gradient_clipping"] == 0.0 and zero["offload_optimizer"]["device"] == "cpu"
    assert zero["reduce_bucket_size"] == 12_345 and zero["allgather_bucket_size"] == 12_346
    assert config["fp16"]["enabled"] and not config["bf16"]["enabled"]
    assert config["data_types"] == {"grad_accum_dtype": "fp32"}
    assert "auto" not in str(config)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"processes": 0}, "parallel.processes is 0: at least 1"),
        ({"timeout_seconds": 0.0}, "parallel.timeout_seconds is 0.0"),
        ({"timeout_seconds": float("inf")}, "parallel.timeout_seconds is inf"),
        ({"timeout_seconds": float("nan")}, "parallel.timeout_seconds is nan"),
        ({"offload": True, "strategy": "ddp"}, "parallel.offload needs zero1, zero2 or zero3"),
    ],
)
def test_what_cannot_be_is_one_line(options, said):
    with pytest.raises(ValueError, match=said) as error:
        ParallelConfig(**options)
    assert "\n" not in str(error.value)


def test_torchrun_s_variables_name_the_rank():
    ranks = ranks_from_environment({"RANK": "3", "WORLD_SIZE": "8"})
    assert (ranks.rank, ranks.world_size, ranks.launched) == (3, 8, True)
    assert ranks_from_environment({}).launched is False
