"""What the built GPU code costs, read from its machine code: instructions an element, and the speed they allow.

Nothing is run, and a bound is the best case: a kernel can be slower than it, never faster.

How it is counted. Kernels stride through memory, so what counts are the innermost loops that load or store, on the way
through them that code_paths.py states. A turn makes as many elements as its widest stores hold; where a loop reads
alone, as many as the loop that stores. What is outside the loops, and what unrolled ones leave over, is counted by
itself: a thread runs it once, in as many elements as the launch gives it.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.code_paths import Instruction, Way, functions, way_through
from benchmarks.harness import print_table

LIBRARY = Path(__file__).parent.parent / "pipeline" / "noise" / "csrc" / "libnoisynn_cuda.so"
WARP = 32
ISSUED = 4  # warp instructions that a multiprocessor begins in a clock: one for each of its four schedulers


class Gpu(NamedTuple):
    name: str
    architecture: str
    multiprocessors: int
    clock: float  # Hz
    bytes_per_second: float


# NVIDIA's datasheets. The clock is the one of their float32 peaks: 67 and 19.5 TFLOPS are two operations a clock on 128
# and on 64 lanes of each multiprocessor. Under load it is lower.
GPUS = (
    Gpu("H100 SXM", "sm_90", 132, 1.98e9, 3.35e12),
    Gpu("H200", "sm_90", 132, 1.98e9, 4.8e12),
    Gpu("A100 80 GB", "sm_80", 108, 1.41e9, 2.039e12),
)

# Lanes that a multiprocessor's pipes take in a clock: CUDA C++ Best Practices Guide 13, "Throughput of Native
# Arithmetic Instructions". sm_90 has float32 on two pipes, one of which alone multiplies integers.
LANES = {
    "sm_80": {"float": 64, "multiply": 64, "integer": 64, "special": 16, "access": 32, "double": 32},
    "sm_90": {"float": 128, "multiply": 64, "integer": 64, "special": 16, "access": 32, "double": 64},
}

_FLOAT = {"FADD", "FMUL", "FFMA"}
_HALF = {"HADD2", "HMUL2", "HFMA2"}
_SPECIAL = {"MUFU", "I2F", "F2I", "F2F", "FRND", "POPC", "FLO", "BREV"}
_MEMORY = {"LDG", "STG", "LD", "ST", "LDS", "STS", "SHFL", "ATOM", "ATOMG", "ATOMS", "RED"}
_DOUBLE = {"DADD", "DMUL", "DFMA", "DSETP"}
_CONTROL = {"BRA", "BRX", "EXIT", "BSSY", "BSYNC", "CALL", "RET", "WARPSYNC", "NOP", "BAR", "LDC", "S2R", "R2UR"}


def pipes_of(opcode: str, architecture: str) -> dict[str, int]:
    """What one instruction takes of the pipes, in passes of its warp; the rest only takes its place in the queue."""
    name = opcode.partition(".")[0]
    if name in _FLOAT:
        return {"float": 1}
    if name == "IMAD":
        # A result of 64 bits is written in two passes: half the rate, which no guide states.
        passes = 2 if ".WIDE" in opcode or ".HI" in opcode else 1
        return {"float": passes, "multiply": passes}
    if name in _HALF:  # sm_90: on both float32 pipes at once; sm_80: on a pipe of their own, which is idle else
        return {"float": 2} if architecture == "sm_90" else {}
    if name in _SPECIAL:
        return {"special": 1}
    if name in _MEMORY:
        return {"access": 4 if ".128" in opcode else 2 if ".64" in opcode else 1}
    if name in _DOUBLE:
        return {"double": 1}
    return {} if name in _CONTROL or name.startswith("U") else {"integer": 1}


# ---- the library ----


def disassembler() -> str | None:
    """cuobjdump, of the path or inside triton's package. None: there is none."""
    triton = find_spec("triton")
    folder = Path(triton.origin).parent / "backends" / "nvidia" / "bin" if triton and triton.origin else None
    return shutil.which("cuobjdump") or (shutil.which("cuobjdump", path=folder) if folder else None)


def dumped(library: Path, *options: str) -> str:
    """What cuobjdump says of a library. Errors: ValueError where there is no such tool, or no GPU code."""
    if (tool := disassembler()) is None:
        raise ValueError("cuobjdump is not found: CUDA's toolkit and the triton package bring it")
    if not library.is_file():
        raise ValueError(f"{library.name} is not built: `make setup` builds it where there is nvcc")
    # It calls nvdisasm, which lies beside it.
    environment = os.environ | {"PATH": f"{Path(tool).parent}:{os.environ.get('PATH', '')}"}
    done = subprocess.run([tool, *options, str(library)], capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise ValueError(f"cuobjdump finds no GPU code in {library}: {done.stderr.strip()[:200]}")
    return done.stdout


class Kernel(NamedTuple):
    """A kernel's name in the source, without `_kernel`, and what its template was made for."""

    name: str
    format: str
    element_bytes: int
    numbers: tuple[int, ...]  # template arguments that are numbers

    @property
    def label(self) -> str:
        return self.name + (f"<{', '.join(map(str, self.numbers))}>" if self.numbers else "")


_FORMATS = {
    "f": ("float32", 4),
    "d": ("float64", 8),
    "Half": ("float16", 2),
    "__half": ("float16", 2),
    "BFloat16": ("bfloat16", 2),
    "__nv_bfloat16": ("bfloat16", 2),
}
# Of a template's arguments, as g++ mangles them: a number (`Li4E`, `LNS_3WayE2E`), a format's name, float or double.
_ARGUMENT = re.compile(r"L(?:[a-z]|NS_\d+\w+?E)(\d+)E|\d(Half|BFloat16|__half|__nv_bfloat16)|(?<=[IE])([fd])(?=[EILN])")


def kernel_of(mangled: str) -> Kernel | None:
    """Of a mangled name; its template's last format is the data's. None: no template over a format."""
    at, name = len("_ZN"), ""
    while length := re.match(r"\d+", mangled[at:]):
        start = at + length.end()
        at = start + int(length[0])
        name = mangled[start:at]
    # The arguments stand between I and E; a function's result, v, comes next.
    arguments = mangled[at:].partition("Ev")[0] + "E"
    found = list(_ARGUMENT.finditer(arguments)) if arguments.startswith("I") else []
    formats = [match[2] or match[3] for match in found if not match[1]]
    if not formats:
        return None
    numbers = tuple(int(match[1]) for match in found if match[1])
    return Kernel(name.removesuffix("_kernel"), *_FORMATS[formats[-1]], numbers)


# ---- what it costs ----


@dataclass(frozen=True)
class Cost:
    """Of one kernel for one architecture. Counts are of a thread's instructions, which are a warp's."""

    kernel: Kernel
    architecture: str
    opcodes: dict[str, float]  # in the innermost loops, an element
    elements: int  # that a turn makes
    outside: int  # instructions outside the innermost loops
    bytes_an_element: int

    @property
    def instructions(self) -> float:
        return sum(self.opcodes.values())

    @property
    def pipes(self) -> dict[str, float]:
        """What an element takes of each pipe, in passes."""
        total: dict[str, float] = {}
        for opcode, count in self.opcodes.items():
            for pipe, passes in pipes_of(opcode, self.architecture).items():
                total[pipe] = total.get(pipe, 0) + passes * count
        return total

    def bound_on(self, gpu: Gpu) -> Bound:
        lanes = LANES[self.architecture]
        clocks = {pipe: passes / lanes[pipe] for pipe, passes in self.pipes.items()}
        clocks["issue"] = self.instructions / (ISSUED * WARP)
        seconds = {by: time / (gpu.multiprocessors * gpu.clock) for by, time in clocks.items()}
        seconds["memory"] = self.bytes_an_element / gpu.bytes_per_second
        by = max(seconds, key=lambda what: seconds[what])
        return Bound(by, 1 / seconds[by], seconds["memory"] / seconds[by])


class Bound(NamedTuple):
    by: str  # `memory`, `issue`, or a pipe
    elements_per_second: float
    share_of_copy: float  # of one at the datasheet's bandwidth, which a copy does not reach


def cost_of(kernel: Kernel, architecture: str, code: Sequence[Instruction]) -> Cost:
    way = way_through(code)
    innermost = list(way.innermost())
    # Narrower stores are of something else: a mean, a scale.
    widest = max((i.width for loop in innermost for i in loop.all_code if i.opcode.startswith("STG")), default=4)
    loops = _without_remainders(innermost, widest)
    last = max(loops, key=lambda loop: loop.accesses("STG", widest))
    made = last.accesses("STG", widest) * widest / kernel.element_bytes
    opcodes: dict[str, float] = {}
    for loop in loops:
        elements = loop.accesses("STG", widest) * widest / kernel.element_bytes
        if not elements:  # it reads alone: as many as the last one, but more where it is unrolled more
            elements = made * max(1, loop.accesses("LDG") // max(1, last.accesses("LDG")))
        for instruction in loop.all_code:
            opcodes[instruction.opcode] = opcodes.get(instruction.opcode, 0) + 1 / elements
    outside = len(way.all_code) - sum(len(loop.all_code) for loop in innermost)
    return Cost(kernel, architecture, opcodes, int(made), outside, _bytes_of(kernel))


def _without_remainders(loops: Sequence[Way], widest: int) -> list[Way]:
    """Of a loop that is unrolled and the one for what it leaves over, the first."""
    best: dict[bool, Way] = {}
    for loop in loops:
        stores = loop.accesses("STG", widest) > 0
        if stores not in best or best[stores].accesses("LDG") < loop.accesses("LDG"):
            best[stores] = loop
    return list(best.values())


def _bytes_of(kernel: Kernel) -> int:
    """Memory traffic an element: read and written once; on the way back a gradient is read too; a picture has bytes."""
    if "backward" in kernel.name:
        return 3 * kernel.element_bytes
    return kernel.element_bytes + (1 if "image" in kernel.name else kernel.element_bytes)


def costs(format: str, library: Path = LIBRARY) -> list[Cost]:
    """Of the kernels for one format, by name, for each architecture of LANES. Errors: ValueError, as dumped."""

    def wanted(mangled: str) -> bool:
        kernel = kernel_of(mangled)
        return kernel is not None and kernel.format == format

    found = [
        cost_of(kernel, architecture, code)
        for architecture in LANES
        for mangled, code in functions(dumped(library, "-sass", "-arch", architecture), wanted).items()
        if (kernel := kernel_of(mangled)) is not None and any(i.opcode.startswith("STG") for i in code)
    ]
    if not found:
        raise ValueError(f"{library.name} has no kernel for {format}")
    return sorted(found, key=lambda cost: (cost.kernel, cost.architecture))


# ---- to print and to keep ----


def record(found: Sequence[Cost]) -> dict[str, Any]:
    """A row of results for all of them: nothing in it was measured."""
    kernels = [
        {
            "kernel": cost.kernel.label,
            "format": cost.kernel.format,
            "architecture": cost.architecture,
            "instructions_per_element": round(cost.instructions, 2),
            "passes_per_element": {pipe: round(passes, 2) for pipe, passes in cost.pipes.items()},
            "elements_per_turn": cost.elements,
            "instructions_outside": cost.outside,
            "bytes_per_element": cost.bytes_an_element,
            "bounds": {gpu.name: cost.bound_on(gpu)._asdict() for gpu in GPUS if gpu.architecture == cost.architecture},
        }
        for cost in found
    ]
    return {"gpus": [gpu._asdict() for gpu in GPUS], "kernels": kernels}


def print_costs(found: Sequence[Cost]) -> None:
    """A line for each kernel, and what the figures are. found: of one format."""
    by_kernel: dict[Kernel, dict[str, Cost]] = {}
    for cost in found:
        by_kernel.setdefault(cost.kernel, {})[cost.architecture] = cost
    pipes = [pipe for pipe in LANES["sm_90"] if any(cost.pipes.get(pipe, 0) >= 0.5 for cost in found)]
    header = ["kernel", "instr.", *pipes, "outside", *(gpu.name for gpu in GPUS)]
    cells = []
    for kernel, own in by_kernel.items():
        newest = own[max(own)]
        counts = [f"{newest.instructions:.1f}", *(f"{newest.pipes.get(pipe, 0):.1f}" for pipe in pipes)]
        bounds = [own[gpu.architecture].bound_on(gpu) if gpu.architecture in own else None for gpu in GPUS]
        texts = ["" if bound is None else f"{100 * bound.share_of_copy:.0f} % {bound.by}" for bound in bounds]
        cells.append([kernel.label, *counts, str(newest.outside), *texts])
    print_table(f"machine code, {max(cost.architecture for cost in found)}, {found[0].kernel.format}", header, cells)
    print(
        "instr.: instructions an element in the innermost loops, and what they take of each pipe; outside: what a\n"
        "thread runs once. By the loops, in the best case, at most so much of a copy's speed, and what is in the way."
    )
