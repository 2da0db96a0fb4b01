"""DeepSpeed's universal format, read by DeepSpeed itself on two ranks."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from pipeline.checkpoint import CheckpointConfig, CheckpointWriter, export_universal, newest_whole
from pipeline.pieces import Piece

SHAPES = {"stem": (5, 3, 2), "bias": (7,), "head": (4, 9)}
ON_CPU = {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
KINDS = ("weight", "ema", "exp_avg", "exp_avg_sq")


def test_deepspeed_loads_the_same_weights_and_optimizer_state(warm, tmp_path):
    whole = {name: {kind: torch.randn(torch.Size(s).numel()) for kind in KINDS} for name, s in SHAPES.items()}
    writers = [CheckpointWriter(tmp_path / "run", CheckpointConfig(), rank, 3) for rank in range(3)]
    for rank, writer in enumerate(writers):
        pieces = []
        for name, kinds in whole.items():
            start, stop = (len(kinds["weight"]) * r // 3 for r in (rank, rank + 1))
            pieces.append(Piece(name, SHAPES[name], start, {k: flat[start:stop] for k, flat in kinds.items()}))
        record = {"scalars": {"optimizer_steps": 7}}
        writer.save(9, pieces, {"mean": torch.ones(2)}, record, {"config.json": b"{}"})
    for writer in writers:
        assert writer.wait(60) and writer.take_failures() == []
    generation = newest_whole(tmp_path / "run", CheckpointConfig(), print)
    folder = export_universal(generation, tmp_path / "universal")
    assert folder == tmp_path / "universal" / "step-00000009"
    assert sorted(path.name for path in (folder / "zero" / "stem").iterdir()) == [
        "exp_avg.pt",
        "exp_avg_sq.pt",
        "fp32.pt",
        "step.pt",
    ]

    expected = {f"{name}/{kind}": flat for name, kinds in whole.items() for kind, flat in kinds.items()}
    save_file(expected, tmp_path / "expected.safetensors")
    torchrun = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    script = (str(Path(__file__).with_name("load_universal.py")), str(tmp_path / "universal"))
    done = warm.run(*torchrun, *script, str(tmp_path / "expected.safetensors"), json.dumps(SHAPES), **ON_CPU)
    # Not by the exit status: DeepSpeed's own teardown ends some runs in SIGABRT after all work is done.
    told = [line for line in done.stdout.splitlines() if line.startswith("stage ")]
    assert told == [f"stage {stage} holds it" for stage in (1, 2, 3)], done.stderr[-3000:]
