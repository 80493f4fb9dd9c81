"""The training loop: epochs of batches, a batch as forests, one optimizer step a batch.

    gradient of a step = sum over its examples of d loss / normaliser of the step (pairs, or completion tokens)

whatever the token budget, so micro-batches never change the result. `train` sets a run up and writes its files, and
`Trainer.step` is one step. What is optimised is the objective's affair (`cpo_fast.train.objective`).
"""

import logging
import math
import os
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from signal import Signals
from typing import Any, TypeVar

import torch
from filelock import FileLock, Timeout
from torch.profiler import record_function
from transformers import get_scheduler

from cpo_fast.adapters import copy_adapter, save_adapter
from cpo_fast.config import Config, TrainConfig, config_hash, dump_config
from cpo_fast.data.batches import epoch_batches, split_by_question, weigh
from cpo_fast.data.examples import Example
from cpo_fast.data.load import load_examples
from cpo_fast.dtype import dtype_name, resolve_dtype
from cpo_fast.errors import ConfigError, DataError, EnvironmentProblem, Interrupted, NonFiniteError, first_line
from cpo_fast.files import append_line, write_atomic
from cpo_fast.models import resolve_device
from cpo_fast.ranks import find_ranks
from cpo_fast.rows import is_hub
from cpo_fast.train.checkpoint import Checkpoint, CheckpointStore, Tensors
from cpo_fast.train.communication import Communicator, connect, is_lost_connection, meet
from cpo_fast.train.dealing import deal, num_tokens
from cpo_fast.train.deepspeed_engine import (
    adamw,
    initialize_engine,
    partition,
    read_adapter,
    read_moments,
    restore_optimizer,
)
from cpo_fast.train.heartbeat import Heartbeat
from cpo_fast.train.memory import choose_checkpointing, choose_stage, free_rank_bytes, out_of_memory
from cpo_fast.train.metrics import Metrics, OverOptimisationAlarm, rounded
from cpo_fast.train.objective import MicroBatch, Objective
from cpo_fast.train.policy import Policy, base_hash, checkpoint_layers, load_policy, prepare_policy, put_adapter
from cpo_fast.train.preflight import check_hosts
from cpo_fast.train.profiler import RangeTotal, StepProfiler
from cpo_fast.train.reference import ReferenceCache, is_cached
from cpo_fast.train.resume import check_same_training, training_identity
from cpo_fast.train.signals import EndSignals, exit_code_of
from cpo_fast.train.validation import Validator
from cpo_kernels import build_forest

logger = logging.getLogger(__name__)

T = TypeVar("T")
Progress = Callable[[dict[str, Any], int], None]  # (metrics of the step, total steps)
FULL_SHARE = 0.9  # of the token budget: no micro-batch is much larger
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
    allow_mismatch: Collection[str] = (),
) -> TrainResult:
    """Train an adapter on `config.data` and write it to `<run>/adapter`, metrics to `<run>/metrics.jsonl`.

    A run folder with a checkpoint of the same training is gone on with. Under a launcher every rank calls this, and rank 0
    writes.

    Args:
        config: sections model, pairs, data, lora and train, the run folder and the seed.
        model, tokenizer: use these instead of loading `config.model`. A `PeftModel` is trained as it is.
        progress: called after every step with its metrics and the total number of steps.
        profile_steps: profile so many steps after the first, into `<run>/profile` (see `cpo_fast.train.profiler`).
        make_optimizer: gets section train and the adapter's parameters. With SGD a step is the gradient itself.
        allow_mismatch: keys in which the checkpoint's training may differ (see `cpo_fast.train.resume`).

    Raises:
        CpoFastError: a subclass for what the user can mend (configuration, data, environment, non-finite loss).
    """
    started = time.perf_counter()
    run, ranks = Path(config.run), find_ranks()
    device = model.device if model is not None else resolve_device(config.model.device)
    if ranks.world_size > 1 and device.type == "cuda" and config.model.device != "auto":
        raise ConfigError(f"model.device={config.model.device} names one GPU for {ranks.world_size} ranks; use auto")
    communicator = Communicator(ranks, device)
    with _run_lock(run) if communicator.writes else nullcontext(), EndSignals(config.train.grace) as signals:
        with signals.leaving_at_once():
            store = meet(ranks)
            heartbeat = Heartbeat(communicator, store, config.train.heartbeat)
            check_hosts(communicator, store, config)
        with heartbeat:
            try:
                with signals.leaving_at_once():
                    ready = _set_up(config, model, tokenizer, make_optimizer, allow_mismatch, communicator, store)
                return _take_steps(ready, progress, profile_steps, signals, started)
            except RuntimeError as error:
                if ranks.world_size > 1 and is_lost_connection(error):
                    raise EnvironmentProblem(
                        f"the other ranks are gone or silent ({first_line(error)}). This rank was at: "
                        f"{communicator.doing}. {heartbeat.others()}Look at the error of the rank that ended first. The "
                        "same command goes on from the newest checkpoint"
                    ) from error
                raise


@dataclass(frozen=True)
class _Ready:
    """A run that can take steps."""

    trainer: "Trainer"
    checkpoints: CheckpointStore
    identity: dict[str, Any]
    num_items: int
    num_held_out: int


def _set_up(
    config: Config,
    model: Any,
    tokenizer: Any,
    make_optimizer: MakeOptimizer,
    allow_mismatch: Collection[str],
    communicator: Communicator,
    store: Any,
) -> _Ready:
    run, ranks, device = Path(config.run), communicator.ranks, communicator.device
    communicator.doing = "loading the base and the data"
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # a model that ZeRO 3 will cut up is loaded elsewhere
    stage = choose_stage(config, device, ranks)
    _check_readable(config)
    policy = load_policy(_on_cpu(config, device) if stage == 3 else config, model, tokenizer)
    # before the ranks are connected, which may then take long (see `connect`)
    everything = load_examples(config, policy.tokenizer, run / "dropped.jsonl" if ranks.rank == 0 else None).examples
    parts = split_by_question(everything, config.data.held_out, config.seed)
    # after the split, because weights average to 1 over what is trained
    examples, held_out = (weigh(part, config.pairs.weight) for part in parts)
    _check_vocabulary(everything, policy)
    base, dtype = base_hash(config, policy) if ranks.rank == 0 else "", policy.model.get_base_model().dtype
    connect(communicator, config.train.collective_timeout, store)
    communicator.doing = "making the engine"
    _check_equal(communicator, stage, config)
    checkpoints = CheckpointStore(run / "checkpoints", config.train.keep_last)
    identity = training_identity(config, base, dtype_name(dtype), everything)
    saved = communicator.from_first(lambda: _saved(checkpoints, identity, allow_mismatch, run))
    if saved is not None:
        put_adapter(policy.model, saved.adapter)
    if communicator.writes:
        write_atomic(run / "config.yaml", dump_config(config))
    objective = Objective(policy.model, config.train, policy.reference)
    trainer = Trainer(config, policy, objective, examples, communicator, stage, make_optimizer)
    with torch.no_grad():
        policy = trainer.with_whole_weights(partial(prepare_policy, policy=policy, config=config))
        assert policy.impl is not None
        objective.impl = policy.impl
        if is_cached(config, stage):
            communicator.doing = "computing the reference's log-probs"
            reference = ReferenceCache(config, base, dtype, everything, run / "reference")
            logps = partial(reference.logps, policy=policy, communicator=communicator)
            objective.ref_logps = trainer.with_whole_weights(logps)
    trainer.engine.train()
    trainer.validator = Validator(config, policy, objective, held_out, run, communicator, stage)
    if saved is None:
        communicator.doing = "testing itself"
        # a question's pairs branch at every thought, so this forest has every kind of branch that training will meet
        objective.self_test(trainer.engine, trainer.batches(0, "questions")[0], communicator)
    else:
        trainer.restore(saved)
    trainer.probe()
    if communicator.writes:
        if saved is None:
            (run / "metrics.jsonl").unlink(missing_ok=True)
        else:
            _cut(run / "metrics.jsonl", saved.state["metrics_bytes"])
    return _Ready(trainer, checkpoints, identity, len(examples), len(held_out))


def _take_steps(
    ready: _Ready, progress: Progress | None, profile_steps: int | None, signals: EndSignals, started: float
) -> TrainResult:
    trainer = ready.trainer
    config, communicator, validator = trainer.config, trainer.communicator, trainer.validator
    run, metrics_path = Path(config.run), Path(config.run) / "metrics.jsonl"
    profiler = None
    if profile_steps and communicator.writes:
        profiler = StepProfiler(profile_steps, run / "profile", trainer.num_done, trainer.num_steps)

    def save() -> bool:
        """Whether it could. Under ZeRO every rank takes part."""
        communicator.doing = f"saving step {trainer.num_done}"
        checkpoint, is_saved = trainer.checkpoint(), False
        if communicator.writes:
            size = metrics_path.stat().st_size if metrics_path.exists() else 0
            state = {**checkpoint.state, "identity": ready.identity, "metrics_bytes": size}
            is_saved = ready.checkpoints.save(replace(checkpoint, state=state), validator.best_step)
        return is_saved

    def end(is_saved: bool) -> None:
        # no rank leaves before rank 0 has saved: a launcher would then end that too
        saved_where = (
            f"is saved in {ready.checkpoints.folder}" if communicator.broadcast(is_saved) else "could not be saved"
        )
        raise Interrupted(
            f"{Signals(trainer.signal).name} after step {trainer.num_done} of {trainer.num_steps}, which {saved_where}; "
            "the same command goes on from the newest checkpoint",
            exit_code_of(trainer.signal),
        )

    for values in trainer.steps(profiler, signals):
        step = values["step"]
        if trainer.is_validated(step):
            trainer.unvalidated = values
            is_saved = save()  # a validation may take longer than the grace period of a signal
            if trainer.signal:
                end(is_saved)
            communicator.doing = f"validating after step {step}"
            with signals.leaving_at_once():
                values.update(validator.run(trainer.engine, step))
            trainer.unvalidated = None
        trainer.first, trainer.last = trainer.first or values, values
        if communicator.writes:
            if step % config.train.log_every == 0 or step == trainer.num_steps or "eval_loss" in values:
                append_line(metrics_path, rounded(values))
            if progress is not None:
                progress(values, trainer.num_steps)
        is_last = step == trainer.num_steps or validator.exhausted
        if step % config.train.save_every == 0 or is_last or trainer.signal:
            is_saved = save()
            if trainer.signal and not is_last:
                end(is_saved)
    if profiler is not None:
        profiler.finish()
    communicator.doing = "writing the adapter"
    last = trainer.last
    save_adapter(trainer.model, run / "adapter", trainer.stage, communicator.writes)
    if validator.best is not None and validator.best_step != last["step"] and communicator.writes:
        copy_adapter(run / "adapter", run / "adapter-last")
        if validator.has_best_adapter():
            copy_adapter(validator.folder, run / "adapter")
        else:
            logger.warning(
                "%s is not the adapter of the best step %d any more; %s holds that of the last step",
                validator.folder,
                validator.best_step,
                run / "adapter",
            )
    communicator.barrier()
    return TrainResult(
        adapter_path=run / "adapter",
        metrics_path=metrics_path,
        num_items=ready.num_items,
        num_held_out=ready.num_held_out,
        num_steps=last["step"],
        best_step=validator.best_step or last["step"],
        stopped_early=validator.exhausted,
        alarm=trainer.alarm.text,
        first=trainer.first,
        last=last,
        seconds=time.perf_counter() - started,
        profile=() if profiler is None else profiler.ranges,
        profile_path=profiler.folder if profiler is not None and profiler.ranges else None,
    )


@contextmanager
def _run_lock(run: Path) -> Iterator[None]:
    """Hold the run folder, which two trainings would mix up."""
    run.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(run / ".train.lock", blocking=False):
            yield
    except Timeout:
        raise EnvironmentProblem(
            f"{run} is being trained by another process; wait for it, or choose another run folder"
        ) from None


def _check_equal(communicator: Communicator, stage: int, config: Config) -> None:
    """Refuse ranks that would do different things, on every rank, before they wait for each other."""
    mine = torch.tensor([stage, int(config_hash(config.train)[:12], 16), int(config_hash(config.data)[:12], 16)])
    everyone = communicator.gather(mine.to(communicator.device))
    for name, values in zip(("ZeRO stage", "section train", "section data"), everyone.T.tolist(), strict=True):
        if len(set(values)) > 1:
            raise ConfigError(
                f"the ranks differ in {name}; give every host the same configuration, and set train.zero_stage where cards "
                "are of different sizes"
            )


def _saved(
    store: CheckpointStore, identity: dict[str, Any], allow_mismatch: Collection[str], run: Path
) -> Checkpoint | None:
    """The checkpoint to go on from, which has to be one of this training."""
    store.clean()
    saved = store.newest()
    check_same_training(identity if saved is None else saved.state["identity"], identity, allow_mismatch, str(run))
    if saved is not None:
        logger.info("going on after step %d, from %s", saved.step, store.folder / saved.name)
    return saved


def _cut(path: Path, size: int) -> None:
    """Take back the lines of steps that will be taken again."""
    if path.exists() and path.stat().st_size > size:
        os.truncate(path, size)


def _numpy(tensors: Mapping[str, torch.Tensor]) -> Tensors:
    return {name: value.detach().cpu().numpy() for name, value in tensors.items()}


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


def _on_cpu(config: Config, device: torch.device) -> Config:
    """The model is loaded in host memory, mapped from its files, with the dtype it will have on the device."""
    dtype = dtype_name(resolve_dtype(config.model.dtype, device))
    return config.model_copy(update={"model": config.model.model_copy(update={"device": "cpu", "dtype": dtype})})


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
        per_epoch = math.ceil(len(examples) / config.train.batch_pairs)
        num_steps = per_epoch * config.train.num_epochs
        self.num_steps = min(num_steps, config.train.max_steps or num_steps)
        self.eval_every = config.train.eval_every or per_epoch
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
            num_warmup_steps=math.ceil(config.train.warmup_ratio * self.num_steps),
            num_training_steps=self.num_steps,
        )
        self.engine = initialize_engine(objective, optimizer, scheduler, config.train, stage, communicator.device)
        self.alarm = OverOptimisationAlarm(config.train.alarm_nats)
        self.rows_seen = 0
        self.num_done = 0  # steps taken, before this process too
        self.signal = 0  # the one that some rank has received
        self.first: dict[str, Any] = {}  # metrics of the first and of the newest step
        self.last: dict[str, Any] = {}
        self.unvalidated: dict[str, Any] | None = None  # metrics of a step whose validation has not ended
        self.gradients_finite = torch.ones((), dtype=torch.bool, device=communicator.device)
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
        for epoch in range(self.config.train.num_epochs):
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
        if self.stage == 0:
            for parameter in self.trainable:
                parameter.grad = None
        finite = torch.isfinite(result.columns["losses"])
        flags = torch.cat([self.gradients_finite.reshape(1), finite]).float()
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
            found = metrics.read(self.gradients_finite, self._gradient_norm(), signal=signal)
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
        self._watch(total)

    def _watch_collapse(self, step: int, values: dict[str, Any]) -> None:
        if "logps/chosen_drift" not in values:
            return
        text = self.alarm.update(step, values["logps/chosen_drift"], values["rewards/margins"])
        if text is not None:
            logger.warning("%s", text)
        values["alarm"] = self.alarm.raised_at is not None

    def _gradient_norm(self) -> torch.Tensor:
        """Global norm before clipping, or 0 under ZeRO, which keeps gradients in its own buffers until its step."""
        gradients = [parameter.grad for parameter in self.trainable if parameter.grad is not None]
        if self.stage > 0 or not gradients:
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
