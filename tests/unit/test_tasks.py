"""A split written by many tasks, on any scheduler's word, is the split that one command writes."""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from source_pictures import check, contents, picture, shard_source

from data_prep.finalize import FinalizeOptions, finalize
from data_prep.plan import task_of
from data_prep.tasks import Task, task_from


def finish(out: Path):
    return finalize(FinalizeOptions(out=out, split="train"))


# ---- which task this is ----

ARRAY = {"SLURM_ARRAY_TASK_MIN": "1", "SLURM_ARRAY_TASK_MAX": "4", "SLURM_ARRAY_TASK_COUNT": "4"}


@pytest.mark.parametrize(
    ("index", "count", "environment", "task"),
    [
        (None, None, {}, (0, 1)),
        (None, 1, {}, (0, 1)),
        (2, 5, {}, (2, 5)),
        (None, None, ARRAY | {"SLURM_ARRAY_TASK_ID": "1"}, (0, 4)),
        (None, None, ARRAY | {"SLURM_ARRAY_TASK_ID": "4"}, (3, 4)),
        (0, 7, ARRAY | {"SLURM_ARRAY_TASK_ID": "4"}, (0, 7)),  # what is said counts more than what is found
        # `sbatch --array=3,7` after two of ten failed
        (
            None,
            10,
            {
                "SLURM_ARRAY_TASK_MIN": "3",
                "SLURM_ARRAY_TASK_MAX": "7",
                "SLURM_ARRAY_TASK_COUNT": "2",
                "SLURM_ARRAY_TASK_ID": "7",
            },
            (7, 10),
        ),
        (None, 3, {"JOB_COMPLETION_INDEX": "2"}, (2, 3)),
    ],
)
def test_the_task_is_found(index, count, environment, task):
    assert task_from(index, count, environment) == Task(*task)


@pytest.mark.parametrize(
    ("index", "count", "environment", "words"),
    [
        (3, None, {}, "--num-tasks"),
        (None, 3, {}, "--task"),
        (3, 3, {}, "task 3 is none of 3"),
        (-1, 3, {}, "task -1"),
        (0, 0, {}, "--num-tasks 0"),
        (None, None, {"JOB_COMPLETION_INDEX": "2"}, "--num-tasks"),
        (None, 2, {"JOB_COMPLETION_INDEX": "2"}, "task 2 is none of 2"),
        (None, None, ARRAY | {"SLURM_ARRAY_TASK_ID": "x"}, "SLURM_ARRAY_TASK_ID"),
        (None, None, {"SLURM_ARRAY_TASK_ID": "1"}, "SLURM_ARRAY_TASK_MIN"),
        (None, None, ARRAY | {"SLURM_ARRAY_TASK_COUNT": "2", "SLURM_ARRAY_TASK_ID": "4"}, "--num-tasks"),
    ],
)
def test_what_does_not_tell_enough_is_refused(index, count, environment, words):
    with pytest.raises(ValueError, match=words):
        task_from(index, count, environment)


def test_shards_are_dealt_out_evenly():
    for shards, tasks in ((1282, 1000), (5, 8), (7, 1)):
        owners = [task_of(number, tasks) for number in range(shards)]
        counts = [owners.count(task) for task in range(tasks)]
        assert sum(counts) == shards and max(counts) - min(counts) <= 1


# ---- the same split ----


@pytest.mark.parametrize("tasks", [1, 2, 3, 9])
def test_any_number_of_tasks_in_any_order_gives_the_same_bytes(source, shards, tmp_path, tasks):
    out = tmp_path / "out"
    for task in reversed(range(tasks)):
        done = shard_source(source, out, task=task, num_tasks=tasks)
        if tasks > 1:
            assert done == Task(task, tasks)
            assert not (out / "train.manifest.json").exists()
    finish(out)
    assert contents(out) == contents(shards)
    assert check(out) == []


def test_tasks_at_once_and_twice_do_no_harm(source, shards, tmp_path):
    with ThreadPoolExecutor(6) as pool:
        list(pool.map(lambda i: shard_source(source, tmp_path, task=i % 3, num_tasks=3), range(6)))
    finish(tmp_path)
    assert contents(tmp_path) == contents(shards)


def test_two_whole_jobs_on_one_target_do_no_harm(source, shards, tmp_path):
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda _: shard_source(source, tmp_path), range(2)))
    assert contents(tmp_path) == contents(shards)


def test_gaps_are_refused_by_name(source, shards, tmp_path):
    with pytest.raises(ValueError, match=r"no plan of 'train'.*run `shard`"):
        finish(tmp_path)
    shard_source(source, tmp_path, task=1, num_tasks=3)
    with pytest.raises(ValueError, match=r"3 of 4 shards.*train-000000.tar, train-000002.tar, train-000003.tar"):
        finish(tmp_path)
    for task in (0, 2):
        shard_source(source, tmp_path, task=task, num_tasks=3)
    for name, spoil in (
        ("train-000002.tar", Path.unlink),
        ("train-000002.tar", lambda path: path.write_bytes(path.read_bytes()[:-1])),
        ("train-000002.idx", Path.unlink),
        ("train-000002.idx", lambda path: path.write_bytes(path.read_bytes()[:-1] + b"x")),
        (".train.parts/train-000002.tar.json", Path.unlink),
        (".train.parts/train-000002.tar.json", lambda path: path.write_text(path.read_text()[:-9])),
    ):
        path = tmp_path / name
        good = path.read_bytes()
        spoil(path)
        with pytest.raises(ValueError, match=r"1 of 4 shards.*\(train-000002.tar\)"):
            finish(tmp_path)
        assert not (tmp_path / "train.manifest.json").exists()
        path.write_bytes(good)
    finish(tmp_path)
    assert contents(tmp_path) == contents(shards)


def test_a_task_with_another_plan_is_refused(source, tmp_path):
    shard_source(source, tmp_path / "out", task=0, num_tasks=2)
    before = contents(tmp_path / "out")
    with pytest.raises(ValueError, match="seed 0 -> 1"):
        shard_source(source, tmp_path / "out", task=1, num_tasks=2, seed=1)
    mine = Path(shutil.copytree(source, tmp_path / "mine"))
    picture(77).save(mine / "bee" / "more.JPEG", "JPEG")
    with pytest.raises(ValueError, match="another source"):
        shard_source(mine, tmp_path / "out", task=1, num_tasks=2)
    assert contents(tmp_path / "out") == before


def test_what_skipping_left_out_is_joined_too(source, tmp_path):
    mine = Path(shutil.copytree(source, tmp_path / "mine"))
    (mine / "cat" / "3.JPEG").write_bytes(b"no picture")
    for task in (0, 1):
        shard_source(mine, tmp_path / "out", task=task, num_tasks=2, on_error="skip")
    manifest = finish(tmp_path / "out")
    assert [(note.key, note.path, note.reason) for note in manifest.skipped] == [
        ("cat_3", "cat/3.JPEG", "is not a picture")
    ]
    assert manifest.class_counts == (8, 8, 7)


def test_a_redone_shard_takes_the_manifest_away_until_all_is_whole(copy, source, shards):
    (copy / "train-000001.tar").write_bytes(b"x")
    shard_source(source, copy, task=0, num_tasks=2)  # which owns shards 0 and 2
    assert (copy / "train.manifest.json").exists()
    shard_source(source, copy, task=1, num_tasks=2)
    assert not (copy / "train.manifest.json").exists()
    assert not (copy / "_info.json").exists()
    finish(copy)
    assert contents(copy) == contents(shards)


def test_a_killed_job_s_leftovers_go_and_a_living_one_s_stay(copy, shards):
    from data_prep.manifest import atomic_file

    (copy / ".train-000000.tar.123-abcdef01.tmp").write_bytes(b"half a shard")
    with atomic_file(copy / "train-000003.tar") as living:
        living.write((copy / "train-000003.tar").read_bytes())
        finish(copy)
        assert [path.name.split(".tar")[0] for path in copy.glob(".*.tmp")] == [".train-000003"]
    assert contents(copy) == contents(shards)


def test_class_names_are_kept(source, tmp_path):
    names = tmp_path / "names.txt"
    names.write_text("ant Ant, a worker\nbee Bee\ncat Cat\ndog Dog\n")
    manifest = shard_source(source, tmp_path / "out", class_names=names)
    assert manifest.class_names == ("Ant, a worker", "Bee", "Cat")
    assert json.loads((tmp_path / "out" / "train.manifest.json").read_text())["class_names"][0] == "Ant, a worker"
    names.write_text("ant Ant\nbee Bee\n")
    with pytest.raises(ValueError, match="cat"):
        shard_source(source, tmp_path / "other", class_names=names)
