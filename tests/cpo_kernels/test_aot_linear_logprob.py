"""Every Triton kernel of linear_logprob, with every shipped tile, compiles for compute capability 8.0 and 9.0.

No GPU is needed. What would fail or crawl at the first launch fails here: shared memory above the card's limit, spilled
registers, a product without the card's matrix instructions.
"""

import os

import pytest

from tests.cpo_kernels.aot import MAX_SHARED_BYTES, Compiled, compile_kernel

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="interpreted kernels do not compile")

MAX_STACK_BYTES = 8  # two registers a thread: the assembler parks that many to reach the next step of occupancy
WIDTH = 4096

FLOATS = {"slope": "fp32", "scale": "fp32"}
TYPES = {
    "pair_row": "*i64", "target": "*i64", "row_offsets": "*i64", "first_row": "i32", "first_pair": "i32",
    "last_pair": "i32", "num_rows": "i32", "vocab": "i32", "num_splits": "i32", "tiles_per_split": "i32",
}  # fmt: skip
HEAD_TYPED = ("hidden", "weight", "bias", "probabilities", "target_weights", "grad_rows")  # in the dtype of the head
KERNELS = {
    "_logit_partials": {"HAS_BIAS": True, "BLOCK_V": "BLOCK_LOGITS"},
    "_merge": {"TARGETS_APART": True, "BLOCK_S": "MAX_SPLITS"},
    "_take_targets": {"HAS_BIAS": True, "BLOCK_U": "BLOCK_TARGETS"},
    "_conditional": {"HAS_BIAS": True, "BLOCK_V": "BLOCK_LOGITS", "INTERPRETED": False},
    "_target_logits": {"HAS_BIAS": True, "WIDTH": WIDTH, "BLOCK_E": "BLOCK_WIDTH"},
    "_row_gradients": {"WIDTH": WIDTH, "BLOCK_E": "BLOCK_WIDTH", "INTERPRETED": False},
}


def compiled(name: str, constants: dict[str, object], arch: int, warps: int, stages: int, dtype: str) -> Compiled:
    """Compile a kernel of `forward` or `backward`; a constant given as text is that module's constant."""
    from cpo_kernels.linear_logprob import backward, forward

    module = backward if name == "_row_gradients" else forward
    kernel = getattr(module, name)
    constants = {key: getattr(module, value) if isinstance(value, str) else value for key, value in constants.items()}
    signature = {}
    for argument in kernel.arg_names:
        if argument in HEAD_TYPED:
            signature[argument] = f"*{dtype}"
        elif argument not in constants:
            signature[argument] = (TYPES | FLOATS).get(argument, "*fp32")
    return compile_kernel(kernel, signature, constants, arch, warps, stages)


def check(binary: Compiled, arch: int) -> None:
    assert binary.shared_bytes <= MAX_SHARED_BYTES[arch]
    assert binary.stack_bytes <= MAX_STACK_BYTES, binary.registers


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("name", KERNELS)
def test_kernel_compiles_within_the_card(name: str, dtype: str, arch: int) -> None:
    if name == "_merge" and dtype == "bf16":
        pytest.skip("takes float32 alone")
    check(compiled(name, KERNELS[name], arch, 4, 3, dtype), arch)


def tiles() -> list[tuple[str, tuple[int | None, int, int, int, int, int]]]:
    """Shipped tiles by dtype; loaded by the tests, so that collection does not import Triton."""
    from cpo_kernels.linear_logprob.forward import TILES_16_BIT, TILES_32_BIT

    return [*(("bf16", tile) for tile in TILES_16_BIT), *(("fp32", tile) for tile in TILES_32_BIT)]


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("width", [WIDTH, 576])
@pytest.mark.parametrize("index", range(5))
def test_tile_compiles_within_the_card(index: int, width: int, arch: int) -> None:
    assert len(tiles()) == 5
    dtype, (_, block_r, block_v, block_e, warps, stages) = tiles()[index]
    constants = {
        "WIDTH": width, "HAS_BIAS": False, "BLOCK_R": block_r, "BLOCK_V": block_v, "BLOCK_E": block_e,
        "GROUP": 8, "UPCAST": False,
    }  # fmt: skip
    binary = compiled("_product_partials", constants, arch, warps, stages, dtype)
    check(binary, arch)
    if dtype == "bf16":
        hopper = arch == 90 and block_r >= 64  # a smaller tile has no warp-group product
        assert ("wgmma.mma_async" if hopper else "mma.sync") in binary.ptx
