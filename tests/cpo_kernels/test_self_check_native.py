"""The check that stands between a CPU and its C++ kernels: it passes them in every shape and refuses each broken one."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from cpo_fast.config import SearchConfig
from cpo_fast.search.engine.arena_engine import ArenaEngine
from cpo_kernels import _csrc, kernel_check
from cpo_kernels.integrations.transformers import prepare
from cpo_kernels.kernel_check import KernelCheckError, ModelShape
from cpo_kernels.self_check import NATIVE_CHECKS, OPS, self_check
from cpo_kernels.tree_attention import tree_attention
from tests.cpo_kernels.kernel_device import not_interpreted
from tests.cpo_kernels.posed_checks import checked_ops
from tests.tiny import tiny_llama, tiny_tokenizer

SHAPE = ModelShape(torch.float32, num_heads=4, num_kv_heads=2, head_dim=16, hidden_size=64)
FULL = replace(SHAPE, windowed=True, capped=True, has_sinks=True)


@pytest.fixture(autouse=True)
def nothing_passed() -> Iterator[None]:
    before = set(kernel_check.passed)
    kernel_check.passed.clear()
    yield
    kernel_check.passed.clear()
    kernel_check.passed.update(before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("instructions", _csrc.instruction_sets())
def test_kernels_pass_in_every_dtype_by_every_set_of_instructions(dtype: torch.dtype, instructions: str) -> None:
    _csrc.use_instruction_set(instructions)
    try:
        self_check("cpu", replace(FULL, dtype=dtype), OPS, "native")
    finally:
        _csrc.use_instruction_set(_csrc.instruction_sets()[0])
    assert checked_ops() == set(NATIVE_CHECKS) == {"tree_attention", "tree_decode"}


def plant(monkeypatch: pytest.MonkeyPatch, function: str, place: int, factor: float) -> None:
    """One number of what a C++ function writes is off by a factor."""
    real = getattr(_csrc, function)

    def broken(*arguments: Any) -> None:
        real(*arguments)
        written = arguments[place]
        assert isinstance(written, np.ndarray)
        written.flat[np.abs(written).argmax()] *= factor

    monkeypatch.setattr(_csrc, function, broken)


@pytest.mark.parametrize("factor", [1 + 1e-4, float("nan")])
@pytest.mark.parametrize(
    ("function", "place"),
    [
        ("tree_attention_forward", -3),  # out
        *(("tree_attention_backward", place) for place in (-4, -3, -2)),  # dq, dk, dv
        ("tree_decode", -2),  # out
    ],
)
def test_one_wrong_number_of_a_result_is_refused(
    monkeypatch: pytest.MonkeyPatch, function: str, place: int, factor: float
) -> None:
    plant(monkeypatch, function, place, factor)
    op = function.removesuffix("_forward").removesuffix("_backward")
    with pytest.raises(KernelCheckError, match=rf"^{op}: its C\+\+ kernels are wrong on cpu .*CPO_KERNELS_IMPL=eager"):
        self_check("cpu", SHAPE, (op,), "native")
    self_check("cpu", SHAPE, [other for other in OPS if other != op], "native")


@not_interpreted
def test_the_default_of_a_cpu_is_checked_before_it_runs_and_what_was_asked_for_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    q, ends = torch.randn(5, 2, 16), torch.full((5,), 5, dtype=torch.int32)
    plant(monkeypatch, "tree_attention_forward", -3, 1.5)
    tree_attention(q, q, q, ends, impl="native")
    tree_attention(q, q, q, ends, impl="eager")
    assert checked_ops() == set()
    with pytest.raises(KernelCheckError, match=r"^tree_attention: "):
        tree_attention(q, q, q, ends)
    monkeypatch.setenv("CPO_KERNELS_IMPL", "eager")
    tree_attention(q, q, q, ends)


@not_interpreted
def test_a_search_and_a_training_check_them_in_the_shapes_of_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama(hidden_size=64)
    prepare(model)
    assert kernel_check.passed == {("tree_attention", "native", "cpu", SHAPE)}
    plant(monkeypatch, "tree_decode", -2, 1 + 1e-3)
    with pytest.raises(KernelCheckError, match=r"^tree_decode: its C\+\+ kernels are wrong"):
        ArenaEngine(model, tiny_tokenizer(), SearchConfig(arena_tokens=1000))


def test_no_other_kernels_are_known() -> None:
    with pytest.raises(ValueError, match="expected impl out of triton, native, got eager"):
        self_check("cpu", SHAPE, OPS, "eager")
