"""The report of a pretraining, its evaluations and a fine-tuning, on small run folders made here."""

import io
import json
import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import tyro
from scipy.stats import binomtest

from pipeline.checkpoint import PROGRESS_NAME, write_json
from pipeline.config import TrainConfig
from pipeline.evaluate import Accuracy, EvaluateConfig
from pipeline.metrics import RunLog
from pipeline.models import ModelConfig
from pipeline.noise.config import NoiseConfig
from pipeline.parallel import ParallelConfig
from pipeline.recipes import all_recipes
from pipeline.report import ReportConfig, write_report
from pipeline.report.reproduce import evaluate_command, train_command
from pipeline.sections import to_json

STEPS_PER_EPOCH = 5
ENVIRONMENT = {"torch": "2.14.1", "device": "CPU (2 cores)", "commit": "c0ffee"}


def accuracy(order: str, k: int, correct: int, num_images: int = 400) -> Accuracy:
    noisy = k > 1
    share = {"manifest": None, "class": 1.0, "shuffled": 0.1}[order]
    noise = "optimal_q" if noisy else "none"
    counts = num_images, correct, num_images
    return Accuracy(f"{order}_k{k}", noise, order, k, *counts, share, noisy, 0.5, 0.01, near_ties=())


def make_run(folder: Path, config: TrainConfig, classes: int, correct: int) -> None:
    """What `run_training` leaves behind."""
    log = RunLog(folder_made(folder), 0)
    log.pictures("input/step_0", 0, torch.randint(0, 255, (4, 8, 8, 3), dtype=torch.uint8))
    for epoch in range(config.epochs):
        step = (epoch + 1) * STEPS_PER_EPOCH
        values = {"train/loss": 2 / (epoch + 1), "train/epoch": epoch + 1.0}
        log.scalars(step, values | {"train/images_per_second": 100.0 * (epoch + 1), "train/data_wait_share": 0.1})
        log.scalars(step, {"val/top1": 0.5, "val/top5": 1.0})
    log.close()
    steps = config.epochs * STEPS_PER_EPOCH
    write_json(folder / "config.json", to_json(config))
    results = {
        "per_image": accuracy("manifest", 1, correct).to_json(),
        "steps": steps,
        "world_size": 2,
        "engine": "DeepSpeedEngine",
        "strategy": "zero1",
        "noise": to_json(config.noise),
        "noise_description": config.noise.describe(),
        "num_train_images": 1400,
        "num_eval_images": 400,
        "environment": ENVIRONMENT,
    }
    write_json(folder / "results.json", results)
    generation = folder_made(folder / "checkpoints" / f"step-{steps:08d}")
    write_json(generation / "config.json", {"classes": [str(i) for i in range(classes)], "step": steps})
    write_json(generation / PROGRESS_NAME, {"step": steps, "samples_sha256": "5a" * 32})
    (generation / "SHA256SUMS").write_text(f"{WEIGHTS_SHA256}  model.safetensors\n")


WEIGHTS_SHA256 = "ab" * 32


def make_evaluation(path: Path, run: Path, noise: NoiseConfig, ordered: int, shuffled: int, k: int = 10) -> None:
    """What `evaluate` writes."""
    found = [accuracy("manifest", 1, 386), accuracy("class", k, ordered), accuracy("shuffled", k, shuffled)]
    body = {
        "checkpoint": str(run / "checkpoints" / "step-00000010"),
        "step": 10,
        "weights_sha256": WEIGHTS_SHA256,
        "config": to_json(EvaluateConfig(checkpoint=run, data=Path("val.manifest.json"), noise=noise)),
        "accuracies": [a.to_json() for a in found],
        "environment": ENVIRONMENT,
    }
    write_json(path, body)


def folder_made(folder: Path) -> Path:
    folder.mkdir(parents=True)
    return folder


LAST_BLOCK = NoiseConfig("optimal_q", site="blocks.5", group_size=10, spare_prefix_tokens=False)
OFFICIAL_PLACE = replace(LAST_BLOCK, site="blocks.5.attn", spare_prefix_tokens=True)


def make_inputs(folder: Path, name: str = "pretrain") -> ReportConfig:
    noise = NoiseConfig("gaussian", 0.3)
    base = TrainConfig(run=folder / name, epochs=2, global_batch=64, noise=noise, parallel=ParallelConfig(processes=2))
    finetune_noise = NoiseConfig("circular_shift", 0.3, "blocks.5.attn", group_size=4)
    finetune = replace(base, run=folder / "finetune", noise=finetune_noise)
    make_run(base.run, base, classes=10, correct=386)
    make_run(finetune.run, finetune, classes=2, correct=388)
    last_block, official_place = folder / "last_block.json", folder / "official_place.json"
    make_evaluation(last_block, base.run, LAST_BLOCK, ordered=400, shuffled=148)
    make_evaluation(official_place, base.run, OFFICIAL_PLACE, ordered=390, shuffled=383)
    return ReportConfig(folder / "out", base.run, finetune.run, last_block, official_place, started=1.0)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[ReportConfig, dict, str, str]:
    """(configuration, results.json, report.html, what was printed), of a run folder with an awkward name."""
    config = make_inputs(tmp_path_factory.mktemp("report"), name="pre<b>&train")
    stream = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(config.pretrain.parent)
        write_report(config, stream)
    results = json.loads((config.out / "results.json").read_text())
    return config, results, (config.out / "report.html").read_text(), stream.getvalue()


def test_results_hold_each_figure_under_its_name(written):
    results = written[1]
    expected = {
        "top1_per_image": 0.965,
        "top5_per_image": 1.0,
        "top1_class_ordered_k10": 1.0,
        "top1_shuffled_k10": 0.37,
        "top1_class_ordered_k10_official_place": 0.975,
        "top1_shuffled_k10_official_place": 0.9575,
        "class_mate_share_class_ordered_k10": 1.0,
        "class_mate_share_shuffled_k10": 0.1,
        "class_mate_share_class_ordered_k10_official_place": 1.0,
        "class_mate_share_shuffled_k10_official_place": 0.1,
        "finetune_top1": 0.97,
        "finetune_top5": None,  # there are two classes
        "world_size": 2,
        "strategy": "zero1",
        "num_eval_images": 400,
        "commit": "c0ffee",
    }
    assert {key: results[key] for key in expected} == expected
    assert results["noise"] == to_json(NoiseConfig("gaussian", 0.3))
    assert results["finetune_noise"]["kind"] == "circular_shift"
    assert results["seconds_total"] > 1e9


def test_intervals_are_wilsons(written):
    results = written[1]
    low, high = results["intervals_95"]["top1_per_image"]
    # n = 400, 386 right; (p + z^2/2n -+ z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n), worked by hand
    assert (low, high) == pytest.approx((0.9421, 0.9790), abs=2e-4)
    assert high == pytest.approx(binomtest(386, 400).proportion_ci(0.95, method="wilson").high)
    assert results["intervals_95"]["top1_class_ordered_k10"][1] == pytest.approx(1.0)


def test_throughput_weighs_windows_by_their_length(written):
    # Two windows of the same number of images at 100 and 200 images/s: the harmonic mean.
    assert written[1]["images_per_second"]["pretrain"] == pytest.approx(400 / 3)
    assert written[1]["data_wait_share"]["pretrain"] == pytest.approx(0.1)


def test_page_holds_the_figures_and_says_what_is_transductive(written):
    page = written[2]
    for text in ("96.50 %", "94.2 to 97.9", "100.00 %", "37.00 %", "97.50 %", "95.75 %", "97.00 %", "c0ffee"):
        assert text in page, text
    assert page.count("transductive (they depend on the other pictures of a group of 10)") == 1
    assert "The noise is inside the network" in page


def test_page_is_one_file_that_loads_nothing(written):
    page = written[2]
    assert "http://" not in page and "https://" not in page
    assert "<script" not in page and "<link" not in page and "@import" not in page
    sources = re.findall(r'(?:src|srcset|href)="([^"]*)"', page)
    assert len(sources) == 6  # two plots in two modes, two grids
    assert all(source.startswith("data:image/") for source in sources)


def test_page_escapes_names(written):
    page = written[2]
    assert "pre<b>" not in page
    assert "pre&lt;b&gt;&amp;train" in page


def test_no_file_names_a_folder_of_this_machine(written):
    config, results, page, printed = written
    for text in (page, json.dumps(results), printed):
        assert str(config.pretrain.parent) not in text


def test_table_fits_80_columns_and_says_where_to_look(written):
    printed = written[3]
    table = printed.split("The figures with noise")[0]
    assert max(len(line) for line in table.splitlines()) <= 80
    for text in ("per image, noise off", "96.50", "37.00", "report.html", "tensorboard --logdir"):
        assert text in printed, text
    assert len([line for line in table.splitlines() if " 400" in line]) == 6  # no row is broken in two


def write_quietly(config: ReportConfig) -> None:
    write_report(config, io.StringIO())


def edit_json(path: Path, **changes: object) -> None:
    write_json(path, json.loads(path.read_text()) | changes)


def break_checkpoint(c: ReportConfig) -> None:
    edit_json(c.last_block, checkpoint=str(c.pretrain / "checkpoints" / "step-00000005"))


def break_weights(c: ReportConfig) -> None:
    edit_json(c.official_place, weights_sha256="cd" * 32)


def break_other_run(c: ReportConfig) -> None:
    edit_json(c.official_place, checkpoint=str(c.finetune / "checkpoints" / "step-00000010"))


def break_group(c: ReportConfig) -> None:
    make_evaluation(c.last_block, c.pretrain, replace(LAST_BLOCK, group_size=25), 400, 148, k=25)


def break_site(c: ReportConfig) -> None:
    make_evaluation(c.official_place, c.pretrain, LAST_BLOCK, 390, 383)


def break_order(c: ReportConfig) -> None:
    edit_json(c.last_block, accuracies=json.loads(c.last_block.read_text())["accuracies"][:2])


def break_counts(c: ReportConfig) -> None:
    found = json.loads(c.last_block.read_text())["accuracies"]
    edit_json(c.last_block, accuracies=[found[0] | {"correct_top1": 500}, *found[1:]])


def break_agreement(c: ReportConfig) -> None:
    found = json.loads(c.official_place.read_text())["accuracies"]
    edit_json(c.official_place, accuracies=[found[0] | {"correct_top1": 385}, *found[1:]])


REFUSALS = {
    "other checkpoint": (break_checkpoint, r"last_block\.json is of the checkpoint .*step-00000005.*evaluate"),
    "other run": (break_other_run, r"official_place\.json is of the checkpoint .*finetune"),
    "trained again to the same step": (break_weights, r"official_place\.json is of earlier weights"),
    "another k": (break_group, r"last_block\.json is of groups of 25: .*--noise\.group-size 10"),
    "noise elsewhere": (break_site, r"official_place\.json has the noise .*blocks\.5\.attn"),
    "no shuffled order": (break_order, r"last_block\.json has no result in shuffled order"),
    "impossible counts": (break_counts, r"last_block\.json is damaged"),
    "other pictures": (break_agreement, r"386 of 400 .*385 of 400: evaluate both again"),
    "half a file": (lambda c: c.last_block.write_text('{"checkpoint": '), r"last_block\.json is damaged"),
    "no object": (lambda c: c.last_block.write_text("[]"), r"last_block\.json is damaged"),
    "no evaluation": (lambda c: c.official_place.unlink(), r"no file .*official_place\.json: .*pipeline evaluate"),
    "unfinished run": (lambda c: (c.finetune / "results.json").unlink(), r"no file .*finetune/results\.json: train"),
    "trained on since": (lambda c: edit_json(c.pretrain / "results.json", steps=5), r"of step 5, .* of step 10"),
    "half a metrics line": (lambda c: (c.pretrain / "metrics.jsonl").write_text('{"st'), r"metrics\.jsonl, line 1"),
    "no metrics": (lambda c: (c.finetune / "metrics.jsonl").unlink(), r"no file .*metrics\.jsonl"),
    "no pictures": (lambda c: next(c.finetune.glob("events.*")).unlink(), r"finetune: its events hold no picture"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_bad_input_is_refused_and_nothing_written(name, tmp_path):
    damage, message = REFUSALS[name]
    config = make_inputs(tmp_path)
    damage(config)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        write_quietly(config)
    assert not config.out.exists()


def test_a_run_folder_is_not_overwritten(tmp_path):
    config = make_inputs(tmp_path)
    with pytest.raises(ValueError, match="is a run folder"):
        write_quietly(replace(config, out=config.pretrain))


def test_a_start_in_the_future_is_refused(tmp_path):
    with pytest.raises(ValueError, match="started is"):
        write_quietly(replace(make_inputs(tmp_path), started=1e12))


def test_without_a_start_the_job_is_not_timed(tmp_path):
    config = replace(make_inputs(tmp_path), started=None)
    write_quietly(config)
    assert json.loads((config.out / "results.json").read_text())["seconds_total"] is None
    assert "not timed" in (config.out / "report.html").read_text()


def test_train_command_gives_the_configuration_again():
    base = all_recipes()["demo"].config
    options = base.model.options | {"patch_size": 16}
    model = replace(base.model, options=options, init_from=Path("runs/my run"), new_head=True)
    noise = NoiseConfig("circular_shift", 0.2, "blocks.5", group_size=None, spare_prefix_tokens=False)
    optim = replace(base.optim, betas=(0.9, 0.95), clip_grad_norm=None)
    config = replace(base, run=Path("runs/x"), model=model, noise=noise, optim=optim)
    words = shlex.split(train_command(config, config.parallel.processes).replace("\\\n", ""))
    assert words[:4] == ["python", "-m", "pipeline", "train"]
    recipes = {name: (recipe.summary, recipe.config) for name, recipe in all_recipes().items()}
    assert tyro.extras.overridable_config_cli(recipes, args=words[4:]) == config


def test_train_command_says_what_it_cannot():
    base = all_recipes()["demo"].config
    assert train_command(base, 16).startswith("# as 16 ranks")
    odd = replace(base, model=ModelConfig("vit_tiny_patch16_224", {"depth": 2}), run=Path("runs/odd"))
    line = train_command(odd, odd.parallel.processes)
    assert "--model.options depth 2" in line or line.startswith("# no recipe leads to runs/odd")


def test_evaluate_command_gives_the_configuration_again():
    config = EvaluateConfig(Path("runs/x"), "val.manifest.json", LAST_BLOCK, ("class",), output=Path("a b.json"))
    words = shlex.split(evaluate_command(config).replace("\\\n", ""))
    assert tyro.cli(EvaluateConfig, args=words[4:]) == config
