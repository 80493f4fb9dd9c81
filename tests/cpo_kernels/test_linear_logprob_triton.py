"""The Triton kernels of linear_logprob against full logits in fp64; where they run is said in `kernel_device`.

In the interpreter each shape and dtype runs where it takes a way of its own through a kernel; a GPU runs them all.
T rows, E hidden, V vocabulary, U distinct (row, target) pairs.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from cpo_kernels import LogprobPlan, linear_logprob
from cpo_kernels.tolerances import kernel_bound
from tests.cpo_kernels.confident_tokens import ConfidentTokens
from tests.cpo_kernels.device_waits import MadeTensors, waits
from tests.cpo_kernels.kernel_device import DEVICE, INTERPRETED, gpu_alone_unless, not_interpreted, runs_kernels
from tests.cpo_kernels.logprob_oracle import Case, full_logits, huge, make_case, oracle, shifted, upstream

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OUTPUTS = ("entropy", "mean_logit", "is_top1")


@not_interpreted
def test_cpu_tensors_without_the_interpreter_are_refused() -> None:
    case = make_case()
    with pytest.raises(ValueError, match="'triton' cannot run on cpu"):
        linear_logprob(case.hidden.float(), case.weight.float(), case.plan(), impl="triton")


@pytest.fixture(autouse=True)
def _poisoned_memory() -> Iterator[None]:
    """Memory that is allocated and not written holds NaN."""
    torch.use_deterministic_algorithms(INTERPRETED)
    assert not torch.backends.cuda.matmul.allow_tf32  # float32 products are compared as such
    yield
    torch.use_deterministic_algorithms(False)


def rounded(case: Case, dtype: torch.dtype) -> Case:
    """What the op is given is what is judged: inputs rounded first, so that only its own arithmetic counts."""
    case.hidden, case.weight = case.hidden.to(dtype).double(), case.weight.to(dtype).double()
    case.bias = None if case.bias is None else case.bias.to(dtype).double()
    return case


TARGETS_OF_ROW = (1, 2, 8, 19, 3)  # of row r mod 5; the kernels step over a row's targets by 16


def crowded(vocab: int, width: int = 24, num_rows: int = 5, **options: Any) -> Case:
    """1 to 19 targets a row, at 0, V - 1 and both sides of every tile and split edge, and each row's first one twice."""
    case = make_case(vocab, width, num_rows, seed=vocab, **options)
    edges = [edge + side for edge in (64, 128, 1024, 2048) for side in (-1, 0) if edge + side < vocab]
    marks = [0, vocab - 1, *edges, *range(1, vocab, 1 + vocab // 17)]
    case.rows = [row for row in range(num_rows) for _ in range(TARGETS_OF_ROW[row % 5])]
    case.targets = [marks[i % len(marks)] for i in range(len(case.rows))]
    case.targets += [case.targets[case.rows.index(row)] for row in range(num_rows)]
    case.rows += list(range(num_rows))
    case.segments = [i % 2 * 3 for i in range(len(case.rows))]
    return case


def one_target_a_row(num_rows: int) -> Case:
    """As many tokens as rows, in a vocabulary of a tile and one column."""
    case = make_case(129, 8, num_rows, seed=num_rows)
    case.rows, case.segments = list(range(num_rows)), [row % 6 for row in range(num_rows)]
    case.targets = [row * 7 % 129 for row in range(num_rows)]
    return case


def measured(case: Case, impl: str, dtype: torch.dtype, train_head: bool = False) -> dict[str, torch.Tensor]:
    """Values with a gradient, without one by both paths, the reference's for the same hidden states, and gradients."""
    device = DEVICE if impl == "triton" else "cpu"
    hidden, weight = case.hidden.to(device, dtype).requires_grad_(), case.weight.to(device, dtype)
    weight.requires_grad_(train_head)
    bias = None if case.bias is None else case.bias.to(device, dtype).requires_grad_(train_head)
    call = {"bias": bias, "impl": impl, "outputs": OUTPUTS, **case.options}
    result = linear_logprob(hidden, weight, case.plan(), hidden.detach().clone(), **call)
    token_weight, segment_weight = (w.to(device, torch.float32) for w in upstream(case))
    ((result.token_logps * token_weight).sum() + (result.segment_logps * segment_weight).sum()).backward()
    results = {"segments": result.segment_logps, "d_hidden": hidden.grad}
    if train_head:
        results |= {"d_weight": weight.grad} | ({} if bias is None else {"d_bias": bias.grad})
    for path in ("with gradient", "chunk", "fused"):
        if path != "with gradient":
            with pytest.MonkeyPatch.context() as patch, torch.no_grad():
                patch.setenv("CPO_KERNELS_LOGPROB_PATH", path)
                result = linear_logprob(hidden, weight, case.plan(), hidden.detach(), **call)
        results |= {f"tokens, {path}": result.token_logps, f"ref_tokens, {path}": result.ref_token_logps}
        results |= {f"{name}, {path}": getattr(result, name) for name in OUTPUTS}
    return {name: tensor.detach().cpu() for name, tensor in results.items()}


def truths(case: Case) -> dict[str, torch.Tensor]:
    """Values and gradients in fp64, under the names of `measured` up to the comma."""
    logits = full_logits(case.hidden, case.weight, case.bias, case.options)[case.rows]
    logps = logits.log_softmax(-1)
    want = oracle(case)
    outputs = {"entropy": -(logps.exp() * logps).sum(-1), "mean_logit": logits.mean(-1)}
    return want | outputs | {"ref_tokens": want["tokens"], "is_top1": logits.argmax(-1) == torch.tensor(case.targets)}


def excess(
    case: Case, dtype: torch.dtype, train_head: bool = False, got: dict[str, torch.Tensor] | None = None
) -> dict[str, float]:
    """Error of every quantity against fp64 over what is allowed: twice the eager error and a rounding band.

    `got` is what was measured of the case already; None measures it.
    """
    case = rounded(case, dtype)
    want, eager = truths(case), measured(case, "eager", dtype, train_head)
    got = measured(case, "triton", dtype, train_head) if got is None else got
    logit_size = float(full_logits(case.hidden, case.weight, case.bias, case.options).abs().max())
    ratios = {}
    for name, value in got.items():
        truth = want[name.split(",")[0]]
        if value.dtype == torch.bool:
            ratios[name] = 0.0 if torch.equal(value, truth) else float("inf")
            continue
        size, eps = float(truth.abs().max()), torch.finfo(value.dtype).eps
        # A logit of size L is rounded by eps L: that much in a log-prob, and as a factor in a gradient.
        if name.startswith("d_"):
            size *= 1 + torch.finfo(torch.float32).eps / eps * logit_size
        else:  # the roundings of a segment's tokens add up, as independent ones do
            tokens = max(map(case.segments.count, case.segments)) if name == "segments" else 1
            size += logit_size * tokens**0.5
        eager_error, error = (float((x.double() - truth).abs().max()) for x in (eager[name], value))
        ratios[name] = float("inf") if error != error else error / kernel_bound(eager_error, value.dtype, size)
    return ratios


@functools.cache
def measured_once(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """A vocabulary of many tiles, the last ragged: several claims look at one run."""
    return measured(rounded(crowded(1003), dtype), "triton", dtype)


@runs_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_and_gradient_stay_within_twice_the_eager_error(dtype: torch.dtype) -> None:
    ratios = excess(crowded(1003), dtype, got=measured_once(dtype))
    assert max(ratios.values()) <= 1, ratios


@runs_kernels
def test_a_vocabulary_of_one_column_more_than_a_tile() -> None:
    ratios = excess(crowded(129), torch.float32)
    assert max(ratios.values()) <= 1, ratios


EVERYTHING = {"softcap": 200.0, "bias": True, "logit_scale": -0.8, "temperature": 1.3}


@runs_kernels
@pytest.mark.parametrize(
    ("options", "dtype"),
    [
        *((options, torch.float32) for options in ({"bias": True}, {"temperature": 0.7}, {"softcap": 3.0}, EVERYTHING)),
        (EVERYTHING, torch.bfloat16),
    ],
    ids=str,
)
def test_head_transform_is_applied(options: dict[str, Any], dtype: torch.dtype) -> None:
    ratios = excess(make_case(seed=2, num_rows=5, **options), dtype)
    assert max(ratios.values()) <= 1, ratios


@runs_kernels
@pytest.mark.parametrize(
    ("change", "dtype"),
    [(huge, torch.float32), (huge, torch.bfloat16), (lambda case: shifted(case, -500.0), torch.float32)],
    ids=["huge", "huge in bfloat16", "all negative"],
)
def test_extreme_logits_stay_within_twice_the_eager_error(change: Callable[[Case], Case], dtype: torch.dtype) -> None:
    ratios = excess(change(make_case(seed=3, num_rows=5)), dtype)
    assert max(ratios.values()) <= 1, ratios


@runs_kernels
@pytest.mark.parametrize(("width", "vocab"), [(8, 2500), (33, 300), (1100, 300)])
def test_targets_on_both_sides_of_tile_and_split_edges_are_found(width: int, vocab: int) -> None:
    """Widths below a step of the products, of a ragged one, and of more than one step of a target's dot.

    The last is also more than one block of a row's gradient, as a real model's is.
    """
    ratios = excess(crowded(vocab, width), torch.float32)
    assert max(ratios.values()) <= 1, ratios


@runs_kernels
def test_splits_of_several_tiles_give_the_same_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Vocabularies of tests are so small that every tile would be a split of its own."""
    from cpo_kernels.linear_logprob import triton_chunked, triton_fused

    for module in (triton_chunked, triton_fused):
        monkeypatch.setattr(module, "PROGRAMS_AN_SM", 0)
    ratios = excess(crowded(2500, 8, softcap=30.0, bias=True), torch.float32)
    assert max(ratios.values()) <= 1, ratios


@runs_kernels
def test_groups_of_row_tiles_that_do_not_divide_the_rows_are_complete(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten row tiles in groups of eight, and 577 rows in tiles of 64."""
    monkeypatch.setenv("CPO_KERNELS_LOGPROB_PATH", "fused")
    case = rounded(one_target_a_row(577), torch.float32)
    hidden, weight = case.hidden.to(DEVICE, torch.float32), case.weight.to(DEVICE, torch.float32)
    got = linear_logprob(hidden, weight, case.plan(), impl="triton").token_logps.cpu().double()
    torch.testing.assert_close(got, oracle(case)["tokens"], rtol=1e-5, atol=1e-5)


@runs_kernels
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_chunks_of_rows_give_the_same_numbers(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CPO_KERNELS_MAX_CHUNK_LOGITS", str(129 * 2))
    ratios = excess(crowded(129), dtype)
    assert max(ratios.values()) <= 1, ratios


@runs_kernels
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize(("vocab", "train_head"), [(517, False), (1041, True)])
def test_what_lies_between_two_rows_of_a_chunk_is_never_a_logit(
    vocab: int, train_head: bool, poison: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forward, every output and every gradient: the same bits as with zeros there."""
    from cpo_kernels.linear_logprob import triton as forward
    from cpo_kernels.linear_logprob import triton_backward as backward

    original = forward.empty_chunk
    filled: list[float] = []

    def poisoned(value: float) -> Callable[..., torch.Tensor]:
        def empty_chunk(num_rows: int, num_columns: int, *others: Any) -> torch.Tensor:
            chunk = original(num_rows, num_columns, *others)
            assert chunk.stride(0) % 16 == 0 < chunk.stride(0) - num_columns
            filled.append(value)
            chunk.as_strided((num_rows, chunk.stride(0)), (chunk.stride(0), 1)).fill_(value)
            return chunk

        return empty_chunk

    def values(value: float) -> dict[str, torch.Tensor]:
        for module in (forward, backward):
            monkeypatch.setattr(module, "empty_chunk", poisoned(value))
        return measured(case, "triton", torch.float32, train_head)

    monkeypatch.setenv("CPO_KERNELS_MAX_CHUNK_LOGITS", str(vocab * 2))  # several chunks of rows
    case = crowded(vocab, bias=train_head, softcap=3.0 if train_head else None)
    want, got = values(0.0), values(poison)
    assert len(filled) > 8  # both values, of products and of what is made of them
    for name, value in want.items():
        assert bool(value.isfinite().all()), name
        assert torch.equal(got[name], value), name


@runs_kernels
def test_a_row_whose_targets_are_the_whole_vocabulary_has_no_rest() -> None:
    case = make_case(vocab=5, num_rows=2, num_tokens=10)
    case.rows, case.targets, case.segments = [0] * 5 + [1] * 5, list(range(5)) * 2, [0] * 10
    ratios = excess(case, torch.float32)
    assert max(ratios.values()) <= 1, ratios


@runs_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equal_hidden_gives_bitwise_equal_reference(dtype: torch.dtype) -> None:
    got = measured_once(dtype)
    for path in ("with gradient", "chunk", "fused"):
        assert torch.equal(got[f"tokens, {path}"], got[f"ref_tokens, {path}"]), path


@runs_kernels
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_two_runs_are_bitwise_equal(dtype: torch.dtype) -> None:
    second = measured(rounded(crowded(1003), dtype), "triton", dtype)
    for name, value in measured_once(dtype).items():
        assert torch.equal(value, second[name]), name


def confident_error(dtype: torch.dtype = torch.bfloat16) -> float:
    """Largest relative gradient error of tokens with p > 0.9999."""
    case = ConfidentTokens.make(dtype)
    leaf = case.hidden.to(DEVICE).requires_grad_()
    linear_logprob(leaf, case.weight.to(DEVICE), case.plan(), impl="triton").segment_logps.sum().backward()
    return case.error(leaf.grad)


@runs_kernels
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_gradient_of_confident_tokens_survives(dtype: torch.dtype) -> None:
    """Not float16: such a gradient lies below its smallest number, whoever computes it."""
    assert confident_error(dtype) <= 2.5e-3


def shared_row_case() -> Case:
    """A confident target beside unlikely ones on one row."""
    case = make_case(vocab=64, width=32, num_rows=2, num_tokens=6, seed=11)
    case.hidden[0] = 1.5 * case.weight[5] / case.weight[5].square().mean().sqrt()
    case.rows, case.targets, case.segments = [0, 0, 0, 0, 1, 1], [5, 5, 9, 0, 5, 63], [0, 1, 1, 3, 4, 4]
    return rounded(case, torch.float32)


@runs_kernels
def test_confident_token_beside_unlikely_targets_of_the_same_row() -> None:
    case = shared_row_case()
    want = oracle(case)
    assert float(want["tokens"][0]) > -1e-4
    got = measured(case, "triton", torch.float32)["d_hidden"].double()
    torch.testing.assert_close(got, want["d_hidden"], rtol=1e-5, atol=1e-5)


@runs_kernels
@pytest.mark.parametrize("requires_grad", [False, True])
def test_empty_plan_gives_zeros_and_a_zero_gradient(requires_grad: bool) -> None:
    hidden = torch.randn(4, 8, device=DEVICE, requires_grad=requires_grad)
    nothing = torch.empty(0, dtype=torch.int64)
    plan = LogprobPlan.build(nothing, nothing, nothing, 3)
    result = linear_logprob(hidden, torch.randn(11, 8, device=DEVICE), plan, hidden, impl="triton")
    assert result.token_logps.shape == (0,)
    assert result.segment_logps.tolist() == result.ref_segment_logps.tolist() == [0.0] * 3
    if requires_grad:
        result.segment_logps.sum().backward()
        assert hidden.grad.tolist() == [[0.0] * 8] * 4


@runs_kernels
def test_backward_twice_gives_the_same_gradient_and_reads_no_head() -> None:
    case = crowded(129)
    hidden, weight = case.hidden.to(DEVICE, torch.float32).requires_grad_(), case.weight.to(DEVICE, torch.float32)
    total = linear_logprob(hidden, weight, case.plan(), impl="triton").segment_logps.square().sum()
    (first,) = torch.autograd.grad(total, hidden, retain_graph=True)
    weight.fill_(float("nan"))
    (second,) = torch.autograd.grad(total, hidden)
    assert torch.equal(first, second)


@runs_kernels
def test_fused_rows_make_no_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    def num_logits(hidden: torch.Tensor) -> int:
        """How many matrices of logits a call makes."""
        with MadeTensors() as mode:
            linear_logprob(hidden, weight, plan, hidden.detach(), impl="triton")
        assert mode.made != []
        return mode.count((len(plan.unique_rows), 129))

    monkeypatch.setenv("CPO_KERNELS_LOGPROB_PATH", "fused")
    case = crowded(129)
    hidden, weight = case.hidden.to(DEVICE, torch.float32), case.weight.to(DEVICE, torch.float32)
    plan = case.plan().to(DEVICE)
    assert num_logits(hidden) == 0
    with torch.no_grad():
        assert num_logits(hidden.clone().requires_grad_()) == 0
    assert num_logits(hidden.clone().requires_grad_()) >= 2  # of the policy and of the reference
    monkeypatch.setenv("CPO_KERNELS_LOGPROB_PATH", "chunk")
    assert num_logits(hidden) >= 2


@runs_kernels
def test_strided_inputs_and_rows_outside_the_plan_do_not_matter() -> None:
    case = crowded(129)
    want = measured(case, "triton", torch.float32)
    wide = torch.full((case.hidden.shape[0] + 1, 3 * case.hidden.shape[1]), float("nan"), dtype=torch.float64)
    wide[:-1, 1::3] = case.hidden
    case.hidden, case.weight = wide[:, 1::3], case.weight.T.contiguous().T
    assert not case.hidden.is_contiguous()
    got = measured(case, "triton", torch.float32)
    assert torch.equal(got["d_hidden"][-1], torch.zeros(24))
    got["d_hidden"] = got["d_hidden"][:-1]
    for name, value in want.items():
        assert torch.equal(got[name], value), name


@runs_kernels
def test_float64_is_refused() -> None:
    case = make_case()
    with pytest.raises(ValueError, match="float64"):
        linear_logprob(case.hidden.to(DEVICE), case.weight.to(DEVICE), case.plan(), impl="triton")


@runs_kernels
@pytest.mark.parametrize(
    "num_rows",
    [pytest.param(rows, marks=gpu_alone_unless(rows in (1, 64, 65, 129))) for rows in (1, 63, 64, 65, 127, 129, 1000)],
)
def test_any_number_of_rows_is_complete(num_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CPO_KERNELS_LOGPROB_PATH", "fused")
    case = rounded(one_target_a_row(num_rows), torch.float32)
    want, plan = oracle(case), case.plan()
    hidden, weight = case.hidden.to(DEVICE, torch.float32).requires_grad_(), case.weight.to(DEVICE, torch.float32)
    fused = linear_logprob(hidden.detach(), weight, plan, impl="triton")
    got = {"tokens": fused.token_logps, "segments": fused.segment_logps}
    if num_rows == 1 or DEVICE == "cuda":  # the other way is a program a row, which has no tile of rows to get wrong
        result = linear_logprob(hidden, weight, plan, impl="triton")
        token_weight, segment_weight = (w.to(DEVICE, torch.float32) for w in upstream(case))
        ((result.token_logps * token_weight).sum() + (result.segment_logps * segment_weight).sum()).backward()
        got["d_hidden"] = hidden.grad
        torch.testing.assert_close(fused.token_logps, result.token_logps.detach(), rtol=1e-5, atol=1e-5)
    for name, value in got.items():
        torch.testing.assert_close(value.detach().cpu().double(), want[name], rtol=1e-5, atol=1e-5)


@runs_kernels
@pytest.mark.parametrize(("path", "programs"), [("chunk", 4), ("fused", 4), ("fused", 0)])
def test_equal_largest_logits_are_all_top(path: str, programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the second largest is not, though it is larger than any of the tile before; tiles are splits, or in one."""
    from cpo_kernels.linear_logprob import triton_chunked, triton_fused

    monkeypatch.setenv("CPO_KERNELS_LOGPROB_PATH", path)
    for module in (triton_chunked, triton_fused):
        monkeypatch.setattr(module, "PROGRAMS_AN_SM", programs)
    weight = torch.randn(200, 16, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    weight[[3, 190]] = 4 * weight[3]  # two equal rows, which win
    weight[150], weight[160] = 9 * weight[5], 8 * weight[5]
    hidden = weight[[3, 5]]
    plan = LogprobPlan.build(*(torch.tensor(x) for x in ([0, 0, 0, 1, 1], [190, 3, 7, 150, 160], [0] * 5)), 1)
    result = linear_logprob(hidden, weight, plan, outputs=OUTPUTS, impl="triton")
    assert result.is_top1.tolist() == [True, True, False, True, False]


@runs_kernels
@pytest.mark.parametrize("train_head", [False, True])
def test_scoring_never_waits_for_the_device(train_head: bool) -> None:
    case = crowded(300, bias=True)
    hidden = case.hidden.to(DEVICE, torch.float32).requires_grad_()
    weight, bias = (t.to(DEVICE, torch.float32).requires_grad_(train_head) for t in (case.weight, case.bias))
    assert waits(hidden, weight, bias, case.plan().to(DEVICE), "triton") == []
