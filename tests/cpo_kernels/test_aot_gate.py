"""Claims about the gate of `make aot`: it fails on what it is there for, and every kernel that is launched meets it.

The bad kernels are shipped ones, compiled for other extents, warps or stages than what is shipped.
"""

import re
from dataclasses import replace
from pathlib import Path

import pytest

import cpo_kernels
from tests.cpo_kernels import test_aot_fused_layers as fused
from tests.cpo_kernels import test_aot_linear_logprob as logprob
from tests.cpo_kernels import test_aot_sample_tokens as sampler
from tests.cpo_kernels import test_aot_tree_attention as attention
from tests.cpo_kernels import test_aot_tree_decode as decode
from tests.cpo_kernels.aot import MAX_SHARED_BYTES, Compiled, assert_fits, assert_matrix_instructions
from tests.cpo_kernels.kernel_device import not_interpreted

pytestmark = not_interpreted

FORWARD = attention.Case("_forward_kernel", 128, "bf16")
FOLDER = Path(cpo_kernels.__file__).parent


@pytest.fixture(scope="module")
def shipped() -> dict[int, Compiled]:
    """The forward of tree_attention as it is shipped, by architecture."""
    return {arch: attention.compiled(FORWARD, arch) for arch in (80, 90)}


def test_registers_spilled_to_the_stack_fail() -> None:
    """One warp holds a tile that is shipped with four."""
    spilled = attention.compiled(attention.Case("_sum_parts_kernel", 256, "fp32"), 80, num_warps=1)
    with pytest.raises(AssertionError, match="bytes of stack"):
        assert_fits(spilled, 80, attention.MAX_STACK_BYTES)


@pytest.mark.parametrize("arch", [80, 90])
def test_more_shared_memory_than_the_card_has_fails(arch: int) -> None:
    """Eight stages of keys and values of 16 KiB each; the compiler does not mind."""
    large = attention.compiled(FORWARD, arch, num_stages=8)
    with pytest.raises(AssertionError, match="bytes of shared memory"):
        assert_fits(replace(large, stack_bytes=0), arch, attention.MAX_STACK_BYTES)


def test_a_product_without_the_matrix_instructions_of_its_card_fails() -> None:
    small = attention.compiled(FORWARD, 90, BLOCK_Q=16)  # too few rows for a warp group
    with pytest.raises(AssertionError, match=r"wgmma\.mma_async"):
        assert_matrix_instructions(small, warp_group=True, warp=False)
    exact = attention.compiled(attention.Case("_forward_kernel", 128, "fp32"), 80)
    with pytest.raises(AssertionError, match=r"mma\.sync"):
        assert_matrix_instructions(exact, warp_group=False, warp=True)


@pytest.mark.parametrize("arch", [80, 90])
def test_what_is_shipped_passes_and_any_bound_below_what_it_needs_fails(
    shipped: dict[int, Compiled], arch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    binary = shipped[arch]
    assert binary.shared_bytes > 0
    assert_fits(binary, arch, binary.stack_bytes)
    with pytest.raises(AssertionError, match="bytes of stack"):
        assert_fits(binary, arch, binary.stack_bytes - 1)
    monkeypatch.setitem(MAX_SHARED_BYTES, arch, binary.shared_bytes - 1)
    with pytest.raises(AssertionError, match="bytes of shared memory"):
        assert_fits(binary, arch, binary.stack_bytes)


def test_every_kernel_that_is_launched_meets_the_gate() -> None:
    launched = {
        (op, kernel)
        for op in ("linear_logprob", "tree_attention", "tree_decode", "fused_layers", "sample_tokens")
        for path in (FOLDER / op).glob("*.py")
        for kernel in re.findall(r"^\s+(_\w+)\[\(", path.read_text(encoding="utf-8"), re.MULTILINE)
    }
    gated = {("linear_logprob", name.split(".")[1]) for name in (*logprob.KERNELS, "fused._product_partials")}
    gated |= {("tree_attention", case.kernel) for case, _ in attention.BINARIES}
    gated |= {("tree_decode", name) for name, *_ in decode.BINARIES}
    gated |= {("fused_layers", name) for name in ("_rotate", *fused.LORA_KERNELS, *(name for name, *_ in fused.CASES))}
    gated |= {("sample_tokens", name) for name in sampler.KERNELS}
    assert launched == gated


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("group", [1, 8])
@pytest.mark.parametrize("name", ["_partial_kernel", "_merge_kernel"])
def test_other_groups_of_tree_decode_fit_the_card(name: str, group: int, arch: int) -> None:
    binary = decode.compiled(name, 128, "bf16", arch, group)
    assert_fits(binary, arch, decode.MAX_STACK_BYTES)
    products = name == "_partial_kernel"
    assert_matrix_instructions(binary, products and arch == 90, products and arch == 80)
