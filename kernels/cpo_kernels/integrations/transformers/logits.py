"""From the output head's products to the final logits: what a model's configuration says of its scale and soft-cap.

    z = softcap * tanh(logit_scale * (h W^T + b) / softcap)

Everything that computes logits here asks `logit_transform`: policy, reference, the proof of `prepare`, and a search.
`prepare` proves what it says on the model itself.
"""

from typing import TypedDict

import torch

from cpo_kernels.integrations.transformers.model import ModelParts
from cpo_kernels.linear_logprob.results import Head

# configuration key -> whether the model multiplies its logits by it, or divides them
_SCALES = {"logit_scale": True, "lm_head_multiplier": True, "logits_scaling": False}
_MULTIPLIED = ("hyperclovax",)  # model types that multiply by every key


class LogitTransform(TypedDict):
    """Arguments of `linear_logprob` and `Head`."""

    logit_scale: float
    softcap: float | None


def logit_transform(parts: ModelParts) -> LogitTransform:
    """Scale and soft-cap of a model's final logits.

    Raises:
        ValueError: a scale that is no number.
    """
    config, scale = parts.config, 1.0
    for key, multiplies in _SCALES.items():
        value = getattr(config, key, None)
        if value is None:
            continue
        if not isinstance(value, int | float):
            raise ValueError(f"{type(parts.causal_lm).__name__} has {key}={value!r}: expected a number")
        scale = scale * value if multiplies or config.model_type in _MULTIPLIED else scale / value
    return {"logit_scale": float(scale), "softcap": getattr(config, "final_logit_softcapping", None)}


def final_logits(parts: ModelParts, products: torch.Tensor) -> torch.Tensor:
    """Final logits of the head's products [R, V] (its bias included), in the dtype of these."""
    weight = parts.head.weight
    assert isinstance(weight, torch.Tensor)
    return Head(weight, **logit_transform(parts)).transform(products)
