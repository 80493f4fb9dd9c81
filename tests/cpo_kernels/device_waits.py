"""What in a call to linear_logprob would make the host wait for a GPU, found without one.

Every operator that runs is looked at, inside autograd functions too: those whose result's shape or value the host must
know read the device back. CPU tensors stand for the device's, but for the plan's `host_offsets`, whose reading is free.
"""

import math
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from cpo_kernels import linear_logprob
from cpo_kernels.logprob_plan import LogprobPlan

WAITING = (
    "_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "nonzero_numpy", "argwhere", "masked_select",
    "bincount", "unique", "_unique", "_unique2", "unique_dim", "unique_consecutive",
)  # fmt: skip


class DeviceWaits(TorchDispatchMode):
    """Collects the names of operators that wait, and of all that were looked at."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Look at one operator."""
        kwargs, (_, _, name) = kwargs or {}, func._schema.name.partition("::")
        self.seen.add(name)
        masks = args[1] if name.startswith("index") and isinstance(args[1], list | tuple) else ()
        by_mask = any(isinstance(mask, torch.Tensor) and mask.dtype in (torch.bool, torch.uint8) for mask in masks)
        unsized = name == "repeat_interleave" and kwargs.get("output_size") is None
        if name in WAITING or by_mask or unsized:
            self.found.append(name)
        return func(*args, **kwargs)


class MadeTensors(DeviceWaits):
    """Remembers every result of an operator: the operator's name and the shape."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[tuple[str, tuple[int, ...]]] = []

    @property
    def largest(self) -> int:
        """The most elements that a result has."""
        return max(math.prod(shape) for _, shape in self.made)

    def count(self, shape: tuple[int, ...], name: str = "") -> int:
        """How many results have this shape, of operators whose name begins with `name`."""
        return sum(made.startswith(name) and found == shape for made, found in self.made)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operator and look at its results."""
        result = super().__torch_dispatch__(func, types, args, kwargs)
        for tensor in result if isinstance(result, tuple | list) else (result,):
            # bytes are copies by Triton's interpreter
            if isinstance(tensor, torch.Tensor) and tensor.dtype != torch.uint8:
                self.made.append((func._schema.name.removeprefix("aten::"), tuple(tensor.shape)))
        return result


def waits(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, plan: LogprobPlan, impl: str) -> list[str]:
    """Operators that wait, forward and backward, with a reference and every output."""
    with DeviceWaits() as mode:
        result = linear_logprob(
            hidden, weight, plan, hidden.detach(), bias=bias, outputs=("entropy", "mean_logit", "is_top1"), impl=impl
        )
        with torch.no_grad():
            linear_logprob(hidden, weight, plan, hidden, bias=bias, impl=impl)
        (result.segment_logps.sum() + result.token_logps.sum()).backward()
    assert {"index_select", "index_copy_"} <= mode.seen  # the first operator of the forward, the last of the backward
    return mode.found
