"""A state saved by any number of ranks is read into any other, bit for bit, and what does not fit is named."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from checkpoint_states import KINDS, SHAPES, assert_holds, cut, even, save_all, whole_state, writers_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from pipeline.checkpoint import CheckpointConfig, Generation, export_universal, newest_whole
from pipeline.pieces import Piece


def nothing_told(line: str) -> None:
    pytest.fail(line)


def saved(run: Path, ranks: int = 2, **state) -> Generation:
    whole = whole_state(1, **state)
    assert save_all(writers_of(run, ranks), 1, even(whole, ranks)) == []
    return newest_whole(run, CheckpointConfig(), nothing_told)


def cuts_of(draw, shapes) -> dict[str, list[int]]:
    return {
        name: draw(st.lists(st.integers(1, elements - 1), unique=True, max_size=6))
        for name, shape in shapes.items()
        if (elements := torch.Size(shape).numel()) > 1
    }


@st.composite
def partitions(draw):
    names = draw(st.lists(st.sampled_from(["a", "b.c", "d@1", "e/f"]), unique=True, min_size=1))
    shapes = {name: tuple(draw(st.lists(st.integers(1, 5), max_size=3))) for name in names}
    kinds = ["weight", *draw(st.lists(st.sampled_from(KINDS[1:]), unique=True))]
    sides = [(draw(st.integers(1, 4)), cuts_of(draw, shapes)) for _ in range(2)]
    return shapes, kinds, *sides


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(partitions())
def test_any_partition_is_read_into_any_other(tmp_path, monkeypatch, case):
    monkeypatch.setattr("os.fsync", lambda descriptor: None)
    shapes, kinds, (writers, written_cuts), (readers, read_cuts) = case
    shutil.rmtree(tmp_path / "run", ignore_errors=True)
    whole = whole_state(0, shapes, kinds)
    assert save_all(writers_of(tmp_path / "run", writers), 1, cut(whole, written_cuts, writers, shapes)) == []
    generation = newest_whole(tmp_path / "run", CheckpointConfig(), nothing_told)
    for pieces in cut(whole_state(1, shapes, kinds), read_cuts, readers, shapes):
        assert generation.files_for(pieces) <= set(generation.parts)
        generation.fill(pieces)
        assert_holds(pieces, whole)
    weights = load_file(generation.path("model.safetensors"))
    assert all(torch.equal(weights[name].flatten(), whole[name]["weight"]) for name in shapes)
    assert all(weights[name].shape == shape for name, shape in shapes.items())


def test_only_the_files_and_slices_that_are_needed_are_read(tmp_path):
    generation = saved(tmp_path, ranks=4)
    first = Piece("stem.weight", SHAPES["stem.weight"], 1, {"weight": torch.empty(3)})
    assert generation.files_for([first]) == {"state/rank-00000-of-00004.safetensors"}
    for number in (1, 2, 3):
        (generation.folder / f"state/rank-{number:05d}-of-00004.safetensors").write_bytes(b"")
    generation.fill([first])
    assert_holds([first], whole_state(1))
    with pytest.raises(ValueError, match="rank-00001-of-00004"):
        generation.verify()
    fresh = Generation(generation.folder)
    fresh.verify(["state/rank-00000-of-00004.safetensors"])


def test_what_a_generation_holds(tmp_path):
    generation = saved(tmp_path)
    assert sorted(generation.sums) == [
        "config.json",
        "ema.safetensors",
        "model.safetensors",
        "progress.json",
        "state/rank-00000-of-00002.safetensors",
        "state/rank-00001-of-00002.safetensors",
    ]
    buffers = generation.buffers()
    assert buffers.keys() == {"norm.running_mean", "norm.num_batches_tracked"}
    assert buffers["norm.num_batches_tracked"].dtype == torch.int64 and buffers["norm.num_batches_tracked"] == 1
    wanted = {"step": 1, "score": None, "generation": 1, "world_size": 2, "scalars": {"optimizer_steps": 1}}
    assert generation.record == wanted
    assert generation.shapes == SHAPES and generation.kinds() == set(KINDS)
    ema, whole = load_file(generation.path("ema.safetensors")), whole_state(1)
    assert all(torch.equal(ema[name].flatten(), whole[name]["ema"]) for name in SHAPES)
    assert torch.equal(ema["norm.running_mean"], torch.arange(3.0))
    with safe_open(generation.path(generation.parts[0]), "pt") as part:
        assert "exp_avg/stem.weight@0" in part.keys()  # noqa: SIM118 - it is no dictionary
        assert json.loads(part.metadata()["shapes"])["stem.weight"] == [6, 3, 2]


def test_halves_are_saved_as_float32(tmp_path):
    (writer,) = writers_of(tmp_path)
    for step in (1, 2):  # the second into the memory of the first
        writer.save(step, even(whole_state(1), 1)[0], {"frozen": torch.full((3,), step, dtype=torch.bfloat16)}, {}, {})
        assert writer.wait(60) and writer.take_failures() == []
    frozen = newest_whole(tmp_path, CheckpointConfig(), nothing_told).buffers()["frozen"]
    assert frozen.dtype == torch.float32 and torch.equal(frozen, torch.full((3,), 2.0))


def test_another_model_is_named_and_nothing_is_changed(tmp_path):
    generation = saved(tmp_path)
    (pieces,) = even(whole_state(2), 1)
    before = [tensor.clone() for piece in pieces for tensor in piece.tensors.values()]
    one = {"weight": torch.zeros(4)}
    for odd, fault in [
        (Piece("neck.weight", (4,), 0, one), "it lacks neck.weight"),
        (Piece("head.weight", (4, 9), 0, one), r"head.weight is \(4, 7\) there, \(4, 9\) here"),
    ]:
        with pytest.raises(ValueError, match=f"step-00000001 is a checkpoint of another model: {fault}"):
            generation.fill([*pieces, odd])
    with pytest.raises(ValueError, match=r"holds no momentum_buffer \(it holds ema, exp_avg, exp_avg_sq, weight\)"):
        generation.fill([*pieces, Piece("head.weight", (4, 7), 0, {"momentum_buffer": torch.zeros(28)})])
    after = [tensor for piece in pieces for tensor in piece.tensors.values()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    generation.check_model(SHAPES)
    with pytest.raises(ValueError, match=r"another model: it has head\.weight"):
        generation.check_model({name: shape for name, shape in SHAPES.items() if name != "head.weight"})


def test_pieces_that_leave_something_out_or_hold_it_twice_are_refused(tmp_path):
    whole = whole_state(1)
    for fault in ("gap", "twice"):
        pieces = even(whole, 2)
        piece = next(p for p in pieces[1] if p.name == "head.weight")
        pieces[1].remove(piece)
        if fault == "twice":
            start = piece.start - 1
            pieces[1].append(Piece(piece.name, piece.shape, start, {k: whole[piece.name][k][start:] for k in KINDS}))
        (line,) = save_all(writers_of(tmp_path / fault, 2), 1, pieces)
        assert "weight head.weight do not hold each of its 28 elements once" in line
        assert newest_whole(tmp_path / fault, CheckpointConfig(), nothing_told) is None


def test_a_file_that_was_added_is_refused(tmp_path):
    generation = saved(tmp_path)
    (generation.folder / "state" / "extra.safetensors").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"extra\.safetensors is not in SHA256SUMS"):
        Generation(generation.folder).verify()


def test_an_export_for_deepspeed_is_not_written_over_nor_from_damage(tmp_path):
    generation = saved(tmp_path / "run")
    folder = export_universal(generation, tmp_path / "out")
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["latest_universal", "step-00000001"]
    with pytest.raises(ValueError, match="out/step-00000001 exists: move it away"):
        export_universal(generation, tmp_path / "out")
    (generation.folder / "ema.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=r"ema\.safetensors is damaged"):
        export_universal(Generation(generation.folder), tmp_path / "other")
    assert not (tmp_path / "other").exists() and folder.is_dir()
