"""Windows, soft-caps and sinks of tree_attention against a dense softmax by autograd in fp64, whose mask walks parents.

T rows, H query heads, Hkv key heads, D head size.
"""

from typing import Any

import pytest
import torch

from cpo_kernels import tree_attention, tree_schedule
from cpo_kernels.tree_attention import Window, attention_layer
from tests.cpo_kernels.attention_oracle import featured, featured_results, parent_mask, random_parents, subtree_ends

CASES: dict[str, dict[str, Any]] = {
    "softcap": {"softcap": 0.8},
    "sinks": {"sinks": True},
    "all": {"window": 7, "softcap": 2.0, "sinks": True},
}


def double_inputs(num_rows: int, heads: int, kv_heads: int, seed: int) -> list[torch.Tensor]:
    """q, k, v, the gradient of the output, and sinks, of which one exceeds all scores and one is far below."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(num_rows, n, 16) for n in (heads, kv_heads, kv_heads, heads)]
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    return [*tensors, torch.linspace(-30, 12, heads, dtype=torch.float64)]


@pytest.mark.parametrize("impl", ["reference", "eager", "native"])
@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_equal_dense_autograd(case: str, impl: str) -> None:
    """Branches, several trees, lone rows, and a chain with more keys than the eager blocks."""
    for parents, heads in ((random_parents(300, seed=3, num_padding=5), (4, 2)), (list(range(-1, 299)), (2, 2))):
        mask, depths = parent_mask(parents)
        ends = subtree_ends(mask)
        *inputs, sinks = double_inputs(300, *heads, seed=len(case))
        size, softcap = CASES[case].get("window"), CASES[case].get("softcap")
        given = sinks if CASES[case].get("sinks") else None
        window = None if size is None else Window(depths, size)

        if size is not None:
            mask = mask & (depths[:, None] - depths[None] < size)
        want = featured_results(inputs, mask, 0.25, softcap, given)
        got = featured_results(inputs, featured(impl, ends, None, window, softcap), 0.25, softcap, given)
        assert set(got) == set(want)
        for name in want:
            torch.testing.assert_close(got[name], want[name], rtol=1e-12, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


def test_nan_in_padding_rows_does_not_reach_the_gradient_of_sinks() -> None:
    *inputs, sinks = double_inputs(40, 4, 2, seed=1)
    ends = torch.tensor([37] * 37 + [38, 39, 40], dtype=torch.int32)
    inputs[3][37:] = 0
    poisoned = [tensor.clone() for tensor in inputs]
    for tensor in poisoned[:3]:
        tensor[37:] = float("nan")
    attention = featured("eager", ends, None, None, 2.0)
    want, got = (featured_results(given, attention, 0.25, 2.0, sinks)["dsinks"] for given in (inputs, poisoned))
    torch.testing.assert_close(got, want)
    inputs[3][36, 0, 0] = float("nan")  # of a row that is in use it does
    assert featured_results(inputs, attention, 0.25, 2.0, sinks)["dsinks"][0].isnan()


@pytest.mark.parametrize("impl", ["reference", "eager", "native"])
def test_bfloat16_sinks_get_their_gradient_in_bfloat16(impl: str) -> None:
    *inputs, sinks = double_inputs(40, 4, 2, seed=1)
    q, k, v, upstream = (tensor.bfloat16() for tensor in inputs)
    leaf = sinks.bfloat16().requires_grad_()
    ends = torch.full((40,), 40, dtype=torch.int32)
    (gradient,) = torch.autograd.grad(tree_attention(q, k, v, ends, impl=impl, sinks=leaf), leaf, upstream)
    assert gradient.dtype == torch.bfloat16
    mask = torch.ones(40, 40, dtype=torch.bool).tril()
    want = featured_results(inputs, mask, 0.25, None, leaf.detach().double())["dsinks"]
    torch.testing.assert_close(gradient.double(), want, rtol=0.03, atol=0.03)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"softcap": 0.0}, "positive softcap"),
        ({"sinks": torch.zeros(3)}, r"sinks \[2\]"),
        ({"sinks": torch.zeros(2, dtype=torch.int64)}, r"sinks \[2\]"),
        ({"window": Window(torch.arange(5), 0)}, "window of at least 1"),
        ({"window": Window(torch.arange(4), 2)}, r"depths \[5\]"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, Any], message: str) -> None:
    q = torch.zeros(5, 2, 8)
    with pytest.raises(ValueError, match=message):
        tree_attention(q, q, q, torch.full((5,), 5, dtype=torch.int32), impl="eager", **options)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"softcap": 1.0}, "soft-cap of scores"),
        ({"sinks": torch.zeros(2)}, "attention sinks"),
        ({"window": Window(torch.arange(5), 2)}, "sliding window"),
    ],
)
def test_flash_refuses_each_by_name(options: dict[str, Any], name: str) -> None:
    q, ends = torch.zeros(5, 2, 8), torch.full((5,), 5, dtype=torch.int32)
    with pytest.raises(ValueError, match=f"impl='flash' computes no {name}"):
        attention_layer(q, q, q, ends, tree_schedule(ends), None, "flash", **options)
