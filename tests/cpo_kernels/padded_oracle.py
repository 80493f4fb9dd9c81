"""What packing must reproduce: one right-padded row per sequence through the stock model, full logits, plain autograd.

Written from the definition of the DPO loss alone; it shares no code with `cpo_kernels`. Slow on purpose: every prompt
is computed twice per pair, every position gets a full row of logits, and nothing is fused.

    logp(y | x) = sum over tokens t of y of log softmax(logits at the token before t)[t]
    loss        = mean over pairs of -log sigmoid(beta [(logp_c - ref_c) - (logp_r - ref_r)])

B rows, L padded length, V vocabulary, N pairs, S = 2 N sequences.
"""

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

Pair = tuple[list[int], list[int], list[int]]


@dataclass(frozen=True)
class PaddedStep:
    """Loss, summed response log-probs (chosen and rejected in turn, [2 N]) and the gradient of every trained tensor."""

    loss: torch.Tensor  # []
    logps: torch.Tensor  # [2 N]
    ref_logps: torch.Tensor  # [2 N]
    gradients: dict[str, torch.Tensor]


def pair_sequences(pairs: Sequence[Pair]) -> tuple[list[list[int]], list[int]]:
    """Sequences prompt + chosen, prompt + rejected of every pair in turn, and where each response starts."""
    sequences = [prompt + response for prompt, chosen, rejected in pairs for response in (chosen, rejected)]
    starts = [len(prompt) for prompt, _, _ in pairs for _ in range(2)]
    return sequences, starts


def padded_logps(model: nn.Module, sequences: Sequence[Sequence[int]], starts: Sequence[int]) -> torch.Tensor:
    """[S] summed log-probs of each sequence's tokens from its start on, by one right-padded batch under `sdpa`."""
    if model.config._attn_implementation != "sdpa":
        raise ValueError(f"the oracle runs the stock model: expected sdpa, got {model.config._attn_implementation}")
    width = max(len(sequence) for sequence in sequences)
    input_ids = torch.zeros(len(sequences), width, dtype=torch.long)  # [B, L], padding token 0
    attention_mask = torch.zeros_like(input_ids)
    scored = torch.zeros(len(sequences), width, dtype=torch.bool)
    for row, (sequence, start) in enumerate(zip(sequences, starts, strict=True)):
        input_ids[row, : len(sequence)] = torch.tensor(sequence)
        attention_mask[row, : len(sequence)] = 1
        scored[row, start : len(sequence)] = True
    logits = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits
    logits = logits if logits.dtype == torch.float64 else logits.float()
    logps = F.log_softmax(logits[:, :-1], dim=-1).gather(2, input_ids[:, 1:, None]).squeeze(2)  # [B, L - 1]
    return torch.where(scored[:, 1:], logps, logps.new_zeros(())).sum(dim=1)


def padded_step(model: nn.Module, pairs: Sequence[Pair], beta: float = 0.1) -> PaddedStep:
    """DPO loss of `pairs` against the adapter-off model, and its gradient; leaves the model's own `.grad` cleared."""
    sequences, starts = pair_sequences(pairs)
    adapter_off = model.disable_adapter() if hasattr(model, "disable_adapter") else nullcontext()
    with torch.no_grad(), adapter_off:
        ref_logps = padded_logps(model, sequences, starts)
    logps = padded_logps(model, sequences, starts)
    log_ratios = logps - ref_logps
    loss = -F.logsigmoid(beta * (log_ratios[0::2] - log_ratios[1::2])).mean()
    model.zero_grad(set_to_none=True)
    loss.backward()
    gradients = trained_gradients(model)
    model.zero_grad(set_to_none=True)
    return PaddedStep(loss.detach(), logps.detach(), ref_logps, gradients)


def trained_gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    """A copy of the gradient of every parameter that requires one, by name; a missing gradient is an error."""
    gradients = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            if parameter.grad is None:
                raise ValueError(f"{name} got no gradient")
            gradients[name] = parameter.grad.detach().clone()
    return gradients


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """|actual - expected| / |expected| in the 2-norm, in fp64; NaN counts as infinity."""
    difference = (actual.double() - expected.double()).norm() / expected.double().norm()
    return float("inf") if not torch.isfinite(difference) else float(difference)


def worst_gradient_error(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """The largest relative error over all tensors; the two sets of names must be equal and no expected one zero."""
    if actual.keys() != expected.keys() or not expected:
        raise ValueError(f"different tensors: {sorted(actual.keys() ^ expected.keys())}")
    return max(relative_error(actual[name], expected[name]) for name in expected)


def sum_gradients(parts: Iterable[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Add gradients of micro-batches name by name."""
    total: dict[str, torch.Tensor] = {}
    for part in parts:
        total = {name: total[name] + value if total else value for name, value in part.items()}
    return total
