"""Merge an adapter into its base model, and measure what the merge changed before anything is kept.

    W' = round(W + (alpha / r) B A)

The sum is made in float32 and rounded once to the base dtype. Rounding is a change: the merged model is compared with base
plus adapter, token by token, as KL divergence of their next-token distributions on real prompts, and refused above a limit.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cpo_fast.config import Config
from cpo_fast.errors import CheckpointError, ConfigError
from cpo_fast.models import load_model

MAX_PROMPTS = 16  # texts that are compared; a few thousand positions


@dataclass(frozen=True)
class MergeResult:
    """Where the merged model is, and KL(adapter || merged) per position in nats."""

    path: Path
    mean_kl: float
    max_kl: float
    num_positions: int


def merge(config: Config, target: Path, texts: Sequence[str], max_mean_kl: float) -> MergeResult:
    """Write `config.model.path` with `config.model.adapter` merged in to `target`.

    Args:
        config: section `model`; its dtype is the dtype of the merged weights.
        target: folder that must not hold a model yet.
        texts: prompts on which the two models are compared; the first 16 are used.
        max_mean_kl: limit on the mean divergence, in nats.

    Raises:
        ConfigError: no adapter is set, or the target exists.
        CheckpointError: the merged model differs by more than the limit; nothing is written.
    """
    if config.model.adapter is None:
        raise ConfigError("model.adapter is not set; give the folder of the adapter to merge")
    if target.exists() and any(target.iterdir()):
        raise ConfigError(f"{target}: the folder is not empty; choose another one for the merged model")
    model, tokenizer = load_model(config.model)
    batches = [tokenizer(text, return_tensors="pt").input_ids.to(model.device) for text in texts[:MAX_PROMPTS]]
    expected = _log_probs(model, batches)
    dtype = model.get_base_model().dtype
    del model
    model, _ = load_model(config.model.model_copy(update={"dtype": "float32"}))
    merged = model.merge_and_unload().to(dtype)
    divergences = torch.cat(
        [
            (left.exp() * (left - right)).sum(dim=-1).flatten()
            for left, right in zip(expected, _log_probs(merged, batches), strict=True)
        ]
    ).clamp_min(0)
    mean_kl, max_kl = float(divergences.mean()), float(divergences.max())
    if not mean_kl <= max_mean_kl:
        raise CheckpointError(
            f"the merged model differs from base plus adapter by {mean_kl:.2e} nats a token on average, more than "
            f"{max_mean_kl:.2e}; merge in float32 (model.dtype=float32) or keep the adapter apart"
        )
    target.mkdir(parents=True, exist_ok=True)
    merged.save_pretrained(target)
    tokenizer.save_pretrained(target)
    return MergeResult(target, mean_kl, max_kl, divergences.numel())


def _log_probs(model: Any, batches: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    with torch.inference_mode():
        return [torch.log_softmax(model(ids).logits.double(), dim=-1) for ids in batches]
