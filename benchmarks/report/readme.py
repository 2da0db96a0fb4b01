"""The measured figures of README.md: what stands between `<!-- figures: NAME -->` and `<!-- end -->`, from results."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from benchmarks.harness import Spread
from benchmarks.report.markdown import table
from benchmarks.report.questions import chosen
from benchmarks.report.readme_accuracy import PLOT, accuracy_figures, draw_accuracy, filled
from benchmarks.report.readme_gpu import MODELS, gpu_cifar_figures, gpu_noise_figures, gpu_train_figures
from benchmarks.report.results import ALIKE, Alike, Result, check_alike
from benchmarks.report.speed import LOADER_LABELS, OWN_LOADERS, spread_of
from pipeline.page.drawing import Theme

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_BLOCK = re.compile(r"(<!-- figures: ([\w-]+) -->\n).*?(?=<!-- end -->)", re.DOTALL)
_COMPARED = Alike(("compared with",))  # one sentence is of several parts, each with a first of its own
_NUMBERS = {1: "one", 2: "two", 4: "four", 8: "eight"}


def refreshed(text: str, results: Sequence[Result], latest: bool, name: str, plots: str) -> str:
    """A README with its figures from results.

    name: of the README, for messages. plots: the folder with its plots, as the README names it. Errors: ValueError
    naming the README, and what it asks for in vain.
    """
    if not _BLOCK.search(text):
        raise ValueError(
            f"{name} has no `<!-- figures: {next(iter(BLOCKS))} -->` with `<!-- end -->` below it: add them"
        )

    def of(match: re.Match[str]) -> str:
        if match[2] not in BLOCKS:
            raise ValueError(f"{name} asks for figures: {match[2]}, there are {', '.join(BLOCKS)}: rename it there")
        return f"{match[1]}\n{BLOCKS[match[2]](results, latest, plots)}\n\n"

    return _BLOCK.sub(of, text)


def loader_figures(results: Sequence[Result], latest: bool) -> str:
    found = chosen(results, "loader", latest).chosen
    full = [result for result in found if "short side" not in result.conditions.get("pictures", "")]
    rates, starts, memory = (_by_name(full, part) for part in ("an epoch", "first batch", "memory"))
    _need(rates, "loader", "an epoch", LOADER_LABELS)
    for name, others in (("first batch", starts), ("memory", memory)):
        _need(others, "loader", name, rates)
    check_alike([*rates.values(), *starts.values(), *memory.values()], _COMPARED)
    lines = []
    for name in _fastest_first(rates):
        rate, start = spread_of(rates[name], "items_per_second").median, spread_of(starts[name], "wall_seconds").median
        megabytes, processes = memory[name]["own_bytes"] / 1e6, memory[name]["processes"]
        cells = [LOADER_LABELS[name], f"{rate:,.0f}", _seconds(start), f"{megabytes:.0f} MB, {processes}"]
        lines.append([f"**{cell}**" for cell in cells] if name in OWN_LOADERS else cells)
    first = rates[next(iter(rates))]
    count = re.search(r"(\d+) real pictures", first.condition("pictures"))
    pictures = f"{count[1]} ImageNet pictures of original size" if count else first.condition("pictures")
    where = f"; {first['note']}" if first["note"] else ""
    intro = (
        f"On {pictures}, RandomResizedCrop({first.condition('image_size')}), uint8 batches{where}; n = {first['n']}:"
    )
    header = ["", "images/s", "to the first batch", "memory, processes"]
    return f"{filled(intro)}\n\n{table(header, lines, [False] * 4)}\n\n{filled(_reduced_figures(found))}"


def _reduced_figures(found: Sequence[Result]) -> str:
    """One sentence: the project's own, the two best of the others, and the range of the rest."""
    small = [result for result in found if "short side at most 256" in result.conditions.get("pictures", "")]
    rates = _by_name(small, "an epoch")
    _need(rates, "loader --pictures 256", "an epoch", LOADER_LABELS)
    check_alike(list(rates.values()), ALIKE)
    ranked = {name: f"{spread_of(rates[name], 'items_per_second').median:,.0f}" for name in _fastest_first(rates)}
    own = [rate for name, rate in ranked.items() if name in OWN_LOADERS]
    others = [(LOADER_LABELS[name], rate) for name, rate in ranked.items() if name not in OWN_LOADERS]
    (first, best), (second, next_best), *rest = others
    return (
        f"At 256 pixels: {', '.join(own[:-1])} and {own[-1]} for the first three, {best} for {first}, {next_best} for "
        f"{second}, {rest[-1][1]} to {rest[0][1]} for the others."
    )


def train_figures(results: Sequence[Result], latest: bool) -> str:
    found = [r for r in chosen(results, "train", latest).chosen if "device" not in r.conditions]
    aims = _by_name(found, "aims")
    saves = {r.part.partition(", ")[2]: r for r in found if r.name == "save"}

    def time(what: str) -> Spread:
        _need(aims, "train", "aims", [what])
        return spread_of(aims[what], "measured")

    def shown(what: str) -> str:
        ratio = time(what)
        return f"{ratio.median:.2f} ({ratio.min:.2f} to {ratio.max:.2f})"

    lines = [["the trainer's step under DDP, to a bare DDP loop", shown("step: trainer ddp over bare ddp")]]
    for number in (1, 2):
        trainer, bare = (f"step: {who} zero{number} over {who} ddp" for who in ("trainer", "bare"))
        lines.append([f"ZeRO-{number}'s step to DDP's; the bare engines'", f"{shown(trainer)}; {shown(bare)}"])
    resumed = shown("resume: resume at 99 % over resume at 1 %")
    lines.append(["resuming at 99 % of an epoch to resuming at 1 %", resumed])
    held = [
        f"{time(f'checkpoint, {model}: save over bare copy').median:.2f} "
        f"({1e3 * spread_of(save, 'wall_seconds').median:.0f} ms)"
        for model, save in saves.items()
    ]
    models = ", ".join(MODELS.get(model, model) for model in saves)
    lines.append([f"how long a checkpoint holds a step up, to a bare copy of the state: {models}", "; ".join(held)])
    check_alike([*aims.values(), *saves.values()], _COMPARED)
    first = next(iter(aims.values()))
    ranks, side = (first.condition(name) for name in ("ranks", "image_size"))
    model = MODELS.get(first.condition("model"), first.condition("model"))
    intro = (
        f"What training costs beside a bare loop in the same file (`python -m benchmarks train`; "
        f"{_NUMBERS.get(ranks, ranks)} ranks on {first.source.hardware}, {model} at {side} pixels, "
        f"n = {first.condition('rounds')}, time ratios with lowest and highest):"
    )
    return f"{filled(intro)}\n\n{table(['', 'ratio'], lines, [False, False])}"


def audit_figures(results: Sequence[Result], latest: bool) -> str:
    """What it buys to keep the features, in one sentence."""
    found = [r for r in chosen(results, "audit", latest).chosen if r.name == "features kept"]
    by_part = {result.part: result for result in found}
    _need(by_part, "audit", "features kept", ("nine", "grid"))
    check_alike(list(by_part.values()), _COMPARED)
    nine, grid = (
        f"{ratio.median:.2f} ({ratio.min:.2f} to {ratio.max:.2f}) times as fast"
        for ratio in (spread_of(by_part[part], "ratio") for part in ("nine", "grid"))
    )
    first = by_part["nine"]
    model, side, count = (first.condition(name) for name in ("model", "image_size", "images"))
    return filled(
        f"On {first.source.hardware}, {MODELS.get(model, model)} at {side} pixels and {count} pictures, all nine "
        f"protocols at one k go {nine} as nine whole passes, the default grid of k and orders {grid} as by whole "
        f"passes (`python -m benchmarks audit`; n = {first['n']})."
    )


# A block's text; plots: the folder with its plots, as the README names it.
BLOCKS: dict[str, Callable[[Sequence[Result], bool, str], str]] = {
    "accuracy": lambda results, latest, plots: accuracy_figures(chosen(results, "accuracy", latest).chosen, plots),
    "audit": lambda results, latest, plots: audit_figures(results, latest),
    "gpu-cifar": lambda results, latest, plots: gpu_cifar_figures(results, latest),
    "gpu-noise": lambda results, latest, plots: gpu_noise_figures(results, latest),
    "gpu-train": lambda results, latest, plots: gpu_train_figures(results, latest),
    "loader": lambda results, latest, plots: loader_figures(results, latest),
    "train": lambda results, latest, plots: train_figures(results, latest),
}


# Plots that blocks show, by the name of their files; with results, `latest` and a theme.
PLOTS: dict[str, Callable[[Sequence[Result], bool, Theme], Figure]] = {
    PLOT: lambda results, latest, theme: draw_accuracy(chosen(results, "accuracy", latest).chosen, theme)
}


def _by_name(results: Sequence[Result], part: str) -> dict[str, Result]:
    return {result.name: result for result in results if result.part == part}


def _need(found: dict[str, Result], question: str, part: str, names: Iterable[str]) -> None:
    if missing := [name for name in names if name not in found]:
        raise ValueError(f"the README's figures of {question}, {part}, lack {', '.join(missing)}: measure them")


def _fastest_first(rates: dict[str, Result]) -> list[str]:
    return sorted(rates, key=lambda name: -spread_of(rates[name], "items_per_second").median)


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value < 1 else f"{value:.1f} s"
