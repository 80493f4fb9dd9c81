"""Step statistics under TRL's names, plus accuracy per reasoning step, drift per token and the tokens that sharing saved.

Results stay on the device over a step's micro-batches and come to the host in one transfer, `read`, together with
whatever else the step must know (gradient norm, finiteness). It is the one place at which a step waits for the device;
all arithmetic after it is the host's.

Over-optimisation watch: the chosen responses become unlikely while the loss still falls.

A preference loss only sees the margin. It can widen by pushing both responses down, until the model has forgotten how to
write either; the loss looks best just then. The sign is that the chosen responses lose log-probability per token against
the reference while margins grow. Some loss is normal; this watches for a lot of it.
"""

from collections import deque
from collections.abc import Sequence
from statistics import fmean
from typing import Any

import numpy as np
import torch

from cpo_fast.data.examples import PreferencePair, SftExample
from cpo_fast.train.objective import MicroBatch, MicroBatchResult, SftResult

PER_PAIR = ("losses", "chosen_rewards", "rejected_rewards", "chosen_logps", "rejected_logps")
PER_TOKEN = ("entropy_sum", "chosen_logit_sum", "rejected_logit_sum", "num_top1")
PER_COMPLETION = ("losses",)
PER_COMPLETION_TOKEN = ("loss_sum", "entropy_sum", "num_top1")


class PreferenceMetrics:
    """Collects the micro-batches of pairs of one optimizer step or one validation."""

    def __init__(self, beta: float) -> None:
        """`beta` turns rewards back into log-ratios."""
        self.beta = beta
        self.results: list[MicroBatchResult] = []
        self.pairs: list[PreferencePair] = []
        self._host: dict[str, np.ndarray] | None = None

    def add(self, micro: MicroBatch, result: MicroBatchResult) -> None:
        """Add one micro-batch and what the module made of it."""
        self.results.append(result)
        self.pairs.extend(micro.pairs)

    def read(self, *scalars: torch.Tensor) -> list[float]:
        """Bring everything to the host in one transfer; returns the values of `scalars`, which travel along."""
        self._host, values = _read(self.results, (*PER_PAIR, *PER_TOKEN), scalars)
        return values

    def summary(self) -> dict[str, float]:
        """Means over the pairs (rewards, log-probs) or tokens (entropy, logits, accuracy), as TRL logs them."""
        host = self._on_host()
        num_chosen = sum(sum(result.chosen_lengths) for result in self.results)
        num_rejected = sum(sum(result.rejected_lengths) for result in self.results)
        margins = host["chosen_rewards"] - host["rejected_rewards"]
        correct = margins > 0
        values = {
            "loss": float(host["losses"].mean()),
            "rewards/chosen": float(host["chosen_rewards"].mean()),
            "rewards/rejected": float(host["rejected_rewards"].mean()),
            "rewards/accuracies": float(correct.mean()),
            "rewards/margins": float(margins.mean()),
            "logps/chosen": float(host["chosen_logps"].mean()),
            "logps/rejected": float(host["rejected_logps"].mean()),
            "logps/chosen_per_token": float(host["chosen_logps"].sum()) / max(num_chosen, 1),
            "logps/rejected_per_token": float(host["rejected_logps"].sum()) / max(num_rejected, 1),
            "logps/chosen_drift": float(host["chosen_rewards"].sum()) / self.beta / max(num_chosen, 1),
            "logits/chosen": float(host["chosen_logit_sum"].sum()) / max(num_chosen, 1),
            "logits/rejected": float(host["rejected_logit_sum"].sum()) / max(num_rejected, 1),
            "entropy": float(host["entropy_sum"].sum()) / max(num_chosen + num_rejected, 1),
            "mean_token_accuracy": float(host["num_top1"].sum()) / max(num_chosen, 1),
            "pairs": len(self.pairs),
            **_sharing(self.results),
        }
        values.update(_accuracy_by_step(correct, [pair.step for pair in self.pairs]))
        return values

    def nonfinite(self) -> list[str]:
        """Source rows of pairs whose loss is not finite."""
        return _nonfinite(self._on_host()["losses"], [pair.source for pair in self.pairs])

    def _on_host(self) -> dict[str, np.ndarray]:
        if self._host is None:
            self.read()
        assert self._host is not None
        return self._host


class SftMetrics:
    """Collects the micro-batches of completions of one optimizer step or one validation."""

    def __init__(self) -> None:
        """Start empty."""
        self.results: list[SftResult] = []
        self.sources: list[str] = []
        self._host: dict[str, np.ndarray] | None = None

    def add(self, micro: Sequence[SftExample], result: SftResult) -> None:
        """Add one micro-batch and what the module made of it."""
        self.results.append(result)
        self.sources.extend(example.source for example in micro)

    def read(self, *scalars: torch.Tensor) -> list[float]:
        """Bring everything to the host in one transfer; returns the values of `scalars`, which travel along."""
        self._host, values = _read(self.results, (*PER_COMPLETION, *PER_COMPLETION_TOKEN), scalars)
        return values

    def summary(self) -> dict[str, float]:
        """Means over completion tokens, under the names of TRL's SFTTrainer."""
        host = self._on_host()
        num_tokens = max(sum(sum(result.lengths) for result in self.results), 1)
        return {
            "loss": float(host["loss_sum"].sum()) / num_tokens,
            "entropy": float(host["entropy_sum"].sum()) / num_tokens,
            "mean_token_accuracy": float(host["num_top1"].sum()) / num_tokens,
            "completions": len(self.sources),
            **_sharing(self.results),
        }

    def nonfinite(self) -> list[str]:
        """Source rows of completions whose loss is not finite."""
        return _nonfinite(self._on_host()["losses"], self.sources)

    def _on_host(self) -> dict[str, np.ndarray]:
        if self._host is None:
            self.read()
        assert self._host is not None
        return self._host


def _read(
    results: Sequence[Any], names: Sequence[str], scalars: Sequence[torch.Tensor]
) -> tuple[dict[str, np.ndarray], list[float]]:
    """The named values of every result and the scalars as float64, which holds float32 values and counts exactly."""
    columns = [[getattr(result, name).detach().reshape(-1) for result in results] for name in names]
    columns.append([scalar.detach().reshape(1) for scalar in scalars])
    sizes = [sum(part.shape[0] for part in column) for column in columns]
    host = torch.cat([part.double() for column in columns for part in column]).cpu().numpy()
    *values, rest = np.split(host, np.cumsum(sizes)[:-1])
    return dict(zip(names, values, strict=True)), [float(value) for value in rest]


def _sharing(results: Sequence[MicroBatchResult] | Sequence[SftResult]) -> dict[str, float]:
    computed = sum(result.num_tokens for result in results)
    rows = sum(result.num_sequence_tokens for result in results)
    return {
        "micro_batches": len(results),
        "tokens/computed": computed,
        "tokens/rows": rows,
        "tokens/saved": 1 - computed / rows if rows else 0.0,
    }


def _nonfinite(losses: np.ndarray, sources: Sequence[str]) -> list[str]:
    return [source for source, finite in zip(sources, np.isfinite(losses), strict=True) if not finite]


def _accuracy_by_step(correct: np.ndarray, steps: Sequence[int]) -> dict[str, float]:
    by_step: dict[int, list[bool]] = {}
    for value, step in zip(correct, steps, strict=True):
        if step:
            by_step.setdefault(step, []).append(bool(value))
    return {f"rewards/accuracies/step_{step}": sum(v) / len(v) for step, v in sorted(by_step.items())}


def rounded(values: dict[str, Any]) -> dict[str, Any]:
    """Numbers with nine significant digits, enough to tell float32 values apart and short enough to read."""
    return {key: float(f"{value:.9g}") if isinstance(value, float) else value for key, value in values.items()}


WINDOW = 10  # steps averaged: one step's pairs are few and noisy


class OverOptimisationAlarm:
    """Says once that chosen log-probs have fallen by more than a limit while margins grew."""

    def __init__(self, limit_nats: float) -> None:
        """`limit_nats`: fall of the chosen log-prob per token against the reference, in nats, that raises the alarm."""
        self.limit_nats = limit_nats
        self.raised_at: int | None = None
        self._chosen: deque[float] = deque(maxlen=WINDOW)
        self._margins: deque[float] = deque(maxlen=2 * WINDOW)

    def update(self, step: int, chosen_drift: float, margin: float) -> str | None:
        """Add one step; returns the sentence to show when the alarm is raised, once.

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
