"""Judge states with the model itself: is the last line likely right, or impossible?

    logits   value = p v_likely + (1 - p) v_impossible,   p = P(" likely") / (P(" likely") + P(" impossible"))
    sample   value = mean over the readable verdicts of v_likely or v_impossible

`logits` costs one forward and always has a verdict. `sample` writes `num_verdicts` verdicts and reads each strictly. With
`search.unparseable: drop` what cannot be read is left out of the mean, and a state without one readable verdict has value
None and ranks last. With `impossible` it counts as v_impossible.

Without a working a verdict is one line, the label. Where the task's worked verdicts have a working, it is lines, the last
of which is the cue and the label: the model writes line after line, each asked for by itself, until one begins with the
cue. The label is what follows the cue there and nothing else, whatever words the working uses.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from cpo_fast.config import SearchConfig
from cpo_fast.errors import ConfigError
from cpo_fast.search.engine import Answer, Requests, Sample, SampleRequest, ScoreRequest, Search
from cpo_fast.tasks import Prompts, Question, Task
from cpo_fast.tasks.folding import fold
from cpo_fast.tasks.task_file import IMPOSSIBLE, LIKELY, begins


def state_digest(token_ids: Sequence[int]) -> str:
    """SHA-256 of a state's ids, which names its random numbers: equal states have equal ones in every search."""
    return hashlib.sha256(" ".join(map(str, token_ids)).encode()).hexdigest()


def check_evaluator(config: SearchConfig, task: Task) -> None:
    """Refuse, by a ConfigError, to read a label off the logits where the task has the model work it out first."""
    if config.evaluator == "logits" and task.has_workings:
        raise ConfigError(
            "search.evaluator: logits reads the label at once, and the verdicts of this task have a working before it; set "
            "search.evaluator=sample, or delete the workings from the task file"
        )


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

    Raises:
        ConfigError: see `check_evaluator`.

    Attributes:
        num_tokens: tokens generated for verdicts so far. 0 with `evaluator: logits`, which generates none.
    """

    def __init__(self, config: SearchConfig, prompts: Prompts, question: Question, run_name: str) -> None:
        check_evaluator(config, prompts.task)
        self.num_tokens = 0
        self._config = config
        self._prompts = prompts
        self._question = question
        self._run_name = run_name
        self._judged: dict[str, Verdict] = {}  # by evaluator prompt: equal states of a question are judged once

    def evaluate(self, states: Sequence[Sequence[str]]) -> Search[list[Verdict]]:
        """One verdict per state, in order, given the texts of its thoughts.

        Asks once, once a line where verdicts have workings, and not at all if every state was judged before.
        """
        prompts = [self._prompts.verdict_text(self._question, lines) for lines in states]
        # `dict.fromkeys`: two states of a level may ask the same
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._judged]
        if new:
            judged = self._by_logits(new) if self._config.evaluator == "logits" else self._by_samples(new)
            self._judged.update(zip(new, (yield from judged), strict=True))
        return [self._judged[prompt] for prompt in prompts]

    def _by_logits(self, prompts: Sequence[str]) -> Search[list[Verdict]]:
        labels = self._prompts.labels(prompts)  # in one call of the tokenizer
        items = (ScoreRequest(tuple(ids), tuple(map(tuple, continuations))) for ids, continuations in labels)
        answers = yield Requests(tuple(items), keep=False)  # no later prompt begins with an evaluator prompt
        return [self._from_logits(answer) for answer in answers]

    def _from_logits(self, logps: Answer) -> Verdict:
        assert isinstance(logps, list), "a scoring is answered by log-probs"
        likely, impossible = logps
        # logistic of the difference, written so that neither exponential overflows
        difference = likely - impossible
        share = (
            1 / (1 + math.exp(-difference)) if difference >= 0 else math.exp(difference) / (1 + math.exp(difference))
        )
        value = share * self._config.value_likely + (1 - share) * self._config.value_impossible
        return Verdict(value, ({LIKELY: likely, IMPOSSIBLE: impossible},))

    def _by_samples(self, prompts: Sequence[str]) -> Search[list[Verdict]]:
        written = [self._to_write(prompt) for prompt in prompts]
        going_on = [one for group in written for one in group]
        while going_on:
            # not kept: that is for thoughts
            answers = yield Requests(tuple(one.request(self._config) for one in going_on), keep=False)
            for one, answer in zip(going_on, answers, strict=True):
                assert isinstance(answer, Sample), "a request is answered by a sample"
                one.samples.append(answer)
            going_on = [one for one in going_on if one.goes_on(self._config, self._prompts.task)]
        return [self._from_samples(group) for group in written]

    def _to_write(self, prompt: str) -> list["_WrittenVerdict"]:
        ids = tuple(self._prompts.encode_text(prompt))
        uid = f"{self._run_name}/verdict/{state_digest(ids)}"
        return [_WrittenVerdict(ids, f"{uid}/{index}") for index in range(self._config.num_verdicts)]

    def _from_samples(self, written: Sequence["_WrittenVerdict"]) -> Verdict:
        config, task = self._config, self._prompts.task
        self.num_tokens += sum(one.num_tokens for one in written)
        labels = [one.label(task) for one in written]  # None is recorded, and counted
        meaning = {LIKELY: config.value_likely, IMPOSSIBLE: config.value_impossible}
        if config.unparseable == "drop":
            values = [meaning[label] for label in labels if label is not None]
        else:
            values = [meaning[label or IMPOSSIBLE] for label in labels]
        records = tuple({"label": label, "text": one.text} for label, one in zip(labels, written, strict=True))
        return Verdict(sum(values) / len(values) if values else None, records)


@dataclass(frozen=True)
class _WrittenVerdict:
    """A verdict while it is written, a `Sample` a line."""

    prompt_ids: tuple[int, ...]
    uid: str  # of its first line
    samples: list[Sample] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        return sum(sample.num_tokens for sample in self.samples)

    @property
    def text(self) -> str:
        return "".join(sample.text for sample in self.samples)

    def request(self, config: SearchConfig) -> SampleRequest:
        """The request for its next line."""
        # without the top-k and the repetition penalty of thoughts: a verdict is one of two labels, and a penalty on
        # tokens of the prompt, which holds both, would only blur it
        return SampleRequest(
            (*self.prompt_ids, *(token for sample in self.samples for token in sample.token_ids)),
            f"{self.uid}/{len(self.samples)}" if self.samples else self.uid,
            config.verdict_temperature,
            1.0,
            config.max_verdict_tokens - self.num_tokens,
        )

    def goes_on(self, config: SearchConfig, task: Task) -> bool:
        """Whether its working is not at its end: a line with the cue, a blank line, another question, or the cap."""
        if not task.has_workings or self.samples[-1].stop != "newline" or self.num_tokens >= config.max_verdict_tokens:
            return False
        return not any(
            not line.strip() or begins(line, task.verdict_cue) or task.leaves_question(line)
            for line in self._lines(task)
        )

    def label(self, task: Task) -> str | None:
        """The verdict, likely or impossible, or None where it cannot be read."""
        if not task.has_workings:
            return parse_verdict(self.text, task.labels)
        verdict = next((line for line in self._lines(task) if begins(line, task.verdict_cue)), task.verdict_cue)
        return parse_verdict(fold(verdict).removeprefix(fold(task.verdict_cue)), task.labels)

    def _lines(self, task: Task) -> list[str]:
        """The whole lines so far, as they follow the prompt. One that was cut at the cap is none."""
        lines = (task.verdict_opening + self.text).split("\n")
        return lines if self.samples[-1].stop == "eos" else lines[:-1]


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
