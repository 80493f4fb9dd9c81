"""Packed log-probs behind a padded batch: [B, L] ids and masks in, [B, L - 1] log-probs out, a forest in between.

Trainers hand padded rows to a model and read one number per position. `packed_token_logps` takes such a batch, strips
the padding, scores the rows through `packed_logps` and puts every number back where the padded forward would have it,
so that a trainer's own loss runs unchanged. B rows, L padded length.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from cpo_kernels.integrations.transformers import packed_logps
from cpo_kernels.integrations.transformers.model import unwrap_peft


@dataclass(frozen=True)
class PaddedLogps:
    """Column i belongs to the token at position i + 1. What was not scored is exactly 0 (False) and has no gradient."""

    logps: torch.Tensor  # [B, L - 1] float32 (float64 for a float64 model)
    outputs: dict[str, torch.Tensor]  # [B, L - 1] each, what was asked
    num_tokens: int  # tokens that met the backbone
    num_padded_tokens: int  # B L: tokens of the batch as it was padded


def packed_token_logps(
    model: torch.nn.Module,
    input_ids: torch.Tensor,  # [B, L] int64
    attention_mask: torch.Tensor,  # [B, L], nonzero at real tokens
    scored: torch.Tensor,  # [B, L] bool, tokens whose log-prob is wanted
    outputs: Sequence[str] = (),
    impl: str | None = None,
) -> PaddedLogps:
    """Log-probs of the scored tokens of a padded batch, each given the real tokens before it in its row.

    A float32 model runs under the caller's autocast, one in 16 bits in its own dtype. Logits are never rounded to 16 bits.
    A scored token that opens its row has nothing to be predicted from and counts as not scored.

    Args:
        model: a prepared model, as `packed_logps` takes it.
        outputs: any of "entropy", "mean_logit", "is_top1", without gradient.
        impl: implementation of the kernels, None to choose by device.

    Raises:
        ValueError: shapes differ, a row has no real token, or its real tokens are not one run.
    """
    if input_ids.ndim != 2 or attention_mask.shape != input_ids.shape or scored.shape != input_ids.shape:
        raise ValueError(
            "packed_token_logps: expected input_ids, attention_mask and scored [B, L], "
            f"got {tuple(input_ids.shape)}, {tuple(attention_mask.shape)}, {tuple(scored.shape)}"
        )
    # the token trie is built on the host, so one copy to it is needed whatever the device
    ids, real, wanted = input_ids.cpu(), attention_mask.bool().cpu(), scored.bool().cpu()
    position = torch.arange(ids.shape[1])
    first, length = real.int().argmax(dim=1), real.sum(dim=1)
    one_run = (position >= first[:, None]) & (position < (first + length)[:, None])
    wrong = ((length == 0) | (one_run != real).any(dim=1)).nonzero().flatten().tolist()
    if wrong:
        raise ValueError(
            f"packed_token_logps: expected the real tokens of row {wrong[0]} to be one run of at least one token, "
            f"got {int(length[wrong[0]])} of them with a gap"
        )
    wanted &= real & (position > first[:, None])
    start = torch.where(wanted.any(dim=1), wanted.int().argmax(dim=1) - first, length)
    runs = [(f, f + n, s) for f, n, s in zip(first.tolist(), length.tolist(), start.tolist(), strict=True)]
    device_type, is_float32 = next(model.parameters()).device.type, unwrap_peft(model).dtype == torch.float32
    dtype, is_on = torch.get_autocast_dtype(device_type), torch.is_autocast_enabled(device_type)
    with torch.autocast(device_type, dtype, enabled=is_on and is_float32):
        packed = packed_logps(
            model,
            [ids[row, low:high].tolist() for row, (low, high, _) in enumerate(runs)],
            start.tolist(),
            impl=impl,
            outputs=outputs,
        )
    device = packed.result.token_logps.device
    # column of each scored token in the order of the plan, which is row by row
    column = torch.cat([torch.arange(low + offset - 1, high - 1) for low, high, offset in runs]).to(device)
    keep = wanted[:, 1:].to(device)

    def dense(values: torch.Tensor) -> torch.Tensor:
        empty = values.new_zeros(keep.shape)
        return empty.index_put((packed.plan.segments, column), values).masked_fill(~keep, 0)

    return PaddedLogps(
        logps=dense(packed.result.token_logps),
        outputs={name: dense(getattr(packed.result, name)) for name in outputs},
        num_tokens=packed.num_tokens,
        num_padded_tokens=ids.numel(),
    )
