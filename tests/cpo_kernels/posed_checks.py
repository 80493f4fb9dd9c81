"""Checks of the Triton kernels on a CPU, whose default is then Triton."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cpo_kernels import implementation, kernel_check
from cpo_kernels.fused_layers import check as fused_check
from cpo_kernels.kernel_check import Check, ModelShape
from cpo_kernels.linear_logprob import check as logprob_check
from cpo_kernels.linear_logprob import eager as logprob_eager
from cpo_kernels.sample_tokens import check as sample_check
from cpo_kernels.sample_tokens.eager import sample_tokens_eager
from cpo_kernels.tree_attention import check as attention_check
from cpo_kernels.tree_attention.eager import EagerTreeAttention, key_runs
from cpo_kernels.tree_decode import check as decode_check
from cpo_kernels.tree_decode.eager import tree_decode_eager

CPU = torch.device("cpu")
ATTENTION_OPTIONS = ("window", "softcap", "sinks")
SHAPE = ModelShape(torch.float32, num_heads=2, num_kv_heads=1, head_dim=16, hidden_size=48)


@contextmanager
def nothing_checked() -> Iterator[None]:
    """No check has passed in this process yet, and Triton is the default of the CPU."""
    before = set(kernel_check.passed)
    kernel_check.passed.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(implementation.DEFAULT_BY_DEVICE, "cpu", "triton")
        yield
    kernel_check.passed.clear()
    kernel_check.passed.update(before)


def checked_ops() -> set[str]:
    """Ops whose check has passed in `nothing_checked`."""
    return {op for op, *_ in kernel_check.passed}


def posed_check(op: str, part: str = "nothing", factor: float = 1.0) -> Check:
    """The check of an op whose eager implementation poses as its kernels, with one result or gradient off by `factor`."""
    check, pose = {
        "tree_attention": (attention_check.check_tree_attention, _attention),
        "linear_logprob": (logprob_check.check_linear_logprob, _logprob),
        "tree_decode": (decode_check.check_tree_decode, _decode),
        "fused_layers": (fused_check.check_fused_layers, _fused),
        "sample_tokens": (sample_check.check_sample_tokens, _sample),
    }[op]
    return lambda device, shape: check(device, shape, kernels=pose(part, factor))


class ScaledGradient(torch.autograd.Function):
    """The identity with a gradient that is off by a factor."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, factor: float) -> torch.Tensor:
        ctx.factor = factor
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradients[0] * ctx.factor, None


def _attention(part: str, factor: float) -> Callable[..., torch.Tensor]:
    """Parts: "out", a gradient, or "window", "softcap" or "sinks", which is then not computed."""

    def attention(q: Any, k: Any, v: Any, schedule: Any, scale: float, *options: Any) -> torch.Tensor:
        inputs = [
            ScaledGradient.apply(x, factor) if part == name else x
            for name, x in zip(("dq", "dk", "dv"), (q, k, v), strict=True)
        ]
        given = [None if part == name else x for name, x in zip(ATTENTION_OPTIONS, options, strict=False)]
        if part == "dsinks" and given and given[2] is not None:
            given[2] = ScaledGradient.apply(given[2], factor)
        out: torch.Tensor = EagerTreeAttention.apply(*inputs, key_runs(schedule, q.shape[1], q.device), scale, *given)
        if part == "sinks" and options and options[2] is not None:
            out = out + 0.0 * options[2].sum()
        return out * factor if part == "out" else out

    return attention


def _logprob(part: str, factor: float) -> SimpleNamespace:
    """Parts: a tensor of the scores, "ref_logps", or a gradient of "rows", "weight" or "bias"."""

    def score(rows: Any, head: Any, plan: Any, outputs: Any, mode: str, path: str | None = None) -> Any:
        scores = logprob_eager.score(rows, head, plan, outputs, mode)
        name = {
            "ref_logps": "logps" if mode == "reference" else "",
            "logps": "" if mode == "reference" else "logps",
        }.get(part, part)
        wrong = getattr(scores, name, None)
        if wrong is None or wrong.numel() == 0:
            return scores
        return scores._replace(**{name: wrong & (factor == 1.0) if wrong.dtype == torch.bool else wrong * factor})

    def gradients(*found: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        names = ("rows", "weight", "bias")
        return tuple(
            gradient * factor if name == part and gradient is not None else gradient
            for name, gradient in zip(names, found, strict=False)
        )

    return SimpleNamespace(
        score=score,
        row_gradients=lambda *args: gradients(logprob_eager.row_gradients(*args))[0],
        head_gradients=lambda *args: gradients(*logprob_eager.head_gradients(*args)),
    )


def _decode(part: str, factor: float) -> Callable[..., torch.Tensor]:
    def forward(q: Any, k_new: Any, v_new: Any, k_arena: Any, v_arena: Any, *rest: Any, **options: Any) -> torch.Tensor:
        out = tree_decode_eager(q, k_new, v_new, k_arena, v_arena, *rest, **options)
        if part in ("keys", "values"):
            (k_arena if part == "keys" else v_arena).mul_(factor)
        return out * factor if part == "out" else out

    return forward


def _sample(part: str, factor: float) -> sample_check.Sampler:
    def sample(*given: Any) -> tuple[torch.Tensor, torch.Tensor]:
        tokens, logps = sample_tokens_eager(*given)
        seen = given[-1]
        if part == "seen" and seen is not None:
            seen[:, int(tokens[0])] = factor == 1.0
        if part == "tokens":
            tokens = torch.where(tokens == tokens[0], tokens + 1, tokens)
        return tokens, logps * factor if part == "logps" else logps

    return sample


def _fused(part: str, factor: float) -> fused_check.FusedLayers:
    """Parts: the name of an op, for its output, or of an input of one, for its gradient."""

    def posed(name: str, names: tuple[str, ...], function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def call(*inputs: Any) -> torch.Tensor:
            tensors = [
                ScaledGradient.apply(x, factor) if key == part else x for key, x in zip(names, inputs, strict=False)
            ]
            out = function(*tensors, *inputs[len(names) :])
            return out * factor if part == name else out

        return call

    rms_norm = posed("rms_norm", ("x", "weight"), fused_check.EAGER.rms_norm)
    swiglu = posed("swiglu", ("gate", "up"), fused_check.EAGER.swiglu)
    add_lora = posed("add_lora", ("base", "input", "a", "b"), fused_check.EAGER.add_lora)

    def rotary(q: Any, k: Any, cos: Any, sin: Any) -> Any:
        q, k = (ScaledGradient.apply(x, factor) if name == part else x for name, x in (("q", q), ("k", k)))
        out_q, out_k = fused_check.EAGER.rotary(q, k, cos, sin)
        return out_q * factor if part == "rotary" else out_q, out_k

    return fused_check.FusedLayers(rms_norm, swiglu, rotary, add_lora)
