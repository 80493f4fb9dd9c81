"""Forest, schedule and plan from the host to the device in one go, without waiting for the device.

They are built on the CPU, where their checks and sorts cost the device nothing. A plain `.to("cuda")` from pageable
memory waits until everything queued on the stream is done; from pinned memory, `non_blocking`, it joins the queue.

The one rule about accumulation: float64 stays float64, everything else is accumulated and returned in float32.
"""

import copy
from dataclasses import is_dataclass
from typing import Any, TypeVar

import torch

Value = TypeVar("Value")


def to_device(value: Value, device: torch.device | str) -> Value:
    """The same value with every tensor in it on `device`; CUDA through pinned memory.

    Args:
        value: a CPU tensor, a dataclass of them (what it keeps besides its fields included), or a tuple, list or dict of
            such values. A tensor that occurs twice stays one tensor, so a schedule still belongs to its forest.
            A field named `host_...` stays where it is.
        device: where the result lives; the CPU gives `value` itself.

    Returns:
        A copy. Kernels on the current stream may use it at once.
    """
    device = torch.device(device)
    return value if device.type == "cpu" else _moved(value, device, {})


def _moved(value: Any, device: torch.device, seen: dict[int, Any]) -> Any:
    if id(value) in seen:
        return seen[id(value)]
    if isinstance(value, torch.Tensor):
        host = value.pin_memory() if device.type == "cuda" and value.device.type == "cpu" else value
        result: Any = host.to(device, non_blocking=True)
    elif is_dataclass(value) and not isinstance(value, type):
        result = copy.copy(value)
        for name, item in vars(value).items():
            if not name.startswith("host_"):
                object.__setattr__(result, name, _moved(item, device, seen))
    elif isinstance(value, dict):
        result = {key: _moved(item, device, seen) for key, item in value.items()}
    elif type(value) in (tuple, list):
        result = type(value)(_moved(item, device, seen) for item in value)
    else:
        return value
    seen[id(value)] = result
    return result


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of accumulators and log-probabilities for inputs of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def matmul_accumulated(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """`a @ b` for 2-D inputs of one dtype, returned in the accumulation dtype without rounding to 16 bits on the way.

    Args:
        a: [M, K] floating point.
        b: [K, N] same dtype.

    Returns:
        [M, N] float32, or float64 for float64 inputs.
    """
    dtype = accumulation_dtype(a.dtype)
    if a.is_cuda and a.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(a, b, out_dtype=dtype)
    return a.to(dtype) @ b.to(dtype)
