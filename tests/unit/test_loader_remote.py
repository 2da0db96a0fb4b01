"""Training from a store: the same batches as from files, within the cache's limit, and no fault of it goes unnamed."""

import itertools
import time
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from fault_store import HASTY, FaultStore
from numbers_reader import same, stream
from small_shards import EXACT, tars

from data_prep.manifest import read_manifest
from pipeline.data.augment import AugmentConfig
from pipeline.data.cache import CacheConfig, ShardCache
from pipeline.data.loader import DataConfig, EvaluationLoader, TrainLoader, open_split
from pipeline.data.order import Layout
from pipeline.data.reader import PictureReader

LAYOUT = Layout(0, 1, 2, 1)
STEPS = 30  # of 12 an epoch


@pytest.fixture
def store(sizes_split):
    """Serves the split's manifest, tars and indexes."""
    store = FaultStore()
    for path in sizes_split.parent.iterdir():
        if path.suffix in (".json", ".tar", ".idx"):
            store.files[path.name] = path.read_bytes()
    with store.serving():
        yield store


def remote(store: FaultStore, folder: Path, shards: float = 100, augment: AugmentConfig = EXACT, **options):
    """shards: for how many the cache has room, beside the indexes."""
    largest = max(len(data) for name, data in store.files.items() if name.endswith(".tar"))
    indexes = sum(len(data) for name, data in store.files.items() if name.endswith(".idx"))
    cache = CacheConfig(folder, (shards * largest + indexes) / 1e9, retry=HASTY)
    config = DataConfig(image_size=32, workers=2, cache=cache, **options)
    return open_split(f"{store.url}/train.manifest.json", config, augment, seed=0)


def evaluated(reader: PictureReader, batch: int = 5) -> list[int]:
    """Sample ids, in the manifest's order."""
    loader = EvaluationLoader(reader, np.arange(len(reader)), batch, 1, 0, 1, 0)
    return [i for batch in loader for i in batch.sample_ids.tolist()]


@pytest.mark.parametrize("randaugment", [None, "rand-m9-n2"], ids=["threads", "processes"])
def test_batches_are_those_of_local_shards_within_the_limit(store, sizes_split, tmp_path, randaugment):
    """Four shards, of which two windows of one fit into the cache; over two epochs and a half."""
    augment = AugmentConfig(randaugment=randaugment)
    reader = remote(store, tmp_path, 2.5, augment, window=1)
    folder = reader.source.cache._folder
    local = TrainLoader(tars(sizes_split, augment), LAYOUT, 5, 0, window=1)
    loader = TrainLoader(reader, LAYOUT, 5, 2, window=1)
    for one, other in zip(stream(loader), itertools.islice(stream(local), STEPS), strict=False):
        assert same(one, other)
        assert folder.used_and_free()[0] <= folder.limit_bytes
    loader.close()
    shards = [shard.name for shard in read_manifest(sizes_split).shards]
    assert sum(map(store.asked_for, shards)) > len(shards), "there was room for all: nothing was tried"


def test_what_has_room_is_fetched_once(store, tmp_path):
    loader = TrainLoader(remote(store, tmp_path), LAYOUT, 5, 0)
    list(itertools.islice(stream(loader), STEPS))
    assert all(store.asked_for(name) == 1 for name in store.files if name.startswith("train-0"))
    list(EvaluationLoader(remote(store, tmp_path), np.arange(24), 8, 1, 0, 1, 0))
    assert all(store.asked_for(name) == 1 for name in store.files if name.startswith("train-0"))


def test_a_store_that_falters_changes_nothing(store, sizes_split, tmp_path):
    for name in store.files:
        store.faults[name] = [503, "cut"] if name.endswith(".tar") else [500]
    store.faults["train-000001.tar"].append("wrong")
    loader = TrainLoader(remote(store, tmp_path), LAYOUT, 5, 0)
    expected = TrainLoader(tars(sizes_split), LAYOUT, 5, 0)
    assert all(itertools.starmap(same, zip(loader, expected, strict=True)))


@pytest.mark.parametrize(("fault", "words"), [(404, "is missing"), (403, "credentials"), ("wrong", "upload it again")])
@pytest.mark.parametrize("on_bad_sample", ["stop", "replace"])
def test_a_shard_that_cannot_be_had_ends_the_run_by_name(store, tmp_path, fault, words, on_bad_sample):
    """No sample stands in for those of a whole shard: the store is at fault, not the data."""
    store.always["train-000002.tar"] = fault
    loader = TrainLoader(remote(store, tmp_path, on_bad_sample=on_bad_sample), LAYOUT, 5, 0)
    with pytest.raises(OSError, match=rf"{store.url}/train-000002\.tar .*{words}"):
        list(loader)


@pytest.mark.parametrize("on_bad_sample", ["stop", "replace"])
def test_a_damaged_picture_is_named_by_its_url(store, tmp_path, on_bad_sample):
    """Damaged on this machine's disk, after its shard was fetched and checked: other ranks would not replace it."""
    reader = remote(store, tmp_path, on_bad_sample=on_bad_sample)
    reader.read(9)
    (path,) = tmp_path.glob("*.tar")
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 1
    path.write_bytes(data)
    with pytest.raises(
        ValueError, match=rf"sample \d+ \({store.url}/train-000001\.tar, picture \d\): .*CRC.* remove {path}, "
    ):
        reader.batch(np.arange(7, 14), 0)
    path.unlink()
    assert remote(store, tmp_path).batch(np.arange(7, 14), 0).sample_ids.tolist() == list(range(7, 14))


def test_sizes_in_the_store_are_checked_before_a_run_starts(store, tmp_path):
    """Not when the shard is needed, hours later; by one process, not by every rank."""
    reader = remote(store, tmp_path)
    reader.source.check_sizes()
    good = store.files["train-000002.tar"]
    store.files["train-000002.tar"] = good[:-512]
    with pytest.raises(OSError, match=r"train-000002\.tar has [\d,]+ bytes, the manifest says [\d,]+: upload it again"):
        reader.source.check_sizes()
    del store.files["train-000002.tar"]
    with pytest.raises(FileNotFoundError, match=r"train-000002\.tar is missing"):
        reader.source.check_sizes()
    assert not list(tmp_path.glob("*.tar"))


def test_an_evaluating_rank_fetches_its_own_shards_alone(store, tmp_path):
    """24 samples over 4 ranks, and shards of 7: the second rank has samples 6 to 11."""
    list(EvaluationLoader(remote(store, tmp_path), np.arange(24), 3, 1, 1, 4, 0))
    asked = [store.asked_for(f"train-00000{i}.tar") for i in range(4)]
    assert asked == [1, 1, 0, 0]


@pytest.mark.parametrize(
    ("room", "window", "mend"),
    [(3.1, 0, r"raise it, or set data\.window"), (3.1, 2, r"raise it, or lower data\.window 2")],
)
def test_a_cache_without_room_for_what_is_needed_at_once_is_refused(store, tmp_path, room, window, mend):
    with pytest.raises(ValueError, match=rf"data\.cache\.gigabytes is .* of train's shards are needed at once: {mend}"):
        remote(store, tmp_path, room, window=window)
    remote(store, tmp_path, room, window=1)


@pytest.mark.parametrize("randaugment", [None, "rand-m9-n2"], ids=["threads", "processes"])
def test_a_split_larger_than_the_cache_is_evaluated(store, tmp_path, randaugment):
    """In the manifest's order a shard that is done with makes room for the next; between epochs training has none."""
    trained = remote(store, tmp_path, 2.1, AugmentConfig(randaugment=randaugment), window=1)
    with closing(TrainLoader(trained, LAYOUT, 5, 2, window=1)) as training:
        list(training)
        assert evaluated(remote(store, tmp_path, 2.1, window=1)) == list(range(24))
        list(training)


def test_the_names_of_a_split_larger_than_the_cache_are_read(store, sizes_split, tmp_path):
    """Class order needs them, before anything else is read."""
    source = remote(store, tmp_path, 2.1, window=1).source
    assert list(source.member_names()) == list(tars(sizes_split).source.member_names())
    assert store.asked_for("train-000003.tar") == 1 and source.cache.stats.evicted


@pytest.mark.parametrize("batch", [5, 12], ids=["two shards in a batch", "more shards than there is room for"])
def test_batches_under_way_do_not_wait_for_one_anothers_shards(store, tmp_path, monkeypatch, batch):
    """The first and the third shard are here, and a later batch has the third before an earlier one has the second."""
    reader = remote(store, tmp_path, 2.1, window=1)
    list(map(reader.read, (14, 0)))
    reader.expect(np.empty(0, np.int64), keep=False)
    fetched = ShardCache._fetched

    def slowly(self, file, *rest):
        if "000001" in file.url:
            time.sleep(0.3)
        return fetched(self, file, *rest)

    monkeypatch.setattr(ShardCache, "_fetched", slowly)
    assert evaluated(reader, batch) == list(range(24))


def test_steps_that_span_more_windows_than_there_is_room_for_are_refused(store, tmp_path):
    """Three steps of 4 samples are under way at once, and a window of one shard has 6: they could wait for ever."""
    with pytest.raises(ValueError, match=r"data\.window 1 holds some 6 samples, fewer than the 12 .*: raise it to 2,"):
        TrainLoader(remote(store, tmp_path, 2.5, window=1), Layout(0, 2, 2, 1), 5, 0, window=1)


def test_a_beton_is_not_read_from_a_store(store, tmp_path):
    with pytest.raises(ValueError, match=r"data\.format ffcv reads local files, not http"):
        remote(store, tmp_path, format="ffcv")


@pytest.mark.parametrize(
    "where", ["ssh://host/x.manifest.json", "github://a:b@/x.json", "simplecache::https://host/x.json"]
)
def test_other_places_are_refused_by_name(where, tmp_path):
    with pytest.raises(ValueError, match=r"a run reads no '[a-z:]+'.*https"):
        open_split(where, DataConfig(cache=CacheConfig(tmp_path)), EXACT, 0)


def test_a_manifest_that_is_not_there_is_named(store, tmp_path):
    del store.files["train.manifest.json"]
    with pytest.raises(FileNotFoundError, match=rf"{store.url}/train\.manifest\.json is missing"):
        remote(store, tmp_path)
