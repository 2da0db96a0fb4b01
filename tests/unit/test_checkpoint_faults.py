"""Disks that are full or flip bits: found, said in one line, and at most one generation back."""

import os
import random
import shutil
import subprocess
from pathlib import Path

import pytest
from checkpoint_states import assert_holds, even, save_all, save_one, whole_state, writers_of

from pipeline.checkpoint import CheckpointConfig, newest_whole

NAMES = (
    "SHA256SUMS",
    "config.json",
    "progress.json",
    "model.safetensors",
    "ema.safetensors",
    "state/rank-00000-of-00002.safetensors",
    "state/rank-00001-of-00002.safetensors",
)


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("two") / "run"
    for step in (1, 2):
        assert save_all(writers_of(run, 2), step, even(whole_state(step), 2)) == []
    return run


def check_one_back(run: Path, name: str) -> None:
    told: list[str] = []
    generation = newest_whole(run, CheckpointConfig(), told.append)
    assert generation is not None and generation.record["step"] == 1
    (pieces,) = even(whole_state(0), 1)
    generation.fill(pieces)
    assert_holds(pieces, whole_state(1))
    (line,) = told
    assert line.startswith("step-00000002 is passed over: ") and "\n" not in line
    assert name == "SHA256SUMS" or name in line


@pytest.mark.parametrize("name", NAMES)
def test_a_flipped_bit_is_found_one_generation_back(two, tmp_path, name):
    draw = random.Random(name)
    for number in range(6):
        run = Path(shutil.copytree(two, tmp_path / str(number)))
        path = run / "checkpoints" / "step-00000002" / name
        data = bytearray(path.read_bytes())
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        path.write_bytes(data)
        check_one_back(run, name)


@pytest.mark.parametrize("name", NAMES)
def test_a_file_that_is_cut_off_or_gone_is_found(two, tmp_path, name):
    size = (two / "checkpoints" / "step-00000002" / name).stat().st_size
    for kept in (0, 1, size // 2, size - 1):
        run = Path(shutil.copytree(two, tmp_path / str(kept)))
        os.truncate(run / "checkpoints" / "step-00000002" / name, kept)
        check_one_back(run, name)
    if name != "SHA256SUMS":  # without it, it was never finished, and there is nothing to say
        run = Path(shutil.copytree(two, tmp_path / "gone"))
        (run / "checkpoints" / "step-00000002" / name).unlink()
        check_one_back(run, name)


def test_a_part_that_is_neither_there_nor_listed_is_found(two, tmp_path):
    run = Path(shutil.copytree(two, tmp_path / "run"))
    folder, name = run / "checkpoints" / "step-00000002", NAMES[-1]
    (folder / name).unlink()
    lines = (folder / "SHA256SUMS").read_text().splitlines(keepends=True)
    (folder / "SHA256SUMS").write_text("".join(line for line in lines if name not in line))
    check_one_back(run, name)


def test_all_damaged_is_refused_with_a_line_each(two, tmp_path):
    run = Path(shutil.copytree(two, tmp_path / "run"))
    for step in (1, 2):
        (run / "checkpoints" / f"step-{step:08d}" / "config.json").write_bytes(b"{}")
    told: list[str] = []
    with pytest.raises(ValueError, match=r"no checkpoint of .* is whole"):
        newest_whole(run, CheckpointConfig(), told.append)
    assert [line.split()[0] for line in told] == ["step-00000002", "step-00000001"]


def test_a_damaged_generation_does_not_crowd_out_a_good_one(two, tmp_path):
    """After a resume from the one before it, the next saves go on, and the newest is always whole."""
    run = Path(shutil.copytree(two, tmp_path / "run"))
    (run / "checkpoints" / "step-00000002" / "config.json").write_bytes(b"{}")
    for step in (2, 3):  # the same step comes again, and takes its place
        save_one(run, step)
        told: list[str] = []
        generation = newest_whole(run, CheckpointConfig(), told.append)
        assert generation is not None and generation.record["step"] == step and told == []


BIG = {"stem": (64, 1024), "head": (32, 1024)}  # 400 kB of weights, as much again twice


@pytest.fixture
def small_disk(tmp_path):
    place = tmp_path / "disk"
    place.mkdir()
    size = ["-o", f"size={4 << 20}"]
    done = subprocess.run(["mount", "-t", "tmpfs", *size, "tmpfs", str(place)], capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip(f"no right to mount a small disk: {done.stderr.strip()}")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_full_disk_is_told_with_its_bytes_and_the_older_checkpoint_stays(small_disk):
    """The disk is full at one place of the save after another: the ranks' parts, the weights, the sums."""
    state = {step: whole_state(step, BIG, ["weight", "exp_avg", "exp_avg_sq"]) for step in (1, 2)}
    run, filler = small_disk / "run", small_disk / "filler"
    writers = writers_of(run, 2)
    assert save_all(writers, 1, even(state[1], 2, BIG)) == []
    free = shutil.disk_usage(small_disk).free
    needed = 4 * (64 + 32) * 1024 * 4  # three states, and the weights once more
    told_by = set()
    for room in [*range(0, needed, needed // 12), needed, needed + 4096, needed + 8192]:
        filler.write_bytes(b"\0" * (free - room))
        lines = save_all(writers, 2, even(state[2], 2, BIG))
        assert lines, f"{room} bytes were enough"
        filler.unlink()
        for line in lines:
            assert "\n" not in line and "; the run goes on, step-00000001 stays whole" in line
            if "No space left on device" in line:
                assert f"(about {needed:,} bytes are needed, " in line and " are free): make room there" in line
            else:
                assert "could not write, and said why" in line
        told_by.add(len(lines))
        assert {path.name for path in (run / "checkpoints").iterdir()} == {"latest", "step-00000001"}
        assert shutil.disk_usage(small_disk).free >= free - 8192
    assert told_by == {1, 2}  # rank 0 alone while it puts the weights together, and ranks that could not write
    generation = newest_whole(run, CheckpointConfig(), pytest.fail)
    (pieces,) = even(whole_state(0, BIG, ["weight", "exp_avg"]), 1, BIG)
    generation.fill(pieces)
    assert_holds(pieces, state[1])
    assert save_all(writers, 2, even(state[2], 2, BIG)) == []
    assert newest_whole(run, CheckpointConfig(), pytest.fail).record["step"] == 2
