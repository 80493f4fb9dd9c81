"""Every Triton kernel of linear_logprob, in every shipped variant, compiles for compute capability 8.0 and 9.0.

No GPU is needed. What would fail or crawl at the first launch fails here: shared memory above the card's limit, spilled
registers, a product without the card's matrix instructions.
"""

import importlib

import pytest

from tests.cpo_kernels.aot import Compiled, assert_fits, assert_matrix_instructions, compile_kernel
from tests.cpo_kernels.kernel_device import not_interpreted

pytestmark = not_interpreted

MAX_STACK_BYTES = 16  # four registers a thread: the assembler parks that many to reach the next step of occupancy
WIDTH = 4096

INT64 = ("pair_row", "target", "row_offsets", "top")
INT32 = ("first_row", "num_rows", "vocab", "num_splits", "tiles_per_split", "plane")
FLOATS = ("slope", "inner", "cap")
HEAD_TYPED = (  # in the dtype of the head
    "hidden", "weight", "bias", "probabilities", "target_weights", "grad_rows", "grad_products",
)  # fmt: skip
BIAS = {"HAS_BIAS": True, "CAPPED": True}
KERNELS = {
    "triton_chunked._take_targets": {**BIAS, "BLOCK_U": "BLOCK_TARGETS"},
    "triton_chunked._logit_partials": {**BIAS, "WITH_OUTPUTS": True, "BLOCK_V": "BLOCK_LOGITS"},
    "triton_chunked._conditional": {**BIAS, "BLOCK_V": "BLOCK_LOGITS", "INTERPRETED": False},
    "triton_sums._merge": {"TARGETS_APART": True, "WITH_OUTPUTS": True, "BLOCK_S": "MAX_SPLITS"},
    "triton_fused._target_logits": {**BIAS, "ONE_A_ROW": False, "WIDTH": WIDTH, "BLOCK_E": "BLOCK_WIDTH"},
    "triton_backward._row_gradients": {"WIDTH": WIDTH, "BLOCK_E": "BLOCK_WIDTH", "INTERPRETED": False},
    "triton_backward._product_gradients": {**BIAS, "BLOCK_V": "BLOCK_LOGITS", "INTERPRETED": False},
    "triton_backward._put_targets": {"BLOCK_U": "BLOCK_TARGETS", "INTERPRETED": False},
}
# the variants of one kernel that differ from the above
NO_BIAS = {"HAS_BIAS": False, "CAPPED": False}
PLAIN = [
    ("triton_chunked._take_targets", NO_BIAS),
    ("triton_chunked._logit_partials", {**NO_BIAS, "WITH_OUTPUTS": False}),
    ("triton_chunked._conditional", NO_BIAS),
    ("triton_backward._product_gradients", NO_BIAS),
    ("triton_sums._merge", {"TARGETS_APART": False}),
    ("triton_sums._merge", {"TARGETS_APART": False, "WITH_OUTPUTS": False}),
    ("triton_sums._merge", {"WITH_OUTPUTS": False}),
    ("triton_fused._target_logits", {**NO_BIAS, "ONE_A_ROW": True}),
]


def compiled(name: str, constants: dict[str, object], arch: int, warps: int, stages: int, dtype: str) -> Compiled:
    """Compile `module.kernel` of linear_logprob; a constant given as text is that module's constant."""
    module_name, kernel_name = name.split(".")
    module = importlib.import_module(f"cpo_kernels.linear_logprob.{module_name}")
    kernel = getattr(module, kernel_name)
    constants = {key: getattr(module, value) if isinstance(value, str) else value for key, value in constants.items()}
    signature = {}
    for argument in kernel.arg_names:
        if argument in HEAD_TYPED:
            signature[argument] = f"*{dtype}"
        elif argument in INT64:
            signature[argument] = "*i64"
        elif argument in INT32:
            signature[argument] = "i32"
        elif argument in FLOATS or (argument == "scale" and kernel_name == "_conditional"):
            signature[argument] = "fp32"
        elif argument not in constants:
            signature[argument] = "*fp32"
    return compile_kernel(kernel, signature, constants, arch, warps, stages)


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("name", KERNELS)
def test_kernel_compiles_within_the_card(name: str, dtype: str, arch: int) -> None:
    if name == "triton_sums._merge" and dtype == "bf16":
        pytest.skip("takes float32 alone")
    one_warp = name in ("triton_chunked._take_targets", "triton_backward._put_targets")
    assert_fits(compiled(name, KERNELS[name], arch, 1 if one_warp else 4, 3, dtype), arch, MAX_STACK_BYTES)


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("index", range(len(PLAIN)))
def test_plainer_variant_compiles_within_the_card(index: int, arch: int) -> None:
    name, constants = PLAIN[index]
    warps = 1 if name == "triton_chunked._take_targets" else 4
    assert_fits(compiled(name, KERNELS[name] | constants, arch, warps, 3, "bf16"), arch, MAX_STACK_BYTES)


def tiles() -> list[tuple[str, tuple[int | None, int, int, int, int, int]]]:
    """Shipped tiles by dtype; loaded by the tests, so that collection does not import Triton."""
    from cpo_kernels.linear_logprob.triton_fused import TILES_16_BIT, TILES_32_BIT

    return [*(("bf16", tile) for tile in TILES_16_BIT), *(("fp32", tile) for tile in TILES_32_BIT)]


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize(
    ("width", "outputs", "capped"), [(WIDTH, False, False), (WIDTH, True, True), (576, True, False)]
)
@pytest.mark.parametrize("index", range(5))
def test_tile_compiles_within_the_card(index: int, width: int, outputs: bool, capped: bool, arch: int) -> None:
    assert len(tiles()) == 5
    dtype, (_, block_r, block_v, block_e, warps, stages) = tiles()[index]
    constants = {
        "WIDTH": width, "HAS_BIAS": False, "CAPPED": capped, "WITH_OUTPUTS": outputs, "BLOCK_R": block_r,
        "BLOCK_V": block_v, "BLOCK_E": block_e, "GROUP": 8, "UPCAST": False,
    }  # fmt: skip
    binary = compiled("triton_fused._product_partials", constants, arch, warps, stages, dtype)
    assert_fits(binary, arch, MAX_STACK_BYTES)
    hopper = arch == 90 and block_r >= 64  # a smaller tile has no warp-group product
    assert_matrix_instructions(binary, hopper and dtype == "bf16", not hopper and dtype == "bf16")
