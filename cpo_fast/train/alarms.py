"""Two watches for a model that training makes worse while its loss falls.

    DriftAlarm   after every step: a tenth of the chosen responses have become less likely while margins grew
    ChainAlarm   after every validation by chains: they answer fewer questions as expected than they did

A preference loss sees the margin alone, which can widen by pushing both responses down, until the model has forgotten how
to write either. `DriftAlarm` sees it where it begins, but comes late: as measured in docs/derivations.md, section 7,
answers are lost while means of log-probs, margins and entropy look as they do in a healthy run. What chains answer tells
it first, and votes of a search in place of reference answers are enough.
"""

from collections import deque
from collections.abc import Sequence
from statistics import fmean
from typing import Any

from cpo_fast.evaluate.statistics import mcnemar_exact

WINDOW = 10  # steps whose margins are averaged: one step's pairs are few and noisy
MIN_PAIRS = 32  # that a lowest tenth is read off


class DriftAlarm:
    """Says once that the lowest tenth of the chosen responses has lost more than a limit while margins grew.

    The mean of a step hides it: where some contexts are overshot, most chosen responses are still likelier than under the
    reference.
    """

    def __init__(self, limit_nats: float) -> None:
        """`limit_nats`: fall of the chosen log-prob per token since the first step, in nats, that raises the alarm."""
        self.limit_nats = limit_nats
        self.raised_at: int | None = None
        self.text = ""
        self._start: float | None = None  # 0 unless training starts off its reference
        self._lows: list[tuple[float, int]] = []  # of the newest steps that have MIN_PAIRS pairs together
        self._margins: deque[float] = deque(maxlen=2 * WINDOW)

    def update(self, step: int, chosen_drift_p10: float, margin: float, num_pairs: int) -> str | None:
        """Add one step. Returns the sentence to show when the alarm is raised, once.

        Args:
            step: optimizer step, for the message.
            chosen_drift_p10: of the step's pairs the 10 % quantile of (log-prob - reference log-prob) per token of the
                chosen response, in nats.
            margin: mean reward margin. num_pairs: of the step.
        """
        if self._start is None:
            self._start = chosen_drift_p10
        self._lows.append((chosen_drift_p10, num_pairs))
        while sum(count for _, count in self._lows[1:]) >= MIN_PAIRS:
            del self._lows[0]
        self._margins.append(margin)
        if self.raised_at is not None or len(self._margins) < 3:
            return None
        values = list(self._margins)
        half = len(values) // 2
        grows = fmean(values[half:]) > fmean(values[:half])
        fall = self._start - sum(low * count for low, count in self._lows) / sum(count for _, count in self._lows)
        if fall <= self.limit_nats or not grows:
            return None
        self.raised_at = step
        self.text = (
            f"step {step}: a tenth of the chosen responses have lost {fall:.2f} nats per token or more since the start "
            "while margins grow; the model may be collapsing although the loss falls. Look at what its chains answer "
            "(train.stop_on=agreement), train for fewer steps, lower train.lr, raise train.beta, or set train.nll_weight"
        )
        return self.text

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, as JSON values."""
        windows = {"start": self._start, "lows": self._lows, "margins": list(self._margins)}
        return {"raised_at": self.raised_at, "text": self.text, **windows}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on as the watch whose `state` it was, or, where an older version wrote it, without what is new in it."""
        self.raised_at, self.text = state["raised_at"], state["text"]
        self._start = state.get("start", 0.0)
        self._lows = [(low, count) for low, count in state.get("lows", [])]
        self._margins.extend(state["margins"])


MIN_FALL = 0.03  # a smaller loss is not worth stopping for
MAX_CHANCE = 0.1  # that answers which only change at random lose so many more than they gain


class ChainAlarm:
    """Says once that chains answer fewer questions as expected than at the best validation before.

    Both validations ask the same questions, so what counts are those that changed: b that were answered as expected and are
    not any more, c the other way. It is raised where (b - c) / questions is more than `MIN_FALL` and p <= `MAX_CHANCE`, the
    one-sided p of the exact McNemar test: the chance of b or more among b + c. It is given truth values and no answers.
    """

    def __init__(self, metric: str) -> None:
        """`metric`: `accuracy` or `agreement`, for the message."""
        self.metric = metric
        self.raised_at: int | None = None
        self.text = ""
        self._best: list[bool] = []
        self._best_step = 0

    def update(self, step: int, as_expected: Sequence[bool]) -> str | None:
        """Add one validation. Returns the sentence to show when the alarm is raised, once.

        Args:
            step: optimizer step after which it was made.
            as_expected: for each question, in the same order every time, whether its chain answered as expected.
        """
        if not self._best or sum(as_expected) > sum(self._best):
            self._best, self._best_step = list(as_expected), step
            return None
        lost = sum(before and not now for before, now in zip(self._best, as_expected, strict=True))
        gained, num_questions = lost - sum(self._best) + sum(as_expected), len(as_expected)
        chance = mcnemar_exact(lost, gained) / 2  # one side of two
        if self.raised_at is not None or lost - gained <= MIN_FALL * num_questions or chance > MAX_CHANCE:
            return None
        self.raised_at = step
        self.text = (
            f"step {step}: the {self.metric} of chains has fallen from {sum(self._best) / num_questions:.1%} after step "
            f"{self._best_step} to {sum(as_expected) / num_questions:.1%}, whatever the loss says (of {num_questions} "
            f"questions {lost} were lost and {gained} gained); use the best adapter, which the run keeps, or train again "
            "with fewer steps, a lower train.lr or, on pairs, train.nll_weight"
        )
        return self.text

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, as JSON values."""
        best = [int(value) for value in self._best]
        return {"raised_at": self.raised_at, "text": self.text, "best": best, "best_step": self._best_step}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on as the watch whose `state` it was."""
        self.raised_at, self.text = state["raised_at"], state["text"]
        self._best, self._best_step = [bool(value) for value in state["best"]], state["best_step"]
