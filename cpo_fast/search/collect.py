"""Search every question of a task and write one tree each: resumable, bounded, and the same bytes on every run.

`run/trees.jsonl` gets one line a question in one append; `run/prompts/<hash>.json` the few-shot prompt, once;
`run/timings.jsonl` the seconds, which never go into a tree. A question whose search raises is recorded with status
`failed` and its reason, and the run goes on. Questions already in the file, failed ones included, are skipped: delete a
line to search its question again.
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
from cpo_fast.files import append_line, canonical_json
from cpo_fast.search.breadth_first import SearchOutcome, search_question
from cpo_fast.search.engine import Engine
from cpo_fast.search.evaluate import num_unparseable
from cpo_fast.search.tree_file import Provenance, TreeFile
from cpo_fast.tasks import Question, Task, common_prefix_length, encode_prompt, get_task
from cpo_fast.tree import Prompt, SearchTree

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
    prompt = Prompt.build(task.few_shot, encode_prompt(tokenizer, task.few_shot))
    provenance = _provenance(config, task, prompt, model)
    trees_path = Path(config.run) / "trees.jsonl"
    file = TreeFile(trees_path, provenance, questions)
    num_resumed = sum(question.id in file.trees for question in questions)
    prompt.save(trees_path)
    engine = _engine(config, task, model, tokenizer) if num_resumed < len(questions) else None
    started = time.perf_counter()
    for number, question in enumerate(questions, start=1):
        if engine is None or question.id in file.trees:
            continue
        question_started = time.perf_counter()
        tree = _search(config, task, question, prompt, provenance, engine, tokenizer)
        seconds = time.perf_counter() - question_started
        file.append(tree)
        append_line(Path(config.run) / "timings.jsonl", {"id": question.id, "seconds": round(seconds, 3)})
        if progress is not None:
            progress(number, len(questions), tree, seconds)
    file.order()
    trees = [file.trees[question.id] for question in questions]
    return _summary(trees_path, trees, task, num_resumed, time.perf_counter() - started)


def load_questions(config: Config) -> tuple[Task, list[Question]]:
    """The task and the questions that `config.task` names; imports no torch.

    Raises:
        ConfigError: `task.path` is empty or skips every question. DataError: the file is not usable.
    """
    task = get_task(config.task.name)
    if not config.task.path:
        raise ConfigError("task.path is empty; set it to the question file, such as SVAMP.json or a JSONL of questions")
    questions = task.load(config.task.path, config.task.num_questions, config.task.skip_questions)
    if not questions:
        raise ConfigError(f"task.skip_questions: {config.task.skip_questions} leaves no question of {config.task.path}")
    return task, questions


def _engine(config: Config, task: Task, model: Any, tokenizer: Any) -> Engine:
    from cpo_fast.search.engine.huggingface import HuggingFaceEngine

    engine = HuggingFaceEngine(model, tokenizer, config.search.batch_size)
    # what two unlike questions have in common is what all have in common; it must not depend on this run's questions,
    # or a restart would split its forwards elsewhere and round differently
    one, other = Question("", "A"), Question("", "7")
    for first, second in (
        (task.prompt(one), task.prompt(other)),
        (task.evaluator_prompt(one, ()), task.evaluator_prompt(other, ())),
    ):
        ids = encode_prompt(tokenizer, first)
        engine.cache_prefix(ids[: common_prefix_length(ids, encode_prompt(tokenizer, second))])
    return engine


def _search(
    config: Config,
    task: Task,
    question: Question,
    prompt: Prompt,
    provenance: Provenance,
    engine: Engine,
    tokenizer: Any,
) -> SearchTree:
    root_ids = encode_prompt(tokenizer, task.prompt(question))
    num_shared_tokens = common_prefix_length(prompt.token_ids, root_ids)
    detail = ""
    try:
        outcome = search_question(engine, tokenizer, task, question, root_ids, config.search, config.seed)
    except Exception as error:  # one bad question must not end a run of thousands; the reason is kept with the question
        logger.warning("question '%s' failed", question.id, exc_info=True)
        first_line = (str(error).splitlines() or [""])[0]
        detail = f"{type(error).__name__}: {first_line}"[:300]
        outcome = SearchOutcome(nodes=(), winning_nodes=(), answer=None, num_empty=0, status="failed")
    return SearchTree(
        id=question.id,
        question=question.text,
        gold=question.gold,
        num_shared_tokens=num_shared_tokens,
        question_token_ids=tuple(root_ids[num_shared_tokens:]),
        nodes=outcome.nodes,
        winning_nodes=outcome.winning_nodes,
        answer=outcome.answer,
        num_empty=outcome.num_empty,
        status=outcome.status,
        detail=detail,
        **asdict(provenance),
    )


def _provenance(config: Config, task: Task, prompt: Prompt, model: Any) -> Provenance:
    if config.model.path:
        from cpo_fast.models import adapter_hash, model_hash

        named, adapter = model_hash(config.model.path), adapter_hash(config.model.adapter)
    else:
        named, adapter = _weights_hash(model), ""
    settings = {
        "search": config.search.model_dump(mode="json", exclude={"batch_size"}),
        "dtype": config.model.dtype,
        "few_shot_evaluator": task.few_shot_evaluator,
    }
    settings_hash = hashlib.sha256(canonical_json(settings).encode()).hexdigest()[:16]
    return Provenance(task.name, prompt.hash, named, adapter, config.seed, settings_hash)


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
    with_gold = [(tree, tree.gold) for tree in trees if tree.gold is not None]
    return CollectResult(
        trees_path=str(trees_path),
        num_questions=len(trees),
        num_resumed=num_resumed,
        statuses=dict(Counter(tree.status for tree in trees)),
        num_thoughts=len(nodes),
        num_samples=sum(node.count for node in nodes) + sum(tree.num_empty for tree in trees),
        num_empty=sum(tree.num_empty for tree in trees),
        num_cut=sum(node.stop == "length" for node in nodes),
        num_winning_paths=sum(len(tree.winning_nodes) for tree in trees),
        num_verdicts=sum("label" in record for node in nodes for record in node.evaluations),
        num_unparseable=sum(num_unparseable(node.evaluations) for node in nodes),
        num_gold=len(with_gold),
        num_correct=sum(task.is_correct(tree.answer, gold) for tree, gold in with_gold),
        first_failure=next((f"{tree.id}: {tree.detail}" for tree in trees if tree.status == "failed"), ""),
        seconds=round(seconds, 3),
    )
