"""Two watches for a model that training makes worse while its loss falls.

    DriftAlarm   after every step: a tenth of the chosen responses have become less likely while margins grew
    ChainAlarm   after every validation by chains: they contradict what the model was sure of, or forget what they knew

A preference loss sees the margin alone, which can widen by pushing both responses down, until the model has forgotten how
to write either. Means of log-probs, margins and entropy then look as they do in a healthy run. `DriftAlarm` reads a
lowest tenth and comes late or not at all. What chains contradict mostly tells before answers are lost, with votes of a
search in place of reference answers, and seldom where nothing is lost: docs/derivations.md, section 7, has the counts.
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


# shares of the questions, those that came back taken off. Of the votes of a good search some 7 % are wrong, and a model
# that learns past them has lost nothing; of the votes that it was sure of hardly any are
MAX_FORGOTTEN = {"accuracy": 0.05, "agreement": 0.08}
MAX_CONTRADICTED = 0.004
MAX_CHANCE = 0.1  # that questions which come and go at random are so many more gone than back


class ChainAlarm:
    """Says once that chains contradict, or have forgotten, too many of the questions that they are asked.

    Before accuracy falls, what is still being learnt hides what is already being lost, so lost questions are counted by
    themselves. With reference answers, or where nothing was sampled before training, a question is lost that is forgotten:
    its chain answered as expected at some validation before and does not now. More than `MAX_FORGOTTEN` of all, or of those
    that were answered as expected at the first validation, are too many. Where chains were sampled before training, a
    question is lost whose chain contradicts them (`dev_questions.contradicts`) and at some validation before did not. More
    than `MAX_CONTRADICTED` of all, and more than were contradicted at the first validation, are too many.

    Some answers change back and forth all the time: of b questions lost now, the c that once were and came back are taken
    off, and the exact McNemar test must give a one-sided p <= `MAX_CHANCE`, the chance of b or more among b + c. Few are
    contradicted, so chance counts for more there: what came back once stays among the c, and is not lost again. The alarm
    is given truth values and no answers.
    """

    def __init__(self, metric: str) -> None:
        """`metric`: what is expected, reference answers (`accuracy`) or votes (`agreement`)."""
        self.metric = metric
        self.raised_at: int | None = None
        self.text = ""
        self._start: list[bool] = []  # was held (as expected, or uncontradicted) at the first validation
        self._known: list[bool] = []  # at any
        self._lost: list[bool] = []  # and, later, was not
        self._back: list[bool] = []  # and, later still, was again. Of contradictions alone
        self._best, self._best_step = 0, 0

    def update(self, step: int, as_expected: Sequence[bool], contradicted: Sequence[bool] | None = None) -> str | None:
        """Add one validation. Returns the sentence to show when the alarm is raised, once.

        Args:
            step: optimizer step after which it was made.
            as_expected: for each question, in the same order every time, whether its chain answered as expected.
            contradicted: whether it contradicts what was sampled before training. None, always, where nothing was.
        """
        held = list(as_expected) if contradicted is None else [not flag for flag in contradicted]
        if not self._known:
            self._start = held
            self._known, self._lost, self._back = ([False] * len(held) for _ in range(3))
        gone = [known and not now for known, now in zip(self._known, held, strict=True)]
        back = [lost and now for lost, now in zip(self._lost, held, strict=True)]
        self._known = [known or now for known, now in zip(self._known, held, strict=True)]
        self._lost = [lost or now for lost, now in zip(self._lost, gone, strict=True)]
        if contradicted is not None:
            back = self._back = [earlier or now for earlier, now in zip(self._back, back, strict=True)]
            gone = [now and not earlier for now, earlier in zip(gone, back, strict=True)]
        if sum(as_expected) > self._best:
            self._best, self._best_step = sum(as_expected), step
        if self.raised_at is not None:
            return None
        everything = [True] * len(held)
        if contradicted is not None:
            most, num_start = MAX_CONTRADICTED, len(held) - sum(self._start)  # which the start contradicted
            counted = {
                "of {1} questions {0} are answered against what half of the chains or more said before training": everything
            }
        else:
            most, num_start = MAX_FORGOTTEN[self.metric], 0
            counted = {
                "of the {1} questions that chains answered as expected at first {0} are forgotten": self._start,
                "of {1} questions {0} are forgotten that chains answered as expected before": everything,
            }
        for said, among in counted.items():
            num_gone, num_back, num_asked = (_count(flags, among) for flags in (gone, back, everything))
            if _is_too_much(num_gone, num_back, max(most * num_asked, num_start)):
                return self._raise(step, said.format(num_gone, num_asked), num_back, sum(as_expected) / len(held))
        return None

    def _raise(self, step: int, said: str, num_back: int, share: float) -> str:
        self.raised_at = step
        best = self._best / len(self._known)
        self.text = (
            f"step {step}: {said} ({num_back} others came back); the model may be beginning to collapse, whatever the loss "
            f"says. Their {self.metric} is {share:.1%} and was {best:.1%} after step {self._best_step}; use the best "
            "adapter, which the run keeps, or train again with fewer steps, a lower train.lr or, on pairs, train.nll_weight"
        )
        return self.text

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, as JSON values."""
        kept = {"start": self._start, "known": self._known, "lost": self._lost, "back": self._back}
        flags = {name: [int(value) for value in values] for name, values in kept.items()}
        return {
            "raised_at": self.raised_at,
            "text": self.text,
            "best": self._best,
            "best_step": self._best_step,
            **flags,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on as the watch whose `state` it was, or, where an older version wrote it, from its best validation on."""
        self.raised_at, self.text, self._best_step = state["raised_at"], state["text"], state["best_step"]
        best = state["best"]
        if isinstance(best, list):  # an older version's: the truth values themselves
            state, best = {"known": best, "lost": [0] * len(best)}, sum(best)
        self._best = best
        # which older versions did not keep
        state = {"start": state["known"], "back": [0] * len(state["known"])} | state
        self._start, self._known, self._lost, self._back = (
            [bool(value) for value in state[name]] for name in ("start", "known", "lost", "back")
        )


def _count(flags: Sequence[bool], among: Sequence[bool]) -> int:
    return sum(flag and counted for flag, counted in zip(flags, among, strict=True))


def _is_too_much(num_gone: int, num_back: int, limit: float) -> bool:
    chance = mcnemar_exact(num_gone, num_back) / 2  # one side of two
    return num_gone - num_back > limit and chance <= MAX_CHANCE
