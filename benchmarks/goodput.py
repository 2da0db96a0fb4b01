"""Goodput: the share of the time in which a run that is killed again and again does steps that count.

Ranks are killed with SIGKILL at times drawn from an exponential distribution, and the same command is started again, as
a scheduler does. Beside it stands what Daly's model expects of the same figures (J. T. Daly, "A higher order estimate
of the optimum checkpoint interval for restart dumps", 2006), and the interval that Young's formula would choose.
"""

from __future__ import annotations

import json
import math
import random
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness import append_rows, check_output, circumstances_of, print_circumstances, print_table

_POLL_SECONDS = 0.1
_LONGEST_SECONDS = 3600.0


@dataclass(frozen=True)
class GoodputOptions:
    """A recipe trained twice: undisturbed, and with a rank killed now and then."""

    train: Path
    """Manifest of the training split."""
    val: Path
    """Manifest of the validation split."""
    recipe: str = "demo"
    epochs: int = 30
    every_steps: int = 20
    """Steps between two checkpoints."""
    seconds_between_failures: float = 30.0
    """Mean of the exponential distribution."""
    seed: int = 0
    note: str = ""
    output: Path | None = None
    """File that the result is added to; by default benchmarks/results/goodput.jsonl."""

    def __post_init__(self) -> None:
        if not self.seconds_between_failures > 0:
            raise ValueError(f"--seconds-between-failures {self.seconds_between_failures}: above 0")
        if self.every_steps < 1:
            raise ValueError(f"--every-steps {self.every_steps}: at least 1")


@dataclass(frozen=True)
class Goodput:
    """One plan of failures. Seconds of the wall clock."""

    question: str
    part: str
    settings: str
    steps: int
    failures: int
    step_seconds: float  # median, undisturbed
    undisturbed_seconds: float  # from the command to its end
    disturbed_seconds: float
    start_seconds: float  # from a command to its first step
    checkpoint_seconds: float  # that a checkpoint adds to its step
    redone_steps: int
    goodput: float
    expected_goodput: float
    young_interval_seconds: float
    interval_seconds: float

    def to_json(self, circumstances: dict[str, Any]) -> str:
        return json.dumps(asdict(self) | circumstances, ensure_ascii=False)


def expected_goodput(interval: float, checkpoint: float, start: float, between_failures: float) -> float:
    """Useful over all time by Daly's complete model, equation 20. All in seconds.

    interval: of useful work between two checkpoints; checkpoint: what one costs; start: until work begins again.
    """
    lost = between_failures * math.exp(start / between_failures)
    return interval / (lost * math.expm1((interval + checkpoint) / between_failures))


def young_interval(checkpoint: float, between_failures: float) -> float:
    """Seconds between checkpoints that lose least, to first order (J. W. Young, 1974)."""
    return math.sqrt(2 * checkpoint * between_failures)


def measure_goodput(options: GoodputOptions, command: list[str]) -> list[Goodput]:
    path = check_output(options.output, "goodput")
    for manifest in (options.train, options.val):
        if not manifest.is_file():
            raise ValueError(f"{manifest} is no manifest: write one with `python -m data_prep shard`")
    with tempfile.TemporaryDirectory() as folder:
        quiet, killed = (_Run(options, Path(folder) / name) for name in ("quiet", "killed"))
        quiet.until_done(None)
        killed.until_done(random.Random(options.seed))
        result = _result(options, quiet, killed)
    circumstances = circumstances_of(command, options.note)
    append_rows(path, [result.to_json(circumstances)])
    print_table("goodput", ["what", "figure"], [[k, _shown(v)] for k, v in asdict(result).items()])
    print_circumstances(1, circumstances)
    return [result]


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


class _Run:
    """A run folder, and the time that its starts have taken."""

    def __init__(self, options: GoodputOptions, folder: Path) -> None:
        self.folder, self.options = folder, options
        self.seconds, self.failures, self.redone = 0.0, 0, 0
        self.starts: list[float] = []

    def until_done(self, draw: random.Random | None) -> None:
        """Starts the command until it ends by itself. Errors: ChildProcessError where it fails unasked."""
        begin = time.perf_counter()
        while self._start(draw):
            self.failures += 1
            if time.perf_counter() - begin > _LONGEST_SECONDS:
                raise ChildProcessError(f"not done after {_LONGEST_SECONDS:.0f} s: failures come too often for a start")
        self.seconds = time.perf_counter() - begin

    def _start(self, draw: random.Random | None) -> bool:
        """One start; whether it was killed."""
        words = ["train", self.options.recipe, "--run", self.folder, "--epochs", self.options.epochs]
        words += ["--data.train", self.options.train, "--data.val", self.options.val, "--log-every", 1]
        words += ["--checkpoint.every-steps", self.options.every_steps, "--evaluate-every-epochs", 10**6]
        before, begin = self.steps_done(), time.perf_counter()
        dies_at = begin + draw.expovariate(1 / self.options.seconds_between_failures) if draw else math.inf
        running = subprocess.Popen(
            [sys.executable, "-m", "pipeline", *map(str, words)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        began = killed = False
        while running.poll() is None:
            if not began and self.steps_done() != before:
                began = True
                self.starts.append(time.perf_counter() - begin)
            if not killed and time.perf_counter() > dies_at:
                killed = _kill_a_rank(running.pid)
            time.sleep(_POLL_SECONDS)
        if running.returncode and not killed:
            assert running.stderr is not None
            raise ChildProcessError(f"the run failed by itself: {running.stderr.read().decode()[-2000:]}")
        if killed and running.returncode:
            self.redone += self.steps_done() - self.saved_steps()
        return bool(running.returncode)

    def lines(self) -> list[dict[str, Any]]:
        path = self.folder / "metrics.jsonl"
        text = path.read_text() if path.is_file() else ""
        return [line for line in map(_parsed, text.splitlines()) if "train/images_per_second" in line]

    def steps_done(self) -> int:
        lines = self.lines()
        return lines[-1]["step"] if lines else 0

    def saved_steps(self) -> int:
        found = sorted((self.folder / "checkpoints").glob("step-*"))
        return int(found[-1].name.removeprefix("step-")) if found else 0


def _parsed(line: str) -> dict[str, Any]:
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        return {}  # half a line of a killed run


def _kill_a_rank(launcher: int) -> bool:
    import psutil  # only this question needs it

    ranks = psutil.Process(launcher).children()
    if ranks:
        ranks[0].kill()
    else:
        psutil.Process(launcher).kill()
    return True


def _result(options: GoodputOptions, quiet: _Run, killed: _Run) -> Goodput:
    batch = json.loads((quiet.folder / "config.json").read_text())["global_batch"]
    seconds = {line["step"]: batch / line["train/images_per_second"] for line in quiet.lines()}
    step = statistics.median(seconds.values())
    # A checkpoint is taken after its step is logged, so the next one's time holds its cost.
    after = [s for number, s in seconds.items() if (number - 1) % options.every_steps == 0 and number > 1]
    cost = max(0.0, statistics.median(after) - step) if after else 0.0
    start = statistics.median(killed.starts)
    interval = options.every_steps * step
    failing = options.seconds_between_failures
    return Goodput(
        question="goodput",
        part="ranks killed at random",
        settings=f"{options.recipe}, {options.epochs} epochs, seed {options.seed}, a failure each {failing:g} s",
        steps=len(seconds),
        failures=killed.failures,
        step_seconds=step,
        undisturbed_seconds=quiet.seconds,
        disturbed_seconds=killed.seconds,
        start_seconds=start,
        checkpoint_seconds=cost,
        redone_steps=killed.redone,
        goodput=len(seconds) * step / killed.seconds,
        expected_goodput=expected_goodput(interval, cost, start, failing),
        young_interval_seconds=young_interval(cost, failing),
        interval_seconds=interval,
    )
