"""The distribution that `generate` samples from, by Hugging Face's own processors in its own order."""

from collections.abc import Sequence

import numpy as np
import torch
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)


def processed(
    logits: torch.Tensor, ids: Sequence[int], temperature: float, top_p: float, top_k: int, penalty: float
) -> np.ndarray:
    """[V] float64 probabilities after logits [V], for a row that holds `ids`."""
    processors = LogitsProcessorList()
    if penalty != 1:
        processors.append(RepetitionPenaltyLogitsProcessor(penalty))
    processors.append(TemperatureLogitsWarper(temperature))
    if top_k:
        processors.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        processors.append(TopPLogitsWarper(top_p))
    row = torch.tensor([list(ids)], dtype=torch.long)
    return processors(row, logits.double()[None])[0].softmax(-1).numpy()
