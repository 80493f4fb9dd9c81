"""Calls of linear_logprob, and their results by full logits and log_softmax, which share nothing with the kernels.

T rows, E hidden, V vocabulary, P scored tokens, S segments.
"""

from dataclasses import dataclass, field
from typing import Any

import torch

from cpo_kernels import LogprobPlan, linear_logprob


@dataclass
class Case:
    """One call: tensors in fp64, cast by the tests; the plan as plain lists."""

    hidden: torch.Tensor  # [T, E]
    weight: torch.Tensor  # [V, E]
    rows: list[int]
    targets: list[int]
    segments: list[int]
    num_segments: int
    bias: torch.Tensor | None = None  # [V]
    options: dict[str, Any] = field(default_factory=dict)

    def plan(self) -> LogprobPlan:
        columns = [torch.tensor(column, dtype=torch.int64) for column in (self.rows, self.targets, self.segments)]
        return LogprobPlan.build(*columns, self.num_segments)


def make_case(
    vocab: int = 129, width: int = 24, num_rows: int = 9, num_tokens: int = 40, seed: int = 0, **options: Any
) -> Case:
    """Many targets per row with repeats of the very same (row, target), targets 0 and V - 1, an empty segment 2."""
    generator = torch.Generator().manual_seed(seed)

    def integers(high: int, count: int) -> list[int]:
        return torch.randint(high, (count,), generator=generator).tolist()

    rows = integers(num_rows, num_tokens)
    targets = [0, vocab - 1, *integers(vocab, num_tokens - 2)]
    rows[-3:], targets[-3:] = [rows[0]] * 3, [targets[0]] * 3
    segments = [segment if segment < 2 else segment + 1 for segment in integers(5, num_tokens)]
    hidden = torch.randn(num_rows, width, generator=generator, dtype=torch.float64)
    weight = 0.5 * torch.randn(vocab, width, generator=generator, dtype=torch.float64)
    bias = torch.randn(vocab, generator=generator, dtype=torch.float64) if options.pop("bias", False) else None
    return Case(hidden, weight, rows, targets, segments, 6, bias, options)


def full_logits(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, options: dict[str, Any]
) -> torch.Tensor:
    """[T, V] final logits in the dtype of the inputs."""
    logits = hidden @ weight.T
    if bias is not None:
        logits = logits + bias
    logits = logits * options.get("logit_scale", 1.0)
    if options.get("softcap") is not None:
        logits = options["softcap"] * torch.tanh(logits / options["softcap"])
    return logits / options.get("temperature", 1.0)


def token_logps(case: Case, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """[P] log-probs by the full matrix."""
    logps = full_logits(hidden, weight, bias, case.options).log_softmax(dim=-1)
    return torch.stack([logps[row, target] for row, target in zip(case.rows, case.targets, strict=True)])


def segment_logps(case: Case, tokens: torch.Tensor) -> torch.Tensor:
    """[S] sums token by token."""
    sums = [tokens.new_zeros(()) for _ in range(case.num_segments)]
    for segment, token in zip(case.segments, tokens, strict=True):
        sums[segment] = sums[segment] + token
    return torch.stack(sums)


def upstream(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    """Unequal weights of both signs on token and segment log-probs, so that no error can cancel."""
    generator = torch.Generator().manual_seed(99)
    return (
        torch.randn(len(case.rows), generator=generator, dtype=torch.float64),
        torch.randn(case.num_segments, generator=generator, dtype=torch.float64),
    )


def oracle(case: Case, dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
    """Values and gradients by full logits in `dtype`: fp64 is the truth, fp32 gives the eager error of the rule."""
    given = (case.hidden, case.weight, case.bias)
    leaves = [None if tensor is None else tensor.detach().to(dtype).requires_grad_() for tensor in given]
    tokens = token_logps(case, *leaves)
    segments = segment_logps(case, tokens)
    token_weight, segment_weight = (weight.to(dtype) for weight in upstream(case))
    ((tokens * token_weight).sum() + (segments * segment_weight).sum()).backward()
    results = {"tokens": tokens, "segments": segments}
    results |= {n: t.grad for n, t in zip(("d_hidden", "d_weight", "d_bias"), leaves, strict=True) if t is not None}
    return {name: tensor.detach().double() for name, tensor in results.items()}


def measured(case: Case, impl: str, dtype: torch.dtype = torch.float64, train_head: bool = False) -> dict[str, Any]:
    """The same values by linear_logprob."""
    hidden = case.hidden.detach().to(dtype).requires_grad_()
    weight = case.weight.detach().to(dtype).requires_grad_(train_head)
    bias = None if case.bias is None else case.bias.detach().to(dtype).requires_grad_(train_head)
    result = linear_logprob(hidden, weight, case.plan(), bias=bias, impl=impl, **case.options)
    token_weight, segment_weight = (w.to(result.token_logps.dtype) for w in upstream(case))
    ((result.token_logps * token_weight).sum() + (result.segment_logps * segment_weight).sum()).backward()
    results = {"tokens": result.token_logps.detach(), "segments": result.segment_logps.detach()}
    results |= {"d_hidden": hidden.grad, "d_weight": weight.grad, "d_bias": None if bias is None else bias.grad}
    return results


def shifted(case: Case, offset: float) -> Case:
    """All logits moved by `offset`: a distribution must not notice."""
    case.bias = torch.full((case.weight.shape[0],), offset, dtype=torch.float64)
    return case


def huge(case: Case) -> Case:
    """Logits up to about +-1e4."""
    case.hidden = case.hidden * (1e4 / float(full_logits(case.hidden, case.weight, None, {}).abs().max()))
    return case
