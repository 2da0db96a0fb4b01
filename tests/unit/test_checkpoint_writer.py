"""What is written beside training: the state as it was at the step, or nothing and a line that says why."""

import hashlib
import json
import os
import threading
import time

import pytest
import torch
from checkpoint_states import assert_holds, even, save_all, save_one, whole_state, writers_of

from pipeline.checkpoint import CheckpointConfig, newest_whole
from pipeline.checkpoint.draft import LocalDraft


def newest(run, **config):
    told: list[str] = []
    generation = newest_whole(run, CheckpointConfig(**config), told.append)
    assert told == []
    return generation


def left_over(run) -> list[str]:
    return [path.name for path in (run / "checkpoints").glob(".*")]


def checkpoint_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("checkpoint-")]


@pytest.fixture
def slow_disk(monkeypatch) -> threading.Event:
    """No file is whole before the event is set."""
    go = threading.Event()
    whole = LocalDraft.check
    monkeypatch.setattr(LocalDraft, "check", lambda *args: go.wait(30) and whole(*args))
    return go


def test_what_changes_after_save_is_not_written(tmp_path, slow_disk):
    whole, (writer,) = whole_state(1), writers_of(tmp_path)
    (pieces,) = even(whole, 1)
    record, buffers = {"loader": {"position": 5}}, {"mean": torch.ones(3)}
    writer.save(7, pieces, buffers, record, {})
    for piece in pieces:
        for tensor in piece.tensors.values():
            tensor.fill_(-1)
    record["loader"]["position"] = 6
    buffers["mean"].fill_(9)
    assert not writer.wait(0.05)
    assert newest(tmp_path / "elsewhere") is None
    slow_disk.set()
    assert writer.wait(60) and writer.take_failures() == []
    generation = newest(tmp_path)
    generation.fill(pieces)
    assert_holds(pieces, whole)
    assert generation.record["loader"] == {"position": 5}
    assert torch.equal(generation.buffers()["mean"], torch.ones(3))
    assert writer.last_saved.step == 7 and writer.last_saved.name == generation.name
    assert writer.last_saved.bytes == sum(generation.path(name).stat().st_size for name in generation.sums)
    assert not checkpoint_threads()


def test_a_save_waits_for_the_one_before_it_and_says_how_long(tmp_path, slow_disk):
    (writer,), (pieces,) = writers_of(tmp_path), even(whole_state(1), 1)
    first = writer.save(1, pieces, {}, {}, {})
    threading.Timer(0.2, slow_disk.set).start()
    second = writer.save(2, pieces, {}, {}, {})
    assert first.waited_seconds < 0.1 <= second.waited_seconds < 20
    assert writer.wait(60) and newest(tmp_path).record["step"] == 2


def test_the_buffer_is_made_once(tmp_path):
    (writer,), (pieces,) = writers_of(tmp_path), even(whole_state(1), 1)
    writer.prepare(pieces)
    places = {writer._snapshot.host.data_ptr()}
    for step in (1, 2):
        writer.save(step, pieces, {}, {}, {})
        places.add(writer._snapshot.host.data_ptr())
        assert writer.wait(60)
    assert len(places) == 1


@pytest.mark.parametrize("kind", ["weight", "ema", "exp_avg", "buffer"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_state_that_is_not_finite_never_replaces_a_good_one(tmp_path, kind, value):
    writers = writers_of(tmp_path, 2)
    assert save_all(writers, 1, even(whole_state(1), 2)) == []
    pieces = even(whole_state(2), 2)
    buffers = {"norm.running_var": torch.ones(2)}
    if kind == "buffer":
        buffers["norm.running_var"][1] = value
    else:
        next(p for p in pieces[1] if p.name == "head.weight").tensors[kind][-1] = value
    for writer, own in zip(writers, pieces, strict=True):
        writer.save(2, own, buffers, {}, {})
    for writer in writers:
        assert writer.wait(60)
    lines = [line for writer in writers for line in writer.take_failures()]
    named = "buffer norm.running_var" if kind == "buffer" else f"{kind}/head.weight"
    assert any(f"{named} is not finite" in line for line in lines)
    assert all("\n" not in line and "step-00000001 stays whole" in line for line in lines)
    assert newest(tmp_path).record["step"] == 1
    assert not left_over(tmp_path)
    assert save_all(writers, 3, even(whole_state(3), 2)) == []
    assert newest(tmp_path).record["step"] == 3


def test_a_rank_that_brings_no_part_is_named_after_the_time_limit(tmp_path):
    writers = writers_of(tmp_path, 3, part_timeout_seconds=0.3)
    pieces = even(whole_state(1), 3)
    for rank in (0, 2):
        writers[rank].save(1, pieces[rank], {}, {}, {})
    assert writers[0].wait(30)
    (line,) = writers[0].take_failures()
    assert "no part came from rank 1 in 0 s" in line and "with no checkpoint yet" in line
    assert writers[2].wait(30)
    assert newest(tmp_path) is None
    assert not left_over(tmp_path)


def test_a_rank_that_cannot_write_is_heard(tmp_path, monkeypatch):
    writers = writers_of(tmp_path, 2)
    whole = LocalDraft.check

    def check(draft, name, written, go_on):
        if "rank-00001" in name:
            (draft.folder / name).write_bytes(b"torn")
        whole(draft, name, written, go_on)

    monkeypatch.setattr(LocalDraft, "check", check)
    lines = save_all(writers, 1, even(whole_state(1), 2))
    assert "rank 1 could not write, and said why" in lines[0]
    assert "rank-00001-of-00002.safetensors reads back otherwise than it was written" in lines[1]
    assert newest(tmp_path) is None


def test_a_dead_rank_does_not_keep_the_others_from_ending(tmp_path):
    writers = writers_of(tmp_path, 2)
    begin = time.monotonic()
    writers[0].save(1, even(whole_state(1), 2)[0], {}, {}, {})
    assert not writers[0].wait(0.2)
    writers[0].abandon()
    assert writers[0].wait(10) and time.monotonic() - begin < 5
    (line,) = writers[0].take_failures()
    assert "the run ends, and waited no longer" in line
    assert not left_over(tmp_path) and not checkpoint_threads()
    # The other one comes late, and makes the folder again; the next save is not abandoned, and clears that away.
    writers[1].save(1, even(whole_state(1), 2)[1], {}, {}, {})
    assert writers[1].wait(30) and left_over(tmp_path)
    assert save_all(writers, 2, even(whole_state(1), 2)) == []
    left = left_over(tmp_path)  # before `newest`, which clears away too
    assert newest(tmp_path).record["step"] == 2 and not left


def test_what_goes_wrong_in_any_way_is_told_and_training_goes_on(tmp_path, monkeypatch):
    save_one(tmp_path, 1)
    (writer,) = writers_of(tmp_path)
    monkeypatch.setattr(LocalDraft, "publish", lambda *args: 1 / 0)
    monkeypatch.setattr(LocalDraft, "free_bytes", lambda draft: [][0])  # and when that is to be told
    (line,) = save_all([writer], 2, even(whole_state(2), 1))
    assert "division by zero" in line and "the run goes on" in line


def test_leftovers_of_killed_saves_are_cleared_and_never_taken(tmp_path):
    save_one(tmp_path, 1)
    place = tmp_path / "checkpoints"
    for name in (".step-00000002.1.tmp", ".step-00000000.old"):
        (place / name / "state").mkdir(parents=True)
        (place / name / "state" / "rank-00000-of-00001.safetensors").write_bytes(b"half")
    (place / ".step-00000002.1.tmp" / ".parts").mkdir()
    (place / ".step-00000002.1.tmp" / ".parts" / "rank-00001.json").write_text('{"sha256": "", "bytes": 1}')
    (place / ".latest.123-abc.tmp").write_bytes(b"")
    writers = writers_of(tmp_path, 2, part_timeout_seconds=0.3)
    writers[0].save(2, even(whole_state(2), 2)[0], {}, {}, {})  # the dead save's part of rank 1 does not count
    assert writers[0].wait(30) and "no part came from rank 1" in writers[0].take_failures()[0]
    assert sorted(path.name for path in place.iterdir()) == ["latest", "step-00000001"]


def test_scores_and_numbers_are_recorded_and_the_best_stay(tmp_path):
    (writer,) = writers_of(tmp_path, keep=1, keep_best=1)
    for step, score in [(1, 0.5), (2, 0.75), (3, float("nan")), (4, 0.25)]:
        assert save_all([writer], step, even(whole_state(step), 1), score) == []
    records = {
        p.parent.name: json.loads(p.read_text()) for p in (tmp_path / "checkpoints").glob("step-*/progress.json")
    }
    assert {name: (r["score"], r["generation"]) for name, r in records.items()} == {
        "step-00000002": (0.75, 2),
        "step-00000004": (0.25, 4),
    }


def test_checkpoints_may_lie_elsewhere(tmp_path):
    run, folder = tmp_path / "run", tmp_path / "big disk"
    save_one(run, 1, folder=str(folder))
    save_one(run, 2, folder=str(folder))  # a resume
    assert sorted(path.name for path in folder.iterdir()) == ["latest", "step-00000001", "step-00000002"]
    assert newest(run).record["step"] == 2  # found from the run's folder alone
    other = tmp_path / "other"
    with pytest.raises(ValueError, match=r"checkpoint.folder is .*other, but .*run/checkpoints is there: move it"):
        writers_of(run, folder=str(other))
    assert newest(tmp_path / "new", folder=str(folder)).record["step"] == 2


def test_every_file_is_read_once_to_verify(tmp_path, monkeypatch):
    save_one(tmp_path, 1)
    read: list[str] = []
    digest = hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda file, kind: read.append(file.name) or digest(file, kind))
    generation = newest(tmp_path)
    assert sorted(read) == sorted(str(generation.path(name)) for name in generation.sums)


def test_a_large_part_is_written_in_blocks(tmp_path):
    shapes = {"big": (3, 1 << 20), "small": (1,)}  # 12 MB: several blocks, the last one short
    whole = whole_state(1, shapes, ["weight"])
    assert save_all(writers_of(tmp_path, 2), 1, even(whole, 2, shapes)) == []
    (pieces,) = even(whole_state(2, shapes, ["weight"]), 1, shapes)
    newest(tmp_path).fill(pieces)
    assert_holds(pieces, whole)
    writers = writers_of(tmp_path, 2)
    parts = even(whole, 2, shapes)
    parts[0][0].tensors["weight"][-1] = torch.nan  # of the third block
    lines = save_all(writers, 2, parts)
    assert any("weight/big is not finite" in line for line in lines)
    assert os.listdir(tmp_path / "checkpoints").count("step-00000002") == 0
