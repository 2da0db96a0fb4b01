"""Elements a second of each noise, beside the torch expression a user would write (eager, and compiled) and a copy.

Each part is a cell of cells.py: what a results file has of the same code, device and options is not measured again, so
the same command goes on where a run was cut off. Where there is no GPU, what the GPU's code would cost is printed.

Aims, set before a GPU was at hand, for one H200 in bfloat16 at 1,000 MB (noise_aims.py has them as figures):
- gaussian_noise at least 85 % of a device copy's rate in the same run. It reads and writes once, so memory binds it as
  it binds the copy: 4.8 TB/s by the datasheet, about 4.2 in a copy. Its 20 instructions an element keep up: the card
  begins 33 T of them a second, enough for 6.7 TB/s.
- gaussian_noise at least 2.2 times torch.compile, whose code needs 73 instructions an element, so that they bind it:
  1.8 TB/s if no cycle is lost, and some are. At least 4 times eager torch, which goes over the tensor 6 times (randn
  writes, the product reads and writes, the sum reads two and writes) where 2 are enough: 3 times by bytes alone, and
  its generator is no copy.
- linear_mix (circular_shift, optimal_q) at least 90 % of the copy: the same bytes, hardly any arithmetic.
- image_noise at least 75 % of a copy's bytes a second: of each of a pixel's three values 1 byte is read and 2 are
  written, so a draw comes with 3 bytes where gaussian_noise has 4, and with a conversion: arithmetic weighs more.
- norm_noise, forward, at most 10 % more time than LayerNorm alone, which reads and writes as much: noise adds
  arithmetic only.
- Noise at all 12 blocks at most 1 % of a compiled step of ViT-S: at 12,000 images/s (gpu_train.py) a batch of 256 takes
  21 ms, and 12 passes over its 39 MB of tokens, read and written, 0.2 ms.

What is in the way where an aim is missed, as Nsight Compute and torch's profiler saw it once on one H200, at commits
755611b and before:
- image_noise: instructions. Philox, logarithm, root, sine and cosine, a level's conversion and the rounding are 25 an
  element, 8.4 a byte where gaussian_noise has 5; schedulers issue in 63 % of their cycles, the pipe of integer
  products works in 61 %, memory in 44 %. Without noise the same pass has 91 % of the copy. 22 instructions an
  element, by drawing six blocks at once, took as long: fewer warps are then at work.
- circular_shift: a thread reads eight rows before it writes the first, so a warp waits for memory most of the time. By
  the device's clock, one call at a time, it has 92 % of a copy; ten in a row, as here, less. torch.compile is as fast.
- A step of ViT-S: with all twelve noises, at a batch of 512, their kernels take 1.05 % of the step: 49 us each where a
  copy takes 39, for of so short a run the start and the last wave of blocks are a fifth. What more it takes than that
  is not explained.
No aim was set for salt_and_pepper, which goes over the tensor twice more, for the extremes of each group, nor for
channels_last, where each thread draws for eight channels with 31 instructions an element.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from benchmarks import machine_code
from benchmarks.cells import Cell, check_minutes, run_cells
from benchmarks.harness import (
    Agree,
    Contestant,
    OnTurn,
    Row,
    check_output,
    circumstances_of,
    compare,
    figures,
    print_circumstances,
    print_parts,
    print_table,
    ratio,
    status_line,
    summarise,
)
from benchmarks.noise_aims import AIMS, FOR, HEADER, TITLE, aims_of, aims_table, stated
from benchmarks.noise_contestants import (
    GROUP,
    IMAGE_SIDE,
    STRENGTHS,
    TOKENS,
    WIDTH,
    agree,
    contestants_of,
    image_contestants,
    norm_contestants,
)
from benchmarks.training_step import DTYPES, chosen_device
from pipeline.noise.config import Kind

# Bytes on the way over 4 bytes an element; 9.1 was the most seen, of the reference's 64-bit integer words.
PEAK_OVER_INPUT = 12
CHANNELS, SIDE = 256, 14  # of a ResNet's third stage
NORMED: tuple[Kind, ...] = ("gaussian", "optimal_q")

PartName = Literal[
    "gaussian", "salt_and_pepper", "circular_shift", "optimal_q", "image_noise", "channels_last", "norm_noise", "model"
]
ON_GPU_ALONE = "model"


@dataclass(frozen=True)
class NoiseOptions:
    """Elements/s and GB/s of each noise. The reference is the specification, not fast code.

    A part that the results file already has, of the same code, device and options, is not measured again: the same
    command goes on where a run ended.
    """

    megabytes: float = 64
    """Size of the input, 10^6 bytes, in whole groups of 8 samples of 197 tokens of 768; at least one group."""
    rounds: int = 5
    """Timed rounds of each contestant."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes the GPU where there is one."""
    parts: tuple[PartName, ...] = get_args(PartName)
    """What to measure. `model` is a compiled step of ViT-S with noise at all its blocks, on a GPU alone."""
    batch: int = 256
    """Pictures of that step."""
    minutes: float = 9.0
    """No further part is begun that should not end by then."""
    note: str = ""
    """Kept in each row, such as `2 CPU cores, shared`."""
    output: Path | None = None
    """JSON lines to add to; benchmarks/results/noise.jsonl if None."""

    def __post_init__(self) -> None:
        if not 0 < self.megabytes < math.inf:
            raise ValueError(f"--megabytes {self.megabytes}: a finite size above 0")
        for name in ("rounds", "batch"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"--{name} {value}: at least 1")
        if not self.parts or len(set(self.parts)) < len(self.parts):
            raise ValueError(f"--parts {' '.join(self.parts)}: name at least one part, and each once")
        check_minutes(self.minutes)


class Part(NamedTuple):
    """A table of the question."""

    name: str
    shape: tuple[int, ...]
    contestants: Callable[[], list[Contestant]]
    agree: Agree | None = agree
    unit: str = "elements"
    weight: float = 1  # what it costs in proportion to others: compiling, for the most part


def measure_noises(options: NoiseOptions, command: Sequence[str]) -> list[dict[str, Any]]:
    """Measures, writes and prints. Errors: ValueError naming the option, where it cannot run here."""
    path = check_output(options.output, "noise")
    circumstances = circumstances_of(command, options.note)
    device = chosen_device(options.device)
    if options.parts == (ON_GPU_ALONE,) and device.type == "cpu":
        raise ValueError(f"--parts {ON_GPU_ALONE} is measured on a GPU alone, and torch sees none here")
    _check_memory(options, device)
    conditions = {
        "megabytes": options.megabytes,
        "rounds": options.rounds,
        "dtype": options.dtype,
        "device": device.type,
        "threads": torch.get_num_threads(),
        "strengths": STRENGTHS,
        "group_size": GROUP,
        "allocator": _keep_freed_memory(),
        "bytes_counted": "one read and one write of each element; on a way back two reads and one write more",
    }
    with status_line() as on_turn:
        cells = [
            Cell(
                part.name,
                conditions | {"shape": list(part.shape)},
                part.weight,
                partial(_measure, part, options.rounds, on_turn),
            )
            for part in _parts(options, device)
        ]
        of_parts = run_cells("noise", cells, path, circumstances, options.minutes, on_turn)
    rows = [row for of_part in of_parts.values() for row in of_part]
    print_parts([Row.from_json(row) for row in rows])
    _print_ratios([Row.from_json(row) for row in rows])
    _print_aims(rows, device)
    print_circumstances(options.rounds, circumstances)
    print(f"rows with versions, commit and command in {path}")
    print("`reference` is the specification that kernels must meet, written to be plainly right; it is not fast code.")
    if device.type == "cpu":
        _print_machine_code(path, circumstances, options)
    return rows


def _parts(options: NoiseOptions, device: torch.device) -> Iterator[Part]:
    dtype = DTYPES[options.dtype]
    tokens = (_samples(options), TOKENS, WIDTH)
    channels = (tokens[0] * TOKENS * WIDTH // (CHANNELS * SIDE**2), CHANNELS, SIDE, SIDE)
    pictures = max(GROUP, int(options.megabytes * 1e6) // (3 * IMAGE_SIDE**2 * dtype.itemsize))
    filled = partial(_filled, dtype=dtype, device=device)

    def of_kind(kind: Kind) -> list[Contestant]:
        return contestants_of(kind, filled(tokens))

    def norm(kind: Kind, backward: bool) -> list[Contestant]:
        return norm_contestants(kind, filled(tokens), backward)

    def last() -> list[Contestant]:
        found = contestants_of("gaussian", filled(channels).to(memory_format=torch.channels_last))
        return [contestant for contestant in found if contestant.name != "reference"]

    def step() -> list[Contestant]:
        from benchmarks.noise_step import step_contestants

        return step_contestants(options.batch, device)

    for kind in STRENGTHS:
        if kind in options.parts:
            yield Part(kind, tokens, partial(of_kind, kind))
    if "image_noise" in options.parts:
        shape = (pictures, 3, IMAGE_SIDE, IMAGE_SIDE)
        yield Part("image_noise, gaussian", shape, partial(image_contestants, pictures, dtype, device))
    if "channels_last" in options.parts:
        yield Part("channels_last, gaussian", channels, last)
    if "norm_noise" in options.parts:
        for kind in NORMED:
            yield Part(f"norm_noise, {kind}", tokens, partial(norm, kind, False))
            yield Part(f"norm_noise, {kind}, and back", tokens, partial(norm, kind, True), weight=2)
    if ON_GPU_ALONE in options.parts and device.type == "cuda":
        shape = (options.batch, 3, IMAGE_SIDE, IMAGE_SIDE)
        yield Part("model, forward and back", shape, step, agree=None, unit="images", weight=5)


def _measure(part: Part, rounds: int, on_turn: OnTurn, marks: dict[str, Any]) -> list[str]:
    contestants = part.contestants()
    timings = compare(contestants, rounds, part.agree, lambda text: on_turn(f"{part.name}: {text}"))
    torch.compiler.reset()
    rows = summarise("noise", part.name, part.unit, contestants, timings)
    return [row.to_json(marks | stated(row.part, row.contestant, marks)) for row in rows]


def _samples(options: NoiseOptions) -> int:
    sample_bytes = TOKENS * WIDTH * DTYPES[options.dtype].itemsize
    return max(GROUP, int(options.megabytes * 1e6) // sample_bytes // GROUP * GROUP)


def _filled(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Standard normals."""
    return torch.randn(shape, generator=torch.Generator(device).manual_seed(0), device=device).to(dtype)


def _check_memory(options: NoiseOptions, device: torch.device) -> None:
    needed = _samples(options) * TOKENS * WIDTH * 4 * PEAK_OVER_INPUT
    free = torch.cuda.mem_get_info()[0] if device.type == "cuda" else _available_memory()
    if needed > free:
        most = free / PEAK_OVER_INPUT * DTYPES[options.dtype].itemsize / 4 / 1e6
        raise ValueError(
            f"--megabytes {options.megabytes:g}: the reference takes up to {needed / 1e9:.1f} GB on the way and "
            f"{free / 1e9:.1f} GB are free; give at most {most:.0f}"
        )


def _available_memory() -> int:
    """Bytes, as the kernel reckons them: what is free, and what its caches would give up."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return 1024 * int(line.split()[1])
    raise OSError("/proc/meminfo has no MemAvailable: Linux has had it since 3.14")


def _keep_freed_memory() -> str:
    """Has glibc keep what is freed, as tcmalloc, jemalloc and a GPU's allocator do, and says what holds.

    Otherwise each result of 64 MB is new to the process, and its page faults take twice as long as the noise.
    """
    trim_threshold, mmap_max, most = -1, -4, (1 << 31) - 1  # mallopt's names for them, from malloc.h
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    kept = mallopt is not None and mallopt(mmap_max, 0) and mallopt(trim_threshold, most)
    return "freed memory is kept" if kept else "the system's: page faults included"


def _print_ratios(rows: Sequence[Row]) -> None:
    """The operator's rate over each of the others', turn by turn."""
    parts = [part for part in dict.fromkeys(row.part for row in rows)]
    by_name = {part: {row.contestant: row for row in rows if row.part == part} for part in parts}
    parts = [part for part in parts if "operator" in by_name[part]]
    others = [name for name in dict.fromkeys(row.contestant for row in rows if row.part in parts) if name != "operator"]
    cells = [
        [part, *(figures(ratio(own["operator"], own[name])) if name in own else "" for name in others)]
        for part, own in ((part, by_name[part]) for part in parts)
    ]
    if cells:
        print_table("noise: the operator's rate over", ["part", *others], cells)


def _print_aims(rows: Sequence[dict[str, Any]], device: torch.device) -> None:
    """Each beside what was measured; on another card or at another size there are none."""
    if lines := aims_table([(Row.from_json(row), aims_of(row)) for row in rows]):
        print_table(f"noise: {TITLE}", HEADER, lines)
    elif device.type == "cuda" and any((row["part"], row["contestant"]) in AIMS for row in rows):
        print(f"no aims here: they were stated for {FOR}")


# ---- without a GPU ----


def _print_machine_code(path: Path, circumstances: dict[str, Any], options: NoiseOptions) -> None:
    """Prints, and keeps, what the GPU's code costs: in bfloat16, which GPUs train in."""
    try:
        library = hashlib.sha256(machine_code.LIBRARY.read_bytes()).hexdigest()[:16]
        costs = machine_code.costs("bfloat16")
    except (ValueError, FileNotFoundError) as error:
        print(f"nothing on a GPU was measured, and its code was not looked at: {error}")
        return

    def row(marks: dict[str, Any]) -> list[str]:
        return [json.dumps({"question": "noise", "part": "machine code"} | machine_code.record(costs) | marks)]

    run_cells(
        "noise",
        [Cell("machine code", {"library": library}, 1, row)],
        path,
        circumstances,
        options.minutes,
        lambda text: None,
    )
    machine_code.print_costs(costs)
    print("Nothing on a GPU was measured: torch sees none here. These are counts of the code that was built for it.")
