"""linear_logprob against full logits and log_softmax in fp64.

    z = softcap * tanh(logit_scale * (h W^T + b) / softcap) / temperature,   logp(row, target) = log_softmax(z)[target]

T rows, E hidden, V vocabulary, P scored tokens, S segments.
"""

from typing import Any

import pytest
import torch

from cpo_kernels import LogprobPlan, linear_logprob
from tests.cpo_kernels.confident_tokens import ConfidentTokens
from tests.cpo_kernels.logprob_oracle import (
    Case,
    full_logits,
    huge,
    make_case,
    measured,
    oracle,
    segment_logps,
    shifted,
    token_logps,
)

IMPLS = ("reference", "eager")

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "large vocabulary": {"vocab": 5003},
    "bias": {"bias": True},
    "logit scale": {"logit_scale": 0.0625},
    "soft-cap": {"softcap": 3.0},
    "temperature": {"temperature": 0.7},
    "everything": {"bias": True, "logit_scale": 1.7, "softcap": 5.0, "temperature": 1.3, "vocab": 1000},
}


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("train_head", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_values_and_gradients_equal_full_logits(variant: str, train_head: bool, impl: str) -> None:
    case = make_case(**VARIANTS[variant])
    want, got = oracle(case), measured(case, impl, train_head=train_head)
    for name in ("tokens", "segments", "d_hidden", *(("d_weight", "d_bias") if train_head else ())):
        if name in want:
            torch.testing.assert_close(got[name], want[name], rtol=1e-11, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")
    if not train_head:
        assert got["d_weight"] is None
        assert got["d_bias"] is None
    assert float(got["segments"][2]) == 0.0


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["all negative", "huge", "ordinary"])
def test_extreme_logits_stay_within_twice_the_eager_error(name: str, dtype: torch.dtype, impl: str) -> None:
    changes = {"all negative": lambda case: shifted(case, -500.0), "huge": huge, "ordinary": lambda case: case}
    case = changes[name](make_case(seed=3))
    if dtype == torch.float32:
        # What the op is given is what is judged: round the inputs first, so that only its own arithmetic counts.
        case.hidden, case.weight = case.hidden.float().double(), case.weight.float().double()
    want, eager, got = oracle(case), oracle(case, dtype), measured(case, impl, dtype)
    for quantity in ("tokens", "segments", "d_hidden"):
        error = float((got[quantity].double() - want[quantity]).abs().max())
        allowed = 2 * float((eager[quantity] - want[quantity]).abs().max())
        # Logits of size L bring an error of eps * L to every log-prob; four such steps for another order of sums.
        size = float(full_logits(case.hidden, case.weight, case.bias, {}).abs().max())
        band = 4 * torch.finfo(dtype).eps * max(size, float(want[quantity].abs().max()))
        assert error <= allowed + band, f"{quantity}: {error:.3g} > {allowed:.3g} + {band:.3g}"


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_inputs_give_fp32_results_from_unrounded_logits(dtype: torch.dtype, impl: str) -> None:
    case = make_case(vocab=1000, seed=5)
    case.hidden, case.weight = case.hidden.to(dtype).double(), case.weight.to(dtype).double()
    want, got = oracle(case), measured(case, impl, dtype)
    assert got["tokens"].dtype == torch.float32
    assert got["segments"].dtype == torch.float32
    assert got["d_hidden"].dtype == dtype
    # Logits of size 10 rounded to bf16 would be off by 3e-2; fp32 accumulation of 24 products is 4 digits better.
    torch.testing.assert_close(got["tokens"].double(), want["tokens"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got["segments"].double(), want["segments"], rtol=1e-5, atol=5e-5)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(got["d_hidden"].double(), want["d_hidden"], rtol=eps, atol=eps)


def test_gradient_of_confident_tokens_survives() -> None:
    """Where p > 0.9999 the gradient is the small rest W_t - E[W], noise if computed as that difference in fp32.

    Plain fp32 autograd, hence "reference", loses it too: the bound belongs to the implementation that trains.
    """
    case = ConfidentTokens.make()
    case.hidden.requires_grad_()
    linear_logprob(case.hidden, case.weight, case.plan(), impl="eager").segment_logps.sum().backward()
    assert case.error(case.hidden.grad) <= 2.5e-3


def test_bfloat16_logits_would_lose_the_gradient_of_confident_tokens() -> None:
    """What the bound above is worth: the usual head and loss in bfloat16 are off by half and more."""
    case = ConfidentTokens.make()
    case.hidden.requires_grad_()
    torch.nn.functional.cross_entropy(case.hidden @ case.weight.T, case.targets, reduction="sum").neg().backward()
    assert case.error(case.hidden.grad) > 0.4


@pytest.mark.parametrize("impl", IMPLS)
def test_confident_token_beside_unlikely_targets_of_the_same_row(impl: str) -> None:
    """Several targets on one confident row: each gradient is W_t - E[W] with its own weight, none may be dropped."""
    case = make_case(vocab=64, width=32, num_rows=2, num_tokens=6, seed=11)
    case.hidden[0] = 1.5 * case.weight[5] / case.weight[5].square().mean().sqrt()
    case.rows, case.targets, case.segments = [0, 0, 0, 0, 1, 1], [5, 5, 9, 0, 5, 63], [0, 1, 1, 3, 4, 4]
    want = oracle(case)
    assert float(want["tokens"][0]) > -1e-4
    for dtype, bound in ((torch.float64, 1e-11), (torch.float32, 1e-5)):
        case.hidden, case.weight = case.hidden.to(dtype).double(), case.weight.to(dtype).double()
        torch.testing.assert_close(
            measured(case, impl, dtype)["d_hidden"].double(), oracle(case)["d_hidden"], rtol=bound, atol=bound
        )


@pytest.mark.parametrize("impl", IMPLS)
def test_outputs_and_reference_are_right_and_carry_no_gradient(impl: str) -> None:
    case = make_case(seed=13, bias=True, logit_scale=1.5, softcap=6.0, temperature=0.8)
    hidden, ref_hidden = case.hidden.clone().requires_grad_(), case.hidden.flip(0).clone().requires_grad_()
    result = linear_logprob(
        hidden, case.weight, case.plan(), ref_hidden, bias=case.bias, impl=impl,
        outputs=("entropy", "mean_logit", "is_top1"), **case.options,
    )  # fmt: skip
    logits = full_logits(case.hidden, case.weight, case.bias, case.options)[case.rows]
    logps = logits.log_softmax(-1)
    torch.testing.assert_close(result.entropy, -(logps.exp() * logps).sum(-1), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(result.mean_logit, logits.mean(-1), rtol=1e-10, atol=1e-10)
    assert torch.equal(result.is_top1, logits.argmax(-1) == torch.tensor(case.targets))
    want_ref = token_logps(case, case.hidden.flip(0), case.weight, case.bias)
    torch.testing.assert_close(result.ref_token_logps, want_ref, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(result.ref_segment_logps, segment_logps(case, want_ref), rtol=1e-11, atol=1e-11)
    assert result.token_logps.requires_grad
    assert result.segment_logps.requires_grad
    for tensor in (result.ref_token_logps, result.ref_segment_logps, result.entropy, result.mean_logit):
        assert not tensor.requires_grad
    result.segment_logps.sum().backward()
    assert hidden.grad is not None
    assert ref_hidden.grad is None


@pytest.mark.parametrize("impl", IMPLS)
def test_nothing_takes_a_gradient_where_the_reference_alone_would(impl: str) -> None:
    case = make_case(seed=14)
    ref_hidden = case.hidden.clone().requires_grad_()
    result = linear_logprob(case.hidden, case.weight, case.plan(), ref_hidden, impl=impl)
    for tensor in (result.token_logps, result.segment_logps, result.ref_token_logps, result.ref_segment_logps):
        assert not tensor.requires_grad


@pytest.mark.parametrize("impl", IMPLS)
def test_is_top1_finds_the_likeliest_target(impl: str) -> None:
    """Random targets are almost never the likeliest, so one is placed there on every row."""
    case = make_case(seed=15)
    best = full_logits(case.hidden, case.weight, None, {}).argmax(-1).tolist()
    case.rows, case.targets, case.segments = list(range(9)) * 2, best + [(b + 1) % 129 for b in best], [0] * 18
    result = linear_logprob(case.hidden, case.weight, case.plan(), outputs=("is_top1",), impl=impl)
    assert result.is_top1.tolist() == [True] * 9 + [False] * 9
    assert result.entropy is None
    assert result.mean_logit is None
    assert result.ref_token_logps is None


@pytest.mark.parametrize("impl", IMPLS)
def test_equal_hidden_gives_bitwise_equal_reference(impl: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        case = make_case(vocab=5003, seed=17)
        hidden, weight = case.hidden.to(dtype), case.weight.to(dtype)
        result = linear_logprob(hidden.requires_grad_(), weight, case.plan(), hidden.detach().clone(), impl=impl)
        assert torch.equal(result.token_logps, result.ref_token_logps)
        assert torch.equal(result.segment_logps, result.ref_segment_logps)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("train_head", [False, True])
def test_empty_plan_gives_zeros_and_a_zero_gradient(train_head: bool, impl: str) -> None:
    hidden = torch.randn(4, 8, requires_grad=True)
    weight = torch.randn(11, 8, requires_grad=train_head)
    nothing = torch.empty(0, dtype=torch.int64)
    result = linear_logprob(hidden, weight, LogprobPlan.build(nothing, nothing, nothing, 3), hidden, impl=impl)
    assert result.token_logps.shape == (0,)
    assert torch.equal(result.segment_logps, torch.zeros(3))
    assert torch.equal(result.ref_segment_logps, torch.zeros(3))
    result.segment_logps.sum().backward()
    assert torch.equal(hidden.grad, torch.zeros(4, 8))


@pytest.mark.parametrize("impl", IMPLS)
def test_backward_twice_gives_the_same_gradient(impl: str) -> None:
    case = make_case(seed=19)
    hidden = case.hidden.clone().requires_grad_()
    total = linear_logprob(hidden, case.weight, case.plan(), impl=impl).segment_logps.square().sum()
    (first,) = torch.autograd.grad(total, hidden, retain_graph=True)
    (second,) = torch.autograd.grad(total, hidden)
    assert torch.equal(first, second)


@pytest.mark.parametrize("impl", IMPLS)
def test_strided_hidden_and_weight_give_the_same_result(impl: str) -> None:
    case = make_case(seed=21)
    want = measured(case, impl)
    wide = torch.full((case.hidden.shape[0], 3 * case.hidden.shape[1]), float("nan"), dtype=torch.float64)
    wide[:, 1::3] = case.hidden
    case.hidden, case.weight = wide[:, 1::3], case.weight.T.contiguous().T
    assert not case.hidden.is_contiguous()
    got = measured(case, impl)
    for name in ("tokens", "segments", "d_hidden"):
        torch.testing.assert_close(got[name], want[name], rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("impl", IMPLS)
def test_order_and_duplicates_of_the_plan_do_not_matter(impl: str) -> None:
    case = make_case(seed=23)
    want = measured(case, impl)
    order = torch.randperm(len(case.rows), generator=torch.Generator().manual_seed(1)).tolist()
    columns = [[column[i] for i in order] for column in (case.rows, case.targets, case.segments)]
    shuffled = Case(case.hidden, case.weight, *columns, case.num_segments)
    result = linear_logprob(shuffled.hidden, shuffled.weight, shuffled.plan(), impl=impl)
    torch.testing.assert_close(result.token_logps, want["tokens"][order], rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(result.segment_logps, want["segments"], rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("impl", IMPLS)
def test_rows_outside_the_plan_are_never_read(impl: str) -> None:
    case = make_case(seed=25, num_rows=9)
    case.rows = [row if row != 4 else 5 for row in case.rows]
    want = measured(case, impl)
    case.hidden = case.hidden.clone()
    case.hidden[4] = float("nan")
    got = measured(case, impl)
    assert torch.equal(got["tokens"], want["tokens"])
    assert torch.equal(got["d_hidden"], want["d_hidden"])
    assert torch.equal(got["d_hidden"][4], torch.zeros(24, dtype=torch.float64))


def test_two_runs_are_bitwise_equal() -> None:
    case = make_case(vocab=5003, seed=27)
    first, second = measured(case, "eager", torch.bfloat16), measured(case, "eager", torch.bfloat16)
    for name in ("tokens", "segments", "d_hidden"):
        assert torch.equal(first[name], second[name])


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"rows": [9]}, "row"),
        ({"rows": [-1]}, "row"),
        ({"targets": [129]}, "(?i)target|vocab"),
        ({"targets": [-1]}, "target"),
        ({"segments": [1]}, "segment"),
    ],
)
def test_plan_that_points_outside_is_refused(change: dict[str, list[int]], word: str) -> None:
    case = make_case()
    columns = {"rows": [0], "targets": [0], "segments": [0]} | change
    case.rows, case.targets, case.segments, case.num_segments = *columns.values(), 1
    with pytest.raises(ValueError, match=word):
        linear_logprob(case.hidden, case.weight, case.plan())


def test_wrong_width_dtype_output_and_implementation_are_refused() -> None:
    case = make_case()
    with pytest.raises(ValueError, match="expected"):
        linear_logprob(case.hidden[:, :-1], case.weight, case.plan())
    with pytest.raises(ValueError, match=r"dtype|float"):
        linear_logprob(case.hidden.float(), case.weight, case.plan())
    with pytest.raises(ValueError, match="entropie"):
        linear_logprob(case.hidden, case.weight, case.plan(), outputs=("entropie",))
    with pytest.raises(ValueError, match="no_such_kernel"):
        linear_logprob(case.hidden, case.weight, case.plan(), impl="no_such_kernel")
