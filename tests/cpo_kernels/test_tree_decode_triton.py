"""The Triton kernels of tree_decode against SDPA in fp64; where they run is said in `kernel_device`.

In the interpreter each shape and dtype runs where it takes a way of its own through a kernel; a GPU runs them all.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from cpo_kernels.tolerances import kernel_bound
from cpo_kernels.tree_decode import DecodePlan, tree_decode
from tests.cpo_kernels.decode_oracle import Frontier, Inputs, dense_attention, random_frontier, random_inputs
from tests.cpo_kernels.kernel_device import DEVICE, gpu_alone_unless, runs_kernels

SCALE = 0.3
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MHA, GQA, MQA = (2, 2), (6, 2), (4, 1)  # query heads, key heads
INTERPRETED_GROUPS = {torch.float32: {MHA, GQA}, torch.bfloat16: {GQA}, torch.float16: {MQA}}


def run(inputs: Inputs, plan: DecodePlan, **options: Any) -> torch.Tensor:
    new = (inputs.q, inputs.k_new, inputs.v_new)
    return tree_decode(*new, *inputs.arena, plan.to(DEVICE), scale=SCALE, impl="triton", **options)


def excess(actual: torch.Tensor, frontier: Frontier, inputs: Inputs, **options: Any) -> float:
    """Error against fp64 over what is allowed; at most 1 where the kernels are right, infinite for NaN.

    To `kernel_bound` comes the rounding of float32 accumulators, eight times: a weight inherits that of a score and of a
    log-sum-exp, each about 8 in size. SDPA sums in another order and may be better by that.
    """
    exact = dense_attention(frontier, inputs, SCALE, torch.float64, **options)
    same_dtype = dense_attention(frontier, inputs, SCALE, inputs.q.dtype, **options)
    assert actual.dtype == inputs.q.dtype
    bound = kernel_bound(
        float((same_dtype.double() - exact).abs().max()), inputs.q.dtype, float(exact.abs().max())
    ) + 8 * torch.finfo(torch.float32).eps * float(exact.abs().max())
    error = float((actual.double() - exact).abs().max())
    return error / bound if error == error else float("inf")


def case(heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype, **tree: int) -> tuple[Frontier, Inputs]:
    frontier = random_frontier(**({"seed": 1, "depth": 2, "max_rows": 2} | tree))
    return frontier, random_inputs(frontier, heads, kv_heads, head_dim, dtype, DEVICE)


@runs_kernels
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dtype"),
    [
        pytest.param(*heads, dtype, marks=gpu_alone_unless(heads in INTERPRETED_GROUPS[dtype]))
        for dtype in DTYPES
        for heads in (MHA, GQA, MQA)
    ],
    ids=str,
)
def test_every_row_equals_sdpa_over_its_own_keys(heads: int, kv_heads: int, dtype: torch.dtype) -> None:
    frontier, inputs = case(heads, kv_heads, 16, dtype)
    assert excess(run(inputs, frontier.plan(split=16)), frontier, inputs) <= 1.0


@runs_kernels
@pytest.mark.parametrize(("depth", "seed"), [(1, 6), (3, 4), pytest.param(5, 13, marks=gpu_alone_unless(False))])
def test_ragged_trees_of_any_depth(depth: int, seed: int) -> None:
    """Items, suffixes and the prefilled node are longer than a tile; nodes of one key and states of one row occur."""
    frontier, inputs = case(2, 1, 16, torch.float32, seed=seed, depth=depth, max_node=40, num_prefilled=40)
    lengths = [length for path in frontier.paths for _, length in path]
    assert min(lengths) == 1
    assert excess(run(inputs, frontier.plan()), frontier, inputs) <= 1.0


@runs_kernels
@pytest.mark.parametrize(
    ("options", "dtype"),
    [
        ({"window": 1}, torch.float32),
        ({"window": 50}, torch.bfloat16),
        ({"softcap": 2.0}, torch.float32),
        ({"sinks": True}, torch.float32),
        ({"window": 50, "softcap": 2.0, "sinks": True}, torch.float32),
    ],
    ids=str,
)
def test_windows_soft_caps_and_sinks_equal_dense_attention(options: dict[str, Any], dtype: torch.dtype) -> None:
    """Windows that end inside items, suffixes and the prefilled node, and some that a whole item lies above."""
    frontier, inputs = case(2, 1, 16, dtype, seed=4, max_node=70, max_suffix=90, num_prefilled=40)
    if "sinks" in options:
        options = options | {"sinks": torch.linspace(-1, 4, 2, device=DEVICE)}
    without = dense_attention(frontier, inputs, SCALE, dtype)
    assert excess(without, frontier, inputs, **options) > 10
    assert excess(run(inputs, frontier.plan(split=48), **options), frontier, inputs, **options) <= 1.0


@runs_kernels
def test_no_tile_of_keys_that_no_window_reaches_is_read() -> None:
    """They are NaN here. The tiles of an item are 32 keys in float32, those of a suffix 64."""
    frontier = Frontier([[(0, 300)]] * 3, [(300, 40), (340, 1), (341, 150)], [(0, 300)], (491, 2), 493)
    inputs = random_inputs(frontier, 2, 1, 16, torch.float32, DEVICE)
    before = replace(inputs, arena=inputs.arena.clone())
    inputs.arena[:, :256] = float("nan")  # the shallowest row sees 19 keys of the node, from 281 on
    inputs.arena[:, 341 : 341 + 128] = float("nan")
    assert excess(run(inputs, frontier.plan(), window=20), frontier, before, window=20) <= 1.0


@runs_kernels
@pytest.mark.parametrize(
    "head_dim",
    [pytest.param(head_dim, marks=gpu_alone_unless(head_dim in (80, 256))) for head_dim in (32, 64, 80, 96, 128, 256)],
)
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_head_sizes(head_dim: int, dtype: torch.dtype) -> None:
    """80 and 96 are padded to 128."""
    frontier, inputs = case(2, 1, head_dim, dtype, depth=1, max_node=70, num_prefilled=3)
    assert excess(run(inputs, frontier.plan()), frontier, inputs) <= 1.0


@runs_kernels
def test_items_of_more_queries_and_keys_than_a_tile() -> None:
    """70 queries of a group of 2 are two items of several tiles; 35 rows of a prefilled node see 40 keys each before it."""
    suffixes = [(300 + 2 * row, 1 + row % 2) for row in range(70)]
    frontier = Frontier([[(0, 290)]] * 70, suffixes, [(10, 40)], (470, 35), num_arena_rows=505)
    inputs = random_inputs(frontier, 2, 1, 16, torch.float32, DEVICE)
    plan = frontier.plan()
    assert int(plan.items[:, 1].max()) == 64
    assert excess(run(inputs, plan), frontier, inputs) <= 1.0


@runs_kernels
def test_a_chunked_prefill_equals_sdpa() -> None:
    """By items of 48 keys: the first rows of a chunk see nothing of its last item, or a part of it."""
    frontier, inputs = case(2, 1, 16, torch.float32, num_prefilled=70)
    prefilled = range(len(frontier.paths), frontier.num_rows)
    expected = dense_attention(frontier, inputs, SCALE, torch.float64)
    for first, last in ((0, 64), (64, 70)):
        chunk = replace(inputs.rows(prefilled[first:last]), arena=inputs.arena)
        out = run(chunk, frontier.prefill_plan(first, last, split=48))
        torch.testing.assert_close(out.double(), expected[prefilled[first:last]], rtol=1e-5, atol=1e-5)


@runs_kernels
@pytest.mark.parametrize("signs", ["both", "negative"])
def test_scores_of_ten_thousand_do_not_overflow(signs: str) -> None:
    """A weight's relative error is then the rounding of its score, 1e4 times float32's."""
    frontier, inputs = case(2, 1, 16, torch.float32)
    inputs.q.mul_(2e3)
    if signs == "negative":
        inputs.q.abs_().neg_()
        inputs.k_new.abs_()
        inputs.arena[0].abs_()
    expected = dense_attention(frontier, inputs, SCALE, torch.float64)
    torch.testing.assert_close(run(inputs, frontier.plan(split=16)).double(), expected, rtol=5e-2, atol=5e-2)


@runs_kernels
def test_order_of_items_padding_and_repetition_change_no_bit() -> None:
    frontier, inputs = case(2, 1, 16, torch.bfloat16)
    plan = frontier.plan(split=16)
    order = torch.randperm(len(plan.items), generator=torch.Generator().manual_seed(7))
    padded = plan.padded(len(plan.items) + 3, plan.num_partials + 11)
    first = run(inputs, plan)
    for other in (plan, replace(plan, items=plan.items[order]), padded):
        assert torch.equal(run(inputs, other), first)


@runs_kernels
def test_strided_queries_keys_and_values_give_the_same_bits() -> None:
    """Heads before rows; rows apart; a column apart, which is copied; an arena of each kind that is not copied."""
    frontier, inputs = case(4, 2, 16, torch.float32)
    strided = replace(
        inputs,
        q=inputs.q.transpose(0, 1).contiguous().transpose(0, 1),
        k_new=torch.stack([inputs.k_new] * 2, dim=1)[:, 0],
        v_new=torch.stack([inputs.v_new] * 2, dim=3)[..., 0],
    )
    plan = frontier.plan().to(DEVICE)
    k_arena = inputs.arena[0].transpose(0, 1).contiguous().transpose(0, 1)
    v_arena = torch.stack([inputs.arena[1]] * 2, dim=1)[:, 0]
    got = tree_decode(strided.q, strided.k_new, strided.v_new, k_arena, v_arena, plan, scale=SCALE, impl="triton")
    assert torch.equal(got, run(inputs, plan))
    assert torch.equal(k_arena[plan.slots], inputs.k_new)
    assert torch.equal(v_arena[plan.slots], inputs.v_new)


@runs_kernels
def test_new_keys_and_values_are_stored_and_rows_without_keys_are_zero() -> None:
    frontier, inputs = case(4, 2, 16, torch.bfloat16)
    plan = frontier.plan()
    run(inputs, plan)
    assert torch.equal(inputs.arena[0, plan.slots], inputs.k_new)
    assert torch.equal(inputs.arena[1, plan.slots], inputs.v_new)
    alone = inputs.rows([0])
    assert torch.equal(run(alone, DecodePlan.build([0], [], [0], [0])), torch.zeros_like(alone.q))


@runs_kernels
@pytest.mark.parametrize("mutation", ["first_visible", "suffix_len", "partial_index"])
def test_a_plan_that_is_off_by_one_is_seen(mutation: str) -> None:
    frontier, inputs = case(2, 1, 16, torch.float32)
    plan = frontier.plan()
    mutated = {
        "first_visible": replace(plan, items=plan.items - torch.tensor([0, 0, 0, 0, 1, 0], dtype=torch.int32)),
        "suffix_len": replace(plan, suffix_len=(plan.suffix_len - 1).clamp_min(0)),
        "partial_index": replace(plan, partial_index=plan.partial_index.roll(1)),
    }[mutation]
    assert excess(run(inputs, mutated), frontier, inputs) > 100


@runs_kernels
def test_float64_and_heads_of_more_than_256_are_refused() -> None:
    frontier, inputs = case(2, 1, 264, torch.float32)
    with pytest.raises(ValueError, match="head_dim <= 256, got 264"):
        run(inputs, frontier.plan())
    frontier, inputs = case(2, 1, 16, torch.float64)
    with pytest.raises(ValueError, match=r"float32, got torch\.float64"):
        run(inputs, frontier.plan())


@runs_kernels
@pytest.mark.parametrize(
    ("heads", "head_dim", "dtype"),
    [
        (GQA, 16, torch.float32),
        (MHA, 80, torch.bfloat16),
        pytest.param(MQA, 128, torch.float16, marks=gpu_alone_unless(False)),
    ],
    ids=str,
)
def test_heads_are_rotated_as_transformers_rotates_them(
    heads: tuple[int, int], head_dim: int, dtype: torch.dtype
) -> None:
    """Keys are stored rotated, in float32 to rounding and in 16 bits with one rounding, and queries attend rotated."""
    frontier, inputs = case(*heads, head_dim, dtype, depth=1, max_node=20, num_prefilled=3)
    plan = frontier.plan()
    angles = torch.randn(frontier.num_rows, head_dim, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    cos, sin = (table.to(DEVICE, dtype) for table in (angles.cos(), angles.sin()))

    def rotated(x: torch.Tensor) -> torch.Tensor:  # [N, H, D] float64, by Transformers' own function
        exact = (part.double() for part in (x.transpose(0, 1)[None], x.transpose(0, 1)[None], cos[None], sin[None]))
        return apply_rotary_pos_emb(*exact)[0][0].transpose(0, 1)

    q, k_new = rotated(inputs.q), rotated(inputs.k_new)
    before = inputs.q.clone()
    given = (inputs.q, inputs.k_new, inputs.v_new, *(part.clone() for part in inputs.arena))
    got = tree_decode(*given, plan.to(DEVICE), scale=SCALE, impl="triton", rotary=(cos, sin))
    assert torch.equal(inputs.q, before)
    stored = given[3][plan.slots.to(DEVICE)].double()
    one_rounding = 0.51 * torch.finfo(dtype).eps * k_new.abs()
    float32_rounding = 4 * torch.finfo(torch.float32).eps * float(inputs.k_new.abs().max())
    assert bool(((stored - k_new).abs() <= one_rounding + float32_rounding).all())
    assert torch.equal(given[4][plan.slots.to(DEVICE)], inputs.v_new)
    # the queries and keys that were rounded here are the ones rounded there, but for ties
    assert excess(got, frontier, replace(inputs, q=q.to(dtype), k_new=k_new.to(dtype))) <= 1.0
