"""The training loop: epochs of batches, a batch as forests, one optimizer step a batch.

    gradient of a step = sum over its pairs of d loss / pairs of the step

whatever the token budget, so micro-batches never change the result. Before the first step policy and reference run on
the same forest and every reward must be bitwise zero.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import get_scheduler

from cpo_fast.config import Config, dump_config
from cpo_fast.data.batching import epoch_batches
from cpo_fast.data.formats import load_pairs
from cpo_fast.data.pair import PreferencePair
from cpo_fast.errors import CpoFastError, DataError, NonFiniteError
from cpo_fast.files import append_line, write_atomic
from cpo_fast.train.adapter import save_adapter
from cpo_fast.train.distributed import build_optimizer, initialize_engine
from cpo_fast.train.metrics import StepMetrics, rounded
from cpo_fast.train.micro_batch import group_pairs
from cpo_fast.train.objective import MicroBatch, MicroBatchResult, PreferenceObjective
from cpo_fast.train.policy import Policy, build_policy
from cpo_fast.train.reference import ReferenceCache, reference_cache

Progress = Callable[[dict[str, Any], int], None]  # (metrics of the step, total steps)


@dataclass(frozen=True)
class TrainResult:
    """Where the adapter and the metrics are, and the first and last line of the metrics."""

    adapter_path: Path
    metrics_path: Path
    num_pairs: int
    num_steps: int
    first: dict[str, Any]
    last: dict[str, Any]
    seconds: float


def train(config: Config, model: Any = None, tokenizer: Any = None, progress: Progress | None = None) -> TrainResult:
    """Train an adapter on `config.data.path` and write it to `<run>/adapter`, metrics to `<run>/metrics.jsonl`.

    Args:
        config: sections model, data, lora and train, the run folder and the seed.
        model, tokenizer: use these instead of loading `config.model`; a `PeftModel` is trained as it is.
        progress: called after every step with its metrics and the total number of steps.

    Raises:
        CpoFastError: a subclass for what the user can mend (configuration, data, environment, non-finite loss).
    """
    started = time.perf_counter()
    run = Path(config.run)
    run.mkdir(parents=True, exist_ok=True)
    write_atomic(run / "config.yaml", dump_config(config))
    policy = build_policy(config, model, tokenizer)
    loaded = load_pairs(config.data, policy.tokenizer, run / "dropped.jsonl")
    pairs = loaded.pairs
    _check_vocabulary(pairs, policy)
    cache = reference_cache(config, policy, pairs, run / "reference")
    trainer = _Trainer(config, policy, pairs, cache)
    trainer.self_test()
    metrics_path = run / "metrics.jsonl"
    metrics_path.unlink(missing_ok=True)
    first: dict[str, Any] = {}
    last: dict[str, Any] = {}
    for values in trainer.steps():
        first, last = first or values, values
        if values["step"] % config.train.log_every == 0 or values["step"] == trainer.num_steps:
            append_line(metrics_path, rounded(values))
        if progress is not None:
            progress(values, trainer.num_steps)
    save_adapter(policy.model, run / "adapter", config.train.zero_stage)
    seconds = time.perf_counter() - started
    return TrainResult(run / "adapter", metrics_path, len(pairs), trainer.num_steps, first, last, seconds)


class _Trainer:
    """Engine, pairs and cache of one run; yields the metrics of each step."""

    def __init__(
        self, config: Config, policy: Policy, pairs: Sequence[PreferencePair], cache: ReferenceCache | None
    ) -> None:
        self.config, self.policy, self.pairs, self.cache = config, policy, pairs, cache
        self.groups = [pair.group for pair in pairs]
        per_epoch = math.ceil(len(pairs) / config.train.batch_pairs)
        self.num_steps = min(per_epoch * config.train.num_epochs, config.train.max_steps or per_epoch * 10**9)
        trainable = [parameter for parameter in policy.model.parameters() if parameter.requires_grad]
        optimizer = build_optimizer(config.train, trainable)
        scheduler = get_scheduler(
            "cosine" if config.train.schedule == "cosine" else "constant_with_warmup",
            optimizer,
            num_warmup_steps=math.ceil(config.train.warmup_ratio * self.num_steps),
            num_training_steps=self.num_steps,
        )
        objective = PreferenceObjective(policy.model, config.train, policy.reference)
        self.engine = initialize_engine(objective, optimizer, scheduler, config.train)
        self.engine.train()
        self.rows_seen = 0
        self.gradients_finite = torch.ones((), dtype=torch.bool, device=trainable[0].device)
        for parameter in trainable:
            parameter.register_hook(self._watch)

    def steps(self) -> Iterator[dict[str, Any]]:
        """One optimizer step per item, until the epochs or `train.max_steps` are done."""
        train = self.config.train
        step = 0
        for epoch in range(train.num_epochs):
            batches = epoch_batches(self.groups, train.batch_pairs, train.batch_order, self.config.seed, epoch)
            for place, batch in enumerate(batches):
                if step == self.num_steps:
                    return
                step += 1
                started = time.perf_counter()
                values = self._step([self.pairs[index] for index in batch])
                values["step"] = step
                values["epoch"] = epoch + (place + 1) / len(batches)
                values["seconds"] = time.perf_counter() - started
                yield values

    def _step(self, batch: list[PreferencePair]) -> dict[str, Any]:
        metrics = StepMetrics()
        members: list[PreferencePair] = []
        for micro in self._micro_batches(batch):
            result: MicroBatchResult = self.engine(micro)
            self.engine.backward(result.loss_sum / len(batch), scale_wrt_gas=False)
            metrics.add(result, [pair.step for pair in micro.pairs])
            members.extend(micro.pairs)
        self._refuse_nonfinite(metrics, members)
        learning_rate = self.engine.get_lr()[0]
        gradient_norm = self._local_gradient_norm()
        self.engine.step()
        if gradient_norm is None:
            gradient_norm = float(self.engine.get_global_grad_norm())
        values = metrics.summary()
        self.rows_seen += int(values["tokens/rows"])
        return {**values, "grad_norm": gradient_norm, "learning_rate": learning_rate, "num_tokens": self.rows_seen}

    def _micro_batches(self, batch: Sequence[PreferencePair], online: bool = False) -> Iterator[MicroBatch]:
        for pairs in group_pairs(batch, self.config.train.max_tokens):
            if self.cache is None or online:
                yield MicroBatch(pairs)
            else:
                yield MicroBatch(pairs, self.cache.chosen(pairs), self.cache.rejected(pairs))

    def _local_gradient_norm(self) -> float | None:
        """Global norm before clipping; None under ZeRO, which keeps gradients in its own buffers until its step."""
        if self.config.train.zero_stage > 0:
            return None
        norms = [
            p.grad.double().norm() for p in self.policy.model.parameters() if p.requires_grad and p.grad is not None
        ]
        return float(torch.stack(norms).norm())

    def _watch(self, gradient: torch.Tensor) -> None:
        self.gradients_finite &= torch.isfinite(gradient).all()

    def _refuse_nonfinite(self, metrics: StepMetrics, members: Sequence[PreferencePair]) -> None:
        bad = [members[place].source for place in metrics.nonfinite_pairs()]
        what = f"the loss of {len(bad)} pairs"
        if not bad and not bool(self.gradients_finite):
            what, bad = "the gradient", [pair.source for pair in members]
        if bad:
            raise NonFiniteError(
                f"{what} is not finite at step {self.engine.global_steps + 1} (rows {', '.join(bad[:5])}); lower train.lr "
                "or look at these rows; the weights were not updated"
            )

    def self_test(self) -> None:
        """Policy and reference on one forest before the first step: rewards must be bitwise 0.

        Raises:
            CpoFastError: the policy at step 0 is not its own reference.
        """
        first = epoch_batches(self.groups, self.config.train.batch_pairs, "questions", self.config.seed, 0)[0]
        micro = next(self._micro_batches([self.pairs[index] for index in first], online=True))
        with torch.no_grad():
            result: MicroBatchResult = self.engine(micro)
        rewards = torch.stack([result.chosen_rewards, result.rejected_rewards])
        if bool((rewards != 0).any()):
            raise CpoFastError(
                f"self-test: rewards at step 0 reach {float(rewards.abs().max()):.1e} instead of exactly 0, so the "
                "reference is not the policy's starting point (an adapter that was trained, or dropout)"
            )


def _check_vocabulary(pairs: Sequence[PreferencePair], policy: Policy) -> None:
    size = policy.model.get_base_model().get_input_embeddings().weight.shape[0]
    for pair in pairs:
        largest = max(*pair.chosen_sequence, *pair.rejected_sequence)
        if largest >= size:
            raise DataError(
                f"{pair.source}: token id {largest} is outside the model's {size} embeddings; the file was made with "
                "another tokenizer"
            )
