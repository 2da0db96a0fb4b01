"""Runs plans of faults: `fault_runner.py FOLDER TRAIN_MANIFEST VAL_MANIFEST SEED...`; a JSON line a plan.

Forks the ranks from one process that has imported everything, and acts as torchrun's agent does: when one has ended
with a fault, the others get SIGTERM. So a start costs no ten seconds of imports.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import select
import shutil
import signal
import socket
import sys
import time
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "COLUMNS": "100"}
REPOSITORY = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(REPOSITORY), str(Path(__file__).parent)]

import psutil  # noqa: E402
from fault_plans import DEATHS, HANGS, Plan, Start, plan_of  # noqa: E402

TIMEOUT_SECONDS = 5.0  # of collectives
EXIT_SECONDS = TIMEOUT_SECONDS + 10  # within which every process of a broken start is gone
STRAGGLER_SECONDS = 5.0  # as pipeline.parallel: then a rank that outlives another is killed
GLOBAL_BATCH, EPOCHS, SAVE_EVERY = 32, 2, 3
SHARED_MEMORY = "/dev/shm/"


def options(run: Path, data: list[str], strategy: str) -> list[str]:
    sizes = {"embed-dim": 32, "depth": 2, "num-heads": 2}
    model = [word for name, size in sizes.items() for word in (f"--model.options.{name}", str(size))]
    return [
        *("train", "demo", "--run", str(run), "--data.train", data[0], "--data.val", data[1], "--log-every", "1"),
        *("--epochs", str(EPOCHS), "--global-batch", str(GLOBAL_BATCH), "--micro-batch", "16", "--ledger"),
        *(*model, "--parallel.strategy", strategy, "--optim.warmup-epochs", "1"),
        *("--parallel.timeout-seconds", str(TIMEOUT_SECONDS), "--checkpoint.keep", "4"),
        *("--checkpoint.every-steps", str(SAVE_EVERY)),
    ]


class Ranks:
    """The processes of one start."""

    def __init__(self, run: Path, data: list[str], plan: Plan, start: Start, number: int) -> None:
        self.start = start
        self.events, tell = os.pipe()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.pids = {}
        for rank in range(start.world_size):
            pid = os.fork()
            if pid == 0:
                os.close(self.events)
                os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(start.world_size)}
                os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_WORLD_SIZE": "2"}
                os.environ["NOISYNN_LAUNCHER_PID"] = str(os.getppid())
                log = os.open(f"{run}.{number}.{rank}.log", os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o644)
                os.dup2(log, 1), os.dup2(log, 2)
                live(options(run, data, plan.strategy), rank, start, tell)
            self.pids[rank] = pid
        os.close(tell)
        self.statuses: dict[int, int] = {}

    def run(self) -> dict:
        """Until all have ended. Returns statuses, and the seconds from the fault to the last one's end."""
        fault_at = ended_at = None
        said, lines = "", []
        descendants: set[psutil.Process] = set()
        while len(self.statuses) < len(self.pids):
            if select.select([self.events], [], [], 0.02)[0]:
                said += os.read(self.events, 4096).decode()
                *whole, said = said.split("\n")
                lines += [line.split(":") for line in whole]
                if fault_at is None and self.start.fault and any(self._is_here(*line) for line in lines):
                    time.sleep(self.start.delay_seconds)
                    descendants = self._descendants()
                    self._signal()
                    fault_at = time.monotonic()
            self._reap()
            if self.statuses and ended_at is None and any(self.statuses.values()):
                ended_at = time.monotonic()
                fault_at = fault_at or ended_at
                for rank in self._living():
                    self._send(rank, signal.SIGTERM)
            if ended_at is not None and time.monotonic() - ended_at > STRAGGLER_SECONDS:
                for rank in self._living():
                    self._send(rank, signal.SIGKILL)
        os.close(self.events)
        seconds = None if fault_at is None else time.monotonic() - fault_at
        resumed = [int(step) for phase, step, _ in lines if phase == "built"]
        left = [p.pid for p in psutil.wait_procs(descendants, timeout=5)[1]]
        return {"statuses": self.statuses, "seconds": seconds, "resumed": max(resumed, default=None), "left": len(left)}

    def _is_here(self, phase: str, step: str, rank: str) -> bool:
        return phase == self.start.phase and int(step) >= self.start.step and int(rank) == self.start.rank

    def _signal(self) -> None:
        name, _, whom = self.start.fault.partition("_")
        numbers = {"sigterm": signal.SIGTERM, "sigusr1": signal.SIGUSR1, "sigkill": signal.SIGKILL}
        number = (numbers | {"sigstop": signal.SIGSTOP}).get(name)
        for rank in self._living() if whom == "all" else [self.start.rank]:
            if number is not None:
                self._send(rank, number)

    def _send(self, rank: int, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pids[rank], number)

    def _living(self) -> list[int]:
        return [rank for rank in self.pids if rank not in self.statuses]

    def _descendants(self) -> set[psutil.Process]:
        return set(psutil.Process().children(recursive=True))

    def _reap(self) -> None:
        for rank in self._living():
            pid, status = os.waitpid(self.pids[rank], os.WNOHANG)
            if pid:
                self.statuses[rank] = os.waitstatus_to_exitcode(status)


def live(arguments: list[str], rank: int, start: Start, tell: int) -> None:
    """One rank's life: the command, which says where it is, and meets what can only come from inside."""
    from pipeline import __main__ as command
    from pipeline import build as building
    from pipeline import step as stepping
    from pipeline import train as training
    from pipeline.parallel import leave

    def say(phase: str, step: int) -> None:
        os.write(tell, f"{phase}:{step}:{rank}\n".encode())

    def told(module, name: str, phase: str):
        inner = getattr(module, name)

        def outer(run, *rest, **named):
            say(phase, run.step)
            return inner(run, *rest, **named)

        setattr(module, name, outer)

    build = training.build

    def told_build(config, ranks):
        say("build", start.step)
        run = build(config, ranks)
        say("built", run.step)
        return run

    training.build = told_build
    meet_inside(training, stepping, building, rank, start)
    for name, phase in (("train_step", "train"), ("validate", "validate"), ("save", "save")):
        told(training, name, phase)
    leave(command.main(arguments))


def meet_inside(training, stepping, building, rank: int, start: Start) -> None:
    """Faults that no other process can cause."""
    if rank != start.rank and start.fault != "disk_full":
        return
    if start.fault == "sleep_one":
        step = training.train_step

        def asleep(run, *rest):
            if run.step >= start.step:
                time.sleep(3600)
            step(run, *rest)

        training.train_step = asleep
    if start.fault == "nan_one":
        loss_of, seen = stepping.loss_of, []

        def wrong(*arguments):
            seen.append(0)
            return loss_of(*arguments) * (float("nan") if len(seen) == start.step + 1 else 1.0)

        stepping.loss_of = wrong
    if start.fault == "disk_full":
        write, save, full = os.fsync, training.save, []

        def fails(descriptor):
            if full:
                raise OSError(errno.ENOSPC, "No space left on device")
            return write(descriptor)

        def save_fails_once(run, *rest):
            full[:] = [0] if start.step <= run.step < start.step + SAVE_EVERY else []
            save(run, *rest)
            run.writer.wait()
            full.clear()

        os.fsync, training.save = fails, save_fails_once


def held_by_others() -> set[str]:
    """Names in shared memory that a living process has mapped: other programs of this machine."""
    found = set()
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            found |= {line.split(SHARED_MEMORY)[1] for line in maps.read_text().splitlines() if SHARED_MEMORY in line}
    return found


def left_since(before: set[str]) -> set[str]:
    """Names in shared memory that nobody holds; a test beside this one may be about to map or to remove its own."""
    left = set(os.listdir(SHARED_MEMORY)) - before
    for _ in range(5):
        left = (left & set(os.listdir(SHARED_MEMORY))) - held_by_others()
        if not left:
            break
        time.sleep(0.2)
    return left


def damage(run: Path, how: str, draw: random.Random) -> str | None:
    """To one file of the newest generation; returns that one's name."""
    generations = sorted((run / "checkpoints").glob("step-*"))
    if len(generations) < 2:
        return None
    path = draw.choice([p for p in sorted(generations[-1].rglob("*")) if p.is_file() and p.stat().st_size])
    data = bytearray(path.read_bytes())
    if how == "bit_flip":
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    else:
        del data[draw.randrange(len(data)) :]
    path.write_bytes(data)
    return generations[-1].name


def newest(run: Path) -> int:
    names = sorted(p.name for p in (run / "checkpoints").glob("step-*"))
    return int(names[-1].removeprefix("step-")) if names else 0


def expected_ids(data: list[str], steps: int) -> list[list[int]]:
    from pipeline.data.order import Order

    total = json.loads(Path(data[0]).read_text())["num_samples"]
    order, per_epoch = Order(total, 0), total // GLOBAL_BATCH
    return [
        order.ids(step // per_epoch, step % per_epoch * GLOBAL_BATCH, (step % per_epoch + 1) * GLOBAL_BATCH).tolist()
        for step in range(steps)
    ]


def weights(run: Path) -> dict:
    from safetensors.numpy import load_file

    return load_file(max((run / "checkpoints").glob("step-*")) / "model.safetensors")


def carry_out(plan: Plan, folder: Path, data: list[str], steps: int) -> dict:
    """All starts of a plan, and what they cost."""
    from pipeline.ledger import read_ledger

    run, draw = folder / f"plan-{plan.seed}", random.Random(plan.seed)
    shutil.rmtree(run, ignore_errors=True)
    memory = set(os.listdir(SHARED_MEMORY))
    cost = {"plan": plan.to_json(), "starts": [], "generations_lost": 0, "problems": []}
    for number, start in enumerate(plan.starts):
        before, damaged = newest(run), None
        outcome = Ranks(run, data, plan, start, number).run()
        if set(outcome["statuses"].values()) == {0}:
            outcome["skipped_steps"] = json.loads((run / "results.json").read_text())["skipped_steps"]
        cost["starts"].append(outcome)
        judge(cost, outcome, start, before)
        if start.afterwards and any(outcome["statuses"].values()):
            damaged = damage(run, start.afterwards, draw)
        if number + 1 < len(plan.starts):
            cost["awaited"] = newest(run) if damaged is None else None
    ids = [i for step in read_ledger(run).values() for i in step] if (run / "ledger").exists() else []
    expected = [i for step in expected_ids(data, steps) for i in step]
    cost["samples_lost"] = len(expected) - sum(a == b for a, b in zip(ids, expected, strict=False))
    cost["samples_repeated"] = max(0, len(ids) - len(expected))
    cost["shared_memory_left"] = len(left_since(memory))
    cost["temporary_left"] = len(list((run / "checkpoints").glob(".*")))
    cost["results"] = (run / "results.json").exists()
    return cost


def judge(cost: dict, outcome: dict, start: Start, before: int) -> None:
    """One start against what was promised."""
    statuses = set(outcome["statuses"].values())
    awaited = cost.pop("awaited", None)
    if awaited is not None and outcome["resumed"] is not None and outcome["resumed"] != awaited:
        cost["generations_lost"] += 1
    harmless = start.fault in (None, "nan_one", "disk_full")
    if harmless and statuses != {0}:
        cost["problems"].append(f"a start that nothing should end has ended with {outcome['statuses']}")
    if start.fault and start.fault.startswith(("sigterm", "sigusr1")) and 0 in statuses and statuses != {0}:
        cost["problems"].append(f"after a signal some ranks claim to be done: {outcome['statuses']}")
    # After a signal a run ends its step, its build or its save first.
    broken = start.fault in (*HANGS, *DEATHS)
    if broken and outcome["seconds"] > EXIT_SECONDS:
        cost["problems"].append(f"{outcome['seconds']:.1f} s from the fault to the end")
    if outcome["left"]:
        cost["problems"].append(f"{outcome['left']} processes left")


def import_what_ranks_need() -> None:
    """What a start with DeepSpeed imports late, too: six seconds of each rank."""
    import accelerate  # noqa: F401
    import transformers.integrations  # noqa: F401
    from deepspeed.runtime.zero.muon import original_muon  # noqa: F401

    import pipeline.commands  # noqa: F401


def main(folder: Path, data: list[str], seeds: list[int]) -> None:
    import_what_ranks_need()

    steps = EPOCHS * (json.loads(Path(data[0]).read_text())["num_samples"] // GLOBAL_BATCH)
    undisturbed = {}
    for seed in seeds:
        plan = plan_of(seed, steps)
        cost = carry_out(plan, folder, data, steps)
        key = plan.strategy
        if key not in undisturbed:
            quiet = carry_out(Plan(-1, key, (Start(2),)), folder, data, steps)
            assert quiet["results"] and not quiet["problems"], quiet
            undisturbed[key] = weights(folder / "plan--1")
        if cost["results"]:
            own = weights(folder / f"plan-{seed}")
            cost["largest_difference"] = max(float(abs(own[n] - undisturbed[key][n]).max()) for n in own)
        print(json.dumps(cost), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:4], [int(seed) for seed in sys.argv[4:]])
