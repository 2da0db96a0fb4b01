"""A save is killed at its system calls and at random times: what stands is one of the two legitimate states."""

import random
import re
import shutil
import time
from pathlib import Path

import pytest
from checkpoint_states import assert_holds, even, save_all, whole_state, writers_of
from kill_saves import CALLS, Server

from pipeline.checkpoint import CheckpointConfig, newest_whole, verify_generation

KEEP = 2


@pytest.fixture(autouse=True)
def the_checks_wait_for_no_disk(monkeypatch):
    """In this process; the saves that are killed are made in another one."""
    monkeypatch.setattr("os.fsync", lambda descriptor: None)


@pytest.fixture(scope="module")
def server():
    with Server() as server:
        yield server


@pytest.fixture(scope="module")
def template(tmp_path_factory) -> Path:
    """A run of two generations, of which the third save removes one."""
    run = tmp_path_factory.mktemp("template") / "run"
    for step in (1, 2):
        assert save_all(writers_of(run, 2, keep=KEEP), step, even(whole_state(step), 2)) == []
    return run


def check(run: Path, finished: bool) -> None:
    """Of a run whose third save was killed, and then of its next one."""
    place = run / "checkpoints"
    for folder in place.glob("step-*"):
        verify_generation(folder)
    told: list[str] = []
    generation = newest_whole(run, CheckpointConfig(keep=KEEP), told.append)
    assert told == [] and generation is not None
    step = generation.record["step"]
    assert step == 3 if finished else step in (2, 3)
    (pieces,) = even(whole_state(0), 1)
    generation.fill(pieces)
    assert_holds(pieces, whole_state(step))
    assert save_all(writers_of(run, 2, keep=KEEP), 4, even(whole_state(4), 2)) == []
    assert {path.name for path in place.iterdir()} == {"latest", generation.name, "step-00000004"}


def points(server: Server, template: Path, folder: Path) -> list[tuple[str, int]]:
    """(call, n): the n-th of its kind in some thread of a save."""
    counts = server.calls(Path(shutil.copytree(template, folder / "counted")), 3, KEEP, folder / "log")
    most = {name: max((n for (_, call), n in counts.items() if call == name), default=0) for name in CALLS}
    assert all(most[name] for name in ("write", "fsync", "rename", "mkdir", "unlink", "unlinkat", "rmdir")), most
    return [(name, n) for name in CALLS for n in range(1, most[name] + 1)]


def kill_at(server: Server, template: Path, run: Path, call: str, n: int) -> int:
    shutil.copytree(template, run)
    # Each thread counts for itself; the call is not made.
    status = server.save(run, 3, KEEP, ["-e", f"trace={call}", "-e", f"inject={call}:signal=KILL:when={n}"])
    assert status in (0, -9)
    check(run, finished=status == 0)
    shutil.rmtree(run)
    return status


def test_killed_at_system_calls(server, template, tmp_path):
    every = points(server, template, tmp_path)
    opening = [point for point in every if point[0] == "openat"]  # they would be half of all
    others = [point for point in every if point[0] != "openat"]
    chosen = random.Random(0).sample(others, 25) + random.Random(0).sample(opening, 5)
    killed = [kill_at(server, template, tmp_path / f"{call}-{n}", call, n) for call, n in chosen].count(-9)
    assert killed >= 28  # threads share the calls out a little differently each time


def test_all_is_on_the_disk_before_it_has_its_name(server, template, tmp_path):
    """fsync of each file, then of the folders, then the rename, then fsync of the folder that holds the new name."""
    run, log = Path(shutil.copytree(template, tmp_path / "run")), tmp_path / "log"
    assert server.save(run, 3, KEEP, ["-y", "-e", "trace=fsync,rename", "-o", str(log)]) == 0
    place = run / "checkpoints"
    final, temporary = place / "step-00000003", place / ".step-00000003.1.tmp"
    lines = log.read_text().splitlines()
    (renamed,) = (n for n, line in enumerate(lines) if f'rename("{temporary}", "{final}")' in line)
    before, after = (re.findall(r"fsync\(\d+<([^>]*)>", "\n".join(part)) for part in (lines[:renamed], lines[renamed:]))
    files = {str(path.relative_to(final)) for path in final.rglob("*") if path.name != "SHA256SUMS"}
    assert "state" in files and len(files) == 7
    assert {str(temporary / name) for name in files} | {str(temporary)} <= set(before)
    assert any(path.startswith(f"{temporary}/.SHA256SUMS.") for path in before)
    assert after[0] == str(place)  # before the pointer moves


@pytest.mark.soak
def test_killed_at_every_system_call(server, template, tmp_path):
    for call, n in points(server, template, tmp_path):
        kill_at(server, template, tmp_path / f"{call}-{n}", call, n)


def kill_in_time(server: Server, template: Path, folder: Path, count: int) -> list[int]:
    runs = [Path(shutil.copytree(template, folder / str(number))) for number in range(count + 1)]
    begin = time.perf_counter()
    assert server.save(runs[0], 3, KEEP) == 0
    took, draw = time.perf_counter() - begin, random.Random(1)
    statuses = []
    for run in runs[1:]:
        statuses.append(server.save(run, 3, KEEP, kill_after=draw.uniform(0.001, took)))
        check(run, finished=statuses[-1] == 0)
    return statuses


def test_killed_at_random_times(server, template, tmp_path):
    assert -9 in kill_in_time(server, template, tmp_path, 8)


@pytest.mark.soak
def test_killed_at_many_random_times(server, template, tmp_path):
    assert kill_in_time(server, template, tmp_path, 200).count(-9) > 50
