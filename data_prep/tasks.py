"""Which of many tasks this process is, as Slurm's arrays and Kubernetes' indexed jobs say it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Task:
    index: int  # from 0
    count: int


def task_from(index: int | None, count: int | None, environment: Mapping[str, str] = os.environ) -> Task:
    """The task named by the options, else by the scheduler's variables, else the only one.

    Errors: ValueError naming the option or variable, where they contradict one another or do not tell enough.
    """
    if index is None:
        scheduled = _scheduled(count, environment)
        if scheduled is None and count not in (None, 1):
            raise ValueError(
                f"--num-tasks {count}: which one is this? Give --task, or start it as a Slurm array or an indexed Job"
            )
        index, count = scheduled or (0, 1)
    if count is None:
        raise ValueError(f"--task {index}: give --num-tasks too")
    if count < 1:
        raise ValueError(f"--num-tasks {count}: must be at least 1")
    if not 0 <= index < count:
        raise ValueError(f"task {index} is none of {count}, which are counted from 0: mend --task or --num-tasks")
    return Task(index, count)


def _scheduled(count: int | None, environment: Mapping[str, str]) -> tuple[int, int] | None:
    if "SLURM_ARRAY_TASK_ID" in environment:
        first, last = _number("SLURM_ARRAY_TASK_MIN", environment), _number("SLURM_ARRAY_TASK_MAX", environment)
        tasks, index = _number("SLURM_ARRAY_TASK_COUNT", environment), _number("SLURM_ARRAY_TASK_ID", environment)
        if count is None and tasks != last - first + 1:
            raise ValueError(
                f"this Slurm array holds {tasks} tasks between {first} and {last}: give --num-tasks, the number of "
                "tasks of the whole array (from 0), so that each knows its shards"
            )
        # Part of an array (`--array=3,7` after two tasks failed) keeps its numbers once the whole is named.
        return (index, count) if count is not None else (index - first, tasks)
    if "JOB_COMPLETION_INDEX" in environment:
        if count is None:
            raise ValueError("JOB_COMPLETION_INDEX is set, but Kubernetes does not tell of how many: give --num-tasks")
        return _number("JOB_COMPLETION_INDEX", environment), count
    return None


def _number(name: str, environment: Mapping[str, str]) -> int:
    try:
        return int(environment[name])
    except (KeyError, ValueError):
        raise ValueError(f"{name} is {environment.get(name)!r}, not a number: give --task and --num-tasks") from None
