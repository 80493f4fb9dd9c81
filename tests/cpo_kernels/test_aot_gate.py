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
from tests.cpo_kernels.machine_code import Reach, assert_reaches, machine_code
from tests.cpo_kernels.tile_tables import written_beside

pytestmark = not_interpreted

FORWARD = attention.Case("_forward_kernel", 128, "bf16")
FOLDER = Path(cpo_kernels.__file__).parent


@pytest.fixture(scope="module")
def shipped() -> dict[int, Compiled]:
    """The forward of tree_attention as it is shipped, by architecture."""
    return {arch: attention.compiled(FORWARD, arch) for arch in (80, 90)}


def test_registers_spilled_to_the_stack_fail() -> None:
    """64 queries at a time where 32 are shipped: two accumulators and two products of 64 x 64 are too much for a warp."""
    spilled = attention.compiled(attention.Case("_grad_kv_kernel", 128, "bf16"), 90, BLOCK_Q=64)
    with pytest.raises(AssertionError, match="bytes of stack"):
        assert_fits(spilled, 90, attention.MAX_STACK_BYTES)
    with pytest.raises(AssertionError, match="spills in an inner loop"):
        assert_reaches(spilled, Reach(0, 1, 255))


@pytest.mark.parametrize(
    ("kernel", "arch", "percent", "changes"),
    [
        ("_grad_kv_kernel", 90, 33, {"BLOCK_Q": 32, "num_warps": 8}),
        ("_grad_q_kernel", 80, 52, {"BLOCK_Q": 64, "num_warps": 8}),
    ],
)
def test_products_that_two_groups_of_warps_both_compute_fail(
    kernel: str, arch: int, percent: int, changes: dict[str, int]
) -> None:
    """8 warps on 64 rows or keys: no spill and a block at a time, and scores are made twice."""
    binary = attention.compiled(attention.Case(kernel, 128, "bf16"), arch, **changes)
    flops = attention.NUM_PRODUCTS[kernel] * 2 * changes["BLOCK_Q"] * 64 * 128
    assert_reaches(binary, Reach(percent, 1, 255), flops)
    with pytest.raises(AssertionError, match="% of the matrix peak"):
        assert_reaches(binary, Reach(attention.written(kernel)[arch, 128].percent, 1, 255), flops)


def test_two_stages_keep_no_copies_in_flight(shipped: dict[int, Compiled]) -> None:
    """A pass starts with a wait for all of them, as it does of three where keys wait for the list that names them."""
    two_stages = attention.compiled(FORWARD, 90, num_stages=2)
    for binary, in_flight in ((shipped[90], [2, 3]), (two_stages, [0, 0])):
        loops = machine_code(binary).inner_loops
        assert [loop.copies_in_flight for loop in loops] == in_flight


def test_fewer_blocks_more_registers_or_nothing_written_fail(shipped: dict[int, Compiled]) -> None:
    binary, reach = shipped[90], replace(attention.written("_forward_kernel")[90, 128], percent=0)
    assert_reaches(binary, reach)
    with pytest.raises(AssertionError, match="1 blocks a multiprocessor, 2 are written"):
        assert_reaches(binary, replace(reach, blocks=2))
    with pytest.raises(AssertionError, match="registers"):
        assert_reaches(binary, replace(reach, registers=reach.registers - 1))
    row = "        64: Tile(block_q=128, block_kv=64, num_warps=4, num_stages=3),"
    with pytest.raises(ValueError, match="beside"):
        written_beside(f"\nTILES = {{\n    90: {{\n{row}  # 100 %\n    }},\n}}\n", "TILES")
    with pytest.raises(ValueError, match="no tiles"):
        written_beside("", "TILES")


@pytest.mark.parametrize("arch", [80, 90])
def test_more_shared_memory_than_the_card_has_fails(arch: int) -> None:
    """Twelve stages of keys and values of 16 KiB or more; the compiler does not mind."""
    large = attention.compiled(FORWARD, arch, num_stages=12)
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
    gated = {("linear_logprob", name) for name in logprob.GATED}
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
