"""Every kernel of tree_attention, in every shipped tile, compiled for compute capability 8.0 and 9.0 without a GPU.

What a card refuses or silently slows down is read off the binary: shared memory above the card's, registers spilled to
the stack, and on 9.0 a matrix product that does not use its matrix instructions.
"""

import functools
from dataclasses import dataclass

import pytest

from tests.cpo_kernels.aot import Compiled, assert_fits, assert_matrix_instructions, compile_kernel
from tests.cpo_kernels.kernel_device import not_interpreted

pytestmark = [not_interpreted, pytest.mark.slow]
HEAD_DIMS = (64, 96, 128, 256)
SCHEDULE_BLOCKS = (128, 64)  # the defaults of tree_schedule
MAX_STACK_BYTES = 128  # registers spilled to the stack, per thread: at most a few addresses and loop constants
INT_POINTERS = ("end", "offsets", "blocks", "start", "stop", "work", "split")
FP32_POINTERS = ("lse_ptr", "delta_ptr", "part_k_ptr", "part_v_ptr")


@dataclass(frozen=True)
class Case:
    """One kernel with the constants that its launcher gives it."""

    kernel: str
    head_dim: int
    dtype: str


@functools.cache
def compiled(case: Case, arch: int, **changes: int) -> Compiled:
    """The kernel of a case, compiled once; shapes of a call (rows, heads) are arguments, so one binary serves all.

    `changes` are for tests of the gate: another extent, number of warps or of stages than what is shipped.
    """
    from cpo_kernels.tree_attention import triton_backward, triton_forward
    from cpo_kernels.triton_tiles import EXACT_TILES, padded_head_dim

    modules = {
        "_forward_kernel": triton_forward,
        "_delta_kernel": triton_backward,
        "_grad_kv_kernel": triton_backward,
        "_sum_parts_kernel": triton_backward,
        "_grad_q_kernel": triton_backward,
    }
    tables = {
        "_forward_kernel": triton_forward.TILES,
        "_grad_kv_kernel": triton_backward.KEY_TILES,
        "_grad_q_kernel": triton_backward.QUERY_TILES,
    }
    kernel = getattr(modules[case.kernel], case.kernel)
    constants: dict[str, object] = {"HEAD_DIM": case.head_dim, "BLOCK_D": padded_head_dim(case.head_dim)}
    constants |= {"UPCAST": False, "BLOCK_Q": triton_backward.DELTA_ROWS, "BLOCK_KV": triton_backward.SUM_ROWS}
    constants["TILES_PER_KV"] = SCHEDULE_BLOCKS[1] // triton_backward.SUM_ROWS
    constants["NUM_PHASES"] = triton_backward.num_phases(padded_head_dim(case.head_dim))
    warps, stages = 4, 1
    if case.kernel in tables:
        table = EXACT_TILES if case.dtype == "fp32" else tables[case.kernel]
        tile = table[padded_head_dim(case.head_dim)]
        constants |= {
            "BLOCK_Q": tile.block_q,
            "BLOCK_KV": tile.block_kv,
            "TILES_PER_Q": SCHEDULE_BLOCKS[0] // tile.block_q,
            "TILES_PER_KV": SCHEDULE_BLOCKS[1] // tile.block_kv,
        }
        warps, stages = tile.num_warps, tile.num_stages
    warps, stages = changes.pop("num_warps", warps), changes.pop("num_stages", stages)
    constants |= changes
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    names = [name for name in kernel.arg_names if name not in constants]
    strides = [name for name in names if name.endswith("_stride")]
    signature = {name: argument_type(name, case.dtype) for name in names}
    return compile_kernel(kernel, signature, constants, arch, warps, stages, divisible=strides)


def argument_type(name: str, dtype: str) -> str:
    """Triton's name for the type of one argument."""
    if not name.endswith("_ptr"):
        return "fp32" if name.startswith("scale") else "i32"
    if any(part in INT_POINTERS for part in name.split("_")):
        return "*i32"
    return "*fp32" if name in FP32_POINTERS else f"*{dtype}"


KERNELS = ("_forward_kernel", "_grad_kv_kernel", "_grad_q_kernel")
CASES = [Case(kernel, head_dim, "bf16") for kernel in KERNELS for head_dim in HEAD_DIMS]
CASES += [Case(kernel, head_dim, "fp32") for kernel in KERNELS for head_dim in (64, 128, 256)]
CASES += [Case(kernel, 256, dtype) for kernel in ("_delta_kernel", "_sum_parts_kernel") for dtype in ("bf16", "fp32")]
CASES += [Case(kernel, 128, "fp16") for kernel in KERNELS]
# Products in float32 use no matrix instructions: 9.0 gives them as much shared memory as 8.0 and no more stack, and has
# more of both. float16 takes the registers, stack and shared memory of bfloat16 to the last one.
LEFT_OUT = {(Case(kernel, head_dim, "fp32"), 90) for kernel in KERNELS for head_dim in (128, 256)}
LEFT_OUT |= {(Case(kernel, 128, "fp16"), 80) for kernel in KERNELS}
BINARIES = [(case, arch) for case in CASES for arch in (80, 90) if (case, arch) not in LEFT_OUT]


@pytest.mark.parametrize(
    ("case", "arch"), BINARIES, ids=[f"{case.kernel}-{case.head_dim}-{case.dtype}-{arch}" for case, arch in BINARIES]
)
def test_kernel_fits_the_card(case: Case, arch: int) -> None:
    binary = compiled(case, arch)
    assert_fits(binary, arch, MAX_STACK_BYTES)
    products = case.kernel in KERNELS and case.dtype != "fp32"
    assert_matrix_instructions(binary, products and arch == 90, products and arch == 80)
