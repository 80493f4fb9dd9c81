"""Attention of a search tree's frontier: every node that states share is read once, and the partials are merged.

`reference` is the specification (dense, row by row), `eager` the plan's items in plain torch, `native` rows in C++ on a
CPU, `triton` the GPU kernels of `triton_forward`, which run on a CPU under TRITON_INTERPRET=1. Inference only: nothing here
is differentiable.
"""

from collections.abc import Callable

import torch

from cpo_kernels.implementation import available_implementations, resolve_implementation
from cpo_kernels.tree_decode.check import check_native_tree_decode, check_tree_decode
from cpo_kernels.tree_decode.eager import tree_decode_eager
from cpo_kernels.tree_decode.native import tree_decode_native
from cpo_kernels.tree_decode.plan import DecodePlan
from cpo_kernels.tree_decode.reference import tree_decode_reference

__all__ = ["DecodePlan", "decode_layer", "resolve_tree_decode", "tree_decode"]


def tree_decode(
    q: torch.Tensor,  # [N, H, D]
    k_new: torch.Tensor,  # [N, Hkv, D]
    v_new: torch.Tensor,  # [N, Hkv, D]
    k_arena: torch.Tensor,  # [C, Hkv, D]
    v_arena: torch.Tensor,  # [C, Hkv, D]
    plan: DecodePlan,
    scale: float | None = None,
    impl: str | None = None,
    rotary: tuple[torch.Tensor, torch.Tensor] | None = None,  # [N, D] each
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,  # [H]
) -> torch.Tensor:
    """Write the new keys and values to `plan.slots`, then attend as the plan says. Prefill and decode rows may mix.

    Args:
        q: [N, H, D] float64, float32, bfloat16 or float16, position encoding applied unless `rotary` is given.
        k_new, v_new: [N, Hkv, D], same dtype. Hkv divides H.
        k_arena, v_arena: [C, Hkv, D], same dtype, changed in place. Any strides, last dimension contiguous.
        plan: of these N rows, on the device of q.
        scale: factor on q . k, default D ** -0.5.
        impl: "reference", "eager", "native", "triton", or None to choose by device. "native" runs on a CPU. "triton" takes
            no float64 and head sizes up to 256.
        rotary: cosines and sines [N, D] of each row's position, dtype of q. q and k_new are rotated by them first, as
            Transformers' `apply_rotary_pos_emb` does, and the keys are stored so. "triton" computes it in float32 and
            rounds once. D must be even.
        window: a row sees its last so many keys, itself included. None: all.
        softcap: scores s become softcap * tanh(s / softcap). None: they stay.
        sinks: [H] any float dtype. exp(sink) of a head joins the denominator of its softmax, and no value the sum.

    Returns:
        [N, H, D] in the dtype of q. A row without visible keys is 0. Accumulated in float32 (float64 for float64). Bitwise
        repeatable. With "native", and with "eager" on a CPU in float32, a row's bits do not depend on the other rows.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, the plan names slots past the arena, or `impl` cannot run here.
        KernelCheckError: `impl` is None, and the kernels that are this device's default are wrong on it.
    """
    impl = resolve_tree_decode(impl, q.device.type)
    return decode_layer(q, k_new, v_new, k_arena, v_arena, plan, scale, impl, rotary, window, softcap, sinks)


def resolve_tree_decode(impl: str | None, device_type: str) -> str:
    """The name of the implementation that runs on a device, for `decode_layer`. See `resolve_implementation`."""
    available = available_implementations(device_type)
    if device_type == "cpu":
        available += ("native",)
    checks = check_tree_decode, check_native_tree_decode
    return resolve_implementation("tree_decode", impl, device_type, available, *checks)


@torch.no_grad()
def decode_layer(
    q: torch.Tensor,  # [N, H, D]
    k_new: torch.Tensor,  # [N, Hkv, D]
    v_new: torch.Tensor,  # [N, Hkv, D]
    k_arena: torch.Tensor,  # [C, Hkv, D]
    v_arena: torch.Tensor,  # [C, Hkv, D]
    plan: DecodePlan,
    scale: float | None,
    impl: str,  # of `resolve_tree_decode`
    rotary: tuple[torch.Tensor, torch.Tensor] | None = None,  # [N, D] each
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,  # [H]
) -> torch.Tensor:
    """`tree_decode` by an implementation that was resolved before, once for all layers and steps."""
    _check(q, k_new, v_new, k_arena, v_arena, plan)
    _check_options(q, window, softcap, sinks)
    if rotary is not None:
        _check_rotary(q, *rotary)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if impl == "triton":
        from cpo_kernels.tree_decode.triton_forward import (
            tree_decode_forward,
        )  # loads Triton: only when it is asked for

        run: Callable[..., torch.Tensor] = tree_decode_forward
    else:
        run = {"reference": tree_decode_reference, "eager": tree_decode_eager, "native": tree_decode_native}[impl]
    return run(q, k_new, v_new, k_arena, v_arena, plan, scale, rotary, window, softcap, sinks)


def _check_options(q: torch.Tensor, window: int | None, softcap: float | None, sinks: torch.Tensor | None) -> None:
    if window is not None and window < 1:
        raise ValueError(f"tree_decode: expected a window of at least one token, got {window}")
    if softcap is not None and not 0 < softcap < float("inf"):
        raise ValueError(f"tree_decode: expected a soft-cap above 0 and below infinity, got {softcap}")
    if sinks is not None and (sinks.shape != q.shape[1:2] or sinks.device != q.device):
        raise ValueError(
            f"tree_decode: expected sinks [{q.shape[1]}] on {q.device}, got {tuple(sinks.shape)} on {sinks.device}"
        )


def _check_rotary(q: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    num_rows, head_dim = q.shape[0], q.shape[2]
    for table in (cos, sin):
        if table.shape != (num_rows, head_dim) or table.dtype != q.dtype or table.device != q.device or head_dim % 2:
            raise ValueError(
                f"tree_decode: expected rotary tables [{num_rows}, {head_dim}] of {q.dtype} on {q.device} and an even "
                f"head size, got {tuple(table.shape)} of {table.dtype} on {table.device}"
            )


def _check(
    q: torch.Tensor,
    k_new: torch.Tensor,
    v_new: torch.Tensor,
    k_arena: torch.Tensor,
    v_arena: torch.Tensor,
    plan: DecodePlan,
) -> None:
    new_shape, arena_shape = (q.shape[0], *k_arena.shape[1:]), (*k_arena.shape[:2], q.shape[-1])
    if q.ndim != 3 or k_arena.ndim != 3 or k_new.shape != new_shape or v_new.shape != new_shape:
        raise ValueError(
            "tree_decode: expected q [N, H, D], k_new and v_new [N, Hkv, D] and an arena [C, Hkv, D], "
            f"got {tuple(q.shape)}, {tuple(k_new.shape)}, {tuple(v_new.shape)} and {tuple(k_arena.shape)}"
        )
    if k_arena.shape != arena_shape or v_arena.shape != arena_shape:
        raise ValueError(
            f"tree_decode: expected k_arena and v_arena {arena_shape}, "
            f"got {tuple(k_arena.shape)} and {tuple(v_arena.shape)}"
        )
    if k_arena.stride(2) != 1 or v_arena.stride(2) != 1:
        raise ValueError("tree_decode: expected an arena whose last dimension is contiguous")
    if not q.shape[1] or not k_arena.shape[1] or q.shape[1] % k_arena.shape[1] != 0:
        raise ValueError(f"tree_decode: {q.shape[1]} query heads are not a multiple of {k_arena.shape[1]} key heads")
    if {tensor.dtype for tensor in (k_new, v_new, k_arena, v_arena)} != {q.dtype}:
        raise ValueError(
            f"tree_decode: expected one dtype, got {q.dtype}, {k_new.dtype}, {v_new.dtype}, {k_arena.dtype} "
            f"and {v_arena.dtype}"
        )
    if len(plan.slots) != q.shape[0]:
        raise ValueError(f"tree_decode: the plan is of {len(plan.slots)} rows, q has {q.shape[0]}")
    if plan.num_arena_rows > k_arena.shape[0]:
        raise ValueError(
            f"tree_decode: the plan names {plan.num_arena_rows} arena rows, the arena has {k_arena.shape[0]}"
        )
    if plan.slots.device != q.device or k_arena.device != q.device:
        raise ValueError(
            f"tree_decode: expected plan and arena on {q.device} like q, got {plan.slots.device} and {k_arena.device}"
        )
