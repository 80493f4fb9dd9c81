"""Saving the adapter in PEFT's own format, gathered from ZeRO-3 shards, whole or not at all."""

import os
import shutil
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from peft import get_peft_model_state_dict
from safetensors import safe_open

from cpo_fast.errors import CheckpointError
from cpo_fast.train.policy import ADAPTER


def save_adapter(model: Any, folder: Path, zero_stage: int) -> None:
    """Write `adapter_model.safetensors` and `adapter_config.json` beside `folder`, check them, then rename.

    Raises:
        CheckpointError: the written file lacks a tensor or holds an empty one.
    """
    with _gathered(model, zero_stage):
        state = {
            key: value.detach().to("cpu", copy=True)
            for key, value in get_peft_model_state_dict(
                model, adapter_name=ADAPTER, save_embedding_layers=False
            ).items()
        }
    aside = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    model.save_pretrained(aside, selected_adapters=[ADAPTER], state_dict=state, save_embedding_layers=False)
    with safe_open(aside / "adapter_model.safetensors", framework="pt") as file:
        written = {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118 - not a mapping
    if {key: list(value.shape) for key, value in state.items()} != written or any(0 in s for s in written.values()):
        raise CheckpointError(f"{aside}: the written adapter does not hold the {len(state)} tensors that were trained")
    _replace(aside, folder)


def copy_adapter(source: Path, target: Path) -> None:
    """Copy an adapter folder over another, whole or not at all."""
    aside = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    shutil.copytree(source, aside)
    _replace(aside, target)


def _replace(aside: Path, folder: Path) -> None:
    old = folder.with_name(f".{folder.name}.{os.getpid()}.old")
    if folder.exists():
        os.replace(folder, old)
    os.replace(aside, folder)
    shutil.rmtree(old, ignore_errors=True)


def _gathered(model: Any, zero_stage: int) -> AbstractContextManager[Any]:
    if zero_stage < 3:
        return nullcontext()
    import deepspeed

    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    context: AbstractContextManager[Any] = deepspeed.zero.GatheredParameters(trainable, modifier_rank=None)
    return context
