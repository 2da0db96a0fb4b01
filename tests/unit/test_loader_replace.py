"""`data.on_bad_sample replace`: the next sample that can be read stands in, the same on all ranks, and is counted."""

from pathlib import Path

import numpy as np
import pytest
from small_shards import beton, tars

from data_prep.manifest import read_manifest, unpack_index
from pipeline.data.loader import EvaluationLoader, TrainLoader
from pipeline.data.order import Layout
from pipeline.data.reader import REPLACEMENTS

FORMATS = pytest.mark.parametrize("form", ["wds", "ffcv"])


def damage(manifest_path: Path, sample_ids: list[int], form: str) -> None:
    """Flips a bit in the middle of each picture."""
    manifest = read_manifest(manifest_path)
    shards = [(r.name, r.index_name) for r in manifest.shards]
    files = [(manifest.beton.name, manifest.beton.index_name)] if form == "ffcv" else shards
    first = 0
    for name, index_name in files:
        index = manifest.folder / index_name
        entries = unpack_index(index.read_bytes(), index)
        data = bytearray((manifest.folder / name).read_bytes())
        for i, entry in enumerate(entries):
            if first + i in sample_ids:
                data[entry.offset + entry.size // 2] ^= 16
        (manifest.folder / name).write_bytes(data)
        first += len(entries)


def opened(path: Path, form: str, on_bad_sample: str = "replace"):
    return (beton if form == "ffcv" else tars)(path, on_bad_sample=on_bad_sample)


@FORMATS
def test_the_next_that_can_be_read_stands_in_whole(split_copy, form):
    """With its own label, crop and id, so that a batch never holds a picture under another's label."""
    good = opened(split_copy, form).batch(np.arange(24), epoch=2)
    damage(split_copy, [3, 9, 10, 23], form)
    batch = opened(split_copy, form).batch(np.arange(24), epoch=2)
    by = {3: 4, 9: 11, 10: 11, 23: 0}
    expected = [by.get(i, i) for i in range(24)]
    assert batch.sample_ids.tolist() == expected
    assert batch.images.equal(good.images[expected]) and batch.labels.equal(good.labels[expected])
    assert [(r.sample_id, r.by) for r in batch.replaced] == list(by.items())
    assert all(f"sample {r.sample_id} " in r.reason and "CRC" in r.reason for r in batch.replaced)


@FORMATS
def test_stopping_is_the_default(split_copy, form):
    damage(split_copy, [3], form)
    with pytest.raises(ValueError, match=r"sample 3 .*CRC"):
        (beton if form == "ffcv" else tars)(split_copy).batch(np.arange(8), epoch=0)


@FORMATS
def test_evaluation_never_replaces(split_copy, form):
    damage(split_copy, [3], form)
    with pytest.raises(ValueError, match=r"sample 3 .*CRC"):
        list(EvaluationLoader(opened(split_copy, form), np.arange(24), 8, 1, 0, 1, 0))


@FORMATS
def test_a_lost_shard_is_not_replaced_by_one_picture_again_and_again(split_copy, form):
    damage(split_copy, list(range(1, 2 + REPLACEMENTS)), form)
    with pytest.raises(ValueError, match=rf"sample 1 .*CRC.*nor can the {REPLACEMENTS} samples after it"):
        opened(split_copy, form).batch(np.array([0, 1]), epoch=0)
    assert opened(split_copy, form).batch(np.array([0, 2]), epoch=0).sample_ids.tolist() == [0, 18]


@FORMATS
@pytest.mark.parametrize("workers", [0, 2])
def test_ranks_and_workers_agree(split_copy, form, workers):
    """Two ranks together have what one has; the count is each rank's own."""
    damage(split_copy, [3, 9, 10], form)
    whole = TrainLoader(opened(split_copy, form), Layout(0, 1, 8, 1), 5, 0)
    expected = [batch.sample_ids.tolist() for batch in whole]
    loaders = [TrainLoader(opened(split_copy, form), Layout(rank, 2, 4, 1), 5, workers) for rank in range(2)]
    found = [[batch.sample_ids.tolist() for batch in loader] for loader in loaders]
    assert [a + b for a, b in zip(*found, strict=True)] == expected
    replaced = [r for loader in loaders for r in loader.take_replaced()]
    assert sorted((r.sample_id, r.by) for r in replaced) == [(3, 4), (9, 11), (10, 11)]
    assert sorted(whole.take_replaced()) == sorted(replaced)
    assert whole.take_replaced() == []
