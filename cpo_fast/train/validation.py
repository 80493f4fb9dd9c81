"""Validation on held-out questions, the best adapter so far, and when to stop.

The held-out share is split off by question, so no prompt of a validated pair was trained on. The held-out loss chooses the
best adapter, or, because the loss can fall while a model collapses, greedy chain-of-thought accuracy on questions with
reference answers. Those answers choose among adapters here and never touch search or pairs.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from cpo_fast.adapters import save_adapter
from cpo_fast.config import Config
from cpo_fast.data.examples import Example
from cpo_fast.errors import ConfigError
from cpo_fast.evaluate.chain import greedy_chains
from cpo_fast.tasks import Prompts, load_questions
from cpo_fast.train.metrics import Metrics
from cpo_fast.train.objective import Objective
from cpo_fast.train.policy import Policy


class Validator:
    """Runs validations, keeps the best adapter in `<run>/adapter-best`, and counts those without progress."""

    def __init__(
        self, config: Config, policy: Policy, objective: Objective, held_out: Sequence[Example], run: Path
    ) -> None:
        """`held_out` are examples of questions that are not trained."""
        self.config, self.policy, self.objective = config, policy, objective
        self.held_out = list(held_out)
        self.folder = run / "adapter-best"
        self.best: float | None = None
        self.best_step = 0
        self.num_without_progress = 0
        self._questions: tuple[Any, list[Any]] | None = None
        if config.train.stop_on == "accuracy":
            task, questions = load_questions(config)
            graded = [question for question in questions if question.gold is not None]
            if not graded:
                raise ConfigError("train.stop_on=accuracy needs questions with reference answers in task.path")
            self._questions = (task, graded)

    @property
    def active(self) -> bool:
        return bool(self.held_out) or self._questions is not None

    @property
    def exhausted(self) -> bool:
        """Whether `train.patience` validations have passed without a better one."""
        patience = self.config.train.patience
        return patience is not None and self.num_without_progress >= patience

    def run(self, engine: Any, step: int) -> dict[str, float]:
        """Validate, and save the adapter when it is the best. Returns metrics under `eval_...`."""
        was_training = self.policy.model.training
        self.policy.model.eval()
        try:
            values = self.measure(engine)
        finally:
            self.policy.model.train(was_training)
        decisive = -values["eval_accuracy"] if self._questions is not None else values["eval_loss"]
        if self.best is None or decisive < self.best:
            self.best, self.best_step, self.num_without_progress = decisive, step, 0
            save_adapter(self.policy.model, self.folder, self.config.train.zero_stage)
        else:
            self.num_without_progress += 1
        return {**values, "eval_best_step": self.best_step}

    def measure(self, engine: Any) -> dict[str, float]:
        """Metrics of the held-out examples, and accuracy on the questions with reference answers, where there are any."""
        values: dict[str, float] = {}
        if self.held_out:
            metrics = Metrics(self.config.train.beta)
            with torch.no_grad():
                for batch in self.objective.micro_batches(self.held_out):
                    metrics.add(batch, engine(batch))
            summary = metrics.summary().items()
            values = {f"eval_{name}": value for name, value in summary if not name.startswith("tokens/")}
        if self._questions is not None:
            values["eval_accuracy"] = self._accuracy()
        return values

    def _accuracy(self) -> float:
        assert self._questions is not None
        task, questions = self._questions
        tokenizer = self.policy.tokenizer
        prompts = Prompts(task, tokenizer, self.config.task.chat)
        chains = greedy_chains(
            self.policy.model,
            tokenizer,
            [prompts.encode(question) for question in questions],
            task,
            max_new_tokens=self.config.eval.max_new_tokens,
            max_steps=self.config.search.max_steps,
            batch_size=self.config.eval.batch_size,
        )
        right = [
            task.is_correct(chain.answer(task), question.gold)
            for question, chain in zip(questions, chains, strict=True)
        ]
        return sum(right) / len(right)
