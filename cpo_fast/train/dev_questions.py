"""Questions that greedy chains are asked in every validation, and the share of them that is answered as it should be.

    train.stop_on: accuracy    the reference answers of the questions in train.dev_path (or task.path)
    train.stop_on: agreement   the votes of search trees: those in train.dev_trees, or those of the held-out questions in
                               data.path. No reference answer is read, of a tree neither

Either chooses among adapters and touches neither search nor pairs. A preference loss can fall while a model collapses. What
a chain answers shows that, and the model's own votes on unlabelled questions need no gold to compare with.

Some votes are wrong, and a model that learns past them has lost nothing. So chains are sampled before training: where they
give the vote far more often than the answer that a chain gives now, that answer contradicts what the model was sure of.
"""

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from cpo_fast.config import Config
from cpo_fast.data.examples import Example, Ids
from cpo_fast.data.pair_files import TreeFileReader
from cpo_fast.errors import ConfigError, DataError, failure_detail
from cpo_fast.evaluate.chain import chain_search
from cpo_fast.evaluate.evaluation import chains_side_by_side
from cpo_fast.search.collect import build_engine, configured_engine
from cpo_fast.tasks import Prompts, load_questions, load_task
from cpo_fast.train.communication import Communicator
from cpo_fast.tree import SearchTree

logger = logging.getLogger(__name__)


# questions: of fewer, too few are contradicted to tell a collapse before the loss, and forgotten votes tell more
MIN_SAMPLED = 400
Counts = Mapping[str, int]  # how often each answer came of a question's sampled chains


@dataclass(frozen=True)
class Asked:
    """What chains answered at one validation: a truth value for each question.

    Attributes:
        as_expected: the answer is the expected one. answered: the chain comes to an answer at all.
        contradicted: the answer contradicts a vote that the model was sure of before training. None where nothing was
            sampled.
    """

    as_expected: list[bool]
    answered: list[bool]
    contradicted: list[bool] | None


@dataclass(frozen=True)
class DevQuestion:
    """A question's whole prompt in ids, and the normalised answer that a chain should give."""

    id: str
    prompt_ids: Ids
    expected: str


class DevQuestions:
    """What `train.stop_on` asks, and of whom the expected answers are.

    Attributes:
        metric: `accuracy` or `agreement`, the name of the share in `metrics.jsonl` behind `eval_`.
        source: the file, as messages name it.
        sampled: for each question what its sampled chains answered before training. None until `sample`.
    """

    def __init__(
        self, config: Config, prompts: Prompts, metric: str, source: str, asked: Sequence[DevQuestion]
    ) -> None:
        self.config, self.prompts, self.metric, self.source = config, prompts, metric, source
        self.questions = list(asked)
        self.sampled: list[Counts] | None = None

    def is_as_expected(self, answer: str | None, expected: str) -> bool:
        """By the task's main metric against a reference answer, equal after normalisation (as a vote counts) to a vote."""
        return answer == expected if self.metric == "agreement" else self.prompts.task.is_correct(answer, expected)

    def num_shared(self, examples: Sequence[Example]) -> int:
        """How many of the questions the examples are about: a question's prompt begins the sequences of its examples."""
        first = {example.group: example.prompt_ids for example in examples}
        trained = set[Ids]()
        for length in {len(question.prompt_ids) for question in self.questions}:
            trained |= {ids[:length] for ids in first.values()}
        return sum(question.prompt_ids in trained for question in self.questions)

    def digest(self) -> str:
        """16 hex digits of what an alarm compares answers with: another one cannot go on from its state."""
        asked = [(question.id, question.expected) for question in self.questions]
        num_chains = self.config.train.alarm_chains if self.is_sampled else 0
        return hashlib.sha256(json.dumps([self.metric, num_chains, asked]).encode()).hexdigest()[:16]

    @property
    def is_sampled(self) -> bool:
        """Whether chains are to be sampled before training."""
        is_asked_for = self.metric == "agreement" and self.config.train.alarm_chains > 0
        return is_asked_for and len(self.questions) >= MIN_SAMPLED

    def sample(self, model: Any, communicator: Communicator) -> None:
        """Sample `train.alarm_chains` of every question, which the ranks take in turn. To be called before training.

        Raises:
            ConfigError: a rank could ask none of its questions.
        """
        rank, num_ranks = communicator.rank, communicator.world_size
        numbers = range(self.config.train.alarm_chains)
        mine = self.questions[rank::num_ranks]
        chains = {
            f"{question.id}, chain {number}": (question.prompt_ids, f"{self.config.seed}/{question.id}/{number}")
            for question in mine
            for number in numbers
        }
        answers = self._answers(model, chains)
        given = [[answers[f"{question.id}, chain {number}"] for number in numbers] for question in mine]
        counts = [dict(Counter(answer for answer in row if answer is not None)) for row in given]
        everyones = communicator.gather_objects(counts)
        self.sampled = [everyones[place % num_ranks][place // num_ranks] for place in range(len(self.questions))]

    def ask(self, model: Any, communicator: Communicator) -> Asked:
        """Ask every question, which the ranks take in turn.

        Raises:
            ConfigError: a rank could ask none of its questions.
        """
        rank, num_ranks = communicator.rank, communicator.world_size
        asked = self.questions[rank::num_ranks]
        answers = self.answers(model, asked)
        flags = torch.zeros(3, -(-len(self.questions) // num_ranks), dtype=torch.int64)
        for place, question in enumerate(asked):
            answer = answers[question.id]
            flags[0, place], flags[1, place] = self.is_as_expected(answer, question.expected), answer is not None
            if self.sampled is not None:
                counts = self.sampled[rank + place * num_ranks]
                flags[2, place] = contradicts(answer, question.expected, counts, self.config.train.alarm_chains)
        gathered = communicator.gather(flags.reshape(-1).to(communicator.device)).cpu().view(num_ranks, 3, -1)
        columns = gathered.permute(1, 2, 0).reshape(3, -1)[:, : len(self.questions)].bool().tolist()
        return Asked(columns[0], columns[1], None if self.sampled is None else columns[2])

    def answers(self, model: Any, questions: Sequence[DevQuestion]) -> dict[str, str | None]:
        """What a greedy chain of the model answers to each of these questions, by its id; None where it comes to no answer.

        Raises:
            ConfigError: none could be asked.
        """
        return self._answers(model, {question.id: (question.prompt_ids, None) for question in questions})

    def _answers(self, model: Any, chains: Mapping[str, tuple[Ids, str | None]]) -> dict[str, str | None]:
        """Of every chain the answer, by its name. Given are its prompt, and what it is sampled by, None if it is greedy."""
        config, prompts = self.config, self.prompts
        caps = (config.eval.max_new_tokens, config.search.max_steps)
        found: dict[str, str | None] = dict.fromkeys(chains)
        if not found:
            return found
        searches = (
            (name, chain_search(prompts.tokenizer, prompt_ids, prompts.task, *caps, sampled))
            for name, (prompt_ids, sampled) in chains.items()
        )
        # an engine of its own each time, no larger than it must be: its memory is training's again afterwards
        num_side_by_side = min(len(found), config.eval.batch_size)
        longest = max(len(prompt_ids) for prompt_ids, _ in chains.values()) + config.eval.max_new_tokens
        max_tokens = sum(map(len, prompts.prefixes)) + num_side_by_side * longest
        make_engine = partial(configured_engine, keep_modules=True, max_tokens=max_tokens)
        engine = build_engine(chains_side_by_side(config), prompts, model, make_engine)
        refused = []
        for name, chain, _ in engine.run(searches):
            if isinstance(chain, Exception):
                refused.append(f"'{name}': {failure_detail(chain)}")
            else:
                found[name] = chain.answer(prompts.task)
        if len(refused) == len(found):
            raise ConfigError(
                f"train.stop_on={self.metric}: no question of {self.source} could be asked; the first, {refused[0]}"
            )
        if refused:
            logger.warning(
                "%d of %d chains could not be asked and come to no answer; the first, %s",
                len(refused),
                len(found),
                refused[0],
            )
        return found


def contradicts(answer: str | None, vote: str, sampled: Counts, num_chains: int) -> bool:
    """Whether the vote leads this answer by at least half of so many sampled chains, of which there is one at least.

    Where a vote is wrong, chains of the model that voted seldom give it so much more often than the right answer.
    """
    lead = sampled.get(vote, 0) - (0 if answer is None else sampled.get(answer, 0))
    return 2 * lead >= num_chains


def load_dev_questions(
    config: Config, tokenizer: Any, trained: Sequence[Example], held_out: Sequence[Example], vocabulary: int
) -> DevQuestions | None:
    """The questions of `train.stop_on`, or None where the held-out loss decides. Warns of those that are trained on.

    Args:
        config: sections data, task, train and, for the chains, eval and search.
        trained, held_out: the examples on either side. vocabulary: embeddings of the model.

    Raises:
        ConfigError: there are no such questions. DataError: a file cannot be used.
    """
    stop_on = config.train.stop_on
    if stop_on == "held_out_loss":
        return None
    found = (_with_answers if stop_on == "accuracy" else _with_votes)(config, tokenizer, held_out)
    for question in found.questions:
        if max(question.prompt_ids) >= vocabulary:
            raise DataError(
                f"{found.source}: the prompt of '{question.id}' has token id {max(question.prompt_ids)}, outside the "
                f"model's {vocabulary} embeddings; its trees were searched with another tokenizer"
            )
    num_chains = config.train.alarm_chains if "alarm_chains" in config.train.model_fields_set else 0
    if num_chains and stop_on == "agreement" and not found.is_sampled:
        logger.warning(
            "train.alarm_chains=%d: of %d questions no chains are sampled, because fewer than %d contradict too little to "
            "tell a collapse in time; the alarm counts forgotten votes",
            num_chains,
            len(found.questions),
            MIN_SAMPLED,
        )
    num_shared = found.num_shared(trained)
    if num_shared:
        logger.warning(
            "%s: %d of its %d questions are trained on too, so train.stop_on=%s chooses partly by what was learnt by "
            "heart; set train.%s to a file of other questions",
            found.source,
            num_shared,
            len(found.questions),
            stop_on,
            "dev_path" if stop_on == "accuracy" else "dev_trees",
        )
    return found


def _with_answers(config: Config, tokenizer: Any, held_out: Sequence[Example]) -> DevQuestions:
    section = config.task.asking(config.train.dev_path)
    task, questions = load_questions(config.model_copy(update={"task": section}))
    if sentence := task.unreadable_gold(questions):
        logger.warning("%s", sentence)
    prompts = Prompts(task, tokenizer, section.chat)
    asked = [
        DevQuestion(question.id, tuple(prompts.encode(question)), question.gold)
        for question in questions
        if question.gold is not None
    ]
    if not asked:
        key = "train.dev_path" if config.train.dev_path else "task.path"
        raise ConfigError(f"train.stop_on=accuracy needs questions with reference answers in {key}")
    return DevQuestions(config, prompts, "accuracy", section.path, asked)


def _with_votes(config: Config, tokenizer: Any, held_out: Sequence[Example]) -> DevQuestions:
    trees, reader = voted_trees(config, held_out)
    prompts = Prompts(load_task(config), tokenizer, config.task.chat)
    asked = [
        DevQuestion(tree.id, tuple(tree.root_ids(reader.prompts[tree.prompt_hash])), tree.answer or "")
        for tree in trees
    ]
    return DevQuestions(config, prompts, "agreement", config.train.dev_trees or config.data.path, asked)


def voted_trees(config: Config, held_out: Sequence[Example]) -> tuple[list[SearchTree], TreeFileReader]:
    """The trees whose votes are compared with, at least one, and the reader of their file.

    Those of `train.dev_trees`, or of the held-out questions of `data.path`; with `train.dev_path` those of its questions.

    Raises:
        ConfigError: there are none, or they are of another task. DataError: the file cannot be used.
    """
    path = config.train.dev_trees or config.data.path
    trees, reader = _voted(config, path, held_out)
    task, dev_path = load_task(config), config.train.dev_path
    other = next((tree for tree in trees if tree.task != task.name), None)
    if other is not None:
        raise ConfigError(
            f"{path}: tree '{other.id}' is of task {other.task}, and the configuration's is {task.name}, which reads "
            "answers otherwise; set task.name or task.file to that of the trees"
        )
    if dev_path is not None:
        _, questions = load_questions(config.model_copy(update={"task": config.task.asking(dev_path)}))
        wanted = {(question.id, question.text) for question in questions}  # their reference answers are not looked at
        trees = [tree for tree in trees if (tree.id, tree.question) in wanted]
        if len(trees) < len(wanted):
            logger.warning(
                "stop_on=agreement: %d of the %d questions of %s have no vote in %s and are not asked",
                len(wanted) - len(trees),
                len(wanted),
                dev_path,
                path,
            )
    if not trees:
        raise ConfigError(
            f"stop_on=agreement: no question {f'of {dev_path} ' if dev_path else ''}has a vote in {path}; collect trees of "
            "questions that are not trained on and name their file in train.dev_trees"
        )
    return trees, reader


def _voted(config: Config, path: str, held_out: Sequence[Example]) -> tuple[list[SearchTree], TreeFileReader]:
    """Trees with a vote: of `train.dev_trees`, or of the held-out questions of `data.path`."""
    if config.train.dev_trees is None and (not path or not held_out):
        raise ConfigError(
            "train.stop_on=agreement needs votes on questions that are not trained on: set train.dev_trees to trees.jsonl "
            "of other questions, or data.held_out where data.path is a trees.jsonl"
        )
    try:
        reader = TreeFileReader(Path(path))
    except DataError as error:
        if config.train.dev_trees is not None:
            raise
        raise ConfigError(
            f"train.stop_on=agreement takes the votes of held-out trees from data.path, which holds no trees ({error}); "
            "set train.dev_trees to a trees.jsonl"
        ) from None
    names = None if config.train.dev_trees is not None else {example.group for example in held_out}
    voted = (tree for tree in reader.trees if tree.winning_nodes and tree.answer is not None)
    return [tree for tree in voted if names is None or tree.id in names], reader
