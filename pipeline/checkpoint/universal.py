"""A generation in DeepSpeed's universal format, for runs that DeepSpeed alone goes on with.

What `load_universal` of DeepSpeed 0.19 reads (deepspeed/checkpoint/ds_to_universal.py writes it from its own
checkpoints): TAG/zero/PARAMETER/{fp32,exp_avg,...,step}.pt, TAG/zero/optimizer_state.pt, TAG/*model_states.pt and
latest_universal. DeepSpeed unpickles these files; the project itself never reads them.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from data_prep.manifest import atomic_file, publish
from pipeline.checkpoint.reader import Generation
from pipeline.checkpoint.writer import WEIGHTS_NAME
from pipeline.pieces import EMA, WEIGHT, Piece

_WRITTEN_AS = "0.19.0"  # the DeepSpeed whose format this is
_UNIVERSAL_VERSION = 0.2


def export_universal(generation: Generation, output: Path) -> Path:
    """Writes OUTPUT/step-NNNNNNNN and OUTPUT/latest_universal; returns the folder. Holds one parameter in memory.

    Rates and the like stay those of the engine that loads it. Its step counts are tensors, as torch's optimisers keep
    them (DeepSpeed's FusedAdam and CPUAdam keep plain numbers). DeepSpeed does not restore buffers, such as
    BatchNorm's: they are under "module" of the model states.

    Errors: ValueError where the folder exists or the generation is not whole; OSError.
    """
    final = output / generation.name
    if final.exists():
        raise ValueError(f"{final} exists: move it away, or name another folder")
    generation.verify()
    temporary = output / f".{generation.name}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    zero = temporary / "zero"
    zero.mkdir(parents=True)
    steps = float(generation.record["scalars"]["optimizer_steps"])
    weights = load_file(generation.path(WEIGHTS_NAME))
    kinds = generation.kinds() - {EMA}
    for name, shape in generation.shapes.items():
        states = {kind: torch.empty(torch.Size(shape).numel()) for kind in sorted(kinds)}
        generation.fill([Piece(name, shape, 0, states)])
        for kind, flat in states.items():
            _save(_state(flat.view(shape)), zero / name / f"{'fp32' if kind == WEIGHT else kind}.pt")
        _save(torch.tensor(steps), zero / name / "step.pt")
    for name in weights.keys() - generation.shapes.keys():
        _save(_state(weights[name].float()), zero / name / "fp32.pt")
    # DeepSpeed goes through its groups and these together, and takes over what these hold: nothing. No optimiser has
    # more groups than parameters.
    groups: list[dict[str, Any]] = [{"params": []} for _ in generation.shapes]
    inner = {"state": {0: {"step": torch.tensor(steps)}}, "param_groups": groups}
    common = {"param_groups": groups, "ds_version": _WRITTEN_AS, "optimizer_state_dict": inner}
    _save(common, zero / "optimizer_state.pt")
    _save(_model_states(generation, weights), temporary / "mp_rank_00_model_states.pt")
    _save(_model_states(generation, {}), temporary / "zero_pp_rank_0_mp_rank_00_model_states.pt")  # stage 3's name
    publish(temporary, final)
    with atomic_file(output / "latest_universal") as file:
        file.write(generation.name.encode())
    return final


def _state(tensor: Tensor) -> dict[str, Any]:
    return {"param": tensor, "cat_dim": 0}


def _model_states(generation: Generation, weights: dict[str, Tensor]) -> dict[str, Any]:
    return {
        "module": weights,
        "optimizer": None,
        "lr_scheduler": None,
        "dp_world_size": generation.record["world_size"],
        "mp_world_size": 1,
        "global_steps": generation.record["step"],
        "skipped_steps": 0,
        "ds_version": _WRITTEN_AS,
        "ds_config": {},
        "universal_checkpoint_info": {"universal_checkpoint_version": _UNIVERSAL_VERSION},
    }


def _save(body: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        torch.save(body, file)
        file.flush()
        os.fsync(file.fileno())
