"""Are the kernels right on this very device? Every one of some ops, forward and backward, against plain torch.

An op checks its own kernels before they become a device's default. This is the same check for those who want it at
another time, or in the shapes of a model. Ops are checked one by one: a fault of `tree_decode` is no reason not to train.
"""

from collections.abc import Sequence

import torch

from cpo_kernels.fused_layers.check import check_fused_layers
from cpo_kernels.kernel_check import KERNELS, Check, KernelCheckError, ModelShape, run_check
from cpo_kernels.linear_logprob.check import check_linear_logprob
from cpo_kernels.sample_tokens.check import check_sample_tokens
from cpo_kernels.tree_attention.check import check_native_tree_attention, check_tree_attention
from cpo_kernels.tree_decode.check import check_native_tree_decode, check_tree_decode

__all__ = ["OPS", "TRAINING_OPS", "KernelCheckError", "ModelShape", "self_check"]

CHECKS: dict[str, Check] = {
    "tree_attention": check_tree_attention,
    "linear_logprob": check_linear_logprob,
    "tree_decode": check_tree_decode,
    "sample_tokens": check_sample_tokens,
    "fused_layers": check_fused_layers,
}
NATIVE_CHECKS: dict[str, Check] = {
    "tree_attention": check_native_tree_attention,
    "tree_decode": check_native_tree_decode,
}
OPS = tuple(CHECKS)
TRAINING_OPS = ("tree_attention", "linear_logprob")  # of a forward on a forest, with gradients or without


def self_check(
    device: torch.device | str, shape: ModelShape | None = None, ops: Sequence[str] = TRAINING_OPS, impl: str = "triton"
) -> None:
    """Run every kernel of some ops on `device`, once a process for each op, device and shape.

    Args:
        device: a CUDA device, or the CPU: for Triton's kernels in its interpreter.
        shape: dtype, heads and hidden size of the model. None takes those of a small bfloat16 one.
        ops: names out of `OPS`.
        impl: whose kernels: "triton", or "native", which an op without C++ kernels passes.

    Raises:
        KernelCheckError: a kernel did not compile or launch, or its result lies outside the bound.
        ValueError: no op or no kernels have that name.
    """
    unknown = [op for op in ops if op not in CHECKS]
    if unknown:
        raise ValueError(f"self_check: expected ops out of {', '.join(OPS)}, got {', '.join(unknown)}")
    if impl not in KERNELS:
        raise ValueError(f"self_check: expected impl out of {', '.join(KERNELS)}, got {impl}")
    checks = CHECKS if impl == "triton" else NATIVE_CHECKS
    for op in ops:
        if op in checks:
            run_check(op, checks[op], torch.device(device), shape or ModelShape(), impl)
