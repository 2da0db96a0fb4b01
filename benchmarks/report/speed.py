"""The blocks of questions of speed and memory: loader, noise, shards, audit, train."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from benchmarks.harness import Spread, figures, ratio
from benchmarks.noise_aims import CARD, DTYPE, HEADER, TITLE, Aim, aims_of, aims_table
from benchmarks.report.blocks import (
    Bar,
    Block,
    bars_plot,
    block_of,
    memory_block,
    plain_block,
    timed_block,
)
from benchmarks.report.results import Alike, Result

LOADER_LABELS = {
    "restart_tars": "tars with restart markers",
    "beton": ".beton",
    "tars": "tars",
    "litdata": "LitData",
    "image_folder_io": "torchvision.io, ImageFolder",
    "webdataset_io": "webdataset with torchvision.io",
    "ffcv": "FFCV",
    "streaming": "MosaicML Streaming",
    "spdl": "SPDL",
    "image_folder": "Pillow, ImageFolder",
    "timm": "timm",
    "webdataset": "webdataset with Pillow",
}
OWN_LOADERS = frozenset({"restart_tars", "beton", "tars"})
_OWN_SHARDS = ("shard", "beton", "index", "plan_shards")
_AUDIT_PARTS = {
    "nine": "all nine protocols at k = 10, one seed",
    "grid": "the default grid of k and seeds",
    "memory": "memory, features kept",
}
_MACHINE_CODE = "machine code"  # a part of noise that no GPU ran


def pictures_of(result: Result) -> str:
    """The pictures that were read, whatever number of times each was there."""
    return re.sub(r", each [\d,]+ times", "", str(result.conditions.get("pictures", "")))


def by_part(results: Sequence[Result]) -> dict[str, list[Result]]:
    found: dict[str, list[Result]] = {}
    for result in results:
        found.setdefault(result.part, []).append(result)
    return found


def common_block(results: Sequence[Result], title: str, own: Callable[[str], bool], **more: Any) -> Block:
    """Of one part, by the kind of its rows."""
    if all("items_per_second" in result.row for result in results):
        return timed_block(results, title, own, **more)
    if all("own_bytes" in result.row for result in results):
        return memory_block(results, title, own, **more)
    return plain_block(results, title)


# ---- loader ----


def loader_variant(result: Result) -> str:
    if not result.conditions:  # the plan of an epoch alone needs no pictures
        return "no pictures"
    names = ("image_size", "batch", "workers", "interpolation")
    side, batch, workers, interpolation = (result.condition(name) for name in names)
    return f"{pictures_of(result)}; {side} px, batch {batch}, {workers} workers, {interpolation}"


def loader_blocks(results: Sequence[Result]) -> Iterator[Block]:
    for part, of_part in by_part(results).items():
        among_loaders = all(result.name in LOADER_LABELS for result in of_part)
        labels = LOADER_LABELS if among_loaders else None
        yield common_block(of_part, part, OWN_LOADERS.__contains__, labels=labels, ranked=among_loaders)


# ---- noise ----


def noise_variant(result: Result) -> str:
    if result.part == _MACHINE_CODE:
        return "built for GPUs"
    size = f", {result.number('megabytes'):,g} MB" if result.condition("device") == "cuda" else ""
    return f"{result.condition('dtype')} on {result.place}{size}"


def noise_blocks(results: Sequence[Result]) -> Iterator[Block]:
    parts = by_part(results)
    code = parts.pop(_MACHINE_CODE, [])
    if parts:
        yield from _noise_aims_blocks([result for of_part in parts.values() for result in of_part])
        yield from _operator_blocks(parts)
    for part, of_part in parts.items():
        yield common_block(of_part, part, "operator".__eq__)
    for result in code:
        yield _machine_code_block(result)


def _noise_aims_blocks(results: Sequence[Result]) -> Iterator[Block]:
    """Of the rows that keep aims, and of those that these are beside."""
    aimed = {result.part for result in results if aims_kept(result)}
    beside = [result for result in results if result.part in aimed]
    if lines := aims_table([(result.timed, aims_kept(result)) for result in beside]):
        yield block_of(
            beside,
            TITLE,
            HEADER,
            lines,
            alike=Alike(("shape", "compared with")),
            words="Ratios, turn by turn: of a rate at least, of a time at most the aim.",
        )


def aims_kept(result: Result) -> tuple[Aim, ...]:
    """Of a row of noise. Errors: ValueError naming file and line."""
    try:
        return aims_of(result.row)
    except ValueError as error:
        raise ValueError(f"{result.where} is damaged ({error}): take it out, or measure it again") from error


def _operator_blocks(parts: dict[str, list[Result]]) -> Iterator[Block]:
    """The operator's rate over each of the others', turn by turn: a line for each part that has one."""
    timed = {part: {r.name: r.timed for r in of_part if "timings" in r.row} for part, of_part in parts.items()}
    timed = {part: rows for part, rows in timed.items() if "operator" in rows}
    others = [name for name in dict.fromkeys(name for rows in timed.values() for name in rows) if name != "operator"]
    over = {part: {name: ratio(own["operator"], own[name]) for name in own} for part, own in timed.items()}
    lines = [[part, *(figures(own[name]) if name in own else "" for name in others)] for part, own in over.items()]
    if lines:
        bars = [Bar(part, own["eager"], own=True) for part, own in over.items() if "eager" in own]
        yield block_of(
            [result for part in over for result in parts[part]],
            "the operator's rate over the others'",
            ["part", *others],
            lines,
            alike=Alike(("shape",)),
            words="Turn by turn: above 1 the operator is faster.",
            plot=bars_plot(bars, "rate over eager torch's") if bars else None,
        )


def _machine_code_block(result: Result) -> Block:
    """Of each kernel what its loop costs at most, on the GPUs that it was built for."""
    gpus = [gpu["name"] for gpu in result["gpus"]]
    kernels: dict[str, list[dict[str, Any]]] = {}
    for kernel in result["kernels"]:
        kernels.setdefault(f"{kernel['kernel']}, {kernel['format']}", []).append(kernel)
    lines = []
    for label, own in kernels.items():
        newest = max(own, key=lambda kernel: kernel["architecture"])
        bounds = {gpu: bound for kernel in own for gpu, bound in kernel["bounds"].items()}
        texts = [f"{100 * b['share_of_copy']:.0f} % {b['by']}" if (b := bounds.get(gpu)) else "" for gpu in gpus]
        lines.append([label, f"{newest['instructions_per_element']:.1f}", *texts])
    return block_of(
        [result],
        "machine code: counted, not measured",
        ["kernel", "instructions an element", *gpus],
        lines,
        words="What the GPU's code that was built costs an element in its innermost loop, and so the share of a plain "
        "copy's speed that it can reach at most, with what is in the way. Nothing here ran on a GPU.",
    )


# ---- shards ----


def shards_variant(result: Result) -> str:
    return pictures_of(result)


def shards_blocks(results: Sequence[Result]) -> Iterator[Block]:
    for part, of_part in by_part(results).items():
        yield common_block(of_part, part, lambda name: name.startswith(_OWN_SHARDS))


# ---- audit ----


def audit_variant(result: Result) -> str:
    names = ("model", "site", "image_size", "images", "batch")
    model, site, side, images, batch = (result.condition(name) for name in names)
    return f"{model} at {side} px, noise at {site}, {images} pictures, batches of {batch}"


def audit_blocks(results: Sequence[Result]) -> Iterator[Block]:
    for part, of_part in by_part(results).items():
        yield common_block(of_part, _AUDIT_PARTS.get(part, part), "features kept".__eq__)


# ---- train ----


def train_variant(result: Result) -> str:
    if "device" in result.conditions:
        names = ("dtype", "image_size", "compile")
        dtype, side, compiled = (result.condition(name) for name in names)
        return f"one device, {result.place}: {dtype}, {side} px, {'compiled' if compiled else 'eager'}"
    model, side, batch, ranks = (result.condition(name) for name in ("model", "image_size", "batch", "ranks"))
    return f"{model} at {side} px, {batch} pictures a rank, {ranks} ranks"


def train_blocks(results: Sequence[Result]) -> Iterator[Block]:
    parts = by_part(results)
    if aims := parts.pop("aims", []):
        yield _aims_block(aims)
    for part, of_part in parts.items():
        yield common_block(of_part, part, _is_own_training)
        if all("mfu" in result.row for result in of_part):
            yield _model_block(of_part)


def _is_own_training(name: str) -> bool:
    return name.startswith(("trainer", "save", "clean", "noisy"))


def spread_of(result: Result, name: str) -> Spread:
    """Errors: ValueError naming file and line."""
    try:
        return Spread(**result[name])
    except TypeError as error:
        raise ValueError(f"{result.where}: {name} is no spread: measure it again, or take the line out") from error


def _aims_block(results: Sequence[Result]) -> Block:
    lines, bars = [], []
    for result in results:
        measured, aim, unit = spread_of(result, "measured"), result["at_most"], result["unit"]
        cpu = f"{figures(spread_of(result, 'cpu'))} {unit}" if result["cpu"] else ""
        verdict = "" if aim is None else "met"
        if aim is not None and measured.median > aim:
            verdict = f"NOT met, by {100 * (measured.median / aim - 1):.1f} %"
        aimed = "" if aim is None else f"at most {aim:g}"
        lines.append([result.name, f"{figures(measured)} {unit}", cpu, aimed, verdict])
        if unit == "x":
            bars.append(Bar(result.name, measured, result.name.partition(": ")[2].startswith("trainer"), aim))
    return block_of(
        results,
        "aims, stated before anything was measured",
        ("time", "measured", "of the CPU", "aim", ""),
        lines,
        words="Ratios of time, turn by turn: below 1 the first is faster. The tick across a line is its aim.",
        plot=bars_plot(bars, "time over the other's, less is better") if bars else None,
    )


def _model_block(results: Sequence[Result]) -> Block:
    from benchmarks.gpu_train import model_table  # with it comes torch

    title, header, lines = model_table([result.row for result in results])
    own = frozenset(i for i, result in enumerate(results) if _is_own_training(result.name))
    verdicts = [training_verdict(result) for result in results]
    if any(verdicts):  # the aim's figure has a column already
        said = [verdict.partition(" images/s: ")[2] for verdict in verdicts]
        header, lines = [*header, ""], [[*line, verdict] for line, verdict in zip(lines, said, strict=True)]
    return block_of(results, title.removeprefix("train: "), header, lines, own=own)


def training_verdict(result: Result) -> str:
    """Whether this project's step makes the images/s aimed at, and no fewer than timm's; on the aims' card alone."""
    aim = result["aim_images_per_second"]
    stated_for = (result.place, result.condition("dtype"), result.condition("compile"), result["compared_with"])
    if aim is None or not _is_own_training(result.name) or stated_for != (CARD, DTYPE, True, "timm"):
        return ""
    short = 1 - spread_of(result, "items_per_second").median / aim
    below = 1 - spread_of(result, "ratio").median
    images, timms = ("met" if by <= 0 else f"NOT met, by {100 * by:.1f} %" for by in (short, below))
    return f"{aim:,} images/s: {images}; timm's: {timms}"
