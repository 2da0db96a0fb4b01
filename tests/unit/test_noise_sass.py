"""The machine code that nvcc makes: nothing spilled, nothing in local memory, memory moved 16 bytes at a time."""

import re
import shutil
from collections import Counter

import pytest

from benchmarks.code_paths import functions
from benchmarks.machine_code import LIBRARY, dumped

# Kernels, and how many of each there are: by format, by the noise, by whether rows fit its blocks, by how pictures lie,
# by a row's width, by the way back.
KERNELS = {
    "15gaussian_kernel": 3,
    "salt_and_pepper_kernel": 3,
    "gaussian_turned_kernel": 6,
    "salt_and_pepper_turned_kernel": 6,
    "circular_shift_kernel": 3,
    "circular_shift_held_kernel": 3,
    "16optimal_q_kernel": 3,
    "optimal_q_held_kernel": 3,
    "12image_kernel": 27,
    "image_shift_kernel": 9,
    "image_optimal_q_kernel": 9,
    "norm_gaussian_kernel": 6,
    "norm_shift_kernel": 6,
    "norm_optimal_q_kernel": 6,
    "norm_backward_kernel": 18,
}
PIECES = "LNS_9StretchesE2E"
# Registers of a thread with which as many blocks are on a multiprocessor as the launch bounds say.
MOST_REGISTERS = {
    "norm_backward_kernel": 255,
    "norm_shift_kernel": 168,
    "norm_gaussian_kernel": 72,
    "norm_": 128,
    f"image_shift_kernelI{PIECES}": 128,
    "image_": 80,
    "_held_": 128,
    "_turned_": 128,
    "circular_shift_kernel": 80,
    "salt_and_pepper_kernelIf": 80,
    "15gaussian_kernel": 40,
    "": 64,
}
pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="no GPU code: nvcc is not installed")


@pytest.fixture(scope="module", params=["sm_80", "sm_90"])
def instructions(request) -> dict[str, Counter[str]]:
    """Each kernel's instructions and how many of each."""
    code = functions(dumped(LIBRARY, "-sass", "-arch", request.param))
    return {name: Counter(instruction.opcode for instruction in own) for name, own in code.items()}


def test_all_kernels_are_there_for_all_formats(instructions):
    for kernel, count in KERNELS.items():
        assert sum(kernel in name for name in instructions) == count, kernel
    assert len(instructions) == sum(KERNELS.values())


def test_nothing_lies_in_local_memory(instructions):
    for name, counts in instructions.items():
        local = [i for i in counts if i.startswith(("LDL", "STL"))]
        assert not local, f"{name}: {local}"


def test_memory_moves_16_bytes_at_a_time(instructions):
    """But for pictures: of 24 bytes a thread makes 16 of each channel; other rows are moved piece by piece."""
    whole = {name: counts for name, counts in instructions.items() if PIECES not in name}
    assert len(instructions) - len(whole) == 15
    for name, counts in whole.items():
        for kind, bits in (("LDG", ".64" if "image_" in name else ".128"), ("STG", ".128")):
            assert any(i.startswith(kind) and bits in i for i in counts), f"{name} has no {kind}{bits}"


def test_whole_units_are_not_taken_to_pieces(instructions):
    """Of a 16-bit format all is stored by 16 bytes, or element by element at an edge: four bytes are a broken unit."""
    pieces = {
        name: counts["STG.E"]
        for name, counts in instructions.items()
        if counts["STG.E"] and ("BFloat16" in name or "4Half" in name) and "norm_" not in name
    }
    assert not pieces


def test_no_registers_are_spilled_and_blocks_fit():
    text = dumped(LIBRARY, "-res-usage")
    rows = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text)
    assert len(rows) == 2 * sum(KERNELS.values())
    for name, registers, stack, local in rows:
        assert (int(stack), int(local)) == (0, 0), name
        most = next(most for part, most in MOST_REGISTERS.items() if part in name)
        assert int(registers) <= most, f"{name}: {registers} registers, over {most}: fewer blocks fit"
