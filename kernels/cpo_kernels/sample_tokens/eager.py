"""Sampling in plain torch: whole sorts, sums in the order of the sort and of the ids. The specification for a batch.

No line waits for the device or draws a number.
"""

import torch

NOT_FINITE = -1  # in place of a token: the row's logits hold NaN or +inf, or exclude every token


def sample_tokens_eager(
    logits: torch.Tensor,  # [B, V] float32
    uniforms: torch.Tensor | None,  # [B, S] float64
    step: torch.Tensor,  # [B] int64
    temperature: torch.Tensor,  # [B] float64
    top_p: torch.Tensor | None,  # [B] float64
    top_k: torch.Tensor | None,  # [B] int64
    penalty: torch.Tensor | None,  # [B] float64
    seen: torch.Tensor | None,  # [B, V] bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens [B] int64 and raw log-probs [B] float64."""
    raw = logits.double()  # [B, V]
    raw_max = raw.amax(dim=1, keepdim=True)  # [B, 1]
    scores = raw
    if penalty is not None and seen is not None:
        factor = penalty.unsqueeze(1)
        scores = torch.where(seen, torch.where(raw < 0, raw * factor, raw / factor), raw)
    ids = torch.arange(logits.shape[1], device=logits.device)
    largest = scores.amax(dim=1, keepdim=True)
    # the smallest id among equals, as numpy's argmax
    tokens = torch.where(scores == largest, ids, logits.shape[1] - 1).amin(dim=1)
    if uniforms is not None:
        # what is drawn for a greedy row is thrown away
        # a row at its cap has no number left, and its token is not read
        uniform = uniforms.gather(1, step.clamp_max(uniforms.shape[1] - 1).unsqueeze(1))  # [B, 1]
        drawn = _draw(scores, largest, uniform, temperature, top_p, top_k)
        tokens = torch.where(temperature > 0, drawn, tokens)
    # NaN has no place in an order. Such rows are marked below
    tokens = tokens.clamp(0, logits.shape[1] - 1)
    log_normaliser = (raw - raw_max).exp_().sum(dim=1).log()
    logps = raw.gather(1, tokens.unsqueeze(1)).squeeze(1) - raw_max.squeeze(1) - log_normaliser
    if seen is not None:
        seen.scatter_(1, tokens.unsqueeze(1), True)
    return torch.where(torch.isfinite(raw_max.squeeze(1)), tokens, NOT_FINITE), logps


def _draw(
    scores: torch.Tensor,
    largest: torch.Tensor,
    uniform: torch.Tensor,
    temperature: torch.Tensor,
    top_p: torch.Tensor | None,
    top_k: torch.Tensor | None,
) -> torch.Tensor:
    divisor = torch.where(temperature > 0, temperature, 1.0).unsqueeze(1)
    probabilities = ((scores - largest) / divisor).exp_()
    if top_k is not None:
        # a whole sort, because each row has a k of its own
        ordered = scores.sort(dim=1, descending=True).values  # [B, V]
        least = ordered.gather(1, (top_k - 1).unsqueeze(1))
        probabilities = torch.where(scores < least, 0.0, probabilities)
    if top_p is not None:
        mass, order = probabilities.sort(dim=1, descending=True, stable=True)
        total = mass.cumsum(dim=1)
        limit = torch.where(top_p < 1, top_p, float("inf")).unsqueeze(1) * total[:, -1:]
        kept = torch.where(total - mass < limit, mass, 0.0)
        probabilities = torch.zeros_like(probabilities).scatter_(1, order, kept)
    cumulative = probabilities.cumsum_(dim=1) if top_k is None and top_p is None else probabilities.cumsum(1)
    return _first_above(cumulative, uniform * cumulative[:, -1:])


def _first_above(cumulative: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """First place whose cumulative mass exceeds `wanted`. Where none does, the first that reaches the whole mass."""
    place = torch.searchsorted(cumulative, wanted, right=True)
    # u just below 1 can round up to the whole mass: then the last token that has any
    last = torch.searchsorted(cumulative, cumulative[:, -1:].contiguous(), right=False)
    return torch.minimum(place, last).squeeze(1)
