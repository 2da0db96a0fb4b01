"""benchmarks train: a small real run where the smallest GPU environment's packages are all there is; and its cells."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import timm
import torch
from bare_environment import CODE, PEAK_FLOPS, REPOSITORY, run_bare
from torch import nn

from benchmarks import __main__ as command
from benchmarks import cells, gpu_train, training_step
from benchmarks.cells import Cell, run_cells
from benchmarks.gpu_train import FirstLoss, TrainOptions
from benchmarks.harness import read_rows
from pipeline.flops import mfu, peak_flops, training_flops
from pipeline.models import ModelConfig, create_model
from pipeline.noise.config import NoiseConfig
from pipeline.noise.inject import NoiseInjector
from pipeline.patches import PatchProjection

TINY = {"patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 1}


@pytest.fixture(autouse=True)
def quiet_place(monkeypatch):
    monkeypatch.delenv("NOISYNN_SAMPLES", raising=False)
    monkeypatch.delenv("NOISYNN_TRACEBACK", raising=False)
    monkeypatch.setattr(command.signal, "signal", lambda *arguments: None)
    monkeypatch.setattr(cells, "code_digest", lambda: CODE)


def train_words(output: Path) -> list[str]:
    text = "--models test_vit --batch 2 --image-size 32 --steps 2 --rounds 1 --no-compile --device cpu"
    return ["train", *text.split(), "--dtype", "float32", "--output", str(output)]


@pytest.fixture(scope="module")
def output(tmp_path_factory) -> Path:
    """The rows of a run in the smallest environment."""
    path = tmp_path_factory.mktemp("runs") / "train.jsonl"
    run_bare(train_words(path))
    return path


# ---- train ----


def test_training_steps_are_measured(output):
    rows = read_rows(output)
    assert [(row["part"], row["contestant"]) for row in rows] == [
        ("test_vit", name) for name in ("timm", "clean", "noisy")
    ]
    timm_row, clean, noisy = rows
    assert timm_row["first_loss"] == pytest.approx(clean["first_loss"], abs=1e-5)
    assert noisy["first_loss"] != clean["first_loss"] and noisy["last_loss"] < noisy["first_loss"]
    assert "gaussian 0.1 at blocks.*.attn" in noisy["settings"] and "PrefetchLoader" in timm_row["settings"]
    for row in rows:
        assert (row["n"], row["batch"], {t["items"] for t in row["timings"]}) == (1, 2, {4})
        assert row["compared_with"] == "timm" and row["question"] == "train"
        operations = training_flops(ModelConfig("test_vit"), 1000, 32)
        assert row["mfu"]["median"] == pytest.approx(row["items_per_second"]["median"] * operations / PEAK_FLOPS)
        assert (row["peak_memory_bytes"], row["compile_seconds"], row["aim_images_per_second"]) == (None, None, None)
        assert str(REPOSITORY) not in json.dumps(row["conditions"])


def test_a_second_training_measurement_does_nothing_and_shows_the_first(output, monkeypatch, capsys):
    before = output.read_bytes()
    monkeypatch.setattr(gpu_train, "_rows", None)  # what is called would fail
    assert command.main(train_words(output)) == 0
    text = capsys.readouterr().out
    assert "has 1 of 1 cells already (test_vit): nothing is left to measure" in text
    assert "no MFU: the bfloat16 peak of CPU" in text and "noisy" in text
    assert output.read_bytes() == before


def test_the_aims_stand_beside_what_was_measured(output, capsys):
    rows = [row | {"aim_images_per_second": 26_000} for row in read_rows(output)]
    gpu_train._print_model(rows)
    text = capsys.readouterr().out
    assert "26,000" in text and "aim" in text and "%" in text
    assert gpu_train.AIMS.keys() == gpu_train.BATCHES.keys() == set(TrainOptions().models)


def test_the_docstrings_shares_of_the_peak():
    names = ("vit_tiny", "vit_small", "vit_base", "vit_large")
    for name, share in zip(names, (0.20, 0.33, 0.45, 0.50), strict=True):
        flops = training_flops(ModelConfig(f"{name}_patch16_224"), 1000, 224)
        used = mfu(gpu_train.AIMS[f"{name}_patch16_224"], flops, peak_flops("NVIDIA H200", "bf16"))
        assert used == pytest.approx(share, abs=0.006)


def test_only_a_card_of_the_table_has_a_peak(monkeypatch):
    names = ["NVIDIA H200", "NVIDIA H200 MIG 1g.18gb"]
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: names.pop(0))
    assert [gpu_train.peak_of(torch.device(kind)) for kind in ("cuda", "cuda", "cpu")] == [989e12, None, None]


def test_contestants_have_the_same_weights_and_timm_s_is_timm_s():
    models = [
        gpu_train.starting_model(name, "test_vit", 32, torch.device("cpu")) for name in ("timm", "clean", "noisy")
    ]
    assert [type(model.patch_embed.proj) for model in models] == [nn.Conv2d, PatchProjection, PatchProjection]
    assert all(type(module).__module__.split(".")[0] in ("timm", "torch") for module in models[0].modules())
    first, *others = (model.state_dict() for model in models)
    assert all(list(other) == list(first) for other in others)
    assert all(torch.equal(other[key], first[key]) for other in others for key in first)


def test_a_batch_that_does_not_fit_is_halved(monkeypatch, capsys):
    tried = []

    def rows(name, batch, *others):
        tried.append(batch)
        if batch > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return [f"batch {batch}"]

    monkeypatch.setattr(gpu_train, "_rows", rows)
    freed = []
    monkeypatch.setattr(gpu_train.gc, "collect", lambda: freed.append(tried[-1]))  # seconds in a process of many tests
    measure = partial(gpu_train._measure_model, "vit_small_patch16_224", device=torch.device("cpu"), kept={})
    options = TrainOptions(compile=False)
    assert measure(options=replace(options, batch=13), on_turn=print) == ["batch 3"]
    assert tried == freed == [13, 6, 3]
    assert capsys.readouterr().out == (
        "vit_small_patch16_224: out of memory at a batch of 13; going on with 6\n"
        "vit_small_patch16_224: out of memory at a batch of 6; going on with 3\n"
    )
    tried.clear()
    assert measure(options=options, on_turn=print)
    assert tried[0] == 512
    monkeypatch.setattr(gpu_train, "_rows", lambda *arguments: (_ for _ in ()).throw(torch.OutOfMemoryError()))
    with pytest.raises(ValueError, match="--models vit_small_patch16_224: one picture is too much"):
        measure(options=replace(options, batch=1), on_turn=print)


def test_contestants_that_start_elsewhere_or_without_noise_are_noticed():
    plain, noisy = FirstLoss(7.0, False), FirstLoss(7.01, True)
    assert gpu_train.same_start(plain, FirstLoss(7.005, False)) is None
    assert gpu_train.same_start(plain, noisy) is None
    assert "7.0000 and 7.1000" in gpu_train.same_start(plain, FirstLoss(7.1, False))
    assert "nan" in gpu_train.same_start(plain, FirstLoss(float("nan"), False))
    assert "noise changes nothing" in gpu_train.same_start(plain, FirstLoss(7.0, True))


def test_timms_normalisation_is_its_loaders():
    model = timm.create_model("vit_tiny_patch16_224", depth=1)
    images = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    ours = gpu_train._normalisation_of_timm(model, torch.device("cpu"), compiled=False)(images)
    mean, std = (torch.tensor(model.pretrained_cfg[name]).view(1, 3, 1, 1) * 255 for name in ("mean", "std"))
    torch.testing.assert_close(ours, images.float().sub_(mean).div_(std))  # timm/data/loader.py, PrefetchLoader


@pytest.mark.parametrize("kind", ["none", "gaussian", "optimal_q"])
def test_the_compiled_loss_is_the_eager_one_in_one_graph(monkeypatch, kind):
    monkeypatch.setattr(training_step.torch, "compile", partial(torch.compile, backend="aot_eager"))
    model = create_model(ModelConfig("vit_tiny_patch16_224", TINY), 4, 16).train()
    noise = NoiseConfig(kind, 0.5 if kind == "gaussian" else None, site="blocks.1.attn", group_size=2)
    injector = NoiseInjector(model, noise, 16, seed=0)
    x, labels = torch.randn(4, 3, 16, 16), torch.arange(4)
    eager, compiled = (training_step.loss_function(model, torch.bfloat16, flag) for flag in (False, True))
    for step in range(3):
        injector.set_batch(torch.arange(4) + 4 * step, epoch=step)
        torch.testing.assert_close(compiled(x, labels), eager(x, labels))
    with injector.off():
        plain = eager(x, labels)
    assert (plain == eager(x, labels)) == (kind == "none")


# ---- cells ----


def fake_cells(log: list[str], names: str = "ABC", **conditions) -> list[Cell]:
    def measure(name: str, kept: dict) -> list[str]:
        log.append(name)
        return [json.dumps({"question": "made up", "value": name + str(i)} | kept) for i in range(2)]

    return [Cell(name, {"size": (1, 2)} | conditions, 1, partial(measure, name)) for name in names]


def circumstances(at: str = "now", **environment: str) -> dict:
    return {"time_utc": at, "environment": {"torch": "1", "timm": "1", "device": "card", "commit": "c"} | environment}


def test_a_cell_is_measured_once_by_the_same_code_on_the_same_card(tmp_path, monkeypatch, capsys):
    path, log = tmp_path / "rows.jsonl", []
    run = partial(run_cells, "made up", path=path, minutes=1, on_turn=lambda text: None)
    assert list(run(cells=fake_cells(log), circumstances=circumstances())) == ["A", "B", "C"]
    rows = run(cells=fake_cells(log, "CAD"), circumstances=circumstances("later", commit="d"))
    assert log == ["A", "B", "C", "D"]
    assert [[row["value"] for row in of_cell] for of_cell in rows.values()] == [
        ["C0", "C1"],
        ["A0", "A1"],
        ["D0", "D1"],
    ]
    assert "2 of 3 cells already (C; A): these are not measured again" in capsys.readouterr().out
    for change in ({"size": (1, 3)}, {"torch": "2"}, {"device": "another"}, {"code": "0"}):
        if "code" in change:
            monkeypatch.setattr(cells, "code_digest", lambda: "0")
        of_cell = change if "size" in change else {}
        log.clear()
        run(cells=fake_cells(log, "A", **of_cell), circumstances=circumstances("x", **change))
        assert log == ["A"], change
    assert [row["time_utc"] for row in run(cells=fake_cells([], "A"), circumstances=circumstances())["A"]] == ["x", "x"]


def test_an_edited_source_is_other_code(tmp_path, monkeypatch):
    monkeypatch.undo()
    here = cells.code_digest.__wrapped__()
    assert here == cells.code_digest.__wrapped__()
    monkeypatch.setattr(cells, "_ROOT", tmp_path)
    digests = {here}
    for name, text in (("pipeline/a.py", "1"), ("pipeline/a.py", "2"), ("benchmarks/b.py", ""), ("pipeline/c.cu", "1")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
        digests.add(cells.code_digest.__wrapped__())
    assert len(digests) == 5
    (tmp_path / "benchmarks" / "rows.jsonl").write_text("{}")
    assert cells.code_digest.__wrapped__() in digests


def test_a_run_that_is_cut_goes_on_after_its_last_whole_cell(tmp_path):
    path, log = tmp_path / "rows.jsonl", []
    first, second, third = fake_cells(log)

    def cut(kept: dict) -> list[str]:
        raise KeyboardInterrupt

    run = partial(run_cells, "made up", path=path, circumstances=circumstances(), minutes=1, on_turn=lambda text: None)
    with pytest.raises(KeyboardInterrupt):
        run(cells=[first, replace(second, measure=cut), third])
    assert [row["value"] for row in read_rows(path)] == ["A0", "A1"]
    assert list(run(cells=[first, second, third])) == ["A", "B", "C"]
    assert log == ["A", "B", "C"]


def test_no_cell_is_begun_that_would_not_end_in_time(tmp_path, monkeypatch, capsys):
    seconds, log, path = [0.0], [], tmp_path / "rows.jsonl"
    monkeypatch.setattr(cells.time, "monotonic", lambda: seconds[0])

    def measure(cost: float, inner, kept: dict) -> list[str]:
        seconds[0] += cost
        return inner(kept)

    def run(minutes: float, *weights: float) -> list[str]:
        seconds[0] += 30  # what came before, which counts
        slow = [
            replace(cell, weight=weight, measure=partial(measure, 60 * weight, cell.measure))
            for weight, cell in zip(weights, fake_cells(log), strict=True)
        ]
        return list(
            run_cells("made up", slow, path, circumstances(), minutes, lambda text: None, start=seconds[0] - 30)
        )

    assert run(1, 1, 1, 1) == ["A"]  # the first in any case
    out = capsys.readouterr().out
    assert "stopped with 1 of 3 cells done: B would not end within --minutes 1; the same command goes on" in out
    assert run(4.25, 1, 1, 3) == ["A", "B"]  # after half a minute and B's, C would take three, and end after 4.5
    assert run(4.5, 1, 1, 3) == ["A", "B", "C"]
    assert log == ["A", "B", "C"]
