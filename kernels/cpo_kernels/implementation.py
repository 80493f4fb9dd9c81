"""Which implementation of an op runs: chosen once by device, overridable, logged, never silently replaced.

Names: `reference` (plain torch, the specification), `eager` (plain torch, any device, no T x T matrix and no head in
backward), `triton` (GPU kernels), `flash` (flash-attn where an op says so). `CPO_KERNELS_IMPL` overrides the choice by
device, an explicit `impl=` argument overrides both. An implementation that cannot run raises.
"""

import functools
import logging
import os
from collections.abc import Sequence

logger = logging.getLogger(__name__)

ENVIRONMENT_VARIABLE = "CPO_KERNELS_IMPL"
DEFAULT_BY_DEVICE = {"cpu": "eager", "cuda": "eager"}  # cuda turns to triton once the kernels have run on one


def resolve_implementation(op: str, impl: str | None, device_type: str, available: Sequence[str]) -> str:
    """Return the implementation name that `op` runs on a device.

    Args:
        op: name of the op, for messages.
        impl: the caller's choice, or None.
        device_type: `torch.device.type` of the inputs.
        available: names that this op implements on this device.

    Raises:
        ValueError: the chosen implementation is unknown to the op or cannot run on the device.
    """
    chosen = impl or os.environ.get(ENVIRONMENT_VARIABLE) or DEFAULT_BY_DEVICE.get(device_type, "eager")
    if chosen not in available:
        raise ValueError(
            f"{op}: impl={chosen!r} cannot run on {device_type}; expected one of {', '.join(map(repr, available))}"
        )
    _log_choice(op, chosen, device_type)
    return chosen


@functools.cache
def _log_choice(op: str, chosen: str, device_type: str) -> None:
    logger.info("%s uses impl=%s on %s", op, chosen, device_type)
