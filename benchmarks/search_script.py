"""What searches ask of an engine, written down: prompts, and how many tokens every sample has.

A script is either recorded from a real search or drawn at random in the shape of one. Every contestant plays the same
script with its lengths forced, so that speed is compared and not the luck of sampling: sample j of a call is generated
until it has `lengths[j]` tokens, whatever they are, and the next level's prompts stand in the script.
"""

import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from cpo_fast.config import Config, SearchConfig
from cpo_fast.search.collect import build_engine
from cpo_fast.search.engine import Answer, Requests, Sample, SampleRequest, ScoreRequest, Search
from cpo_fast.search.tree_search import search_question
from cpo_fast.tasks import Prompts, Question, Task

Ids = tuple[int, ...]
TEMPERATURE = 0.9  # of every contestant


@dataclass(frozen=True)
class Call:
    """All that is asked about one prompt at one time: samples of these lengths, or the log-probs of these labels."""

    prompt: Ids
    lengths: Ids = ()
    labels: tuple[Ids, ...] = ()

    @property
    def num_tokens(self) -> int:
        """Tokens that are generated."""
        return sum(self.lengths)


@dataclass(frozen=True)
class Level:
    """One step of one question: its states' samples, then the verdicts on them."""

    thoughts: tuple[Call, ...]
    verdicts: tuple[Call, ...]


@dataclass(frozen=True)
class Script:
    """Searches of several questions.

    Attributes:
        shared: prompts that all questions begin with (few-shot, evaluator).
        questions: the levels of each.
    """

    shared: tuple[Ids, ...]
    questions: tuple[tuple[Level, ...], ...]

    def calls(self, kind: str | None = None) -> list[Call]:
        """Every call of a kind (`thoughts` or `verdicts`; None: both), question by question, level by level."""
        kinds = ("thoughts", "verdicts") if kind is None else (kind,)
        return [
            call for levels in self.questions for level in levels for name in kinds for call in getattr(level, name)
        ]

    @property
    def num_tokens(self) -> int:
        """Tokens that are generated in all."""
        return sum(call.num_tokens for call in self.calls())

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of all prompts, one prompt for each sample or scored label: what an engine without sharing reads."""
        return sum(len(call.prompt) * (len(call.lengths) or len(call.labels)) for call in self.calls())

    def searches(self, keep: bool = True) -> Iterator[tuple[str, Search[int]]]:
        """The script as searches for an engine; each returns how many tokens it was given."""
        for number, levels in enumerate(self.questions):
            yield str(number), _play(f"q{number}", levels, keep)


def requests(call: Call, name: str, temperature: float = TEMPERATURE) -> tuple[SampleRequest | ScoreRequest, ...]:
    """A call as items of an ask; an engine without stops generates exactly `lengths` tokens."""
    if call.labels:
        return (ScoreRequest(call.prompt, call.labels),)
    return tuple(
        SampleRequest(call.prompt, f"{name}/{index}", temperature, 1.0, length)
        for index, length in enumerate(call.lengths)
    )


def _play(name: str, levels: tuple[Level, ...], keep: bool) -> Search[int]:
    total = 0
    for depth, level in enumerate(levels):
        for kind, calls in (("thoughts", level.thoughts), ("verdicts", level.verdicts)):
            items = tuple(
                item for place, call in enumerate(calls) for item in requests(call, f"{name}/{depth}/{kind}/{place}")
            )
            answers = yield Requests(items, keep=keep and kind == "thoughts")
            total += sum(answer.num_tokens for answer in answers if isinstance(answer, Sample))
    return total


def record_script(
    model: Any, tokenizer: Any, task: Task, questions: Iterable[Question], settings: SearchConfig, seed: int = 0
) -> Script:
    """Search real questions with the configured engine and write down what was asked, and how long each answer was."""
    logs: list[list[tuple[Requests, list[Answer]]]] = []
    config, prompts = Config(seed=seed, search=settings), Prompts(task, tokenizer)

    def searches() -> Iterator[tuple[str, Search[Any]]]:
        for question in questions:
            log: list[tuple[Requests, list[Answer]]] = []
            logs.append(log)
            yield question.id, _logged(search_question(config, prompts, question), log)

    engine = build_engine(settings, prompts, model)
    for name, tree, _ in engine.run(searches()):
        if tree.status == "failed":
            raise RuntimeError(f"the search of {name} failed: {tree.detail}")
    levels = []
    for log in logs:
        asks = [(ask.keep, _calls(ask, answers)) for ask, answers in log]
        thoughts = [calls for keep, calls in asks if keep]
        verdicts = [calls for keep, calls in asks if not keep]
        verdicts += [()] * (len(thoughts) - len(verdicts))  # nothing new to judge in a level of duplicates
        levels.append(tuple(Level(*pair) for pair in zip(thoughts, verdicts, strict=True)))
    return Script(tuple(map(tuple, prompts.prefixes)), tuple(levels))


def _logged(search: Search[Any], log: list[tuple[Requests, list[Answer]]]) -> Search[Any]:
    answers: list[Answer] | None = None
    result = None
    finished = False
    while not finished:
        try:
            ask = next(search) if answers is None else search.send(answers)
        except StopIteration as stop:
            result, finished = stop.value, True
        else:
            answers = yield ask
            log.append((ask, answers))
    return result


def _calls(ask: Requests, answers: list[Answer]) -> tuple[Call, ...]:
    """Items of an ask by their prompt, in order of first appearance."""
    lengths: dict[Ids, list[int]] = {}
    labels: dict[Ids, tuple[Ids, ...]] = {}
    for item, answer in zip(ask.items, answers, strict=True):
        if isinstance(item, ScoreRequest):
            labels[item.token_ids] = item.continuations
        else:
            assert isinstance(answer, Sample)
            lengths.setdefault(item.token_ids, []).append(answer.num_tokens)
    return tuple(
        [Call(prompt, lengths=tuple(counts)) for prompt, counts in lengths.items()]
        + [Call(prompt, labels=marks) for prompt, marks in labels.items()]
    )


@dataclass(frozen=True)
class SearchShape:
    """Sizes of a search that is drawn at random. Lengths in tokens; a pair is a range, both ends included."""

    few_shot: int = 450
    evaluator: int = 700
    question: tuple[int, int] = (30, 70)
    thought: tuple[int, int] = (20, 60)
    verdict: tuple[int, int] = (2, 4)
    num_candidates: int = 10
    num_kept: int = 5
    depth: int = 4
    num_verdicts: int = 5  # 0: two labels are scored instead
    vocab_size: int = 32000


TINY_SHAPE = SearchShape(
    few_shot=20, evaluator=25, question=(3, 6), thought=(2, 6), num_candidates=3, num_kept=2, depth=2, num_verdicts=2,
    vocab_size=97,
)  # fmt: skip


def draw_script(shape: SearchShape, num_questions: int, seed: int = 0) -> Script:
    """Searches of random tokens: all candidates differ, the first `num_kept` of a level are continued."""
    generator = random.Random(seed)

    def ids(count: int) -> Ids:
        return tuple(generator.randrange(3, shape.vocab_size) for _ in range(count))

    def length(bounds: tuple[int, int]) -> int:
        return generator.randint(*bounds)

    few_shot, evaluator = ids(shape.few_shot), ids(shape.evaluator)
    labels = (ids(1), ids(2))
    questions = []
    for _ in range(num_questions):
        question = ids(length(shape.question))
        states: list[Ids] = [()]
        levels = []
        for _ in range(shape.depth):
            thoughts, verdicts, children = [], [], []
            for state in states:
                lengths = tuple(length(shape.thought) for _ in range(shape.num_candidates))
                thoughts.append(Call(few_shot + question + state, lengths))
                children += [state + ids(count) for count in lengths]
            for child in children:
                prompt = evaluator + question + child
                if shape.num_verdicts:
                    verdicts.append(Call(prompt, tuple(length(shape.verdict) for _ in range(shape.num_verdicts))))
                else:
                    verdicts.append(Call(prompt, labels=labels))
            levels.append(Level(tuple(thoughts), tuple(verdicts)))
            generator.shuffle(children)
            states = children[: shape.num_kept]
        questions.append(tuple(levels))
    return Script((few_shot, evaluator), tuple(questions))
