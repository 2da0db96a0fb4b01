"""The blocks of questions about many ranks: scaling and goodput."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

from benchmarks.harness import figure, figures
from benchmarks.report.blocks import Bar, Block, Plot, bars_plot, block_of, exactly
from benchmarks.report.plots import Line, draw_lines
from benchmarks.report.results import Result
from benchmarks.report.speed import by_part, spread_of

_GOODPUT = {
    "steps": "steps",
    "failures": "ranks killed",
    "step_seconds": "s a step, undisturbed",
    "undisturbed_seconds": "s of the whole run, undisturbed",
    "disturbed_seconds": "s of the whole run, killed",
    "start_seconds": "s from a command to its first step",
    "checkpoint_seconds": "s that a checkpoint adds to its step",
    "redone_steps": "steps done again",
    "interval_seconds": "s of work between two checkpoints",
    "young_interval_seconds": "s that Young's formula would choose",
}


def goodput_variant(result: Result) -> str:
    return str(result["settings"])


def goodput_blocks(results: Sequence[Result]) -> Iterator[Block]:
    for result in results:
        bars = [
            Bar("measured", exactly(100 * result["goodput"]), own=True),
            Bar("expected (Daly)", exactly(100 * result["expected_goodput"])),
        ]
        lines = [
            ["goodput, measured", f"{100 * result['goodput']:.1f} %"],
            ["goodput, expected by Daly's model", f"{100 * result['expected_goodput']:.1f} %"],
            *([what, figure(result[name])] for name, what in _GOODPUT.items()),
        ]
        words = "One plan of failures (n = 1): the share of the wall clock in which the run did steps that counted."
        plot = bars_plot(bars, "goodput, %")
        yield block_of([result], result.part, ("what", "figure"), lines, words=words, plot=plot, own=frozenset({0}))


def scaling_variant(result: Result) -> str:
    names = ("strategy", "model", "image_size", "batch", "device")
    strategy, model, side, batch, device = (result.condition(name) for name in names)
    return f"{strategy}, {model} at {side} px, {batch} pictures a rank, {device}"


def scaling_blocks(results: Sequence[Result]) -> Iterator[Block]:
    parts = by_part(results)
    if measured := parts.get("measured"):
        yield _measured_block(sorted(measured, key=lambda result: result["ranks"]))
    if projected := parts.get("projected"):
        yield _projected_block(sorted(projected, key=lambda result: result["gpus"]))


def _measured_block(results: Sequence[Result]) -> Block:
    lines = []
    for result in results:
        seconds, rate, efficiency = (
            figures(spread_of(result, name)) for name in ("step_seconds", "images_per_second", "efficiency")
        )
        interval = result["interval"]
        shown = "" if interval is None else f"{interval[0]:.3f} to {interval[1]:.3f}"
        lines.append([str(result["ranks"]), str(result["n"]), seconds, rate, efficiency, shown])
    line = Line(
        "measured", [result["ranks"] for result in results], [spread_of(result, "efficiency") for result in results]
    )
    return block_of(
        results,
        "measured: the same work for each rank",
        ("ranks", "n", "s a step", "images/s of all", "efficiency", "95 % of its mean"),
        lines,
        words="Efficiency is one rank's time over many ranks', within a turn.",
        plot=_efficiency_plot(line, "ranks"),
    )


def _projected_block(results: Sequence[Result]) -> Block:
    first = results[0]
    names = ("all_reduce_seconds", "exposed_seconds", "step_seconds")
    lines = [
        [
            str(result["gpus"]),
            *(f"{1e3 * result[name]:.3g}" for name in names),
            f"{100 * result['efficiency']:.1f} %",
        ]
        for result in results
    ]
    words = (
        f"Reckoned, not measured: from {first['gradient_bytes'] / 1e6:,.1f} MB of gradients and the step of one "
        f"({first['step_from']}), assuming that {'; that '.join(first['assumptions'])}."
    )
    line = Line(
        "projected",
        [result["gpus"] for result in results],
        [exactly(result["efficiency"]) for result in results],
        own=False,
    )
    header = ("GPUs", "ms summing", "ms not hidden", "ms a step", "efficiency")
    return block_of(results, "projected", header, lines, words=words, plot=_efficiency_plot(line, "GPUs"))


def _efficiency_plot(line: Line, across: str) -> Plot:
    words = "; ".join(f"{x:g}: {figure(value.median)}" for x, value in zip(line.xs, line.values, strict=True))
    return Plot(partial(draw_lines, [line], across, "efficiency"), f"Efficiency by {across}, {line.label}: {words}.")
