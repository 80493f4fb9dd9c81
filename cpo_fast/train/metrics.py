"""Step statistics under TRL's names, plus accuracy per reasoning step, drift per token and the tokens that sharing saved.

Results stay on the device over a step's micro-batches and come to the host in one transfer, `Metrics.read`, together with
whatever else the step must know (gradient norm, finiteness). It is the one place at which a step waits for the device.
All arithmetic after it is the host's.

`OverOptimisationAlarm` watches them for a model that collapses: a preference loss only sees the margin, which can widen by
pushing both responses down, until the model has forgotten how to write either. The loss looks best just then.
"""

from collections import deque
from statistics import fmean
from typing import Any

import numpy as np
import torch

from cpo_fast.data.examples import Example
from cpo_fast.train.objective import MicroBatch, MicroBatchResult


class Metrics:
    """Collects the micro-batches of one optimizer step or one validation."""

    def __init__(self, beta: float) -> None:
        """`beta` turns rewards back into log-ratios."""
        self.beta = beta
        self.results: list[MicroBatchResult] = []
        self.examples: list[Example] = []
        self._host: dict[str, np.ndarray] | None = None

    def add(self, batch: MicroBatch, result: MicroBatchResult) -> None:
        self.results.append(result)
        self.examples.extend(batch.examples)

    def read(self, *scalars: torch.Tensor) -> list[float]:
        """Bring everything to the host in one transfer. Returns the values of `scalars`, which travel along."""
        names = list(self.results[0].columns)
        parts = [[result.columns[name].detach().reshape(-1) for result in self.results] for name in names]
        parts.append([scalar.detach().reshape(1) for scalar in scalars])
        sizes = [sum(part.shape[0] for part in column) for column in parts]
        # float64 holds float32 values and counts exactly
        host = torch.cat([part.double() for column in parts for part in column]).cpu().numpy()
        *columns, rest = np.split(host, np.cumsum(sizes)[:-1])
        self._host = dict(zip(names, columns, strict=True))
        return [float(value) for value in rest]

    def summary(self) -> dict[str, float]:
        """Means over examples (loss of pairs, rewards, log-probs) or tokens (everything else), as TRL logs them."""
        host = self._on_host()
        num_scored = [sum(counts) for counts in zip(*(result.num_scored for result in self.results), strict=True)]
        num_first = max(num_scored[0], 1)  # tokens of chosen responses or of completions
        computed = sum(result.num_tokens for result in self.results)
        rows = sum(result.num_sequence_tokens for result in self.results)
        values = {
            "entropy": float(host["entropy_sum"].sum()) / max(sum(num_scored), 1),
            "mean_token_accuracy": float(host["num_top1"].sum()) / num_first,
            "micro_batches": len(self.results),
            "tokens/computed": computed,
            "tokens/rows": rows,
            "tokens/saved": 1 - computed / rows if rows else 0.0,
        }
        if "chosen_rewards" not in host:
            loss = float(host["loss_sum"].sum()) / num_first
            return {"loss": loss, "completions": len(self.examples), **values}
        return {**self._of_pairs(host, num_first, max(num_scored[1], 1)), **values}

    def _of_pairs(self, host: dict[str, np.ndarray], num_chosen: int, num_rejected: int) -> dict[str, float]:
        margins = host["chosen_rewards"] - host["rejected_rewards"]
        correct = margins > 0
        by_step: dict[int, list[bool]] = {}
        for pair, right in zip(self.examples, correct, strict=True):
            if pair.step:
                by_step.setdefault(pair.step, []).append(bool(right))
        return {
            "loss": float(host["losses"].mean()),
            "rewards/chosen": float(host["chosen_rewards"].mean()),
            "rewards/rejected": float(host["rejected_rewards"].mean()),
            "rewards/accuracies": float(correct.mean()),
            "rewards/margins": float(margins.mean()),
            "logps/chosen": float(host["chosen_logps"].mean()),
            "logps/rejected": float(host["rejected_logps"].mean()),
            "logps/chosen_per_token": float(host["chosen_logps"].sum()) / num_chosen,
            "logps/rejected_per_token": float(host["rejected_logps"].sum()) / num_rejected,
            "logps/chosen_drift": float(host["chosen_rewards"].sum()) / self.beta / num_chosen,
            "logits/chosen": float(host["chosen_logit_sum"].sum()) / num_chosen,
            "logits/rejected": float(host["rejected_logit_sum"].sum()) / num_rejected,
            "pairs": len(self.examples),
            **{f"rewards/accuracies/step_{step}": sum(v) / len(v) for step, v in sorted(by_step.items())},
        }

    def nonfinite(self) -> list[str]:
        """Source rows of examples whose loss is not finite."""
        finite = np.isfinite(self._on_host()["losses"])
        return [example.source for example, fine in zip(self.examples, finite, strict=True) if not fine]

    def _on_host(self) -> dict[str, np.ndarray]:
        if self._host is None:
            self.read()
        assert self._host is not None
        return self._host


def rounded(values: dict[str, Any]) -> dict[str, Any]:
    """Numbers with nine significant digits, enough to tell float32 values apart and short enough to read."""
    return {key: float(f"{value:.9g}") if isinstance(value, float) else value for key, value in values.items()}


WINDOW = 10  # steps averaged: one step's pairs are few and noisy


class OverOptimisationAlarm:
    """Says once that chosen log-probs have fallen by more than a limit while margins grew.

    Some loss of log-probability per token against the reference is normal, and this watches for a lot of it.
    """

    def __init__(self, limit_nats: float) -> None:
        """`limit_nats`: fall of the chosen log-prob per token against the reference, in nats, that raises the alarm."""
        self.limit_nats = limit_nats
        self.raised_at: int | None = None
        self._chosen: deque[float] = deque(maxlen=WINDOW)
        self._margins: deque[float] = deque(maxlen=2 * WINDOW)

    def update(self, step: int, chosen_drift: float, margin: float) -> str | None:
        """Add one step. Returns the sentence to show when the alarm is raised, once.

        Args:
            step: optimizer step, for the message.
            chosen_drift: mean of (log-prob - reference log-prob) per chosen token, in nats.
            margin: mean reward margin.
        """
        self._chosen.append(chosen_drift)
        self._margins.append(margin)
        if self.raised_at is not None or len(self._chosen) < min(WINDOW, 3):
            return None
        values = list(self._margins)
        half = len(values) // 2
        grows = fmean(values[half:]) > fmean(values[:half])
        drift = fmean(self._chosen)
        if drift >= -self.limit_nats or not grows:
            return None
        self.raised_at = step
        return (
            f"step {step}: chosen responses have lost {-drift:.2f} nats per token against the reference while margins "
            "grow; the model may be collapsing although the loss falls. Lower train.lr or train.num_epochs, "
            "raise train.beta, or set train.nll_weight"
        )
