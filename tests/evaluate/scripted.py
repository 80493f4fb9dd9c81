"""Stand-ins whose words are known: an engine that reads lines, a model whose head leans."""

import types
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch

from cpo_fast.evaluate.result import Evaluation, QuestionResult, RunIdentity, summarise
from cpo_fast.search.engine import Answer, Requests, Sample, SampleRequest, Search, run_searches
from tests.tiny import tiny_tokenizer

EOS = 2  # of the tiny tokenizer


def silent_model(dtype: torch.dtype = torch.float32) -> Any:
    """Stands for the model of an engine that needs none."""
    return types.SimpleNamespace(dtype=dtype, device=torch.device("cpu"))


class ScriptedEngine:
    """An engine over the tiny byte tokenizer that speaks lines written beforehand.

    Args:
        greedy: the chain of each question, by a word of the question; spoken where the temperature is 0.
        thoughts: the lines sampled under any state of a question, by (word, number of lines before).
        eos_after: lines after which the sequence ends instead of a newline.
    """

    def __init__(
        self,
        greedy: dict[str, str],
        thoughts: dict[tuple[str, int], list[str]] | None = None,
        eos_after: tuple[str, ...] = (),
    ) -> None:
        self.tokenizer = tiny_tokenizer()
        self.greedy = greedy
        self.thoughts = thoughts or {}
        self.eos_after = eos_after
        self.prefixes: list[str] = []
        self.num_sampled = 0

    def cache_prefix(self, token_ids: Sequence[int]) -> None:
        self.prefixes.append(self.tokenizer.decode(list(token_ids)))

    def answer(self, ask: Requests) -> list[Answer]:
        return [
            self.line(number, item) if isinstance(item, SampleRequest) else self._score(item.token_ids)
            for number, item in enumerate(ask.items)
        ]

    def run(self, searches: Iterable[tuple[str, Search[Any]]], cache: Any = None) -> Iterator[tuple[str, Any, float]]:
        return run_searches(self, searches)

    def _score(self, token_ids: Sequence[int]) -> list[float]:
        # a state that says good is likely
        state = self.tokenizer.decode(list(token_ids)).rpartition("\nQuestion:")[2]
        return [-0.1, -3.0] if "good" in state else [-3.0, -0.1]

    def line(self, number: int, request: SampleRequest) -> Sample:
        _, _, asked = self.tokenizer.decode(list(request.token_ids)).rpartition("Question: ")
        question, _, said = asked.partition("\n")
        if "warm-up" in request.uid:
            return Sample((5,), "%", "length", (-1.0,))
        if "raise" in question:
            raise ValueError("the question does not fit\nsecond line")
        if request.temperature == 0:
            chain = next(chain for word, chain in self.greedy.items() if word in question)
            line = chain[len(said) :].partition("\n")[0] + "\n"
        else:
            lines = next(
                lines
                for (word, depth), lines in self.thoughts.items()
                if word in question and depth == said.count("\n")
            )
            line = lines[number % len(lines)]
        self.num_sampled += len(line)
        if line.rstrip("\n") in self.eos_after:  # the end-of-sequence takes the newline's place: as many tokens
            line = line.rstrip("\n")
            ids = self.tokenizer(line).input_ids
            return Sample(tuple(ids), line, "eos", (-1.0,) * (len(ids) + 1))
        ids = self.tokenizer(line).input_ids[: request.max_new_tokens]
        text = self.tokenizer.decode(ids)
        return Sample(tuple(ids), text, "newline" if text.endswith("\n") else "length", (-1.0,) * len(ids))


def leaning(model: Any, bias: dict[int, float]) -> Any:
    """`model` with a head that adds `bias` to the logits of these tokens."""
    head = torch.nn.Linear(model.lm_head.in_features, model.lm_head.out_features, bias=True)
    head.weight.data.copy_(model.lm_head.weight.data)
    head.bias.data.zero_()
    for token, value in bias.items():
        head.bias.data[token] = value
    model.lm_head = head
    return model


IDENTITY = RunIdentity("m", "mh", "", "float32", "cpu", "th", "ph", "sh", "hf", 1, "")


def made_evaluation(
    label: str, corrects: Sequence[bool | None], seconds: float = 1.0, num_tokens: int = 10, **changes: Any
) -> Evaluation:
    """An evaluation of questions q0, q1, ...: `corrects` says which are right; an F1 of 0.5 stands beside each miss."""
    results = []
    for number, correct in enumerate(corrects):
        scores = {} if correct is None else {"exact": float(correct), "f1": 1.0 if correct else 0.5}
        gold = None if correct is None else "1"
        answer = "1" if correct else "2"
        result = QuestionResult(
            f"q{number}", f"text {number}", gold, answer, correct, scores, num_tokens, 0, seconds, "answer", ""
        )
        results.append(result)
    identity = RunIdentity(**{**IDENTITY.__dict__, **changes})
    method = "tot" if label.endswith("-tot") else "cot"
    return summarise(label, method, "svamp", identity, results, 0.25, len(results) * seconds)
