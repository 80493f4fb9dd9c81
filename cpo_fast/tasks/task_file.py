"""A task as a YAML file: the words of its prompts, how its rows and answers are read, and what decides a vote.

The data sets that ship are such files beside this one. Every value is text to YAML and typed by its key here, so that
`answer: no` is the word and `answer: 012` keeps its zero. `docs/tasks.md` shows how to write one.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from cpo_fast.errors import ConfigError
from cpo_fast.tasks.folding import fold
from cpo_fast.tasks.reading import AnswerReader, ChoiceReader, ExactReader, NumberReader, PatternReader, TextReader

# ends every evaluator prompt; naming both labels leaves fewer verdicts that are something else (seen with a 135M
# model, which after a bare "Verdict:" tends to write the answer)
VERDICT_CUE = "Is the last line likely or impossible? It is"
LIKELY = "likely"
IMPOSSIBLE = "impossible"


class Part(BaseModel):
    """Base of every part of a task file: unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Marks(Part):
    """What stands before the parts of a prompt."""

    question: str = Field("Question:", description="before every question")
    step: str = Field("Step {n}:", description="before every step; {n} is its number")
    answer: str = Field("Answer:", description="before every answer; a line that starts with it ends a chain")

    @field_validator("*")
    @classmethod
    def _is_one_line(cls, mark: str) -> str:
        if not mark or mark != mark.strip() or "\n" in mark:
            raise ValueError("expected one line without spaces around it")
        return mark

    @model_validator(mode="after")
    def _tells_lines_apart(self) -> "Marks":
        if "{n}" not in self.step:
            raise ValueError("step: expected {n}, the number of the step, in the mark")
        if any(mark.startswith(self.answer) for mark in (self.question, self.step)):
            raise ValueError("answer: a line of another kind would start with this mark")
        return self


class VerdictWords(Part):
    """How the model is asked to judge the last line, and the two labels it may give."""

    cue: str = Field(
        VERDICT_CUE,
        description="what one of the labels follows; ends every evaluator prompt, if verdicts have no working",
    )
    likely: str = Field(LIKELY, description="the label of a line that is right")
    impossible: str = Field(IMPOSSIBLE, description="the label of a line that is wrong")
    working: str = Field(
        "Check:", description="opens the working and ends every evaluator prompt, if verdicts have one"
    )

    @model_validator(mode="after")
    def _labels_differ(self) -> "VerdictWords":
        texts = (self.cue, self.likely, self.impossible, self.working)
        if any(not text or text != text.strip() or "\n" in text for text in texts):
            raise ValueError("expected one line without spaces around it for the cue, the working and each label")
        if _one_begins_the_other(self.likely.lower(), self.impossible.lower()):
            raise ValueError("neither label may begin with the other: the model could not choose between them")
        return self


def begins(line: str, mark: str) -> bool:
    """Whether a line begins with a mark, as people read both."""
    return fold(line).startswith(fold(mark))


def _one_begins_the_other(one: str, other: str) -> bool:
    return begins(one, other) or begins(other, one)


class Rows(Part):
    """Which columns of a data file are read. The id is that of `id`, `_id`, `ID`, `unique_id`, `uid` or `qid`."""

    question: tuple[str | tuple[str, ...], ...] = Field(
        ("question",),
        min_length=1,
        description="columns of the question: the first one that a row has; a list in the list is joined by spaces",
    )
    answer: tuple[str, ...] = Field(("answer",), description="columns of the reference answer, which a row may lack")
    answer_after: str = Field(
        "", description="the reference answer is what follows the last such mark; rows with it may repeat a question"
    )
    repeated_with: tuple[str, ...] = Field(
        (), description="rows with one of these columns may repeat a question word for word and are merged"
    )
    header: dict[str, str] = Field({}, description="a row with all of these values is no question and is left out")


class Answer(Part):
    """How an answer is read, and when two are equal."""

    kind: Literal["number", "text", "choice", "regex", "exact"] = Field(
        description="number: the one number in it; text: its words, without case, articles and punctuation; choice: one of "
        "`choices`; regex: what `pattern` finds; exact: all of it, as written"
    )
    choices: dict[str, tuple[str, ...]] = Field({}, description="with choice: each answer, and its other spellings")
    pattern: str = Field(
        "", description="with regex: a Python pattern; its first group is the answer, or all without one"
    )
    correct: Literal["containment", "exact"] = Field(
        "containment", description="with text: right if it contains the reference, or only if it equals it"
    )

    @model_validator(mode="after")
    def _has_what_its_kind_needs(self) -> "Answer":
        for key, kind in (("choices", "choice"), ("pattern", "regex")):
            if bool(getattr(self, key)) != (self.kind == kind):
                raise ValueError(f"{key}: {'needed' if self.kind == kind else 'used'} with kind {kind} alone")
        if "correct" in self.model_fields_set and self.kind != "text":
            raise ValueError("correct: used with kind text alone")
        self.reader()
        return self

    def reader(self) -> AnswerReader:
        """What reads answers in this way. Raises ValueError for a pattern or choices that cannot be used."""
        if self.kind == "choice":
            return ChoiceReader(self.choices)
        if self.kind == "regex":
            return PatternReader(self.pattern)
        if self.kind == "text":
            return TextReader(self.correct)
        return NumberReader() if self.kind == "number" else ExactReader()


class Chain(Part):
    """One worked example."""

    question: str = Field(description="the question")
    steps: tuple[str, ...] = Field((), description="its steps, without their marks")
    answer: str | None = Field(None, description="its answer, without the mark")

    @model_validator(mode="after")
    def _has_no_blank_line(self) -> "Chain":
        if not self.question.strip() or any(not line.strip() for line in self.question.strip().split("\n")):
            raise ValueError("question: empty, or a blank line in it")
        if any(not line.strip() or "\n" in line.strip() for line in (*self.steps, self.answer or "-")):
            raise ValueError("a step and an answer are one line each")
        return self

    def lines(self, marks: Marks) -> list[str]:
        """Its lines as a model reads and writes them."""
        steps = [f"{marks.step.replace('{n}', str(n))} {step.strip()}" for n, step in enumerate(self.steps, start=1)]
        answer = [] if self.answer is None else [f"{marks.answer} {self.answer.strip()}"]
        return [f"{marks.question} {self.question.strip()}", *steps, *answer]


class Judged(Chain):
    """A state, and whether its last line is right."""

    verdict: Literal["likely", "impossible"] = Field(description="likely: its last line is right; impossible: wrong")
    working: tuple[str, ...] = Field(
        (), description="lines of working before the verdict; every worked verdict of the file has them, or none has"
    )

    @model_validator(mode="after")
    def _has_a_working_of_lines(self) -> "Judged":
        if any(not line.strip() or "\n" in line.strip() for line in self.working):
            raise ValueError("working: a list of lines, none of them blank")
        return self


class Verdicts(Part):
    """Worked verdicts."""

    instruction: str = Field(description="what is asked, before the worked verdicts")
    demonstrations: tuple[Judged, ...] = Field(description="states with their verdicts, half of each; [] for none")


class TaskFile(Part):
    """The whole file."""

    instruction: str = Field(description="what is asked, before the demonstrations")
    rows: Rows = Field(Rows(), description="how a row of a data file is read")
    answer: Answer = Field(description="how an answer is read and scored")
    vote: Literal["value", "count"] = Field(
        "value", description="what wins a tree's vote: the largest sum of values, or the most chains"
    )
    marks: Marks = Field(Marks(), description="what stands before a question, a step and an answer")
    verdict: VerdictWords = Field(VerdictWords(), description="the evaluator's question and its two labels")
    demonstrations: tuple[Chain, ...] = Field(description="worked chains, each with its answer; [] for none")
    step_verdicts: Verdicts = Field(description="verdicts on steps: demonstrations without an answer")
    conclusion_verdicts: Verdicts = Field(description="verdicts on answers: demonstrations with an answer")

    @model_validator(mode="after")
    def _demonstrations_can_be_read(self) -> "TaskFile":
        reader = self.answer.reader()
        judged = self.conclusion_verdicts.demonstrations
        for key, chains in (("demonstrations", self.demonstrations), ("conclusion_verdicts.demonstrations", judged)):
            for number, chain in enumerate(chains, start=1):
                if chain.answer is None or reader.read(chain.answer) is None:
                    raise ValueError(
                        f"{key}: number {number} has no answer that is read as {self.answer.kind} ({chain.answer!r})"
                    )
        for number, state in enumerate(self.step_verdicts.demonstrations, start=1):
            if state.answer is not None or not state.steps:
                raise ValueError(f"step_verdicts.demonstrations: number {number} does not end in a step")
        return self

    @model_validator(mode="after")
    def _workings_can_be_told_apart(self) -> "TaskFile":
        if self.has_workings and _one_begins_the_other(self.verdict.cue, self.verdict.working):
            raise ValueError("verdict: neither of cue and working may begin with the other")
        for key, verdicts in (("step", self.step_verdicts), ("conclusion", self.conclusion_verdicts)):
            for number, state in enumerate(verdicts.demonstrations, start=1):
                place = f"{key}_verdicts.demonstrations: number {number}"
                if bool(state.working) != self.has_workings:
                    has = "a" if state.working else "no"
                    raise ValueError(
                        f"{place} has {has} working, unlike the first of step_verdicts; give all one, or none"
                    )
                if any(
                    begins(line, mark) for line in state.working for mark in (self.verdict.cue, self.marks.question)
                ):
                    raise ValueError(f"{place} has a line of working that begins with verdict.cue or marks.question")
        return self

    @property
    def has_workings(self) -> bool:
        """Whether verdicts are written with a working before them."""
        return any(each.working for each in self.step_verdicts.demonstrations)


def read_task_file(path: str | Path) -> tuple[TaskFile, bytes]:
    """A task file and its bytes. Raises ConfigError naming the file, the line and the key."""
    try:
        content = Path(path).read_bytes()
        text = content.decode("utf-8-sig")
    except OSError as error:
        raise ConfigError(f"{path}: cannot read the task file ({error.strerror}); check task.file") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: the task file is not UTF-8 text; save it as UTF-8") from None
    loader = yaml.BaseLoader(text)  # every scalar is text: its key says what it is, not YAML's guesses
    try:
        node = loader.get_single_node()
        lines = dict(_lines(node, ())) if node is not None else {}
        values = loader.construct_document(node) if node is not None else None
    except yaml.YAMLError as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise ConfigError(f"{where}: not valid YAML ({problem or 'syntax error'}); check the quotes there") from None
    except _KeyTwice as error:
        raise ConfigError(f"{path}:{error}; delete one of them") from None
    except RecursionError:
        raise ConfigError(f"{path}: the task file is nested too deeply") from None
    finally:
        loader.dispose()
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: a task file holds keys such as 'instruction:'; see docs/tasks.md")
    try:
        return TaskFile.model_validate(values), content
    except ValidationError as error:
        raise ConfigError(_sentence(path, error.errors()[0], lines)) from None


class _KeyTwice(Exception):
    pass


def _lines(node: yaml.Node, place: tuple[str | int, ...]) -> Iterator[tuple[tuple[str | int, ...], int]]:
    """The line of every key and item, by its place."""
    yield place, node.start_mark.line + 1
    if isinstance(node, yaml.MappingNode):
        seen = set()
        for key, value in node.value:
            if key.value in seen:
                raise _KeyTwice(f"{key.start_mark.line + 1}: key '{key.value}' appears twice")
            seen.add(key.value)
            yield from _lines(value, (*place, key.value))
            yield (*place, key.value), key.start_mark.line + 1
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            yield from _lines(value, (*place, index))


def _sentence(path: str | Path, item: Any, lines: dict[tuple[str | int, ...], int]) -> str:
    place = tuple(item["loc"])
    known = next(place[:end] for end in range(len(place), -1, -1) if place[:end] in lines)
    key = ".".join(str(part + 1) if isinstance(part, int) else part for part in place)
    if item["type"] == "missing":
        problem = "is missing"
    elif item["type"] == "extra_forbidden":
        problem = "is no key of a task file"
    else:
        got = f", got {item['input']!r}" if isinstance(item["input"], str) else ""
        problem = item["msg"].removeprefix("Value error, ") + got
    return f"{path}:{lines[known]}: {f'{key}: ' if key else ''}{problem}; see docs/tasks.md"
