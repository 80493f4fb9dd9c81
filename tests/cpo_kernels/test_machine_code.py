"""Claims about `machine_code` on fixed text: what it counts, and the price it puts on it."""

import pytest

from tests.cpo_kernels.machine_code import Loop, MachineCode, global_accesses, inner_loops, resident_blocks

# An outer loop with a spill, an inner one with products and a spill, a product outside both, and a branch to itself.
TEXT = """
        .text._kernel:
        /*0000*/                   STL [R1+0x4c], R11 ;
.L_x_3:
        /*0010*/                   STL.64 [R1+0x50], R12 ;
        /*0020*/              @!P0 BRA `(.L_x_1) ;
.L_x_2:
        /*0030*/                   HGMMA.64x16x16.F32.BF16 R88, gdesc[UR24], R88 ;
        /*0040*/                   HGMMA.64x64x16.F32.BF16 R88, gdesc[UR24].tnspB, RZ, !UPT, gsb0 ;
        /*0050*/                   HGMMA.64x128x16.F32.BF16 R24, R152, gdesc[UR8].tnspB, R24 ;
        /*0060*/                   LDL.LU R3, [R1+0x4c] ;
        /*0070*/               @P0 BRA `(.L_x_2) ;
.L_x_1:
        /*0080*/              @!P0 CALL.REL.NOINC `(.L_x_4) ;
        /*0090*/                   BRA `(.L_x_3) ;
.L_x_4:
        /*00a0*/                   HGMMA.64x8x16.F32.BF16 R88, gdesc[UR24], R88 ;
        /*00b0*/                   EXIT ;
.L_x_5:
        /*00c0*/                   BRA `(.L_x_5);
.L_x_6:
"""


def test_inner_loops_and_their_spills_are_found() -> None:
    (inner,), outer_spills = inner_loops(TEXT, 90, 8)
    assert len(inner.instructions) == 5
    assert (inner.spills, outer_spills) == (1, 1)
    assert inner.matrix_instructions == {"64x16 shared": 1, "64x64 shared": 1, "64x128 registers": 1}
    with pytest.raises(ValueError, match="no instructions"):
        inner_loops("", 90, 8)


@pytest.mark.parametrize(
    ("text", "cycles"),
    [
        ("HGMMA.64x16x16.F32.BF16 R88, gdesc[UR24], R88", 20),  # reads 2,560 bytes for 8 cycles of products
        ("HGMMA.64x32x16.F32 R88, gdesc[UR24].tnspA.tnspB, R88", 24),
        ("HGMMA.64x64x16.F32.BF16 R88, gdesc[UR24], R88, gsb0", 32),
        ("HGMMA.64x16x16.F32.BF16 R88, R12, gdesc[UR24], R88", 8),
        ("HGMMA.64x256x16.F32.BF16 R88, R12, gdesc[UR24].tnspB, R88", 128),
    ],
)
def test_warp_group_instruction_costs_its_products_or_its_reads(text: str, cycles: float) -> None:
    assert Loop((text,), 90, 4).cycles == cycles
    assert Loop((text, text), 90, 8).cycles == 4 * cycles


def test_copies_that_no_wait_of_a_pass_waits_for_are_in_flight() -> None:
    waits = ("DEPBAR.LE SB0, 0x4", "WARPGROUP.DEPBAR.LE gsb0, 0x0", "DEPBAR.LE SB0, 0xa")
    assert Loop(waits, 90, 4).copies_in_flight == 4
    assert Loop((*waits, "DEPBAR.LE SB0, 0x0"), 90, 4).copies_in_flight == 0
    assert Loop(("EXIT",), 90, 4).copies_in_flight == 0


def test_warp_instructions_and_their_loads_overlap() -> None:
    product, load = "HMMA.16816.F32.BF16 R120, R128, R176.reuse, RZ", "LDSM.16.MT88.4 R176, [R11+0x8000]"
    assert Loop((product,) * 10, 80, 4).cycles == 80
    assert Loop((product,) * 10 + (load,), 80, 4).cycles == 80
    assert Loop((product,) + (load,) * 10, 80, 4).cycles == 160
    assert Loop(("LDSM.16.M88 R176, [R11]", "@P0 LDSM.16.M88.2 R2, [R11]"), 80, 1).cycles == 3
    assert Loop(("HMMA.1688.F32 R8, R2, R4, RZ",), 80, 1).cycles == 1
    assert Loop((product,), 80, 4).share(4 * 2 * 16 * 8 * 16) == 1.0


@pytest.mark.parametrize(
    "text", ["QGMMA.64x64x32.F32.E4M3.E4M3 R24, gdesc[UR8], R24", "HMMA.1688.F32.TF32 R8, R2, R4, RZ"]
)
def test_matrix_instruction_without_a_price_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="no price"):
        _ = Loop((text,), 90, 4).cycles


def test_share_is_that_of_the_worst_loop_with_products() -> None:
    good = Loop(("HGMMA.64x64x16.F32.BF16 R88, gdesc[UR24], R88",), 90, 4)
    bad, none = Loop(good.instructions * 2, 90, 4), Loop(("LDL R1, [R2]",), 90, 4)
    flops = 2 * 64 * 64 * 16
    assert MachineCode(128, 0, 0, 1, (good, bad, none), 0).share(flops) == 0.5
    assert MachineCode(128, 0, 0, 1, (good, bad, none), 0).inner_spills == 1
    with pytest.raises(ValueError, match="no inner loop"):
        MachineCode(128, 0, 0, 1, (none,), 0).share(flops)


@pytest.mark.parametrize(
    ("arch", "registers", "shared_bytes", "num_warps", "blocks"),
    [
        (90, 128, 0, 8, 2),
        (90, 129, 0, 8, 1),  # given out as 136
        (90, 64, 227 * 1024, 4, 1),
        (90, 64, 113 * 1024, 4, 2),
        (80, 64, 113 * 1024, 4, 1),
        (80, 16, 0, 1, 32),
        (80, 16, 0, 16, 4),
    ],
)
def test_blocks_of_a_multiprocessor(arch: int, registers: int, shared_bytes: int, num_warps: int, blocks: int) -> None:
    assert resident_blocks(arch, registers, shared_bytes, num_warps) == blocks


def test_accesses_of_global_memory_are_counted_by_width() -> None:
    """A copy to shared memory is none of them, nor is a store there."""
    lines = (
        "LDG.E.128 R4, desc[UR4][R2.64]", "@!P0 LDG.E.128.CONSTANT R8, desc[UR4][R2.64]", "LDG.E R0, desc[UR4][R2.64]",
        "LDG.E.U16 R0, [R2.64]", "@P3 STG.E.64 desc[UR4][R2.64], R6", "STG.E desc[UR4][R2.64+0x128], R6",
        "LDGSTS.E.BYPASS.128 [R5], desc[UR4][R2.64]", "STS.128 [R5], R8",
    )  # fmt: skip
    text = "\n".join(f"        /*{place:04x}*/    {line} ;" for place, line in enumerate(lines))
    assert global_accesses(text) == {"LDG.128": 2, "LDG.32": 1, "LDG.U16": 1, "STG.64": 1, "STG.32": 1}
