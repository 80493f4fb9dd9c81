"""Are the Triton kernels right on this very device? Every one once, forward and backward, before it is anyone's default.

A random branching line of a few hundred rows, ragged at every tile, goes through `triton` and through `eager` in one
dtype, and both are compared with `eager` in float64. A kernel may err as `cpo_kernels.testing.kernel_bound` says: twice the
eager error, plus rounding. What a compiler, a driver or a card gets wrong shows here in seconds instead of in a run's
results. An `impl=` that somebody asked for by name is not checked.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from cpo_kernels.linear_logprob import linear_logprob
from cpo_kernels.logprob_plan import LogprobPlan
from cpo_kernels.testing import kernel_bound, random_subtree_end
from cpo_kernels.tree_attention import tree_attention

logger = logging.getLogger(__name__)

NUM_ROWS = 331  # prime: several tiles of rows, none of them whole at the end
VOCAB_SIZE = 517  # a few vocabulary tiles and a ragged one; more would test time, not code
NUM_TARGETS = 499  # up to a handful of targets a row, some repeated, some rows with none
SEED = 20240613
FLOAT32_EPS = torch.finfo(torch.float32).eps

Results = dict[str, torch.Tensor]


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


_passed: set[tuple[str, ModelShape]] = set()


def self_check(device: torch.device | str, shape: ModelShape | None = None) -> None:
    """Run every kernel on `device` in the shapes of a model; once a process for each device and shape.

    Args:
        device: a CUDA device, or the CPU in Triton's interpreter.
        shape: dtype, heads and hidden size of the model; None takes those of a small bfloat16 one.

    Raises:
        KernelCheckError: a kernel did not compile or launch, or its result lies outside the bound; one sentence that
            names the op and says how to train without it.
    """
    device, shape = torch.device(device), shape or ModelShape()
    if (str(device), shape) in _passed:
        return
    started = time.perf_counter()
    for op, check in (("tree_attention", _check_tree_attention), ("linear_logprob", _check_linear_logprob)):
        try:
            # the first call of an op may come from a place without gradients, or under autocast
            with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False):
                excess = check(device, shape)
        except Exception as error:
            reason = (str(error).strip() or "no message").splitlines()[0]
            raise KernelCheckError(
                f"{op}: its Triton kernels do not run on {device} for {shape} ({type(error).__name__}: {reason}); set "
                "CPO_KERNELS_IMPL=eager to train without them"
            ) from error
        wrong = {name: value for name, value in excess.items() if not value <= 1}
        if wrong:
            name = max(wrong, key=lambda key: float("inf") if wrong[key] != wrong[key] else wrong[key])
            raise KernelCheckError(
                f"{op}: its Triton kernels are wrong on {device} for {shape}: the error of {name} is {wrong[name]:.3g} "
                "times what rounding explains; set CPO_KERNELS_IMPL=eager to train without them"
            )
    _passed.add((str(device), shape))
    logger.info("self-check: the Triton kernels are right on %s (%.1f s)", device, time.perf_counter() - started)


def check_once(device_type: str) -> None:
    """Run `self_check` on the current device of a type unless one has passed there in this process, in any shape."""
    if not any(torch.device(device).type == device_type for device, _ in _passed):
        self_check(torch.device(device_type))


def _check_tree_attention(device: torch.device, shape: ModelShape) -> dict[str, float]:
    """Error over bound of out, dq, dk and dv."""
    ends = random_subtree_end(SEED, NUM_ROWS, num_padding=3).to(device)
    heads = (shape.num_heads, shape.num_kv_heads, shape.num_kv_heads, shape.num_heads)
    inputs = [
        _random((NUM_ROWS, count, shape.head_dim), device, shape.dtype, place) for place, count in enumerate(heads)
    ]

    def run(dtype: torch.dtype, impl: str) -> Results:
        q, k, v = (tensor.to(dtype).requires_grad_() for tensor in inputs[:3])
        out = tree_attention(q, k, v, ends, impl=impl)
        gradients = torch.autograd.grad(out, (q, k, v), inputs[3].to(dtype))
        return {"out": out.detach(), **dict(zip(("dq", "dk", "dv"), gradients, strict=True))}

    q, k, v, upstream = (float(tensor.double().norm(dim=-1).max()) for tensor in inputs)
    # float32 accumulators err too; dq and dk are sums of (dp - delta) k, whose terms cancel, in a lone row to nothing
    product = shape.head_dim**-0.5 * upstream * v
    sizes = {"out": v, "dq": product * k, "dk": product * q, "dv": upstream}
    return _excess(run, shape.dtype, {name: 8 * FLOAT32_EPS * size for name, size in sizes.items()})


def _check_linear_logprob(device: torch.device, shape: ModelShape) -> dict[str, float]:
    """Error over bound of log-probs, with and without a gradient, the reference's, and the gradient."""
    generator = torch.Generator().manual_seed(SEED)
    rows, targets = (torch.randint(high, (NUM_TARGETS,), generator=generator) for high in (NUM_ROWS, VOCAB_SIZE))
    plan = LogprobPlan.build(rows, targets, torch.arange(NUM_TARGETS) % 7, 7)
    hidden, ref_hidden = (_random((NUM_ROWS, shape.hidden_size), device, shape.dtype, place) for place in (4, 5))
    weight = _random((VOCAB_SIZE, shape.hidden_size), device, shape.dtype, 6, shape.hidden_size**-0.5)
    upstream = _random((NUM_TARGETS,), device, torch.float32, 7)

    def run(dtype: torch.dtype, impl: str) -> Results:
        leaf, others = hidden.to(dtype).requires_grad_(), (weight.to(dtype), plan.to(device), ref_hidden.to(dtype))
        result = linear_logprob(leaf, *others, outputs=("entropy", "mean_logit"), impl=impl)
        (gradient,) = torch.autograd.grad(result.token_logps, leaf, upstream.to(result.token_logps.dtype))
        plain = linear_logprob(leaf.detach(), *others, impl=impl)
        assert result.ref_token_logps is not None
        assert result.entropy is not None
        assert result.mean_logit is not None
        return {
            "log-probs": result.token_logps.detach(),
            "reference log-probs": result.ref_token_logps,
            "segment sums": result.segment_logps.detach(),
            "log-probs without gradient": plain.token_logps,
            "entropy": result.entropy,
            "mean logit": result.mean_logit,
            "gradient": gradient,
        }

    logit_size = float((hidden.double() @ weight.double().t()).abs().max())
    # a logit of size L is rounded by eps L: that much in a log-prob, and as a factor in a gradient
    per_token = ("log-probs", "reference log-probs", "log-probs without gradient", "entropy", "mean logit")
    bands = dict.fromkeys(per_token, FLOAT32_EPS * logit_size)
    bands["segment sums"] = FLOAT32_EPS * logit_size * NUM_TARGETS / 7
    bands["gradient"] = FLOAT32_EPS * logit_size * float(upstream.abs().max())
    return _excess(run, shape.dtype, bands)


def _excess(
    run: Callable[[torch.dtype, str], Results], dtype: torch.dtype, bands: dict[str, float]
) -> dict[str, float]:
    exact, eager, kernel = run(torch.float64, "eager"), run(dtype, "eager"), run(dtype, "triton")
    ratios = {}
    for name, band in bands.items():
        want = exact[name].double()
        eager_error, error = (float((result[name].double() - want).abs().max()) for result in (eager, kernel))
        ratios[name] = error / (kernel_bound(eager_error, kernel[name].dtype, float(want.abs().max())) + band)
    return ratios


def _random(
    shape: tuple[int, ...], device: torch.device, dtype: torch.dtype, place: int, scale: float = 1.0
) -> torch.Tensor:
    generator = torch.Generator().manual_seed(SEED + place)  # on the CPU: the same numbers on every device
    return (scale * torch.randn(shape, generator=generator)).to(device, dtype)
