"""A training from its configuration to its adapter: setting up, the order of what follows a step, and the run's files.

`train` holds the run folder and listens to signals. What one step does is `Trainer.step` (`cpo_fast.train.trainer`), and
what is optimised is the objective's affair (`cpo_fast.train.objective`).
"""

import logging
import os
import shutil
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from signal import Signals
from typing import Any

import torch
from filelock import FileLock, Timeout

from cpo_fast import progress as progress_line
from cpo_fast.adapters import ADAPTER, adapter_hash, copy_adapter, save_adapter
from cpo_fast.config import Config, config_hash, dump_config
from cpo_fast.data.batches import split_by_question, weigh
from cpo_fast.data.examples import Example
from cpo_fast.data.load import check_data, load_examples
from cpo_fast.dtype import dtype_name, resolve_dtype
from cpo_fast.errors import ConfigError, DataError, EnvironmentProblem, Interrupted, first_line
from cpo_fast.evaluate.statistics import wilson_interval
from cpo_fast.files import append_line, canonical_json, write_atomic
from cpo_fast.interrupts import exit_code_of
from cpo_fast.model_card import Training, adapter_card
from cpo_fast.models import num_embeddings, resolve_device
from cpo_fast.ranks import find_ranks
from cpo_fast.train.checkpoint import Checkpoint, CheckpointStore
from cpo_fast.train.communication import Communicator, connect, disconnect_at_exit, is_lost_connection, meet
from cpo_fast.train.deepspeed_engine import (
    adamw,
)
from cpo_fast.train.dev_questions import load_dev_questions
from cpo_fast.train.heartbeat import Heartbeat
from cpo_fast.train.memory import choose_stage
from cpo_fast.train.metrics import rounded
from cpo_fast.train.objective import Objective
from cpo_fast.train.policy import (
    Policy,
    base_hash,
    load_policy,
    prepare_policy,
    put_adapter,
    starts_off_reference,
)
from cpo_fast.train.preflight import check_hosts
from cpo_fast.train.profiler import RangeTotal, StepProfiler
from cpo_fast.train.reference import ReferenceCache, is_cached
from cpo_fast.train.resume import check_same_training, training_identity, training_sources
from cpo_fast.train.signals import EndSignals
from cpo_fast.train.trackers import check_trackers, tracking
from cpo_fast.train.trainer import MakeOptimizer, Trainer
from cpo_fast.train.validation import Validator

logger = logging.getLogger(__name__)

HARDLY = 0.01  # a margin of rewards, or a share of the loss, below which a training has done next to nothing
Progress = Callable[[dict[str, Any], int], None]  # (metrics of the step, total steps)


@dataclass(frozen=True)
class TrainResult:
    """Where the adapter and the metrics are, and the first and last line of the metrics.

    `num_items` counts what was trained on (pairs, or completions), `num_held_out` the rows that were validated on, and
    `measured_on` says what chose the best adapter, or "" where there was no validation. `adapter_path` is
    the best adapter where there was a validation (after `best_step`, which is 0 where no step was better than the starting
    point), else the last. `stopped_early` says that patience ran out. `alarm` has the sentences of the over-optimisation
    alarms, or "", and `remarks` are further sentences that a user should see. `profile` has the named ranges of the
    profiled steps, whose trace lies in `profile_path`.
    """

    adapter_path: Path
    metrics_path: Path
    num_items: int
    num_held_out: int
    measured_on: str
    num_steps: int
    best_step: int
    stopped_early: bool
    alarm: str
    first: dict[str, Any]
    last: dict[str, Any]
    seconds: float
    remarks: tuple[str, ...] = ()
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
    trackers = config.train.trackers if communicator.writes else ()
    check_trackers(trackers)
    with (
        progress_line.stage("train"),
        _run_lock(run) if communicator.writes else nullcontext(),
        EndSignals(config.train.grace, partial(_remains, run)) as signals,
    ):
        with signals.leaving_at_once():
            store = meet(ranks)
            stuck = 0.9 * config.train.collective_timeout if device.type == "cuda" else None
            heartbeat = Heartbeat(communicator, store, config.train.heartbeat, stuck)
            check_hosts(communicator, store, config)
        with heartbeat:
            try:
                with signals.leaving_at_once():
                    ready = _set_up(config, model, tokenizer, make_optimizer, allow_mismatch, communicator, store)
                with tracking(trackers, run, resumes=ready.trainer.num_done > 0):
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

    trainer: Trainer
    checkpoints: CheckpointStore
    identity: dict[str, Any]
    sources: dict[str, str]
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
    check_data(config)
    policy = load_policy(_on_cpu(config, device) if stage == 3 else config, model, tokenizer)
    # before the ranks are connected, which may then take long (see `connect`)
    loaded = load_examples(config, policy.tokenizer, run / "dropped.jsonl" if ranks.rank == 0 else None)
    everything = loaded.examples
    parts = split_by_question(everything, config.data.held_out, config.seed)
    # after the split, because weights average to 1 over what is trained
    examples, held_out = (weigh(part, config.pairs.weight) for part in parts)
    _check_vocabulary(everything, policy)
    if stage == 3 and config.train.stop_on != "held_out_loss":
        raise ConfigError(
            f"train.stop_on={config.train.stop_on} generates, which ZeRO stage 3 cannot: its ranks would wait for each "
            "other's weights at every token; use train.stop_on=held_out_loss or train.zero_stage=0"
        )
    dev = load_dev_questions(
        config, policy.tokenizer, examples, held_out, num_embeddings(policy.model.get_base_model())
    )
    base, dtype = base_hash(config, policy) if ranks.rank == 0 else "", policy.model.get_base_model().dtype
    connect(communicator, config.train.collective_timeout, store)
    communicator.doing = "making the engine"
    _check_equal(communicator, stage, config)
    communicator.from_first(lambda: _check_sampler(config, base, loaded.samplers))
    checkpoints = CheckpointStore(run / "checkpoints", config.train.keep_last)
    identity = training_identity(config, base, dtype_name(dtype), everything)
    sources = training_sources(config, len(everything))
    saved = communicator.from_first(lambda: _saved(checkpoints, identity, sources, allow_mismatch, run))
    if saved is not None:
        put_adapter(policy.model, saved.adapter)
    if communicator.writes:
        write_atomic(run / "config.yaml", dump_config(config))
    objective = Objective(policy.model, config.train, policy.reference)
    trainer = Trainer(config, policy, objective, examples, communicator, stage, make_optimizer)
    with torch.no_grad():
        communicator.doing = "preparing the model"
        policy = trainer.with_whole_weights(partial(prepare_policy, policy=policy, config=config))
        assert policy.impl is not None
        objective.impl = policy.impl
        if is_cached(config, stage, trainer.num_steps > trainer.steps_per_epoch):
            communicator.doing = "computing the reference's log-probs"
            folder = Path(config.train.reference_cache or run / "reference")
            reference = ReferenceCache(config, base, dtype, everything, folder)
            logps = partial(reference.logps, policy=policy, communicator=communicator)
            objective.ref_logps = trainer.with_whole_weights(logps)
    trainer.engine.train()
    trained = Training(
        config=config,
        base_hash=base,
        data_hash=identity["data"],
        adapter_hash=identity["model.adapter"],
        dtype=dtype_name(dtype),
        kind=str(policy.model.peft_config[ADAPTER].peft_type.value).lower(),
        num_items=len(examples),
        num_questions=len({example.group for example in examples}),
        num_held_out=len(held_out),
        num_steps=trainer.num_steps,
    )
    card = partial(_card, trained, trainer)
    trainer.validator = Validator(
        config, policy, objective, held_out, run, communicator, stage, dev, trainer.num_warmup, card
    )
    if saved is None:
        communicator.doing = "testing itself"
        # a question's pairs branch at every thought, so this forest has every kind of branch that training will meet
        forest = trainer.batches(0, "questions")[0]
        objective.self_test(trainer.engine, forest, communicator, starts_off_reference(config))
        objective.sampling_test(trainer.engine, forest, communicator)
    else:
        trainer.restore(saved)
    trainer.probe()
    if communicator.writes:
        (run / "remarks.json").unlink(missing_ok=True)
        if saved is None:
            (run / "metrics.jsonl").unlink(missing_ok=True)
        else:
            _cut(run / "metrics.jsonl", saved.state["metrics_bytes"])
    return _Ready(trainer, checkpoints, identity, sources, len(examples), len(held_out))


def _card(training: Training, trainer: Trainer, step: int, measured: Mapping[str, Any]) -> str:
    """The model card of the adapter after `step`, and what its validation has `measured`."""
    values = {**((trainer.unvalidated or trainer.last) if step else {}), **measured}
    dev = trainer.validator.dev
    intervals: dict[str, tuple[float, float]] = {}
    for name in ("eval_accuracy", "eval_agreement", "eval_answered", "eval_contradicted"):
        if dev is not None and name in values:
            number = len(dev.questions)
            intervals[name] = wilson_interval(round(values[name] * number), number)
    return adapter_card(training, step, values, intervals, trainer.alarm_text)


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
            state = {**checkpoint.state, "identity": ready.identity, "sources": ready.sources, "metrics_bytes": size}
            is_saved = ready.checkpoints.save(replace(checkpoint, state=state), validator.best_step)
        return is_saved

    def end(is_saved: bool) -> None:
        communicator.doing = f"writing the adapter of step {trainer.num_done}"
        with suppress(OSError):  # a full disk: what is said below tells what there is
            card = validator.card(trainer.num_done, {})
            save_adapter(trainer.model, run / "adapter-last", trainer.stage, communicator.writes, card)
        # no rank leaves before rank 0 has saved: a launcher would then end that too
        saved_where = (
            f"is saved in {ready.checkpoints.folder}" if communicator.broadcast(is_saved) else "could not be saved"
        )
        raise Interrupted(
            f"{Signals(trainer.signal).name} after step {trainer.num_done} of {trainer.num_steps}, which {saved_where}; "
            f"{_remains(run)}; the same command goes on from the newest checkpoint",
            exit_code_of(trainer.signal),
        )

    if validator.active and not trainer.num_done:  # what every step has to be better than
        communicator.doing = "validating the starting point"
        began = time.perf_counter()
        with progress_line.stage("validation of the starting point"), signals.leaving_at_once():
            measured = validator.run(trainer.engine, 0)
        shown = [name for name in ("eval_loss", "eval_accuracy", "eval_agreement") if name in measured]
        logger.info("starting point: %s", ", ".join(f"{name} {measured[name]:.4f}" for name in shown))
        if communicator.writes:
            line = {"step": 0, "epoch": 0.0, "seconds": time.perf_counter() - began, **measured}
            append_line(metrics_path, rounded(line))
    progress_line.at(trainer.num_done, trainer.num_steps, "steps")
    for values in trainer.steps(profiler, signals):
        step = values["step"]
        if trainer.is_validated(step):
            trainer.unvalidated = values
            is_saved = save()  # a validation may take longer than the grace period of a signal
            if trainer.signal:
                end(is_saved)
            communicator.doing = f"validating after step {step}"
            with progress_line.stage(f"validation after step {step}"), signals.leaving_at_once():
                values.update(validator.run(trainer.engine, step))
            if "alarm" in values:
                values["alarm"] = bool(trainer.alarm_text)
        progress_line.at(step, trainer.num_steps, "steps")
        trainer.unvalidated = None
        trainer.first, trainer.last = trainer.first or values, values
        if communicator.writes:
            if step % config.train.log_every == 0 or step == trainer.num_steps or "eval_best_step" in values:
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
    card = validator.card(last["step"], {})
    save_adapter(trainer.model, run / "adapter", trainer.stage, communicator.writes, card)
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
    elif communicator.writes:  # of an interrupt
        shutil.rmtree(run / "adapter-last", ignore_errors=True)
    communicator.barrier()
    disconnect_at_exit()
    remarks = []
    wanted = config.train.max_steps
    if wanted is not None and last["step"] == trainer.num_steps < wanted:
        remarks.append(
            f"training ended after step {last['step']} and not {wanted} (train.max_steps), because train.num_epochs="
            f"{config.train.num_epochs} passes over {ready.num_items} rows have no more; leave train.num_epochs out to "
            "repeat the data"
        )
    if validator.best is not None and validator.best_step == 0:
        remarks.append(
            f"no step was better than the starting point, which {run / 'adapter'} holds, so that its answers are those of "
            f"{config.model.adapter or 'the base'}; that of the last step is {run / 'adapter-last'}; "
            f"{_what_to_try(trainer.first, last)}"
        )
    if remarks and communicator.writes:
        write_atomic(run / "remarks.json", canonical_json({"remarks": remarks}) + "\n")
    return TrainResult(
        adapter_path=run / "adapter",
        metrics_path=metrics_path,
        num_items=ready.num_items,
        num_held_out=ready.num_held_out,
        measured_on=validator.measured_on,
        num_steps=last["step"],
        best_step=last["step"] if validator.best is None else validator.best_step,
        stopped_early=validator.exhausted,
        alarm=trainer.alarm_text,
        first=trainer.first,
        last=last,
        seconds=time.perf_counter() - started,
        remarks=tuple(remarks),
        profile=() if profiler is None else profiler.ranges,
        profile_path=profiler.folder if profiler is not None and profiler.ranges else None,
    )


def _what_to_try(first: Mapping[str, Any], last: Mapping[str, Any]) -> str:
    """Advice after a training whose starting point was its best, by whether it has moved the model at all."""
    moved = abs(last.get("rewards/margins", 0.0)), abs(last["loss"] - first["loss"]) / abs(first["loss"] or 1)
    if max(moved) < HARDLY:
        return "the steps have hardly moved the model, so raise train.lr or train.max_steps"
    return "try a lower train.lr, fewer steps or more questions"


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


def _remains(run: Path) -> str:
    """What an interrupted training leaves to work with, in words."""
    found = [run / name / "adapter_model.safetensors" for name in ("adapter", "adapter-best", "adapter-last")]
    whole = [file for file in found if file.is_file()]  # folders get these names when they are whole
    if not whole:
        return "there is no adapter yet"
    return f"the last complete adapter is {max(whole, key=lambda file: file.stat().st_mtime).parent}"


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


def _check_sampler(config: Config, base: str, samplers: Collection[tuple[str, str]]) -> None:
    """Refuse trees that another model or adapter sampled where their log-probs are used as the policy's own."""
    start = (base, adapter_hash(config.model.adapter))
    others = sorted(set(samplers) - {start})
    # a model without files has no hash to compare, and the self-test compares the log-probs themselves
    if config.train.method == "tree_grpo" and config.model.path and others:
        model, adapter = others[0]
        raise DataError(
            f"the trees were sampled by model {model} with adapter {adapter or 'none'}, and this training starts from "
            f"model {start[0]} with adapter {start[1] or 'none'}; train.method=tree_grpo needs trees of the model that it "
            "starts from: collect again with it, or set model.path and model.adapter to the other"
        )


def _saved(
    store: CheckpointStore,
    identity: dict[str, Any],
    sources: dict[str, str],
    allow_mismatch: Collection[str],
    run: Path,
) -> Checkpoint | None:
    """The checkpoint to go on from, which has to be one of this training."""
    store.clean()
    saved = store.newest()
    state: Mapping[str, Any] = {"identity": identity} if saved is None else saved.state
    was = state.get("sources", {})  # which older checkpoints lack
    check_same_training(state["identity"], identity, allow_mismatch, str(run), (was, sources))
    if saved is not None:
        logger.info("going on after step %d, from %s", saved.step, store.folder / saved.name)
    return saved


def _cut(path: Path, size: int) -> None:
    """Take back the lines of steps that will be taken again."""
    if path.exists() and path.stat().st_size > size:
        os.truncate(path, size)


def _check_vocabulary(examples: Sequence[Example], policy: Policy) -> None:
    size = num_embeddings(policy.model.get_base_model())
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
