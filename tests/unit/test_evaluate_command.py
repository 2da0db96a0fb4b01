"""`evaluate` of whole checkpoints: what it writes and prints, one against another, and what it refuses."""

import dataclasses
import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from small_shards import CLASSES, jpeg

from data_prep.distribute import ShardOptions, shard
from data_prep.manifest import pack_index, read_manifest, unpack_index, write_manifest
from pipeline import checkpoint as ckpt
from pipeline.accuracy import NearTie
from pipeline.answers import ROUNDING
from pipeline.checkpoint import EMA_NAME, WEIGHTS_NAME, recorded_sha256
from pipeline.config import TrainConfig
from pipeline.data.augment import AugmentConfig
from pipeline.data.loader import DataConfig, open_split
from pipeline.evaluate import ClassCount, EvaluateConfig, evaluate
from pipeline.evaluation_table import print_evaluation
from pipeline.models import ModelConfig, create_model
from pipeline.noise.config import NoiseConfig
from pipeline.parallel import Ranks
from pipeline.sections import to_json
from pipeline.trained import load_model, open_checkpoint

ALONE = Ranks(0, 1, launched=False)
NO_NOISE = NoiseConfig()
# No evaluation takes RandAugment, so it must not keep one from reading a .beton.
EXACT = AugmentConfig(randaugment="rand-m9-n2", eval_crop_share=0.5)


def spread(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Weights by which the pictures alone decide: timm's own start answers all alike."""
    weights = {name: 20 * value if value.ndim > 1 else value for name, value in model.state_dict().items()}
    return weights | {name: torch.zeros_like(weights[name]) for name in ("pos_embed", "cls_token")}


def make_run(
    folder: Path,
    seed: int,
    size: int = 32,
    augment: AugmentConfig = EXACT,
    label_map: str = "",
    classes: tuple[str, ...] = CLASSES,
    average_seed: int | None = None,
    noise: NoiseConfig = NO_NOISE,
) -> Path:
    """A run folder with one checkpoint of an untrained model of the small split's three classes."""
    options = {"depth": 1, "embed_dim": 24, "num_heads": 2, "patch_size": 8}
    model = ModelConfig(name="vit_tiny_patch16_224", options=options)
    config = TrainConfig(
        run=folder, seed=4, model=model, data=DataConfig(image_size=size), augment=augment, noise=noise
    )
    draft = ckpt.temporary_folder(folder, 12)
    draft.mkdir(parents=True)
    for name, start in ((WEIGHTS_NAME, seed), (EMA_NAME, average_seed)):
        if start is not None:
            torch.manual_seed(start)
            save_file(spread(create_model(model, len(CLASSES), size)), draft / name)
    if label_map:
        (draft / ckpt.LABEL_MAP_NAME).write_text(label_map)
    ckpt.write_json(draft / ckpt.CONFIG_NAME, to_json(config) | {"classes": classes, "step": 12})
    ckpt.publish_generation(folder, 12, keep=2)
    ckpt.write_json(folder / ckpt.CONFIG_NAME, to_json(config))
    return folder


@pytest.fixture
def run(tmp_path) -> Path:
    return make_run(tmp_path / "run", seed=8)


@pytest.mark.parametrize("form", ["wds", "ffcv"])
def test_evaluate_a_checkpoint(run, raw_split, form):
    noise = NoiseConfig(kind="optimal_q", site="blocks.0", group_size=4)
    config = EvaluateConfig(run, raw_split, noise, any_order=True, format=form, batch=10, workers=0)
    found = evaluate(config, ALONE)
    assert [r.order for r in found.accuracies] == ["manifest", "class", "shuffled"]
    assert [r.transductive for r in found.accuracies] == [False, True, True]
    assert all(r.num_images == 24 for r in found.accuracies)
    body = json.loads((run / "evaluate_step12_train_optimal_q_blocks.0_k4.json").read_text())
    assert body["step"] == 12 and body["accuracies"] == [r.to_json() for r in found.accuracies]
    # The .beton of raw pixels and the tars hold the same pictures: no image may be answered otherwise.
    plain = evaluate(EvaluateConfig(run, raw_split, batch=24, workers=0, output=run / "own" / "x.json"), ALONE)
    (alone,) = plain.accuracies
    assert (alone.correct_top1, alone.near_ties) == (found.accuracies[0].correct_top1, ())
    assert alone.mean_loss == pytest.approx(found.accuracies[0].mean_loss, rel=1e-6)
    assert plain.classes == found.classes
    assert (run / "own" / "x.json").is_file()


def predictions(run: Path, manifest: Path, ema: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """(predicted, labels) of the bare timm model, by the checkpoint's own preprocessing."""
    checkpoint = open_checkpoint(run)
    data = dataclasses.replace(checkpoint.data, workers=0)
    reader = open_split(str(manifest), data, checkpoint.augment.for_evaluation(), seed=0)
    model, ids = load_model(checkpoint, ema).eval(), np.arange(len(reader))
    x = (reader.batch(ids, None).images.permute(0, 3, 1, 2) / 255 - 0.5) / 0.5
    with torch.no_grad():
        return model(x).argmax(1).numpy(), reader.labels_of(ids)


def test_what_is_written_is_what_the_bare_model_answers(run, raw_split):
    found = evaluate(EvaluateConfig(run, raw_split, batch=7, workers=2), ALONE)
    predicted, labels = predictions(run, raw_split)
    right = predicted == labels
    assert np.bincount(predicted).tolist() == [7, 6, 11], "answers spread over the classes, else no count can fail"
    assert found.accuracies[0].correct_top1 == right.sum() not in (0, 24)
    counts = [ClassCount(name, int(right[labels == i].sum()), 8) for i, name in enumerate(CLASSES)]
    assert found.classes == tuple(counts)
    body = json.loads((run / "evaluate_step12_train.json").read_text())
    assert body["classes"][1] == {"name": "bee", "right": counts[1].right, "seen": 8}
    assert body["near_tie_bound"] == ROUNDING and body["against"] is None


def test_two_checkpoints_on_the_same_pictures_each_by_its_own_preprocessing(run, raw_split, tmp_path, capsys):
    other = make_run(tmp_path / "other", seed=1, size=48, augment=AugmentConfig(eval_crop_share=1.0))
    found = evaluate(EvaluateConfig(run, raw_split, against=other, batch=9, workers=0), ALONE)
    (one, labels), (two, _) = predictions(run, raw_split), predictions(other, raw_split)
    only_one, only_other = ((one == labels) & (two != labels)).sum(), ((two == labels) & (one != labels)).sum()
    assert (found.against.comparison.only_one, found.against.comparison.only_other) == (only_one, only_other)
    assert only_one != only_other and only_one and only_other
    assert found.against.accuracy.correct_top1 == (two == labels).sum()
    assert found.output == run / "evaluate_step12_train_against-other-step12.json"
    against = json.loads(found.output.read_text())["against"]
    assert against["comparison"] == {
        "num_images": 24,
        "only_one": only_one,
        "only_other": only_other,
        "p_value": found.against.comparison.p_value,
    }
    assert against["accuracy"] == found.against.accuracy.to_json()
    assert against["checkpoint"] == str(open_checkpoint(other).folder)
    print_evaluation(found)
    p_value = f"p = {found.against.comparison.p_value:.2g} (McNemar, exact)"
    there = open_checkpoint(other).folder
    text = capsys.readouterr().out
    assert f"{only_one} pictures only here right, {only_other} only there ({there}); {p_value}." in text
    assert text.endswith(f"Written: {found.output}\n")


def test_the_average_is_compared_with_the_average(raw_split, tmp_path):
    run = make_run(tmp_path / "run", seed=8, average_seed=25)
    other = make_run(tmp_path / "other", seed=13, average_seed=1)
    found = evaluate(EvaluateConfig(run, raw_split, ema=True, against=other, workers=0), ALONE)
    (one, labels), (two, _) = (predictions(folder, raw_split, ema=True) for folder in (run, other))
    comparison = found.against.comparison
    assert comparison.only_one == ((one == labels) & (two != labels)).sum()
    assert comparison.only_other == ((two == labels) & (one != labels)).sum()
    assert (two != predictions(other, raw_split)[0]).any()
    body = json.loads(found.output.read_text())["against"]
    assert body["weights_sha256"] == recorded_sha256(found.against.folder, EMA_NAME)
    without = make_run(tmp_path / "without", seed=1)
    with pytest.raises(FileNotFoundError, match=r"without.* holds no averaged weights: leave out .*--ema") as error:
        evaluate(EvaluateConfig(run, raw_split, ema=True, against=without, workers=0), ALONE)
    assert "\n" not in str(error.value)


def test_no_result_is_written_over_another(raw_split, tmp_path):
    """By default: other weights, another split, step, noise or comparison goes into another file."""
    acts = NoiseConfig(kind="optimal_q", site="blocks.0", during="both", group_size=4)
    noisy = make_run(tmp_path / "noisy", seed=8, average_seed=1, noise=acts)
    salt = NoiseConfig(kind="salt_and_pepper", strength=0.1)
    val = tmp_path / "val"
    shutil.copytree(raw_split.parent, val)
    manifest = write_manifest(dataclasses.replace(read_manifest(raw_split), split="val", shards=(), folder=val))
    own = "optimal_q_blocks.0_k4"
    for options, name in (
        ({}, f"train_{own}"),
        ({"ema": True}, f"train_ema_{own}"),
        ({"data": manifest, "format": "ffcv", "any_order": True}, f"val_{own}"),
        ({"noise": dataclasses.replace(acts, group_size=None)}, "train_optimal_q_blocks.0_k24"),
        ({"noise": dataclasses.replace(acts, spare_prefix_tokens=False)}, "train_optimal_q_blocks.0_all-tokens_k4"),
        ({"shuffle_seed": 3}, f"train_{own}_seed3"),
        ({"noise": salt}, "train_salt_and_pepper_image_0.1"),
        ({"noise": dataclasses.replace(salt, strength=0.25)}, "train_salt_and_pepper_image_0.25"),
        ({"against": noisy}, f"train_{own}_against-noisy-step12"),
    ):
        config = EvaluateConfig(noisy, **({"data": raw_split, "batch": 24, "workers": 0} | options))
        found = evaluate(config, ALONE)
        assert found.output == noisy / f"evaluate_step12_{name}.json"
        assert found.output.is_file()
    assert len(list(noisy.glob("evaluate_*"))) == 9


def test_a_result_of_other_pictures_stands_until_the_user_says_otherwise(raw_split, sizes_split, tmp_path):
    """Two data sets have splits of the same name; the same pictures may be evaluated again, at another place too."""
    own = make_run(tmp_path / "own", seed=8)
    first = evaluate(EvaluateConfig(own, raw_split, workers=0), ALONE).output
    copy = Path(shutil.copytree(raw_split.parent, tmp_path / "copy")) / raw_split.name
    assert evaluate(EvaluateConfig(own, copy, workers=0), ALONE).output == first
    kept = first.read_text()
    with pytest.raises(ValueError, match=rf"^{first} holds a result of other pictures: .* with --output$"):
        evaluate(EvaluateConfig(own, sizes_split, workers=0), ALONE)
    assert first.read_text() == kept
    assert evaluate(EvaluateConfig(own, sizes_split, workers=0, output=first), ALONE).output == first
    assert first.read_text() != kept


def test_an_output_that_cannot_be_written_is_refused_before_the_pass(run, raw_split, tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.evaluate.Evaluator.alone", None)
    (tmp_path / "taken").write_text("")
    for output, message in (
        (tmp_path, r"^--output .* is a folder: name a file in it, such as .*result\.json$"),
        (
            tmp_path / "taken" / "deep" / "x.json",
            r"^--output .*x\.json: .*taken is a file, no folder: name a file in a",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            evaluate(EvaluateConfig(run, raw_split, output=output, workers=0), ALONE)


def test_a_noise_that_mixes_no_pictures_is_run_once(run, raw_split, capsys):
    noise = NoiseConfig(kind="gaussian", strength=0.5)
    found = evaluate(EvaluateConfig(run, raw_split, noise=noise, workers=0), ALONE)
    assert [(one.order, one.noise[:8]) for one in found.accuracies] == [("manifest", "none"), ("manifest", "gaussian")]
    assert found.accuracies[0].mean_loss != found.accuracies[1].mean_loss
    print_evaluation(found)
    text = capsys.readouterr().out
    assert text.count("any order") == 1 and "k = 1" not in text


def test_a_checkpoint_against_itself_differs_nowhere(run, raw_split):
    against = evaluate(EvaluateConfig(run, raw_split, against=run, workers=0), ALONE).against
    assert (against.comparison.only_one, against.comparison.only_other, against.comparison.p_value) == (0, 0, 1.0)


def test_checkpoints_of_other_classes_or_labels_are_not_compared(run, raw_split, tmp_path):
    swapped = json.dumps({"ant": "bee", "bee": "ant", "cat": "cat"})
    mapped = make_run(tmp_path / "mapped", seed=1, label_map=swapped)
    with pytest.raises(ValueError, match=r"16 of 24 pictures are labelled otherwise: .* one label map"):
        evaluate(EvaluateConfig(run, raw_split, against=mapped, workers=0), ALONE)
    other = make_run(tmp_path / "others", seed=1, classes=("ant", "wasp", "cat"))
    with pytest.raises(
        ValueError, match=r"run.* and --against .*others know different .* number 1, 'bee' and 'wasp'; name"
    ):
        evaluate(EvaluateConfig(run, raw_split, against=other, workers=0), ALONE)


def test_the_table_says_counts_intervals_near_ties_and_classes(run, raw_split, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    noise = NoiseConfig(kind="optimal_q", site="blocks.0", group_size=4)
    found = evaluate(EvaluateConfig(run, raw_split, noise=noise, batch=10, workers=0), ALONE)
    print_evaluation(found)
    text = capsys.readouterr().out
    alone = found.accuracies[0]
    assert "per image" in text and "transductive" in text and "noise off" in text
    low, high = alone.top1_interval
    for figure in (f"{100 * alone.top1:.2f}", f"{100 * low:.2f}", f"{100 * high:.2f}", f"{alone.mean_loss:.4f}"):
        assert figure in text, figure
    assert "No picture's first two logits lie closer than 2^-" in text
    assert all(f"{count.name}: {count.right} of 8" in text for count in found.classes)
    assert max(map(len, text[: text.index("Below")].splitlines())) <= 80

    ties = tuple(NearTie(i, f"picture {i}") for i in range(11))
    many = (*(ClassCount(f"class {i}", i, 10) for i in range(10)), ClassCount("empty", 0, 0))
    tied = dataclasses.replace(alone, near_ties=ties)
    print_evaluation(dataclasses.replace(found, accuracies=[tied], classes=many))
    text = capsys.readouterr().out
    assert "The first two logits of 11 lie closer" in text and "picture 7 and 3 more, all in the JSON" in text
    assert "Lowest by class, class 0: 0 of 10, class 1: 1 of 10, class 2: 2 of 10; highest, class 9: 9 of 10" in text
    assert "empty" not in text and "transductive" not in text
    assert f"{100 * alone.top5:.2f}" in text  # of eleven classes


def test_the_top_5_of_five_classes_or_fewer_stays_blank(run, raw_split, capsys):
    found = evaluate(EvaluateConfig(run, raw_split, workers=0), ALONE)
    assert found.accuracies[0].top5 == 1
    for classes, shown in ((5, False), (6, True)):
        named = tuple(ClassCount(f"class {i}", 1, 2) for i in range(classes))
        print_evaluation(dataclasses.replace(found, classes=named))
        assert ("100.00" in capsys.readouterr().out) == shown


def test_a_checkpoint_says_what_it_is(run):
    checkpoint = open_checkpoint(run)
    assert open_checkpoint(checkpoint.folder) == checkpoint
    assert (checkpoint.classes, checkpoint.seed, checkpoint.step) == (("ant", "bee", "cat"), 4, 12)
    assert load_model(checkpoint).num_classes == 3


def test_other_classes_are_refused_by_the_first_that_differs(run, raw_split, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(raw_split.parent, other)
    renamed = dataclasses.replace(read_manifest(raw_split), classes=("ant", "wasp", "zebra"), folder=other)
    other = write_manifest(renamed)
    with pytest.raises(ValueError, match=r"that .*step-00000012 was trained on: .* number 1, 'wasp' and 'bee'; use"):
        evaluate(EvaluateConfig(run, other, workers=0), ALONE)


def shard_of(root: Path, folders: dict[str, int]) -> Path:
    """Shards of a folder with so many pictures of each class."""
    for label, (name, count) in enumerate(folders.items()):
        (root / "source" / name).mkdir(parents=True)
        for i in range(count):
            (root / "source" / name / f"{i}.jpg").write_bytes(jpeg(8 * label + i))
    return shard(ShardOptions(source=root / "source", out=root, processes=1)).path


def test_more_and_fewer_classes_are_refused(run, tmp_path):
    more = shard_of(tmp_path / "more", {"ant": 1, "bee": 1, "cat": 1, "dog": 1})
    with pytest.raises(ValueError, match=r"4 here, 3 there, .* number 3, 'dog' and none; use the data"):
        evaluate(EvaluateConfig(run, more, workers=0), ALONE)
    fewer = shard_of(tmp_path / "fewer", {"ant": 1, "bee": 1})
    with pytest.raises(ValueError, match=r"2 here, 3 there, .* number 2, none and 'cat'"):
        evaluate(EvaluateConfig(run, fewer, workers=0), ALONE)


def test_pictures_without_labels_are_refused(run, raw_split, tmp_path):
    """As data_prep writes them: all in one folder. And labels below 0, as other tools mark them."""
    unlabelled = shard_of(tmp_path / "test", {"unknown": 3})
    with pytest.raises(ValueError, match=r"one class, 'unknown': pictures without labels have no accuracy; shard a"):
        evaluate(EvaluateConfig(run, unlabelled, workers=0), ALONE)
    below = tmp_path / "below"
    shutil.copytree(raw_split.parent, below)
    own, shards = read_manifest(raw_split), []
    for record in own.shards:
        path = below / record.index_name
        path.write_bytes(pack_index([e._replace(label=-1) for e in unpack_index(path.read_bytes(), path)]))
        shards.append(dataclasses.replace(record, index_sha256=hashlib.sha256(path.read_bytes()).hexdigest()))
    manifest = write_manifest(dataclasses.replace(own, shards=tuple(shards), folder=below))
    with pytest.raises(ValueError, match=r"labels in the indexes beside .* are not those it counts: run `python"):
        evaluate(EvaluateConfig(run, manifest, workers=0), ALONE)


def test_a_run_that_was_killed_before_its_first_checkpoint(run, tmp_path):
    """Its folder has a config.json, but that of a run, not of a checkpoint."""
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "config.json").write_text((run / "config.json").read_text())
    for source in (tmp_path / "begun", tmp_path):
        with pytest.raises(FileNotFoundError, match="no finished checkpoint"):
            open_checkpoint(source)
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        open_checkpoint(tmp_path / "nothing")


def test_a_damaged_checkpoint_is_not_evaluated(run, raw_split):
    (folder,) = (run / "checkpoints").glob("step-*")
    weights = folder / WEIGHTS_NAME
    good = weights.read_bytes()
    weights.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged"):
        evaluate(EvaluateConfig(run, raw_split, workers=0), ALONE)
    weights.write_bytes(good)
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is damaged"):
        evaluate(EvaluateConfig(run, raw_split, workers=0), ALONE)


@pytest.mark.parametrize(
    ("options", "name"), [({"batch": 0}, "batch"), ({"workers": -1}, "workers"), ({"shuffle_seed": -1}, "shuffle_seed")]
)
def test_out_of_range_options_are_refused_by_name(options, name):
    with pytest.raises(ValueError, match=f"^{name} is"):
        EvaluateConfig(Path("x"), Path("y"), **options)
