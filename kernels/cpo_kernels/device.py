"""Moving plans to a device, what a GPU is and has free, and the one rule about accumulation.

Forests, schedules and plans are built on the CPU, where their checks and sorts cost the device nothing. `to_device` then
queues their copies behind the device's work. A plain `.to("cuda")` waits until that work is done. With
`non_blocking=True` a copy from pageable memory may still wait, because the driver stages it through pinned memory of its
own, so the tensors are pinned first. A copy from pinned memory never waits.

float64 stays float64. Everything else is accumulated and returned in float32.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import is_dataclass
from typing import Any, TypeVar

import torch

Value = TypeVar("Value")


def to_device(value: Value, device: torch.device | str) -> Value:
    """The same value with every tensor in it on `device`, copied from the CPU without waiting for the device.

    Args:
        value: a tensor, a dataclass of them (what it keeps besides its fields included), or a tuple, list or dict of such
            values. A tensor that occurs twice stays one tensor, so a schedule still belongs to its forest.
            A field named `host_...` stays where it is.
        device: where the result lives.

    Returns:
        A copy, or `value` itself where every tensor is on `device` already. Kernels on the current stream may use it at
        once.
    """
    copies: dict[int, Any] = {}  # by the id of the original
    result: Value = _moved(value, torch.device(device), copies)
    has_moved = any(id(new) != old for old, new in copies.items() if isinstance(new, torch.Tensor))
    return result if has_moved else value


def _moved(value: Any, device: torch.device, copies: dict[int, Any]) -> Any:
    if id(value) in copies:
        return copies[id(value)]
    if isinstance(value, torch.Tensor):
        host = value.pin_memory() if value.is_cpu and device.type == "cuda" else value
        result: Any = host.to(device, non_blocking=value.is_cpu)  # what comes to the CPU is read there at once
    elif is_dataclass(value) and not isinstance(value, type):
        result = copy.copy(value)
        for name, part in vars(value).items():
            if not name.startswith("host_"):
                object.__setattr__(result, name, _moved(part, device, copies))
    elif isinstance(value, dict):
        result = {key: _moved(part, device, copies) for key, part in value.items()}
    elif type(value) in (tuple, list):
        result = type(value)(_moved(part, device, copies) for part in value)
    else:
        return value
    copies[id(value)] = result
    return result


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of accumulators and log-probabilities for inputs of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@contextmanager
def autocast_inputs(*tensors: torch.Tensor | None) -> Iterator[tuple[Any, ...]]:
    """Tensors as an active autocast gives them to a matrix product; in the block it is off.

    Otherwise it would round what an op accumulates in float32. Without one, and to float64, nothing happens.
    """
    device, given = next((tensor.device.type, tensor.dtype) for tensor in tensors if tensor is not None)
    if not torch.is_autocast_enabled(device) or given == torch.float64:
        yield tensors
        return
    dtype = torch.get_autocast_dtype(device)
    with torch.autocast(device, enabled=False):
        yield tuple(None if tensor is None else tensor.to(dtype) for tensor in tensors)


def architecture(device: torch.device) -> str:
    """What kernels are tuned for: "sm80", "sm90" or "other"."""
    if device.type != "cuda":
        return "other"
    capability = torch.cuda.get_device_capability(device)
    return {(8, 0): "sm80", (9, 0): "sm90"}.get(capability, "other")


def multiprocessors(device: torch.device) -> int:
    """Streaming multiprocessors (SMs) of a GPU. Where Triton's interpreter runs kernels, as many as an H200 has."""
    if device.type != "cuda":
        return 132
    return int(torch.cuda.get_device_properties(device).multi_processor_count)  # torch has asked the driver once


def free_and_total_bytes(device: torch.device) -> tuple[int, int]:
    """What this process can still allocate on a CUDA device, memory that torch holds unused included, and all of it."""
    free, total = torch.cuda.mem_get_info(device)
    # what torch keeps of freed tensors is free to this process, and used to the driver
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device), total


def matmul_accumulated(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """`a @ b` for 2-D inputs of one dtype, returned in the accumulation dtype without rounding to 16 bits on the way.

    Args:
        a: [M, K] floating point.
        b: [K, N] same dtype.
        out: [M, N] in the accumulation dtype, where the product is written, or None. No input may then take a gradient.

    Returns:
        [M, N] float32, or float64 for float64 inputs.
    """
    dtype = accumulation_dtype(a.dtype)
    has_gradient = torch.is_grad_enabled() and (a.requires_grad or b.requires_grad)
    # torch has no derivative of the product with another dtype than its inputs. Tests take "meta" for a GPU
    if a.device.type in ("cuda", "meta") and a.dtype in (torch.bfloat16, torch.float16) and not has_gradient:
        return torch.mm(a, b, out_dtype=dtype, out=out)
    return torch.matmul(a.to(dtype), b.to(dtype), out=out)
