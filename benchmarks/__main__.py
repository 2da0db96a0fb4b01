"""python -m benchmarks QUESTION

loader | noise | draws | train | scaling | goodput | cifar | accuracy | audit | shards | report
"""

from __future__ import annotations

import os
import signal
import sys
from importlib import import_module
from typing import NamedTuple

from benchmarks.options import parse_options


class Question(NamedTuple):
    """Imported when it is asked: the smallest GPU environment has not what all of them need."""

    module: str
    options: str
    measure: str
    what: str


_QUESTIONS = {
    "loader": Question(
        "benchmarks.loader",
        "LoaderOptions",
        "measure_loaders",
        "images/s of this project's loaders beside webdataset, FFCV, torchvision, timm, Streaming, LitData and SPDL",
    ),
    "noise": Question(
        "benchmarks.noise",
        "NoiseOptions",
        "measure_noises",
        "elements/s of each noise beside eager torch, torch.compile and a plain copy",
    ),
    "draws": Question(
        "benchmarks.draws",
        "DrawsOptions",
        "measure_draws",
        "whether a billion draws have the distribution that they should, and what they cost",
    ),
    "train": Question(
        "benchmarks.train",
        "TrainOptions",
        "measure_trainer",
        "the trainer's step beside bare loops, resuming, saving; with --device: steps on one GPU beside timm's",
    ),
    "scaling": Question(
        "benchmarks.scaling",
        "ScalingOptions",
        "measure_scaling",
        "weak scaling over the ranks at hand, and projected to 512 GPUs",
    ),
    "goodput": Question(
        "benchmarks.goodput",
        "GoodputOptions",
        "measure_goodput",
        "the share of useful steps in a run whose ranks are killed at random, beside Daly's estimate",
    ),
    "cifar": Question(
        "benchmarks.cifar",
        "CifarOptions",
        "measure_cifar",
        "accuracy on CIFAR-10 with noise and without, from scratch, several seeds",
    ),
    "accuracy": Question(
        "benchmarks.accuracy",
        "AccuracyOptions",
        "measure_accuracy",
        "the paper's tables as a grid on small pictures: per image and transductive, several seeds",
    ),
    "audit": Question(
        "benchmarks.audit",
        "AuditOptions",
        "measure_audit",
        "the audit's nine protocols with the features before the noise kept, beside whole passes",
    ),
    "shards": Question(
        "benchmarks.shards",
        "ShardsOptions",
        "measure_shards",
        "data_prep beside plain writes, webdataset, FFCV's writer and tarfile",
    ),
    "report": Question(
        "benchmarks.report",
        "ReportOptions",
        "write_report",
        "measures nothing: one page, and one of text, of all that was measured; the README's figures",
    ),
}

# `train --device ...`: without what only the trainer needs, for the smallest GPU environment has not that.
_STEPS_ON_ONE_DEVICE = Question("benchmarks.gpu_train", "TrainOptions", "measure_training", "")


def main(arguments: list[str]) -> int:
    """Answers one question; returns the exit status: 0 done, 1 a test has failed, 2 bad input, 130 interrupted."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: python -m benchmarks QUESTION [--help]\n")
        print("\n".join(f"  {name:<8} {question.what}" for name, question in _QUESTIONS.items()))
        return 0 if arguments else 2
    if arguments[0] not in _QUESTIONS:
        print(f"error: no question {arguments[0]!r}; there are {', '.join(_QUESTIONS)}", file=sys.stderr)
        return 2
    # A scheduler's SIGTERM unwinds as an error does, so that temporary shards go.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        return _answer(arguments[0], arguments[1:])
    except KeyboardInterrupt:
        print("interrupted: what was not whole was not written", file=sys.stderr)
        return 130
    except (ValueError, OSError, ModuleNotFoundError) as error:
        if os.environ.get("NOISYNN_TRACEBACK") == "1":
            raise
        mend = "; `make setup` installs it" if isinstance(error, ModuleNotFoundError) else ""
        print(f"error: {error}{mend}", file=sys.stderr)
        return 2


def _answer(name: str, arguments: list[str]) -> int:
    on_one_device = name == "train" and any(word.partition("=")[0] == "--device" for word in arguments)
    question = _STEPS_ON_ONE_DEVICE if on_one_device else _QUESTIONS[name]
    module = import_module(question.module)
    options = parse_options(getattr(module, question.options), f"python -m benchmarks {name}", arguments)
    rows = getattr(module, question.measure)(options, ["-m", "benchmarks", name, *arguments])
    return int(any(getattr(row, "passed", True) is False for row in rows))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
