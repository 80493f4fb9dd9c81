"""Attention over a path of nodes, computed node by node and merged, is attention over the path."""

import pytest
import torch

from cpo_kernels.tree_decode import merge_partials, partial_attention


@pytest.mark.parametrize("group", [1, 2, 4])
@pytest.mark.parametrize("lengths", [[5], [7, 1, 4], [3, 0, 2, 30]])
def test_merged_nodes_equal_attention_over_the_whole_path(group: int, lengths: list[int]) -> None:
    torch.manual_seed(0)
    num_kv_heads, head_dim, scale = 2, 8, 0.3
    q = torch.randn(6, num_kv_heads * group, head_dim, dtype=torch.float64)
    nodes = [torch.randn(2, n, num_kv_heads, head_dim, dtype=torch.float64) for n in lengths]
    keys, values = torch.cat(nodes, dim=1)
    scores = torch.einsum("bhd,nhd->bhn", q, keys.repeat_interleave(group, 1)) * scale
    expected = torch.einsum("bhn,nhd->bhd", scores.softmax(-1), values.repeat_interleave(group, 1))
    outs, lses = zip(*(partial_attention(q, k, v, scale) for k, v in nodes), strict=True)
    out, lse = merge_partials(torch.stack(outs), torch.stack(lses))
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(lse, scores.logsumexp(-1), rtol=1e-12, atol=1e-12)


def test_query_inside_a_node_sees_only_what_is_before_it() -> None:
    torch.manual_seed(1)
    q, k, v = (torch.randn(5, 2, 4) for _ in range(3))
    out, _ = partial_attention(q, k, v, 1.0, num_visible=torch.arange(1, 6))
    expected = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(0, 1) for x in (q, k, v)), is_causal=True, scale=1.0
    ).transpose(0, 1)
    torch.testing.assert_close(out, expected)


def test_node_that_nobody_sees_changes_nothing() -> None:
    torch.manual_seed(2)
    q, k, v = (torch.randn(3, 2, 4) for _ in range(3))
    seen = partial_attention(q, k, v, 1.0)
    unseen = partial_attention(q, k, v, 1.0, num_visible=torch.zeros(3, dtype=torch.int64))
    out, lse = merge_partials(torch.stack([unseen[0], seen[0]]), torch.stack([unseen[1], seen[1]]))
    assert torch.equal(out, seen[0])
    assert torch.equal(lse, seen[1])
    nothing, minus_infinity = merge_partials(unseen[0][None], unseen[1][None])
    assert torch.equal(nothing, torch.zeros_like(nothing))
    assert bool((minus_infinity == float("-inf")).all())
