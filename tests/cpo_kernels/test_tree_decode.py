"""Attention over a path of nodes, computed node by node and merged, is attention over the path.

The op under whole plans is compared with SDPA in fp64, row by row, over keys that the test's own tree lists.
"""

import random
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from cpo_kernels.tolerances import kernel_bound
from cpo_kernels.tree_decode import DecodePlan, tree_decode
from tests.cpo_kernels.decode_oracle import Frontier, Inputs, dense_attention, random_frontier, random_inputs

SCALE = 0.3


def run(inputs: Inputs, plan: DecodePlan, impl: str = "native", scale: float = SCALE, **options: Any) -> torch.Tensor:
    return tree_decode(inputs.q, inputs.k_new, inputs.v_new, *inputs.arena, plan, scale=scale, impl=impl, **options)


@pytest.mark.parametrize("impl", ["reference", "eager", "native"])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (4, 1)])
@pytest.mark.parametrize("depth", [1, 2, 3, 4, 5])
def test_every_row_equals_sdpa_over_its_own_keys(impl: str, heads: int, kv_heads: int, depth: int) -> None:
    for seed in range(3):
        frontier = random_frontier(10 * depth + seed, depth, num_prefilled=(1, 10, 70)[seed])
        inputs = random_inputs(frontier, heads, kv_heads, 8, torch.float64)
        expected = dense_attention(frontier, inputs, SCALE, torch.float64)
        actual = run(inputs, frontier.plan(split=(16, 256)[seed % 2]), impl)
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("impl", ["reference", "eager", "native"])
@pytest.mark.parametrize(
    "options",
    [
        *({"window": window} for window in (1, 7, 40, 75, 1000)),
        {"softcap": 2.0},
        {"sinks": True},
        {"window": 50, "softcap": 2.0, "sinks": True},
    ],
    ids=str,
)
def test_windows_soft_caps_and_sinks_equal_dense_attention(impl: str, options: dict[str, Any]) -> None:
    frontier = random_frontier(14, 4, num_prefilled=90, max_suffix=70)
    inputs = random_inputs(frontier, 6, 2, 8, torch.float64)
    if "sinks" in options:
        options = options | {"sinks": torch.linspace(-3, 4, 6, dtype=torch.float64)}
    expected = dense_attention(frontier, inputs, SCALE, torch.float64, **options)
    actual = run(inputs, frontier.plan(split=16), impl, **options)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    if options != {"window": 1000}:  # longer than every path
        assert float((expected - dense_attention(frontier, inputs, SCALE, torch.float64)).abs().max()) > 0.1


@pytest.mark.parametrize("impl", ["reference", "eager", "native"])
def test_no_key_that_no_window_reaches_is_seen(impl: str) -> None:
    """They are NaN here, and 0 times NaN would be seen."""
    frontier = Frontier([[(0, 300)]] * 3, [(300, 40), (340, 1), (341, 90)], [(0, 300)], (431, 2), 433)
    inputs = random_inputs(frontier, 4, 2, 8, torch.float64)
    expected = dense_attention(frontier, inputs, SCALE, torch.float64, window=20)
    inputs.arena[:, :272] = float("nan")  # the shallowest rows see 19 keys of the node, in items of 16
    inputs.arena[:, 341 : 341 + 64] = float("nan")  # the last row is 90 tokens below, in blocks of 32
    torch.testing.assert_close(run(inputs, frontier.plan(split=16), impl, window=20), expected, rtol=1e-12, atol=1e-12)


def test_a_plan_knows_the_depth_of_every_row_and_item() -> None:
    frontier = random_frontier(12, 4, num_prefilled=90)
    plan = frontier.plan(split=16)
    place_of = {key: place for keys in frontier.visible() for place, key in enumerate(keys)}
    assert plan.item_depth.tolist() == [place_of[key] for key in plan.items[:, 2].tolist()]
    depths = plan.suffix_depth + plan.suffix_len - 1
    assert depths.tolist() == [len(keys) - 1 for keys in frontier.visible()]
    assert plan.longest_path == max(map(len, frontier.visible()))
    padded = plan.padded(len(plan.items) + 3, plan.num_partials)
    assert padded.item_depth.tolist() == [*plan.item_depth.tolist(), 0, 0, 0]


@pytest.mark.parametrize("impl", ["eager", "native"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_as_exact_as_sdpa_in_its_dtype(dtype: torch.dtype, impl: str) -> None:
    frontier = random_frontier(1, 4, num_prefilled=70)
    inputs = random_inputs(frontier, 6, 2, 16, dtype)
    exact = dense_attention(frontier, inputs, SCALE, torch.float64)
    eager_error = float((dense_attention(frontier, inputs, SCALE, dtype).double() - exact).abs().max())
    error = float((run(inputs, frontier.plan(), impl).double() - exact).abs().max())
    assert error <= kernel_bound(eager_error, dtype, float(exact.abs().max()))


def test_default_scale_is_that_of_sdpa() -> None:
    frontier = random_frontier(2)
    inputs = random_inputs(frontier, 4, 2, 16, torch.float64)
    expected = dense_attention(frontier, inputs, 16**-0.5, torch.float64)
    actual = tree_decode(inputs.q, inputs.k_new, inputs.v_new, *inputs.arena, frontier.plan())
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("impl", ["reference", "eager", "native"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotated_inside_has_the_bits_of_rotated_before_by_transformers(impl: str, dtype: torch.dtype) -> None:
    frontier = random_frontier(4, num_prefilled=5)
    inside, before = (random_inputs(frontier, 4, 2, 16, dtype) for _ in range(2))
    angles = torch.randn(frontier.num_rows, 16, generator=torch.Generator().manual_seed(4))
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    heads = (x.transpose(0, 1)[None] for x in (before.q, before.k_new))
    q, k_new = (x[0].transpose(0, 1) for x in apply_rotary_pos_emb(*heads, cos[None], sin[None]))
    plan = frontier.plan()
    expected = run(replace(before, q=q, k_new=k_new), plan, impl)
    new = (inside.q, inside.k_new, inside.v_new)
    assert torch.equal(tree_decode(*new, *inside.arena, plan, SCALE, impl, rotary=(cos, sin)), expected)
    assert torch.equal(inside.arena[:, plan.slots], before.arena[:, plan.slots])


@pytest.mark.parametrize("impl", ["reference", "eager", "native"])
def test_scores_of_ten_thousand_do_not_overflow(impl: str) -> None:
    frontier = random_frontier(3)
    inputs = random_inputs(frontier, 4, 2, 16, torch.float32)
    inputs.q.mul_(2e3)
    actual = run(inputs, frontier.plan(split=16), impl)
    expected = dense_attention(frontier, inputs, SCALE, torch.float64)
    torch.testing.assert_close(actual.double(), expected, rtol=5e-2, atol=5e-2)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "window"),
    [(9, 3, 64, None), (2, 2, 8, None), (4, 1, 16, None), (3, 1, 64, None), (9, 3, 64, 90), (4, 1, 16, 20)],
)
def test_a_row_has_the_same_bits_alone_in_company_and_in_another_order(
    threads: int, heads: int, kv_heads: int, head_dim: int, window: int | None
) -> None:
    """Under a window a row's neighbours reach items that it does not, and with it there are a soft-cap and sinks."""
    options = {} if window is None else {"window": window, "softcap": 5.0, "sinks": torch.linspace(-2, 2, heads)}
    attend = partial(run, **options)
    frontier = random_frontier(5, 4, max_node=130, max_suffix=70, num_prefilled=150)
    inputs = random_inputs(frontier, heads, kv_heads, head_dim, torch.float32)
    num_decoding = len(frontier.paths)
    assert num_decoding > 12
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        together = attend(inputs.rows(range(frontier.num_rows)), frontier.plan())
        for row in range(num_decoding):
            assert torch.equal(attend(inputs.rows([row]), frontier.decode_plan([row]))[0], together[row])
        for count in (2, 5, num_decoding):
            order = random.Random(count).sample(range(num_decoding), count)
            assert torch.equal(attend(inputs.rows(order), frontier.decode_plan(order)), together[order])
        prefilled = range(num_decoding, frontier.num_rows)
        assert torch.equal(attend(inputs.rows(prefilled), frontier.prefill_plan(0, 150)), together[num_decoding:])
        # in chunks: a later one reads what an earlier one stored
        arena = inputs.arena.clone()
        for first, last in ((0, 64), (64, 128), (128, 150)):
            chunk = replace(inputs.rows(prefilled[first:last]), arena=arena)
            out = attend(chunk, frontier.prefill_plan(first, last))
            assert torch.equal(out, together[prefilled[first:last]])
    finally:
        torch.set_num_threads(before)


def test_a_row_has_the_same_bits_under_a_node_of_few_keys_however_many_share_it() -> None:
    """One row is a product of one query, seventy are tiles."""
    num_rows = 70
    for num_keys in (1, 2, 3, 5):
        suffixes = [(num_keys + row, 1) for row in range(num_rows)]
        frontier = Frontier([[(0, num_keys)]] * num_rows, suffixes, num_arena_rows=num_keys + num_rows)
        inputs = random_inputs(frontier, 2, 2, 8, torch.float32)
        together = run(inputs.rows(range(num_rows)), frontier.plan())
        for count in (1, 10, 30):
            alone = run(inputs.rows(range(count)), frontier.decode_plan(range(count)))
            shared = run(inputs.rows(range(count)), Frontier(frontier.paths[:count], suffixes[:count]).plan())
            assert torch.equal(alone, together[:count])
            assert torch.equal(shared, together[:count])


def shuffled(plan: DecodePlan) -> DecodePlan:
    """The same items in another order; where each writes its partials stays with it."""
    return replace(plan, items=plan.items[torch.randperm(len(plan.items), generator=torch.Generator().manual_seed(7))])


@pytest.mark.parametrize("impl", ["reference", "eager", "native"])
def test_order_of_items_and_padding_change_no_bit(impl: str) -> None:
    frontier = random_frontier(6, 4)
    inputs = random_inputs(frontier, 4, 2, 16, torch.float32)
    plan = frontier.plan(split=16)
    first = run(inputs, plan, impl)
    padded = plan.padded(len(plan.items) + 5, plan.num_partials + 11)
    for other in (plan, shuffled(plan), padded, shuffled(padded)):
        assert torch.equal(run(inputs, other, impl), first)


def test_rows_without_keys_are_zero_and_one_row_alone_works() -> None:
    inputs = random_inputs(Frontier(paths=[[]], suffixes=[(0, 1)], num_arena_rows=1), 4, 2, 8, torch.float32)
    plan = DecodePlan.build([0], [], [0], [1])
    for impl in ("reference", "eager", "native"):
        torch.testing.assert_close(run(inputs, plan, impl), inputs.v_new.repeat_interleave(2, dim=1))
        assert torch.equal(run(inputs, DecodePlan.build([0], [], [0], [0]), impl), torch.zeros(1, 4, 8))


def test_new_keys_and_values_are_stored_at_their_slots_and_nowhere_else() -> None:
    frontier = random_frontier(8)
    inputs = random_inputs(frontier, 4, 2, 8, torch.float32)
    before, plan = inputs.arena.clone(), frontier.plan()
    run(inputs, plan)
    assert torch.equal(inputs.arena[0, plan.slots], inputs.k_new)
    assert torch.equal(inputs.arena[1, plan.slots], inputs.v_new)
    others = torch.ones(before.shape[1], dtype=torch.bool)
    others[plan.slots] = False
    torch.testing.assert_close(inputs.arena[:, others], before[:, others], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    "mutate",
    [
        lambda plan: replace(plan, items=plan.items - torch.tensor([0, 0, 0, 0, 1, 0], dtype=torch.int32)),
        lambda plan: replace(plan, suffix_len=(plan.suffix_len - 1).clamp_min(0)),
        lambda plan: replace(plan, suffix_start=plan.suffix_start + 1),
        lambda plan: replace(plan, partial_index=plan.partial_index.roll(1)),
    ],
    ids=["first_visible", "suffix_len", "suffix_start", "partial_index"],
)
def test_a_plan_that_is_off_by_one_is_seen(mutate: Callable[[DecodePlan], DecodePlan]) -> None:
    frontier = random_frontier(9)
    inputs = random_inputs(frontier, 4, 2, 8, torch.float64)
    expected = dense_attention(frontier, inputs, SCALE, torch.float64)
    actual = run(inputs, mutate(frontier.plan()))
    assert not float((actual - expected).abs().max()) < 1e-3  # NaN is seen too


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([0, 1], [(0, 3, 0, 4, 4)], [0, 0], [0, 0]), r"item 0 is \(0, 3, 0, 4, 4\)"),
        (([0, 1], [(0, 2, 0, 4, 4), (0, 0, 0, 4, 4)], [0, 0], [0, 0]), "item 1"),
        (([0, 1], [(0, 2, 0, 0, 0)], [0, 0], [0, 0]), "positive counts"),
        (([0, 1], [(0, 2, 0, 4, 5)], [0, 0], [0, 0]), r"first_visible in 1\.\.num_keys"),
        (([0, 1], [(0, 2, -1, 4, 4)], [0, 0], [0, 0]), "item 0"),
        (([0, -1], [], [0, 0], [0, 0]), "slots has a negative entry"),
        (([0, 1], [], [0, 0], [0, -1]), "suffix_len has a negative entry"),
        (([0, 1], [], [0], [0, 0]), "of one length"),
        (([0], [], [2**31 - 2], [4]), "exceed int32"),
        (([0], [], [0], [0], 0), "split >= 1"),
        (
            ([0, 1], [(0, 1, 0, 4, 4), (0, 2, 8, 4, 4)], [0, 0], [0, 0]),
            r"item \(0, 2, 8, 4, 4\) see other numbers of keys",
        ),
    ],
)
def test_plan_that_makes_no_sense_is_refused(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DecodePlan.build(*arguments)


def test_inputs_that_do_not_fit_are_refused() -> None:
    frontier = random_frontier(10)
    inputs, plan = random_inputs(frontier, 4, 2, 8, torch.float32), frontier.plan()
    small = replace(inputs, arena=inputs.arena[:, : plan.num_arena_rows - 1])
    with pytest.raises(ValueError, match=f"names {plan.num_arena_rows} arena rows"):
        run(small, plan)
    with pytest.raises(ValueError, match="the plan is of"):
        run(inputs.rows([0, 1]), plan)
    with pytest.raises(ValueError, match="one dtype"):
        run(replace(inputs, q=inputs.q.double()), plan)
    with pytest.raises(ValueError, match="last dimension is contiguous"):
        run(replace(inputs, arena=inputs.arena.transpose(2, 3).contiguous().transpose(2, 3)), plan)
    with pytest.raises(ValueError, match="multiple of 2 key heads"):
        run(replace(inputs, q=inputs.q[:, :3]), plan)
    with pytest.raises(ValueError, match=r"k_new and v_new \[N, Hkv, D\]"):
        run(replace(inputs, k_new=inputs.k_new[:, :1]), plan)
    with pytest.raises(ValueError, match="cannot run on cpu"):
        run(inputs, plan, impl="triton")
    with pytest.raises(ValueError, match="at least"):
        plan.padded(len(plan.items) - 1, plan.num_partials)
    for options, message in (
        ({"window": 0}, "a window of at least one token, got 0"),
        ({"softcap": 0.0}, "a soft-cap above 0"),
        ({"sinks": torch.zeros(2)}, r"sinks \[4\] on cpu, got \(2,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            run(inputs, plan, **options)
    for tables in ((inputs.q[:, 0], inputs.q[:1, 0]), (inputs.q[:, 0], inputs.q[:, 0].double())):
        with pytest.raises(ValueError, match="expected rotary tables"):
            tree_decode(inputs.q, inputs.k_new, inputs.v_new, *inputs.arena, plan, rotary=tables)
