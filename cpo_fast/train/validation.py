"""Validation on held-out questions, the best adapter so far, and when to stop.

The starting point is validated before the first step and takes part: an adapter that is no better is never the best.
The held-out share is split off by question, so no prompt of a validated pair was trained on. The held-out loss chooses the
best adapter, or what greedy chains answer to questions that are not trained on (`dev_questions`).
"""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from cpo_fast import progress
from cpo_fast.adapters import save_adapter
from cpo_fast.config import Config
from cpo_fast.data.examples import Example
from cpo_fast.errors import NonFiniteError
from cpo_fast.files import file_digest
from cpo_fast.train.alarms import ChainAlarm
from cpo_fast.train.communication import Communicator
from cpo_fast.train.dev_questions import DevQuestions
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
        dev: DevQuestions | None = None,
        num_warmup: int = 0,
        card: Callable[[int, dict[str, Any]], str | None] = lambda step, measured: None,
    ) -> None:
        """Keep what every validation needs.

        Args:
            held_out: examples of questions that are not trained.
            run: the folder that receives the best adapter.
            stage: ZeRO's.
            dev: questions that chains answer, whose share then chooses the best adapter.
            num_warmup: steps that raise the rate, during which patience is not lost.
            card: gets a step and what its validation measured, and returns the best adapter's model card.
        """
        self.config, self.policy, self.objective = config, policy, objective
        self.held_out, self.communicator, self.stage, self.dev = list(held_out), communicator, stage, dev
        self.num_warmup, self.folder, self.card = num_warmup, run / "adapter-best", card
        self.alarm = None if dev is None else ChainAlarm(dev.metric)
        self.best: float | None = None
        self.best_step = 0
        self.num_without_progress = 0
        self.best_digest = ""  # of the best adapter's weights, known to the rank that writes

    @property
    def active(self) -> bool:
        return bool(self.held_out) or self.dev is not None

    @property
    def measured_on(self) -> str:
        """What chooses the best adapter, in words."""
        if self.dev is not None:
            return f"the {self.dev.metric} of answers to {len(self.dev.questions)} questions"
        return f"{len(self.held_out)} held-out rows" if self.held_out else ""

    @property
    def exhausted(self) -> bool:
        """Whether `train.patience` validations have passed without a better one."""
        patience = self.config.train.patience
        return patience is not None and self.num_without_progress >= patience

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, as JSON values. The best adapter lies in its folder."""
        counts = {"best_step": self.best_step, "num_without_progress": self.num_without_progress}
        alarm: dict[str, Any] = {}
        if self.dev is not None and self.alarm is not None:
            alarm = {"alarm": self.alarm.state(), "asked": self.dev.digest(), "sampled": self.dev.sampled}
        return {"best": self.best, "best_digest": self.best_digest, **counts, **alarm}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on as the validator whose `state` it was."""
        self.best, self.best_step = state["best"], state["best_step"]
        self.num_without_progress = state["num_without_progress"]
        self.best_digest = state["best_digest"]
        if self.dev is None or self.alarm is None or "alarm" not in state:  # which older checkpoints lack
            return
        if state.get("asked", self.dev.digest()) != self.dev.digest():
            logger.warning(
                "the questions of train.stop_on, their expected answers or train.alarm_chains are not those that this run "
                "began with; its alarm of chains begins anew, and counts what is forgotten from now on"
            )
            return
        self.alarm.restore(state["alarm"])
        self.dev.sampled = state.get("sampled")  # None of older ones too: their alarm counts what is forgotten

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
            values = self.measure(engine, step)
        finally:
            self.policy.model.train(was_training)
        decisive = values["eval_loss"] if self.dev is None else -values[f"eval_{self.dev.metric}"]
        if self.best is None or decisive < self.best:
            self.best, self.best_step, self.num_without_progress = decisive, step, 0
            card = self.card(step, values)
            save_adapter(self.policy.model, self.folder, self.stage, self.communicator.writes, card)
            if self.communicator.writes:
                self.best_digest = file_digest(self.folder / "adapter_model.safetensors")
        elif step > self.num_warmup:  # before, it is too early to lose patience: the first step's rate is 0
            self.num_without_progress += 1
        return {**values, "eval_best_step": self.best_step}

    def measure(self, engine: Any, step: int) -> dict[str, float]:
        """Metrics of the held-out examples, and what share of dev questions chains answer as expected and at all."""
        values: dict[str, float] = {}
        if self.held_out:
            summary = self._held_out_metrics(engine).summary().items()
            values = {f"eval_{name}": value for name, value in summary if not name.startswith("tokens/")}
        if self.dev is not None:
            if not step and self.dev.is_sampled:
                logger.info(
                    "sampling %d chains of each of %d questions, with which the alarm compares answers",
                    self.config.train.alarm_chains,
                    len(self.dev.questions),
                )
                self.dev.sample(self.policy.model, self.communicator)
            asked = self.dev.ask(self.policy.model, self.communicator)
            values |= {f"eval_{self.dev.metric}": fmean(asked.as_expected), "eval_answered": fmean(asked.answered)}
            if asked.contradicted is not None:
                values["eval_contradicted"] = fmean(asked.contradicted)
            assert self.alarm is not None
            text = self.alarm.update(step, asked.as_expected, asked.contradicted)
            if text is not None:
                logger.warning("%s", text)
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
