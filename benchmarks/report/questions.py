"""Every question of `python -m benchmarks`, and how its results are shown. A new one needs an entry and its blocks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

from benchmarks.report import ranks, speed, trials
from benchmarks.report.blocks import Block, Group, Section
from benchmarks.report.results import ALIKE, Alike, Result, Selected, select


class Question(NamedTuple):
    title: str
    asked: str
    variant: Callable[[Result], str]
    """What makes a result another measurement, and not a newer one of the same; the heading of its blocks."""
    blocks: Callable[[Sequence[Result]], Iterable[Block]]
    """Of one variant."""
    alike: Alike = ALIKE
    """What results of one of its tables share."""


QUESTIONS = {
    "accuracy": Question(
        "Accuracy",
        "What does each noise give a picture on its own, what do its batch mates add, and what is published? The grid "
        "of the paper's tables, on small pictures.",
        trials.accuracy_variant,
        trials.accuracy_blocks,
        trials.ACCURACY,
    ),
    "loader": Question(
        "Loaders",
        "How many training pictures a second do this project's loaders give, beside those that people use, on the same "
        "pictures and cores? How long until the first batch, and in how much memory?",
        speed.loader_variant,
        speed.loader_blocks,
    ),
    "noise": Question(
        "Noise operators",
        "How many elements a second does each noise take, beside the torch expression that a user would write, eager "
        "and compiled, and beside a plain copy?",
        speed.noise_variant,
        speed.noise_blocks,
    ),
    "draws": Question(
        "Draws",
        "Have a billion draws of the noise operators the distribution that they should have?",
        trials.draws_variant,
        trials.draws_blocks,
        trials.DRAWS,
    ),
    "train": Question(
        "Training steps",
        "What does the trainer add to a bare loop, ZeRO to DDP, and what do resuming and saving cost? On one GPU: how "
        "many images a second beside timm's step?",
        speed.train_variant,
        speed.train_blocks,
    ),
    "scaling": Question(
        "Weak scaling",
        "How much of a rank's speed is left on many ranks, and how much would be on hundreds of GPUs?",
        ranks.scaling_variant,
        ranks.scaling_blocks,
    ),
    "goodput": Question(
        "Goodput",
        "Which share of the time goes into steps that count, in a run whose ranks are killed at random?",
        ranks.goodput_variant,
        ranks.goodput_blocks,
    ),
    "cifar": Question(
        "CIFAR-10 from scratch",
        "Trained from scratch with noise and without: how many pictures of CIFAR-10 are answered rightly, and which "
        "part of a gain is transductive?",
        trials.cifar_variant,
        trials.cifar_blocks,
        trials.CIFAR,
    ),
    "audit": Question(
        "Audit",
        "What does it buy the audit to keep the features before the noise, and how does its memory grow with the "
        "pictures?",
        speed.audit_variant,
        speed.audit_blocks,
    ),
    "shards": Question(
        "Shards",
        "How many pictures a second does data_prep write, reduce, index and plan, beside plain writes, webdataset and "
        "FFCV's writer?",
        speed.shards_variant,
        speed.shards_blocks,
    ),
}


def sections_of(results: Sequence[Result], latest: bool) -> list[Section]:
    """A section for each question that has results, in the order above; those without an entry come last.

    latest: see results.select. Errors: ValueError for results that do not compare, or are damaged; naming the file.
    """
    named = list(dict.fromkeys([*QUESTIONS, *(result.question for result in results)]))
    return [_section(name, of_one, latest) for name in named if (of_one := [r for r in results if r.question == name])]


def chosen(results: Sequence[Result], name: str, latest: bool) -> Selected:
    """The results of a question that count."""
    question = _question(name)
    return select([r for r in results if r.question == name], question.variant, question.alike, latest)


def _question(name: str) -> Question:
    return QUESTIONS.get(name) or Question(name.capitalize(), "", _all_conditions, _common_blocks)


def _section(name: str, results: Sequence[Result], latest: bool) -> Section:
    question = _question(name)
    found = chosen(results, name, latest)
    variants: dict[str, list[Result]] = {}
    for result in found.chosen:
        variants.setdefault(question.variant(result), []).append(result)
    groups = [Group(variant, list(question.blocks(of_one))) for variant, of_one in variants.items()]
    older = Counter(result.source for result in found.superseded)
    return Section(name, question.title, question.asked, groups, list(older.items()))


def _all_conditions(result: Result) -> str:
    return "; ".join(f"{name} {value}" for name, value in result.conditions.items())


def _common_blocks(results: Sequence[Result]) -> Iterator[Block]:
    for part, of_part in speed.by_part(results).items():
        yield speed.common_block(of_part, part or of_part[0].question, lambda name: False)
