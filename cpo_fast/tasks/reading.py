"""How an answer is read out of what follows its mark, and scored: one class for each `answer.kind` of a task file.

A reader gives an answer its normal form, by which chains vote, or None where it cannot be read. Both sides of a score are
read by the same reader. Everything is folded first (see `folding`).
"""

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any

from cpo_fast.tasks.answers import contains, exact_match, f1_score, is_number, read_words
from cpo_fast.tasks.folding import fold, with_spaced_dashes
from cpo_fast.tasks.numbers import normalise_number


class AnswerReader(ABC):
    """Reads and scores answers. `main_metric` is the score that decides whether an answer is right."""

    main_metric = "exact"
    finds_parts = False  # references may be the part that is read of an answer, and then none can be read as an answer

    @abstractmethod
    def read(self, text: str) -> str | None:
        """The normal form of an answer, or None if there is none in it."""

    def gold(self, value: Any) -> str:
        """A reference answer as it is kept. Raises ValueError that says what it is not."""
        text = _text(value)
        if text is None or (self.read(text) is None and not fold(text)):
            raise ValueError("is no text")
        return text  # as written: scoring reads both sides

    def scores(self, answer: str | None, gold: str) -> dict[str, float]:
        """Every metric that applies, each from 0 to 1. None scores 0 everywhere."""
        said, meant = self._form(answer or ""), self._form(gold)
        return {"exact": float(said is not None and said == meant)}

    def _form(self, text: str) -> str | None:
        return self.read(text)


class NumberReader(AnswerReader):
    """The only number in the text. See `numbers`."""

    main_metric = "numeric"

    def read(self, text: str) -> str | None:
        return normalise_number(text)

    def gold(self, value: Any) -> str:
        text = _text(value)
        number = None if text is None else normalise_number(text)
        if number is None:
            raise ValueError("is not a number")
        return number

    def scores(self, answer: str | None, gold: str) -> dict[str, float]:
        return {"numeric": super().scores(answer, gold)["exact"]}


class TextReader(AnswerReader):
    """A few words. Scores `exact`, `f1` and `containment`, and `numeric` where the reference is a number."""

    def __init__(self, correct: str) -> None:
        self.main_metric = correct

    def read(self, text: str) -> str | None:
        return read_words(text) or None

    def scores(self, answer: str | None, gold: str) -> dict[str, float]:
        said = answer or ""
        scores = {
            "exact": float(exact_match(said, gold)),
            "f1": f1_score(said, gold),
            "containment": float(contains(said, gold)),
        }
        if is_number(gold):
            scores["numeric"] = float(normalise_number(said) == normalise_number(gold))
        return scores


class ChoiceReader(AnswerReader):
    """One of several labels, which the text opens with, in any case, quotes and emphasis aside.

    "SUPPORTS. It is known ..." is SUPPORTS. "not SUPPORTS", "SUPPORTS or REFUTES" and "supporters say" are no label. One
    that is only "no" or "yes" must be all that stands before the first pause: "no one" is no label.

    Args:
        choices: each label, and its other spellings.
    """

    def __init__(self, choices: Mapping[str, Sequence[str]]) -> None:
        self._labels: dict[str, str] = {}
        for label, spellings in choices.items():
            for spelling in (label, *spellings):
                form = fold(spelling).lower()
                if not form or self._labels.setdefault(form, label) != label:
                    raise ValueError(f"choices: {spelling!r} is empty or means two answers")
        if len(choices) < 2:
            raise ValueError("choices: expected at least two")
        self._names = tuple(choices)
        longest_first = sorted(self._labels, key=len, reverse=True)
        # a hyphen makes another word of it: SUPPORTS-like
        self._label = re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, longest_first))})(?![\w-])")

    def read(self, text: str) -> str | None:
        said = fold(with_spaced_dashes(text)).lower().lstrip("\"'*`([ ")
        if (whole := self._labels.get(said.rstrip("\"'*`)].,;:! "))) is not None:
            return whole
        # what follows the first clause explains the label, and may name others
        opening = re.split(r"\.(?!\s?#?\d)|[;:!()\[\]]", said, maxsplit=1)[0]  # "No. 5" is not "no"
        found = self._label.findall(opening)
        if not found or not opening.startswith(found[0]):
            return None
        if found[0] in ("yes", "no") and not re.match(r"[\"'*`]*(?:$|,| - )", opening.removeprefix(found[0])):
            return None
        labels = {self._labels[each] for each in found}
        return labels.pop() if len(labels) == 1 else None

    def gold(self, value: Any) -> str:
        text = _text(value)
        label = None if text is None else self._labels.get(fold(text).lower())
        if label is None:
            raise ValueError(f"is none of {', '.join(self._names[:-1])} and {self._names[-1]}")
        return label


class PatternReader(AnswerReader):
    """What a pattern finds in the text: its first group, or all of it without one. Two different finds are none.

    What the pattern does not find in is compared as it stands: a reference "B" where answers are written "(B)".
    """

    def __init__(self, pattern: str) -> None:
        try:
            self._pattern = re.compile(pattern)
        except re.error as error:
            raise ValueError(f"pattern: not a regular expression ({error})") from None
        self.finds_parts = self._pattern.groups > 0

    def read(self, text: str) -> str | None:
        matches = self._pattern.finditer(fold(text))
        found = {match[1] if match.re.groups else match[0] for match in matches}
        return found.pop() or None if len(found) == 1 else None

    def _form(self, text: str) -> str | None:
        return self.read(text) or fold(text) or None


class ExactReader(AnswerReader):
    """All of the text, folded, with its case and punctuation."""

    def read(self, text: str) -> str | None:
        return fold(text) or None


def _text(value: Any) -> str | None:
    """A reference answer as text, None for what is none. A bool is an int to Python."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return None
    if isinstance(value, float):  # 1e+16 has its digits, and no infinity has
        return format(Decimal(repr(value)), "f") if math.isfinite(value) else None
    return str(value).strip()
