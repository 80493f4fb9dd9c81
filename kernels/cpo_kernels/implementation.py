"""Which implementation of an op runs: chosen once by device, overridable, logged, never silently replaced.

Names: `reference` (plain torch, the specification), `eager` (plain torch, any device, no T x T matrix and no head in
backward), `native` (C++ on a CPU: attention and decode; where an op has none, a CPU runs `eager`), `triton` (GPU kernels),
`flash` (flash-attn where an op says so). `CPO_KERNELS_IMPL` overrides the choice by device, an explicit `impl=` argument
overrides both. An implementation that cannot run raises. Where only the device's default asks for `triton` or `native`,
the op's check of those kernels runs there first, once a process.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from cpo_kernels.kernel_check import Check, check_once

logger = logging.getLogger(__name__)

ENVIRONMENT_VARIABLE = "CPO_KERNELS_IMPL"
DEFAULT_BY_DEVICE = {"cpu": "native", "cuda": "triton"}


@dataclass(frozen=True)
class Implementations:
    """One implementation name for each op of training. None leaves the choice to the op."""

    tree_attention: str | None = None
    linear_logprob: str | None = None

    @classmethod
    def of(cls, impl: str | Implementations | None) -> Implementations:
        return impl if isinstance(impl, Implementations) else cls(impl, impl)


def default_implementation(device_type: str) -> str | None:
    """What runs on a device when nobody chooses, or None when `CPO_KERNELS_IMPL` does."""
    return None if os.environ.get(ENVIRONMENT_VARIABLE) else DEFAULT_BY_DEVICE.get(device_type, "eager")


def available_implementations(device_type: str) -> tuple[str, ...]:
    """What every op has on a device: Triton's interpreter is the one way to run its kernels without a GPU."""
    runs_triton = device_type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"
    return ("reference", "eager", "triton") if runs_triton else ("reference", "eager")


def resolve_implementation(
    op: str,
    impl: str | None,
    device_type: str,
    available: Sequence[str],
    check: Check | None = None,
    native_check: Check | None = None,
) -> str:
    """Return the implementation name that `op` runs on a device.

    Args:
        op: name of the op, for messages.
        impl: the caller's choice, or None.
        device_type: `torch.device.type` of the inputs.
        available: names that this op implements on this device.
        check: of the op's Triton kernels, run before they are the default. native_check: of its C++ kernels, likewise.

    Raises:
        ValueError: the chosen implementation is unknown to the op or cannot run on the device.
        KernelCheckError: nobody chose, and the kernels that are the device's default do not pass their check there.
    """
    default = default_implementation(device_type)
    chosen = impl or default or os.environ[ENVIRONMENT_VARIABLE]
    if chosen == "native" and device_type == "cpu" and chosen not in available:
        chosen = "eager"
    if chosen not in available:
        raise ValueError(
            f"{op}: impl={chosen!r} cannot run on {device_type}; expected one of {', '.join(map(repr, available))}"
        )
    if torch.compiler.is_compiling():  # a traced graph holds neither checks nor log lines
        return chosen
    needed = {"triton": check, "native": native_check}.get(chosen) if impl is None and default else None
    if needed is not None:
        check_once(op, needed, device_type, chosen)
    _log_choice(op, chosen, device_type)
    return chosen


@functools.cache
def _log_choice(op: str, chosen: str, device_type: str) -> None:
    logger.info("%s uses impl=%s on %s", op, chosen, device_type)
