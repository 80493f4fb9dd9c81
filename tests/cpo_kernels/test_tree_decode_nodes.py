"""Tree decode of small nodes: bits follow from a row's own path alone, wherever an arena lies."""

import pytest
import torch

from cpo_kernels.tree_decode import DecodePlan, tree_decode

ROWS_A_NODE = 3


def plan_of(node_lengths: list[int], num_copies: int) -> DecodePlan:
    """Three decode rows below each node, in `num_copies` branches; each row has one private key."""
    lengths = node_lengths * num_copies
    num_rows = -(-len(lengths) * ROWS_A_NODE // 16) * 16
    starts = [sum(lengths[:number]) for number in range(len(lengths))]
    items = [
        (number * ROWS_A_NODE, ROWS_A_NODE, start, n, n)
        for number, (start, n) in enumerate(zip(starts, lengths, strict=True))
    ]
    own = range(sum(lengths), sum(lengths) + num_rows)
    return DecodePlan.build(own, items, own, [1] * num_rows)


def inputs_of(plan: DecodePlan, heads: tuple[int, int, int]) -> list[torch.Tensor]:
    """Queries, new keys and values, and an arena: equal for equal rows of plans of any size."""
    num_kv_heads, group, head_dim = heads
    num_rows, num_slots = len(plan.slots), plan.num_arena_rows
    shapes = [(num_rows, num_kv_heads * group), *[(num_rows, num_kv_heads)] * 2, *[(num_slots, num_kv_heads)] * 2]
    return [
        torch.randn((*shape, head_dim), generator=torch.Generator().manual_seed(number))
        for number, shape in enumerate(shapes)
    ]


@pytest.mark.parametrize("heads", [(4, 1, 24), (1, 4, 32), (1, 16, 16), (3, 3, 64)])
def test_rows_have_the_same_bits_alone_and_among_many_nodes_of_their_shape(heads: tuple[int, int, int]) -> None:
    for length in (1, 2, 3, 8, 9, 16, 31, 64, 300):
        plan, alone = plan_of([length], 12), plan_of([length], 1)
        inputs = inputs_of(plan, heads)
        among = tree_decode(*inputs, plan, impl="native")
        # the same first rows, whose private keys stand elsewhere
        first = inputs_of(alone, heads)
        for number in range(3):
            first[number][:ROWS_A_NODE] = inputs[number][:ROWS_A_NODE]
        for number in (3, 4):
            first[number][:length] = inputs[number][:length]
        assert torch.equal(tree_decode(*first, alone, impl="native")[:ROWS_A_NODE], among[:ROWS_A_NODE]), length


@pytest.mark.parametrize("spare", ["heads", "slots", "numbers"])
def test_an_arena_that_is_cut_out_of_a_larger_tensor_gives_the_same_bits(spare: str) -> None:
    plan = plan_of([3, 8, 9, 64], 2)
    inputs = inputs_of(plan, (2, 2, 24))
    expected = tree_decode(*[tensor.clone() for tensor in inputs], plan, impl="native")
    cut = list(inputs)
    for number in (3, 4):
        slots, num_heads, head_dim = inputs[number].shape
        more = {"heads": (1, num_heads + 1, 1), "slots": (2, num_heads, 1), "numbers": (1, num_heads, 2)}[spare]
        whole = torch.full((slots * more[0], more[1], head_dim * more[2]), float("nan"))
        cut[number] = whole[:: more[0], :num_heads, :head_dim]
        cut[number].copy_(inputs[number])
    assert not cut[3].is_contiguous()
    assert torch.equal(tree_decode(*cut, plan, impl="native"), expected)
