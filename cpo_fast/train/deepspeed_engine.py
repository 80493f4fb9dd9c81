"""DeepSpeed as the engine: its configuration written out in full, the optimizer it drives, weights cut over ranks."""

import io
import json
import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from packaging.version import Version

from cpo_fast.config import TrainConfig
from cpo_fast.errors import ConfigError, EnvironmentProblem, first_line

logger = logging.getLogger(__name__)

REDUCE_BUCKET_SIZE = 20_000_000  # elements that stages 1 to 3 reduce at a time
OLDEST = "0.19.5"  # release of DeepSpeed: 0.19.4 cannot offload where the number of micro-batches varies


def deepspeed_config(config: TrainConfig, stage: int) -> dict[str, Any]:
    """The dictionary given to `deepspeed.initialize`. A bf16 or fp16 section in it would cast the float32 adapters.

    Raises:
        ConfigError: the user's JSON (`train.deepspeed`) cannot be read, contradicts ours, or asks for what is not exact.
    """
    zero: dict[str, Any] = {"stage": stage, "overlap_comm": False}
    if config.offload != "none" and stage > 0:
        zero["offload_optimizer"] = {"device": "cpu"}
    if stage == 3 and config.offload == "all":
        zero["offload_param"] = {"device": "cpu"}
    ours = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        # the number of micro-batches varies, and a fixed count gives wrong averages under ZeRO 1 and 2
        "managed_gradient_accumulation": False,
        "gradient_clipping": config.max_grad_norm,  # written out even at 0: DeepSpeed clips at 1.0 by default
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # the optimizer is torch's, wherever its state lies
        "steps_per_print": 1_000_000_000,
        "wall_clock_breakdown": False,
    }
    theirs = {} if config.deepspeed is None else _read_json(Path(config.deepspeed))
    merged, conflicts = _merge(ours, theirs, "")
    refused = [key for key in REFUSED if _is_on(_get(theirs, key))]
    if refused or conflicts:
        reasons = [f"{key}: {REFUSED[key]}" for key in refused] + conflicts
        raise ConfigError(f"train.deepspeed: {config.deepspeed}: {'; '.join(reasons)}; take these keys out")
    # DeepSpeed's 500 million numbers are memory that stage 3 takes whole, and an adapter's gradients are few
    merged["zero_optimization"].setdefault("reduce_bucket_size", REDUCE_BUCKET_SIZE)
    if stage == 3:
        # adapters of a few thousand elements stay whole: gathering them costs more than they weigh
        merged["zero_optimization"].setdefault("stage3_param_persistence_threshold", 100_000)
    return merged


# what a user's JSON may not turn on, and why
REFUSED = {
    "optimizer": "the optimizer is set by train.lr, train.weight_decay and train.adam_*",
    "scheduler": "the schedule is set by train.schedule and train.warmup_ratio",
    "fp16": "it would cast the float32 adapters",
    "bf16": "it would cast the float32 adapters; model.dtype sets the base's dtype",
    "torch_autocast": "the dtypes are those of the weights",
    "communication_data_type": "it rounds gradients",
    "data_types": "it rounds gradients",
    "zero_optimization.offload_optimizer": "train.offload decides it",
    "zero_optimization.offload_param": "train.offload decides it",
    "zero_optimization.zero_hpz_partition_size": "hpZ (ZeRO++) has not been shown exact here",
    "zero_optimization.zero_quantized_weights": "ZeRO++ rounds weights",
    "zero_optimization.zero_quantized_nontrainable_weights": "ZeRO++ rounds weights",
    "zero_optimization.zero_quantized_gradients": "ZeRO++ rounds gradients",
    "zero_optimization.mics_shard_size": "MiCS has not been shown exact here",
}


def _is_on(value: Any) -> bool:
    """Whether a user's value turns a part of DeepSpeed on; sizes of 1 and sections that say `enabled: false` do not."""
    if isinstance(value, dict):
        return bool(value) and value.get("enabled", True) is not False
    return value is True or value not in (None, False, 1, -1)


def _get(values: Mapping[str, Any], key: str) -> Any:
    found: Any = values
    for part in key.split("."):
        found = found.get(part) if isinstance(found, dict) else None
    return found


def _merge(ours: Mapping[str, Any], theirs: Mapping[str, Any], place: str) -> tuple[dict[str, Any], list[str]]:
    """Both together, and a sentence for every value in which they differ."""
    merged, conflicts = dict(ours), []
    for key, value in theirs.items():
        name = f"{place}{key}"
        if key not in ours:
            if value != "auto":  # of Hugging Face's integration, which fills it in
                merged[key] = value
        elif isinstance(value, dict) and isinstance(ours[key], dict):
            merged[key], inner = _merge(ours[key], value, f"{name}.")
            conflicts += inner
        elif value not in (ours[key], "auto"):
            conflicts.append(f"{name} is {value!r} there and {ours[key]!r} by our own configuration")
    return merged, conflicts


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"train.deepspeed: {path} cannot be read ({error.strerror}); check the path") from None
    except ValueError as error:
        raise ConfigError(f"train.deepspeed: {path} is not valid JSON ({first_line(error)}); mend it") from None
    if not isinstance(values, dict):
        raise ConfigError(f"train.deepspeed: {path} holds no JSON object; give a DeepSpeed configuration")
    return values


def adamw(config: TrainConfig, parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """The optimizer of every run."""
    return torch.optim.AdamW(
        parameters,
        lr=config.lr,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_eps,
        weight_decay=config.weight_decay,
    )


def partition(module: torch.nn.Module, config: TrainConfig, device: torch.device) -> None:
    """Cut every weight over the ranks as ZeRO 3 does, one after the other, so that no rank ever moves all of them.

    Until the engine gathers a weight for a forward it is empty. The ranks are connected already.
    """
    deepspeed = _import_deepspeed(device.type)
    dtype, values = next(module.parameters()).dtype, deepspeed_config(config, 3)
    with _quiet():
        deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
        if device.type == "cpu":
            # DeepSpeed overwrites every weight by that of rank 0. In pages mapped from a file this would make copies that
            # stay until the last weight is cut, so it gets one weight at a time in memory of its own
            for parameter in module.parameters():
                parameter.data = parameter.data.clone()
                deepspeed.zero.Init(module=torch.nn.ParameterList([parameter]), config_dict_or_path=values, dtype=dtype)
        deepspeed.zero.Init(module=module, config_dict_or_path=values, dtype=dtype)  # what is not cut yet
    for buffer in module.buffers():  # rotary frequencies, which are no weights
        buffer.data = buffer.data.to(device)


def initialize_engine(
    module: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: Any,
    config: TrainConfig,
    stage: int,
    device: torch.device,
) -> Any:
    """A DeepSpeed engine around the one module that computes everything. The ranks are connected already.

    Raises:
        EnvironmentProblem: DeepSpeed is missing or too old.
    """
    deepspeed = _import_deepspeed(device.type)
    with _quiet():
        deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
        engine, *_ = deepspeed.initialize(
            model=module,
            optimizer=optimizer,
            lr_scheduler=scheduler,
            model_parameters=[p for p in module.parameters() if p.requires_grad],
            config=deepspeed_config(config, stage),
        )
    # at stage 0 the step sums gradients itself, before it looks at them: a rank without pairs then needs no backward
    engine.enable_backward_allreduce = stage > 0
    return engine


MOMENTS = ("exp_avg", "exp_avg_sq")


def read_moments(engine: Any, parameters: Mapping[str, torch.nn.Parameter], stage: int) -> dict[str, torch.Tensor]:
    """AdamW's moments, whole, by `exp_avg.NAME` and `exp_avg_sq.NAME`, or none of another optimizer.

    Under ZeRO every rank has to call.
    """
    optimizer = engine.optimizer if stage == 0 else engine.optimizer.optimizer
    if not any(MOMENTS[0] in state for state in optimizer.state.values()):
        return {}
    found = {}
    for name, parameter in parameters.items():
        for moment in MOMENTS:
            if stage == 0:
                value = optimizer.state[parameter][moment]
            else:
                value = _deepspeed_utils().safe_get_full_optimizer_state(parameter, moment)
            found[f"{moment}.{name}"] = value.view(_shape(parameter))
    return found


def read_adapter(parameters: Mapping[str, torch.nn.Parameter], stage: int) -> dict[str, torch.Tensor]:
    """The adapter's float32 weights, whole, by name. Under ZeRO 3 every rank has to call."""
    if stage < 3:
        return {name: parameter.detach() for name, parameter in parameters.items()}
    read = _deepspeed_utils().safe_get_full_fp32_param
    return {name: read(parameter).view(_shape(parameter)) for name, parameter in parameters.items()}


def restore_optimizer(
    engine: Any,
    parameters: Mapping[str, torch.nn.Parameter],
    moments: Mapping[str, torch.Tensor],
    step: int,
    stage: int,
) -> None:
    """Give a fresh engine AdamW's moments and the place of its schedule, as `step` updates leave them.

    The adapter's weights were put into the module before the engine was made: set afterwards, the weights that ZeRO 3
    gathers for a forward would stay the old ones.
    """
    scheduler = engine.lr_scheduler
    scheduler.last_epoch, scheduler._step_count = step, step + 1
    rates = [base * rate(step) for base, rate in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)]
    for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    scheduler._last_lr = rates
    engine.global_steps = step
    if not moments:
        return
    if stage == 0:
        for name, parameter in parameters.items():
            state = {moment: moments[f"{moment}.{name}"].to(parameter.device) for moment in MOMENTS}
            engine.optimizer.state[parameter] = {"step": torch.tensor(float(step)), **state}
        return
    # the flat tensors that torch's optimizer sees; it makes their state in its first step, and DeepSpeed links to it then
    zero = engine.optimizer
    flat = zero.fp32_partitioned_groups_flat if stage == 3 else zero.single_partition_of_fp32_groups
    for tensor in flat:
        zero.optimizer.state[tensor] = {
            "step": torch.tensor(float(step)),
            **{moment: torch.zeros_like(tensor) for moment in MOMENTS},
        }
    if stage < 3:
        zero._lazy_init_hp_params_optimizer_state()
    for name, parameter in parameters.items():
        for moment in MOMENTS:
            value = moments[f"{moment}.{name}"].to(flat[0].device)
            if stage == 3:
                # DeepSpeed's own setter reads past the end where a tensor does not divide by the number of ranks
                part, _ = zero._get_fp32_opt_state_partition(
                    parameter, release_swap_buffers=False, optim_state_key=moment
                )
                start = parameter.partition_numel() * engine.global_rank  # type: ignore[attr-defined]
                end = start + part.numel()
                padded = torch.nn.functional.pad(value.flatten(), (0, max(0, end - value.numel())))
                part.data.copy_(padded[start:end])
            else:
                _deepspeed_utils().safe_set_full_optimizer_state(parameter, value, moment)


def _shape(parameter: torch.nn.Parameter) -> torch.Size:
    return getattr(parameter, "ds_shape", parameter.shape)


def _deepspeed_utils() -> Any:
    import deepspeed.utils

    return deepspeed.utils


def _import_deepspeed(device_type: str) -> Any:
    if device_type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # read at import, or DeepSpeed warns that it guesses
    try:
        with _quiet():
            import deepspeed
    except ImportError as error:
        raise EnvironmentProblem(f"training needs DeepSpeed ({error}); install it: pip install deepspeed") from None
    if Version(deepspeed.__version__) < Version(OLDEST):
        raise EnvironmentProblem(
            f"DeepSpeed {deepspeed.__version__} is too old for training, which needs {OLDEST} or newer; install it: "
            f"pip install 'deepspeed>={OLDEST}'"
        )
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # DeepSpeed calls collectives by names that torch renamed
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\.c10d_logger")
    # one process has nobody to share memory with, and compiling this op on first use waits forever for the lock of an
    # earlier run that was killed while compiling
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


@contextmanager
def _quiet() -> Iterator[None]:
    """Log what DeepSpeed prints while it starts, and keep it out of standard output, where `--json` writes."""
    output = io.StringIO()
    with redirect_stdout(output):
        yield
    if output.getvalue().strip():
        logger.debug("DeepSpeed: %s", output.getvalue().strip())
