"""GPU machine code as instructions, loops, and the way that a warp takes through a kernel.

A loop is what lies between a backward branch and its target, and of a loop one way through it is taken: the one with
the most floating-point arithmetic and the most rounds of Philox (nothing else takes the exclusive or of three words),
then the fewest calls, the most 16-byte loads and stores, the fewest instructions. That is the way of whole, aligned
units with noise on all of them; others also ask which elements it is for. A loop inside counts by what it does for one
store, so that one that is unrolled is not preferred for that. Instructions under a predicate count: they take their
place in the queue.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

_ARITHMETIC = ("FADD", "FMUL", "FFMA", "HADD2", "HMUL2", "HFMA2", "MUFU")
_WIDTHS = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16}  # of an access, in bytes; 4 where none is named


class Instruction(NamedTuple):
    at: int
    opcode: str
    predicate: str  # "" where there is none
    operands: str

    @property
    def width(self) -> int:
        """Bytes of a load or store."""
        return next((width for part in self.opcode.split(".") if (width := _WIDTHS.get(part))), 4)

    @property
    def is_arithmetic(self) -> bool:
        # How a constant is loaded, and how integers are divided.
        if (self.opcode.startswith("HFMA2") and "-RZ, RZ" in self.operands) or self.opcode == "MUFU.RCP":
            return False
        return self.opcode.startswith(_ARITHMETIC) or (self.opcode == "LOP3.LUT" and ", 0x96" in self.operands)

    @property
    def is_vector(self) -> bool:
        return self.opcode.startswith(("LDG", "STG")) and self.width == 16


_LINE = re.compile(r"\s+/\*([0-9a-f]{4,})\*/\s+(?:(@\S+)\s+)?([A-Z][A-Z0-9_.]*)\s*([^;]*);")


def functions(sass: str, wanted: Callable[[str], bool] = lambda name: True) -> dict[str, list[Instruction]]:
    """Each function of `cuobjdump -sass`, by its mangled name."""
    found: dict[str, list[Instruction]] = {}
    for text in sass.split("Function : ")[1:]:
        name, _, lines = text.partition("\n")
        if wanted(name.strip()):
            matches = filter(None, map(_LINE.match, lines.splitlines()))
            found[name.strip()] = [Instruction(int(m[1], 16), m[3], m[2] or "", m[4].strip()) for m in matches]
    return found


@dataclass(frozen=True)
class Flow:
    """Basic blocks by number, in the order of their addresses, and where each goes."""

    blocks: tuple[tuple[Instruction, ...], ...]
    successors: tuple[tuple[int, ...], ...]


def flow_of(code: Sequence[Instruction]) -> Flow:
    """What a whole warp never takes is left out: the branch of BRA.DIV, and calls, whose code is for rare operands."""
    code = list(_with_jumps(code))
    targets = {target for i in code if (target := _target(i)) is not None}
    ends = ("BRA", "BRX", "EXIT", "RET")
    blocks: list[list[Instruction]] = [[]]
    for instruction in code:
        if blocks[-1] and (instruction.at in targets or blocks[-1][-1].opcode.startswith(ends)):
            blocks.append([])
        blocks[-1].append(instruction)
    number = {block[0].at: index for index, block in enumerate(blocks)}
    successors = []
    for index, block in enumerate(blocks):
        last = block[-1]
        target = _target(last)
        after = [number[target]] if target in number else []
        stops = last.opcode.startswith(ends) and not _is_conditional(last)
        if not stops and index + 1 < len(blocks):
            after.append(index + 1)
        successors.append(tuple(after))
    return Flow(tuple(map(tuple, blocks)), tuple(successors))


def _with_jumps(code: Sequence[Instruction]) -> Iterator[Instruction]:
    """sm_80's code leaves loops by calls that never return: those are branches. Others come to a RET before an EXIT."""
    for instruction in code:
        if instruction.opcode.startswith("CALL") and (to := re.search(r"0x([0-9a-f]+)$", instruction.operands)):
            rest = (i.opcode.partition(".")[0] for i in code if i.at >= int(to[1], 16))
            if next((opcode for opcode in rest if opcode in ("EXIT", "RET")), None) == "EXIT":
                instruction = instruction._replace(opcode="BRA")
        yield instruction


def _target(instruction: Instruction) -> int | None:
    if not instruction.opcode.startswith("BRA") or ".DIV" in instruction.opcode:
        return None
    address = re.search(r"0x([0-9a-f]+)$", instruction.operands)
    return int(address[1], 16) if address else None


def _is_conditional(instruction: Instruction) -> bool:
    # `@P0 BRA 0x..`, `BRA P0, 0x..`, and BRA.DIV, which goes on as if the warp were whole.
    return bool(instruction.predicate) or "," in instruction.operands


@dataclass(frozen=True)
class Loop:
    head: int
    blocks: frozenset[int]
    latches: frozenset[int]  # blocks that jump back to the head


def loops_of(flow: Flow) -> list[Loop]:
    """Natural loops: a jump back to a block that every way to it has passed, and all that leads there."""
    count = len(flow.blocks)
    before: list[list[int]] = [[] for _ in range(count)]
    reached, todo = {0}, [0]
    while todo:
        block = todo.pop()
        for after in flow.successors[block]:
            before[after].append(block)
            if after not in reached:
                reached.add(after)
                todo.append(after)
    everything = (1 << count) - 1
    dominators = [1 if block == 0 else everything for block in range(count)]
    changed = True
    while changed:
        changed = False
        for block in sorted(reached - {0}):
            common = everything
            for previous in before[block]:
                common &= dominators[previous]
            changed |= dominators[block] != (common := common | 1 << block)
            dominators[block] = common
    latches: dict[int, set[int]] = {}
    for block in reached:
        for after in flow.successors[block]:
            if dominators[block] >> after & 1:
                latches.setdefault(after, set()).add(block)
    return [Loop(head, _body(head, ends, before), frozenset(ends)) for head, ends in latches.items()]


def _body(head: int, latches: set[int], before: list[list[int]]) -> frozenset[int]:
    body, todo = {head, *latches}, [block for block in latches if block != head]
    while todo:
        for previous in before[todo.pop()]:
            if previous not in body:
                body.add(previous)
                todo.append(previous)
    return frozenset(body)


Rank = tuple[float, float, float, float]  # arithmetic, calls below 0, 16-byte loads and stores, instructions below 0


def _sum(*ranks: Rank) -> Rank:
    arithmetic, calls, vectors, length = (sum(parts) for parts in zip(*ranks, strict=True))
    return arithmetic, calls, vectors, length


def _rank(code: Sequence[Instruction]) -> Rank:
    return (
        sum(i.is_arithmetic for i in code),
        -sum(i.opcode.startswith("CALL") for i in code),
        sum(i.is_vector for i in code),
        -len(code),
    )


@dataclass(frozen=True)
class Way:
    """One way through a region: its own instructions, and the loops on it."""

    code: tuple[Instruction, ...] = ()
    inner: tuple[Way, ...] = ()

    @property
    def all_code(self) -> tuple[Instruction, ...]:
        return self.code + tuple(i for way in self.inner for i in way.all_code)

    def accesses(self, kind: str, width: int | None = None) -> int:
        """How many loads (LDG) or stores (STG) there are, of so many bytes."""
        return sum(i.opcode.startswith(kind) and width in (None, i.width) for i in self.all_code)

    def innermost(self) -> Iterator[Way]:
        """The loops that load or store and have none such inside; the way itself where there is no loop."""
        deeper = [loop for way in self.inner if way.accesses("LDG") + way.accesses("STG") for loop in way.innermost()]
        yield from deeper or (self,)

    def rank_of_a_turn(self) -> Rank:
        """As if the loop were not unrolled: for one store, or one load where it has no store."""
        arithmetic, calls, vectors, length = _sum(_rank(self.code), *(way.rank_of_a_turn() for way in self.inner))
        turns = max(1, self.accesses("STG") or self.accesses("LDG"))
        return arithmetic / turns, calls / turns, vectors / turns, length / turns


def way_through(code: Sequence[Instruction]) -> Way:
    """A warp's way from a function's start to its end."""
    flow = flow_of(code)
    loops = sorted(loops_of(flow), key=lambda loop: len(loop.blocks))
    ways: dict[int, Way] = {}  # of loops that were looked at, by their heads
    for number, loop in enumerate(loops):
        inside = [other for other in loops[:number] if other.blocks < loop.blocks]
        ways[loop.head] = _best_way(flow, loop.head, loop.blocks, loop.latches, _outermost(inside), ways)
    ends = frozenset(block for block, after in enumerate(flow.successors) if not after)
    return _best_way(flow, 0, frozenset(range(len(flow.blocks))), ends, _outermost(loops), ways)


def _outermost(loops: list[Loop]) -> list[Loop]:
    return [loop for loop in loops if not any(loop.blocks < other.blocks for other in loops)]


def _best_way(
    flow: Flow, start: int, region: frozenset[int], ends: frozenset[int], inner: list[Loop], ways: dict[int, Way]
) -> Way:
    """From start to one of the ends; an inner loop is passed once, as a whole."""
    loop_of = {block: loop for loop in inner for block in loop.blocks}
    best: dict[int, tuple[Rank, tuple[int, ...]] | None] = {}  # on to an end: its rank, and its blocks or loops' heads

    def visit(block: int) -> tuple[Rank, tuple[int, ...]] | None:
        if block in best:
            return best[block]
        best[block] = None  # a way back to here is no way on
        loop = loop_of.get(block)
        members = loop.blocks if loop else frozenset({block})
        own = ways[loop.head].rank_of_a_turn() if loop else _rank(flow.blocks[block])
        onward = {after for member in members for after in flow.successors[member]} & region - members - {start}
        found = [(_sum(own, way[0]), (block, *way[1])) for after in sorted(onward) if (way := visit(after)) is not None]
        if members & ends:
            found.append((own, (block,)))
        best[block] = max(found, default=None)
        return best[block]

    _, passed = visit(start) or (None, ())
    code = (i for block in passed if block not in loop_of for i in flow.blocks[block])
    return Way(tuple(code), tuple(ways[loop_of[block].head] for block in passed if block in loop_of))
