"""A dense masked softmax in fp64 beside the Triton kernels of tree_attention, and how far apart the two may be.

T rows, H query heads, Hkv key heads, D head size. Where the kernels run is said in `kernel_device`.
"""

from collections.abc import Callable

import torch

from cpo_kernels import TreeSchedule, tree_attention, tree_schedule
from cpo_kernels.tolerances import kernel_bound
from cpo_kernels.tree_attention import Window, attention_layer
from cpo_kernels.tree_attention.reference import visible
from tests.cpo_kernels.kernel_device import DEVICE

NAMES = ("out", "dq", "dk", "dv")
SCALE = 0.3


def random_heads(
    num_rows: int, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype, seed: int = 0
) -> list[torch.Tensor]:
    """q [T, H, D], k and v [T, Hkv, D] and an upstream gradient [T, H, D]."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(num_rows, n, head_dim) for n in (heads, kv_heads, kv_heads, heads)]
    return [(1.5 * torch.randn(shape, generator=generator)).to(DEVICE, dtype) for shape in shapes]


def results(inputs: list[torch.Tensor], attention: Callable[..., torch.Tensor]) -> list[torch.Tensor]:
    """Output, dq, dk, dv."""
    leaves = [tensor.detach().requires_grad_() for tensor in inputs[:3]]
    out = attention(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, inputs[3])]


def triton_results(
    inputs: list[torch.Tensor], subtree_end: torch.Tensor, schedule: TreeSchedule | None = None, block: int = 16
) -> list[torch.Tensor]:
    """The kernels under `schedule`, right or wrong, or under blocks of `block` by `block`."""
    planned = (tree_schedule(subtree_end, block, block) if schedule is None else schedule).to(DEVICE)
    return results(
        inputs,
        lambda q, k, v: tree_attention(q, k, v, planned.subtree_end, schedule=planned, scale=SCALE, impl="triton"),
    )


def dense_results(inputs: list[torch.Tensor], subtree_end: torch.Tensor) -> list[torch.Tensor]:
    """Softmax over a written-out mask, every step in the dtype of the inputs: the oracle, and the dtype's own error."""
    mask = visible(subtree_end.to(DEVICE))

    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        group = q.shape[1] // k.shape[1]
        keys, values = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
        scores = torch.einsum("ihd,jhd->hij", q, keys) * SCALE
        weights = scores.masked_fill(~mask, float("-inf")).softmax(dim=-1)
        return torch.einsum("hij,jhd->ihd", weights, values)

    return results(inputs, attention)


def excess(actual: list[torch.Tensor], inputs: list[torch.Tensor], subtree_end: torch.Tensor) -> dict[str, float]:
    """Error against fp64 over what is allowed, per result; at most 1 where the kernel is right.

    To `kernel_bound` comes the rounding of float32 accumulators, eight times, since exp(score - log-sum-exp) inherits
    that of both terms, about 8 in size; dq and dk are sums of (dp - delta) k, whose terms cancel, in a row that sees
    only itself to nothing.
    """
    exact = dense_results([tensor.double() for tensor in inputs], subtree_end)
    same_dtype = dense_results(inputs, subtree_end)
    q, k, v, upstream = (float(tensor.double().norm(dim=-1).max()) for tensor in inputs)
    sizes = {"out": v, "dq": SCALE * upstream * v * k, "dk": SCALE * upstream * v * q, "dv": upstream}
    ratios = {}
    for name, got, eager, want in zip(NAMES, actual, same_dtype, exact, strict=True):
        assert got.dtype == inputs[0].dtype, name
        error = float((got.double() - want).abs().max())
        allowed = kernel_bound(float((eager.double() - want).abs().max()), got.dtype, float(want.abs().max()))
        allowed += 8 * torch.finfo(torch.float32).eps * sizes[name]
        ratios[name] = error / allowed if error == error else float("inf")  # a NaN is within no bound
    return ratios


def random_parents(num_rows: int, seed: int, num_padding: int = 0) -> list[int]:
    """The row above each row of a forest in preorder, -1 at a root: the row before, one of its ancestors, or none."""
    generator = torch.Generator().manual_seed(seed)
    parents: list[int] = []
    for row in range(num_rows - num_padding):
        chain, above = [], row - 1
        while above >= 0:
            chain.append(above)
            above = parents[above]
        choice = float(torch.rand((), generator=generator))
        place = 0 if choice < 0.85 else int(torch.randint(max(len(chain), 1), (), generator=generator))
        parents.append(-1 if not chain or choice > 0.98 else chain[place])
    return parents + [-1] * num_padding


def parent_mask(parents: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """[T, T] bool, where row i sees row j by walking up from i, and the depth [T] int32 of each row on its own path."""
    mask = torch.eye(len(parents), dtype=torch.bool)
    for row, parent in enumerate(parents):
        if parent >= 0:
            mask[row] |= mask[parent]
    return mask, (mask.sum(dim=1) - 1).to(torch.int32)


def subtree_ends(mask: torch.Tensor) -> torch.Tensor:
    """[T] int32, one past the last row that sees each row."""
    rows = torch.arange(1, len(mask) + 1, dtype=torch.int32)
    return (mask * rows[:, None]).amax(dim=0)


def featured(
    impl: str, subtree_end: torch.Tensor, schedule: TreeSchedule | None, window: Window | None, softcap: float | None
) -> Callable[..., torch.Tensor]:
    """An implementation as a function of q, k, v and sinks if any, at a scale of 0.25."""

    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor | None = None) -> torch.Tensor:
        return attention_layer(q, k, v, subtree_end, schedule, 0.25, impl, window, softcap, sinks)

    return attention


def featured_results(
    inputs: list[torch.Tensor],  # q, k, v and the gradient of the output
    attention: Callable[..., torch.Tensor]
    | torch.Tensor,  # of q, k, v and sinks if any; or the mask of a dense softmax
    scale: float,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> dict[str, torch.Tensor]:
    """Output and gradients by name, sinks' too where there are any. Dense: autograd of the written-out softmax."""
    leaves = [tensor.detach().requires_grad_() for tensor in inputs[:3]]
    leaves += [] if sinks is None else [sinks.detach().clone().requires_grad_()]
    if isinstance(attention, torch.Tensor):
        q, k, v = leaves[:3]
        group = q.shape[1] // k.shape[1]
        scores = torch.einsum("ihd,jhd->hij", q, k.repeat_interleave(group, dim=1)) * scale
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        scores = scores.masked_fill(~attention, float("-inf"))
        if sinks is not None:
            scores = torch.cat([scores, leaves[3].to(scores.dtype)[:, None, None].expand(-1, len(q), 1)], dim=-1)
        weights = scores.softmax(dim=-1)[:, :, : len(q)]
        out = torch.einsum("hij,jhd->ihd", weights, v.repeat_interleave(group, dim=1))
    else:
        out = attention(*leaves)
    gradients = torch.autograd.grad(out, leaves, inputs[3])
    return {"out": out.detach(), **dict(zip(("dq", "dk", "dv", "dsinks"), gradients, strict=False))}
