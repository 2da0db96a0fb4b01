"""What is read from a GPU's machine code: by a program whose counts are known, and of the library that was built."""

import pytest

from benchmarks import machine_code
from benchmarks.code_paths import functions, way_through
from benchmarks.machine_code import GPUS, Cost, Kernel, cost_of, costs, kernel_of, pipes_of, print_costs, record

H100, H200, A100 = GPUS
MANGLED = "_ZN7noisynn4_hid15gaussian_kernelINS_8BFloat16EEEvPKT_PS2_NS_6CommonE"

# A stride loop (0x20 to 0x0d0) with a call for rare operands, a fork for tails before each access, a fork past the
# noise, and a way for warps that are not whole. Behind the end: the call's code.
STRIDES = """
                Function : {name}
        /*0000*/                   LDC R1, c[0x0][0x28] ;        /* 0x00000a00ff017b82 */
                                                                 /* 0x000fe20000000800 */
        /*0010*/               @P0 EXIT ;                        /* 0x000000000000094d */
        /*0020*/               @P1 BRA 0x50 ;
        /*0030*/                   LDG.E.U16.CONSTANT R8, desc[UR4][R2.64] ;
        /*0040*/                   BRA 0x60 ;
        /*0050*/                   LDG.E.128.CONSTANT R8, desc[UR4][R2.64] ;
        /*0060*/              @!P2 BRA 0xb0 ;
        /*0070*/                   IMAD.WIDE.U32 R4, R4, -0x2daee0ad, RZ ;
        /*0080*/                   BRA.DIV UR4, 0x100 ;
        /*0090*/               @P4 CALL.REL.NOINC 0x130 ;
        /*00a0*/                   FFMA R8, R4, R5, R8 ;
        /*00b0*/              @!P1 BRA P3, 0xe0 ;
        /*00c0*/                   STG.E.128 desc[UR4][R6.64], R8 ;
        /*00d0*/               @P5 BRA 0x20 ;
        /*00d8*/                   BRA 0xf0 ;
        /*00e0*/                   STG.E.U16 desc[UR4][R6.64], R8 ;
        /*00e8*/               @P5 BRA 0x20 ;
        /*00f0*/                   EXIT ;
        /*0100*/                   SHFL.BFLY P0, R21, R17, R25, R26 ;
        /*0110*/                   SHFL.BFLY P0, R21, R17, R25, R26 ;
        /*0120*/                   BRA 0x90 ;
        /*0130*/                   MUFU.RSQ R4, R5 ;
        /*0140*/                   RET.REL.NODEC R16 0x0 ;
        /*0150*/                   BRA 0x150;
        /*0160*/                   NOP;
"""

# Two sums for each 16 bytes, then the results: the second loop unrolled twice, with a third for what is left over.
TWO_LOOPS = """
                Function : {name}
        /*0000*/                   MOV R1, R2 ;
        /*0010*/                   LDG.E.128 R8, [R2.64] ;
        /*0020*/                   FADD R8, R9, R10 ;
        /*0030*/                   FADD R8, R9, R10 ;
        /*0040*/              @!P0 BRA 0x10 ;
        /*0050*/               @P2 BRA 0xb0 ;
        /*0060*/                   LDG.E.128 R8, [R2.64] ;
        /*0070*/                   STG.E.128 [R2.64], R8 ;
        /*0080*/                   LDG.E.128 R8, [R2.64+0x10] ;
        /*0090*/                   FMUL R8, R8, R9 ;
        /*0098*/                   STG.E.128 [R2.64+0x10], R8 ;
        /*00a0*/              @!P0 BRA 0x60 ;
        /*00b0*/                   LDG.E.128 R8, [R2.64] ;
        /*00c0*/                   STG.E.128 [R2.64], R8 ;
        /*00d0*/               @P0 CALL.REL.NOINC 0xf0 ;
        /*00e0*/                   BRA 0xb0 ;
        /*00f0*/                   EXIT ;
"""


def program(text: str, name: str = MANGLED) -> tuple[Kernel, list]:
    ((mangled, code),) = functions(text.format(name=name)).items()
    kernel = kernel_of(mangled)
    assert kernel is not None
    return kernel, code


def test_a_loop_costs_what_is_on_the_way_of_whole_units():
    kernel, code = program(STRIDES)
    assert len(code) == 25
    cost = cost_of(kernel, "sm_90", code)
    # @P1 BRA, LDG, @!P2 BRA, IMAD, BRA.DIV, CALL, FFMA, @!P1 BRA, STG, @P5 BRA: 16 bytes are 8 elements.
    assert (cost.elements, cost.instructions) == (8, 10 / 8)
    assert cost.opcodes["BRA"] == 4 / 8 and "MUFU.RSQ" not in cost.opcodes and "SHFL.BFLY" not in cost.opcodes
    assert cost.outside == 3  # LDC, @P0 EXIT, EXIT: the shortest way out of the loop
    assert cost.pipes == {"access": 1.0, "float": 3 / 8, "multiply": 2 / 8}


def test_of_two_ways_with_the_same_arithmetic_the_shorter_is_taken():
    """The longer asks which elements it is for. Constants and divisions of integers are no arithmetic of it."""
    text = """
                Function : {name}
        /*0010*/                   LDG.E.128 R8, [R2.64] ;
        /*0020*/              @!P1 BRA 0x90 ;
        /*0030*/                   HFMA2.MMA R9, -RZ, RZ, 0, 0 ;
        /*0040*/                   MUFU.RCP R9, R9 ;
        /*0050*/                   LOP3.LUT R8, R9, R8, R7, 0x96, !PT ;
        /*0060*/                   FFMA R8, R8, R9, R10 ;
        /*0070*/                   STG.E.128 [R2.64], R8 ;
        /*0080*/                   BRA 0xc0 ;
        /*0090*/                   LOP3.LUT R8, R9, R8, R7, 0x96, !PT ;
        /*00a0*/                   FFMA R8, R8, R9, R10 ;
        /*00b0*/                   STG.E.128 [R2.64], R8 ;
        /*00c0*/              @!P0 BRA 0x10 ;
        /*00d0*/                   EXIT ;
"""
    kernel, code = program(text)
    cost = cost_of(kernel, "sm_90", code)
    assert cost.instructions == 6 / 8 and "MUFU.RCP" not in cost.opcodes


def test_reading_loops_count_and_unrolled_ones_once():
    kernel, code = program(TWO_LOOPS)
    cost = cost_of(kernel, "sm_80", code)
    assert cost.elements == 16
    # The reading loop: 4 for 8 elements as the storing one has 2 loads for 16; that: 6 for 16; the rest is left over.
    assert cost.instructions == pytest.approx(4 / 16 + 6 / 16)
    assert cost.opcodes["FADD"] == 2 / 16 and cost.opcodes["FMUL"] == 1 / 16
    assert "CALL.REL.NOINC" not in cost.opcodes  # a jump out of the last loop, which is left over
    assert len(list(way_through(code).innermost())) == 3


@pytest.mark.parametrize(
    ("mangled", "expected"),
    [
        (MANGLED, ("gaussian", "bfloat16", 2, ())),
        (
            "_ZN7noisynn50_GLOBAL__N__0dde2d50_12_norm_cuda_cu_0a1b70c3_523420norm_backward_kernelILNS_3WayE2ELi4ENS_4Half"
            "EEEvNS_12NormBackwardIXT0_ET1_EE",
            ("norm_backward", "float16", 2, (2, 4)),
        ),
        (
            "_ZN7noisynn1a21norm_optimal_q_kernelILi4EfEEvNS_11NormForwardIXT_ET0_EE",
            ("norm_optimal_q", "float32", 4, (4,)),
        ),
        ("_ZN7noisynn5imageIfNS_8BFloat16EEEvPKT_PT0_", ("image", "bfloat16", 2, ())),
        ("_ZN7noisynn12words_kernelEPKlPj", None),
        ("plain", None),
    ],
)
def test_kernels_are_named(mangled, expected):
    assert kernel_of(mangled) == expected


def made_up(opcodes: dict[str, float], name: str = "gaussian", architecture: str = "sm_90") -> Cost:
    return Cost(
        Kernel(name, "bfloat16", 2, ()), architecture, opcodes, 8, 0, machine_code._bytes_of(Kernel(name, "", 2, ()))
    )


def test_bounds_are_the_slowest_of_memory_queue_and_pipes():
    light = made_up({"FFMA": 4.0}).bound_on(H100)
    assert (light.by, light.share_of_copy) == ("memory", 1.0)
    assert light.elements_per_second == pytest.approx(3.35e12 / 4)
    # 128 instructions of a pipe of its own each: 128 * 32 lanes pass 4 schedulers in a clock.
    queued = made_up({"FFMA": 60.0, "LOP3.LUT": 60.0, "BRA": 8.0}).bound_on(H100)
    assert queued.by == "issue" and queued.elements_per_second == pytest.approx(132 * 1.98e9)
    # 64 lanes in a clock; a product of 64 bits takes two passes.
    wide = made_up({"IMAD.WIDE.U32": 32.0}).bound_on(H200)
    assert wide.by == "multiply" and wide.elements_per_second == pytest.approx(132 * 1.98e9)
    assert wide.share_of_copy == pytest.approx(132 * 1.98e9 / (4.8e12 / 4))
    special = made_up({"MUFU.LG2": 16.0}, architecture="sm_80").bound_on(A100)
    assert special.by == "special" and special.elements_per_second == pytest.approx(108 * 1.41e9)
    back = made_up({"FFMA": 1.0}, "norm_backward").bound_on(H100)
    assert back.elements_per_second == pytest.approx(3.35e12 / 6)


def test_half_precision_is_on_the_pipes_of_each_architecture():
    assert pipes_of("HFMA2.MMA", "sm_90") == {"float": 2} and pipes_of("HFMA2.MMA", "sm_80") == {}
    assert pipes_of("UIADD3", "sm_90") == pipes_of("BSSY", "sm_90") == {}
    assert pipes_of("STG.E.128", "sm_90") == {"access": 4} and pipes_of("PRMT", "sm_90") == {"integer": 1}


def test_a_table_and_a_row_have_every_kernel(capsys):
    found = [made_up({"LOP3": 60.0}), made_up({"LOP3": 64.0}, architecture="sm_80"), made_up({"FFMA": 2.0}, "image")]
    print_costs(found)
    text = capsys.readouterr().out
    assert "gaussian" in text and "image" in text and "60.0" in text
    # 60 of 64 lanes a clock against 4 bytes an element.
    assert f"{100 * 4 / 4.8e12 * 132 * 1.98e9 * 64 / 60:.0f} % integer" in text
    row = record(found)
    assert [kernel["kernel"] for kernel in row["kernels"]] == ["gaussian", "gaussian", "image"]
    assert set(row["kernels"][0]["bounds"]) == {"H100 SXM", "H200"} and set(row["kernels"][1]["bounds"]) == {
        "A100 80 GB"
    }
    assert row["kernels"][2]["bytes_per_element"] == 3


@pytest.mark.skipif(machine_code.disassembler() is None, reason="no GPU code: cuobjdump is not installed")
@pytest.mark.skipif(not machine_code.LIBRARY.is_file(), reason="no GPU code: libnoisynn_cuda.so is not built")
def test_the_built_kernels_are_counted():
    found = costs("bfloat16")
    assert {cost.architecture for cost in found} == {"sm_80", "sm_90"}
    of = {cost.kernel.name: cost for cost in found if cost.architecture == "sm_90"}
    assert {"gaussian", "salt_and_pepper", "circular_shift", "optimal_q", "norm_gaussian"} <= of.keys()
    for cost in found:
        # A unit of 8 elements or more; what moves them alone is one load and one store for 8. Pictures in pieces, whose
        # rows are no whole units, are stored one by one.
        in_pieces = cost.kernel.name.startswith("image") and cost.kernel.numbers[-1] == 2
        assert cost.elements >= 8 and (in_pieces or cost.elements % 8 == 0), cost.kernel
        assert 2 / 8 < cost.instructions < 200, cost.kernel
        assert not any(opcode.startswith(("LDL", "STL", "CALL")) for opcode in cost.opcodes), cost.kernel
    # Philox alone: 2 blocks of 10 rounds of 2 products for 8 elements; the first round of a counter is shared.
    for name in ("gaussian", "salt_and_pepper", "norm_gaussian"):
        assert 30 / 8 <= of[name].opcodes["IMAD.WIDE.U32"] <= 60 / 8, name
    assert not any(opcode.startswith("MUFU") for opcode in of["circular_shift"].opcodes)
    logarithms = sum(count for opcode, count in of["gaussian"].opcodes.items() if opcode == "MUFU.LG2")
    assert logarithms == pytest.approx(0.5)  # Box-Muller: one for each two normals
