"""What in a call to linear_logprob would make the host wait for a GPU, found without one.

Every operator that runs is looked at, inside our own ops too: those whose result's shape or value the host must know
read the device back. CPU tensors stand for the device's, but for the plan's `host_offsets`, whose reading is free.
"""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from cpo_kernels import linear_logprob
from cpo_kernels.linear_logprob import op
from cpo_kernels.logprob_plan import LogprobPlan

# `item` and `argwhere` are made of others, but inside an op of ours they come whole
WAITING = (
    "_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "nonzero_numpy", "argwhere", "masked_select",
    "bincount", "unique", "_unique", "_unique2", "unique_dim", "unique_consecutive",
)  # fmt: skip
INSIDE = {"linear_logprob": op.score_plan, "linear_logprob_backward": op.score_plan_backward}


class DeviceWaits(TorchDispatchMode):
    """Collects the names of operators that wait."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.entered: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Look at one operator; ours are opened, so that their parts pass here too."""
        kwargs, (namespace, _, name) = kwargs or {}, func._schema.name.partition("::")
        if namespace == "cpo_kernels":
            self.entered.append(name)
            with self:
                return INSIDE[name](*args, **kwargs)
        masks = args[1] if name.startswith("index") and isinstance(args[1], list | tuple) else ()
        by_mask = any(isinstance(mask, torch.Tensor) and mask.dtype in (torch.bool, torch.uint8) for mask in masks)
        unsized = name == "repeat_interleave" and kwargs.get("output_size") is None
        if name in WAITING or by_mask or unsized:
            self.found.append(name)
        return func(*args, **kwargs)


def waits(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, plan: LogprobPlan, impl: str) -> list[str]:
    """Operators that wait, forward and backward, with a reference and every output."""
    with DeviceWaits() as mode:
        result = linear_logprob(
            hidden, weight, plan, hidden.detach(), bias=bias, outputs=("entropy", "mean_logit", "is_top1"), impl=impl
        )
        with torch.no_grad():
            linear_logprob(hidden, weight, plan, hidden, bias=bias, impl=impl)
        (result.segment_logps.sum() + result.token_logps.sum()).backward()
    assert sorted(mode.entered) == ["linear_logprob", "linear_logprob", "linear_logprob_backward"]
    return mode.found
