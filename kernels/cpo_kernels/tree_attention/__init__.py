"""Attention over a forest laid out in depth-first preorder: row i sees row j iff j <= i < subtree_end[j].

`reference` is the specification (dense), `eager` the same without a T x T matrix, `native` C++ on a CPU, `triton` the GPU
kernels (`triton_forward`, `triton_backward`), which run on a CPU under TRITON_INTERPRET=1, `flash` flash-attn's varlen
kernel for trees that are single chains. `tree_schedule` makes the block schedule that they walk once per forest on the
host. With it, no layer waits for the device.
"""

from typing import Any

import torch

from cpo_kernels.implementation import available_implementations, resolve_implementation
from cpo_kernels.tree_attention.check import check_native_tree_attention, check_tree_attention
from cpo_kernels.tree_attention.eager import EagerTreeAttention, key_runs
from cpo_kernels.tree_attention.flash import flash_tree_attention, load_varlen
from cpo_kernels.tree_attention.native import NativeTreeAttention, check_depths
from cpo_kernels.tree_attention.reference import tree_attention_reference
from cpo_kernels.tree_attention.schedule import TreeSchedule, tree_schedule, window_schedule
from cpo_kernels.tree_attention.window import Window

# implementations that compute a `Window`, a soft-cap and sinks
WINDOWED = ("reference", "eager", "native", "triton")

__all__ = [
    "WINDOWED",
    "TreeSchedule",
    "Window",
    "attention_layer",
    "resolve_tree_attention",
    "tree_attention",
    "tree_schedule",
]


def tree_attention(
    q: torch.Tensor,  # [T, H, D]
    k: torch.Tensor,  # [T, Hkv, D]
    v: torch.Tensor,  # [T, Hkv, D]
    subtree_end: torch.Tensor,  # [T] int32
    schedule: TreeSchedule | None = None,
    scale: float | None = None,
    impl: str | None = None,
    window: Window | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,  # [H]
) -> torch.Tensor:
    """Attention in which every row sees its ancestors and itself.

    Args:
        q: [T, H, D] float64, float32, bfloat16 or float16, position encoding applied.
        k, v: [T, Hkv, D], same dtype. Hkv divides H.
        subtree_end: [T] int32, laminar, as `Forest.subtree_end`.
        schedule: `forest.schedule()` of the same forest. None makes it here, for which a GPU is waited for.
        scale: factor on q . k, default D ** -0.5.
        impl: "reference", "eager", "native", "triton", "flash", or None to choose by device. "native" runs on a CPU.
            "triton" takes no float64, head sizes up to 256, and schedules on the device of q whose block sizes are powers
            of two from 16 on. "flash" takes float16 and bfloat16 on a GPU, and forests of which no tree branches, and
            computes none of what follows.
        window: a row sees those of its ancestors that are less than `window.size` tokens above it. `window.depths` is
            `Forest.position_ids`, on the device of q. None: all of them.
        softcap: positive; scores s = scale * q . k become softcap * tanh(s / softcap), as in Gemma 2.
        sinks: [H] floating point, on the device of q; a row divides by exp(sinks[h]) more, as in gpt-oss.

    Returns:
        [T, H, D] in the dtype of q, differentiable in q, k, v and sinks. Accumulated in float32 (float64 for float64).

    Raises:
        ValueError: shapes do not fit, the schedule is of another forest, or `impl` cannot run on these inputs.
        KernelCheckError: `impl` is None, and the kernels that are this device's default are wrong on it.
    """
    impl = resolve_tree_attention(impl, q.device.type)
    return attention_layer(q, k, v, subtree_end, schedule, scale, impl, window, softcap, sinks)


def resolve_tree_attention(impl: str | None, device_type: str) -> str:
    """The name of the implementation that runs on a device, for `attention_layer`. See `resolve_implementation`."""
    available = available_implementations(device_type)
    available += {"cuda": ("flash",), "cpu": ("native",)}.get(device_type, ())
    checks = check_tree_attention, check_native_tree_attention
    return resolve_implementation("tree_attention", impl, device_type, available, *checks)


def attention_layer(
    q: torch.Tensor,  # [T, H, D]
    k: torch.Tensor,  # [T, Hkv, D]
    v: torch.Tensor,  # [T, Hkv, D]
    subtree_end: torch.Tensor,  # [T] int32
    schedule: TreeSchedule | None,
    scale: float | None,
    impl: str,  # of `resolve_tree_attention`
    window: Window | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,  # [H]
) -> torch.Tensor:
    """`tree_attention` by an implementation that was resolved before, once for all layers.

    Raises:
        ValueError: as `tree_attention`, or a window, a soft-cap or sinks that `impl` does not compute.
    """
    _check_shapes(q, k, v, subtree_end)
    _check_features(q, impl, window, softcap, sinks)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if schedule is not None:
        _check_schedule(schedule, subtree_end)
    if impl == "reference":
        return tree_attention_reference(q, k, v, subtree_end, scale, window, softcap, sinks)
    if schedule is None:
        schedule = tree_schedule(subtree_end, heads=(q.shape[1], k.shape[1])).to(q.device)
    if impl == "flash":
        return flash_tree_attention(load_varlen(), q, k, v, schedule, scale)
    if impl == "triton":
        return _triton(q, k, v, schedule, scale, window, softcap, sinks)
    if impl == "native":
        if window is not None:
            check_depths(window, schedule)
        return _apply(NativeTreeAttention, q, k, v, schedule, scale, window, softcap, sinks)
    assert impl == "eager", impl
    runs = key_runs(schedule, q.shape[1], q.device)
    return _apply(EagerTreeAttention, q, k, v, runs, scale, window, softcap, sinks)


@torch.compiler.disable  # torch 2.11 compiles such a Function to a graph whose gradients are zero
def _apply(function: Any, *arguments: Any) -> torch.Tensor:
    result: torch.Tensor = function.apply(*arguments)
    return result


def _triton(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    schedule: TreeSchedule,
    scale: float,
    window: Window | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    if schedule.subtree_end.device != q.device:
        raise ValueError(
            f"tree_attention: expected a schedule on {q.device} like q, got one on {schedule.subtree_end.device}; "
            "move it once with schedule.to(device)"
        )
    from cpo_kernels.tree_attention.triton import TritonTreeAttention  # loads Triton: only when it is asked for

    if window is None and softcap is None and sinks is None:
        return _apply(TritonTreeAttention, q, k, v, schedule, scale)
    if window is not None:
        given = window.depths
        schedule, window = window_schedule(schedule, window.size, (q.shape[1], k.shape[1]))
        if given.is_cpu and not torch.equal(given.to(torch.int32), window.depths):
            raise ValueError("tree_attention: expected window.depths to be each row's place on its own path")
    return _apply(TritonTreeAttention, q, k, v, schedule, scale, window, softcap, sinks)


def _check_shapes(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, subtree_end: torch.Tensor) -> None:
    if q.ndim != 3 or k.ndim != 3 or k.shape != v.shape or k.shape[0] != q.shape[0] or k.shape[2] != q.shape[2]:
        raise ValueError(
            "tree_attention: expected q [T, H, D] and k, v [T, Hkv, D], "
            f"got {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        )
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"tree_attention: expected q, k and v of one dtype, got {q.dtype}, {k.dtype} and {v.dtype}")
    if not q.shape[1] or not k.shape[1] or q.shape[1] % k.shape[1] != 0:
        raise ValueError(f"tree_attention: {q.shape[1]} query heads are not a multiple of {k.shape[1]} key heads")
    if subtree_end.shape != (q.shape[0],):
        raise ValueError(f"tree_attention: expected subtree_end [{q.shape[0]}], got {tuple(subtree_end.shape)}")


def _check_features(
    q: torch.Tensor, impl: str, window: Window | None, softcap: float | None, sinks: torch.Tensor | None
) -> None:
    asked = {"sliding window": window, "soft-cap of scores": softcap, "attention sinks": sinks}
    for name, value in asked.items():
        if value is not None and impl not in WINDOWED:
            raise ValueError(f"tree_attention: impl={impl!r} computes no {name}; use one of {list(WINDOWED)}")
    if window is not None and (window.size < 1 or window.depths.shape != (q.shape[0],)):
        raise ValueError(
            f"tree_attention: expected a window of at least 1 with depths [{q.shape[0]}], "
            f"got {window.size} with {tuple(window.depths.shape)}"
        )
    if softcap is not None and not 0 < softcap < float("inf"):
        raise ValueError(f"tree_attention: expected a positive softcap, got {softcap}; None is without one")
    if sinks is not None and (sinks.shape != (q.shape[1],) or not sinks.is_floating_point()):
        raise ValueError(
            f"tree_attention: expected floating point sinks [{q.shape[1]}], one a query head, "
            f"got {tuple(sinks.shape)} of {sinks.dtype}"
        )


def _check_schedule(schedule: TreeSchedule, subtree_end: torch.Tensor) -> None:
    """By identity, which costs nothing. By value on the CPU only, as every layer would have to wait for a device."""
    if schedule.subtree_end is subtree_end:
        return
    if not (schedule.subtree_end.is_cpu and subtree_end.is_cpu and torch.equal(schedule.subtree_end, subtree_end)):
        raise ValueError(
            "tree_attention: the schedule was made for another forest; use forest.schedule() of this one, or pass "
            "schedule.subtree_end, since tensors on a device are not read to compare them"
        )
