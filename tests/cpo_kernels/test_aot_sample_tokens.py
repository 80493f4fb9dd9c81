"""Every kernel of sample_tokens, for each set of processors, compiled for compute capability 8.0 and 9.0 without a GPU.

Read off the binary: registers spilled to the stack, and that logits are loaded 16 bytes at a time.
"""

import functools
import re

import pytest

from tests.cpo_kernels.aot import Compiled, assert_fits, compile_kernel
from tests.cpo_kernels.kernel_device import not_interpreted

pytestmark = [not_interpreted, pytest.mark.slow]
KERNELS = ("_block_maxima", "_block_masses", "_choose")
MAX_STACK_BYTES = 32  # a few loop constants: three programs share a multiprocessor then
POINTERS = {"logits_ptr": "*fp32", "seen_ptr": "*u8", "step_ptr": "*i64", "top_k_ptr": "*i64", "tokens_ptr": "*i64"}
POINTERS |= {"best_ptr": "*i32", "level_count_ptr": "*i32", "listed_ptr": "*i32"}
# what a batch asks for
PROCESSORS = {"greedy": (), "plain": ("uniforms",), "top-p": ("uniforms", "top_p")}
PROCESSORS["all"] = ("uniforms", "top_p", "top_k", "penalty", "seen")


@functools.cache
def compiled(name: str, processors: str, arch: int) -> Compiled:
    """The kernel as its launcher compiles it for a vocabulary of 128,256, once."""
    from cpo_kernels.sample_tokens import triton_sampler

    kernel, given = getattr(triton_sampler, name), PROCESSORS[processors]
    cuts = "top_p" in given or "top_k" in given
    constants: dict[str, object] = {
        f"{part}_ptr": None for part in ("uniforms", "top_p", "top_k", "penalty", "seen") if part not in given
    }
    constants |= {"DRAWS": "uniforms" in given, "CUTS": cuts, "HAS_PENALTY": "penalty" in given}
    constants |= {"HAS_TOP_P": "top_p" in given, "HAS_TOP_K": "top_k" in given}
    constants |= {"BLOCKS": 128} | {
        key: getattr(triton_sampler, key) for key in ("BLOCK", "LEVELS", "LEVEL_STEP", "SLACK")
    }
    constants = {key: value for key, value in constants.items() if key in kernel.arg_names}
    signature = {
        key: POINTERS.get(key, "*fp64" if key.endswith("_ptr") else "i32")
        for key in kernel.arg_names
        if key not in constants
    }
    divisible = ("vocab", "row_stride", "num_uniforms")
    return compile_kernel(kernel, signature, constants, arch, triton_sampler.NUM_WARPS, 3, divisible)


@pytest.mark.parametrize("processors", PROCESSORS)
@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("arch", [80, 90])
def test_kernel_fits_the_card(name: str, processors: str, arch: int) -> None:
    binary = compiled(name, processors, arch)
    assert_fits(binary, arch, MAX_STACK_BYTES)
    if name != "_choose":  # a block of logits is 4 numbers a thread
        assert re.search(r"ld\.global\.v4\.b32", binary.ptx)
