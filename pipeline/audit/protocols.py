"""The nine protocols on anything that answers: no files, no loaders, nothing but torch and numpy.

A group is `noise.group_size` consecutive entries of an order. Whoever answers sees an order and a noise alone, so an
array of features will do, or a loader and a whole model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from pipeline.accuracy import compare, compare_groups
from pipeline.answers import Answers, answers_of, joined
from pipeline.audit.rows import NAMES, Row, in_words
from pipeline.data.order import class_mate_share, evaluation_batches, permutation, shuffled_order
from pipeline.intervals import mcnemar
from pipeline.noise.config import LINEAR_KINDS, NoiseConfig

OnTurn = Callable[[str], None]
_AT_ONCE = 4096  # pictures


class Respondent(Protocol):
    """A model on a labelled set of pictures; sample ids are 0 to n - 1."""

    labels: np.ndarray
    """int64 (n,)."""
    plain_logits: Tensor
    """float (n, classes) by sample id, noise off, on the CPU."""

    def answers(self, noise: NoiseConfig, order: np.ndarray) -> Answers:
        """To the pictures `order` (sample ids, int64; some of them will do, and one may be in several groups), in that
        order, mixed in groups of noise.group_size of its entries; the last group may be smaller."""
        ...


@dataclass(frozen=True)
class Settings:
    """How large the groups are, and what is drawn."""

    ks: tuple[int, ...] = (2, 5, 10, 25, 50)
    """Group sizes, each above 1, taken once and from the smallest on; k = 1 is always run."""
    shuffles: int = 3
    """Shuffled orders, each by a seed of its own."""
    shuffle_seed: int = 0
    """The first of these seeds, and that of the victims."""
    victims: int = 500
    """Pictures that are each put among k - 1 of another class."""

    def __post_init__(self) -> None:
        if not self.ks:
            raise ValueError("ks is empty: name group sizes, such as 2 5 10 25 50")
        if wrong := [k for k in self.ks if k < 2]:
            raise ValueError(f"ks has {wrong[0]}: a group mixes at least 2 pictures, and k = 1 is run in any case")
        object.__setattr__(self, "ks", tuple(sorted(set(self.ks))))  # else rows would stand twice, plots go back
        for name in ("shuffles", "victims"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"{name} is {value}: at least 1")
        if self.shuffle_seed < 0:
            raise ValueError(f"shuffle_seed is {self.shuffle_seed}: at least 0")

    @property
    def seeds(self) -> range:
        return range(self.shuffle_seed, self.shuffle_seed + self.shuffles)


def run_protocols(
    respondent: Respondent,
    noises: Sequence[NoiseConfig],
    settings: Settings,
    by_class: np.ndarray,
    twin: Answers | None = None,
    on_turn: OnTurn = lambda what: None,
) -> list[Row]:
    """The rows of all protocols, in the order of their numbers; 2 to 5, 7 and 8 for each noise.

    by_class: sample ids, int64 (n,), class after class: ImageFolder's order. twin: the clean twin's answers per image.
    on_turn hears what comes next. Errors: as check_protocols.
    """
    n = len(respondent.labels)
    check_protocols(n, noises, settings)
    plain = _answers_of(respondent, np.arange(n), 1)
    rows = [Row(1, NAMES[1], 1, "any", counts=(plain.top1,), n=n)]
    for noise in noises:
        runs = _Runs(respondent, noise, settings, by_class, plain, on_turn)
        for protocol in (runs.alone, runs.in_class_order, runs.shuffled, runs.one_of_each, runs.adversarial):
            rows += protocol()
    rows += [_voted(respondent, by_class, k, plain) for k in settings.ks]
    rows.append(twin_row(plain, twin))
    return sorted(rows, key=lambda row: row.protocol)  # stable: noises and ks stay as they were asked for


def check_protocols(n: int, noises: Sequence[NoiseConfig], settings: Settings) -> None:
    """Errors: ValueError where n pictures are fewer than the largest k, or a noise mixes none at inference."""
    if n < (most := max(settings.ks)):
        raise ValueError(f"there are {n} pictures, fewer than k = {most}: name smaller groups with --ks")
    for noise in noises:
        if noise.kind not in LINEAR_KINDS or not noise.active(training=False):
            raise ValueError(f"the audit is of noises that mix pictures at inference, not {noise.describe()}")


@dataclass(frozen=True)
class _Runs:
    """The protocols of one noise."""

    respondent: Respondent
    noise: NoiseConfig
    settings: Settings
    by_class: np.ndarray
    plain: Answers
    on_turn: OnTurn

    def alone(self) -> list[Row]:
        """k = 1: the identity, so every picture must get the plain answer; but for those that rounding may turn."""
        order = np.arange(len(self.by_class))
        found = self._answers(2, 1, order)
        differing = np.flatnonzero(found.predicted != self.plain.predicted)
        ties = int(np.isin(differing, self.plain.near_ties).sum())
        remark = f"{ties} more differ whose first two logits are closer than float32's rounding" if ties else ""
        return [self._row(2, 1, "any", [found], order, remark=remark, differing=len(differing) - ties)]

    def in_class_order(self) -> list[Row]:
        rows = []
        for k in self.settings.ks:
            found = self._answers(3, k, self.by_class)
            row = self._row(3, k, "class", [found], self.by_class, remark=_small_classes(self.respondent.labels, k))
            voted = _answers_of(self.respondent, self.by_class, k)
            rows.append(replace(row, p_voting=compare_groups(voted, found, k)))
            official = replace(row, protocol=8, name=NAMES[8], measure="running_mean", counts=(), p=None)
            rows.append(replace(official, figure=running_mean(found.right, k)))
        return rows

    def shuffled(self) -> list[Row]:
        rows = []
        orders = [shuffled_order(len(self.by_class), seed) for seed in self.settings.seeds]
        for k in self.settings.ks:
            found = [self._answers(4, k, order) for order in orders]
            row = self._row(4, k, "shuffled", found, *orders)
            rows.append(replace(row, seed_ps=tuple(self._p(answers, k) for answers in found)))
        return rows

    def one_of_each(self) -> list[Row]:
        order = round_robin(self.respondent.labels, self.by_class)
        classes = len(np.unique(self.respondent.labels))
        rows = []
        for k in self.settings.ks:
            row = self._row(5, k, "one each", [self._answers(5, k, order)], order)
            if row.class_mates:
                why = "more pictures in a group than classes" if k > classes else "the smaller classes are used up"
                row = replace(row, remark=f"{why}: some mates are of one class")
            rows.append(row)
        return rows

    def adversarial(self) -> list[Row]:
        """How often a victim is answered as its mates' class, and how often it is with the noise off."""
        rows = []
        for k in self.settings.ks:
            order = victims_among_others(self.respondent.labels, k, self.settings.victims, self.settings.shuffle_seed)
            if not len(order):
                remark = f"not run: no other class has {k - 1} pictures"
                rows.append(self._row(7, k, "a, rest b", [], order, remark=remark))
                continue
            victims, theirs = order[::k], self.respondent.labels[order[1::k]]
            found = self._answers(7, k, order).predicted[::k]
            off = self.plain.predicted[victims]  # plain answers are by id
            row = self._row(7, k, "a, rest b", [], order)
            swayed, anyway = found == theirs, off == theirs
            p = mcnemar(int((swayed & ~anyway).sum()), int((anyway & ~swayed).sum()))
            counts, beside = (int(swayed.sum()),), int(anyway.sum())
            rows.append(replace(row, measure="answered_b", n=len(victims), counts=counts, beside=beside, p=p))
        return rows

    def _p(self, found: Answers, k: int) -> float:
        """That it is as good as the model per image."""
        return compare_groups(found, self.plain.at(found.sample_ids), k)  # plain answers are by id

    def _answers(self, protocol: int, k: int, order: np.ndarray) -> Answers:
        self.on_turn(f"{self.noise.kind} at {self.noise.site}, k = {k}: {NAMES[protocol]}")
        found = self.respondent.answers(replace(self.noise, group_size=k), order)
        assert np.array_equal(found.sample_ids, order), "answers come in the order that was asked for"
        return found

    def _row(
        self,
        protocol: int,
        k: int,
        order: str,
        found: Sequence[Answers],
        *orders: np.ndarray,
        remark: str = "",
        differing: int | None = None,
    ) -> Row:
        mixed = k > 1 and protocol != 7  # of a victim's mates none is of its class
        shares = [class_mate_share(self.respondent.labels[ids], k) for ids in orders if mixed]
        return Row(
            protocol,
            NAMES[protocol],
            k,
            order,
            noise=replace(self.noise, group_size=1).describe(),
            site=self.noise.site,
            transductive=k > 1,
            counts=tuple(answers.top1 for answers in found),
            n=len(self.by_class),
            class_mates=float(np.mean(shares)) if shares else 0.0 if protocol == 7 else None,
            differing=differing,
            p=self._p(found[0], k) if len(found) == 1 else None,
            remark=remark,
        )


def running_mean(right: np.ndarray, k: int) -> float:
    """The mean over batches of k of the accuracy so far, as the official code prints it; right: bool (n,), in order."""
    seen = np.append(np.arange(k, len(right), k), len(right))
    return float((np.cumsum(right)[seen - 1] / seen).mean())


def round_robin(labels: np.ndarray, by_class: np.ndarray) -> np.ndarray:
    """One picture of each class after another, then the next of each: any k <= classes in a row are of k classes.

    Until the smaller classes are used up: their turn is then left out.
    """
    in_order = labels[by_class]
    first = np.searchsorted(in_order, in_order)  # class after class, so the labels ascend
    return by_class[np.lexsort((in_order, np.arange(len(by_class)) - first))]


def victims_among_others(labels: np.ndarray, k: int, victims: int, seed: int) -> np.ndarray:
    """Groups of k: a picture, then k - 1 of one other class, all drawn by the seed; no picture is a victim twice.

    `victims` groups, or as many as there are. Empty where a class of k - 1 pictures stands beside no other.
    """
    n, counts = len(labels), np.bincount(labels)
    ids_of = {int(label): np.flatnonzero(labels == label) for label in np.flatnonzero(counts >= k - 1)}
    groups: list[np.ndarray] = []
    for victim in permutation(n, seed, 1).tolist():
        if len(groups) == victims:
            break
        if others := [label for label in ids_of if label != labels[victim]]:
            drawn = np.random.RandomState([seed & 0xFFFFFFFF, k, victim])
            mates = ids_of[others[drawn.randint(len(others))]]
            groups.append(np.append(victim, drawn.permutation(mates)[: k - 1]))
    return np.concatenate([np.empty(0, np.int64), *groups]).astype(np.int64)


def averaged(logits: Tensor, k: int) -> Tensor:
    """Each of (B, classes) becomes the mean of its k consecutive ones; the last group may be smaller."""
    return torch.cat([group.mean(0, keepdim=True).expand_as(group) for group in logits.split(k)])


def _answers_of(respondent: Respondent, order: np.ndarray, k: int) -> Answers:
    """Without noise, logits averaged over groups of k; some at a time, for log-softmax in float64 wants room."""

    def to(ids: np.ndarray) -> Answers:
        labels = torch.from_numpy(respondent.labels[ids])
        return answers_of(averaged(respondent.plain_logits[ids], k), labels, torch.from_numpy(ids))

    return joined(map(to, evaluation_batches(order, _AT_ONCE, k, rank=0, world_size=1)), len(order))


def _voted(respondent: Respondent, by_class: np.ndarray, k: int, plain: Answers) -> Row:
    found = _answers_of(respondent, by_class, k)
    return Row(
        6,
        NAMES[6],
        k,
        "class",
        transductive=True,
        counts=(found.top1,),
        n=len(found),
        class_mates=class_mate_share(respondent.labels[by_class], k),
        p=compare_groups(found, plain.at(by_class), k),
        remark=_small_classes(respondent.labels, k),
    )


def _small_classes(labels: np.ndarray, k: int) -> str:
    """What is to be said of class order."""
    small = np.unique(labels, return_counts=True)[1].min() < k
    return "classes of fewer than k pictures: groups mix classes" if small else ""


def twin_row(own: Answers, twin: Answers | None) -> Row:
    """The clean twin's accuracy per image, and whether both are told apart on the same pictures."""
    if twin is None:
        return Row(9, NAMES[9], 1, "any", remark="not run: name the clean twin with --twin")
    found = compare(own, twin)
    return Row(
        9,
        NAMES[9],
        1,
        "any",
        counts=(twin.top1,),
        n=len(twin),
        p=found.p_value,
        remark=f"{found.only_one:,} pictures only here right, {found.only_other:,} only there; "
        f"p = {in_words(found.p_value)} (McNemar, exact)",
    )
