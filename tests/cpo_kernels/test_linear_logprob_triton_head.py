"""Gradients of a trained head and compiled functions, by the Triton kernels; where they run is said in `kernel_device`."""

from typing import Any

import pytest
import torch

from cpo_kernels import linear_logprob
from tests.cpo_kernels.kernel_device import DEVICE, runs_kernels
from tests.cpo_kernels.logprob_oracle import oracle, upstream
from tests.cpo_kernels.test_linear_logprob_triton import (  # noqa: F401  (the fixture acts by being here)
    DTYPES,
    OUTPUTS,
    _poisoned_memory,
    crowded,
    excess,
    rounded,
)


@runs_kernels
@pytest.mark.parametrize(
    ("options", "dtype"),
    [
        ({"bias": True}, torch.float32),
        *(({"bias": True, "softcap": 4.0, "logit_scale": -1.5}, dtype) for dtype in DTYPES),
    ],
    ids=str,
)
def test_trainable_head_stays_within_twice_the_eager_error(
    options: dict[str, Any], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CPO_KERNELS_MAX_CHUNK_LOGITS", str(300 * 2))  # several chunks of rows
    ratios = excess(crowded(300, **options), dtype, train_head=True)
    if dtype != torch.float32:
        # Eager multiplies float32 copies; here operands are rounded to 16 bits first, as for any matrix product of
        # that dtype. The last rounding of the result is one step of the same size, so four bounds are two such steps.
        ratios = {name: ratio / 4 if name.startswith("d_") else ratio for name, ratio in ratios.items()}
    assert max(ratios.values()) <= 1, ratios


@runs_kernels
def test_bias_alone_may_take_a_gradient() -> None:
    case = rounded(crowded(129, bias=True), torch.float32)
    bias = case.bias.to(DEVICE, torch.float32).requires_grad_()
    hidden, weight = case.hidden.to(DEVICE, torch.float32), case.weight.to(DEVICE, torch.float32)
    result = linear_logprob(hidden, weight, case.plan(), bias=bias, impl="triton")
    token_weight, segment_weight = (w.to(DEVICE, torch.float32) for w in upstream(case))
    total = (result.token_logps * token_weight).sum() + (result.segment_logps * segment_weight).sum()
    (first,) = torch.autograd.grad(total, bias, retain_graph=True)
    (second,) = torch.autograd.grad(total, bias)
    assert torch.equal(first, second)
    torch.testing.assert_close(first.cpu().double(), oracle(case)["d_bias"], rtol=1e-4, atol=1e-4)


@runs_kernels
def test_small_upstream_gradients_survive_float16_and_zero_ones_give_zero() -> None:
    """Their scale is that of the result, whose smallest step is 2^-24."""
    case = rounded(crowded(129), torch.float16)
    leaves = [x.to(DEVICE, torch.float16).requires_grad_() for x in (case.hidden, case.weight)]
    total = linear_logprob(*leaves, case.plan(), impl="triton").segment_logps.sum()
    sizes = (torch.tensor(size, device=DEVICE) for size in (1.0, 2.0**-14, 0.0))
    whole, small, zero = (torch.autograd.grad(total, leaves, size, retain_graph=True) for size in sizes)
    for want, got, nothing in zip(whole, small, zero, strict=True):
        torch.testing.assert_close(got.float(), want.float() * 2.0**-14, rtol=2.0**-10, atol=2.0**-24)
        assert torch.equal(nothing, torch.zeros_like(nothing))


@runs_kernels
def test_a_compiled_function_gets_the_same_bits() -> None:
    case = crowded(129, bias=True)
    hidden, weight = case.hidden.to(DEVICE, torch.float32).requires_grad_(), case.weight.to(DEVICE, torch.float32)
    plan = case.plan().to(DEVICE)

    def loss(hidden: torch.Tensor) -> torch.Tensor:
        result = linear_logprob(hidden, weight, plan, hidden * 0.5, outputs=OUTPUTS, softcap=5.0, impl="triton")
        return (result.segment_logps - result.ref_segment_logps).square().sum()

    compiled = torch.compile(loss, backend="aot_eager")
    (want,), (got,) = (torch.autograd.grad(function(hidden), hidden) for function in (loss, compiled))
    assert torch.equal(got, want)
    assert float(want.abs().max()) > 0
