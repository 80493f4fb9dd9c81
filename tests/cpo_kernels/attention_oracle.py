"""A dense masked softmax in fp64 beside the Triton kernels of tree_attention, and how far apart the two may be.

T rows, H query heads, Hkv key heads, D head size. Where the kernels run is said in `kernel_device`.
"""

from collections.abc import Callable

import torch

from cpo_kernels import TreeSchedule, tree_attention, tree_schedule
from cpo_kernels.tolerances import kernel_bound
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
