"""`python -m pipeline doctor`: what is installed, what works, what to mend. Each check really does the thing."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Level = Literal["ok", "note", "fault"]
_REQUIREMENTS = Path(__file__).parent.parent / "requirements.txt"
_PACKAGES = ("torch", "torchvision", "timm", "accelerate", "deepspeed", "webdataset", "ffcv", "tensorboard", "numpy")
_TIMEOUT_SECONDS = 240


@dataclass(frozen=True)
class Finding:
    """One line of the answer. A `note` says what is missing but not needed; a `fault` comes with its mend."""

    level: Level
    subject: str
    text: str


def doctor_command(arguments: list[str]) -> int:
    """Prints a table; returns 0 where nothing that is needed is broken, else 1."""
    if arguments and arguments[0] in ("-h", "--help"):
        print("usage: python -m pipeline doctor\n\nChecks packages, ranks, backends, compiler, GPU and FFCV.")
        return 0
    if arguments:
        raise ValueError(f"doctor takes no options, not {' '.join(arguments)}")
    checks: list[Callable[[], list[Finding]]] = [
        _python,
        _packages,
        _compilers,
        _gpu,
        _native,
        _loader,
        _ffcv,
        _two_ranks,
    ]
    faults = 0
    for check in checks:
        for finding in check():
            faults += finding.level == "fault"
            print(f"{finding.level:<6} {finding.subject:<18} {finding.text}", flush=True)
    print(f"\n{faults} faults" if faults else "\nEverything that is needed works.")
    return 1 if faults else 0


def _python() -> list[Finding]:
    cores = len(os.sched_getaffinity(0))
    machine = f"{platform.system()} {platform.machine()}"
    return [Finding("ok", "python", f"{platform.python_version()}, {cores} cores, {machine}")]


def _packages() -> list[Finding]:
    """Installed versions against the pins of requirements.txt."""
    pins = {}
    if _REQUIREMENTS.is_file():
        lines = (line.split("#")[0].strip() for line in _REQUIREMENTS.read_text().splitlines())
        pins = dict(line.split("==") for line in lines if "==" in line)
    findings = []
    for name in _PACKAGES:
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            findings.append(Finding("fault", name, "not installed: run `make setup`"))
            continue
        pinned = pins.get(name)
        if pinned and version.split("+")[0] != pinned:
            findings.append(Finding("note", name, f"{version}, while requirements.txt pins {pinned}"))
        else:
            findings.append(Finding("ok", name, version))
    return findings


def _compilers() -> list[Finding]:
    findings = []
    for tool, purpose in (("g++", "builds ffcv and DeepSpeed's operators"), ("nvcc", "builds CUDA kernels")):
        path = shutil.which(tool)
        if path is None:
            level: Level = "fault" if tool == "g++" else "note"
            mend = ": apt-get install g++" if tool == "g++" else ": not needed without a GPU"
            findings.append(Finding(level, tool, f"not found ({purpose}){mend}"))
            continue
        lines = subprocess.run([path, "--version"], capture_output=True, text=True, check=False).stdout.splitlines()
        findings.append(Finding("ok", tool, next((line for line in lines if re.search(r"\d+\.\d+", line)), path)))
    return findings


def _gpu() -> list[Finding]:
    return [_probe("gpu", _GPU_PROBE, "check the driver with nvidia-smi")]


def _native() -> list[Finding]:
    return [_probe("noise kernels", _KERNELS_PROBE, "run `make setup`; until then noise is plain PyTorch, and slow")]


def _loader() -> list[Finding]:
    return [_probe("loader", _LOADER_PROBE, "run `make setup`; until then Pillow reads the pictures, and slowly")]


def _ffcv() -> list[Finding]:
    return [_probe("ffcv", _FFCV_PROBE, "install libopencv-dev libturbojpeg0-dev pkg-config, then `make setup`")]


def _two_ranks() -> list[Finding]:
    """Two real ranks, one ZeRO-1 step, and a sum over both."""
    with tempfile.TemporaryDirectory() as folder:
        probe = Path(folder) / "probe.py"
        probe.write_text(_RANKS_PROBE)
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(probe)]
        return [_run("deepspeed, 2 ranks", command, "read the lines above this one in the log: NOISYNN_TRACEBACK=1")]


def _probe(subject: str, code: str, mend: str) -> Finding:
    return _run(subject, [sys.executable, "-c", code], mend)


def _run(subject: str, command: list[str], mend: str) -> Finding:
    """Runs a probe in a process of its own: a crash of native code is a finding, not the end of the doctor."""
    environment = os.environ | {"PYTHONPATH": str(_REQUIREMENTS.parent), "OMP_NUM_THREADS": "1"}
    if "ranks" in subject:
        environment["CUDA_VISIBLE_DEVICES"] = ""  # two ranks need two GPUs, or none
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, env=environment, timeout=_TIMEOUT_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        return Finding("fault", subject, f"no answer within {_TIMEOUT_SECONDS} s: {mend}")
    answers = [line for line in done.stdout.splitlines() if line.startswith(("ok ", "note "))]
    if answers:
        level, text = answers[-1].split(" ", 1)
        return Finding("ok" if level == "ok" else "note", subject, text)
    if os.environ.get("NOISYNN_TRACEBACK"):
        print(done.stdout, done.stderr, file=sys.stderr)
    last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
    return Finding("fault", subject, f"{last}: {mend}")


_GPU_PROBE = """
import torch
if torch.cuda.is_available():
    x = torch.ones(8, device="cuda")
    assert (x + x).sum().item() == 16
    names = {torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())}
    print("ok", torch.cuda.device_count(), "x", ", ".join(names), "- CUDA", torch.version.cuda)
else:
    print("note none in sight: everything runs on the CPU over gloo")
"""

_KERNELS_PROBE = """
import torch
from pipeline.noise import native, ops
assert native.is_loaded("cpu"), "libnoisynn_cpu.so is not there, or cannot be loaded"
ids, epoch = torch.arange(2), torch.tensor(0)
assert ops.random_words(4, ids, 0, epoch, 0)[0, 0].item() == 0x6627E8D5
where = "CPU and GPU" if native.is_loaded("cuda") else "CPU"
print("ok", where, "- Random123's first known answer is met")
"""

_LOADER_PROBE = """
from pipeline.data import native

library = native.library()
if library is None:
    print("note Pillow alone")
else:
    lanes, entropy = library.nn_loader_lanes().decode(), library.nn_loader_entropy_decoder().decode()
    print("ok by native threads,", lanes, "- entropy decoder:", entropy)
"""

_FFCV_PROBE = """
import logging, pathlib, tempfile
logging.disable(logging.WARNING)
import numpy as np
from ffcv.fields import IntField, RGBImageField
from ffcv.reader import Reader
from ffcv.writer import DatasetWriter
class Pictures:
    def __len__(self): return 4
    def __getitem__(self, i): return np.full((8, 8, 3), 10 * i, np.uint8), i
folder = tempfile.TemporaryDirectory()
path = str(pathlib.Path(folder.name) / "probe.beton")
fields = {"image": RGBImageField(write_mode="raw"), "label": IntField()}
DatasetWriter(path, fields, num_workers=1).from_indexed_dataset(Pictures())
labels = Reader(path).metadata["f1"].reshape(-1).tolist()
assert labels == [0, 1, 2, 3], labels
print("ok writes and reads back a .beton")
"""

_RANKS_PROBE = """
import torch
from pipeline.data.order import layout_of
from pipeline.engine import create_engine
from pipeline.parallel import ParallelConfig, join_ranks, leave, ranks_from_environment
ranks = ranks_from_environment()
device = join_ranks(ranks)
layout = layout_of(4, 2, ranks.rank, ranks.world_size)
model = torch.nn.Linear(3, 2)
config = ParallelConfig(strategy="zero1", precision="fp32")
engine = create_engine(model, torch.optim.AdamW(model.parameters()), config, layout, None, None)
engine.backward(engine.module(torch.ones(2, 3, device=device)).sum(), last=True)
assert engine.step().applied
total = torch.tensor(float(ranks.rank + 1), device=device)
torch.distributed.all_reduce(total)
assert total == 3, total
if ranks.rank == 0:
    backend = torch.distributed.get_backend()
    print(f"ok ZeRO-1 took a step over {backend}; both ranks answered", flush=True)
torch.distributed.barrier()
leave(0)
"""
