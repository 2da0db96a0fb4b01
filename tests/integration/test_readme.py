"""Every command of the README is run, on synthetic twins of what it names."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image
from twins import parquet_files, train_tar, val_twin

REPOSITORY = Path(__file__).parent.parent.parent
BLOCK = re.compile(r"^```bash\n(.*?)^```", re.MULTILINE | re.DOTALL)
PYTHON = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)

# CI runs `make test` itself, and test_demo.py runs what `make demo` does; the other is a server.
RUN_ELSEWHERE = {"make demo", "make test", "tensorboard --logdir runs"}
# A cluster's launches are printed; torchrun and the trainer take two small steps on the CPU.
SMALL = shlex.split("--global-batch 16 --micro-batch 8 --epochs 9 --stop-after-steps 2 --data.workers 0")
SMALL += shlex.split(
    "--model.name vit_tiny_patch16_224 --data.image-size 64 --augment.randaugment None --optim.warmup-samples 16"
)
SMALL += shlex.split("--parallel.strategy ddp")  # a start with DeepSpeed takes longer, and has tests of its own


SMALL_BENCHMARKS = {
    "loader": shlex.split(
        "--batch 4 --workers 0 --image-size 32 --parts epoch plan --contestants webdataset tars restart_tars beton"
    ),
    "noise": ["--megabytes", "1", "--parts", "gaussian", "norm_noise"],  # as in the others, by torch.compile
    "shards": ["--source", "TWIN/data/imagenet/train", "--members", "100"],
    "train": ["--parts", "plan"],  # test_benchmark_train.py has the ranks
    "scaling": ["--step-seconds", "0.06"],
}


def readme_commands() -> list[str]:
    text = (REPOSITORY / "README.md").read_text()
    return [line for block in BLOCK.findall(text) for line in block.splitlines() if line.strip()]


@pytest.fixture(scope="module")
def twin(tmp_path_factory) -> Path:
    """A folder that stands for / in the README's paths: a twin of ImageNet as people have it."""
    root = tmp_path_factory.mktemp("twin")
    random = np.random.RandomState(0)
    for split, count in (("train", 9), ("val", 10)):
        for name in ("n01440764", "n01443537"):
            folder = root / "data/imagenet" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = random.randint(0, 256, (48, 64, 3), np.uint8)
                Image.fromarray(pixels).save(folder / f"{name}_{i}.JPEG", format="JPEG")
    downloads = root / "data/downloads"
    downloads.mkdir()
    train_tar(root / "data/imagenet/train", downloads / "ILSVRC2012_img_train.tar")
    val_twin(root / "data/imagenet/val", downloads)
    (downloads / "LOC_synset_mapping.txt").write_text("n01440764 tench, Tinca tinca\nn01443537 goldfish\n")
    parquet_files(root / "data/imagenet/train", root / "data/hub")
    (root / "data/others").mkdir()
    with webdataset.TarWriter(str(root / "data/others/part-0.tar")) as tar:
        for number, path in enumerate(sorted(root.glob("data/imagenet/val/*/*"))):
            tar.write({"__key__": f"{number:06d}", "jpg": path.read_bytes(), "cls": number % 2})
    return root


@pytest.fixture(scope="module")
def store(twin) -> Iterator[str]:
    """The twin's /data by HTTP."""
    handler = partial(SimpleHTTPRequestHandler, directory=twin / "data")
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def adapted(line: str, root: Path, store: str) -> list[str]:
    """The same command, after `python -m`, with the twin's paths, two ranks instead of eight, and a small run."""
    line = re.sub(r"(?<![\w.])/(data|shared|scratch)/", f"{root}/\\1/", line).replace(
        f"{root}/shared/shards", f"{root}/data/shards"
    )
    line = line.replace("https://store.example", store)
    own = ("runs/", "exported/", "sheet.png", "stats.html")
    words = [str(root / word) if word.startswith(own) else word for word in shlex.split(line)]
    if words[0] == "torchrun":
        words = [word if word != "8" else "2" for word in words[1:]]
        return ["torch.distributed.run", "--standalone", *words, *SMALL]
    assert words[:2] == ["python", "-m"], f"the README has a command that this test does not know: {line}"
    words = words[2:]
    if words[:2] == ["pipeline", "train"]:
        words = [word if word != "8" else "2" for word in words] + SMALL
        words.remove("--resume") if "--resume" in words else None
    if words[:2] == ["pipeline", "entropy"]:
        words[-1] = "2"  # groups of ten would leave one of each class
    if words[:2] == ["jobs", "kubernetes"]:
        words += ["--mount-path", f"{root}/data"]
    if words[:2] == ["pipeline", "audit"]:
        words += ["--ks", "2", "5", "--shuffles", "1"]  # of twenty pictures
    if words == ["benchmarks", "report"]:
        return [*words, "--output", str(root / "report")]
    if words[0] == "benchmarks":
        words += ["--rounds", "1", *(word.replace("TWIN", str(root)) for word in SMALL_BENCHMARKS[words[1]])]
        words += ["--output", str(root / "results.jsonl")]
    return words


def test_every_command_runs(twin, store, warm) -> None:
    commands = readme_commands()
    assert len(commands) > 12 and set(commands) > RUN_ELSEWHERE, "the README's commands are not found"
    for line in commands:
        if line in RUN_ELSEWHERE:
            continue
        words = adapted(line, twin, store)
        if "torch.distributed.run" in words:
            shutil.rmtree(twin / "runs")  # a folder of its own for the second training
        done = warm.run(*words)
        assert done.returncode == 0, f"{line}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
        if "evaluate" in words and "--noise.kind" in words:
            assert "per image" in done.stdout and "transductive" in done.stdout
        if "verify" in words:
            assert "0 faults" in done.stdout
        if "slurm" in words:
            assert done.stdout.startswith("#!/bin/bash") and "#SBATCH --nodes=" in done.stdout


def test_its_python_runs() -> None:
    blocks = PYTHON.findall((REPOSITORY / "README.md").read_text())
    assert blocks
    for code in blocks:
        done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stderr) == (0, ""), f"{code}\n{done.stderr[-2000:]}"
