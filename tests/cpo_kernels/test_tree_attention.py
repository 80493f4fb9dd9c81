"""tree_attention against a dense masked softmax in fp64, on random forests with padding rows.

The mask of the oracle comes from walking parents, never from `subtree_end`: token i sees j when j is i or an ancestor.
T tokens, H query heads, K key/value heads, D head size.
"""

import math
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from cpo_kernels import tree_attention, tree_schedule
from cpo_kernels.tree_attention import Window, attention_layer

IMPLS = ("reference", "eager", "native")
LENGTHS = (1, 63, 64, 65, 127, 129, 1000)
HEAD_DIM = 16


@dataclass(frozen=True)
class RandomForest:
    """A forest in depth-first preorder, then padding rows."""

    subtree_end: torch.Tensor  # [T] int32
    visible: torch.Tensor  # [T, T] bool, visible[i, j]: i may see j
    num_real: int


def random_forest(num_tokens: int, seed: int, num_padding: int = 0) -> RandomForest:
    """Each token hangs under the previous one, under any of its ancestors, or starts a new tree."""
    generator = torch.Generator().manual_seed(seed)
    num_real = num_tokens - num_padding
    parents: list[int] = []
    for i in range(num_real):
        chain = []
        j = i - 1
        while j >= 0:
            chain.append(j)
            j = parents[j]
        choice = float(torch.rand((), generator=generator))
        if not chain or choice > 0.97:
            parents.append(-1)
        elif choice < 0.75:
            parents.append(chain[0])
        else:
            parents.append(chain[int(torch.randint(len(chain), (), generator=generator))])
    visible = torch.eye(num_tokens, dtype=torch.bool)
    for i, parent in enumerate(parents):
        if parent >= 0:
            visible[i] |= visible[parent]
    subtree_end = torch.tensor([int(visible[:, j].nonzero().max()) + 1 for j in range(num_tokens)], dtype=torch.int32)
    return RandomForest(subtree_end, visible, num_real)


def random_heads(num_tokens: int, heads: int, kv_heads: int, dtype: torch.dtype, seed: int) -> list[torch.Tensor]:
    """q [T, H, D], k and v [T, K, D], and an upstream gradient [T, H, D], all in `dtype`."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(num_tokens, n, HEAD_DIM) for n in (heads, kv_heads, kv_heads, heads)]
    return [(1.5 * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype) for shape in shapes]


def dense_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, visible: torch.Tensor, scale: float
) -> torch.Tensor:
    """Softmax over visible keys in the dtype of the inputs, [T, H, D]; each key/value head serves H / K query heads."""
    group = q.shape[1] // k.shape[1]
    keys, values = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    scores = torch.einsum("ihd,jhd->hij", q, keys) * scale
    weights = scores.masked_fill(~visible, float("-inf")).softmax(dim=-1)
    return torch.einsum("hij,jhd->ihd", weights, values)


def dense_results(inputs: list[torch.Tensor], visible: torch.Tensor, scale: float) -> list[torch.Tensor]:
    """Output, dq, dk, dv of the dense form, in the dtype of `inputs`."""
    q, k, v, upstream = [tensor.detach().clone() for tensor in inputs]
    leaves = [tensor.requires_grad_() for tensor in (q, k, v)]
    out = dense_attention(*leaves, visible, scale)
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream)]


def tree_results(inputs: list[torch.Tensor], forest: RandomForest, impl: str, **options: object) -> list[torch.Tensor]:
    """Output, dq, dk, dv of tree_attention."""
    q, k, v, upstream = [tensor.detach().clone() for tensor in inputs]
    leaves = [tensor.requires_grad_() for tensor in (q, k, v)]
    out = tree_attention(*leaves, forest.subtree_end, impl=impl, **options)
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream)]


def assert_within_rule(
    actual: list[torch.Tensor], eager: list[torch.Tensor], exact: list[torch.Tensor], dtype: torch.dtype
) -> None:
    """Error against fp64 at most twice the same-dtype dense error plus a rounding band of the largest value.

    The band: one rounding of the result, and eight of the accumulator, since exp(score - log-sum-exp) inherits the
    rounding of both terms, whose size is about 8 here.
    """
    for name, got, same_dtype, want in zip(("out", "dq", "dk", "dv"), actual, eager, exact, strict=True):
        assert got.dtype == dtype, name
        assert got.shape == want.shape, name
        error = float((got.double() - want).abs().max())
        allowed = 2 * float((same_dtype.double() - want).abs().max())
        accumulator_eps = torch.finfo(torch.float32).eps
        band = (torch.finfo(dtype).eps + 8 * accumulator_eps) * max(float(want.abs().max()), 1.0)
        assert error <= allowed + band, f"{name}: error {error:.3g} > 2 x eager {allowed:.3g} + band {band:.3g}"


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_tokens", LENGTHS)
def test_error_is_within_twice_the_same_dtype_dense_error(num_tokens: int, dtype: torch.dtype, impl: str) -> None:
    for group in (1, 4, 8):
        kv_heads = 2 if group < 8 else 1
        forest = random_forest(num_tokens, seed=num_tokens + group, num_padding=0 if num_tokens < 8 else 5)
        inputs = random_heads(num_tokens, kv_heads * group, kv_heads, dtype, seed=group)
        scale = 1 / math.sqrt(HEAD_DIM)
        exact = dense_results([tensor.double() for tensor in inputs], forest.visible, scale)
        eager = dense_results(inputs, forest.visible, scale)
        assert_within_rule(tree_results(inputs, forest, impl), eager, exact, dtype)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("num_tokens", LENGTHS)
def test_fp64_forward_and_gradients_equal_dense_softmax(num_tokens: int, impl: str) -> None:
    for group, scale in ((1, 0.3), (4, None), (8, 0.25)):
        forest = random_forest(num_tokens, seed=num_tokens + group, num_padding=0 if num_tokens < 8 else 5)
        inputs = random_heads(num_tokens, 2 * group, 2, torch.float64, seed=group)
        exact = dense_results(inputs, forest.visible, HEAD_DIM**-0.5 if scale is None else scale)
        for got, want in zip(tree_results(inputs, forest, impl, scale=scale), exact, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("size", [1, 2, 7, 300])
@pytest.mark.parametrize("chain", [False, True], ids=["forest", "chain"])
def test_window_hides_ancestors_by_depth(chain: bool, size: int, impl: str) -> None:
    """Runs of more keys than a block, of which a query may see none at all, and siblings far apart in rows."""
    forest = random_forest(700, seed=size, num_padding=0 if chain else 5)
    if chain:
        visible = torch.ones(700, 700, dtype=torch.bool).tril()
        forest = RandomForest(torch.full((700,), 700, dtype=torch.int32), visible, 700)
    depths = forest.visible.sum(dim=1) - 1
    visible = forest.visible & (depths[:, None] - depths[None] < size)
    inputs = random_heads(700, 4, 2, torch.float64, seed=size)
    exact = dense_results(inputs, visible, HEAD_DIM**-0.5)
    leaves = [tensor.clone().requires_grad_() for tensor in inputs[:3]]
    out = attention_layer(*leaves, forest.subtree_end, None, None, impl, Window(depths, size))
    for got, want in zip([out.detach(), *torch.autograd.grad(out, leaves, inputs[3])], exact, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("impl", IMPLS)
def test_bf16_inputs_are_accumulated_in_fp32(impl: str) -> None:
    """The only rounding to bf16 is that of the result: half a unit in its last place."""
    forest = random_forest(300, seed=2)
    inputs = random_heads(300, 4, 2, torch.bfloat16, seed=2)
    exact = dense_results([tensor.double() for tensor in inputs], forest.visible, HEAD_DIM**-0.5)[0]
    out = tree_results(inputs, forest, impl)[0]
    torch.testing.assert_close(out.double(), exact, rtol=torch.finfo(torch.bfloat16).eps / 2, atol=1e-5)


@pytest.mark.parametrize("impl", IMPLS)
def test_shapes_of_forests_that_break_blocks(impl: str) -> None:
    """A chain, a comb of single-token siblings, only roots, and only padding."""
    chain = [130] * 130
    comb = [130] * 65 + list(range(66, 131))
    roots = list(range(1, 131))
    for ends in (chain, comb, roots):
        subtree_end = torch.tensor(ends, dtype=torch.int32)
        rows = torch.arange(130)
        visible = (rows[None] <= rows[:, None]) & (rows[:, None] < subtree_end[None])
        forest = RandomForest(subtree_end, visible, 130)
        inputs = random_heads(130, 2, 1, torch.float64, seed=9)
        exact = dense_results(inputs, visible, HEAD_DIM**-0.5)
        for got, want in zip(tree_results(inputs, forest, impl), exact, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_native_is_the_default_on_cpu() -> None:
    forest = random_forest(65, seed=5)
    inputs = random_heads(65, 4, 2, torch.float32, seed=5)
    assert torch.equal(
        tree_attention(*inputs[:3], forest.subtree_end), tree_attention(*inputs[:3], forest.subtree_end, impl="native")
    )


@pytest.mark.parametrize("impl", IMPLS)
def test_nan_in_padding_rows_does_not_reach_a_real_row(impl: str) -> None:
    """In the dense reference only forward: its gradient is autograd's, where a masked 0 times NaN is NaN."""
    forest = random_forest(127, seed=7, num_padding=20)
    clean = random_heads(127, 4, 2, torch.float32, seed=7)
    poisoned = [tensor.clone() for tensor in clean]
    clean[3][forest.num_real :] = 0
    poisoned[3][forest.num_real :] = 0
    for tensor in poisoned[:3]:
        tensor[forest.num_real :] = float("nan")
    checked = 1 if impl == "reference" else 4
    results = zip(tree_results(clean, forest, impl)[:checked], tree_results(poisoned, forest, impl), strict=False)
    for want, got in results:
        real_want, real_got = want[: forest.num_real], got[: forest.num_real]
        torch.testing.assert_close(real_got, real_want, rtol=1e-6, atol=1e-6)  # NaN equals nothing


@pytest.mark.parametrize("impl", IMPLS)
def test_non_contiguous_inputs_give_the_same_result(impl: str) -> None:
    forest = random_forest(65, seed=11)
    inputs = random_heads(65, 4, 2, torch.float64, seed=11)
    strided = [tensor.transpose(0, 1).contiguous().transpose(0, 1) for tensor in inputs]
    assert not strided[0].is_contiguous()
    for want, got in zip(tree_results(inputs, forest, impl), tree_results(strided, forest, impl), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-13, atol=1e-13)


class LargestTensor(TorchDispatchMode):
    """Records the element count of the largest tensor any operation returns while the mode is on."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor):
                # The storage, so that an expanded view of a small tensor does not count as a large one.
                self.numel = max(self.numel, tensor.untyped_storage().nbytes() // tensor.element_size())
        return result


@pytest.mark.parametrize(("impl", "quadratic"), [("eager", False), ("reference", True)])
def test_only_the_reference_makes_a_t_by_t_tensor(impl: str, quadratic: bool) -> None:
    """The reference is dense by definition: finding its matrix shows that the recorder sees what it must see."""
    num_tokens = 2048
    ends = torch.full((num_tokens,), num_tokens, dtype=torch.int32)  # one chain: nothing can be skipped
    forest = RandomForest(ends, torch.empty(0), num_tokens)
    inputs = random_heads(num_tokens, 1, 1, torch.float32, seed=13)
    with LargestTensor() as largest:
        tree_results(inputs, forest, impl)
    assert (largest.numel >= num_tokens * num_tokens) is quadratic


@pytest.mark.parametrize("impl", IMPLS)
def test_two_runs_are_bitwise_equal(impl: str) -> None:
    forest = random_forest(300, seed=17, num_padding=3)
    inputs = random_heads(300, 8, 2, torch.bfloat16, seed=17)
    for first, second in zip(tree_results(inputs, forest, impl), tree_results(inputs, forest, impl), strict=True):
        assert torch.equal(first, second)


def test_schedule_of_the_same_forest_changes_nothing() -> None:
    forest = random_forest(129, seed=19)
    inputs = random_heads(129, 4, 2, torch.float64, seed=19)
    schedule = tree_schedule(forest.subtree_end, 32, 64)
    planned = tree_results(inputs, forest, "eager", schedule=schedule)
    for want, got in zip(tree_results(inputs, forest, "eager"), planned, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("other_tokens", [129, 200])
def test_schedule_of_another_forest_is_refused(other_tokens: int) -> None:
    forest = random_forest(129, seed=19)
    other = random_forest(other_tokens, seed=23)
    q, k, v, _ = random_heads(129, 4, 2, torch.float32, seed=19)
    with pytest.raises(ValueError, match="schedule"):
        tree_attention(q, k, v, forest.subtree_end, schedule=tree_schedule(other.subtree_end, 32, 64))


def test_impl_that_cannot_run_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    forest = random_forest(5, seed=1)
    q, k, v, _ = random_heads(5, 2, 1, torch.float32, seed=1)
    with pytest.raises(ValueError, match="no_such_kernel"):
        tree_attention(q, k, v, forest.subtree_end, impl="no_such_kernel")
    monkeypatch.setenv("CPO_KERNELS_IMPL", "no_such_kernel")
    with pytest.raises(ValueError, match="no_such_kernel"):
        tree_attention(q, k, v, forest.subtree_end)


@pytest.mark.parametrize(
    ("kv_shape", "end_shape"), [((5, 3, 16), (5,)), ((4, 2, 16), (5,)), ((5, 2, 8), (5,)), ((5, 2, 16), (4,))]
)
def test_shapes_that_do_not_fit_are_refused(kv_shape: tuple[int, ...], end_shape: tuple[int, ...]) -> None:
    q, kv = torch.zeros(5, 4, 16), torch.zeros(kv_shape)
    with pytest.raises(ValueError, match=r"expected|multiple"):
        tree_attention(q, kv, kv, torch.full(end_shape, end_shape[0], dtype=torch.int32))


def test_a_choice_and_its_check_are_logged_once() -> None:
    """In a process of its own: an earlier test would have used up the one message."""
    program = (
        "import logging, torch; logging.basicConfig(level=logging.INFO, format='%(message)s')\n"
        "from cpo_kernels import tree_attention\n"
        "q, end = torch.zeros(2, 1, 4), torch.tensor([2, 2], dtype=torch.int32)\n"
        "for _ in range(3): tree_attention(q, q, q, end)"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=1200)
    messages = [line for line in result.stderr.splitlines() if "tree_attention" in line]
    check, choice = messages
    assert check.startswith("self-check: the C++ kernels of tree_attention are right on cpu")
    assert choice == "tree_attention uses impl=native on cpu"
