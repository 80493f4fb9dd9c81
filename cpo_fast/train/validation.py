"""Validation on held-out questions, the best adapter so far, and when to stop.

The starting point is validated before the first step and takes part: an adapter that is no better than it is never the best.
The held-out share is split off by question, so no prompt of a validated pair was trained on. The held-out loss chooses the
best adapter, or, because the loss can fall while a model collapses, greedy chain-of-thought accuracy on questions with
reference answers. Those answers choose among adapters here and never touch search or pairs.
"""

import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from cpo_fast import progress
from cpo_fast.adapters import save_adapter
from cpo_fast.config import Config
from cpo_fast.data.examples import Example
from cpo_fast.errors import ConfigError, NonFiniteError, failure_detail
from cpo_fast.evaluate.chain import chain_search
from cpo_fast.evaluate.evaluation import chains_side_by_side
from cpo_fast.files import file_digest
from cpo_fast.search.collect import build_engine, configured_engine
from cpo_fast.tasks import Prompts, load_questions
from cpo_fast.train.communication import Communicator
from cpo_fast.train.metrics import Metrics
from cpo_fast.train.objective import Objective
from cpo_fast.train.policy import Policy

logger = logging.getLogger(__name__)


class Validator:
    """Runs validations, keeps the best adapter in `<run>/adapter-best`, and counts those without progress."""

    def __init__(
        self,
        config: Config,
        policy: Policy,
        objective: Objective,
        held_out: Sequence[Example],
        run: Path,
        communicator: Communicator,
        stage: int,
        num_warmup: int = 0,
    ) -> None:
        """`held_out` are examples of questions that are not trained, `stage` is ZeRO's, `num_warmup` steps raise the rate."""
        self.config, self.policy, self.objective = config, policy, objective
        self.held_out, self.communicator, self.stage = list(held_out), communicator, stage
        self.num_warmup, self.folder = num_warmup, run / "adapter-best"
        self.best: float | None = None
        self.best_step = 0
        self.num_without_progress = 0
        self.best_digest = ""  # of the best adapter's weights, known to the rank that writes
        self._questions: tuple[Any, list[Any]] | None = None
        if config.train.stop_on == "accuracy":
            if stage == 3:
                raise ConfigError(
                    "train.stop_on=accuracy generates, which ZeRO stage 3 cannot: its ranks would wait for each other's "
                    "weights at every token; use train.stop_on=held_out_loss or train.zero_stage=0"
                )
            task, questions = load_questions(config)
            graded = [question for question in questions if question.gold is not None]
            if not graded:
                raise ConfigError("train.stop_on=accuracy needs questions with reference answers in task.path")
            self._questions = (task, graded)

    @property
    def active(self) -> bool:
        return bool(self.held_out) or self._questions is not None

    @property
    def measured_on(self) -> str:
        """What chooses the best adapter, in words."""
        if self._questions is not None:
            return f"the answers to {len(self._questions[1])} questions"
        return f"{len(self.held_out)} held-out rows" if self.held_out else ""

    @property
    def exhausted(self) -> bool:
        """Whether `train.patience` validations have passed without a better one."""
        patience = self.config.train.patience
        return patience is not None and self.num_without_progress >= patience

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, as JSON values. The best adapter lies in its folder."""
        counts = {"best_step": self.best_step, "num_without_progress": self.num_without_progress}
        return {"best": self.best, "best_digest": self.best_digest, **counts}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on as the validator whose `state` it was."""
        self.best, self.best_step = state["best"], state["best_step"]
        self.num_without_progress = state["num_without_progress"]
        self.best_digest = state["best_digest"]

    def has_best_adapter(self) -> bool:
        """Whether the folder still holds the best adapter.

        A run that was killed after a better one, and does not take that step again, finds the wrong one there.
        """
        weights = self.folder / "adapter_model.safetensors"
        return weights.is_file() and file_digest(weights) == self.best_digest

    def run(self, engine: Any, step: int) -> dict[str, float]:
        """Validate, and save the adapter when it is the best. Returns metrics under `eval_...`.

        `step` 0 is the starting point. Equal to the best is not better, so a step that changes nothing never replaces it.
        """
        was_training = self.policy.model.training
        self.policy.model.eval()
        try:
            values = self.measure(engine)
        finally:
            self.policy.model.train(was_training)
        decisive = -values["eval_accuracy"] if self._questions is not None else values["eval_loss"]
        if self.best is None or decisive < self.best:
            self.best, self.best_step, self.num_without_progress = decisive, step, 0
            save_adapter(self.policy.model, self.folder, self.stage, self.communicator.writes)
            if self.communicator.writes:
                self.best_digest = file_digest(self.folder / "adapter_model.safetensors")
        elif step > self.num_warmup:  # before, it is too early to lose patience: the first step's rate is 0
            self.num_without_progress += 1
        return {**values, "eval_best_step": self.best_step}

    def measure(self, engine: Any) -> dict[str, float]:
        """Metrics of the held-out examples, and accuracy on the questions with reference answers, where there are any."""
        values: dict[str, float] = {}
        if self.held_out:
            summary = self._held_out_metrics(engine).summary().items()
            values = {f"eval_{name}": value for name, value in summary if not name.startswith("tokens/")}
        if self._questions is not None:
            values["eval_accuracy"] = self._accuracy()
        return values

    def _held_out_metrics(self, engine: Any) -> Metrics:
        """Forests that do not depend on the number of ranks, which ranks take in turn."""
        rank, num_ranks = self.communicator.rank, self.communicator.world_size
        batches = list(self.objective.micro_batches(self.held_out))
        turns = [batches[first::num_ranks] for first in range(num_ranks)]
        capacity = max(sum(len(batch.examples) for batch in turn) for turn in turns)
        metrics = Metrics(self.config.train, self.held_out, self.communicator, capacity)
        with torch.no_grad():
            for place, batch in enumerate(turns[rank]):
                progress.at(place, len(turns[rank]), "forests")
                metrics.add(batch, engine(batch))
            if self.stage == 3 and len(turns[rank]) < len(turns[0]):
                engine(batches[0])  # every rank makes equally many forwards, which gather weights
        metrics.read()
        bad = metrics.nonfinite()
        if bad:
            raise NonFiniteError(
                f"the loss of {len(bad)} held-out rows is not finite (rows {', '.join(bad[:5])}); look at these rows, or "
                "lower train.lr"
            )
        return metrics

    def _accuracy(self) -> float:
        """Share of all questions answered right. The ranks take them in turn."""
        assert self._questions is not None
        task, everything = self._questions
        questions = everything[self.communicator.rank :: self.communicator.world_size]
        tokenizer, config = self.policy.tokenizer, self.config
        prompts = Prompts(task, tokenizer, config.task.chat)
        caps = {"max_new_tokens": config.eval.max_new_tokens, "max_steps": config.search.max_steps}
        asked = {question.id: question for question in questions}
        encoded = {question.id: prompts.encode(question) for question in questions}
        searches = ((name, chain_search(tokenizer, prompt, task, **caps)) for name, prompt in encoded.items())
        right, refused = 0, []
        if asked:
            # an engine of its own each time, no larger than it must be: its memory is training's again afterwards
            num_side_by_side = min(len(asked), config.eval.batch_size)
            longest = max(map(len, encoded.values())) + config.eval.max_new_tokens
            max_tokens = sum(map(len, prompts.prefixes)) + num_side_by_side * longest
            make_engine = partial(configured_engine, keep_modules=True, max_tokens=max_tokens)
            engine = build_engine(chains_side_by_side(config), prompts, self.policy.model, make_engine)
            for name, chain, _ in engine.run(searches):
                if isinstance(chain, Exception):
                    refused.append(f"'{name}': {failure_detail(chain)}")
                else:
                    right += task.is_correct(chain.answer(task), asked[name].gold)
        if refused and len(refused) == len(asked):
            raise ConfigError(
                f"train.stop_on=accuracy: no question of task.path could be asked; the first, {refused[0]}"
            )
        if refused:
            logger.warning(
                "%d of %d questions could not be asked and count as wrong; the first, %s",
                len(refused),
                len(asked),
                refused[0],
            )
        total = self.communicator.gather(torch.tensor([right], device=self.communicator.device)).sum()
        return int(total) / len(everything)
