"""What every task family gives: questions, the text of prompts for thoughts and verdicts, and the meaning of an answer.

A chain is lines, `Step 1: ...` and so on, the last one `Answer: ...`. A thought is one line including its newline. A
family is one file: it reads a row, parses an answer line, scores an answer, and holds the demonstrations.
"""

import hashlib
import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from cpo_fast.errors import DataError
from cpo_fast.rows import is_hub, read_question_rows

logger = logging.getLogger(__name__)

ANSWER_MARK = "Answer:"
QUESTION_MARK = "Question:"
CLAIM_MARK = "Claim:"
# ends every evaluator prompt; naming both labels leaves fewer verdicts that are something else (seen with a 135M
# model, which after a bare "Verdict:" tends to write the answer)
VERDICT_CUE = "Is the last line likely or impossible? It is"
LIKELY = "likely"
IMPOSSIBLE = "impossible"


@dataclass(frozen=True)
class Demonstrations:
    """Worked examples before every question: `instruction`, then `examples`, blocks of lines without a blank one."""

    instruction: str
    examples: tuple[str, ...]

    def text(self, seed: int | None = None) -> str:
        """Instruction and examples, a blank line after each, in written order where `seed` is None."""
        return "".join(f"{block}\n\n" for block in (self.instruction, *self.ordered(seed)))

    def ordered(self, seed: int | None) -> tuple[str, ...]:
        if seed is None:
            return self.examples
        # hashes, not a random generator: equal seeds give equal prompts on every version and machine
        keys = {example: hashlib.sha256(f"{seed}/{example}".encode()).digest() for example in self.examples}
        return tuple(sorted(self.examples, key=keys.__getitem__))


@dataclass(frozen=True)
class Question:
    """One question or claim: `id` is unique in its file, `gold` is the reference answer if the file has one."""

    id: str
    text: str
    gold: str | None = None


class Task(ABC):
    """A task: a data set's name and the family it belongs to.

    Attributes:
        name: what `task.name` says.
        demonstration_seed: draws the order of the chain-of-thought demonstrations. None keeps the written one.
        evaluator_seed: the same for the demonstrations of verdicts.
        question_mark: what stands before a question.
        vote_by: what wins the vote of a tree, the largest summed `value` or the largest `count` of complete paths.
        main_metric: the entry of `score_answer` that decides `is_correct`.
        demonstrations: four questions with their chains.
        step_verdicts, conclusion_verdicts: four states each, ending in a step or in an answer line, with verdicts.
    """

    question_mark: ClassVar[str] = QUESTION_MARK
    vote_by: ClassVar[Literal["value", "count"]] = "value"
    main_metric: ClassVar[str]
    demonstrations: ClassVar[Demonstrations]
    step_verdicts: ClassVar[Demonstrations]
    conclusion_verdicts: ClassVar[Demonstrations]

    def __init__(self, name: str, demonstration_seed: int | None = None, evaluator_seed: int | None = None) -> None:
        self.name = name
        self.demonstration_seed = demonstration_seed
        self.evaluator_seed = evaluator_seed

    @abstractmethod
    def read_row(self, row: dict[str, Any], place: str) -> Question | None:
        """The question of one row, or None for a row that is no data (a header). Raises DataError naming `place`."""

    @abstractmethod
    def parse_answer(self, line: str) -> str | None:
        """The normalised answer of an `Answer: ...` line, or None if it is not one or holds no readable answer."""

    @abstractmethod
    def score_answer(self, answer: str | None, gold: str) -> dict[str, float]:
        """Every metric that applies, each from 0 to 1. Both sides are normalised first. None scores 0 everywhere."""

    def may_repeat(self, row: dict[str, Any]) -> bool:
        """Whether the format of `row` gives one question in several rows, or no ids to tell equal questions apart."""
        return False

    def load(self, path: str | Path, limit: int | None = None, skip: int = 0) -> list[Question]:
        """Questions in file order, without the first `skip`, at most `limit`.

        Rows that repeat a question word for word are merged where the data set's own format does that, and an error
        elsewhere.

        Args:
            path: the data set's released file, a JSONL of `question[, answer][, id]`, or `hub:org/name[:config][:split]`.

        Raises:
            DataError: the source cannot be read, a row is bad, or an id appears twice. Names file:line or the row.
            EnvironmentProblem: a hub id is given and `datasets` is missing.
        """
        questions: dict[str, Question] = {}
        first_place: dict[str, str] = {}
        num_merged = 0
        for place, row in read_question_rows(path):
            question = self.read_row(row, place)
            if question is None:
                continue
            if questions.get(question.id) == question and (is_hub(path) or self.may_repeat(row)):
                num_merged += 1
            elif question.id in questions:
                raise DataError(
                    f"{place}: question '{question.id}' is already at {first_place[question.id]}; delete one, or give "
                    "each its own id"
                )
            else:
                questions[question.id], first_place[question.id] = question, place
        if not questions:
            raise DataError(f"{path}: the file holds no question")
        if num_merged:
            logger.info("%s: %d rows repeat an earlier question and are merged with it", path, num_merged)
        # cut last, so that the whole file is checked, whatever part is used
        end = None if limit is None else skip + limit
        return list(questions.values())[skip:end]

    def is_correct(self, answer: str | None, gold: str) -> bool:
        """Whether an answer is right by the family's main metric, which None never is."""
        return answer is not None and self.score_answer(answer, gold)[self.main_metric] == 1.0

    # each of the three ends with a blank line
    @property
    def few_shot(self) -> str:
        """The demonstrations, shared by every question."""
        return self.demonstrations.text(self.demonstration_seed)

    @property
    def few_shot_evaluator(self) -> str:
        """The verdicts on steps, shared by every state that ends in a step."""
        return self.step_verdicts.text(self.evaluator_seed)

    @property
    def few_shot_conclusion_evaluator(self) -> str:
        """The verdicts on answers, shared by every state that ends in an answer line."""
        return self.conclusion_verdicts.text(self.evaluator_seed)

    def prompt(self, question: Question) -> str:
        """Few-shot text and the question. Ends in a newline, and the first thought follows."""
        return f"{self.few_shot}{self.question_mark} {question.text}\n"

    def evaluator_prompt(self, question: Question, lines: Sequence[str]) -> str:
        """Few-shot verdicts and the state to judge. Ends in `VERDICT_CUE`, and ` likely` or ` impossible` follows.

        A state whose last line (of `lines`, its thoughts) is an answer line gets the demonstrations for conclusions.
        """
        concludes = bool(lines) and self.is_answer_line(lines[-1])
        few_shot = self.few_shot_conclusion_evaluator if concludes else self.few_shot_evaluator
        # whitespace around a line aside: a verdict is about what it says, and its tokens are not trained
        state = "".join(f"{line.strip()}\n" for line in lines)
        return f"{few_shot}{self.question_mark} {question.text}\n{state}{VERDICT_CUE}"

    def is_answer_line(self, line: str) -> bool:
        return line.strip().startswith(ANSWER_MARK)

    def leaves_question(self, line: str) -> bool:
        """Whether a thought starts another question, as a model does that runs on in the few-shot format."""
        return line.strip().startswith((QUESTION_MARK, CLAIM_MARK))
