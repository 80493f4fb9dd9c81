"""Every kernel of tree_decode, in every shipped tile, compiled for compute capability 8.0 and 9.0 without a GPU.

Read off the binary: shared memory above the card's, registers spilled to the stack, blocks that a multiprocessor holds at
a time, and whether the products of the partial kernel use the card's matrix instructions.
"""

import functools

import pytest

from tests.cpo_kernels.aot import Compiled, assert_fits, assert_matrix_instructions, compile_kernel
from tests.cpo_kernels.kernel_device import not_interpreted
from tests.cpo_kernels.machine_code import machine_code, resident_blocks

pytestmark = [not_interpreted, pytest.mark.slow]
HEAD_DIMS = (32, 64, 96, 128, 256)
MAX_STACK_BYTES = 16  # registers spilled to the stack, per thread: a few loop constants
INT_POINTERS = {"slots_ptr": "*i64", "items_ptr": "*i32", "offsets_ptr": "*i32", "index_ptr": "*i32"}
INT_POINTERS |= dict.fromkeys(("suffix_start_ptr", "suffix_len_ptr", "suffix_depth_ptr", "item_depth_ptr"), "*i32")
# arguments that are in a kernel only where a layer has a window, a soft-cap or sinks
OPTIONS = {
    "WINDOWED": ("window", "item_depth_ptr", "suffix_depth_ptr"),
    "CAPPED": ("cap",),
    "HAS_SINKS": ("sinks_ptr",),
}
STORING = ("_store_kernel", "_rotate_store_kernel")  # one warp a head
# of one multiprocessor at a time: what one block waits for, the others hide
LEAST_BLOCKS = {"_partial_kernel": 2, "_merge_kernel": 6} | dict.fromkeys(STORING, 32)
FLOAT_POINTERS = ("partial_out_ptr", "partial_lse_ptr", "lse_ptr")


@functools.cache
def compiled(
    name: str, head_dim: int, dtype: str, arch: int, group: int = 4, options: tuple[str, ...] = ()
) -> Compiled:
    """The kernel as its launcher compiles it, once; rows, items and heads of a call are no constants of it."""
    import torch

    from cpo_kernels.tree_decode import triton_forward
    from cpo_kernels.tree_decode.plan import ITEM_COLUMNS
    from cpo_kernels.triton_tiles import padded_head_dim

    kernel = getattr(triton_forward, name)
    block_d = padded_head_dim(head_dim)
    constants: dict[str, object] = {"HEAD_DIM": head_dim, "BLOCK_D": block_d, "GROUP": group, "UPCAST": False}
    for option, arguments in OPTIONS.items():
        constants[option] = option in options
        if option not in options:
            constants |= dict.fromkeys(arguments)
    if name == "_partial_kernel" and "WINDOWED" not in options:
        constants["suffix_len_ptr"] = None
    constants["BLOCK_HALF"] = 1 << (head_dim // 2 - 1).bit_length()
    warps, stages = 1 if name in STORING else 4, 3  # 4 and 3: what a launch gets that names none
    if name == "_partial_kernel":
        torch_dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
        tables = triton_forward.TILES, triton_forward.EXACT_TILES
        tile = triton_forward.choose_tile("tree_decode", head_dim, torch_dtype, *tables)
        constants |= {"BLOCK_Q": tile.block_q, "BLOCK_KV": tile.block_kv, "ITEM_COLUMNS": ITEM_COLUMNS}
        warps, stages = tile.num_warps, tile.num_stages
    elif name == "_merge_kernel":
        constants["BLOCK_KV"] = triton_forward.SUFFIX_BLOCKS[max(block_d, min(triton_forward.SUFFIX_BLOCKS))]
    constants = {key: value for key, value in constants.items() if key in kernel.arg_names}
    signature = {key: argument_type(key, dtype, name) for key in kernel.arg_names if key not in constants}
    strides = [key for key in signature if key.endswith("_stride")]
    return compile_kernel(kernel, signature, constants, arch, warps, stages, divisible=strides)


def argument_type(argument: str, dtype: str, kernel: str) -> str:
    """Triton's name for the type of one argument."""
    if not argument.endswith("_ptr"):
        return "fp32" if argument in ("factor", "cap") else "i32"
    if argument in INT_POINTERS:
        return INT_POINTERS[argument]
    partial = argument in FLOAT_POINTERS or (kernel, argument) == ("_partial_kernel", "out_ptr")
    return "*fp32" if partial else f"*{dtype}"


CASES = [(name, head_dim, "bf16") for name in ("_partial_kernel", "_merge_kernel") for head_dim in HEAD_DIMS]
CASES += [("_partial_kernel", head_dim, "fp32") for head_dim in (64, 128, 256)]
CASES += [("_partial_kernel", 128, "fp16"), ("_merge_kernel", 128, "fp32")]
CASES += [(name, 128, dtype) for name in STORING for dtype in ("bf16", "fp32")]
# As in `test_aot_tree_attention`: float32 products are the same on both cards, float16 takes what bfloat16 does.
LEFT_OUT = {
    ("_partial_kernel", 128, "fp32", 90),
    ("_partial_kernel", 256, "fp32", 90),
    ("_partial_kernel", 128, "fp16", 80),
}
BINARIES = [(*case, arch) for case in CASES for arch in (80, 90) if (*case, arch) not in LEFT_OUT]


# what Gemma 2, Gemma 3 and gpt-oss have, all of it in one kernel
OPTIONED = [(*case, arch) for case in (("_partial_kernel", 256), ("_merge_kernel", 128)) for arch in (80, 90)]
OPTIONED += [("_partial_kernel", 64, 90), ("_partial_kernel", 128, 90)]


@pytest.mark.parametrize(("name", "head_dim", "dtype", "arch"), BINARIES)
def test_kernel_fits_the_card(name: str, head_dim: int, dtype: str, arch: int) -> None:
    assert_is_good(compiled(name, head_dim, dtype, arch), name, dtype, arch)


@pytest.mark.parametrize(("name", "head_dim", "arch"), OPTIONED)
def test_kernel_with_window_soft_cap_and_sinks_fits_the_card(name: str, head_dim: int, arch: int) -> None:
    binary = compiled(name, head_dim, "bf16", arch, options=tuple(OPTIONS))
    assert_is_good(binary, name, "bf16", arch)


def assert_is_good(binary: Compiled, name: str, dtype: str, arch: int) -> None:
    """It fits, spills nothing in a loop, leaves room for others, and its products are the card's matrix instructions."""
    assert_fits(binary, arch, MAX_STACK_BYTES)
    products = name == "_partial_kernel" and dtype != "fp32"
    assert_matrix_instructions(binary, products and arch == 90, products and arch == 80)
    assert binary.stack_bytes == 0 or machine_code(binary).inner_spills == 0
    blocks = resident_blocks(arch, binary.registers, binary.shared_bytes, binary.num_warps)
    assert blocks >= LEAST_BLOCKS[name]
    if products:
        (loop,) = machine_code(binary).inner_loops
        assert loop.copies_in_flight > 0
