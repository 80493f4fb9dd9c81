"""How an op's kernels are checked on a device: what the ops' `check.py` share, and the runner and its memory.

A check puts random inputs, ragged at every tile, through an op's kernels and through its eager implementation in one
dtype, and compares both with the eager one in float64. A kernel may err as `cpo_kernels.tolerances.kernel_bound`
says: twice the eager error, plus rounding. What a compiler, a driver or a card gets wrong shows here in seconds instead
of in a run's results. An implementation that somebody asked for by name is not checked.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from cpo_kernels.tolerances import kernel_bound

logger = logging.getLogger(__name__)

FLOAT32_EPS = torch.finfo(torch.float32).eps
SEED = 20240613


class KernelCheckError(RuntimeError):
    """A kernel failed or differed on this device."""


@dataclass(frozen=True)
class ModelShape:
    """What the kernels' code paths depend on."""

    dtype: torch.dtype = torch.bfloat16
    num_heads: int = 8
    num_kv_heads: int = 2
    head_dim: int = 128
    hidden_size: int = 1024
    windowed: bool = False  # some layer has a sliding window
    capped: bool = False  # some layer has a soft-cap on its scores
    has_sinks: bool = False  # some layer has attention sinks


Results = dict[str, torch.Tensor]
Check = Callable[[torch.device, ModelShape], dict[str, float]]  # error over bound of each result, by its name

KERNELS = {"triton": "Triton", "native": "C++"}  # what is checked, by the name of the implementation

# op, implementation, device, shape; what is taken out is checked again
passed: set[tuple[str, str, str, ModelShape]] = set()


def run_check(op: str, check: Check, device: torch.device, shape: ModelShape, impl: str = "triton") -> None:
    """Run the check of an op on `device` in the shapes of a model, unless it has passed there in this process.

    Raises:
        KernelCheckError: a kernel did not compile or launch, or its result lies outside the bound. The sentence names the
            op and says how to go on without its kernels.
    """
    if (op, impl, str(device), shape) in passed:
        return
    started = time.perf_counter()
    try:
        # the first call of an op may come from a place without gradients, or under autocast
        with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False):
            excess = check(device, shape)
    except Exception as error:
        reason = (str(error).strip() or "no message").splitlines()[0]
        raise KernelCheckError(
            f"{op}: its {KERNELS[impl]} kernels do not run on {device} for {shape} ({type(error).__name__}: {reason}); set "
            "CPO_KERNELS_IMPL=eager to run without them"
        ) from error
    wrong = {name: value for name, value in excess.items() if not value <= 1}  # NaN too
    if wrong:
        name = max(wrong, key=lambda key: float("inf") if wrong[key] != wrong[key] else wrong[key])
        raise KernelCheckError(
            f"{op}: its {KERNELS[impl]} kernels are wrong on {device} for {shape}: the error of {name} is "
            f"{wrong[name]:.3g} times what rounding explains; set CPO_KERNELS_IMPL=eager to run without them"
        )
    passed.add((op, impl, str(device), shape))
    seconds = time.perf_counter() - started
    logger.info("self-check: the %s kernels of %s are right on %s (%.1f s)", KERNELS[impl], op, device, seconds)


def check_once(op: str, check: Check, device_type: str, impl: str = "triton") -> None:
    """Run an op's check on the current device of a type unless it has passed there before, in any shape."""
    done = ((name, kernels, torch.device(device).type) for name, kernels, device, _ in passed)
    if (op, impl, device_type) not in done:
        run_check(op, check, torch.device(device_type), ModelShape(), impl)


def error_ratios(
    exact: Results,
    eager: Results,
    kernel: Results,
    bands: dict[str, float],
    other_band: float = 0.0,
    allowance: float = 1.0,
) -> dict[str, float]:
    """Error of every result of the kernels over what is allowed. Gradients are allowed `allowance` times as much.

    Args:
        exact: results in float64 by name. eager, kernel: in the dtype under test.
        bands: what rounding may add to each, by name. `other_band` is for the others.
    """
    ratios = {}
    for name, result in kernel.items():
        want = exact[name].double()
        eager_error, error = (float((given[name].double() - want).abs().max()) for given in (eager, kernel))
        bound = kernel_bound(eager_error, result.dtype, float(want.abs().max()))
        ratios[name] = error / (bound * (allowance if "gradient" in name else 1.0) + bands.get(name, other_band))
    return ratios


def random_tensor(
    shape: tuple[int, ...], device: torch.device, dtype: torch.dtype, place: int, scale: float = 1.0
) -> torch.Tensor:
    """Normal numbers, another series for each `place`, and the same on every device."""
    generator = torch.Generator().manual_seed(SEED + place)
    return (scale * torch.randn(shape, generator=generator)).to(device, dtype)
