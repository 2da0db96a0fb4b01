"""The parts of python -m benchmarks loader: comparing outputs, other libraries' formats, the plan."""

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import loader_plan
from benchmarks.harness import compare
from benchmarks.loader_contestants import Delivered, agree, delivered
from benchmarks.loader_formats import write_folder
from pipeline.data.order import Layout, Order, training_micro_batches


def test_loaders_that_differ_are_noticed():
    pictures = torch.full((2, 4, 4, 3), 100, dtype=torch.uint8)
    one = Delivered(np.array([3, 2]), 0, 100.0, (4, 4, 3), pictures)
    stale = torch.stack((pictures[0], torch.full((4, 4, 3), 150, dtype=torch.uint8)))
    near = pictures + 1
    assert agree(one, one._replace(by_id=None)) is None
    assert agree(one, one._replace(by_id=near, encoded_anew=True)) is None
    for other, word in (
        (one._replace(shape=(4, 5, 3)), "pictures of"),
        (one._replace(label_counts=np.array([2, 3])), "class 0 comes 3 times and 2 times"),
        (one._replace(label_counts=np.array([3, 2, 1])), "5 pictures of an epoch (0 left out), and 6 (0)"),
        (one._replace(mean_level=5.0), "mean levels"),
        (one._replace(by_id=near), "sample 0 differs by 1"),
        (one._replace(by_id=stale, encoded_anew=True), "sample 1 differs by 50"),
    ):
        assert word in (agree(one, other) or "")


def test_a_loader_may_leave_out_what_it_says_and_no_more():
    whole = Delivered(np.array([3, 2, 0]), 0, 100.0, (4, 4, 3))
    assert agree(whole, whole._replace(label_counts=np.array([2, 2]), dropped=1)) is None
    assert "5 pictures" in (agree(whole, whole._replace(label_counts=np.array([2, 2]))) or "")
    # As many as it says, but another class instead.
    assert "class 1" in (agree(whole, whole._replace(label_counts=np.array([3, 0, 1]), dropped=1)) or "")


def test_what_a_loader_delivers_is_counted():
    images = torch.tensor([10, 20, 60], dtype=torch.uint8).reshape(3, 1, 1, 1).expand(3, 3, 4, 5)
    batches = [(images[:2], torch.tensor([[1], [0]])), (images[2:], torch.tensor([[1]]))]
    found = delivered(batches, labels=np.array([7, 4]), channels_last=False)
    assert found.label_counts.tolist() == [0, 0, 0, 0, 2, 0, 0, 1]
    assert (found.mean_level, found.shape, found.dropped) == (pytest.approx(30), (4, 5, 3), 0)
    with pytest.raises(ValueError, match="float32 where uint8 was asked for"):
        delivered([(images.float(), torch.zeros(3))])


def _tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def test_a_folder_holds_the_bytes_of_the_tars_under_their_labels(tmp_path):
    one = _tar(tmp_path / "0.tar", [("a.jpg", b"first"), ("a.cls", b"10"), ("b.cls", b"2"), ("b.png", b"second")])
    two = _tar(tmp_path / "1.tar", [("a.jpg", b"third"), ("a.json", b"{}"), ("a.cls", b"10")])
    found = write_folder([one, two], tmp_path / "folder")
    assert [(Path(s.path).relative_to(tmp_path), s.label, Path(s.path).read_bytes()) for s in found] == [
        (Path("folder/000010/00000000.jpg"), 10, b"first"),
        (Path("folder/000002/00000001.png"), 2, b"second"),
        (Path("folder/000010/00000002.jpg"), 10, b"third"),
    ]


def test_plans_are_those_of_the_training_order(monkeypatch):
    samples, taken = 20_480, []
    monkeypatch.setattr(loader_plan, "IMAGENET", samples)

    def watched(order: Order, epoch: int, layout: Layout, start_step: int):
        taken.append((order.window, layout.rank, start_step))
        return training_micro_batches(order, epoch, layout, start_step)

    monkeypatch.setattr(loader_plan, "training_micro_batches", watched)
    contestants = loader_plan.plan_contestants()
    timings = compare(contestants, 1)
    assert [t.contestant for t in timings] == [c.name for c in contestants]
    last = loader_plan.RANKS - 1
    window = loader_plan.WINDOW
    # 5 steps of 4,096; after the warm-up.
    assert taken[6:] == [
        (0, last, 0),
        (0, last, 0),
        (0, last, 4),
        (window, last, 0),
        (window, last, 0),
        (window, last, 4),
    ]
    peaks = {row.contestant: row.own_bytes for row in loader_plan.plan_memory()}
    assert peaks["all, start"] >= 4 * samples  # the permutation itself
    assert all(0 < peak < 50 * samples for peak in peaks.values())
