"""Every kernel of fused_layers, in each shape that is shipped, compiled for compute capability 8.0 and 9.0 without a GPU.

Read off the binary: registers spilled to the stack, and that rows of 16-bit numbers move 16 bytes at a time.
"""

import functools
import importlib
import re
from typing import Any

import pytest

from tests.cpo_kernels.aot import Compiled, assert_fits, assert_matrix_instructions, compile_kernel
from tests.cpo_kernels.kernel_device import not_interpreted

pytestmark = [not_interpreted, pytest.mark.slow]
MAX_STACK_BYTES = 0
FLOAT32_POINTERS = ("rstd_ptr", "sums_ptr", "parts_ptr")


@functools.cache
def compiled(name: str, columns: int, dtype: str, arch: int, trained: bool = False) -> Compiled:
    """The kernel as its launcher compiles it, once; a width that is a multiple of 16 has strides that are."""
    module = importlib.import_module(f"cpo_kernels.fused_layers.triton_{'rms_norm' if 'norm' in name else 'swiglu'}")
    kernel = getattr(module, name)
    constants: dict[str, object] = {"COLUMNS": columns, "UPCAST": False}
    if "norm" in name:
        block = module._block(columns)
        constants["BLOCK"], warps = block["BLOCK"], block["num_warps"]
        if name == "_norm_backward":
            constants["NEEDS_WEIGHT"] = trained
    else:
        constants["BLOCK"], warps = module.BLOCK, 4
    signature = {key: _argument_type(key, dtype) for key in kernel.arg_names if key not in constants}
    strides = [key for key in signature if key.endswith("_stride")]
    return compile_kernel(kernel, signature, constants, arch, warps, 3, divisible=strides if columns % 16 == 0 else ())


@functools.cache
def compiled_lora(name: str, columns: int, rank: int, arch: int, weight: str = "a", **changes: Any) -> Compiled:
    """A kernel of LoRA as its launcher compiles it for a weight [R, C] as A is stored or as B is."""
    from cpo_kernels.fused_layers import triton_lora as module

    kernel = getattr(module, name)
    constants: dict[str, Any] = {
        "COLUMNS": columns,
        "RANK": rank,
        "SPLITS": module.MAX_SPLITS,
        "HAS_BASE": True,
        "UPCAST": False,
    }
    constants |= {"BLOCK_T": module.ROWS, "BLOCK_R": module._block_rank(rank)} | module.TILES[name] | changes
    warps, stages = constants.pop("num_warps"), constants.pop("num_stages")
    constants = {key: value for key, value in constants.items() if key in kernel.arg_names}
    # of A [R, C] the columns are adjacent, of B [C, R] the ranks: Triton makes a constant of a stride of 1
    constants |= {"column_stride" if weight == "a" else "rank_stride": 1}
    signature = {key: _argument_type(key, "bf16") for key in kernel.arg_names if key not in constants}
    strides = [key for key in signature if key.endswith("_stride") and (key != "column_stride" or rank % 16 == 0)]
    return compile_kernel(kernel, signature, constants, arch, warps, stages, divisible=strides)


def _argument_type(argument: str, dtype: str) -> str:
    if argument in ("eps", "scaling"):
        return "fp32"
    if not argument.endswith("_ptr"):
        return "i32"
    return "*fp32" if argument in FLOAT32_POINTERS else f"*{dtype}"


# heads of Qwen3, hidden sizes of SmolLM2 and of 7B to 70B models, and the widest row that is taken
NORMS = [(128, "bf16"), (576, "bf16"), (4096, "bf16"), (4096, "fp16"), (4096, "fp32"), (8192, "bf16"), (32768, "bf16")]
CASES = [("_norm_forward", *norm, False) for norm in NORMS]
CASES += [("_norm_backward", *norm, trained) for norm in NORMS for trained in (False, True) if norm[0] < 32768]
CASES += [
    (name, 11008, dtype, False)
    for name in ("_swiglu_forward", "_swiglu_backward")
    for dtype in ("bf16", "fp16", "fp32")
]


@pytest.mark.parametrize(("name", "columns", "dtype", "trained"), CASES)
@pytest.mark.parametrize("arch", [80, 90])
def test_kernel_fits_the_card(name: str, columns: int, dtype: str, trained: bool, arch: int) -> None:
    binary = compiled(name, columns, dtype, arch, trained)
    assert_fits(binary, arch, MAX_STACK_BYTES)
    accesses = set(re.findall(r"(?:ld|st)\.global\.(\S+)", binary.ptx))
    assert columns < 512 or accesses <= {"v4.b32", "b32"}, accesses  # one float32 a row alone is narrow


@functools.cache
def compiled_rotary(head_dim: int, dtype: str, arch: int, backward: bool) -> Compiled:
    """The rotation of 32 query heads and 8 key heads, whose strides are multiples of 16."""
    from cpo_kernels.fused_layers import triton_rotary as module

    constants: dict[str, Any] = {"HEADS": 32, "TOTAL": 40, "HALF": head_dim // 2, "BACKWARD": backward, "UPCAST": False}
    constants |= module._block(head_dim)
    warps = constants.pop("num_warps")
    signature = {key: _argument_type(key, dtype) for key in module._rotate.arg_names if key not in constants}
    strides = [key for key in signature if key.endswith(("_batch", "_head", "_row"))]
    return compile_kernel(module._rotate, signature, constants, arch, warps, 3, divisible=strides)


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize(("head_dim", "dtype"), [(64, "bf16"), (128, "bf16"), (128, "fp32"), (256, "fp16")])
@pytest.mark.parametrize("arch", [80, 90])
def test_rotation_fits_the_card_and_moves_16_bytes_at_a_time(
    head_dim: int, dtype: str, backward: bool, arch: int
) -> None:
    binary = compiled_rotary(head_dim, dtype, arch, backward)
    assert_fits(binary, arch, MAX_STACK_BYTES)
    assert set(re.findall(r"(?:ld|st)\.global\.(\S+)", binary.ptx)) == {"v4.b32"}


LORA_KERNELS = ("_reduce_columns", "_expand_columns", "_sum_rows")


@pytest.mark.parametrize("weight", ["a", "b"])
@pytest.mark.parametrize("rank", [8, 16, 64])
@pytest.mark.parametrize("name", LORA_KERNELS)
@pytest.mark.parametrize("arch", [80, 90])
def test_kernel_of_lora_fits_the_card_and_multiplies_on_its_matrix_units(
    name: str, rank: int, weight: str, arch: int
) -> None:
    binary = compiled_lora(name, 4096, rank, arch, weight)
    # two tiles of 64 ranks and their low parts are some registers too many; there is no loop around them
    assert_fits(binary, arch, 64 if (name, rank) == ("_expand_columns", 64) else 8)
    # a warp group multiplies 64 rows at once, and the gradient of a weight has as many as ranks
    by_group = arch == 90 and (name != "_sum_rows" or rank == 64)
    assert_matrix_instructions(binary, by_group, not by_group)


def test_a_width_that_is_no_multiple_of_16_is_seen_to_move_single_numbers() -> None:
    assert "ld.global.b16" in compiled("_norm_forward", 4098, "bf16", 90).ptx
