"""Every kernel of tree_attention, in every shipped tile, compiled for compute capability 8.0 and 9.0 without a GPU.

What a card refuses or silently slows down is read off the binary: shared memory above the card's, registers spilled to
the stack, a matrix product that does not use the matrix instructions of 9.0, and machine code that reaches less of the
matrix peak, or leaves room for fewer blocks, than what is written beside the tile.
"""

import functools
import importlib
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import pytest

from tests.cpo_kernels.aot import Compiled, assert_fits, assert_matrix_instructions, compile_kernel
from tests.cpo_kernels.kernel_device import not_interpreted
from tests.cpo_kernels.machine_code import Reach, assert_reaches, machine_code
from tests.cpo_kernels.tile_tables import written_beside

if TYPE_CHECKING:  # loads Triton
    from cpo_kernels.triton_tiles import Tile

pytestmark = [not_interpreted, pytest.mark.slow]
HEAD_DIMS = (64, 96, 128, 256)
SCHEDULE_BLOCKS = (128, 64)  # the defaults of tree_schedule
MAX_STACK_BYTES = 352  # registers spilled to the stack, per thread: addresses and loop constants, outside inner loops
SMALL_SHARED_BYTES = 99 * 1024  # of a block on 8.6, 8.9 and 12.x, which take the tiles of 8.0
FEATURES = ("depths_ptr", "window", "cap_log2", "sinks_ptr")  # arguments that are None for what a model has not
# What models have beyond a dense one, by head size: a window and sinks (gpt-oss), all, a window and a soft-cap (Gemma 2).
FEATURED = {64: ("depths_ptr", "window", "sinks_ptr"), 128: FEATURES, 256: ("depths_ptr", "window", "cap_log2")}
# Loads and stores of spilled registers that the tiles of dense models, which they share, then have in the inner loops. At
# 256 a window alone has 4 and 0 of the 12 and 16. Tiles without any would reach half as much of the matrix peak, or on 8.0
# load nothing ahead.
MAX_FEATURED_SPILLS = {
    ("_forward_kernel", 128, 80): 7,
    ("_grad_kv_kernel", 128, 80): 10,
    ("_grad_kv_kernel", 128, 90): 1,
    ("_grad_kv_kernel", 256, 80): 12,
    ("_grad_kv_kernel", 256, 90): 16,
}
MAX_FEATURED_STACK_BYTES = 416  # of dk alone at 256 on 9.0; of the others up to 296
INT_POINTERS = ("depths", "end", "offsets", "blocks", "start", "stop", "work", "split")
FP32_POINTERS = ("lse_ptr", "delta_ptr", "part_k_ptr", "part_v_ptr", "sinks_ptr")


@dataclass(frozen=True)
class Case:
    """One kernel with the constants that its launcher gives it."""

    kernel: str
    head_dim: int
    dtype: str
    gradients: str = "kv"  # of _grad_kv_kernel, "k" and "v" where they take a pass each
    features: tuple[str, ...] = ()  # arguments out of `FEATURES` that are not None


@functools.cache
def compiled(case: Case, arch: int, **changes: int) -> Compiled:
    """The kernel of a case, compiled once; shapes of a call (rows, heads) are arguments, so one binary serves all.

    `changes` are for tests of the gate: another extent, number of warps or of stages than what is shipped.
    """
    from cpo_kernels.tree_attention import triton_backward
    from cpo_kernels.triton_tiles import padded_head_dim

    kernel = getattr(module_of(case.kernel), case.kernel)
    constants: dict[str, object] = {"HEAD_DIM": case.head_dim, "BLOCK_D": padded_head_dim(case.head_dim)}
    constants |= {"UPCAST": False, "BLOCK_Q": triton_backward.DELTA_ROWS, "BLOCK_KV": triton_backward.SUM_ROWS}
    constants["TILES_PER_KV"] = SCHEDULE_BLOCKS[1] // triton_backward.SUM_ROWS
    constants |= {"WITH_K": "k" in case.gradients, "WITH_V": "v" in case.gradients}
    warps, stages = 4, 1
    if case.kernel in TABLES:
        tile = shipped_tile(case, arch)
        assert tile.num_passes == 1 or case.gradients != "kv", "dk and dv take a pass each"
        constants |= {
            "BLOCK_Q": tile.block_q,
            "BLOCK_KV": tile.block_kv,
            "TILES_PER_Q": SCHEDULE_BLOCKS[0] // tile.block_q,
            "TILES_PER_KV": SCHEDULE_BLOCKS[1] // tile.block_kv,
        }
        warps, stages = tile.num_warps, tile.num_stages
    warps, stages = changes.pop("num_warps", warps), changes.pop("num_stages", stages)
    constants |= changes
    constants |= dict.fromkeys(name for name in FEATURES if name not in case.features)
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    names = [name for name in kernel.arg_names if name not in constants]
    strides = [name for name in names if name.endswith("_stride")]
    signature = {name: argument_type(name, case.dtype) for name in names}
    return compile_kernel(kernel, signature, constants, arch, warps, stages, divisible=strides)


def argument_type(name: str, dtype: str) -> str:
    """Triton's name for the type of one argument."""
    if not name.endswith("_ptr"):
        return "fp32" if name.startswith(("scale", "cap")) else "i32"
    if any(part in INT_POINTERS for part in name.split("_")):
        return "*i32"
    return "*fp32" if name in FP32_POINTERS else f"*{dtype}"


TABLES = {
    "_forward_kernel": ("triton_forward", "TILES"),
    "_grad_kv_kernel": ("triton_backward", "KEY_TILES"),
    "_grad_q_kernel": ("triton_backward", "QUERY_TILES"),
}
NUM_PRODUCTS = {"_forward_kernel": 2, "_grad_kv_kernel": 4, "_grad_q_kernel": 3}  # that a tile needs
KERNELS = tuple(TABLES)
CASES = [Case(kernel, head_dim, "bf16") for kernel in KERNELS for head_dim in HEAD_DIMS]
CASES += [Case("_grad_kv_kernel", 256, "bf16", gradient) for gradient in "kv"]
CASES += [Case(kernel, head_dim, "fp32") for kernel in KERNELS for head_dim in (64, 128, 256)]
CASES += [Case(kernel, 256, dtype) for kernel in ("_delta_kernel", "_sum_parts_kernel") for dtype in ("bf16", "fp32")]
CASES += [Case(kernel, 128, "fp16") for kernel in KERNELS]
# Products in float32 use no matrix instructions: 9.0 gives them as much shared memory as 8.0 and no more stack, and has
# more of both. float16 takes the registers, stack and shared memory of bfloat16 to the last one.
LEFT_OUT = {(Case(kernel, head_dim, "fp32"), 90) for kernel in KERNELS for head_dim in (128, 256)}
LEFT_OUT |= {(Case(kernel, 128, "fp16"), 80) for kernel in KERNELS}
LEFT_OUT |= {(Case("_grad_kv_kernel", 256, "bf16"), 90)}  # dk and dv take a pass each there, and one on 8.0
LEFT_OUT |= {(Case("_grad_kv_kernel", 256, "bf16", gradient), 80) for gradient in "kv"}
BINARIES = [(case, arch) for case in CASES for arch in (80, 90) if (case, arch) not in LEFT_OUT]
# In `make aot` and `make soak` alone: 96 takes the tile of 128; in float32 256 does too, and 9.0 takes those of 8.0.
SELDOM = {(case, arch) for case, arch in BINARIES if case.head_dim == 96}
SELDOM |= {(Case(kernel, size, "fp32"), arch) for kernel in KERNELS for size, arch in ((256, 80), (64, 90))}


def shipped_tile(case: Case, arch: int) -> "Tile":
    """The tile that the launcher chooses."""
    from cpo_kernels.triton_tiles import EXACT_TILES, padded_head_dim

    by_head_dim = EXACT_TILES if case.dtype == "fp32" else getattr(module_of(case.kernel), TABLES[case.kernel][1])[arch]
    tile: Tile = by_head_dim[padded_head_dim(case.head_dim)]
    return tile


def module_of(kernel: str) -> ModuleType:
    """The module of tree_attention that has the kernel."""
    name = TABLES[kernel][0] if kernel in TABLES else "triton_backward"
    return importlib.import_module(f"cpo_kernels.tree_attention.{name}")


@pytest.mark.parametrize(
    ("case", "arch"),
    [pytest.param(*each, marks=[pytest.mark.soak] * (each in SELDOM)) for each in BINARIES],
    ids=[f"{case.kernel}-{case.head_dim}-{case.dtype}-{case.gradients}-{arch}" for case, arch in BINARIES],
)
def test_kernel_fits_the_card(case: Case, arch: int) -> None:
    binary = compiled(case, arch)
    assert_fits(binary, arch, MAX_STACK_BYTES)
    products = case.kernel in KERNELS and case.dtype != "fp32"
    assert_matrix_instructions(binary, products and arch == 90, products and arch == 80)
    assert binary.stack_bytes == 0 or machine_code(binary).inner_spills == 0
    assert arch != 80 or not products or binary.shared_bytes <= SMALL_SHARED_BYTES


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("head_dim", FEATURED)
@pytest.mark.parametrize("kernel", KERNELS)
def test_kernel_with_what_models_have_beyond_a_dense_one_fits_the_card(kernel: str, head_dim: int, arch: int) -> None:
    tile = shipped_tile(Case(kernel, head_dim, "bf16"), arch)
    for gradients in ("kv",) if tile.num_passes == 1 else ("k", "v"):
        binary = compiled(Case(kernel, head_dim, "bf16", gradients, FEATURED[head_dim]), arch)
        assert_fits(binary, arch, MAX_FEATURED_STACK_BYTES)
        assert_matrix_instructions(binary, arch == 90, arch == 80)
        assert arch != 80 or binary.shared_bytes <= SMALL_SHARED_BYTES
        spills = MAX_FEATURED_SPILLS.get((kernel, head_dim, arch), 0)
        assert binary.stack_bytes == 0 or machine_code(binary).inner_spills <= spills


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize(
    "head_dim", [pytest.param(size, marks=[pytest.mark.soak] * (size == 96)) for size in HEAD_DIMS]
)
@pytest.mark.parametrize("kernel", KERNELS)
def test_machine_code_reaches_what_is_written_beside_the_tile(kernel: str, head_dim: int, arch: int) -> None:
    """Where a multiprocessor holds one block, keys have to arrive while it computes. 96 takes the tile of 128.

    Triton compiles dk and dv anew for key heads of one query head each: without the loop over the heads of a group.
    """
    gradients = "kv" if (Case(kernel, head_dim, "bf16"), arch) in BINARIES else ("k", "v")
    cases = [Case(kernel, head_dim, "bf16", gradient) for gradient in ([gradients] if gradients == "kv" else gradients)]
    tile = shipped_tile(cases[0], arch)
    padded = 128 if head_dim == 96 else head_dim
    reach = written(kernel)[arch, padded]
    flops = NUM_PRODUCTS[kernel] * 2 * tile.block_q * tile.block_kv * padded
    if head_dim == 96:
        reach = replace(reach, registers=255)
    for changes in ({}, {"group": 1}) if kernel == "_grad_kv_kernel" and head_dim != 96 else ({},):
        binaries = [compiled(case, arch, **changes) for case in cases]
        for binary in binaries:
            assert_reaches(binary, replace(reach, percent=0))
        loops = [loop for binary in binaries for loop in machine_code(binary).inner_loops if loop.cycles > 0]
        assert reach.blocks > 1 or min(loop.copies_in_flight for loop in loops) > 0
        share = 1 / sum(1 / machine_code(binary).share(flops) for binary in binaries)  # one pass after the other
        assert int(100 * share) >= reach.percent, f"{share:.0%} of the matrix peak"


@pytest.mark.parametrize(("kernel", "arch", "percent"), [
    ("_grad_kv_kernel", 90, 75), ("_grad_q_kernel", 90, 90), ("_grad_kv_kernel", 80, 55), ("_grad_q_kernel", 80, 85),
])  # fmt: skip
def test_tiles_of_the_backward_reach_most_of_the_matrix_peak(kernel: str, arch: int, percent: int) -> None:
    """For heads of 64 and 128. A row of 256 leaves no registers for more than 32 of the other operand."""
    for head_dim in (64, 128):
        assert written(kernel)[arch, head_dim].percent >= percent


def written(kernel: str) -> dict[tuple[int, int], Reach]:
    """What is written beside the tiles of a kernel."""
    source = Path(str(module_of(kernel).__file__)).read_text(encoding="utf-8")
    return written_beside(source, TABLES[kernel][1])
