"""Evaluation: the per-image figure depends on nothing but model and picture; the noise protocols as written out."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from numbers_reader import InMemoryPictures
from safetensors.torch import save_file

from pipeline import checkpoint as ckpt
from pipeline.checkpoint import WEIGHTS_NAME
from pipeline.config import TrainConfig
from pipeline.data.augment import AugmentConfig
from pipeline.data.loader import DataConfig
from pipeline.evaluate import EvaluateConfig, Evaluator, evaluate, load_model, open_checkpoint
from pipeline.models import ModelConfig, create_model
from pipeline.noise.config import NoiseConfig
from pipeline.noise.inject import NoiseInjector
from pipeline.parallel import Ranks
from pipeline.sections import to_json

ALONE = Ranks(0, 1, launched=False)
N, CLASSES = 60, 6


class Pictures(InMemoryPictures):
    """2 x 2 pictures in memory, each a weak sign of its class under strong noise."""

    def __init__(self, order: np.ndarray | None = None, classes: int = CLASSES) -> None:
        rng = np.random.RandomState(0)
        self.labels = rng.permutation(np.arange(N) % classes).astype(np.int64)
        signs = rng.randint(0, 256, (classes, 2, 2, 3))
        mixed = 0.35 * signs[self.labels] + 0.65 * rng.randint(0, 256, (N, 2, 2, 3))
        self.pixels = mixed.round().astype(np.uint8)
        self.signs = signs
        self.classes = tuple("abcdefgh"[:classes])
        if order is not None:
            self.labels, self.pixels = self.labels[order], self.pixels[order]


class Linear(torch.nn.Module):
    """Logits linear in the pixels, so that mixed pictures give mixed logits."""

    def __init__(self, reader: Pictures) -> None:
        super().__init__()
        self.pretrained_cfg = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
        signs = reader.signs.transpose(0, 3, 1, 2).reshape(len(reader.signs), -1) / 255 - 0.5
        self.weight = torch.nn.Parameter(torch.from_numpy(signs).float())
        self.batches: list[int] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert not self.training
        self.batches.append(len(x))
        return (x - 0.5).flatten(1) @ self.weight.T


def evaluator(reader: Pictures, noise: NoiseConfig | None = None, batch: int = 16, workers: int = 0) -> Evaluator:
    model = Linear(reader)
    injector = NoiseInjector(model, noise or NoiseConfig(), 2, seed=0)
    return Evaluator(model, injector, reader, batch, workers)


def exact_logits(reader: Pictures, ids: np.ndarray) -> np.ndarray:
    """float64 (len(ids), classes)."""
    x = reader.pixels[ids].transpose(0, 3, 1, 2).reshape(len(ids), -1) / 255 - 0.5
    return x @ (reader.signs.transpose(0, 3, 1, 2).reshape(len(reader.signs), -1) / 255 - 0.5).T


def counts(logits: np.ndarray, labels: np.ndarray) -> tuple[int, int]:
    """(top-1, top-5) by counting the logits above the label's.

    None may be so near to it that float32 could order them otherwise: twelve products below 0.25 are off by 4e-7.
    """
    above = logits - logits[np.arange(len(labels)), labels][:, None]
    assert ((above == 0) | (np.abs(above) > 2e-6)).all(), "choose other pictures"
    rank_of_label = (above > 0).sum(1)
    return int((rank_of_label == 0).sum()), int((rank_of_label < 5).sum())


@pytest.mark.parametrize("batch", [1, 7, 16, 60, 500])
def test_per_image_is_the_exact_count_at_any_batch_size(batch):
    reader = Pictures()
    found = evaluator(reader, batch=batch).per_image(ALONE)
    expected = counts(exact_logits(reader, np.arange(N)), reader.labels)
    assert (found.correct_top1, found.correct_top5) == expected
    assert N // 3 < found.correct_top1 < N - 5 and found.correct_top5 < N  # neither all nor none
    assert (found.num_images, found.top1, found.top5) == (N, expected[0] / N, expected[1] / N)
    assert (found.transductive, found.class_mate_share, found.noise, found.group_size) == (False, None, "none", 1)


def test_per_image_does_not_change_with_workers_or_the_order_of_the_split():
    plain = evaluator(Pictures()).per_image(ALONE)
    assert evaluator(Pictures(), workers=2).per_image(ALONE) == plain
    for seed in range(3):
        assert evaluator(Pictures(np.random.RandomState(seed).permutation(N))).per_image(ALONE) == plain


@pytest.mark.parametrize(
    "noise",
    [NoiseConfig(kind="optimal_q", during="both"), NoiseConfig(kind="gaussian", strength=9.0, during="eval")],
    ids=lambda n: n.kind,
)
def test_per_image_is_without_noise_whatever_is_injected(noise):
    reader = Pictures()
    own = evaluator(reader, noise)
    assert own.per_image(ALONE) == evaluator(reader).per_image(ALONE)
    assert own.with_noise("class", 0, ALONE).correct_top1 != own.per_image(ALONE).correct_top1


@pytest.mark.parametrize("k", [1, 2, 4, 10, 7])
@pytest.mark.parametrize("order", ["class", "shuffled"])
def test_optimal_q_is_the_written_out_mixing_of_logits(order, k):
    """The model is linear, so each logit is its group's sum plus its own over k + 1; 7 leaves a smaller last group."""
    reader = Pictures()
    found = evaluator(reader, NoiseConfig(kind="optimal_q", during="eval", group_size=k)).with_noise(order, 3, ALONE)
    in_class, shuffled = np.argsort(reader.labels, kind="stable"), np.random.RandomState([3, 0]).permutation(N)
    ids = in_class if order == "class" else shuffled
    logits = exact_logits(reader, ids)
    mixed = np.concatenate([mix(logits[start : start + k]) for start in range(0, N, k)])
    assert (found.correct_top1, found.correct_top5) == counts(mixed, reader.labels[ids])
    assert found.transductive == (k > 1)
    assert (found.class_mate_share is not None) == (k > 1)
    if k == 10 and order == "class":
        assert found.class_mate_share == 1.0
    if k == 1:  # a picture alone: the plain model to the last image
        assert found.correct_top1 == evaluator(reader).per_image(ALONE).correct_top1


def mix(group: np.ndarray) -> np.ndarray:
    k = len(group)
    return group if k == 1 else (group + group.sum(0)) / (k + 1)


def test_class_order_lifts_and_shuffling_lowers():
    """PAPER.md section 5, in small: the same noise, the same pictures, another order."""
    reader = Pictures()
    own = evaluator(reader, NoiseConfig(kind="optimal_q", during="eval", group_size=10))
    in_class, shuffled = (own.with_noise(order, 0, ALONE) for order in ("class", "shuffled"))
    assert in_class.top1 > own.per_image(ALONE).top1 > shuffled.top1
    assert in_class.class_mate_share == 1.0 and shuffled.class_mate_share < 0.4


def test_a_noise_without_group_size_mixes_the_running_batch():
    reader = Pictures()
    running = evaluator(reader, NoiseConfig(kind="optimal_q", during="eval", group_size=None), batch=10)
    fixed = evaluator(reader, NoiseConfig(kind="optimal_q", during="eval", group_size=10), batch=30)
    one, other = (own.with_noise("class", 0, ALONE) for own in (running, fixed))
    assert one.correct_top1 == other.correct_top1
    assert one.group_size == 10 and one.transductive
    assert running.model.batches == [10] * 6


def test_group_noise_does_not_change_with_the_batch_size():
    reader = Pictures()
    noise = NoiseConfig(kind="salt_and_pepper", strength=0.4, during="eval", group_size=4)
    results = [evaluator(reader, noise, batch=b).with_noise("shuffled", 1, ALONE) for b in (4, 8, 60)]
    assert results[0] == results[1] == results[2]
    assert results[0].correct_top1 != evaluator(reader).per_image(ALONE).correct_top1


@pytest.mark.parametrize("kind", ["gaussian", "salt_and_pepper"])
def test_a_picture_s_noise_at_the_image_does_not_change_with_batch_or_order(kind):
    """To the bit, as the network gets it; and it is noise."""
    reader = Pictures()
    noise = NoiseConfig(kind=kind, strength=0.4, during="eval")
    seen, results = [], []
    for order, batch in (("class", 1), ("class", 7), ("shuffled", 16), ("shuffled", 60)):
        own, inputs = evaluator(reader, noise, batch=batch), []
        own.model.register_forward_pre_hook(lambda module, args, inputs=inputs: inputs.append(args[0]))
        result = own.with_noise(order, 3, ALONE)
        ids = (
            np.argsort(reader.labels, kind="stable")
            if order == "class"
            else np.random.RandomState([3, 0]).permutation(N)
        )
        by_sample = torch.empty(N, 3, 2, 2)
        by_sample[torch.from_numpy(ids)] = torch.cat(inputs)
        seen.append(by_sample)
        results.append((result.correct_top1, result.correct_top5, result.transductive))
    assert all(torch.equal(other, seen[0]) for other in seen[1:])
    assert set(results) == {results[0]} and results[0][2] is False
    plain = torch.from_numpy(reader.pixels).permute(0, 3, 1, 2) / 255
    assert (seen[0] - plain).abs().mean() > 0.1


def test_fewer_than_five_classes_are_all_in_the_top_5():
    found = evaluator(Pictures(classes=3)).per_image(ALONE)
    assert found.correct_top5 == N > found.correct_top1


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_no_numbers_are_refused(value):
    own = evaluator(Pictures(), batch=16)
    own.model.register_forward_hook(
        lambda module, args, out: out.index_fill(0, torch.tensor([3]), value) if len(module.batches) == 2 else out
    )
    with pytest.raises(ValueError, match=r"not finite near sample 16"):
        own.per_image(ALONE)


def test_the_model_goes_back_to_training_and_evaluates_in_evaluation():
    own = evaluator(Pictures())
    own.model.train()
    own.per_image(ALONE)  # Linear asserts that it is not training
    assert own.model.training
    own.model.eval()
    own.per_image(ALONE)
    assert not own.model.training
    assert own.model.weight.grad is None


@pytest.mark.parametrize("drop", [True, False])
def test_a_picture_missed_or_seen_twice_is_noticed(drop, monkeypatch):
    from pipeline import evaluate as module

    class Wrong(module.EvaluationLoader):
        def __iter__(self):
            batches = list(super().__iter__())
            return iter(batches[:-1] if drop else [*batches[:-1], batches[0]])

    monkeypatch.setattr(module, "EvaluationLoader", Wrong)
    with pytest.raises(AssertionError, match="exactly once"):
        evaluator(Pictures(), batch=20).per_image(ALONE)


# Whole checkpoints


@pytest.fixture
def run(tmp_path) -> Path:
    """A run folder with one checkpoint of an untrained model of the small split's three classes."""
    config = TrainConfig(
        run=tmp_path / "run",
        seed=4,
        model=ModelConfig(
            name="vit_tiny_patch16_224", options={"depth": 1, "embed_dim": 24, "num_heads": 2, "patch_size": 8}
        ),
        data=DataConfig(image_size=32),
        # No evaluation takes RandAugment, so it must not keep one from reading a .beton.
        augment=AugmentConfig(randaugment="rand-m9-n2", eval_crop_share=0.5),
    )
    torch.manual_seed(0)
    model = create_model(config.model, 3, 32)
    folder = ckpt.temporary_folder(config.run, 12)
    folder.mkdir(parents=True)
    save_file(model.state_dict(), folder / WEIGHTS_NAME)
    ckpt.write_json(folder / ckpt.CONFIG_NAME, to_json(config) | {"classes": ["ant", "bee", "cat"], "step": 12})
    ckpt.publish_generation(config.run, 12, keep=2)
    ckpt.write_json(config.run / ckpt.CONFIG_NAME, to_json(config))
    return config.run


@pytest.mark.parametrize("form", ["wds", "ffcv"])
def test_evaluate_a_checkpoint(run, raw_split, form):
    noise = NoiseConfig(kind="optimal_q", site="blocks.0", group_size=4)
    results = evaluate(EvaluateConfig(run, raw_split, noise=noise, format=form, batch=10, workers=0), ALONE)
    assert [r.order for r in results] == ["manifest", "class", "shuffled"]
    assert [r.transductive for r in results] == [False, True, True]
    assert all(r.num_images == 24 for r in results)
    body = json.loads((run / "evaluate_optimal_q_blocks.0.json").read_text())
    assert body["step"] == 12 and body["accuracies"] == [r.to_json() for r in results]
    # The .beton of raw pixels and the tars hold the same pictures: no image may be answered otherwise.
    plain = evaluate(EvaluateConfig(run, raw_split, batch=24, workers=0, output=run / "own" / "x.json"), ALONE)
    assert plain == results[:1]
    assert (run / "own" / "x.json").is_file()


def test_a_checkpoint_says_what_it_is(run):
    checkpoint = open_checkpoint(run)
    assert open_checkpoint(checkpoint.folder) == checkpoint
    assert (checkpoint.classes, checkpoint.seed, checkpoint.step) == (("ant", "bee", "cat"), 4, 12)
    assert load_model(checkpoint).num_classes == 3


def test_other_classes_are_refused(run, raw_split, tmp_path):
    from data_prep.manifest import read_manifest, write_manifest

    manifest = dataclasses.replace(read_manifest(raw_split), classes=("x", "y", "z"))
    other = tmp_path / "other"
    other.mkdir()
    for path in raw_split.parent.iterdir():
        if path.is_file():
            (other / path.name).symlink_to(path)
    (other / raw_split.name).unlink()
    write_manifest(dataclasses.replace(manifest, folder=other))
    with pytest.raises(ValueError, match=r"\('x', 'y', 'z'\).*the checkpoint was trained on 3 \('ant'"):
        evaluate(EvaluateConfig(run, other / raw_split.name, workers=0), ALONE)


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


@pytest.mark.parametrize(("options", "name"), [({"batch": 0}, "batch"), ({"workers": -1}, "workers")])
def test_out_of_range_options_are_refused_by_name(options, name):
    with pytest.raises(ValueError, match=f"^{name} is"):
        EvaluateConfig(Path("x"), Path("y"), **options)
