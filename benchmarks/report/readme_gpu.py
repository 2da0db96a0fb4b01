"""README.md's figures from GPUs: noise operators, training steps and CIFAR-10; a table for each card, no CPU in it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from benchmarks.harness import Row, Spread, figures, ratio
from benchmarks.noise_aims import Judged, decimals, judged
from benchmarks.report.checks import check_cifar
from benchmarks.report.markdown import table
from benchmarks.report.questions import QUESTIONS, chosen
from benchmarks.report.readme_accuracy import filled
from benchmarks.report.results import Alike, Result, check_alike
from benchmarks.report.speed import aims_kept, by_part, spread_of, training_verdict
from benchmarks.report.trials import CIFAR

MODELS = {
    "vit_tiny_patch16_224": "ViT-T",
    "vit_small_patch16_224": "ViT-S",
    "vit_base_patch16_224": "ViT-B",
    "vit_large_patch16_224": "ViT-L",
}
_PARTS = Alike(("shape", "compared with"))  # one table is of several parts, each with a first of its own
_SPREAD = "median, and in brackets lowest to highest"
_OTHERS = ("copy", "torch.compile", "eager")  # with a column each


def gpu_noise_figures(results: Sequence[Result], latest: bool) -> str:
    """Each operator beside a copy and what a user would write; what noise costs a model's step."""
    return _of_each_card("noise", "How fast the noises are on a GPU", results, latest, _noise_of_a_card)


def gpu_train_figures(results: Sequence[Result], latest: bool) -> str:
    """Whole training steps beside timm's."""
    return _of_each_card("train", "How fast a training step is on a GPU", results, latest, _train_of_a_card)


def gpu_cifar_figures(results: Sequence[Result], latest: bool) -> str:
    """The clean twin and the noisy one: per image, then what their groups make of them."""
    return _of_each_card("cifar", "The same on all of CIFAR-10, by larger models on a GPU,", results, latest, _cifar)


def _of_each_card(
    question: str, what: str, results: Sequence[Result], latest: bool, text_of: Callable[[Sequence[Result]], str]
) -> str:
    """A text for each variant that a GPU has measured; the variant names the card."""
    variants: dict[str, list[Result]] = {}
    for result in chosen(results, question, latest).chosen:
        if result.conditions.get("device") == "cuda":
            variants.setdefault(QUESTIONS[question].variant(result), []).append(result)
    if not variants:
        return filled(f"{what} has not been measured yet: `make gpu PART={question}` does it.")
    return "\n\n".join(text_of(found) for found in variants.values())


def _where(result: Result) -> str:
    commit = f"commit {result.row['environment']['commit'][:7]}"
    parts = (result.source.hardware, result.source.versions, commit, result["note"])
    return "; ".join(part for part in parts if part)


# ---- noise ----


def _noise_of_a_card(found: Sequence[Result]) -> str:
    check_alike(found, _PARTS)
    first = found[0]
    intro = (
        f"Noise operators (`python -m benchmarks noise`) on {_where(first)}; {first.condition('dtype')}, tensors of "
        f"{first.number('megabytes'):,g} MB; n = {first.condition('rounds')} rounds in turn, {_SPREAD}:"
    )
    lines, sentences = [], []
    for part, of_part in by_part(found).items():
        rows = {result.name: result.timed for result in of_part}
        verdicts = list(judged([(rows[result.name], aims_kept(result)) for result in of_part]))
        if "operator" in rows:
            lines.append(_operator_line(part, rows, verdicts))
        elif "none" in rows:
            sentences.append(_step_sentence(of_part[0], rows, verdicts))
    header = ["", "GB/s", *(f"rate over {_name(other)}" for other in _OTHERS), "aims"]
    operators = [table(header, lines, [False] * len(header))] if lines else []
    return "\n\n".join((filled(intro), *operators, *map(filled, sentences)))


def _name(other: str) -> str:
    return {"copy": "a copy's", "eager": "eager torch's"}.get(other, f"{other}'s")


def _operator_line(part: str, rows: dict[str, Row], verdicts: Sequence[Judged]) -> list[str]:
    own = rows["operator"]
    moved = "" if own.gigabytes_per_second is None else figures(own.gigabytes_per_second)
    beside = [figures(ratio(own, rows[other])) if other in rows else "" for other in _OTHERS]
    return [part, moved, *beside, "; ".join(map(_aim, verdicts))]


def _aim(one: Judged) -> str:
    """What has a column of its own is not said again."""
    what = "" if one.aim.quantity == "rate" else "time "
    measured = "" if one.aim.over in _OTHERS else f", it is {decimals(one.measured)}"
    return f"{what}{one.aim.words} times {_name(one.aim.over)}: {one.verdict}{measured}"


def _step_sentence(first: Result, rows: dict[str, Row], verdicts: Sequence[Judged]) -> str:
    """What noise costs a model, of the part whose first contestant has none."""
    aims = {one.contestant: f" (aim: {one.aim.words}, {one.verdict})" for one in verdicts}
    plain = rows["none"]
    times = [
        f"{decimals(ratio(plain, row))} with {name}{aims.get(name, '')}"
        for name, row in rows.items()
        if row is not plain
    ]
    model = plain.settings.partition(",")[0]
    return (
        f"With noise at all its blocks, a step of {MODELS.get(model, model)}, forward and backward, at a batch of "
        f"{first.condition('shape')[0]}, takes so many times as long as without: {'; '.join(times)}."
    )


# ---- train ----


def _train_of_a_card(found: Sequence[Result]) -> str:
    check_alike(found, Alike())
    first = found[0]
    names = ("dtype", "image_size", "noise", "rounds", "steps")
    dtype, side, noise, rounds, steps = (first.condition(name) for name in names)
    how = "by torch.compile" if first.condition("compile") else "eager"
    intro = (
        f"Training steps (`python -m benchmarks train --device cuda`) on {_where(first)}; {dtype}, {side} pixels, "
        f"{how}; the pictures are on the device; noisy: {noise}; n = {rounds} rounds of {steps} steps in turn, "
        f"{_SPREAD}:"
    )
    lines = [
        [
            f"{MODELS.get(part, part)}, batch {result['batch']}" if number == 0 else "",
            result.name,
            _whole(spread_of(result, "items_per_second")),
            decimals(spread_of(result, "ratio")),
            "" if result["mfu"] is None else _percent(spread_of(result, "mfu")),
            training_verdict(result),
        ]
        for part, of_part in by_part(found).items()
        for number, result in enumerate(of_part)
    ]
    header = ["", "step", "images/s", "rate over timm's", "MFU, %", "aims"]
    return f"{filled(intro)}\n\n{table(header, lines, [False] * len(header))}"


def _whole(value: Spread) -> str:
    form = ",.0f" if value.median >= 100 else ".3g"
    return f"{value.median:{form}} ({value.min:{form}} to {value.max:{form}})"


def _percent(share: Spread) -> str:
    median, low, high = (100 * one for one in share)
    return f"{median:.1f} ({low:.1f} to {high:.1f})"


# ---- cifar ----


def _cifar(found: Sequence[Result]) -> str:
    from benchmarks.cifar_summary import CLEAN, NOISY, identity, part, summary_table  # with it comes torch

    check_cifar(found)
    check_alike(found, CIFAR)
    rows = [result.row for result in found]
    first, twins = found[0], [twin for twin in (CLEAN, NOISY) if any(row["contestant"] == twin for row in rows)]
    by_label: dict[str, dict[str, list[str]]] = {}
    for label, twin, *cells in summary_table(rows)[2]:
        by_label.setdefault(label, {})[twin] = cells
    lines = []
    for number, (label, of_twin) in enumerate(by_label.items()):
        k, mates, *_ = next(iter(of_twin.values()))
        line = [label, k if mates else "", mates, *(of_twin[twin][-1] for twin in twins)]
        lines.append([f"**{cell}**" if cell and number == 0 else cell for cell in line])
    names = ("pictures", "epochs", "depth", "width", "patch", "dtype", "noisy_twin")
    pictures, epochs, depth, width, patch, dtype, noise = (first.condition(name) for name in names)
    intro = (
        f"CIFAR-10 from scratch (`python -m benchmarks cifar`) on {_where(first)}: {pictures}; "
        f"{epochs} epochs of {depth} blocks of width {width}, patches of {patch}, {dtype}; noisy: with {noise}; "
        "top-1 in percent, mean, and in brackets lowest to highest:"
    )
    seeds = {twin: sum(row["contestant"] == twin for row in rows) for twin in twins}
    header = ["", "k", "class mates in the group"]
    header += [f"{twin}, {count} seed{'s' if count > 1 else ''}" for twin, count in seeds.items()]
    parting = part(rows)
    words = "Every line with class mates is *transductive*: a picture's answer hangs on the others of its group. "
    words += f"At inference {identity(rows)}." + ("" if parting is None else f" {parting.sentence()}")
    return "\n\n".join((filled(intro), table(header, lines, [False] * len(header)), filled(words)))
