"""``python -m jobs demo``: the whole job on one machine, each command printed before it runs.

Pictures -> shards and .beton -> pretraining over two DeepSpeed ranks -> fine-tuning on other labels -> evaluation per
image and by the transductive protocols -> report.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from jobs.launch import require_printable_text

EVERY_NTH_TO_VAL = 5
GLOBAL_BATCH = 64  # of the demo recipe
LAST_BLOCK = 5  # of the demo recipe's six
GROUP = 10  # pictures a group, as in the official evaluation
_OWN = ("pictures", "shards", "pretrain", "finetune", "labels.json", "results.json", "report.html")


@dataclass(frozen=True)
class DemoOptions:
    """Run every stage on real pictures, in minutes, on two CPU cores: by default on scikit-learn's digits."""

    out: str = "runs/demo"
    """Folder for all results; what an earlier demo left there is replaced."""
    data: str | None = None
    """Your own pictures: a folder with train/<class>/ and val/<class>/, or with <class>/ (each fifth goes to val)."""
    epochs: int = 30
    finetune_epochs: int = 6

    def __post_init__(self) -> None:
        for name in ("epochs", "finetune_epochs"):
            if getattr(self, name) < 2:
                raise ValueError(f"--{name.replace('_', '-')}: {getattr(self, name)}; give 2 or more, one is warm-up")


class CommandFailed(Exception):
    """A stage ended with a status other than 0, and has said why."""

    def __init__(self, status: int) -> None:
        super().__init__(f"status {status}")
        self.status = status


def run_demo(options: DemoOptions) -> int:
    """Runs all stages; returns 0, or the status of the first that failed.

    Raises:
        ValueError, OSError: when the pictures cannot be used; nothing has been replaced then.
    """
    started = time.time()
    require_printable_text("--out", options.out)
    out = Path(options.out)
    source = None if options.data is None else _checked_source(Path(options.data))
    _clear(out)
    try:
        pictures = _digits(out) if source is None else _split(source, out)
        _prepare(pictures, out)
        _train(options, out)
        _evaluate(out)
        _report(out, started)
    except CommandFailed as failure:
        return failure.status
    return 0


def _checked_source(data: Path) -> Path:
    """Looks at one's own pictures before anything is replaced."""
    if not data.is_dir():
        raise ValueError(
            f"--data: {data} is no folder; give one with train/<class>/ and val/<class>/, or with <class>/"
        )
    splits = {"train", "val"} & {path.name for path in data.iterdir() if path.is_dir()}
    if len(splits) == 1:
        raise ValueError(f"--data: {data} has {splits.pop()}/ alone; give both train/ and val/, or class folders alone")
    found = _by_class(data / "train" if splits else data)
    if not found:
        raise ValueError(f"--data: {data} has no class folders; give <class>/<pictures>")
    for name, paths in found.items():
        if len(paths) < 2 and not splits:
            raise ValueError(f"--data: class {data / name} has {len(paths)} pictures; give at least 2, one is for val")
    training = sum(len(paths) - (0 if splits else len(paths[1::EVERY_NTH_TO_VAL])) for paths in found.values())
    if training < GLOBAL_BATCH:
        raise ValueError(f"--data: {data} has {training} pictures to train on; the demo's batch needs {GLOBAL_BATCH}")
    return data


def _by_class(folder: Path) -> dict[str, list[Path]]:
    """Every file of each class but hidden ones; what is no picture is refused by data_prep, by name."""
    classes = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    files = {c.name: sorted(p for p in c.rglob("*") if p.is_file() and not p.name.startswith(".")) for c in classes}
    return files


def _clear(out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    for path in [out / name for name in _OWN] + list(out.glob("evaluate_*.json")):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _digits(out: Path) -> Path:
    _run("data_prep", "digits", "--out", str(out / "pictures"))
    return out / "pictures"


def _split(source: Path, out: Path) -> Path:
    """The folder itself where it has both splits; else links to its files, each fifth of a class in val."""
    if (source / "train").is_dir():
        return source
    for paths in _by_class(source).values():
        for number, path in enumerate(paths):
            split = "val" if number % EVERY_NTH_TO_VAL == 1 else "train"
            link = out / "pictures" / split / path.relative_to(source)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(path.resolve())
    return out / "pictures"


def _prepare(pictures: Path, out: Path) -> None:
    shards = out / "shards"
    for split in ("train", "val"):
        where = ("--source", str(pictures / split), "--split", split, "--out", str(shards))
        order = ("--keep-order",) if split == "val" else ()
        _run("data_prep", "shard", *where, "--samples-per-shard", "256", *order)
        _run("data_prep", "beton", str(_manifest(out, split)))
        _run("data_prep", "verify", str(_manifest(out, split)))
    classes = json.loads(_manifest(out, "train").read_text())["classes"]
    labels = {name: ("even", "odd")[number % 2] for number, name in enumerate(classes)}
    (out / "labels.json").write_text(json.dumps(labels, indent=1) + "\n")


def _train(options: DemoOptions, out: Path) -> None:
    data = ("--data.train", str(_manifest(out, "train")), "--data.val", str(_manifest(out, "val")))
    run = ("--run", str(out / "pretrain"), "--epochs", str(options.epochs))
    _run("pipeline", "train", "demo", *run, *data)
    run = ("--run", str(out / "finetune"), "--epochs", str(options.finetune_epochs))
    labels = ("--data.format", "ffcv", "--data.label-map", str(out / "labels.json"))
    start = ("--model.init-from", str(out / "pretrain"), "--model.new-head")
    rate = ("--optim.lr", "3e-4", "--optim.warmup-epochs", "1")
    noise = ("--noise.kind", "circular_shift", "--noise.strength", "0.3", "--noise.group-size", "4")
    site = ("--noise.site", f"blocks.{LAST_BLOCK}.attn")
    _run("pipeline", "train", "demo", *run, *data, *labels, *start, *rate, *noise, *site)


def _evaluate(out: Path) -> None:
    noise = ("--noise.kind", "optimal_q", "--noise.group-size", str(GROUP))
    common = ("--checkpoint", str(out / "pretrain"), "--data", str(_manifest(out, "val")), *noise)
    last = ("--noise.site", f"blocks.{LAST_BLOCK}", "--noise.no-spare-prefix-tokens")
    _run("pipeline", "evaluate", *common, *last, "--output", str(out / "evaluate_last_block.json"))
    official = ("--noise.site", f"blocks.{LAST_BLOCK}.attn")
    _run("pipeline", "evaluate", *common, *official, "--output", str(out / "evaluate_official_place.json"))


def _report(out: Path, started: float) -> None:
    runs = ("--pretrain", str(out / "pretrain"), "--finetune", str(out / "finetune"))
    last = ("--last-block", str(out / "evaluate_last_block.json"))
    official = ("--official-place", str(out / "evaluate_official_place.json"))
    _run("pipeline", "report", "--out", str(out), *runs, *last, *official, "--started", f"{started:.0f}")


def _manifest(out: Path, split: str) -> Path:
    return out / "shards" / f"{split}.manifest.json"


def _run(package: str, *arguments: str) -> None:
    """Prints and runs `python -m package arguments`; a user can repeat any line by hand."""
    print(f"\n$ python -m {package} {shlex.join(arguments)}", flush=True)
    # The demo is a CPU's job: on a machine with one GPU its two ranks could not start.
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    status = subprocess.run([sys.executable, "-m", package, *arguments], env=environment, check=False).returncode
    if status:
        print(f"error: the demo stopped at this command: python -m {package} {shlex.join(arguments)}", file=sys.stderr)
        raise CommandFailed(status if status > 0 else 128 - status)
