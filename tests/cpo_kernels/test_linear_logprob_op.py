"""linear_logprob as an op: right under torch.compile, no wait for a device, bounded memory, gradients of a head.

T rows, E hidden, V vocabulary, P scored tokens.
"""

import re
from dataclasses import replace
from typing import Any

import pytest
import torch

from cpo_kernels import LogprobPlan, LogprobResult, linear_logprob
from tests.cpo_kernels.device_waits import DeviceWaits, MadeTensors, waits
from tests.cpo_kernels.logprob_oracle import Case, make_case, measured, oracle

OUTPUTS = ("entropy", "mean_logit", "is_top1")


def leaves(case: Case, train_head: bool, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """Hidden, weight and bias of a case; the head takes a gradient if it is trained."""
    hidden, weight = case.hidden.to(dtype).requires_grad_(), case.weight.to(dtype).requires_grad_(train_head)
    assert case.bias is not None
    return [hidden, weight, case.bias.to(dtype).requires_grad_(train_head)]


def loss_of(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, ref_hidden: torch.Tensor, plan: LogprobPlan
) -> tuple[torch.Tensor, LogprobResult]:
    result = linear_logprob(hidden, weight, plan, ref_hidden, bias=bias, softcap=5.0, outputs=OUTPUTS, impl="eager")
    assert result.ref_segment_logps is not None
    margin = result.segment_logps - result.ref_segment_logps
    return -torch.nn.functional.logsigmoid(0.1 * margin).mean(), result


@pytest.mark.parametrize("train_head", [False, True])
def test_a_compiled_function_may_call_it_and_keeps_values_and_gradients_bit_for_bit(train_head: bool) -> None:
    """The graph breaks around the call. torch 2.11 traced an autograd function of ours to gradients of zero."""
    torch._dynamo.reset()
    graphs: list[torch.fx.GraphModule] = []

    def count(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    def model(scale: torch.Tensor, hidden: torch.Tensor, *others: Any) -> tuple[torch.Tensor, LogprobResult]:
        return loss_of(torch.tanh(hidden * scale), *others)

    compiled = torch.compile(model, backend=count)
    num_graphs = []
    for seed in (0, 1):  # the second plan has another number of tokens: it must not be taken for the first
        case = make_case(bias=True, num_tokens=40 + 7 * seed, seed=seed)
        found = []
        for function in (model, compiled):
            given = [torch.tensor(0.7, requires_grad=True), *leaves(case, train_head)]
            loss, result = function(*given, case.hidden.float().flip(0), case.plan())
            gradients = torch.autograd.grad(loss, [leaf for leaf in given if leaf.requires_grad])
            values = [result.token_logps, result.ref_segment_logps, result.entropy, result.mean_logit, result.is_top1]
            found.append([loss, *values, *gradients])
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
        assert all(float(gradient.abs().max()) > 0 for gradient in gradients)
        num_graphs.append(len(graphs))
    assert num_graphs[0] == num_graphs[1] > 0  # another plan compiles nothing again


def test_a_graph_without_breaks_is_refused_with_the_reason() -> None:
    torch._dynamo.reset()
    case = make_case(bias=True)
    compiled = torch.compile(loss_of, backend="aot_eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"linear_logprob.*compile with fullgraph=False"):
        compiled(*leaves(case, False), case.hidden.float(), case.plan())


@pytest.mark.parametrize("train_head", [False, True])
def test_scoring_never_waits_for_the_device(train_head: bool) -> None:
    case = make_case(bias=True)
    assert waits(*leaves(case, train_head), case.plan(), "eager") == []


def test_operators_that_wait_are_found() -> None:
    values = torch.tensor([3, 1, 3])
    with DeviceWaits() as mode:
        values.unique()
        values.bincount()
        values[values > 1]
        int(values.sum())
        torch.repeat_interleave(values, values)
    assert {"bincount", "_local_scalar_dense"} < set(mode.found)
    assert any("unique" in name for name in mode.found)
    assert any("index" in name or "nonzero" in name for name in mode.found)
    assert "repeat_interleave" in mode.found


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_of_a_16_bit_head_are_summed_in_float32(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounded once at the end: thirty chunks of rows added in 16 bits would be off by several steps."""
    monkeypatch.setenv("CPO_KERNELS_MAX_CHUNK_LOGITS", str(33 * 10))
    case = make_case(vocab=33, num_rows=300, num_tokens=600, bias=True)
    for name in ("hidden", "weight", "bias"):
        setattr(case, name, getattr(case, name).to(dtype).double())
    want, got = oracle(case), measured(case, "eager", dtype, train_head=True)
    for name in ("d_weight", "d_bias"):
        scale = float(want[name].abs().max())
        assert got[name].dtype == dtype
        assert float((got[name].double() - want[name]).abs().max()) <= 0.51 * torch.finfo(dtype).eps * scale


@pytest.mark.parametrize("train_head", [False, True])
def test_no_tensor_is_larger_than_a_chunk_of_logits(train_head: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CPO_KERNELS_MAX_CHUNK_LOGITS", str(500 * 7))
    case = make_case(vocab=500, width=5, num_rows=60, num_tokens=120, bias=True)
    given, plan = leaves(case, train_head), case.plan()
    with MadeTensors() as mode:
        result = linear_logprob(*given[:2], plan, bias=given[2], outputs=OUTPUTS, impl="eager")
        result.segment_logps.sum().backward()
    assert mode.largest == 500 * 7  # all rows at once would be 500 * 60


@pytest.mark.parametrize("text", ["0", "-5", "1.5", "many"])
def test_a_bound_that_is_no_number_of_logits_is_refused(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CPO_KERNELS_MAX_CHUNK_LOGITS", text)
    case = make_case()
    with pytest.raises(ValueError, match=rf"^CPO_KERNELS_MAX_CHUNK_LOGITS='{re.escape(text)}': expected a positive"):
        linear_logprob(case.hidden, case.weight, case.plan(), impl="eager")


@pytest.mark.parametrize("train_head", [False, True])
def test_only_what_backward_reads_is_kept(train_head: bool) -> None:
    """A frozen head is not: its weight may be freed, gathered anew or overwritten before backward."""
    case = make_case(bias=True)
    hidden, weight, bias = leaves(case, train_head)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):  # type: ignore[func-returns-value]
        linear_logprob(hidden, weight, case.plan(), bias=bias, impl="eager")
    assert any(tensor is weight or tensor.data_ptr() == weight.data_ptr() for tensor in kept) == train_head
    assert not any(tensor.ndim == 2 and tensor.shape[1] == weight.shape[0] for tensor in kept)


@pytest.mark.parametrize("num_rows", [1, 63, 64, 65, 127, 129, 1000])
def test_any_number_of_rows_is_complete(num_rows: int) -> None:
    case = make_case(129, 8, num_rows, 2 * num_rows + 5, seed=num_rows)
    want, got = oracle(case), measured(case, "eager")
    for name in ("tokens", "segments", "d_hidden"):
        torch.testing.assert_close(got[name], want[name], rtol=1e-11, atol=1e-11)


def test_row_or_target_beyond_the_inputs_is_refused_without_reading_the_device() -> None:
    case = make_case()
    plan = case.plan()
    with DeviceWaits() as mode:
        with pytest.raises(ValueError, match="row 8 of 8 hidden rows"):
            linear_logprob(case.hidden[:8], case.weight, plan)
        with pytest.raises(ValueError, match="target 128 is outside a vocabulary of 128"):
            linear_logprob(case.hidden, case.weight[:128], plan)
    assert mode.found == []


@pytest.mark.parametrize("field", ["segment_order", "pair_order", "pair_index", "row_offsets", "pair_target"])
def test_changed_order_in_the_plan_is_seen(field: str) -> None:
    case = make_case()
    want, plan = oracle(case), case.plan()
    case.plan = lambda: replace(plan, **{field: getattr(plan, field).roll(1, 0)})  # type: ignore[method-assign]
    # lengths from neighbours that no longer ascend: torch may refuse them
    refusals = (RuntimeError, AssertionError) if field == "row_offsets" else AssertionError
    with pytest.raises(refusals):
        compare(measured(case, "eager"), want)


def compare(got: dict[str, Any], want: dict[str, torch.Tensor]) -> None:
    """Values and gradient within 1e-6."""
    for name in ("tokens", "segments", "d_hidden"):
        torch.testing.assert_close(got[name], want[name], rtol=1e-6, atol=1e-6)
