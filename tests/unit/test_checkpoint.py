"""Checkpoint generations: whole under their final name whenever the writer is killed, and damage found by name."""

import itertools
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pipeline import checkpoint as ckpt
from pipeline.checkpoint import CheckpointConfig, generations, latest_generation, publish_generation, verify_generation
from pipeline.checkpoint.generations import Found, clean, superfluous


@pytest.fixture(autouse=True)
def no_disk_is_waited_for(monkeypatch):
    """No power is cut here; that fsync is called is for test_checkpoint_kill.py, which sees the system calls."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: os.fstat(descriptor))


class Killed(BaseException):
    """As SIGKILL: nothing that runs on an ordinary error runs."""


def build(run: Path, step: int, number: int = 0, score: float | None = None) -> Path:
    """A generation in its temporary folder, as the writer leaves it."""
    folder = ckpt.temporary_folder(run, step)
    (folder / "state").mkdir(parents=True)
    (folder / "state" / "part.bin").write_bytes(b"state %d" % step)
    (folder / "model.safetensors").write_bytes(b"weights %d" % step)
    ckpt.write_json(folder / ckpt.CONFIG_NAME, {"step": step})
    if number:
        ckpt.write_json(folder / ckpt.PROGRESS_NAME, {"generation": number, "score": score})
    return folder


def publish(run: Path, step: int, keep: int = 2, number: int = 0, score: float | None = None, keep_best: int = 0):
    build(run, step, number, score)
    return publish_generation(run, step, keep, keep_best)


def names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def check_whole(run: Path, step: int) -> None:
    latest = latest_generation(run)
    assert latest is not None and latest.name == ckpt.generation_name(step)
    verify_generation(latest)
    assert json.loads((latest / ckpt.CONFIG_NAME).read_text()) == {"step": step}


def test_a_generation_is_published_whole(tmp_path):
    final = publish(tmp_path, 7)
    assert final == tmp_path / "checkpoints" / "step-00000007"
    assert names(tmp_path) == ["latest", "step-00000007"]
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step-00000007\n"
    check_whole(tmp_path, 7)
    listed = [line.split("  ")[1] for line in (final / "SHA256SUMS").read_text().splitlines()]
    assert listed == ["config.json", "model.safetensors", "state/part.bin"]


def test_older_generations_are_removed_but_for_keep(tmp_path):
    for step in (1, 2, 3, 10):
        publish(tmp_path, step, keep=2)
    assert names(tmp_path) == ["latest", "step-00000003", "step-00000010"]
    publish(tmp_path, 11, keep=1)
    assert names(tmp_path) == ["latest", "step-00000011"]
    check_whole(tmp_path, 11)


def test_the_best_stay_too(tmp_path):
    for number, (step, score) in enumerate([(1, 0.3), (2, 0.9), (3, 0.5), (4, None), (5, 0.4), (6, 0.1)], 1):
        publish(tmp_path, step, 1, number, score, keep_best=2)
    assert names(tmp_path) == ["latest", "step-00000002", "step-00000003", "step-00000006"]


def test_what_is_removed_is_decided_by_age_and_score_alone():
    found = [
        Found(n, step, f"step-{step:08d}", score) for n, step, score in [(1, 10, 0.5), (2, 20, 0.5), (3, 15, None)]
    ]
    gone = [names for keep in (1, 2, 3) for names in [superfluous(found, "step-00000015", keep, 0)]]
    assert gone == [["step-00000010", "step-00000020"], ["step-00000010"], []]
    assert superfluous(found, "step-00000015", 1, 1) == ["step-00000010"]  # of equal scores the newer
    assert superfluous(found, "step-00000010", 1, 0) == ["step-00000020"]  # never what is latest


def test_the_same_step_again_takes_the_place_of_the_first(tmp_path):
    publish(tmp_path, 1)
    publish(tmp_path, 2)
    folder = build(tmp_path, 2)
    (folder / "model.safetensors").write_bytes(b"other weights")
    final = publish_generation(tmp_path, 2, 2)
    assert (final / "model.safetensors").read_bytes() == b"other weights"
    check_whole(tmp_path, 2)
    assert names(tmp_path) == ["latest", "step-00000001", "step-00000002"]


def test_an_earlier_step_than_a_leftover_is_not_removed(tmp_path):
    """A run resumed from before: what it saves is the latest, though a later step's folder lies beside it."""
    for number, (step, keep) in enumerate([(100, 2), (200, 2), (150, 1)], 1):
        publish(tmp_path, step, keep, number)
    check_whole(tmp_path, 150)
    assert names(tmp_path) == ["latest", "step-00000150"]


def test_nothing_is_latest_before_the_first(tmp_path):
    assert latest_generation(tmp_path) is None
    build(tmp_path, 1)
    assert latest_generation(tmp_path) is None
    (tmp_path / "checkpoints" / "step-00000005").mkdir()  # has no sums: it was never finished
    assert latest_generation(tmp_path) is None


CALLS = [(generations, "publish"), (os, "replace"), (os, "fsync"), (shutil, "rmtree")]


def dying(function: Callable, countdown: Iterator[int]) -> Callable:
    """The function, but the call at which the common countdown reaches 1 never begins."""

    def call(*args, **kwargs):
        if next(countdown) == 1:
            raise Killed
        return function(*args, **kwargs)

    return call


@pytest.mark.parametrize("again", ["new step", "same step again", "the only one again"])
@pytest.mark.parametrize("keep", [1, 2])
def test_killed_at_any_call_the_latest_is_whole(tmp_path, monkeypatch, keep, again):
    """Publishing step 3 after 1 and 2 is cut off before each call that changes the disk, one after another."""
    legitimate = {"new step": (2, 3), "same step again": (2, 3), "the only one again": (3,)}[again]
    for dies_at in range(1, 100):
        run = tmp_path / str(dies_at)
        if again != "the only one again":
            for step in (1, 2):
                publish(run, step, keep=2)
        if again != "new step":  # step 3 was published before, but the run resumed from an earlier one
            publish(run, 3, keep=3)
            (run / "checkpoints" / "latest").write_text("step-00000002\n")
        build(run, 3)
        with monkeypatch.context() as patch:
            countdown = itertools.count(dies_at, -1)
            for module, name in CALLS:
                patch.setattr(module, name, dying(getattr(module, name), countdown))
            try:
                publish_generation(run, 3, keep)
                killed = False
            except Killed:
                killed = True

        for found in (run / "checkpoints").glob("step-*"):
            verify_generation(found)  # nothing half removed under a final name
        clean(run)
        latest = latest_generation(run)
        assert latest is not None
        verify_generation(latest)
        assert int(latest.name[-1]) in legitimate
        assert json.loads((latest / ckpt.CONFIG_NAME).read_text()) == {"step": int(latest.name[-1])}
        assert all(name == "latest" or name.startswith("step-") for name in names(run))
        # The next attempt succeeds, whatever was left behind.
        publish(run, 3, keep)
        check_whole(run, 3)
        if not killed:
            break
    else:
        pytest.fail("publishing never ended")
    assert dies_at > 4  # it was cut off at several places


@pytest.mark.parametrize("again", [False, True], ids=["an older one", "the same step again"])
def test_removing_a_generation_is_never_seen_half_done(tmp_path, monkeypatch, again):
    """Killed in the middle of deleting its files."""
    publish(tmp_path, 1)
    if again:
        publish(tmp_path, 2)
        (tmp_path / "checkpoints" / "latest").write_text("step-00000001\n")

    def dies_halfway(folder, ignore_errors=False):
        if ignore_errors:
            return
        (Path(folder) / "model.safetensors").unlink()
        raise Killed

    monkeypatch.setattr(shutil, "rmtree", dies_halfway)
    with pytest.raises(Killed):
        publish(tmp_path, 2, keep=1)
    monkeypatch.undo()
    for found in (tmp_path / "checkpoints").glob("step-*"):
        verify_generation(found)
    clean(tmp_path)
    assert latest_generation(tmp_path) is not None
    assert not list((tmp_path / "checkpoints").glob(".*"))


@pytest.mark.parametrize("content", [b"", b"\n", b"step-00000099\n", b"../other\n", b"/\n", b"\xff\xfe\n", b"."])
def test_a_pointer_that_names_nothing_falls_back_to_the_newest(tmp_path, content):
    publish(tmp_path, 1)
    publish(tmp_path, 2)
    (tmp_path / "checkpoints" / "latest").write_bytes(content)
    check_whole(tmp_path, 2)
    (tmp_path / "checkpoints" / "latest").unlink()
    check_whole(tmp_path, 2)


def test_killed_between_rename_and_pointer_the_new_one_is_latest(tmp_path):
    publish(tmp_path, 9, number=1)
    publish(tmp_path, 2, number=2)
    (tmp_path / "checkpoints" / "latest").write_text("step-00000009\n")
    check_whole(tmp_path, 2)


def test_without_numbers_the_pointer_says_which_is_latest(tmp_path):
    publish(tmp_path, 1)
    publish(tmp_path, 2)
    (tmp_path / "checkpoints" / "latest").write_text("step-00000001\n")
    check_whole(tmp_path, 1)


@pytest.mark.parametrize("name", ["config.json", "state/part.bin", "model.safetensors"])
def test_damage_is_found_by_name(tmp_path, name):
    generation = publish(tmp_path, 1)
    verify_generation(generation)
    path = generation / name
    data = path.read_bytes()
    for changed in (data[:-1], data + b"x", bytes([data[0] ^ 1]) + data[1:], b""):
        path.write_bytes(changed)
        with pytest.raises(ValueError, match=rf"{name} is damaged.*the one before it"):
            verify_generation(generation)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=rf"{name} is missing"):
        verify_generation(generation)
    verify_generation(generation, lambda other: other != name)


def test_damaged_sums_are_found(tmp_path):
    generation = publish(tmp_path, 1)
    sums = generation / "SHA256SUMS"
    lines = sums.read_text().splitlines(keepends=True)
    for changed in ("", "".join(lines[:-1]), "".join(lines)[:-3], "0" + "".join(lines)[1:], "\0" * 300):
        sums.write_text(changed)
        with pytest.raises((ValueError, FileNotFoundError), match="step-00000001"):
            verify_generation(generation)
    sums.unlink()
    with pytest.raises(FileNotFoundError, match="no finished checkpoint"):
        verify_generation(generation)


def test_a_file_that_is_not_listed_is_refused(tmp_path):
    generation = publish(tmp_path, 1)
    (generation / "state" / "extra.bin").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"state/extra\.bin is not in SHA256SUMS"):
        verify_generation(generation)


def test_sha256sum_reads_the_sums(tmp_path):
    generation = publish(tmp_path, 1)
    subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=generation, check=True)


@pytest.mark.parametrize(
    "options",
    [
        {"every_epochs": 0},
        {"every_steps": 0},
        {"every_minutes": 0.0},
        {"every_minutes": float("nan")},
        {"keep": 0},
        {"keep": -1},
        {"keep_best": -1},
        {"folder": ""},
        {"part_timeout_seconds": 0.0},
    ],
)
def test_out_of_range_options_are_refused_by_name(options):
    (name,) = options
    with pytest.raises(ValueError, match=rf"checkpoint\.{name} is"):
        CheckpointConfig(**options)
