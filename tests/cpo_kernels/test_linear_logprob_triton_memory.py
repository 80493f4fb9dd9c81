"""What the Triton path of linear_logprob makes: bounded logits, and no expected embedding that nobody asked for."""

import pytest
import torch

from cpo_kernels import linear_logprob
from tests.cpo_kernels.device_waits import MadeTensors
from tests.cpo_kernels.kernel_device import DEVICE, runs_kernels
from tests.cpo_kernels.logprob_oracle import make_case
from tests.cpo_kernels.test_linear_logprob_triton import (  # noqa: F401  (the fixture acts by being here)
    OUTPUTS,
    _poisoned_memory,
)


@runs_kernels
@pytest.mark.parametrize("train_head", [False, True])
def test_no_tensor_is_larger_than_a_chunk_of_logits_in_rows_of_a_multiple_of_16(
    train_head: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CPO_KERNELS_MAX_CHUNK_LOGITS", str(500 * 7))
    case = make_case(vocab=500, width=5, num_rows=15, num_tokens=30, bias=True)
    hidden = case.hidden.to(DEVICE, torch.float32).requires_grad_()
    weight, bias = (x.to(DEVICE, torch.float32).requires_grad_(train_head) for x in (case.weight, case.bias))
    plan = case.plan().to(DEVICE)
    with MadeTensors() as mode:
        result = linear_logprob(hidden, weight, plan, hidden.detach(), bias=bias, outputs=OUTPUTS, impl="triton")
        result.segment_logps.sum().backward()
    assert mode.largest == 512 * 7  # all rows at once would be 512 * 15


@runs_kernels
@pytest.mark.parametrize(("asks", "num_made"), [("gradient", 1), ("no gradient", 0), ("gradient of the head", 0)])
def test_expected_embedding_is_made_for_a_gradient_under_a_frozen_head_alone(
    asks: str, num_made: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once for the policy; never for the reference. It is a product with the head, one row for each row scored."""
    monkeypatch.setenv("CPO_KERNELS_LOGPROB_PATH", "chunk")
    case = make_case()
    hidden = case.hidden.to(DEVICE, torch.float32).requires_grad_(asks != "no gradient")
    weight = case.weight.to(DEVICE, torch.float32).requires_grad_(asks == "gradient of the head")
    plan = case.plan().to(DEVICE)
    with MadeTensors() as mode:
        linear_logprob(hidden, weight, plan, hidden.detach(), impl="triton")
    num_rows, (vocab, width) = len(plan.unique_rows), weight.shape
    assert mode.count((num_rows, width), "mm") == num_made
    assert mode.count((num_rows, vocab), "mm") == 2  # the logits of the policy and of the reference
