"""Over-optimisation watch: the chosen responses become unlikely while the loss still falls.

A preference loss only sees the margin. It can widen by pushing both responses down, until the model has forgotten how to
write either; the loss looks best just then. The sign is that the chosen responses lose log-probability per token against
the reference while margins grow. Some loss is normal; this watches for a lot of it.
"""

from collections import deque
from statistics import fmean

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
