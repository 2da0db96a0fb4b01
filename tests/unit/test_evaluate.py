"""Exact evaluation: the per-image figure depends on nothing but model and picture; the protocols as written out."""

import numpy as np
import pytest
import torch
from numbers_reader import InMemoryPictures

from pipeline.evaluator import Evaluator, Interrupted
from pipeline.noise.config import NoiseConfig
from pipeline.noise.inject import NoiseInjector
from pipeline.parallel import Ranks

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


def evaluator(
    reader: Pictures, noise: NoiseConfig | None = None, batch: int = 16, workers: int = 0, **options
) -> Evaluator:
    model = Linear(reader)
    injector = NoiseInjector(model, noise or NoiseConfig(), 2, seed=0)
    return Evaluator(model, injector, reader, batch, workers, **options)


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
        found = evaluator(Pictures(np.random.RandomState(seed).permutation(N))).per_image(ALONE)
        assert (found.correct_top1, found.correct_top5) == (plain.correct_top1, plain.correct_top5)
        assert found.mean_loss == pytest.approx(plain.mean_loss, rel=1e-6)


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
    assert len({(found.correct_top1, found.correct_top5, found.group_size) for found in results}) == 1
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
    with pytest.raises(ValueError, match=r"not finite at sample 19"):
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
    from pipeline import evaluator as module

    class Wrong(module.EvaluationLoader):
        def __iter__(self):
            batches = list(super().__iter__())
            return iter(batches[:-1] if drop else [*batches[:-1], batches[0]])

    monkeypatch.setattr(module, "EvaluationLoader", Wrong)
    said = "20 were missed, 0 repeated" if drop else "20 were missed, 20 repeated"
    with pytest.raises(AssertionError, match=f"60 pictures exactly once: {said}"):
        evaluator(Pictures(), batch=20).per_image(ALONE)


def test_answers_come_by_sample_id_whatever_part_of_the_split_is_asked_for():
    reader = Pictures()
    own = evaluator(reader, batch=7)
    whole = own.alone(ALONE)
    np.testing.assert_array_equal(whole.sample_ids, np.arange(N))
    np.testing.assert_array_equal(whole.labels, reader.labels)
    exact = exact_logits(reader, np.arange(N))
    np.testing.assert_array_equal(whole.predicted, exact.argmax(1))
    asked = np.random.RandomState(1).permutation(N)[:23]
    part = own.answers(asked, 4, ALONE)
    np.testing.assert_array_equal(part.sample_ids, np.sort(asked))
    np.testing.assert_array_equal(part.predicted, whole.predicted[np.sort(asked)])
    np.testing.assert_allclose(part.loss, whole.loss[np.sort(asked)], rtol=1e-5)


def test_the_loss_and_the_figures_are_those_of_exact_logits():
    reader = Pictures()
    found = evaluator(reader).per_image(ALONE)
    logits = exact_logits(reader, np.arange(N))
    shares = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    assert found.mean_loss == pytest.approx(-np.log(shares[np.arange(N), reader.labels]).mean(), rel=1e-6)
    assert found.top1_interval.low < found.top1 < found.top1_interval.high
    assert found.near_ties == ()


def test_pictures_between_two_classes_are_listed_by_name():
    """Two classes of one sign have equal logits, but for rounding: every picture answered so is a near tie."""
    reader = Pictures()
    reader.signs[1] = reader.signs[0]
    found = evaluator(reader).per_image(ALONE)
    tied = np.flatnonzero(exact_logits(reader, np.arange(N)).argmax(1) == 0)
    assert len(tied) > 5
    assert [(tie.sample_id, tie.name) for tie in found.near_ties] == [(i, f"number {i}") for i in tied]


def test_in_16_bits_no_rounding_bound_is_claimed():
    assert evaluator(Pictures(), half_dtype=torch.bfloat16).per_image(ALONE).near_ties is None


def test_float32_is_whole_during_a_pass_alone():
    """cuDNN's TF32 would answer otherwise in another batch; in 16 bits it is left as it was."""
    for half_dtype, allowed in ((None, False), (torch.bfloat16, True)):
        own, seen = evaluator(Pictures(), half_dtype=half_dtype), []
        own.model.register_forward_hook(lambda *_, seen=seen: seen.append(torch.backends.cudnn.allow_tf32))
        own.per_image(ALONE)
        assert set(seen) == {allowed} and torch.backends.cudnn.allow_tf32


def test_a_split_of_some_classes_is_answered_among_these_alone():
    """As ImageNet-R: a model of six classes on pictures of three, in another order."""
    whole, some = Pictures(), Pictures()
    columns = np.array([4, 0, 3])
    ids = np.flatnonzero(np.isin(whole.labels, columns))
    some.labels = np.array([columns.tolist().index(label) for label in whole.labels[ids]])
    some.pixels, some.classes = whole.pixels[ids], ("e", "a", "d")
    found = evaluator(some, columns=columns).alone(ALONE)
    expected = exact_logits(whole, ids)[:, columns]
    np.testing.assert_array_equal(found.predicted, expected.argmax(1))
    np.testing.assert_array_equal(found.right, expected.argmax(1) == some.labels)
    assert 0 < found.top1 < len(ids) and found.top1 != evaluator(whole).answers(ids, 1, ALONE).top1


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ([], "none of the model's classes"),
        ([0, 1], "2 of the model's classes stand for the 6 of the data"),
        ([0, 1, 2, 3, 4, 4], "5 of the model's classes stand for the 6 of the data"),
        ([0, 1, 2, 3, 4, 6], "class 6 of a model that has 6"),
    ],
)
def test_classes_that_the_model_has_not_are_refused(columns, message):
    with pytest.raises(ValueError, match=message):
        evaluator(Pictures(), columns=np.array(columns, np.int64)).alone(ALONE)


def test_no_picture_and_pictures_without_labels_are_refused():
    with pytest.raises(ValueError, match="no picture to evaluate: name data"):
        evaluator(Pictures()).answers(np.arange(0), 1, ALONE)
    for bad in (-1, CLASSES):
        reader = Pictures()
        reader.labels[[7, 33]] = bad
        with pytest.raises(ValueError, match=r"^number 7: 2 of 60 pictures.* have no label.*write the shards again"):
            evaluator(reader).per_image(ALONE)


def test_a_pass_that_is_not_wanted_is_given_up_and_leaves_the_model_as_it_was():
    own, asked = evaluator(Pictures(), batch=10), []
    own.model.train()
    with pytest.raises(Interrupted):
        own.alone(ALONE, lambda: len(asked) < 3 and not asked.append(None))
    assert own.model.batches == [10] * 3 and own.model.training and own.injector.enabled
