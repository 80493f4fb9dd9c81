"""What a task gives: questions, the text of prompts for thoughts and verdicts, and the meaning of an answer.

A chain is lines, `Step 1: ...` and so on, the last one `Answer: ...`. A thought is one line including its newline. The
words and the way rows and answers are read come from a task file (`task_file`). A subclass says what a file cannot: it
overrides `read_row`, `parse_answer`, `score_answer` or another method.
"""

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from cpo_fast.errors import DataError
from cpo_fast.rows import columns_hint, first_value, is_hub, read_question_rows, row_id, row_text
from cpo_fast.tasks.folding import fold
from cpo_fast.tasks.task_file import IMPOSSIBLE, LIKELY, Judged, TaskFile, Verdicts, begins

logger = logging.getLogger(__name__)

# what a model runs on into, whatever its task: the marks of the data sets that ship
_QUESTION_MARKS = ("Question:", "Claim:")
QUESTION_KEY = "rows.question of task.file"  # what names the columns of a question


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
    """One question or claim: `id` is unique in its file, `gold` is the reference answer if the file has one.

    `place` is where it stands, as a message names it.
    """

    id: str
    text: str
    gold: str | None = None
    place: str = field(default="", compare=False)


class Task:
    """A task.

    Args:
        name: what `task.name` says, or a file's name with its hash.
        file: its words, and how its rows and answers are read.
        demonstration_seed: draws the order of the chain-of-thought demonstrations. None keeps the written one.
        evaluator_seed: the same for the demonstrations of verdicts.

    Attributes:
        reader: reads and scores answers.
        question_mark, answer_mark: what stands before a question and an answer.
        verdict_cue: what a label follows.
        has_workings: whether verdicts are written with a working before them.
        verdict_opening: ends every evaluator prompt: what opens the working, or without one the cue.
        labels: what likely and impossible are called there.
        vote_by: what wins the vote of a tree, the largest summed `value` or the largest `count` of complete paths.
        main_metric: the entry of `score_answer` that decides `is_correct`.
    """

    def __init__(
        self, name: str, file: TaskFile, demonstration_seed: int | None = None, evaluator_seed: int | None = None
    ) -> None:
        self.name = name
        self.file = file
        self.demonstration_seed = demonstration_seed
        self.evaluator_seed = evaluator_seed
        self.reader = file.answer.reader()
        self.question_mark, self.answer_mark = file.marks.question, file.marks.answer
        self.verdict_cue = file.verdict.cue
        self.has_workings = file.has_workings
        self.verdict_opening = file.verdict.working if self.has_workings else self.verdict_cue
        self.labels = (file.verdict.likely, file.verdict.impossible)
        self.vote_by = file.vote
        self.main_metric = self.reader.main_metric
        self._demonstrations = Demonstrations(
            file.instruction, tuple("\n".join(chain.lines(file.marks)) for chain in file.demonstrations)
        )
        self._step_verdicts, self._conclusion_verdicts = map(
            self._verdicts, (file.step_verdicts, file.conclusion_verdicts)
        )

    def _verdicts(self, verdicts: Verdicts) -> Demonstrations:
        def block(state: Judged) -> str:
            label = self.labels[(LIKELY, IMPOSSIBLE).index(state.verdict)]
            working = "\n".join(line.strip() for line in state.working)
            lines = [f"{self.verdict_opening} {working}"] if working else []
            return "\n".join([*state.lines(self.file.marks), *lines, f"{self.verdict_cue} {label}"])

        return Demonstrations(verdicts.instruction, tuple(map(block, verdicts.demonstrations)))

    def read_row(self, row: dict[str, Any], place: str) -> Question | None:
        """The question of one row, or None for a row that is no data (a header). Raises DataError naming `place`."""
        header = self.file.rows.header
        is_header = bool(header) and all(row.get(column) == value for column, value in header.items())
        if is_header or (row and all(value in (None, "") for value in row.values())):  # an empty line of a table
            return None
        text = self._question_text(row, place)
        return Question(row_id(row, text, place), text, self._gold(row, place))

    def _question_text(self, row: dict[str, Any], place: str) -> str:
        columns = self.file.rows.question
        for joined in columns:
            if isinstance(joined, tuple) and row.get(joined[0]) is not None:
                parts = [row.get(column) for column in joined]
                if not all(isinstance(part, str) for part in parts):
                    raise DataError(
                        f"{place}: expected text in {' and '.join(map(repr, joined))} ({columns_hint(row, QUESTION_KEY)})"
                    )
                text = " ".join(str(part).strip() for part in parts).strip()
                if not text:
                    raise DataError(f"{place}: the question is empty; delete the row")
                return text
        return row_text(
            row, [column for column in columns if isinstance(column, str)] or columns[0], place, QUESTION_KEY
        )

    def _gold(self, row: dict[str, Any], place: str) -> str | None:
        rows = self.file.rows
        value = first_value(row, rows.answer)
        if value is None or value == "":  # as in test sets
            return None
        try:
            after = rows.answer_after
            return self.reader.gold(value.rpartition(after)[2] if after and isinstance(value, str) else value)
        except ValueError as error:
            what = rows.answer[0].lower()
            raise DataError(f"{place}: the {what} {value!r} {error}; mend it, or leave the {what} out") from None

    def parse_answer(self, line: str) -> str | None:
        """The normalised answer of an answer line, or None if it is not one or holds no readable answer."""
        return self.reader.read(fold(line).removeprefix(fold(self.answer_mark))) if self.is_answer_line(line) else None

    def score_answer(self, answer: str | None, gold: str) -> dict[str, float]:
        """Every metric that applies, each from 0 to 1. Both sides are normalised first. None scores 0 everywhere."""
        return self.reader.scores(answer, gold)

    def may_repeat(self, row: dict[str, Any]) -> bool:
        """Whether the format of `row` gives one question in several rows, or no ids to tell equal questions apart."""
        rows = self.file.rows
        answer = str(first_value(row, rows.answer))
        return bool(rows.answer_after and rows.answer_after in answer) or any(key in row for key in rows.repeated_with)

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
            question = replace(question, place=place)
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

    def unreadable_gold(self, questions: Sequence[Question]) -> str:
        """A sentence on reference answers that a chain cannot give, because it would not be understood; "" without any."""
        graded = [(each, each.gold) for each in questions if each.gold is not None]
        bad = [
            (each.place, gold)
            for each, gold in graded
            if not self.is_correct(self.parse_answer(f"{self.answer_mark} {gold}"), gold)
        ]
        if not bad or (len(bad) == len(graded) and self.reader.finds_parts):
            return ""
        (place, gold), kind = bad[0], self.file.answer.kind
        remedy = "mend them, or answer.pattern" if kind == "regex" else "mend them"
        return (
            f"{len(bad)} of {len(graded)} reference answers cannot be read by answer.kind={kind}, so that whatever is "
            f"answered counts as wrong: the first is {place}, {gold!r}; {remedy}"
        )

    def is_correct(self, answer: str | None, gold: str) -> bool:
        """Whether an answer is right by the main metric, which None never is."""
        return answer is not None and self.score_answer(answer, gold)[self.main_metric] == 1.0

    # each of the three ends with a blank line
    @property
    def few_shot(self) -> str:
        """The demonstrations, shared by every question."""
        return self._demonstrations.text(self.demonstration_seed)

    @property
    def few_shot_evaluator(self) -> str:
        """The verdicts on steps, shared by every state that ends in a step."""
        return self._step_verdicts.text(self.evaluator_seed)

    @property
    def few_shot_conclusion_evaluator(self) -> str:
        """The verdicts on answers, shared by every state that ends in an answer line."""
        return self._conclusion_verdicts.text(self.evaluator_seed)

    def prompt(self, question: Question) -> str:
        """Few-shot text and the question. Ends in a newline, and the first thought follows."""
        return f"{self.few_shot}{self.question_mark} {question.text}\n"

    def evaluator_prompt(self, question: Question, lines: Sequence[str]) -> str:
        """Few-shot verdicts and the state to judge. Ends in `verdict_opening`, and a label or a working follows.

        A state whose last line (of `lines`, its thoughts) is an answer line gets the demonstrations for conclusions.
        """
        concludes = bool(lines) and self.is_answer_line(lines[-1])
        few_shot = self.few_shot_conclusion_evaluator if concludes else self.few_shot_evaluator
        # whitespace around a line aside: a verdict is about what it says, and its tokens are not trained
        state = "".join(f"{line.strip()}\n" for line in lines)
        return f"{few_shot}{self.question_mark} {question.text}\n{state}{self.verdict_opening}"

    def is_answer_line(self, line: str) -> bool:
        return begins(line, self.answer_mark)

    def leaves_question(self, line: str) -> bool:
        """Whether a thought starts another question, as a model does that runs on in the few-shot format."""
        return line.strip().startswith((self.question_mark, *_QUESTION_MARKS))
