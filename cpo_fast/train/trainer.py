"""One optimizer step: a batch as forests, their gradients over micro-batches and ranks, the update.

    gradient of a step = sum over its examples of d loss / normaliser of the step (pairs, or completion tokens)

whatever the token budget and the number of ranks, so neither changes the result.
"""

import itertools
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any, TypeVar

import torch
from torch.profiler import record_function
from transformers import get_scheduler

from cpo_fast.config import Config, TrainConfig
from cpo_fast.data.batches import epoch_batches
from cpo_fast.data.examples import Example
from cpo_fast.errors import NonFiniteError
from cpo_fast.train.alarms import DriftAlarm
from cpo_fast.train.checkpoint import Checkpoint, Tensors
from cpo_fast.train.communication import Communicator
from cpo_fast.train.dealing import deal, num_tokens
from cpo_fast.train.deepspeed_engine import (
    adamw,
    initialize_engine,
    partition,
    read_adapter,
    read_moments,
    restore_optimizer,
)
from cpo_fast.train.memory import choose_checkpointing, free_rank_bytes, out_of_memory
from cpo_fast.train.metrics import Metrics
from cpo_fast.train.objective import MicroBatch, Objective
from cpo_fast.train.policy import Policy, checkpoint_layers
from cpo_fast.train.profiler import StepProfiler
from cpo_fast.train.signals import EndSignals
from cpo_fast.train.validation import Validator
from cpo_kernels import build_forest

logger = logging.getLogger(__name__)

T = TypeVar("T")
FULL_SHARE = 0.9  # of the token budget: no micro-batch is much larger
MakeOptimizer = Callable[[TrainConfig, list[torch.nn.Parameter]], torch.optim.Optimizer]


class Trainer:
    """The engine and the examples of one run, as one rank sees them."""

    validator: Validator  # set once the engine is there

    def __init__(
        self,
        config: Config,
        policy: Policy,
        objective: Objective,
        examples: Sequence[Example],
        communicator: Communicator,
        stage: int,
        make_optimizer: MakeOptimizer = adamw,
    ) -> None:
        """Under ZeRO `stage` 3 the weights are cut over the ranks here."""
        self.config, self.objective, self.examples = config, objective, examples
        self.communicator, self.stage = communicator, stage
        self.groups = [example.group for example in examples]
        self.steps_per_epoch = math.ceil(len(examples) / config.train.batch_pairs)
        self.num_steps = config.train.length(self.steps_per_epoch)
        self.num_warmup = math.ceil(config.train.warmup_ratio * self.num_steps)
        self.eval_every = config.train.eval_every or self.steps_per_epoch
        self.parameters = {name: each for name, each in policy.model.named_parameters() if each.requires_grad}
        self.trainable = list(self.parameters.values())
        self.model, self.recomputes = policy.model, self._checkpointing(policy) != "off"
        if self.recomputes:
            checkpoint_layers(policy.model)
        if stage == 3:
            partition(policy.model, config.train, communicator.device)
        optimizer = make_optimizer(config.train, self.trainable)
        scheduler = get_scheduler(
            "cosine" if config.train.schedule == "cosine" else "constant_with_warmup",
            optimizer,
            num_warmup_steps=self.num_warmup,
            num_training_steps=self.num_steps,
        )
        self.engine = initialize_engine(objective, optimizer, scheduler, config.train, stage, communicator.device)
        self.alarm = DriftAlarm(config.train.alarm_nats)
        self.rows_seen = 0
        self.num_done = 0  # steps taken, before this process too
        self.signal = 0  # the one that some rank has received
        self.first: dict[str, Any] = {}  # metrics of the first and of the newest step
        self.last: dict[str, Any] = {}
        self.unvalidated: dict[str, Any] | None = None  # metrics of a step whose validation has not ended
        self.watched_finite = torch.ones((), dtype=torch.bool, device=communicator.device)
        if stage > 0:
            for parameter in self.trainable:
                parameter.register_hook(self._watch)  # ZeRO takes gradients away before a step could look at them

    def with_whole_weights(self, function: Callable[[torch.nn.Module], T]) -> T:
        """Call `function` with the model inside the engine's forward, where ZeRO 3 gathers weights as they are used."""
        results: list[T] = []
        self.engine(lambda model: results.append(function(model)))
        return results[0]

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
        free = free_rank_bytes(policy.model, self.communicator.device, self.communicator.ranks, self.stage)
        chosen = choose_checkpointing(policy.model, min(largest, budget), self.stage, free)
        # ranks with less free memory decide for all: under ZeRO 3 recomputation gathers weights, which takes every rank
        return "non_reentrant" if self.communicator.max(int(chosen != "off")) else "off"

    def checkpoint(self) -> Checkpoint:
        """The state after the newest step. Under ZeRO every rank has to call."""
        state = {
            "first": self.first,
            "last": self.last,
            "unvalidated": self.unvalidated,
            "rows_seen": self.rows_seen,
            "alarm": self.alarm.state(),
            "validator": self.validator.state(),
            "world_size": self.communicator.world_size,
            "stage": self.stage,
        }
        adapter = read_adapter(self.parameters, self.stage)
        moments = read_moments(self.engine, self.parameters, self.stage)
        return Checkpoint(self.num_done, _numpy(adapter), _numpy(moments), state)

    def restore(self, saved: Checkpoint) -> None:
        """Go on after a checkpoint, whose adapter is in the model already."""
        state = saved.state
        self.first, self.last, self.unvalidated = state["first"], state["last"], state["unvalidated"]
        self.rows_seen, self.num_done = state["rows_seen"], saved.step
        self.alarm.restore(state["alarm"])
        self.validator.restore(state["validator"])
        moments = {name: torch.from_numpy(value) for name, value in saved.optimizer.items()}
        restore_optimizer(self.engine, self.parameters, moments, saved.step, self.stage)

    def steps(
        self, profiler: StepProfiler | None = None, signals: EndSignals | None = None
    ) -> Iterator[dict[str, Any]]:
        """Metrics of one optimizer step after the other, until the epochs, `train.max_steps` or the patience are done.

        The first are those of a step whose validation a signal has cut short, where there is one.
        """
        if self.unvalidated is not None:
            yield self.unvalidated
        step = 0
        for epoch in itertools.count():
            batches = self.batches(epoch)
            for place, batch in enumerate(batches):
                if step == self.num_steps or self.validator.exhausted:
                    return
                step += 1
                if step <= self.num_done:
                    continue
                if profiler is not None:
                    profiler.before(step)
                started = time.perf_counter()
                with self._memory_errors(), record_function("step"):
                    values = self.step(batch, 0 if signals is None else signals.received)
                self.num_done = step
                values.update(
                    step=step, epoch=epoch + (place + 1) / len(batches), seconds=time.perf_counter() - started
                )
                if profiler is not None:
                    profiler.after(step)
                self._watch_collapse(step, values)
                yield values

    def is_validated(self, step: int) -> bool:
        """Whether a validation follows a step."""
        return self.validator.active and (step % self.eval_every == 0 or step == self.num_steps)

    @contextmanager
    def _memory_errors(self) -> Iterator[None]:
        try:
            yield
        except (torch.OutOfMemoryError, RuntimeError) as error:
            # a CPU's allocator has no class of its own
            if not isinstance(error, torch.OutOfMemoryError) and "DefaultCPUAllocator" not in str(error):
                raise
            train, num_ranks = self.config.train, self.communicator.world_size
            raise out_of_memory(self.model, train, self.stage, num_ranks, self.recomputes) from error

    def probe(self) -> None:
        """Compute the largest micro-batch of the first epoch once, with weight 0: what does not fit fails now and not in an
        hour. Every rank takes the same one, so collectives meet.

        Raises:
            OutOfMemory: it does not fit. NonFiniteError: its loss or gradient is not finite.
        """
        self.communicator.doing = "computing the largest micro-batch once"
        largest, chosen = 0, None
        for batch in self.batches(0):
            for micro_batch in self.objective.micro_batches(batch):
                size = num_tokens(micro_batch.examples, range(len(micro_batch.examples)))
                if size > largest:
                    largest, chosen = size, micro_batch
            if largest >= FULL_SHARE * self.config.train.max_tokens:
                break
        assert chosen is not None
        with self._memory_errors():
            result = self.engine(chosen)
            self.engine.backward(result.loss_sum * 0, scale_wrt_gas=False)
        gradient_finite, _ = self._gradient()
        if self.stage == 0:
            for parameter in self.trainable:
                parameter.grad = None
        finite = torch.isfinite(result.columns["losses"])
        flags = torch.cat([gradient_finite.reshape(1), finite]).float()
        bad = self.communicator.gather(flags).cpu().eq(0).any(dim=0).tolist()
        rows = [example.source for example, wrong in zip(chosen.examples, bad[1:], strict=True) if wrong]
        self._refuse_nonfinite(rows, not bad[0], chosen.examples)

    def step(self, batch: Sequence[Example], signal: int = 0) -> dict[str, Any]:
        """Take one optimizer step and return its metrics. `signal` is what this rank was asked to end by, or 0.

        Raises:
            NonFiniteError: a loss or the gradient is not finite. The weights were not updated.
        """
        parts = deal(batch, self.communicator.world_size)
        metrics = Metrics(self.config.train, batch, self.communicator, max(map(len, parts)))
        normaliser = self.objective.normaliser(batch)
        # ZeRO takes the mean of the ranks' gradients, and the step's gradient is their sum
        factor = self.communicator.world_size if self.stage > 0 else 1
        step = self.num_done + 1
        for index, (micro_batch, counts) in enumerate(
            self._micro_batches(batch, parts[self.communicator.rank]), start=1
        ):
            self.communicator.doing = f"step {step}, micro-batch {index}"
            result = self.engine(micro_batch)
            with record_function("backward"):
                # not DeepSpeed's mean over a fixed number of micro-batches: the normaliser is that of the whole step
                self.engine.backward(result.loss_sum * (factor * counts) / normaliser, scale_wrt_gas=False)
            if counts:
                metrics.add(micro_batch, result)
        self.communicator.doing = f"step {step}, the exchange of gradients and metrics"
        if self.stage == 0:
            self._sum_gradients()
        with record_function("read"):
            found = metrics.read(*self._gradient(), signal=signal)
        self.signal = int(found[:, 2].max())
        self._refuse_nonfinite(metrics.nonfinite(), bool(found[:, 0].all()), batch)
        learning_rate = self.engine.get_lr()[0]
        self.communicator.doing = f"step {step}, the update"
        with record_function("optimizer"):
            self.engine.step()
        if self.engine.skipped_steps:
            raise RuntimeError(f"DeepSpeed left out the update of step {self.engine.global_steps}")
        gradient_norm = float(self.engine.get_global_grad_norm()) if self.stage > 0 else float(found[0, 1])
        values: dict[str, Any] = metrics.summary()
        self.rows_seen += int(values["tokens/rows"])
        return {
            **values,
            "grad_norm": gradient_norm,
            "learning_rate": learning_rate,
            "num_tokens": self.rows_seen,
            **{f"impl/{op}": name for op, name in asdict(self.objective.impl).items()},
        }

    def _micro_batches(self, batch: Sequence[Example], places: Sequence[int]) -> list[tuple[MicroBatch, int]]:
        """This rank's micro-batches, which count 1, and small ones that count 0, for the collectives they take part in.

        ZeRO 2 reduces gradients in every backward and ZeRO 3 gathers weights too, so ranks need equally many. ZeRO 1
        reduces once, but of gradients that some backward made.
        """
        own = [(micro_batch, 1) for micro_batch in self.objective.micro_batches(batch, places)]
        num_padding = self.communicator.max(len(own)) - len(own) if self.stage > 1 else 0
        if self.stage == 1 and not own:
            num_padding = 1
        if num_padding:
            shortest = min(range(len(batch)), key=lambda place: sum(map(len, batch[place].sequences)))
            (padding,) = self.objective.micro_batches(batch, [shortest])
            own += [(padding, 0)] * num_padding
        return own

    def _sum_gradients(self) -> None:
        """Sum the ranks' gradients in one tensor. A rank without examples has zeros."""
        if self.communicator.world_size == 1:
            return
        gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in self.trainable]
        total = self.communicator.sum(torch.cat([gradient.reshape(-1) for gradient in gradients]))
        parts = total.split([parameter.numel() for parameter in self.trainable])
        for parameter, part in zip(self.trainable, parts, strict=True):
            parameter.grad = part.view_as(parameter)

    def _watch_collapse(self, step: int, values: dict[str, Any]) -> None:
        if "logps/chosen_drift" in values:
            low, margin = values["logps/chosen_drift_p10"], values["rewards/margins"]
            text = self.alarm.update(step, low, margin, values.get("pairs") or values["states"])
            if text is not None:
                logger.warning("%s", text)
        if "logps/chosen_drift" in values or self.validator.alarm is not None:
            values["alarm"] = bool(self.alarm_text)

    @property
    def alarm_text(self) -> str:
        """The sentences of both alarms, "" where none is raised."""
        watches = (self.validator.alarm, self.alarm)
        return ". ".join(watch.text for watch in watches if watch is not None and watch.text)

    def _gradient(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Whether the gradient is finite, and its global norm before clipping: a few kernels for all parameters.

        Under ZeRO, which keeps gradients in its own buffers until its step, the norm is 0 and hooks have looked.
        """
        gradients = [parameter.grad for parameter in self.trainable if parameter.grad is not None]
        if self.stage > 0 or not gradients:
            return self.watched_finite, torch.zeros((), device=self.watched_finite.device)
        # in float64 no square of a float32 overflows, so the norm is finite where every number is
        norm = torch.stack(torch._foreach_norm(gradients, 2, dtype=torch.float64)).norm()
        return torch.isfinite(norm), norm

    def _watch(self, gradient: torch.Tensor) -> None:
        self.watched_finite &= torch.isfinite(gradient).all()

    def _refuse_nonfinite(self, bad: list[str], gradients_finite: bool, batch: Sequence[Example]) -> None:
        what = f"the loss of {len(bad)} rows"
        if not bad and not gradients_finite:
            what, bad = "the gradient", [example.source for example in batch]
        if bad:
            raise NonFiniteError(
                f"{what} is not finite at step {self.engine.global_steps + 1} (rows {', '.join(bad[:5])}); lower train.lr "
                "or look at these rows; the weights were not updated"
            )


def _numpy(tensors: Mapping[str, torch.Tensor]) -> Tensors:
    return {name: value.detach().cpu().numpy() for name, value in tensors.items()}
