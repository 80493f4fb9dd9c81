"""DeepSpeed as the engine, on one process: its configuration written out in full, and the optimizer it drives."""

import io
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any

import torch

from cpo_fast.config import TrainConfig
from cpo_fast.errors import EnvironmentProblem

logger = logging.getLogger(__name__)


def deepspeed_config(config: TrainConfig) -> dict[str, Any]:
    """The dictionary given to `deepspeed.initialize`. A bf16 or fp16 section in it would cast the float32 adapters."""
    zero: dict[str, Any] = {"stage": config.zero_stage, "overlap_comm": False}
    if config.zero_stage == 3:
        # adapters of a few thousand elements stay whole: gathering them costs more than they weigh
        zero["stage3_param_persistence_threshold"] = 100_000
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        # the number of micro-batches varies, and a fixed count gives wrong averages under ZeRO 1 and 2
        "managed_gradient_accumulation": False,
        "gradient_clipping": config.max_grad_norm,  # written out even at 0: DeepSpeed clips at 1.0 by default
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 1_000_000_000,
        "wall_clock_breakdown": False,
    }


def adamw(config: TrainConfig, parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """The optimizer of every run."""
    return torch.optim.AdamW(
        parameters,
        lr=config.lr,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_eps,
        weight_decay=config.weight_decay,
    )


def initialize_engine(
    module: torch.nn.Module, optimizer: torch.optim.Optimizer, scheduler: Any, config: TrainConfig
) -> Any:
    """A DeepSpeed engine around the one module that computes everything.

    Raises:
        EnvironmentProblem: DeepSpeed is missing, or the process was launched as one of several.
    """
    device = next(module.parameters()).device
    deepspeed = _import_deepspeed(device.type)
    if int(os.environ.get("WORLD_SIZE", "1")) != 1:
        raise EnvironmentProblem(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but this version trains in one process; start it without a launcher"
        )
    with _quiet():
        if not torch.distributed.is_initialized():
            # a store inside the process: no port that another run may take, no variables that children would inherit
            backend = "nccl" if device.type == "cuda" else "gloo"
            torch.distributed.init_process_group(backend, store=torch.distributed.HashStore(), rank=0, world_size=1)
        os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed's engine asserts that a launcher has set it
        deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
        engine, *_ = deepspeed.initialize(
            model=module,
            optimizer=optimizer,
            lr_scheduler=scheduler,
            model_parameters=[p for p in module.parameters() if p.requires_grad],
            config=deepspeed_config(config),
        )
    return engine


def _import_deepspeed(device_type: str) -> Any:
    if device_type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # read at import, or DeepSpeed warns that it guesses
    try:
        with _quiet():
            import deepspeed
    except ImportError as error:
        raise EnvironmentProblem(
            f"training needs DeepSpeed ({error}); install it: pip install 'cpo-fast[train]'"
        ) from None
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
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
