"""Attention in C++: the same bits with any number of threads, beside any rows, and on every set with fused products."""

import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import cpo_kernels._csrc as _csrc
from cpo_kernels.tolerances import random_subtree_end
from cpo_kernels.tree_attention import tree_attention
from cpo_kernels.tree_decode import DecodePlan, tree_decode
from tests.cpo_kernels.decode_oracle import Inputs, dense_attention, random_frontier, random_inputs

HEAD_SHAPES = [(6, 6, 16), (9, 3, 64), (4, 1, 24), (5, 5, 7), (70, 1, 32)]


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    threads, best = torch.get_num_threads(), _csrc.instruction_sets()[0]
    yield
    torch.set_num_threads(threads)
    _csrc.use_instruction_set(best)


def forests() -> list[torch.Tensor]:
    """Many small trees, and one trunk below which everything branches."""
    trunk = random_subtree_end(7, 400, 0)
    trunk[:300] = 400
    return [random_subtree_end(5, 400, 9), trunk]


def trained(subtree_end: torch.Tensor, heads: tuple[int, int, int], dtype: torch.dtype) -> list[torch.Tensor]:
    num_heads, num_kv_heads, head_dim = heads
    generator = torch.Generator().manual_seed(3)
    shapes = [(len(subtree_end), count, head_dim) for count in (num_heads, num_kv_heads, num_kv_heads, num_heads)]
    q, k, v, upstream = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = tree_attention(*leaves, subtree_end, impl="native")
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream)]


@pytest.mark.parametrize("heads", HEAD_SHAPES, ids=str)
def test_training_has_the_same_bits_with_any_number_of_threads_and_on_any_set(heads: tuple[int, int, int]) -> None:
    *fused, baseline = _csrc.instruction_sets()
    for subtree_end in forests():
        torch.set_num_threads(1)
        for dtype in (torch.float32, torch.bfloat16):
            expected = trained(subtree_end, heads, dtype)
            for threads in (2, 5):
                torch.set_num_threads(threads)
                assert all(map(torch.equal, trained(subtree_end, heads, dtype), expected)), threads
            for name in fused:
                _csrc.use_instruction_set(name)
                assert all(map(torch.equal, trained(subtree_end, heads, dtype), expected)), name
        _csrc.use_instruction_set(baseline)
        for got, want in zip(
            trained(subtree_end, heads, torch.float32), trained(subtree_end, heads, torch.float64), strict=True
        ):
            torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=2e-5)
        _csrc.use_instruction_set(_csrc.instruction_sets()[0])


def test_many_threads_share_the_work_of_a_large_forest() -> None:
    """So large that several do start: 2^23 products pay for one."""
    subtree_end = random_subtree_end(11, 1500, 0)
    subtree_end[:700] = 1500
    torch.set_num_threads(1)
    expected = trained(subtree_end, (8, 4, 64), torch.float32)
    torch.set_num_threads(4)
    assert all(map(torch.equal, trained(subtree_end, (8, 4, 64), torch.float32), expected))


@pytest.mark.parametrize("window", [None, 37])
@pytest.mark.parametrize("heads", HEAD_SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_row_of_a_search_has_the_same_bits_alone(
    heads: tuple[int, int, int], dtype: torch.dtype, window: int | None
) -> None:
    """Whatever is beside it, however its keys are cut into items, and with a window that ends inside them."""
    frontier = random_frontier(5, 4, num_prefilled=20)
    num_rows = len(frontier.paths)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    inputs = random_inputs(frontier, *heads, dtype)

    def run(rows: slice | list[int], plan: DecodePlan) -> torch.Tensor:
        given = (x[rows] for x in (inputs.q, inputs.k_new, inputs.v_new))
        return tree_decode(*given, *inputs.arena, plan, window=window, impl="native")

    among = run(slice(None), frontier.plan(split=16))
    exact = dense_attention(frontier, inputs, heads[2] ** -0.5, torch.float64, window=window)
    torch.testing.assert_close(among.double(), exact, rtol=tolerance, atol=tolerance)
    for rows in ([0], [num_rows - 1], list(range(num_rows))[::-1]):
        assert torch.equal(run(rows, frontier.decode_plan(rows)), among[rows]), rows


@pytest.mark.parametrize("options", [{}, {"window": 37}, {"softcap": 4.0}, {"sinks": True}], ids=str)
@pytest.mark.parametrize("heads", HEAD_SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_row_has_the_same_bits_wherever_its_path_is_cut(
    heads: tuple[int, int, int], dtype: torch.dtype, options: dict[str, Any]
) -> None:
    """What was its own while it was generated may be a node of it later, and that node may be computed by a prefill."""
    frontier = random_frontier(5, 4, max_suffix=90, num_prefilled=75)
    inputs = random_inputs(frontier, *heads, dtype)
    if "sinks" in options:
        options = {"sinks": torch.linspace(-1, 1, heads[0]).to(dtype)}
    rows = range(len(frontier.paths))
    prefilled = range(len(rows), frontier.num_rows)

    def run(given: Inputs, plan: DecodePlan) -> torch.Tensor:
        return tree_decode(given.q, given.k_new, given.v_new, *given.arena, plan, **options, impl="native")

    for name in _csrc.instruction_sets():
        _csrc.use_instruction_set(name)
        together = run(inputs, frontier.plan())
        for most_own in (None, 1, 2, 17):
            plan = frontier.decode_plan(rows, most_own=most_own)
            assert torch.equal(run(inputs.rows(rows), plan), together[: len(rows)]), (name, most_own)
        assert torch.equal(run(inputs.rows(prefilled), frontier.prefill_plan_by_row()), together[len(rows) :]), name


@pytest.mark.parametrize("own", [[0, 0, 3, 0], [3, 0, 0, 3], [0, 3, 3, 0]], ids=str)
@pytest.mark.parametrize("first", [2, 4])
def test_rows_with_keys_of_their_own_stand_among_rows_that_see_further(own: list[int], first: int) -> None:
    """All read one node of five keys: rows 0 and 2 from a number of them on, each next row one more."""
    items = [(0, 2, 10, 5, first), (2, 2, 10, 5, first)]
    plan = DecodePlan.build([0, 32, 42, 3], items, [20, 30, 40, 50], own)
    generator = torch.Generator().manual_seed(0)
    q, k, v, k_arena, v_arena = (torch.randn(n, 2, 16, generator=generator) for n in (4, 4, 4, 64, 64))
    got, want = (tree_decode(q, k, v, k_arena.clone(), v_arena.clone(), plan, impl=i) for i in ("native", "reference"))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_a_search_has_the_same_bits_with_any_number_of_threads_and_on_any_set() -> None:
    frontier = random_frontier(8, 4, max_node=200, num_prefilled=300)
    results = []
    for threads in (1, 2, 5):
        for name in _csrc.instruction_sets()[:-1] or ["baseline"]:
            torch.set_num_threads(threads)
            _csrc.use_instruction_set(name)
            inputs = random_inputs(frontier, 18, 6, 64, torch.float32)
            results.append(
                tree_decode(inputs.q, inputs.k_new, inputs.v_new, *inputs.arena, frontier.plan(), impl="native")
            )
    assert all(torch.equal(result, results[0]) for result in results)
    _csrc.use_instruction_set("baseline")
    inputs = random_inputs(frontier, 18, 6, 64, torch.float32)
    baseline = tree_decode(inputs.q, inputs.k_new, inputs.v_new, *inputs.arena, frontier.plan(), impl="native")
    torch.testing.assert_close(baseline, results[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_exponentials_are_right_from_the_largest_to_the_smallest(dtype: torch.dtype) -> None:
    """A row that sees two keys of scores 0 and -x weighs the second by exp(-x) / (1 + exp(-x))."""
    x = torch.cat([torch.linspace(0, 86, 3001, dtype=dtype), torch.tensor([88.0, 103.0, 700.0, 1e30], dtype=dtype)])
    q = torch.ones(2 * len(x), 1, 1, dtype=dtype)
    k, v = torch.zeros_like(q), torch.zeros_like(q)
    k[1::2, 0, 0], v[1::2] = -x, 1
    ends = torch.arange(2, 2 * len(x) + 1, 2, dtype=torch.int32).repeat_interleave(2)
    got = tree_attention(q, k, v, ends, scale=1.0, impl="native")[1::2, 0, 0].double()
    want = torch.exp(-x.double()) / (1 + torch.exp(-x.double()))
    eps = torch.finfo(dtype).eps
    assert float(((got - want).abs() - 3 * eps * want).max()) <= 2e-38  # below that float32 is subnormal


def test_an_instruction_set_that_is_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match="no instruction set sse9"):
        _csrc.use_instruction_set("sse9")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_the_rows_that_see_it(value: float) -> None:
    ends = torch.tensor([4, 4, 3, 4, 6, 6], dtype=torch.int32)
    q, k, v = (torch.randn(6, 2, 8, generator=torch.Generator().manual_seed(1)) for _ in range(3))
    clean = tree_attention(q, k, v, ends, impl="native")
    k[2, 0, 3] = value * q[2, 0, 3].sign()  # a leaf's, of one head
    got = tree_attention(q, k, v, ends, impl="native")
    assert not got[2, 0].isfinite().all()
    others = torch.ones(6, 2, dtype=torch.bool)
    others[2, 0] = False
    assert torch.equal(got[others], clean[others])


@pytest.mark.parametrize("name", _csrc.instruction_sets()[:-1])
def test_no_set_with_fused_products_is_slower_than_plain_torch(name: str) -> None:
    """Twice as fast is usual. A vector wider than a register, which GCC keeps in memory, made AVX2 three times slower."""
    trunk = random_subtree_end(7, 1500, 0)
    trunk[:400] = 1500
    shapes = [(1500, count, 64) for count in (9, 3, 3)]
    generator = torch.Generator().manual_seed(3)
    leaves = [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]
    torch.set_num_threads(1)
    _csrc.use_instruction_set(name)

    def seconds(impl: str) -> float:
        began = time.process_time()
        torch.autograd.grad(tree_attention(*leaves, trunk, impl=impl).sum(), leaves)
        return time.process_time() - began

    taken = {impl: min(seconds(impl) for _ in range(4)) for impl in ("native", "eager")}
    assert taken["native"] < 1.3 * taken["eager"], taken
