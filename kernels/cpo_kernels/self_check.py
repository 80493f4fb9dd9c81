"""Are the Triton kernels right on this very device? Every one once, forward and backward, before it is anyone's default.

Random inputs, ragged at every tile, go through `triton` and through `eager` in one dtype, and both are compared with
`eager` in float64 (`self_check_cases`). A kernel may err as `cpo_kernels.tolerances.kernel_bound` says: twice the eager
error, plus rounding. What a compiler, a driver or a card gets wrong shows here in seconds instead of in a run's results.
Each op is checked for those that use it: a fault of `tree_decode` is no reason not to train. An `impl=` that somebody
asked for by name is not checked.
"""

import logging
import time
from collections.abc import Callable, Sequence

import torch

from cpo_kernels.self_check_cases import ModelShape, check_linear_logprob, check_tree_attention, check_tree_decode

__all__ = ["OPS", "TRAINING_OPS", "KernelCheckError", "ModelShape", "check_once", "self_check"]

logger = logging.getLogger(__name__)

_CHECKS: dict[str, Callable[[torch.device, ModelShape], dict[str, float]]] = {
    "tree_attention": check_tree_attention,
    "linear_logprob": check_linear_logprob,
    "tree_decode": check_tree_decode,
}
OPS = tuple(_CHECKS)
TRAINING_OPS = ("tree_attention", "linear_logprob")  # of a forward on a forest, with gradients or without


class KernelCheckError(RuntimeError):
    """A kernel failed or differed on this device."""


_passed: set[tuple[str, str, ModelShape]] = set()  # op, device, shape


def self_check(device: torch.device | str, shape: ModelShape | None = None, ops: Sequence[str] = TRAINING_OPS) -> None:
    """Run every kernel of some ops on `device` in the shapes of a model; once a process for each op, device and shape.

    Args:
        device: a CUDA device, or the CPU in Triton's interpreter.
        shape: dtype, heads and hidden size of the model; None takes those of a small bfloat16 one.
        ops: names out of `OPS`; the caller's own, so that no fault of another op is in its way.

    Raises:
        KernelCheckError: a kernel did not compile or launch, or its result lies outside the bound; one sentence that
            names the op and says how to go on without it.
        ValueError: no op has that name.
    """
    device, shape = torch.device(device), shape or ModelShape()
    unknown = [op for op in ops if op not in _CHECKS]
    if unknown:
        raise ValueError(f"self_check: expected ops out of {', '.join(OPS)}, got {', '.join(unknown)}")
    missing = [op for op in ops if (op, str(device), shape) not in _passed]
    started = time.perf_counter()
    for op in missing:
        try:
            # the first call of an op may come from a place without gradients, or under autocast
            with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False):
                excess = _CHECKS[op](device, shape)
        except Exception as error:
            reason = (str(error).strip() or "no message").splitlines()[0]
            raise KernelCheckError(
                f"{op}: its Triton kernels do not run on {device} for {shape} ({type(error).__name__}: {reason}); set "
                "CPO_KERNELS_IMPL=eager to run without them"
            ) from error
        wrong = {name: value for name, value in excess.items() if not value <= 1}
        if wrong:
            name = max(wrong, key=lambda key: float("inf") if wrong[key] != wrong[key] else wrong[key])
            raise KernelCheckError(
                f"{op}: its Triton kernels are wrong on {device} for {shape}: the error of {name} is {wrong[name]:.3g} "
                "times what rounding explains; set CPO_KERNELS_IMPL=eager to run without them"
            )
        _passed.add((op, str(device), shape))
    if missing:
        seconds = time.perf_counter() - started
        logger.info(
            "self-check: the Triton kernels of %s are right on %s (%.1f s)", ", ".join(missing), device, seconds
        )


def check_once(device_type: str, op: str) -> None:
    """Run `self_check` of an op on the current device of a type unless it has passed there before, in any shape."""
    if not any(name == op and torch.device(device).type == device_type for name, device, _ in _passed):
        self_check(torch.device(device_type), ops=(op,))
