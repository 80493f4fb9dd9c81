"""The dtype of the base weights: what `model.dtype` means on a device, and what a loaded model's dtype is called.

bfloat16 halves the memory of a model, and on a GPU its time. A CPU without bf16 instructions emulates the products: with
AVX2 alone that of a gradient takes thirty times as long as in float32. So `auto` is bfloat16 except on a CPU that does not
gain by it. Here a dtype is only chosen. `models` casts the weights to it.

torch is imported inside the functions: this module is cheap to import.
"""

import functools
import logging
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

SLOW_RATIO = 2.0  # from here bfloat16 that was asked for by name is worth a warning
# (rows, width) of the products that are timed. Emulated, the small ones take 4 ms a run, and a few runs decide; where
# they do not, the large ones show a gain that the cost of a call would hide
_SMALL_PRODUCT = (32, 256)
_LARGE_PRODUCT = (128, 512)
_MIN_TIMED_RUNS = 3
_MAX_TIMED_RUNS = 40
_TIMED_SECONDS = 0.015  # of one dtype; after this no run is added to the fewest


def resolve_dtype(name: str, device: "torch.device") -> "torch.dtype":
    """The torch dtype that `model.dtype` means on a device: the one place that decides what `auto` is.

    Args:
        name: `auto`, `float32` or `bfloat16`. `auto` is bfloat16, except on a CPU: there it is float32, unless the
            processor has bf16 instructions and products measured in this process are at least as fast with them. A name
            is obeyed. Where bfloat16 is slow on the CPU, one line a process says so.
        device: where the model will be. Only its type counts, so a CUDA device need not be there.
    """
    import torch

    on_cpu = device.type == "cpu"
    if name == "auto":
        gains = not on_cpu or (_may_have_bfloat16_instructions() and _bfloat16_ratio() <= 1)
        return torch.bfloat16 if gains else torch.float32
    if name == "bfloat16" and on_cpu:
        _warn_if_bfloat16_is_slow()
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def dtype_name(dtype: "torch.dtype") -> str:
    """A dtype as `model.dtype` names it. Files record that of the loaded model, whatever was asked for."""
    return str(dtype).removeprefix("torch.")


@functools.cache  # one line a process, however many models it loads
def _warn_if_bfloat16_is_slow() -> None:
    ratio = _bfloat16_ratio()
    if ratio >= SLOW_RATIO:
        logger.warning(
            "model.dtype: products in bfloat16 take %.0f times as long as in float32 on this CPU; set model.dtype=auto",
            ratio,
        )


def _may_have_bfloat16_instructions() -> bool:
    """Whether this processor could have them, which is true of an unknown one, where torch cannot tell."""
    import torch

    told: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    known = [bool(value) for name, value in told.items() if "bf16" in name or name == "avx_ne_convert"]
    return any(known) or not known


@functools.cache
def _bfloat16_ratio() -> float:
    """CPU seconds of matrix products in bfloat16 over those in float32, on this CPU, measured once, in about 0.05 s."""
    import torch

    num_threads = torch.get_num_threads()
    # on one thread and by its own clock: beside other work, products of several threads wait tens of milliseconds for the
    # last of them in either dtype, and thirty times slower looks like twice as fast
    torch.set_num_threads(1)
    try:
        ratio = _seconds(torch.bfloat16, *_SMALL_PRODUCT) / _seconds(torch.float32, *_SMALL_PRODUCT)
        if ratio < SLOW_RATIO:
            ratio = _seconds(torch.bfloat16, *_LARGE_PRODUCT) / _seconds(torch.float32, *_LARGE_PRODUCT)
    finally:
        torch.set_num_threads(num_threads)
    return ratio


def _seconds(dtype: "torch.dtype", num_rows: int, width: int) -> float:
    """CPU seconds of a layer's product and its gradient's, the best of several runs after one that warms up."""
    import torch

    # ones: random numbers would move the caller's generator
    rows, weight = (torch.ones(size, width, dtype=dtype, device="cpu") for size in (num_rows, width))
    seconds: list[float] = []
    while len(seconds) <= _MIN_TIMED_RUNS or (len(seconds) <= _MAX_TIMED_RUNS and sum(seconds[1:]) < _TIMED_SECONDS):
        started = time.thread_time()
        torch.mm(rows, weight.t())
        torch.mm(rows, weight)  # the gradient's; emulated, this one is the slower
        seconds.append(time.thread_time() - started)
    return max(min(seconds[1:]), 1e-9)  # a clock may be too coarse for one run
