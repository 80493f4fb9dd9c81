"""The training loop: epochs of batches, a batch as forests, one optimizer step a batch.

    gradient of a step = sum over its examples of d loss / normaliser of the step (pairs, or completion tokens)

whatever the token budget, so micro-batches never change the result. `train` sets a run up and writes its files, and
`Trainer.step` is one step. What is optimised is the objective's affair (`cpo_fast.train.objective`).
"""

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import record_function
from transformers import get_scheduler

from cpo_fast.adapters import copy_adapter, save_adapter
from cpo_fast.config import Config, TrainConfig, dump_config
from cpo_fast.data.batches import epoch_batches, split_by_question, weigh
from cpo_fast.data.examples import Example
from cpo_fast.data.load import load_examples
from cpo_fast.errors import DataError, NonFiniteError
from cpo_fast.files import append_line, write_atomic
from cpo_fast.rows import is_hub
from cpo_fast.train.deepspeed_engine import adamw, initialize_engine
from cpo_fast.train.memory import choose_checkpointing
from cpo_fast.train.metrics import Metrics, OverOptimisationAlarm, rounded
from cpo_fast.train.objective import Objective
from cpo_fast.train.policy import Policy, build_policy, checkpoint_layers
from cpo_fast.train.profiler import RangeTotal, StepProfiler
from cpo_fast.train.reference import reference_logps
from cpo_fast.train.validation import Validator
from cpo_kernels import build_forest

logger = logging.getLogger(__name__)

Progress = Callable[[dict[str, Any], int], None]  # (metrics of the step, total steps)
MakeOptimizer = Callable[[TrainConfig, list[torch.nn.Parameter]], torch.optim.Optimizer]


@dataclass(frozen=True)
class TrainResult:
    """Where the adapter and the metrics are, and the first and last line of the metrics.

    `num_items` counts what was trained on (pairs, or completions), `num_held_out` what was validated on. `adapter_path` is
    the best adapter where there was a validation (after `best_step`), else the last. `stopped_early` says that patience
    ran out. `alarm` is the sentence of the over-optimisation watch, or "". `profile` has the named ranges of the profiled
    steps, whose trace lies in `profile_path`.
    """

    adapter_path: Path
    metrics_path: Path
    num_items: int
    num_held_out: int
    num_steps: int
    best_step: int
    stopped_early: bool
    alarm: str
    first: dict[str, Any]
    last: dict[str, Any]
    seconds: float
    profile: tuple[RangeTotal, ...] = ()
    profile_path: Path | None = None


def train(
    config: Config,
    model: Any = None,
    tokenizer: Any = None,
    progress: Progress | None = None,
    profile_steps: int | None = None,
    make_optimizer: MakeOptimizer = adamw,
) -> TrainResult:
    """Train an adapter on `config.data` and write it to `<run>/adapter`, metrics to `<run>/metrics.jsonl`.

    Args:
        config: sections model, pairs, data, lora and train, the run folder and the seed.
        model, tokenizer: use these instead of loading `config.model`. A `PeftModel` is trained as it is.
        progress: called after every step with its metrics and the total number of steps.
        profile_steps: profile so many steps after the first, into `<run>/profile` (see `cpo_fast.train.profiler`).
        make_optimizer: gets section train and the adapter's parameters. With SGD a step is the gradient itself.

    Raises:
        CpoFastError: a subclass for what the user can mend (configuration, data, environment, non-finite loss).
    """
    started = time.perf_counter()
    run = Path(config.run)
    run.mkdir(parents=True, exist_ok=True)
    write_atomic(run / "config.yaml", dump_config(config))
    _check_readable(config)
    policy = build_policy(config, model, tokenizer)
    everything = load_examples(config, policy.tokenizer, run / "dropped.jsonl").examples
    parts = split_by_question(everything, config.data.held_out, config.seed)
    # after the split, because weights average to 1 over what is trained
    examples, held_out = (weigh(part, config.pairs.weight) for part in parts)
    _check_vocabulary(everything, policy)
    ref_logps = reference_logps(config, policy, everything, run / "reference")
    objective = Objective(policy.model, config.train, policy.reference, policy.impl, ref_logps)
    validator = Validator(config, policy, objective, held_out, run)
    trainer = Trainer(config, policy, objective, examples, validator, make_optimizer)
    profiler = StepProfiler(profile_steps, run / "profile", trainer.num_steps) if profile_steps else None
    # a question's pairs branch at every thought, so this forest has every kind of branch that training will meet
    objective.self_test(trainer.engine, trainer.batches(0, "questions")[0])
    metrics_path = run / "metrics.jsonl"
    metrics_path.unlink(missing_ok=True)
    first: dict[str, Any] = {}
    last: dict[str, Any] = {}
    for values in trainer.steps(profiler):
        first, last = first or values, values
        if values["step"] % config.train.log_every == 0 or values["step"] == trainer.num_steps or "eval_loss" in values:
            append_line(metrics_path, rounded(values))
        if progress is not None:
            progress(values, trainer.num_steps)
    if profiler is not None:
        profiler.finish()
    save_adapter(policy.model, run / "adapter", config.train.zero_stage)
    if validator.best is not None and validator.best_step != last["step"]:
        copy_adapter(run / "adapter", run / "adapter-last")
        copy_adapter(validator.folder, run / "adapter")
    return TrainResult(
        adapter_path=run / "adapter",
        metrics_path=metrics_path,
        num_items=len(examples),
        num_held_out=len(held_out),
        num_steps=last["step"],
        best_step=validator.best_step or last["step"],
        stopped_early=validator.exhausted,
        alarm=trainer.alarm_text,
        first=first,
        last=last,
        seconds=time.perf_counter() - started,
        profile=() if profiler is None else profiler.ranges,
        profile_path=None if profiler is None else profiler.folder,
    )


def _check_readable(config: Config) -> None:
    """Find a wrong path before a large model is loaded."""
    for path in (config.data.path, *(item.path for item in config.data.mixture)):
        if path and not is_hub(path):
            try:
                open(path, "rb").close()
            except OSError as error:
                raise DataError(f"{path}: cannot read ({error.strerror}); check data.path") from None


def _check_vocabulary(examples: Sequence[Example], policy: Policy) -> None:
    size = policy.model.get_base_model().get_input_embeddings().num_embeddings
    for example in examples:
        largest = max(max(ids) for ids in (example.prompt_ids, *example.responses))
        if largest >= size:
            raise DataError(
                f"{example.source}: token id {largest} is outside the model's {size} embeddings; the file was made with "
                "another tokenizer"
            )


class Trainer:
    """The engine and the examples of one run."""

    def __init__(
        self,
        config: Config,
        policy: Policy,
        objective: Objective,
        examples: Sequence[Example],
        validator: Validator,
        make_optimizer: MakeOptimizer = adamw,
    ) -> None:
        self.config, self.objective, self.examples, self.validator = config, objective, examples, validator
        self.implementations = {f"impl/{op}": name for op, name in asdict(policy.impl).items()}
        self.groups = [example.group for example in examples]
        per_epoch = math.ceil(len(examples) / config.train.batch_pairs)
        num_steps = per_epoch * config.train.num_epochs
        self.num_steps = min(num_steps, config.train.max_steps or num_steps)
        self.eval_every = config.train.eval_every or per_epoch
        self.trainable = [parameter for parameter in policy.model.parameters() if parameter.requires_grad]
        if self._checkpointing(policy) != "off":
            checkpoint_layers(policy.model)
        optimizer = make_optimizer(config.train, self.trainable)
        scheduler = get_scheduler(
            "cosine" if config.train.schedule == "cosine" else "constant_with_warmup",
            optimizer,
            num_warmup_steps=math.ceil(config.train.warmup_ratio * self.num_steps),
            num_training_steps=self.num_steps,
        )
        self.engine = initialize_engine(objective, optimizer, scheduler, config.train)
        self.engine.train()
        self.alarm = OverOptimisationAlarm(config.train.alarm_nats)
        self.alarm_text = ""
        self.rows_seen = 0
        self.gradients_finite = torch.ones((), dtype=torch.bool, device=self.trainable[0].device)
        for parameter in self.trainable:
            parameter.register_hook(self._watch)  # ZeRO takes gradients away before a step could look at them

    def batches(self, epoch: int, order: Any = None) -> list[list[Example]]:
        train = self.config.train
        indices = epoch_batches(self.groups, train.batch_pairs, order or train.batch_order, self.config.seed, epoch)
        return [[self.examples[index] for index in batch] for batch in indices]

    def _checkpointing(self, policy: Policy) -> str:
        """What `train.gradient_checkpointing` says, where `auto` looks at the largest micro-batch of the first epoch."""
        asked = self.config.train.gradient_checkpointing
        if asked != "auto":
            return asked
        largest, budget = 0, self.config.train.max_tokens
        for batch in self.batches(0):
            sequences = [sequence for example in batch for sequence in example.sequences]
            largest = max(largest, build_forest(sequences).num_tokens)
            if largest >= budget:
                break
        return choose_checkpointing(policy.model, min(largest, budget), self.config.train.zero_stage)

    def steps(self, profiler: StepProfiler | None = None) -> Iterator[dict[str, Any]]:
        """Metrics of one optimizer step after the other, until the epochs, `train.max_steps` or the patience are done."""
        step = 0
        for epoch in range(self.config.train.num_epochs):
            batches = self.batches(epoch)
            for place, batch in enumerate(batches):
                if step == self.num_steps or self.validator.exhausted:
                    return
                step += 1
                if profiler is not None:
                    profiler.before(step)
                started = time.perf_counter()
                with record_function("step"):
                    values = self.step(batch)
                values.update(
                    step=step, epoch=epoch + (place + 1) / len(batches), seconds=time.perf_counter() - started
                )
                if profiler is not None:
                    profiler.after(step)
                self._watch_collapse(step, values)
                if self.validator.active and (step % self.eval_every == 0 or step == self.num_steps):
                    values.update(self.validator.run(self.engine, step))
                yield values

    def step(self, batch: Sequence[Example]) -> dict[str, Any]:
        """Take one optimizer step and return its metrics.

        Raises:
            NonFiniteError: a loss or the gradient is not finite. The weights were not updated.
        """
        metrics = Metrics(self.config.train.beta)
        normaliser = self.objective.normaliser(batch)
        for micro_batch in self.objective.micro_batches(batch):
            result = self.engine(micro_batch)
            with record_function("backward"):
                # not DeepSpeed's mean over a fixed number of micro-batches: the normaliser is that of the whole step
                self.engine.backward(result.loss_sum / normaliser, scale_wrt_gas=False)
            metrics.add(micro_batch, result)
        with record_function("read"):
            finite, gradient_norm = metrics.read(self.gradients_finite, self._local_gradient_norm())
        self._refuse_nonfinite(metrics.nonfinite(), bool(finite), batch)
        learning_rate = self.engine.get_lr()[0]
        with record_function("optimizer"):
            self.engine.step()
        if self.config.train.zero_stage > 0:
            gradient_norm = float(self.engine.get_global_grad_norm())
        values: dict[str, Any] = metrics.summary()
        self.rows_seen += int(values["tokens/rows"])
        return {
            **values,
            "grad_norm": gradient_norm,
            "learning_rate": learning_rate,
            "num_tokens": self.rows_seen,
            **self.implementations,
        }

    def _watch_collapse(self, step: int, values: dict[str, Any]) -> None:
        if "logps/chosen_drift" not in values:
            return
        text = self.alarm.update(step, values["logps/chosen_drift"], values["rewards/margins"])
        if text is not None:
            self.alarm_text = text
            logger.warning("%s", text)
        values["alarm"] = self.alarm.raised_at is not None

    def _local_gradient_norm(self) -> torch.Tensor:
        """Global norm before clipping, or 0 under ZeRO, which keeps gradients in its own buffers until its step."""
        gradients = [parameter.grad for parameter in self.trainable if parameter.grad is not None]
        if self.config.train.zero_stage > 0 or not gradients:
            return torch.zeros((), device=self.gradients_finite.device)
        return torch.stack([gradient.double().norm() for gradient in gradients]).norm()

    def _watch(self, gradient: torch.Tensor) -> None:
        self.gradients_finite &= torch.isfinite(gradient).all()

    def _refuse_nonfinite(self, bad: list[str], gradients_finite: bool, batch: Sequence[Example]) -> None:
        what = f"the loss of {len(bad)} rows"
        if not bad and not gradients_finite:
            what, bad = "the gradient", [example.source for example in batch]
        if bad:
            raise NonFiniteError(
                f"{what} is not finite at step {self.engine.global_steps + 1} (rows {', '.join(bad[:5])}); lower train.lr "
                "or look at these rows; the weights were not updated"
            )
