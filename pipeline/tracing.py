"""torch.profiler's trace of some steps of a run, on request."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import profiler

_WARM_UP_STEPS = 10  # compiling, allocators and caches settle
FOLDER = "profile"


@contextlib.contextmanager
def traced_steps(run: Path, steps: int, rank: int) -> Iterator[Callable[[], None]]:
    """Gives what is to be called after each step. The trace is RUN/profile/rank-00000.json, for chrome://tracing.

    Rank 0 alone is traced, after ten steps of warm-up.
    """
    if not steps or rank:
        yield lambda: None
        return
    activities = [profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(profiler.ProfilerActivity.CUDA)
    folder = run / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    schedule = profiler.schedule(wait=_WARM_UP_STEPS - 1, warmup=1, active=steps, repeat=1)

    def write(trace: profiler.profile) -> None:
        path = folder / f"rank-{rank:05d}.json"
        trace.export_chrome_trace(str(path))
        print(f"trace of {steps} steps: {path}", flush=True)

    with profiler.profile(activities=activities, schedule=schedule, on_trace_ready=write) as trace:
        yield trace.step
