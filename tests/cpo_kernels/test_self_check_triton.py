"""The self-check on the Triton kernels: right ones pass, and one that does nothing is refused, whichever it is.

The kernels run in Triton's interpreter, as `kernel_device` says.
"""

import importlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
import triton.language as tl

from cpo_kernels import kernel_check, tree_attention
from cpo_kernels.fused_layers import check as fused_check
from cpo_kernels.integrations.transformers import prepare
from cpo_kernels.kernel_check import KernelCheckError, ModelShape
from cpo_kernels.linear_logprob import check as logprob_check
from cpo_kernels.linear_logprob import resolve_linear_logprob
from cpo_kernels.sample_tokens import check as sample_check
from cpo_kernels.self_check import OPS, TRAINING_OPS, self_check
from cpo_kernels.tree_attention import check as attention_check
from cpo_kernels.tree_decode import DecodePlan, tree_decode
from cpo_kernels.tree_decode import check as decode_check
from cpo_kernels.triton_tiles import as_operand
from tests.cpo_kernels.kernel_device import interpreted
from tests.cpo_kernels.posed_checks import CPU, checked_ops, nothing_checked
from tests.tiny import tiny_llama

TINY_SHAPE = ModelShape(
    torch.bfloat16, num_heads=2, num_kv_heads=1, head_dim=16, hidden_size=24, windowed=True, capped=True, has_sinks=True
)
KERNELS_FOLDER = Path(kernel_check.__file__).parent


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Few rows and keys for the interpreter, nothing checked yet, and Triton as the default of the CPU."""
    sizes = {
        attention_check: {"NUM_ROWS": 83, "WINDOW": 40},
        logprob_check: {"MANY_ROWS": 23, "MEDIUM_ROWS": 11, "FEW_ROWS": 6, "VOCAB_SIZE": 131},
        decode_check: {"ROOT_KEYS": 21, "PREFILLED_ROWS": 6},
        sample_check: {"VOCAB_SIZE": 150, "COPIES": 1},
        fused_check: {"NUM_ROWS": 11, "LORA_ROWS": 67},
    }
    for place, found in sizes.items():
        for name, size in found.items():
            monkeypatch.setattr(place, name, size)
    from cpo_kernels.fused_layers import triton_rms_norm

    monkeypatch.setattr(triton_rms_norm, "WEIGHT_PROGRAMS", 4)
    with nothing_checked():
        yield


# op, module, kernel, and the constants that the variant which does nothing has, if not all do nothing
FAULTS: list[tuple[str, str, str, dict[str, Any]]] = [
    ("tree_attention", "triton_forward", "_forward_kernel", {}),
    ("tree_attention", "triton_backward", "_delta_kernel", {}),
    ("tree_attention", "triton_backward", "_grad_q_kernel", {}),
    ("tree_attention", "triton_backward", "_grad_kv_kernel", {}),
    ("tree_attention", "triton_backward", "_sum_parts_kernel", {}),
    *(("linear_logprob", "triton_chunked", "_take_targets", {"CAPPED": capped}) for capped in (False, True)),
    *(("linear_logprob", "triton_chunked", "_logit_partials", {"WITH_OUTPUTS": asked}) for asked in (False, True)),
    ("linear_logprob", "triton_chunked", "_logit_partials", {"HAS_BIAS": True}),
    *(("linear_logprob", "triton_chunked", "_conditional", {"CAPPED": capped}) for capped in (False, True)),
    ("linear_logprob", "triton_sums", "_merge", {"TARGETS_APART": False, "WITH_OUTPUTS": False}),
    ("linear_logprob", "triton_sums", "_merge", {"TARGETS_APART": False, "WITH_OUTPUTS": True}),
    ("linear_logprob", "triton_sums", "_merge", {"TARGETS_APART": True, "WITH_OUTPUTS": False}),
    ("linear_logprob", "triton_sums", "_merge", {"TARGETS_APART": True, "WITH_OUTPUTS": True}),
    *(
        ("linear_logprob", "triton_fused", "_product_partials", {"BLOCK_R": rows, "CAPPED": False})
        for rows in (16, 64, 128)
    ),
    *(("linear_logprob", "triton_fused", "_product_partials", {"CAPPED": capped}) for capped in (False, True)),
    *(("linear_logprob", "triton_fused", "_product_partials", {"WITH_OUTPUTS": asked}) for asked in (False, True)),
    ("linear_logprob", "triton_fused", "_target_logits", {"ONE_A_ROW": False}),
    ("linear_logprob", "triton_fused", "_target_logits", {"ONE_A_ROW": True}),
    ("linear_logprob", "triton_backward", "_row_gradients", {}),
    *(("linear_logprob", "triton_backward", "_product_gradients", {"CAPPED": capped}) for capped in (False, True)),
    ("linear_logprob", "triton_backward", "_put_targets", {}),
    *(("sample_tokens", "triton_sampler", kernel, {}) for kernel in ("_block_maxima", "_block_masses", "_choose")),
    ("tree_decode", "triton_forward", "_store_kernel", {}),
    ("tree_decode", "triton_forward", "_rotate_store_kernel", {}),
    *(("tree_decode", "triton_forward", "_partial_kernel", {"WINDOWED": windowed}) for windowed in (False, True)),
    *(("tree_decode", "triton_forward", "_merge_kernel", {"WINDOWED": windowed}) for windowed in (False, True)),
    ("tree_decode", "triton_forward", "_merge_kernel", {"HAS_SINKS": True, "WINDOWED": False}),
    ("fused_layers", "triton_rms_norm", "_norm_forward", {}),
    *(("fused_layers", "triton_rms_norm", "_norm_backward", {"NEEDS_WEIGHT": trained}) for trained in (False, True)),
    ("fused_layers", "triton_swiglu", "_swiglu_forward", {}),
    ("fused_layers", "triton_swiglu", "_swiglu_backward", {}),
    *(("fused_layers", "triton_rotary", "_rotate", {"BACKWARD": backward}) for backward in (False, True)),
    ("fused_layers", "triton_lora", "_reduce_columns", {}),
    *(("fused_layers", "triton_lora", "_expand_columns", {"HAS_BASE": has_base}) for has_base in (False, True)),
    ("fused_layers", "triton_lora", "_sum_rows", {}),
]


def test_every_kernel_that_is_launched_is_among_the_faults() -> None:
    launched = {
        (op, path.stem, kernel)
        for op in OPS
        for path in (KERNELS_FOLDER / op).glob("*.py")
        for kernel in re.findall(r"^\s+(_\w+)\[\(", path.read_text(encoding="utf-8"), re.MULTILINE)
    }
    assert launched == {fault[:3] for fault in FAULTS}


class DoesNothing:
    """A kernel whose launches with these constants do nothing but spoil what they would have written first."""

    def __init__(self, kernel: Any, constants: dict[str, Any]) -> None:
        self.kernel, self.constants, self.num_skipped = kernel, constants, 0

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *args, **options: self.launch(grid, *args, **options)

    def launch(self, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
        """Launch it, or not."""
        if not self.constants.items() <= options.items():
            self.kernel[grid](*args, **options)
            return
        self.num_skipped += 1
        if self.constants == {"ONE_A_ROW": True}:  # the largest logits: NaN there would only lose ties
            args[5].fill_(float("-inf"))


class Ignores(DoesNothing):
    """A kernel that gets None for one argument."""

    def __init__(self, kernel: Any, argument: str) -> None:
        super().__init__(kernel, {})
        self.argument = argument

    def launch(self, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
        """Launch it without the argument."""
        assert self.argument in options
        self.kernel[grid](*args, **options | {self.argument: None})


@pytest.fixture
def tiny(small: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fewer rows yet, the tiles of the fused product to match, and NaN in memory that is allocated and not written.

    A forest has two query blocks, into which ranges are cut.
    """
    from cpo_kernels.linear_logprob import triton_fused as fused

    monkeypatch.setattr(attention_check, "NUM_ROWS", 150)
    for name, size in {"MANY_ROWS": 9, "MEDIUM_ROWS": 6, "FEW_ROWS": 3, "VOCAB_SIZE": 67}.items():
        monkeypatch.setattr(logprob_check, name, size)
    for name, limits in {"TILES_16_BIT": (3, 4, None), "TILES_32_BIT": (3, None)}.items():
        tiles = [(limit, *tile[1:]) for limit, tile in zip(limits, getattr(fused, name), strict=True)]
        monkeypatch.setattr(fused, name, tuple(tiles))
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def plant(monkeypatch: pytest.MonkeyPatch, op: str, module: str, kernel: str, constants: dict[str, Any]) -> DoesNothing:
    """Put a kernel that does nothing in the place of one."""
    place = importlib.import_module(f"cpo_kernels.{op}.{module}")
    fault = DoesNothing(getattr(place, kernel), constants)
    monkeypatch.setattr(place, kernel, fault)
    return fault


@interpreted
@pytest.mark.parametrize("op", OPS)
def test_right_kernels_pass(tiny: None, op: str) -> None:
    """In the very sizes in which those that do nothing are refused."""
    self_check("cpu", TINY_SHAPE, (op,))
    assert checked_ops() == {op}


@interpreted
@pytest.mark.parametrize(("op", "module", "kernel", "constants"), FAULTS)
def test_a_kernel_that_does_nothing_is_refused_by_the_name_of_its_op(
    tiny: None, monkeypatch: pytest.MonkeyPatch, op: str, module: str, kernel: str, constants: dict[str, Any]
) -> None:
    fault = plant(monkeypatch, op, module, kernel, constants)
    with pytest.raises(KernelCheckError, match=f"^{op}: its Triton kernels are wrong"):
        self_check("cpu", TINY_SHAPE, (op,))
    assert fault.num_skipped > 0


@interpreted
@pytest.mark.parametrize(
    ("module", "kernel", "argument"),
    [
        *(("triton_forward", "_forward_kernel", name) for name in ("depths_ptr", "cap_log2", "sinks_ptr")),
        *(("triton_backward", "_grad_q_kernel", name) for name in ("depths_ptr", "cap_log2")),
        *(("triton_backward", "_grad_kv_kernel", name) for name in ("depths_ptr", "cap_log2")),
    ],
)
def test_an_attention_kernel_that_ignores_what_a_model_has_is_refused(
    small: None, monkeypatch: pytest.MonkeyPatch, module: str, kernel: str, argument: str
) -> None:
    place = importlib.import_module(f"cpo_kernels.tree_attention.{module}")
    monkeypatch.setattr(place, kernel, Ignores(getattr(place, kernel), argument))
    with pytest.raises(KernelCheckError, match=r"^tree_attention: .* error of (windowed|changed scores)"):
        self_check("cpu", TINY_SHAPE, ("tree_attention",))


@interpreted
@pytest.mark.parametrize(
    ("path", "module", "kernel"),
    [("chunk", "triton_fused", "_target_logits"), ("fused", "triton_chunked", "_take_targets")],
)
def test_rows_without_a_gradient_go_by_both_paths_whatever_the_environment_says(
    tiny: None, monkeypatch: pytest.MonkeyPatch, path: str, module: str, kernel: str
) -> None:
    monkeypatch.setenv("CPO_KERNELS_LOGPROB_PATH", path)
    plant(monkeypatch, "linear_logprob", module, kernel, {})
    found = logprob_check.check_linear_logprob(CPU, TINY_SHAPE)
    for name, ratio in found.items():
        if name.startswith("log-probs, path"):
            assert (ratio <= 1) == (f"path {path}" in name), name


@interpreted
def test_lora_without_the_low_parts_of_its_numbers_is_refused(tiny: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from cpo_kernels.fused_layers import triton_lora

    @triton.jit
    def high_alone(x: Any, UPCAST: tl.constexpr) -> Any:
        high = as_operand(x, tl.bfloat16, UPCAST)
        return high, high * 0.0

    monkeypatch.setattr(triton_lora, "_high_and_low", high_alone)
    with pytest.raises(KernelCheckError, match=r"^fused_layers: .* gradient of [ab] is"):
        self_check("cpu", TINY_SHAPE, ("fused_layers",))


@interpreted
def test_each_op_checks_its_own_kernels_before_they_are_the_default(
    small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    q, ends = torch.randn(5, 2, 16), torch.full((5,), 5, dtype=torch.int32)
    plan, arena = DecodePlan.build([0, 1], [], [0, 1], [1, 1]), torch.zeros(2, 4, 1, 16)
    decoded = q[:2], q[:2, :1], q[:2, :1], *arena, plan
    tree_attention(q, q, q, ends, impl="triton")
    tree_decode(*decoded, impl="triton")
    assert checked_ops() == set()
    plant(monkeypatch, "tree_attention", "triton_forward", "_forward_kernel", {})  # a fault that search does not use
    tree_decode(*decoded)
    assert checked_ops() == {"tree_decode"}
    assert resolve_linear_logprob(None, "cpu") == "triton"
    assert checked_ops() == {"tree_decode", "linear_logprob"}
    with pytest.raises(KernelCheckError, match=r"^tree_attention: "):
        tree_attention(q, q, q, ends)


@interpreted
def test_prepare_checks_kernels_by_default_in_the_shapes_of_the_model(
    small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(tiny_llama(hidden_size=64))
    expected = ModelShape(torch.float32, num_heads=4, num_kv_heads=2, head_dim=16, hidden_size=64)
    assert kernel_check.passed == {(op, "triton", "cpu", expected) for op in TRAINING_OPS}
    kernel_check.passed.clear()
    prepare(tiny_llama(hidden_size=64), impl="eager")
    assert checked_ops() == set()
