"""linear_logprob as torch ops: one graph under torch.compile, no wait for a device, bounded memory, gradients of a head.

T rows, E hidden, V vocabulary, P scored tokens.
"""

from typing import Any

import pytest
import torch
import torch._functorch.config

from cpo_kernels import LogprobPlan, LogprobResult, linear_logprob
from cpo_kernels.linear_logprob import op
from cpo_kernels.linear_logprob import results as head_module
from tests.cpo_kernels.device_waits import DeviceWaits, waits
from tests.cpo_kernels.test_linear_logprob import Case, make_case, measured, oracle

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


# torch refuses retain_graph on a compiled graph whose buffers backward may overwrite, its default
@torch._functorch.config.patch(donated_buffer=False)
@pytest.mark.parametrize("train_head", [False, True])
def test_compiled_whole_graph_gives_the_same_bits_forward_and_backward(train_head: bool) -> None:
    torch._dynamo.reset()
    graphs: list[torch.fx.GraphModule] = []

    def count(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    compiled = torch.compile(loss_of, fullgraph=True, backend=count)
    case = make_case(bias=True)
    for seed in (0, 1):  # the second plan has another number of tokens: it must not be taken for the first
        case = make_case(bias=True, num_tokens=40 + 7 * seed, seed=seed)
        found = []
        for function in (loss_of, compiled):
            given = leaves(case, train_head)
            loss, result = function(*given, case.hidden.float().flip(0), case.plan())
            wanted = [leaf for leaf in given if leaf.requires_grad]
            first = torch.autograd.grad(loss, wanted, retain_graph=True)
            second = torch.autograd.grad(loss, wanted)
            assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
            values = [result.token_logps, result.ref_segment_logps, result.entropy, result.mean_logit, result.is_top1]
            found.append([loss, *values, *first])
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
        assert len(graphs) == seed + 1
        calls = [str(node.target) for node in graphs[-1].graph.nodes if node.op == "call_function"]
        assert sum("linear_logprob" in call for call in calls) == 1


@pytest.mark.parametrize(("mode", "train_head"), [("none", False), ("expected", False), ("recompute", True)])
def test_op_passes_the_checks_of_torch(mode: str, train_head: bool) -> None:
    case = make_case(bias=True)
    hidden, weight, bias = leaves(case, train_head)
    hidden.requires_grad_(mode != "none")
    given = (hidden, weight, bias, case.hidden.float(), case.plan().tensors(), 1.5, 6.0, 0.8, ",".join(OUTPUTS))
    torch.library.opcheck(op.scoring, (*given, mode, "eager"))
    torch.library.opcheck(op.scoring, (*given[:3], None, *given[4:8], "", mode, "eager"))


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
        with torch._C._AutoDispatchBelowAutograd():  # as inside an op
            int(values.sum())
    assert {"bincount", "_local_scalar_dense", "item"} < set(mode.found)
    assert any("unique" in name for name in mode.found)
    assert any("index" in name or "nonzero" in name for name in mode.found)
    assert "repeat_interleave" in mode.found


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_of_a_16_bit_head_are_summed_in_float32(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounded once at the end: thirty chunks of rows added in 16 bits would be off by several steps."""
    monkeypatch.setattr(head_module, "MAX_CHUNK_LOGITS", 33 * 10)
    case = make_case(vocab=33, num_rows=300, num_tokens=600, bias=True)
    for name in ("hidden", "weight", "bias"):
        setattr(case, name, getattr(case, name).to(dtype).double())
    want, got = oracle(case), measured(case, "eager", dtype, train_head=True)
    for name in ("d_weight", "d_bias"):
        scale = float(want[name].abs().max())
        assert got[name].dtype == dtype
        assert float((got[name].double() - want[name]).abs().max()) <= 0.51 * torch.finfo(dtype).eps * scale


class LargestTensor(DeviceWaits):
    """Remembers the most elements that any result of an operator has."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operator and look at its results."""
        result = super().__torch_dispatch__(func, types, args, kwargs)
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if (
                isinstance(tensor, torch.Tensor) and tensor.dtype != torch.uint8
            ):  # bytes: copies by Triton's interpreter
                self.largest = max(self.largest, tensor.numel())
        return result


@pytest.mark.parametrize("train_head", [False, True])
def test_no_tensor_is_larger_than_a_chunk_of_logits(train_head: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_module, "MAX_CHUNK_LOGITS", 500 * 7)
    case = make_case(vocab=500, width=5, num_rows=60, num_tokens=120, bias=True)
    given, plan = leaves(case, train_head), case.plan()
    with LargestTensor() as mode:
        result = linear_logprob(*given[:2], plan, bias=given[2], outputs=OUTPUTS, impl="eager")
        result.segment_logps.sum().backward()
    assert mode.entered == ["linear_logprob", "linear_logprob_backward"]
    assert mode.largest == 500 * 7  # all rows at once would be 500 * 60


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
def test_changed_order_in_the_plan_is_seen(field: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case()
    want, original = oracle(case), LogprobPlan.of.__func__  # type: ignore[attr-defined]

    def wrong(cls: type[LogprobPlan], *arguments: Any) -> LogprobPlan:
        plan = original(cls, *arguments)
        changed = getattr(plan, field).roll(1, 0)
        object.__setattr__(plan, field, changed)
        return plan

    monkeypatch.setattr(LogprobPlan, "of", classmethod(wrong))
    if field == "row_offsets":  # lengths from neighbours that no longer ascend: torch may refuse them
        with pytest.raises((RuntimeError, AssertionError)):
            compare(measured(case, "eager"), want)
        return
    with pytest.raises(AssertionError):
        compare(measured(case, "eager"), want)


def compare(got: dict[str, Any], want: dict[str, torch.Tensor]) -> None:
    """Values and gradient within 1e-6."""
    for name in ("tokens", "segments", "d_hidden"):
        torch.testing.assert_close(got[name], want[name], rtol=1e-6, atol=1e-6)
