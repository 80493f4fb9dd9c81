"""Attention in C++ on inputs of every shape and layout, against eager in float64, and on inputs that it must refuse."""

import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import cpo_kernels._csrc as _csrc
from cpo_kernels.tree_attention import Window, attention_layer, tree_attention, tree_schedule
from cpo_kernels.tree_decode import DecodePlan, tree_decode
from cpo_kernels.tree_decode.row_keys import row_keys
from tests.cpo_kernels.attention_oracle import featured_results, parent_mask, random_parents, subtree_ends
from tests.cpo_kernels.decode_oracle import Frontier, dense_attention, random_frontier, random_inputs

LAYOUTS = ["whole", "cut out", "heads first", "every second", "one for all heads"]

head_shapes = st.tuples(st.sampled_from([1, 2, 3, 8, 63, 64, 65]), st.integers(1, 3)).filter(lambda x: x[0] * x[1] < 80)
options_of = st.fixed_dictionaries(
    {
        "window": st.none() | st.integers(1, 40),
        "softcap": st.none() | st.sampled_from([0.5, 20.0]),
        "sinks": st.booleans(),
        "name": st.sampled_from(_csrc.instruction_sets()),
        "dtype": st.sampled_from([torch.float64, torch.float32]),
    }
)


def laid_out(x: torch.Tensor, layout: str) -> torch.Tensor:
    """The numbers of x [rows, heads, D] in other strides; the first head's for all of them where the layout says so."""
    rows, heads, head_dim = x.shape
    if layout == "cut out":
        large = torch.full((rows + 2, heads + 1, head_dim + 3), float("nan"), dtype=x.dtype)
        large[1:-1, 1:, 2:-1] = x
        return large[1:-1, 1:, 2:-1]
    if layout == "heads first":
        return x.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "every second":
        return x.repeat_interleave(2, dim=-1)[..., ::2]
    return x[:, :1].expand_as(x) if layout == "one for all heads" else x


def assert_near(got: torch.Tensor, want: torch.Tensor, dtype: torch.dtype) -> None:
    tolerance = 1e-11 if dtype == torch.float64 else 2e-4
    torch.testing.assert_close(got.double(), want.double(), rtol=tolerance, atol=tolerance)


@settings(max_examples=60, deadline=None)
@given(
    num_rows=st.integers(1, 150),
    heads=head_shapes,
    head_dim=st.integers(1, 40),
    layouts=st.tuples(*[st.sampled_from(LAYOUTS)] * 4),
    options=options_of,
    seed=st.integers(0, 99),
)
def test_training_equals_eager_in_float64(
    num_rows: int, heads: tuple[int, int], head_dim: int, layouts: tuple[str, ...], options: dict[str, Any], seed: int
) -> None:
    group, num_kv_heads = heads
    num_heads, dtype = group * num_kv_heads, options["dtype"]
    mask, depths = parent_mask(random_parents(num_rows, seed, num_padding=min(num_rows - 1, seed % 4)))
    ends = subtree_ends(mask)
    generator = torch.Generator().manual_seed(seed)
    shapes = [(num_rows, count, head_dim) for count in (num_heads, num_kv_heads, num_kv_heads, num_heads)]
    inputs = [
        laid_out(torch.randn(shape, generator=generator).to(dtype), layout)
        for shape, layout in zip(shapes, layouts, strict=True)
    ]
    sinks = torch.linspace(-4, 3, num_heads, dtype=dtype) if options["sinks"] else None
    window = None if options["window"] is None else Window(depths, options["window"])

    def results(impl: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        def attention(*given: torch.Tensor) -> torch.Tensor:
            q, k, v, *others = given
            return attention_layer(q, k, v, ends, None, 0.3, impl, window, options["softcap"], *others)

        given = inputs if dtype == inputs[0].dtype else [x.to(dtype) for x in inputs]
        return featured_results(given, attention, 0.3, options["softcap"], None if sinks is None else sinks.to(dtype))

    _csrc.use_instruction_set(options["name"])
    try:
        got = results("native", dtype)
    finally:
        _csrc.use_instruction_set(_csrc.instruction_sets()[0])
    for name, want in results("eager", torch.float64).items():
        assert_near(got[name], want, dtype)


@settings(max_examples=60, deadline=None)
@given(
    frontier=st.builds(
        random_frontier,
        st.integers(0, 99),
        depth=st.integers(1, 4),
        max_node=st.integers(1, 40),
        max_suffix=st.integers(1, 70),
        num_prefilled=st.integers(1, 70),
    ),
    split=st.sampled_from([1, 16, 256]),
    heads=head_shapes,
    head_dim=st.integers(1, 40),
    layouts=st.tuples(*[st.sampled_from(LAYOUTS)] * 4),
    options=options_of,
)
def test_a_search_equals_attention_over_the_keys_of_each_row(
    frontier: Frontier,
    split: int,
    heads: tuple[int, int],
    head_dim: int,
    layouts: tuple[str, ...],
    options: dict[str, Any],
) -> None:
    group, num_kv_heads = heads
    inputs = random_inputs(frontier, group * num_kv_heads, num_kv_heads, head_dim, options["dtype"])
    new = {
        name: laid_out(getattr(inputs, name), layout)
        for name, layout in zip(("q", "k_new", "v_new"), layouts, strict=False)
    }
    inputs = replace(inputs, **new)
    features = {"window": options["window"], "softcap": options["softcap"]}
    features["sinks"] = torch.linspace(-4, 3, group * num_kv_heads) if options["sinks"] else None
    want = dense_attention(frontier, inputs, 0.3, torch.float64, **features)
    arena = [laid_out(x, layouts[3]) if layouts[3] in LAYOUTS[1:3] else x for x in inputs.arena]
    _csrc.use_instruction_set(options["name"])
    try:
        got = tree_decode(*new.values(), *arena, frontier.plan(split), 0.3, impl="native", **features)
    finally:
        _csrc.use_instruction_set(_csrc.instruction_sets()[0])
    assert_near(got, want, options["dtype"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("in_node", [False, True])
def test_every_number_of_16_bits_is_read_as_it_is(dtype: torch.dtype, in_node: bool) -> None:
    """Subnormal, infinite and not a number among them: a row of one key is that key's value."""
    values = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype).view(1024, 1, 64)
    arena = torch.zeros(2, 2048, 1, 64, dtype=dtype)
    arena[1, :1024] = values
    slots = torch.arange(1024, 2048)
    items = [(row, 1, row, 1, 1) for row in range(1024)] if in_node else []
    plan = DecodePlan.build(slots, items, torch.zeros(1024) if in_node else slots, [0 if in_node else 1] * 1024)
    q = torch.zeros(1024, 1, 64, dtype=dtype)
    got = tree_decode(q, q, values, *arena, plan, impl="native")
    torch.testing.assert_close(got, values, rtol=0, atol=0, equal_nan=True)


def test_no_rows_and_no_head_size_give_nothing() -> None:
    for shape in ((0, 2, 5), (3, 2, 0)):
        q = torch.zeros(shape, requires_grad=True)
        ends = torch.arange(1, shape[0] + 1, dtype=torch.int32)
        out = tree_attention(q, q, q, ends, scale=1.0, impl="native")
        assert out.shape == torch.autograd.grad(out.sum(), q)[0].shape == shape
    new = torch.zeros(0, 2, 5)
    assert (
        tree_decode(new, new, new, *torch.zeros(2, 3, 2, 5), DecodePlan.build([], [], [], []), impl="native").numel()
        == 0
    )


def test_what_does_not_fit_is_refused() -> None:
    q, ends = torch.zeros(3, 4, 8), torch.full((3,), 3, dtype=torch.int32)
    for impl in ("eager", "native"):
        with pytest.raises(ValueError, match=r"one dtype, got torch\.float32, torch\.float64 and torch\.float32"):
            tree_attention(q, q.double(), q, ends, impl=impl)
        with pytest.raises(ValueError, match="0 query heads are not a multiple of 4 key heads"):
            tree_attention(q[:, :0], q, q, ends, impl=impl)
        with pytest.raises(ValueError, match="4 query heads are not a multiple of 0 key heads"):
            tree_attention(q, q[:, :0], q[:, :0], ends, impl=impl)
    with pytest.raises(ValueError, match=r"window\.depths to be each row's place on its own path"):
        tree_attention(q, q, q, ends, impl="native", window=Window(torch.tensor([0, 1, 5]), 2))
    schedule = tree_schedule(torch.full((9,), 9, dtype=torch.int32)).to("cpu", ends)
    with pytest.raises(ValueError, match="runs that cover all rows"):
        tree_attention(q, q, q, ends, schedule, impl="native")


def test_a_plan_that_was_changed_to_leave_the_arena_is_refused() -> None:
    q, arena = torch.zeros(2, 4, 8), torch.zeros(2, 9, 4, 8)
    plan = DecodePlan.build([0, 1], [(0, 2, 2, 5, 5)], [7, 8], [1, 1])
    tree_decode(q, q, q, *arena, plan, impl="native")
    for other, message in (
        (replace(plan, suffix_len=plan.suffix_len + 1), "rows that the arena does not have"),
        (replace(plan, items=plan.items + torch.tensor([0, 0, 4, 0, 0, 0], dtype=torch.int32)), "rows that the arena"),
        (replace(plan, slots=plan.slots - 1), "slots that the arena does not have"),
        (replace(plan, slots=plan.slots + 8), "slots that the arena does not have"),
    ):
        with pytest.raises(ValueError, match=message):
            tree_decode(q, q, q, *arena, other, impl="native")
    with pytest.raises(ValueError, match="0 query heads are not a multiple of 4 key heads"):
        tree_decode(q[:, :0], q, q, *arena, plan, impl="native")
    with pytest.raises(ValueError, match="above 0 and below infinity, got inf"):
        tree_decode(q, q, q, *arena, plan, impl="native", softcap=float("inf"))


def test_shorter_and_longer_paths_follow_one_another() -> None:
    """Rows that read more nodes, fewer, a last one as short, as long or elsewhere, than the rows before them."""
    nodes = [(0, 5), (5, 19), (24, 3), (27, 40), (67, 2)]
    paths = [nodes[:3], nodes[:1], nodes[:4], nodes[:2], [*nodes[:1], nodes[3]], nodes[:5], [nodes[0], nodes[2]], []]
    paths += [[nodes[0], (5, 7)], nodes[:3], [nodes[0], (5, 7), nodes[4]]]
    suffixes = [(70 + row, 1) for row in range(len(paths))]
    frontier = Frontier(paths, suffixes, num_arena_rows=70 + len(paths))
    inputs = random_inputs(frontier, 4, 2, 24, torch.float64)
    want = dense_attention(frontier, inputs, 0.3, torch.float64)
    for order in (range(len(paths)), range(len(paths))[::-1]):
        rows = list(order)
        some = inputs.rows(rows)
        plan = frontier.decode_plan(rows)
        got = tree_decode(some.q, some.k_new, some.v_new, *some.arena, plan, 0.3, impl="native")
        torch.testing.assert_close(got, want[rows], rtol=1e-12, atol=1e-12)


def test_rows_that_end_elsewhere_in_an_earlier_node_share_no_scores() -> None:
    """Equal nodes, of which the second row sees one more key of the first: its positions are not the other row's."""
    plan = DecodePlan.build([40, 41], [(0, 2, 0, 10, 5), (0, 1, 20, 4, 4), (1, 1, 20, 4, 4)], [40, 41], [1, 1])
    assert len(set(row_keys(plan, "native").node)) == 2
    generator = torch.Generator().manual_seed(2)
    q, k_new, v_new = torch.randn(3, 2, 2, 24, generator=generator, dtype=torch.float64)
    arena = torch.randn(2, 42, 2, 24, generator=generator, dtype=torch.float64)
    got = tree_decode(q, k_new, v_new, *arena.clone(), plan, impl="native")
    want = tree_decode(q, k_new, v_new, *arena.clone(), plan, impl="reference")
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_memory_that_is_not_there_is_an_error_of_the_call() -> None:
    """In a process of its own, with several threads: what one of them throws must not end it."""
    program = """
import resource, torch
from cpo_kernels.tree_attention import tree_attention, tree_schedule
from cpo_kernels.tree_decode import DecodePlan, tree_decode

torch.set_num_threads(4)
rows = 1 << 18
ends = torch.full((rows,), rows, dtype=torch.int32)
schedule = tree_schedule(ends)
q = torch.zeros(rows, 4, 4)
arena = torch.zeros(2, rows, 4, 4)
plan = DecodePlan.build(range(64), [(0, 64, 0, rows, rows)], [0] * 64, [0] * 64, split=rows)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (40 << 20), used + (40 << 20)))
for call in (
    lambda: tree_attention(q, q, q, ends, schedule, impl="native"),
    lambda: tree_decode(q[:64], q[:64], q[:64], *arena, plan, impl="native"),
):
    try:
        call()
    except MemoryError:
        print("MemoryError")
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=1200)
    assert result.stdout.split() == ["MemoryError"] * 2, result
