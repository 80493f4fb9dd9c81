"""Packed log-probabilities for Hugging Face models: `prepare` once, then `packed_logps` a micro-batch.

model = prepare(model)                                               # PreTrainedModel or PeftModel
out = packed_logps(model, sequences, starts, reference="adapter_off")
loss = preference_loss(*out.segment_logps.view(2, -1), *out.ref_segment_logps.view(2, -1)).losses.mean()
"""

from cpo_kernels.integrations.transformers.packed import PackedLogps, PairTooLarge, packed_logps, split_pairs
from cpo_kernels.integrations.transformers.prepare import prepare

__all__ = ["PackedLogps", "PairTooLarge", "packed_logps", "prepare", "split_pairs"]
