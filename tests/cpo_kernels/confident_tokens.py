"""Tokens that the model is nearly sure of, whose gradient is small: where a log-prob kernel loses its digits."""

from dataclasses import dataclass

import torch

from cpo_kernels import LogprobPlan


@dataclass
class ConfidentTokens:
    """One target a row, more and more likely; the exact gradient of their log-probs' sum."""

    hidden: torch.Tensor  # [24, 64]
    weight: torch.Tensor  # [512, 64]
    targets: torch.Tensor  # [24] int64
    gradient: torch.Tensor  # [24, 64] fp64
    confident: torch.Tensor  # [24] bool, p > 0.9999

    @classmethod
    def make(cls, dtype: torch.dtype = torch.bfloat16) -> "ConfidentTokens":
        generator = torch.Generator().manual_seed(7)
        vocab, width, num_rows = 512, 64, 24
        weight = torch.randn(vocab, width, generator=generator, dtype=torch.float64).to(dtype)
        targets = torch.randperm(vocab, generator=generator)[:num_rows]
        strength = torch.linspace(0.22, 0.4, num_rows, dtype=torch.float64)[:, None]
        hidden = (strength * weight[targets].double()).to(dtype)
        exact_hidden = hidden.double().requires_grad_()
        exact = (exact_hidden @ weight.double().T).log_softmax(-1)[torch.arange(num_rows), targets]
        confident = exact.detach().exp() > 0.9999
        assert int(confident.sum()) >= num_rows // 2
        (gradient,) = torch.autograd.grad(exact.sum(), exact_hidden)
        return cls(hidden, weight, targets, gradient, confident)

    def plan(self) -> LogprobPlan:
        rows = torch.arange(len(self.targets))
        return LogprobPlan.build(rows, self.targets, torch.zeros_like(rows), 1)

    def error(self, gradient: torch.Tensor) -> float:
        """Largest relative error of a gradient on a confident row."""
        errors = (gradient.cpu().double() - self.gradient).norm(dim=1) / self.gradient.norm(dim=1)
        return float(errors[self.confident].max())
