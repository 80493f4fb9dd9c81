"""Judge states with the model itself: is the last line likely right, or impossible?

    logits   value = p v_likely + (1 - p) v_impossible,   p = P(" likely") / (P(" likely") + P(" impossible"))
    sample   value = mean over the readable verdicts of v_likely or v_impossible

`logits` costs one forward and always has a verdict. `sample` writes `num_verdicts` lines and reads each strictly. With
`search.unparseable: drop` what cannot be read is left out of the mean, and a state without one readable verdict has value
None and ranks last. With `impossible` it counts as v_impossible.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cpo_fast.config import SearchConfig
from cpo_fast.search.engine import Answer, Requests, Sample, SampleRequest, ScoreRequest, Search
from cpo_fast.tasks import Prompts, Question
from cpo_fast.tasks.folding import fold
from cpo_fast.tasks.task_file import IMPOSSIBLE, LIKELY


def state_digest(token_ids: Sequence[int]) -> str:
    """SHA-256 of a state's ids, which names its random numbers: equal states have equal ones in every search."""
    return hashlib.sha256(" ".join(map(str, token_ids)).encode()).hexdigest()


@dataclass(frozen=True)
class Verdict:
    """Value of a state (None: no readable verdict) and the records it was made from, as `tree.Node` stores them."""

    value: float | None
    evaluations: tuple[dict[str, Any], ...]


class Evaluator:
    """Judges the states of one question.

    Args:
        config: `evaluator` and what belongs to it.
        prompts: of the task. question: shown in them.
        run_name: seed and question, part of the uid of sampled verdicts.

    Attributes:
        num_tokens: tokens generated for verdicts so far. 0 with `evaluator: logits`, which generates none.
    """

    def __init__(self, config: SearchConfig, prompts: Prompts, question: Question, run_name: str) -> None:
        self.num_tokens = 0
        self._config = config
        self._prompts = prompts
        self._question = question
        self._run_name = run_name
        self._judged: dict[str, Verdict] = {}  # by evaluator prompt: equal states of a question are judged once

    def evaluate(self, states: Sequence[Sequence[str]]) -> Search[list[Verdict]]:
        """One verdict per state, in order, given the texts of its thoughts. Asks once, or not if all were judged before."""
        prompts = [self._prompts.verdict_text(self._question, lines) for lines in states]
        # `dict.fromkeys`: two states of a level may ask the same
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._judged]
        if new:
            by_logits = self._config.evaluator == "logits"
            items = self._scorings(new) if by_logits else list(map(self._requests, new))
            # not kept: no later prompt begins with an evaluator prompt
            answers = iter((yield Requests(tuple(item for group in items for item in group), keep=False)))
            for prompt, group in zip(new, items, strict=True):
                judge = self._by_logits if by_logits else self._by_samples
                self._judged[prompt] = judge([next(answers) for _ in group])
        return [self._judged[prompt] for prompt in prompts]

    def _scorings(self, prompts: Sequence[str]) -> list[tuple[SampleRequest | ScoreRequest, ...]]:
        return [
            (ScoreRequest(tuple(prompt_ids), tuple(tuple(label) for label in labels)),)
            for prompt_ids, labels in self._prompts.labels(prompts)
        ]

    def _requests(self, prompt: str) -> tuple[SampleRequest | ScoreRequest, ...]:
        prompt_ids = tuple(self._prompts.encode_text(prompt))
        digest, config = state_digest(prompt_ids), self._config
        # without the top-k and the repetition penalty of thoughts: a verdict is one of two labels, and a penalty on
        # tokens of the prompt, which holds both, would only blur it
        return tuple(
            SampleRequest(
                prompt_ids,
                f"{self._run_name}/verdict/{digest}/{index}",
                config.verdict_temperature,
                1.0,
                config.max_verdict_tokens,
            )
            for index in range(config.num_verdicts)
        )

    def _by_logits(self, answers: list[Answer]) -> Verdict:
        (logps,) = answers
        assert isinstance(logps, list), "a scoring is answered by log-probs"
        likely, impossible = logps
        # logistic of the difference, written so that neither exponential overflows
        difference = likely - impossible
        share = (
            1 / (1 + math.exp(-difference)) if difference >= 0 else math.exp(difference) / (1 + math.exp(difference))
        )
        value = share * self._config.value_likely + (1 - share) * self._config.value_impossible
        return Verdict(value, ({LIKELY: likely, IMPOSSIBLE: impossible},))

    def _by_samples(self, answers: list[Answer]) -> Verdict:
        samples = [answer for answer in answers if isinstance(answer, Sample)]
        assert len(samples) == len(answers), "a request is answered by a sample"
        config = self._config
        self.num_tokens += sum(sample.num_tokens for sample in samples)
        texts = [sample.text for sample in samples]
        labels = [parse_verdict(text, self._prompts.task.labels) for text in texts]  # None is recorded, and counted
        meaning = {LIKELY: config.value_likely, IMPOSSIBLE: config.value_impossible}
        if config.unparseable == "drop":
            values = [meaning[label] for label in labels if label is not None]
        else:
            values = [meaning[label or IMPOSSIBLE] for label in labels]
        records = tuple({"label": label, "text": text} for label, text in zip(labels, texts, strict=True))
        return Verdict(sum(values) / len(values) if values else None, records)


def parse_verdict(text: str, labels: tuple[str, str] = (LIKELY, IMPOSSIBLE)) -> str | None:
    """What a sampled verdict line says, likely or impossible, or None.

    Case and one full stop at the end do not matter. "unlikely", "not impossible", "likely or impossible" and
    explanations are not verdicts.

    Args:
        labels: what the task calls likely and impossible.
    """
    word = fold(text).removesuffix(".").lower()
    meaning = zip((fold(label).lower() for label in labels), (LIKELY, IMPOSSIBLE), strict=True)
    return next((verdict for label, verdict in meaning if label == word), None)


def num_unparseable(evaluations: Sequence[dict[str, Any]]) -> int:
    """How many sampled verdicts among a node's records could not be read."""
    return sum("label" in record and record["label"] is None for record in evaluations)
