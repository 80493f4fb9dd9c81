"""Search every question of a task and write one tree each: resumable, bounded, and the same bytes on every run.

`run/trees.jsonl` gets one line a question in one append; `run/prompts/<hash>.json` the few-shot prompt, once;
`run/statistics.jsonl` the trees in numbers; `run/timings.jsonl` the seconds, which never go into a tree. A question whose
search raises (one that is longer than the model's context, for instance) is recorded with status `failed` and its
reason, and the run goes on. Questions already in the file, failed ones included, are skipped: delete a line to search
its question again.
"""

import hashlib
import logging
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cpo_fast.config import Config
from cpo_fast.errors import ConfigError
from cpo_fast.files import append_line, canonical_json, write_jsonl
from cpo_fast.search.build import build_engine
from cpo_fast.search.engine import Engine
from cpo_fast.search.evaluate import num_unparseable
from cpo_fast.search.grower import SearchOutcome
from cpo_fast.search.root import RootPrompts
from cpo_fast.search.statistics import tree_statistics
from cpo_fast.search.strategy import search_question
from cpo_fast.search.tree_file import Provenance, TreeFile
from cpo_fast.tasks import Question, Task, get_task
from cpo_fast.tree import SearchTree

logger = logging.getLogger(__name__)

# (number of the question from 1, how many questions, its tree, seconds it took)
Progress = Callable[[int, int, SearchTree, float], None]


@dataclass(frozen=True)
class CollectResult:
    """Summary of the trees of this run's questions.

    Attributes:
        trees_path: the file.
        num_questions: how many were asked; num_resumed of them were found in the file.
        statuses: how many trees per status.
        num_thoughts: nodes, duplicates merged. num_samples: generated thoughts, duplicates and empty ones counted.
        num_empty: samples dropped because they were only whitespace. num_cut: nodes cut at the token cap.
        num_winning_paths: over all trees.
        num_generated_tokens: of all samples and sampled verdicts. num_useful_tokens: of the thoughts on winning paths.
        num_verdicts, num_unparseable: sampled verdicts on distinct thoughts, and those that could not be read.
        num_gold: questions with a reference answer. num_correct: whose vote equals it; for information only.
        first_failure: reason of the first failed question, or "".
        seconds: wall time of this call's searches, loading left out.
    """

    trees_path: str
    num_questions: int
    num_resumed: int
    statuses: dict[str, int]
    num_thoughts: int
    num_samples: int
    num_empty: int
    num_cut: int
    num_winning_paths: int
    num_generated_tokens: int
    num_useful_tokens: int
    num_verdicts: int
    num_unparseable: int
    num_gold: int
    num_correct: int
    first_failure: str
    seconds: float

    @property
    def vote_accuracy(self) -> float | None:
        """Share of the questions with a reference answer whose vote equals it; None without any."""
        return self.num_correct / self.num_gold if self.num_gold else None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, `vote_accuracy` included."""
        return {**asdict(self), "vote_accuracy": self.vote_accuracy}


def collect(
    config: Config, model: Any = None, tokenizer: Any = None, progress: Progress | None = None
) -> CollectResult:
    """Run the search for every question of `config.task` that `run/trees.jsonl` does not hold yet.

    Args:
        config: `run`, `seed`, `model`, `task` and `search` are used.
        model, tokenizer: an already loaded pair; None loads `config.model`.
        progress: called after each question that was searched.

    Raises:
        ConfigError: no question file or no model is configured.
        DataError: the question file or the existing trees are not usable; see `TreeFile`.
    """
    task, questions = load_questions(config)
    if (model is None) != (tokenizer is None):
        raise ValueError("pass model and tokenizer together, or neither")
    if model is None:
        from cpo_fast.models import load_model

        model, tokenizer = load_model(config.model)
    roots = RootPrompts(task, tokenizer, config.task.chat)
    provenance = _provenance(config, task, roots, model)
    trees_path = Path(config.run) / "trees.jsonl"
    file = TreeFile(trees_path, provenance, questions)
    num_resumed = sum(question.id in file.trees for question in questions)
    roots.prompt.save(trees_path)
    engine: Engine | None = None
    if num_resumed < len(questions):
        engine = build_engine(task, model, tokenizer, config.search.batch_size, config.task.chat)
    started = time.perf_counter()
    for number, question in enumerate(questions, start=1):
        if engine is None or question.id in file.trees:
            continue
        question_started = time.perf_counter()
        tree = _search(config, task, question, roots, provenance, engine, tokenizer)
        seconds = time.perf_counter() - question_started
        file.append(tree)
        append_line(Path(config.run) / "timings.jsonl", {"id": question.id, "seconds": round(seconds, 3)})
        if progress is not None:
            progress(number, len(questions), tree, seconds)
    file.order()
    trees = [file.trees[question.id] for question in questions]
    write_jsonl(Path(config.run) / "statistics.jsonl", (tree_statistics(tree).to_dict() for tree in trees))
    return _summary(trees_path, trees, task, num_resumed, time.perf_counter() - started)


def load_task(config: Config) -> Task:
    """The task that `config.task` names, its demonstrations in the order that the configuration and the seed give."""
    return get_task(
        config.task.name,
        demonstration_seed=config.seed if config.task.shuffle_demonstrations else None,
        evaluator_seed=config.seed if config.search.shuffle_evaluator else None,
    )


def load_questions(config: Config) -> tuple[Task, list[Question]]:
    """The task and the questions that `config.task` names; imports no torch.

    Raises:
        ConfigError: `task.path` is empty or skips every question. DataError: the file is not usable.
    """
    task = load_task(config)
    if not config.task.path:
        raise ConfigError("task.path is empty; set it to the question file, such as SVAMP.json or a JSONL of questions")
    questions = task.load(config.task.path, config.task.num_questions, config.task.skip_questions)
    if not questions:
        raise ConfigError(f"task.skip_questions: {config.task.skip_questions} leaves no question of {config.task.path}")
    return task, questions


def _search(
    config: Config,
    task: Task,
    question: Question,
    roots: RootPrompts,
    provenance: Provenance,
    engine: Engine,
    tokenizer: Any,
) -> SearchTree:
    root_ids: list[int] = []
    question_prompt = detail = ""
    try:
        question_prompt, root_ids = roots.question_part(question), roots.encode(question)
        outcome = search_question(
            engine, tokenizer, task, question, root_ids, config.search, config.seed, config.task.chat
        )
    except Exception as error:  # one bad question must not end a run of thousands; the reason is kept with the question
        logger.warning("question %r failed", question.id, exc_info=True)
        first_line = (str(error).splitlines() or [""])[0]
        detail = f"{type(error).__name__}: {first_line}"[:300]
        outcome = SearchOutcome(nodes=(), winning_nodes=(), answer=None, num_empty=0, status="failed")
    num_shared_tokens = roots.num_shared_tokens(root_ids)
    return SearchTree(
        id=question.id,
        question=question.text,
        question_prompt=question_prompt,
        gold=question.gold,
        num_shared_tokens=num_shared_tokens,
        question_token_ids=tuple(root_ids[num_shared_tokens:]),
        nodes=outcome.nodes,
        winning_nodes=outcome.winning_nodes,
        answer=outcome.answer,
        num_empty=outcome.num_empty,
        status=outcome.status,
        detail=detail,
        num_thought_tokens=outcome.num_thought_tokens,
        num_verdict_tokens=outcome.num_verdict_tokens,
        **asdict(provenance),
    )


def _provenance(config: Config, task: Task, roots: RootPrompts, model: Any) -> Provenance:
    if config.model.path:
        from cpo_fast.models import adapter_hash, model_hash

        named, adapter = model_hash(config.model.path), adapter_hash(config.model.adapter)
    else:
        named, adapter = _weights_hash(model), ""
    settings = {
        "search": config.search.model_dump(mode="json", exclude={"batch_size"}),
        "dtype": config.model.dtype,
        "chat": config.task.chat,
        "few_shot_evaluators": [task.few_shot_evaluator, task.few_shot_conclusion_evaluator],
    }
    settings_hash = hashlib.sha256(canonical_json(settings).encode()).hexdigest()[:16]
    return Provenance(task.name, roots.prompt.hash, named, adapter, config.seed, settings_hash)


def _weights_hash(model: Any) -> str:
    """16 hex digits of the SHA-256 of a loaded model's parameters, for a model that came without files."""
    import torch

    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _summary(trees_path: Path, trees: list[SearchTree], task: Task, num_resumed: int, seconds: float) -> CollectResult:
    nodes = [node for tree in trees for node in tree.nodes]
    counted = [tree_statistics(tree) for tree in trees]
    with_gold = [(tree, tree.gold) for tree in trees if tree.gold is not None]
    return CollectResult(
        trees_path=str(trees_path),
        num_questions=len(trees),
        num_resumed=num_resumed,
        statuses=dict(Counter(tree.status for tree in trees)),
        num_thoughts=len(nodes),
        num_samples=sum(one.num_samples for one in counted),
        num_empty=sum(one.num_empty for one in counted),
        num_cut=sum(one.num_cut for one in counted),
        num_winning_paths=sum(one.num_winning for one in counted),
        num_generated_tokens=sum(one.num_generated_tokens for one in counted),
        num_useful_tokens=sum(one.num_useful_tokens for one in counted),
        num_verdicts=sum("label" in record for node in nodes for record in node.evaluations),
        num_unparseable=sum(num_unparseable(node.evaluations) for node in nodes),
        num_gold=len(with_gold),
        num_correct=sum(task.is_correct(tree.answer, gold) for tree, gold in with_gold),
        first_failure=next((f"{tree.id}: {tree.detail}" for tree in trees if tree.status == "failed"), ""),
        seconds=round(seconds, 3),
    )
