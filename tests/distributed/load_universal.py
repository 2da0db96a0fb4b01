"""Run by torchrun: a DeepSpeed engine of each ZeRO stage loads a universal checkpoint, and shows what it then holds.

Arguments: the folder, the expected state (safetensors: NAME/KIND), and the shapes as JSON.
"""

import json
import sys

import deepspeed
import torch
from deepspeed.ops import __compatible_ops__
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
from safetensors.torch import load_file
from torch import nn


def model_of(shapes: dict[str, list[int]]) -> nn.Module:
    model = nn.Module()
    for name, shape in shapes.items():
        model.register_parameter(name, nn.Parameter(torch.zeros(shape)))
    return model


def main(folder: str, expected: str, shapes: dict[str, list[int]]) -> None:
    __compatible_ops__["deepspeed_shm_comm"] = False  # as pipeline.parallel: it would be compiled, a minute's work
    deepspeed.init_distributed(dist_backend="gloo")
    assert torch.distributed.get_world_size() == 2
    wanted = load_file(expected)
    for stage in (1, 2, 3):
        torch.manual_seed(0)
        model = model_of(shapes)
        first, *others = model.parameters()
        optimizer = torch.optim.AdamW([{"params": [first], "lr": 0.5}, {"params": others, "lr": 0.25}])
        config = {
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": {"stage": stage},
            "zero_force_ds_cpu_optimizer": False,
            "checkpoint": {"load_universal": True},
        }
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
        path, _ = engine.load_checkpoint(folder)
        assert path is not None
        for name, parameter in engine.module.named_parameters():
            assert torch.equal(safe_get_full_fp32_param(parameter).flatten(), wanted[f"{name}/weight"]), (stage, name)
            for kind in ("exp_avg", "exp_avg_sq"):
                held = safe_get_full_optimizer_state(parameter, kind)
                assert torch.equal(held.flatten(), wanted[f"{name}/{kind}"]), (stage, name, kind)
            with deepspeed.zero.GatheredParameters([parameter]):
                assert torch.equal(parameter.detach().flatten(), wanted[f"{name}/weight"]), (stage, name)
        steps = {float(state["step"]) for state in engine.optimizer.optimizer.state.values()}
        assert steps == {7.0}, (stage, steps)
        rates = {group["lr"] for group in engine.optimizer.optimizer.param_groups}
        assert rates == {0.5, 0.25}, (stage, rates)
        if torch.distributed.get_rank() == 0:
            print(f"stage {stage} holds it", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], json.loads(sys.argv[3]))
