"""Windows, soft-caps and sinks in the Triton kernels of tree_attention, against a dense softmax by autograd in fp64.

T rows, H query heads, Hkv key heads, D head size. Where the kernels run is said in `kernel_device`.
"""

from typing import Any, NamedTuple

import pytest
import torch

from cpo_kernels import tree_schedule
from cpo_kernels.tolerances import kernel_bound
from cpo_kernels.tree_attention import Window
from cpo_kernels.tree_attention.check import in_parts
from cpo_kernels.tree_attention.schedule import window_schedule
from tests.cpo_kernels.attention_oracle import (
    featured,
    featured_results,
    parent_mask,
    random_heads,
    random_parents,
    subtree_ends,
)
from tests.cpo_kernels.kernel_device import DEVICE, runs_kernels

SCALE = 0.25  # of `featured`
CHAIN = list(range(-1, 99))
# a trunk of 40, below it three branches of 30, 1 and 25 rows, a lone row, a second tree
BRANCHED = [*range(-1, 39), 39, *range(40, 69), 39, 39, *range(71, 95), -1, -1, *range(97, 100)]


class Case(NamedTuple):
    """A forest and what attention has over it."""

    parents: list[int]
    heads: tuple[int, int]
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False
    dtype: torch.dtype = torch.float32
    head_dim: int = 16


CASES = {
    "window": Case(BRANCHED, (2, 1), window=20),
    "window of one": Case(BRANCHED, (2, 2), window=1),
    "window of a block on a chain": Case(CHAIN, (2, 1), window=32),
    "window on random forest": Case(random_parents(130, seed=5, num_padding=3), (4, 2), window=37),
    "softcap": Case(BRANCHED, (2, 1), softcap=1.5),
    "sinks": Case(BRANCHED, (4, 2), sinks=True),
    "all": Case(random_parents(101, seed=2, num_padding=3), (4, 1), window=21, softcap=2.0, sinks=True),
    "all in bfloat16": Case(BRANCHED, (4, 2), 20, 2.0, True, torch.bfloat16, 24),
}


def case_inputs(case: Case) -> tuple[list[torch.Tensor], torch.Tensor | None, torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k, v and an upstream gradient; sinks; subtree ends; what each row sees; depths."""
    mask, depths = parent_mask(case.parents)
    inputs = random_heads(len(mask), *case.heads, case.head_dim, case.dtype)
    sinks = torch.linspace(-2, 3, case.heads[0]).to(DEVICE, case.dtype) if case.sinks else None
    visible = mask if case.window is None else mask & (depths[:, None] - depths[None] < case.window)
    return inputs, sinks, subtree_ends(mask), visible.to(DEVICE), depths


def assert_right(case: Case, got: dict[str, torch.Tensor]) -> None:
    """Error of every result against float64 within `kernel_bound` and the rounding of float32 accumulators."""
    inputs, sinks, _, visible, _ = case_inputs(case)
    double = [tensor.double() for tensor in inputs]
    exact = featured_results(double, visible, SCALE, case.softcap, None if sinks is None else sinks.double())
    same = featured_results(inputs, visible, SCALE, case.softcap, sinks)
    q, k, v, upstream = (float(tensor.norm(dim=-1).max()) for tensor in double)
    product = SCALE * upstream * v
    sizes = {"out": v, "dq": product * k, "dk": product * q, "dv": upstream, "dsinks": upstream * v}
    assert set(got) == set(exact)
    for name, want in exact.items():
        assert got[name].dtype == case.dtype
        error = float((got[name].double() - want).abs().max())
        allowed = kernel_bound(float((same[name].double() - want).abs().max()), case.dtype, float(want.abs().max()))
        allowed += 8 * torch.finfo(torch.float32).eps * sizes[name]
        assert error <= allowed, f"{name}: {error:.3g} > {allowed:.3g}"


@runs_kernels
@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients(name: str) -> None:
    """Ragged last blocks, groups of query heads, full and partial blocks of a window."""
    case = CASES[name]
    inputs, sinks, ends, _, depths = case_inputs(case)
    schedule = tree_schedule(ends, 16, 16).to(DEVICE)
    window = None if case.window is None else Window(depths.to(DEVICE), case.window)
    attention = featured("triton", schedule.subtree_end, schedule, window, case.softcap)
    assert_right(case, featured_results(inputs, attention, SCALE, case.softcap, sinks))


@runs_kernels
def test_parts_of_a_windows_query_rows() -> None:
    """Pieces of work that start past a gap, and others that follow on from one another."""
    from cpo_kernels.tree_attention.triton import TritonTreeAttention

    case = CASES["all"]
    inputs, sinks, ends, _, _ = case_inputs(case)
    schedule, window = window_schedule(tree_schedule(ends, 16, 16), 21, case.heads)
    parts = in_parts(schedule).to(DEVICE)
    assert parts.num_parts > schedule.num_parts
    there = Window(window.depths.to(DEVICE), window.size)

    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = TritonTreeAttention.apply(q, k, v, parts, SCALE, there, case.softcap, sinks)
        return out

    assert_right(case, featured_results(inputs, attention, SCALE, case.softcap, sinks))


@runs_kernels
def test_a_gap_between_branches_is_left_out_and_summed_over() -> None:
    """Branches of 100 rows below a trunk: the trunk's last rows are seen by the head of each, over a gap."""
    parents = [*range(-1, 31), 31, *range(32, 131), 31, *range(132, 165)]
    case = Case(parents, (2, 1), window=5)
    inputs, sinks, ends, _, depths = case_inputs(case)
    schedule = tree_schedule(ends, 16, 16).to(DEVICE)
    assert window_schedule(schedule, 5, case.heads)[0].num_parts > 0
    attention = featured("triton", schedule.subtree_end, schedule, Window(depths.to(DEVICE), 5), None)
    assert_right(case, featured_results(inputs, attention, SCALE, None, sinks))


@runs_kernels
def test_only_sinks_get_a_gradient() -> None:
    case = CASES["sinks"]
    inputs, sinks, ends, visible, _ = case_inputs(case)
    assert sinks is not None
    leaf, schedule = sinks.clone().requires_grad_(), tree_schedule(ends, 16, 16).to(DEVICE)
    out = featured("triton", schedule.subtree_end, schedule, None, None)(*inputs[:3], leaf)
    (got,) = torch.autograd.grad(out, leaf, inputs[3])
    double = [tensor.double() for tensor in inputs]
    want = featured_results(double, visible, SCALE, None, sinks.double())["dsinks"]
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


@runs_kernels
def test_nan_in_queries_of_padding_rows_does_not_reach_the_gradient_of_sinks() -> None:
    """Of their keys and values too it does not where they share no block with rows in use."""
    ends = torch.tensor([32] * 32 + [33, 34, 35], dtype=torch.int32).to(DEVICE)
    inputs, sinks = random_heads(35, 2, 1, 16, torch.float32), torch.ones(2, device=DEVICE)
    inputs[3][32:] = 0
    poisoned = [tensor.clone() for tensor in inputs]
    for tensor in poisoned[:3]:
        tensor[32:] = float("nan")
    attention = featured("triton", ends, tree_schedule(ends, 16, 16), None, None)
    want, got = (featured_results(given, attention, SCALE, None, sinks)["dsinks"] for given in (inputs, poisoned))
    torch.testing.assert_close(got, want)


@runs_kernels
def test_softcap_is_exact_at_every_size() -> None:
    """Chains of two rows, whose second sees a capped score beside one of zero: its odds have no more error than the score.

    An exponential alone is off near zero by float32's rounding of 50: by 1.1e-6 here.
    """
    cap, sizes = (
        50.0,
        torch.tensor([1e-4, 1e-3, 0.003, 0.01, 0.02, 0.03, 0.05, 0.07, 0.1, -0.01, -0.03, 0.62, 0.63, 40.0]),
    )
    q, k, v = (torch.zeros(2 * len(sizes), 1, 16, device=DEVICE) for _ in range(3))
    q[1::2, 0, 0] = 1.0
    k[::2, 0, 0] = (cap / SCALE * sizes).to(DEVICE)
    v[::2] = 1.0
    ends = torch.arange(2, 2 * len(sizes) + 2, 2, dtype=torch.int32).repeat_interleave(2).to(DEVICE)
    got = featured("triton", ends, tree_schedule(ends, 16, 16), None, cap)(q, k, v)[1::2, 0, 0].double().cpu()
    want = torch.sigmoid(cap * torch.tanh(sizes.double()))
    assert float((got - want).abs().max()) < 2e-7


@runs_kernels
def test_depths_that_are_not_the_forests_are_refused() -> None:
    q = torch.zeros(3, 1, 16)
    options: dict[str, Any] = {"subtree_end": torch.full((3,), 3, dtype=torch.int32), "schedule": None, "softcap": None}
    attention = featured("triton", window=Window(torch.tensor([0, 1, 1]), 2), **options)
    with pytest.raises(ValueError, match="place on its own path"):
        attention(q, q, q)
