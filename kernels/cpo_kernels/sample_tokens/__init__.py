"""One token for each row of logits, by inverse CDF in float64 from a given uniform number.

    scores  = logits after the repetition penalty
    p       = exp((scores - max) / temperature), 0 below the k-th largest score, 0 outside the nucleus of mass top_p
    token   = min { t : sum_{s <= t} p_s > u sum_s p_s },   s in the order of the ids

`eager` is plain torch with whole sorts and the specification (`reference` names the same function). `triton` are the GPU
kernels of `triton_sampler`, which sort nothing and run on a CPU under TRITON_INTERPRET=1. Both are float64 and differ where
a sum that is rounded otherwise, by 1e-16 of the mass, decides.
"""

import torch

from cpo_kernels.implementation import available_implementations, resolve_implementation
from cpo_kernels.sample_tokens.check import check_sample_tokens
from cpo_kernels.sample_tokens.eager import NOT_FINITE, sample_tokens_eager

__all__ = ["NOT_FINITE", "resolve_sample_tokens", "sample_tokens"]


@torch.no_grad()
def sample_tokens(
    logits: torch.Tensor,  # [B, V] float32
    uniforms: torch.Tensor | None,  # [B, S] float64
    step: torch.Tensor,  # [B] int64
    temperature: torch.Tensor,  # [B] float64
    top_p: torch.Tensor | None = None,  # [B] float64
    top_k: torch.Tensor | None = None,  # [B] int64
    penalty: torch.Tensor | None = None,  # [B] float64
    seen: torch.Tensor | None = None,  # [B, V] bool
    impl: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose each row's token. Nothing waits for the device, so that a CUDA graph can be recorded of it.

    Args:
        logits: [B, V], unprocessed. -inf excludes a token.
        uniforms: [B, S] in [0, 1), of which a row reads number `step`, or its last. None: every row is greedy.
        step: [B] from 0 on.
        temperature: [B]. A row of 0 is greedy: its largest score, the smallest id on a tie.
        top_p: [B]. Tokens in order of falling probability, equals by id, are kept while the mass before them is below it. 1
            keeps all. None: so do all rows.
        top_k: [B] from 1 to V. So many of the largest scores are kept, and all that equal the last.
        penalty: [B]. Divides a positive logit of a token in `seen` and multiplies a negative one. None for no row.
        seen: [B, V], goes with `penalty`. The chosen token is set in place.
        impl: "reference", "eager", "triton", or None to choose by device.

    Returns:
        Tokens [B] int64, `NOT_FINITE` where a row holds NaN or +inf or excludes every token, and log-probs [B] float64:
        natural, at temperature 1, of the unprocessed logits.

    Raises:
        ValueError: shapes do not fit, or `impl` cannot run here.
        KernelCheckError: `impl` is None, and the Triton kernels are wrong on this device, whose default they are.
    """
    num_rows, vocab = logits.shape
    columns = [x for x in (step, temperature, top_p, top_k, penalty) if x is not None]
    fits = all(x.shape == (num_rows,) for x in columns) and (penalty is None) == (seen is None) and vocab > 0
    if not fits or (seen is not None and seen.shape != logits.shape) or (uniforms is not None and uniforms.ndim != 2):
        raise ValueError(
            f"sample_tokens: expected logits [B, V], uniforms [B, S], parameters [B] and, with a penalty, seen [B, V], got "
            f"{tuple(logits.shape)}, {uniforms if uniforms is None else tuple(uniforms.shape)}, "
            f"{[tuple(x.shape) for x in columns]} and {seen if seen is None else tuple(seen.shape)}"
        )
    impl = resolve_sample_tokens(impl, logits.device.type)
    if impl == "triton":
        from cpo_kernels.sample_tokens.triton_sampler import sample_tokens_triton  # loads Triton

        return sample_tokens_triton(logits, uniforms, step, temperature, top_p, top_k, penalty, seen)
    return sample_tokens_eager(logits, uniforms, step, temperature, top_p, top_k, penalty, seen)


def resolve_sample_tokens(impl: str | None, device_type: str) -> str:
    """The name of the implementation that runs on a device. See `resolve_implementation`."""
    available = available_implementations(device_type)
    return resolve_implementation("sample_tokens", impl, device_type, available, check_sample_tokens)
