"""Checkpoints on a store that fsspec writes to: whole when their sums are there and right, fetched to be read."""

import shutil

import fsspec
import pytest
from checkpoint_states import assert_holds, even, save_all, whole_state, writers_of

from pipeline.checkpoint import CheckpointConfig, Generation, latest_generation, newest_whole
from pipeline.checkpoint.store import StoreDraft


@pytest.fixture(autouse=True)
def no_disk_is_waited_for(monkeypatch):
    monkeypatch.setattr("os.fsync", lambda descriptor: None)


@pytest.fixture(params=["memory", "file"])
def url(request, tmp_path):
    url = f"memory://bucket/{tmp_path.name}/run" if request.param == "memory" else f"file://{tmp_path}/store/run"
    yield url
    if request.param == "memory":
        fsspec.filesystem("memory").rm("/bucket", recursive=True)


def listed(url: str) -> set[str]:
    fs, root = fsspec.core.url_to_fs(url)
    return {path.removeprefix(root.rstrip("/") + "/") for path in fs.find(root)}


def save(run, url, step, writers=None, **config):
    writers = writers or writers_of(run, 2, folder=url, **config)
    assert save_all(writers, step, even(whole_state(step), 2)) == []


def newest(run, url=None):
    told: list[str] = []
    return newest_whole(run, CheckpointConfig(folder=url), told.append), told


def check_holds(generation: Generation, step: int) -> None:
    assert generation.record["step"] == step
    (pieces,) = even(whole_state(0), 1)
    generation.fill(pieces)
    assert_holds(pieces, whole_state(step))
    assert generation.buffers()["norm.num_batches_tracked"] == step


def test_saved_there_and_read_from_another_machine(tmp_path, url):
    for step in (1, 2, 3):
        save(tmp_path / "run", url, step, keep=2)
    assert {name.partition("/")[0] for name in listed(url)} == {"latest", "step-00000002", "step-00000003"}
    assert not any("tmp" in name or "marks" in name for name in listed(url))
    generation, told = newest(tmp_path / "other machine", url)
    assert told == []
    check_holds(generation, 3)
    # Whoever reads the run's folder finds them too.
    generation, told = newest(tmp_path / "run")
    check_holds(generation, 3)
    check_holds(Generation(generation.folder), 3)


def test_what_is_needed_is_fetched(tmp_path, url):
    save(tmp_path / "run", url, 1)
    folder = latest_generation(tmp_path / "run")
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert names == {"config.json", "progress.json", "model.safetensors", "ema.safetensors"}
    generation = Generation(folder)
    piece = even(whole_state(0), 4)[3][:1]  # held by the second rank's file
    generation.fill(piece)
    assert_holds(piece, whole_state(1))
    assert [path.name for path in (folder / "state").iterdir()] == ["rank-00001-of-00002.safetensors"]


@pytest.mark.parametrize("name", ["SHA256SUMS", "model.safetensors", "state/rank-00001-of-00002.safetensors"])
def test_damage_and_what_is_missing_there_are_passed_over(tmp_path, url, name):
    for step in (1, 2):
        save(tmp_path / "run", url, step)
    fs, root = fsspec.core.url_to_fs(url)
    path = f"{root}/step-00000002/{name}"
    data = bytearray(fs.cat_file(path))
    data[len(data) // 2] ^= 1
    fs.pipe_file(path, bytes(data))
    generation, (line,) = newest(tmp_path / "run")
    check_holds(generation, 1)
    assert "step-00000002 is passed over" in line
    fs.rm_file(path)
    generation, told = newest(tmp_path / "run")
    check_holds(generation, 1)
    assert len(told) == (0 if name == "SHA256SUMS" else 1)  # without its sums it was never one


def test_the_same_step_again_is_not_taken_from_what_was_fetched_before(tmp_path, url):
    run = tmp_path / "run"
    save(run, url, 1)
    check_holds(newest(run)[0], 1)
    (run / "checkpoints" / "fetched" / "step-00000000").mkdir()  # of long ago
    assert save_all(writers_of(run, 2, folder=url), 1, even(whole_state(5), 2)) == []
    generation, told = newest(run)
    assert told == []
    (pieces,) = even(whole_state(0), 1)
    generation.fill(pieces)
    assert_holds(pieces, whole_state(5))
    assert [path.name for path in (run / "checkpoints" / "fetched").iterdir()] == ["step-00000001"]


class Killed(BaseException):
    pass


def test_killed_at_any_request_one_that_is_whole_is_found(tmp_path, monkeypatch):
    url = "memory://bucket/killed"
    fs = type(fsspec.filesystem("memory"))
    calls = ("pipe_file", "cp_file", "rm_file", "rm")
    whole = {name: getattr(fs, name) for name in calls}
    for dies_at in range(1, 200):
        run = tmp_path / str(dies_at)
        for step in (1, 2):
            save(run, url, step, keep=2)
        writers = writers_of(run, 2, folder=url, keep=2)
        left = [dies_at]

        def dying(name, left=left):
            def call(*args, **kwargs):
                left[0] -= 1
                if left[0] == 0:
                    raise Killed
                return whole[name](*args, **kwargs)

            return call

        # Killed at a request of the publishing, by which all parts are there.
        publish = StoreDraft.publish

        def killed_in_it(draft, *args, publish=publish):
            with monkeypatch.context() as patch:
                for name in calls:
                    patch.setattr(fs, name, dying(name))
                try:
                    return publish(draft, *args)
                except Killed as error:
                    raise RuntimeError("killed") from error

        with monkeypatch.context() as patch:
            patch.setattr(StoreDraft, "publish", killed_in_it)
            patch.setattr(StoreDraft, "discard", lambda draft: None)
            failed = save_all(writers, 3, even(whole_state(3), 2))
        generation, told = newest(run)
        assert told == []
        assert generation.record["step"] in (2, 3)
        check_holds(generation, generation.record["step"])
        save(run, url, 4, keep=2)
        assert {name.partition("/")[0] for name in listed(url)} <= {
            "latest",
            *(f"step-{step:08d}" for step in (2, 3, 4)),
        }
        fsspec.filesystem("memory").rm("/bucket", recursive=True)
        if not failed:
            break
    assert dies_at > 10


def test_a_store_that_fails_is_told(tmp_path, url, monkeypatch):
    save(tmp_path / "run", url, 1)
    writers = writers_of(tmp_path / "run", 2, folder=url)

    def refuse(*args):
        raise OSError("503 Slow Down")

    monkeypatch.setattr(StoreDraft, "read", refuse)
    (line,) = save_all(writers, 2, even(whole_state(2), 2))
    assert f"was not written to {url}: 503 Slow Down; the run goes on, step-00000001 stays whole" in line
    assert {name.partition("/")[0] for name in listed(url)} == {"latest", "step-00000001"}


@pytest.mark.parametrize(
    ("folder", "fault"),
    [
        ("https://example.org/run", "web servers take no files"),
        ("ftp://example.org/run", "a run reads no 'ftp'"),
        ("s3://me:secret@bucket/run", "a password in a URL"),
    ],
)
def test_stores_that_take_nothing_are_refused(tmp_path, folder, fault):
    with pytest.raises(ValueError, match=fault) as caught:
        writers_of(tmp_path / "run", folder=folder)
    assert "secret" not in str(caught.value)


def test_two_places_are_refused(tmp_path, url):
    save(tmp_path / "here", None, 1)
    with pytest.raises(ValueError, match="has other checkpoints: move it"):
        writers_of(tmp_path / "here", folder=url)
    save(tmp_path / "there", url, 1)
    with pytest.raises(ValueError, match="has other checkpoints: move it"):
        writers_of(tmp_path / "there", folder=f"{url}2")
    shutil.rmtree(tmp_path / "there")
    save(tmp_path / "there", f"{url}2", 1)
