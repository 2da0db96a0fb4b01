"""A loader process that dies ends the iteration, naming the sample that it had; and it ends with its trainer."""

import errno
import itertools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from small_shards import tars

from pipeline.data import processes, reader
from pipeline.data.augment import AugmentConfig, apply_colours
from pipeline.data.loader import TrainLoader
from pipeline.data.order import Layout

AUGMENT = AugmentConfig(randaugment="rand-m9-n2")  # Python's own work: processes do it
FATAL = 13
REPOSITORY = Path(__file__).resolve().parents[2]


def dying(split, monkeypatch, death) -> TrainLoader:
    """A loader whose process meets `death` at sample 13."""

    def fatal(picture, sample_id, *rest):
        if sample_id == FATAL:
            death()
        return apply_colours(picture, sample_id, *rest)

    monkeypatch.setattr(reader, "apply_colours", fatal)
    return TrainLoader(tars(split, AUGMENT), Layout(0, 1, 4, 1), 5, workers=2)


@pytest.mark.parametrize(
    "death",
    [lambda: os.kill(os.getpid(), signal.SIGKILL), lambda: os._exit(3)],
    ids=["kill -9", "exit"],
)
def test_its_sample_and_shard_are_named_within_10_seconds(split_copy, monkeypatch, death):
    loader = dying(split_copy, monkeypatch, death)
    start = time.monotonic()
    with pytest.raises(ChildProcessError) as error:
        list(loader)
    assert time.monotonic() - start < 10  # how long a run may go on without it
    message = str(error.value)
    assert "sample 13 (" in message and "train-000001.tar, picture 6" in message, message
    assert ("was killed by SIGKILL while" in message) != ("ended with status 3 while" in message)
    assert "which goes on" in message


def test_one_that_lives_is_not_blamed(split_copy, monkeypatch):
    """The other process, too, has noted a sample."""
    loader = dying(split_copy, monkeypatch, lambda: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(ChildProcessError) as error:
        list(loader)
    assert str(error.value).count("sample ") == 1


def test_an_error_of_python_s_own_is_itself(split_copy, monkeypatch):
    """No death: the process lives and says what is wrong."""
    path = split_copy.parent / "train-000001.tar"
    data = path.read_bytes()
    path.write_bytes(b"\xff" * len(data))
    loader = TrainLoader(tars(split_copy, AUGMENT), Layout(0, 1, 4, 1), 5, workers=2)
    with pytest.raises(ValueError, match=r"sample \d+ .*train-000001\.tar.*CRC"):
        list(loader)


def test_a_reader_s_threads_are_its_process_s_own(split_copy):
    """Used here first, then by forked processes, then here again."""
    pictures = tars(split_copy)
    ids = np.arange(8)
    expected = pictures.batch(ids, 0)
    pictures.threaded = False
    loader = TrainLoader(pictures, Layout(0, 1, 8, 1), 5, workers=2)
    assert [len(batch.labels) for batch in loader] == [8, 8, 8]
    loader.close()
    assert pictures.batch(ids, 0).images.equal(expected.images)
    pictures.close()
    assert pictures.batch(ids, 0).images.equal(expected.images)


def test_an_iteration_that_is_given_up_leaves_nothing_behind(split_copy):
    """Batches that were under way are not taken for the next iteration's."""
    loader = TrainLoader(tars(split_copy, AUGMENT), Layout(0, 1, 4, 1), 5, workers=2)
    whole = [batch.sample_ids.tolist() for batch in loader]
    loader.load_state_dict(loader.state_dict() | {"epoch": 0})
    assert next(iter(loader)).sample_ids.tolist() == whole[0]
    loader.load_state_dict(loader.state_dict() | {"epoch": 0, "position": 8})
    assert [batch.sample_ids.tolist() for batch in loader] == whole[2:]


def test_an_interrupt_leaves_no_batch_for_the_next_iteration(split_copy, monkeypatch):
    """Ctrl-C while a result is awaited, in a notebook that goes on with the same loader."""
    loader = TrainLoader(tars(split_copy, AUGMENT), Layout(0, 1, 4, 1), 5, workers=2)
    whole = [batch.sample_ids.tolist() for batch in loader]
    loader.load_state_dict(loader.state_dict() | {"epoch": 0})
    wait, waits = processes.connection.wait, itertools.count()

    def interrupted(*arguments, **options):
        if next(waits) == 2:
            raise KeyboardInterrupt
        return wait(*arguments, **options)

    monkeypatch.setattr(processes.connection, "wait", interrupted)
    batches = iter(loader)
    assert [next(batches).sample_ids.tolist() for _ in range(2)] == whole[:2]
    with pytest.raises(KeyboardInterrupt):
        next(batches)
    assert [batch.sample_ids.tolist() for batch in loader] == whole[2:]
    loader.close()


def test_a_trainer_without_descriptors_is_told_so(split_copy, monkeypatch):
    """What its batches come in cannot be opened: no worker has died, and nobody waits for one that has."""
    loader = TrainLoader(tars(split_copy, AUGMENT), Layout(0, 1, 4, 1), 5, workers=2)
    batches = iter(loader)
    next(batches)
    monkeypatch.setattr(processes.connection.Connection, "recv", too_many_open_files)
    with pytest.raises(OSError, match="Too many open files"):
        next(batches)


def too_many_open_files(pipe):
    raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))


OWNER = """
import os, sys
from pathlib import Path
sys.path.insert(0, "tests/unit")
from small_shards import tars
from pipeline.data.augment import AugmentConfig
from pipeline.data.loader import TrainLoader
from pipeline.data.order import Layout
loaders = [TrainLoader(tars(Path(sys.argv[1]), AugmentConfig(randaugment="rand-m9-n2")), Layout(0, 1, 4, 1), 5, 2)
           for _ in range(2)]
for loader in loaders:
    next(iter(loader))
print(*(process.pid for loader in loaders for process in loader._stream._workers._processes), flush=True)
os.kill(os.getpid(), 9)
"""


def test_workers_end_with_a_trainer_that_is_killed(split_copy):
    """kill -9, which it cannot answer: no process may be left that holds memory, or a GPU's context."""
    done = subprocess.run(
        [sys.executable, "-c", OWNER, str(split_copy)], cwd=REPOSITORY, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    pids = [int(pid) for pid in done.stdout.split()]
    assert len(pids) == 4
    end = time.monotonic() + 10
    while any(psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie" for pid in pids):
        assert time.monotonic() < end, "loader processes outlive their trainer"
        time.sleep(0.05)
