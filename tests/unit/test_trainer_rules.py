"""The trainer's rules that need no ranks: when it saves, what it goes on from, what it takes back, what it survives."""

import errno
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from checkpoint_states import save_one
from torch import nn

from pipeline import checkpoint as ckpt
from pipeline.checkpoint import CheckpointConfig
from pipeline.checkpoint import generations as generations_module
from pipeline.ledger import SampleLedger
from pipeline.metrics import RunLog
from pipeline.moving_averages import MovingAverages
from pipeline.state import came_from
from pipeline.train import checkpoint_due, evaluation_due, steps_say_save


def run_at(step: int, **more):
    """A run of 3 epochs of 8 steps, evaluated each second epoch, saved each second epoch and each fourth step."""
    checkpoint = CheckpointConfig(every_epochs=2, every_steps=4)
    defaults = {"saved_step": 0, "saved_evaluated": True, "save_due": False, "last_step": 24}
    return SimpleNamespace(
        step=step,
        loader=SimpleNamespace(steps_per_epoch=8),
        config=SimpleNamespace(checkpoint=checkpoint, evaluate_every_epochs=2),
        **defaults | more,
    )


def test_evaluations_are_due_by_epochs_and_at_the_end():
    assert [step for step in range(1, 25) if evaluation_due(run_at(step))] == [16, 24]
    assert evaluation_due(run_at(5, last_step=5))


def test_a_save_that_waited_for_an_evaluation_is_made_up_for():
    assert [step for step in range(1, 13) if steps_say_save(run_at(step))] == [4, 8, 12]
    assert not checkpoint_due(run_at(8)) and checkpoint_due(run_at(8, save_due=True))
    assert checkpoint_due(run_at(16)) and checkpoint_due(run_at(24))


def test_what_was_saved_before_its_evaluation_is_saved_again_after_it():
    assert not checkpoint_due(run_at(16, saved_step=16))
    assert checkpoint_due(run_at(16, saved_step=16, saved_evaluated=False))


def test_a_step_that_is_not_taken_leaves_batchnorm_as_it_was():
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2))
    moving = MovingAverages(model)
    model(torch.randn(4, 3))
    moving.remember()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model(torch.full((4, 3), float("nan")))
    assert model[0].running_mean.isnan().all()
    moving.restore()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_job_that_is_started_again_does_not_begin_where_it_was_told_to_once():
    saved = SimpleNamespace(record={"resumed_from": "runs/a/checkpoints/step-00000004"})
    assert came_from(saved, "runs/a/checkpoints/step-00000004")
    assert not came_from(saved, "runs/a/checkpoints/step-00000002") and not came_from(None, "x")


class Full:
    def write(self, text):
        raise OSError(errno.ENOSPC, "No space left on device")

    def close(self):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_takes_curves_but_not_the_run(tmp_path, capsys):
    log, ledger = RunLog(tmp_path, 0), SampleLedger(tmp_path, 0, 1)
    log._file.close(), ledger._file.close()
    log._file = ledger._file = Full()
    log.scalars(1, {"train/loss": 1.0})
    log.scalars(2, {"train/loss": 1.0})
    ledger.end_step(1, 0)
    log.close()
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2 and "takes no metrics" in said[0] and "step 1 is not in the ledger" in said[1]


CONFIG = CheckpointConfig(keep=3)


def saved_run(run: Path, steps: tuple[int, ...]) -> list[Path]:
    for step in steps:
        save_one(run, step, keep=3)
    return sorted((run / "checkpoints").glob("step-*"))


def test_a_disk_that_does_not_answer_is_not_taken_for_damage(tmp_path, monkeypatch):
    saved_run(tmp_path, steps=(1, 2))

    def fails(path, digest):
        raise OSError(errno.EIO, "Input/output error", str(path))

    monkeypatch.setattr("pipeline.checkpoint.reader.verify_file", fails)
    with pytest.raises(OSError, match="Input/output error"):
        ckpt.newest_whole(tmp_path, CONFIG, print)


def test_where_all_are_damaged_nothing_begins_anew_by_itself(tmp_path):
    for folder in saved_run(tmp_path, steps=(1, 2)):
        path = folder / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-1])
    said: list[str] = []
    with pytest.raises(ValueError, match=r"no checkpoint of .* is whole: bring one back, or move .*checkpoints away"):
        ckpt.newest_whole(tmp_path, CONFIG, said.append)
    assert len(said) == 2


@pytest.mark.parametrize("name", [ckpt.CONFIG_NAME, ckpt.PROGRESS_NAME, generations_module.SUMS_NAME])
def test_a_damaged_record_is_passed_over_before_ranks_start(tmp_path, name):
    older, newer = saved_run(tmp_path, steps=(1, 2))
    path = newer / name
    path.write_bytes(b"?" + path.read_bytes()[1:])
    found = ckpt.newest_record(tmp_path, CONFIG)
    assert found is not None and found.folder == older
    assert ckpt.newest_record(tmp_path / "none", CONFIG) is None
