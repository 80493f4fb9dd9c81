"""Every kernel of fused_layers, in each shape that is shipped, compiled for compute capability 8.0 and 9.0 without a GPU.

Read off the binary: registers spilled to the stack, and that rows of 16-bit numbers move 16 bytes at a time.
"""

import functools
import importlib
import re

import pytest

from tests.cpo_kernels.aot import Compiled, assert_fits, compile_kernel
from tests.cpo_kernels.kernel_device import not_interpreted

pytestmark = [not_interpreted, pytest.mark.slow]
MAX_STACK_BYTES = 0
FLOAT32_POINTERS = ("rstd_ptr", "sums_ptr")


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


def _argument_type(argument: str, dtype: str) -> str:
    if argument == "eps":
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


def test_a_width_that_is_no_multiple_of_16_is_seen_to_move_single_numbers() -> None:
    assert "ld.global.b16" in compiled("_norm_forward", 4098, "bf16", 90).ptx
