"""An engine whose every answer is a hash of what is asked: any number of questions, no model, the same on every run."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from transformers import PreTrainedTokenizerFast

from cpo_fast.search.engine import Answer, Requests, Sample, SampleRequest, ScoreRequest, Search, run_searches


def _digest(*parts: object) -> bytes:
    return hashlib.sha256(repr(parts).encode()).digest()


class HashEngine:
    """Steps, answers, duplicates and broken lines, named by the uid of the request; `run` may take searches in parts.

    `width` searches are in flight at a time and end last first, as no engine would, to show that order does not matter.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, width: int = 1) -> None:
        self.tokenizer, self.width = tokenizer, width

    def cache_prefix(self, token_ids: Sequence[int]) -> None:
        pass

    def answer(self, ask: Requests) -> list[Answer]:
        return [self._sample(item) if isinstance(item, SampleRequest) else self._score(item) for item in ask.items]

    def run(self, searches: Iterable[tuple[str, Search[Any]]], cache: Any = None) -> Iterator[tuple[str, Any, float]]:
        group = []
        for search in searches:
            group.append(search)
            if len(group) == self.width:
                yield from run_searches(self, group[::-1])
                group = []
        yield from run_searches(self, group[::-1])

    def _sample(self, request: SampleRequest) -> Sample:
        first, second = _digest(request.uid)[:2]
        text = f"Answer: {second % 3}\n" if first < 90 else f"Step {'abcd'[second % 4]}\n"
        ids = tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        logps = tuple(-(byte + 1) / 300 for byte in _digest(request.uid, "logps")[: len(ids)])
        return Sample(ids, text, "length" if first > 240 else "newline", logps)

    def _score(self, scoring: ScoreRequest) -> list[float]:
        likely, impossible = _digest(scoring.token_ids)[:2]
        return [-likely / 50, -impossible / 50]
