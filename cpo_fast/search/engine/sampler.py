"""One token from one row of logits: inverse CDF in float64, one uniform number per (request, position).

    u(uid, i) = the i-th number of a Philox stream keyed by SHA-256(uid)
    token     = min { t : sum_{s <= t} p_s > u * sum_s p_s },   p = processed distribution, s in vocabulary order

The logits are processed in the order and by the rules of Hugging Face's processors: repetition penalty, temperature,
top-k, top-p. The generator is counter-based and keyed by the request's name, so a sample depends neither on the rows
beside it, nor on the batch size, nor on what was sampled before it: a restarted run continues with the same numbers. A
row is always processed alone, as one vector of the vocabulary's length, so its sums round the same way in every batch.
"""

import hashlib
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt

Float64Array = npt.NDArray[np.float64]


@lru_cache(maxsize=4096)  # a wave asks again for the rows that stay in it
def uniforms(uid: str, count: int) -> Float64Array:
    """The first `count` numbers in [0, 1) of a request's stream; float64 [count], read-only. A longer table starts the
    same."""
    key = int.from_bytes(hashlib.sha256(uid.encode("utf-8", "surrogatepass")).digest()[:16], "little")
    numbers = np.random.Generator(np.random.Philox(key=key)).random(count)
    numbers.flags.writeable = False
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
        logits: [V] float64, unprocessed; -inf excludes a token. Left as they are.
        uniform: in [0, 1); unused when greedy.
        temperature: logits are divided by it; 0 takes the largest logit, the smallest id on a tie.
        top_p: tokens in order of falling probability are kept while the mass before them is below it; equals stand in
            the order of their ids, which Hugging Face leaves to an unstable sort.
        top_k: so many of the largest logits are kept, and all that equal the last of them; 0 keeps every token.
        repetition_penalty: divides a positive logit of a seen token and multiplies a negative one; 1 changes nothing.
        seen: ids of the prompt and of what was generated after it, repeats allowed; read with a penalty only.

    Raises:
        ValueError: the logits hold NaN or +inf, or exclude every token.
    """
    check_finite(logits)
    if repetition_penalty != 1:
        logits = _penalised(logits, seen, repetition_penalty)
    if temperature == 0:
        return int(logits.argmax())
    probabilities = np.exp((logits - logits.max()) / temperature)
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
        raise ValueError("the model's logits are not finite; check the weights and the dtype")


def _penalised(logits: Float64Array, seen: Sequence[int] | npt.NDArray[np.int64], penalty: float) -> Float64Array:
    ids = np.asarray(seen, dtype=np.int64)
    found = logits[ids]
    penalised = logits.copy()
    penalised[ids] = np.where(found < 0, found * penalty, found / penalty)
    return penalised


def _nucleus(probabilities: Float64Array, top_p: float) -> Float64Array:
    order = np.argsort(-probabilities, kind="stable")
    mass = probabilities[order].cumsum()
    before = np.concatenate([[0.0], mass[:-1]])
    kept = order[before < top_p * mass[-1]]
    nucleus = np.zeros_like(probabilities)
    nucleus[kept] = probabilities[kept]
    return nucleus
