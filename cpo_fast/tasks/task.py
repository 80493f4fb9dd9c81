"""What every task family gives: questions, the prompts for thoughts and verdicts, and the meaning of an answer.

The prompts for search, training and evaluation come from here and nowhere else, so they cannot drift apart. A chain is
lines, `Step 1: ...` and so on, the last one `Answer: ...`; a thought is one line including its newline.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ANSWER_MARK = "Answer:"
QUESTION_MARK = "Question:"
# ends every evaluator prompt; naming both labels leaves fewer verdicts that are something else (seen with a 135M
# model, which after a bare "Verdict:" tends to write the answer)
VERDICT_CUE = "Is the last line likely or impossible? It is"
LIKELY = "likely"
IMPOSSIBLE = "impossible"


@dataclass(frozen=True)
class Question:
    """One question: `id` is unique in its file, `gold` is the normalised reference answer if the file has one."""

    id: str
    text: str
    gold: str | None = None


class Task(ABC):
    """A task family. Subclasses hold the demonstrations, read the data set and normalise answers.

    Attributes:
        name: what `task.name` says.
        few_shot: the demonstrations, shared by every question; ends with a blank line.
        few_shot_evaluator: the demonstrations of verdicts, shared by every state; ends with a blank line.
    """

    name: str
    few_shot: str
    few_shot_evaluator: str

    @abstractmethod
    def load(self, path: str | Path, limit: int | None = None, skip: int = 0) -> list[Question]:
        """Questions in file order, without the first `skip`, at most `limit`. Raises DataError with file:line."""

    @abstractmethod
    def parse_answer(self, line: str) -> str | None:
        """The normalised answer of an `Answer: ...` line; None if it is not one or holds no readable answer."""

    @abstractmethod
    def is_correct(self, answer: str | None, gold: str) -> bool:
        """Whether an answer equals the reference answer after normalisation. None is never correct."""

    def prompt(self, question: Question) -> str:
        """Few-shot text and the question; ends in a newline, and the first thought follows."""
        return f"{self.few_shot}{QUESTION_MARK} {question.text}\n"

    def evaluator_prompt(self, question: Question, lines: Sequence[str]) -> str:
        """Few-shot verdicts and the state to judge; ends in `VERDICT_CUE`, and ` likely` or ` impossible` follows.

        Args:
            question: the question.
            lines: the thoughts of the state, in order. Their surrounding whitespace is not shown: a verdict is about
                what a line says, and its tokens are not trained.
        """
        state = "".join(f"{line.strip()}\n" for line in lines)
        return f"{self.few_shot_evaluator}{QUESTION_MARK} {question.text}\n{state}{VERDICT_CUE}"

    def is_answer_line(self, line: str) -> bool:
        """Whether a thought is the last line of a chain."""
        return line.strip().startswith(ANSWER_MARK)

    def leaves_question(self, line: str) -> bool:
        """Whether a thought starts another question, as a model does that runs on in the few-shot format."""
        return line.strip().startswith(QUESTION_MARK)
