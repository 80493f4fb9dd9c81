"""Tree decode on a CPU in C++ (csrc/tree_decode.cpp): each row by the same operations, whichever rows stand beside it.

A row's scores, its softmax and its sum over values run over its whole path in path order, however the path is cut into
items and keys of the row's own, so a key stored by a decode step has the bits that a prefill gives it. Rows that read the
same keys take them together, which changes no row's bits; nor does the number of threads. float32 accumulators (float64 for
float64).
"""

import numpy as np
import torch

import cpo_kernels._csrc as _csrc
from cpo_kernels.device import accumulation_dtype
from cpo_kernels.tree_decode.plan import DecodePlan
from cpo_kernels.tree_decode.rotation import rotate
from cpo_kernels.tree_decode.row_keys import row_keys


def tree_decode_native(
    q: torch.Tensor,  # [N, H, D]
    k_new: torch.Tensor,  # [N, Hkv, D]
    v_new: torch.Tensor,  # [N, Hkv, D]
    k_arena: torch.Tensor,  # [C, Hkv, D]
    v_arena: torch.Tensor,  # [C, Hkv, D]
    plan: DecodePlan,
    scale: float,
    rotary: tuple[torch.Tensor, torch.Tensor] | None = None,  # [N, D] each
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,  # [H]
) -> torch.Tensor:
    """Store the new keys and values, then attend: [N, H, D] in the dtype of q, 0 for a row without keys."""
    if rotary is not None:
        q, k_new = (rotate(x, *rotary) for x in (q, k_new))
    dtype = accumulation_dtype(q.dtype)
    rows = row_keys(plan, "native")
    out = torch.empty(q.shape, dtype=dtype)
    _csrc.tree_decode(
        _contiguous(q.detach().to(dtype)).numpy(),
        _bits(_contiguous(k_new.detach())),
        _bits(_contiguous(v_new.detach())),
        _bits(k_arena.detach()),
        _bits(v_arena.detach()),
        str(q.dtype).removeprefix("torch."),
        plan.slots.numpy(),
        *rows,
        scale,
        window or 0,
        softcap or 0.0,
        None if sinks is None else sinks.detach().to(dtype).contiguous().numpy(),
        out.numpy(),
        torch.get_num_threads(),
    )
    return out.to(q.dtype)


def _contiguous(x: torch.Tensor) -> torch.Tensor:
    """With its last dimension contiguous."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _bits(x: torch.Tensor) -> np.ndarray:
    """An array of a tensor's numbers, 16-bit ones as integers."""
    array: np.ndarray = (x.view(torch.int16) if x.element_size() == 2 else x).numpy()
    return array
