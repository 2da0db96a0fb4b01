"""The machine code that nvcc makes: nothing spilled, nothing in local memory, memory moved 16 bytes at a time."""

import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import pytest

import pipeline.noise

LIBRARY = Path(pipeline.noise.__file__).parent / "csrc" / "libnoisynn_cuda.so"
# Kernels, and how many of each there are: by format, by the width of a row, and by the way back.
KERNELS = {
    "15gaussian_kernel": 3,
    "salt_and_pepper_kernel": 3,
    "circular_shift_kernel": 3,
    "16optimal_q_kernel": 3,
    "norm_gaussian_kernel": 6,
    "norm_shift_kernel": 6,
    "norm_optimal_q_kernel": 6,
    "norm_backward_kernel": 18,
}
# Registers of a thread with which as many blocks are on a multiprocessor as the launch bounds say.
MOST_REGISTERS = {"norm_backward_kernel": 255, "norm_": 128, "": 64}
pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="no GPU code: nvcc is not installed")


def disassembler() -> str:
    triton = pytest.importorskip("triton")
    beside = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    return shutil.which("cuobjdump") or str(beside / "cuobjdump")


def dumped(*options: str) -> str:
    import os

    tool = disassembler()
    environment = os.environ | {"PATH": f"{Path(tool).parent}:{os.environ['PATH']}"}
    done = subprocess.run([tool, *options, str(LIBRARY)], capture_output=True, text=True, check=True, env=environment)
    return done.stdout


@pytest.fixture(scope="module", params=["sm_80", "sm_90"])
def instructions(request) -> dict[str, Counter[str]]:
    """Each kernel's instructions and how many of each."""
    found: dict[str, Counter[str]] = {}
    for line in dumped("-sass", "-arch", request.param).splitlines():
        if name := re.search(r"Function : (\S+)", line):
            kernel = found.setdefault(name[1], Counter())
        elif match := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", line):
            kernel[match[1]] += 1
    return found


def test_all_kernels_are_there_for_all_formats(instructions):
    for kernel, count in KERNELS.items():
        assert sum(kernel in name for name in instructions) == count, kernel
    assert len(instructions) == sum(KERNELS.values())


def test_nothing_lies_in_local_memory(instructions):
    for name, counts in instructions.items():
        local = [i for i in counts if i.startswith(("LDL", "STL"))]
        assert not local, f"{name}: {local}"


def test_memory_moves_16_bytes_at_a_time(instructions):
    for name, counts in instructions.items():
        for kind in ("LDG", "STG"):
            assert any(i.startswith(kind) and ".128" in i for i in counts), f"{name} has no 16-byte {kind}"


def test_no_registers_are_spilled_and_blocks_fit():
    text = dumped("-res-usage")
    rows = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text)
    assert len(rows) == 2 * sum(KERNELS.values())
    for name, registers, stack, local in rows:
        assert (int(stack), int(local)) == (0, 0), name
        most = next(most for part, most in MOST_REGISTERS.items() if part in name)
        assert int(registers) <= most, f"{name}: {registers} registers, over {most}: fewer blocks fit"
