"""One token from one row of logits: inverse CDF in float64, one uniform number per (request, position).

    u(uid, i) = the i-th number of a Philox stream keyed by SHA-256(uid)
    token     = min { t : sum_{s <= t} p_s > u * sum_s p_s },   p = processed distribution, s in vocabulary order

The logits are processed in the order and by the rules of Hugging Face's processors: repetition penalty, temperature,
top-k, top-p. A sample depends neither on the rows beside it, nor on the batch size, nor on what was sampled before it, and
a restarted run continues with the same numbers. `choose_token` is the rule for one row in numpy, `BatchSampler` the same
rule for many rows on the device that holds the logits.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch

from cpo_fast.search.engine.requests import SampleRequest
from cpo_kernels.sample_tokens import sample_tokens

Float64Array = npt.NDArray[np.float64]
NOT_FINITE_MESSAGE = "the model's logits are not finite; check the weights and the dtype"


@lru_cache(maxsize=4096)  # a decode batch that is rebuilt asks again for the requests that stay in it
def uniforms(uid: str, count: int) -> Float64Array:
    """The first `count` numbers in [0, 1) of a request's stream: float64 [count], read-only."""
    # a counter-based generator, keyed by the request's name
    key = int.from_bytes(hashlib.sha256(uid.encode("utf-8", "surrogatepass")).digest()[:16], "little")
    numbers = np.random.Generator(np.random.Philox(key=key)).random(count)
    numbers.flags.writeable = False  # the cache hands the same array to everybody
    return numbers


def choose_token(
    logits: Float64Array,
    uniform: float,
    temperature: float,
    top_p: float,
    top_k: int = 0,
    repetition_penalty: float = 1.0,
    seen: Sequence[int] | npt.NDArray[np.int64] = (),
) -> int:
    """Token id for one row.

    Args:
        logits: [V] float64, unprocessed. -inf excludes a token. Left as they are.
        uniform: in [0, 1). Unused when greedy.
        temperature: logits are divided by it. 0 takes the largest logit, the smallest id on a tie.
        top_p: tokens in order of falling probability are kept while the mass before them is below it.
        top_k: so many of the largest logits are kept, and all that equal the last of them. 0 keeps every token.
        repetition_penalty: divides a positive logit of a seen token and multiplies a negative one. 1 changes nothing.
        seen: ids of the prompt and of what was generated after it, repeats allowed. Read with a penalty only.

    Raises:
        ValueError: the logits hold NaN or +inf, or exclude every token.
    """
    check_finite(logits)
    if repetition_penalty != 1:
        logits = _penalised(logits, seen, repetition_penalty)
    if temperature == 0:
        return int(logits.argmax())
    probabilities = np.exp((logits - logits.max()) / temperature)  # [V], the largest is 1: nothing overflows
    if 0 < top_k < len(logits):
        smallest_kept = np.partition(logits, -top_k)[-top_k]
        probabilities[logits < smallest_kept] = 0
    if top_p < 1:
        probabilities = _nucleus(probabilities, top_p)
    cumulative = probabilities.cumsum()
    token = int(np.searchsorted(cumulative, uniform * cumulative[-1], side="right"))
    # u just below 1 can round up to the whole mass: then the last token that has any
    return min(token, int(np.flatnonzero(probabilities)[-1]))


def log_probs(logits: Float64Array) -> Float64Array:
    """[V] float64 logits to natural log-probs.

    Raises:
        ValueError: as `choose_token`.
    """
    check_finite(logits)
    shifted = logits - logits.max()
    return shifted - np.log(np.exp(shifted).sum())


def check_finite(logits: Float64Array) -> None:
    """Refuse a row [V] that holds NaN or +inf, or excludes every token, by a ValueError."""
    if not np.isfinite(logits.max()):
        raise ValueError(NOT_FINITE_MESSAGE)


def _penalised(logits: Float64Array, seen: Sequence[int] | npt.NDArray[np.int64], penalty: float) -> Float64Array:
    ids = np.asarray(seen, dtype=np.int64)
    found = logits[ids]
    penalised = logits.copy()
    # either way less likely: a negative logit is multiplied, a positive one divided
    penalised[ids] = np.where(found < 0, found * penalty, found / penalty)
    return penalised


def _nucleus(probabilities: Float64Array, top_p: float) -> Float64Array:
    # stable: equals stand in the order of their ids, which Hugging Face leaves to chance
    order = np.argsort(-probabilities, kind="stable")  # [V]
    mass = probabilities[order].cumsum()
    before = np.concatenate([[0.0], mass[:-1]])  # so that the first token is always kept
    kept = order[before < top_p * mass[-1]]
    nucleus = np.zeros_like(probabilities)
    nucleus[kept] = probabilities[kept]
    return nucleus


@dataclass(eq=False)
class BatchSampler:
    """Parameters of B rows, on one device.

    Attributes:
        uniforms: [B, S] float64, the numbers of each row's stream. S is the largest cap.
        temperature: [B] float64. 0 is greedy.
        top_p: [B] float64. top_k: [B] int64, V where a row has none. penalty: [B] float64 repetition penalty.
        seen: [B, V] bool, ids of prompt and generated tokens. Goes with `penalty`. All four are None, and cost nothing,
            where no row asks for them.
        all_greedy: no row draws at all.
    """

    uniforms: torch.Tensor
    temperature: torch.Tensor
    top_p: torch.Tensor | None
    top_k: torch.Tensor | None
    penalty: torch.Tensor | None
    seen: torch.Tensor | None
    all_greedy: bool

    @classmethod
    def build(
        cls,
        requests: Sequence[SampleRequest],
        generated: Sequence[Sequence[int]],
        num_rows: int,
        vocab_size: int,
        device: torch.device,
    ) -> "BatchSampler":
        """Parameters of requests that have generated these ids so far.

        Padding rows, up to `num_rows`, sample greedily and cost nothing. Their tokens are ignored.
        """
        padding = num_rows - len(requests)
        longest = max((request.max_new_tokens for request in requests), default=1)
        table = np.zeros((num_rows, longest))
        for row, request in enumerate(requests):
            table[row, : request.max_new_tokens] = uniforms(request.uid, request.max_new_tokens)

        def column(values: list[float], fill: float, dtype: torch.dtype) -> torch.Tensor:
            return torch.tensor([*values, *[fill] * padding], dtype=dtype, device=device)

        seen = penalty = top_k = top_p = None
        if any(request.repetition_penalty != 1.0 for request in requests):
            penalty = column([request.repetition_penalty for request in requests], 1.0, torch.float64)
            present = np.zeros((num_rows, vocab_size), dtype=bool)
            for row, (request, ids) in enumerate(zip(requests, generated, strict=True)):
                present[row, [*request.token_ids, *ids]] = True
            seen = torch.from_numpy(present).to(device)
        if any(request.top_k for request in requests):
            top_k = column([min(request.top_k or vocab_size, vocab_size) for request in requests], 1, torch.int64)
        if any(request.top_p < 1 for request in requests):
            top_p = column([request.top_p for request in requests], 1.0, torch.float64)
        return cls(
            uniforms=torch.from_numpy(table).to(device),
            temperature=column([request.temperature for request in requests], 0.0, torch.float64),
            top_p=top_p,
            top_k=top_k,
            penalty=penalty,
            seen=seen,
            all_greedy=all(request.temperature == 0 for request in requests),
        )

    def sample(
        self, logits: torch.Tensor, step: torch.Tensor, impl: str | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Choose each row's token, as `cpo_kernels.sample_tokens` does. Nothing waits for the device.

        Args:
            logits: [B, V] float32, unprocessed.
            step: [B] int64, how many tokens the row has generated. Picks its uniform.
            impl: of `sample_tokens`. None chooses by device.

        Returns:
            tokens [B] int64, `NOT_FINITE` where the logits are not usable, and raw log-probs [B] float64: natural,
            temperature 1, of the unprocessed logits.
        """
        uniforms = None if self.all_greedy else self.uniforms
        processors = (self.temperature, self.top_p, self.top_k, self.penalty, self.seen)
        return sample_tokens(logits, uniforms, step, *processors, impl)
