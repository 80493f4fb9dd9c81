"""Reference log-probs once per unique sequence, on disk under a hash of everything that decides them.

The key covers model and adapter weights, dtype, implementation and every token id with its start, so a file is right or
is not found. Values are float32 sums of the scored tokens, computed on forests like everything else.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from cpo_kernels.integrations.transformers import packed_logps, split_pairs
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from cpo_fast.data.pair import PreferencePair

Scored = tuple[tuple[int, ...], int]  # (sequence, first scored position)


class ReferenceCache:
    """Summed reference log-probs by (sequence, start)."""

    def __init__(self, values: dict[Scored, float]) -> None:
        """Wrap values that were computed or loaded."""
        self._values = values

    def chosen(self, pairs: Sequence[PreferencePair]) -> list[float]:
        """Reference log-prob of each chosen response."""
        return [self._values[pair.chosen_sequence, len(pair.prompt_ids)] for pair in pairs]

    def rejected(self, pairs: Sequence[PreferencePair]) -> list[float]:
        """Reference log-prob of each rejected response."""
        return [self._values[pair.rejected_sequence, len(pair.prompt_ids)] for pair in pairs]


def scored_sequences(pairs: Sequence[PreferencePair]) -> list[Scored]:
    """The distinct (sequence, start) of all pairs, in order of first appearance."""
    seen: dict[Scored, None] = {}
    for pair in pairs:
        seen.setdefault((pair.chosen_sequence, len(pair.prompt_ids)))
        seen.setdefault((pair.rejected_sequence, len(pair.prompt_ids)))
    return list(seen)


def cache_key(scored: Sequence[Scored], identity: Sequence[str]) -> str:
    """32 hex digits over what decides the values: weights, dtype, implementation (`identity`) and the token ids."""
    digest = hashlib.sha256(repr(tuple(identity)).encode())
    for sequence, start in scored:
        digest.update(torch.tensor([start, len(sequence), *sequence], dtype=torch.int64).numpy().tobytes())
    return digest.hexdigest()[:32]


def load_cache(folder: Path, key: str, scored: Sequence[Scored]) -> ReferenceCache | None:
    """The cache stored under `key`, or None when there is none or the file is damaged."""
    path = folder / f"{key}.safetensors"
    if not path.is_file():
        return None
    try:
        values = load_file(path)["segment_logps"]
    except (SafetensorError, KeyError, OSError):
        return None
    if values.shape != (len(scored),) or not torch.isfinite(values).all():
        return None
    return ReferenceCache(dict(zip(scored, values.tolist(), strict=True)))


def compute_cache(
    model: Any, pairs: Sequence[PreferencePair], reference: str, max_tokens: int, impl: str | None
) -> ReferenceCache:
    """Score every unique sequence once under the reference, in forests of at most `max_tokens` tokens."""
    values: dict[Scored, float] = {}
    triples = [(pair.prompt_ids, pair.chosen_ids, pair.rejected_ids) for pair in pairs]
    for indices in split_pairs(triples, max_tokens):
        wanted = [item for item in scored_sequences([pairs[index] for index in indices]) if item not in values]
        if not wanted:
            continue
        with torch.no_grad():
            packed = packed_logps(
                model, [sequence for sequence, _ in wanted], [start for _, start in wanted], reference, impl=impl
            )
        assert packed.ref_segment_logps is not None
        values.update(zip(wanted, packed.ref_segment_logps.tolist(), strict=True))
    return ReferenceCache(values)


def save_cache(cache: ReferenceCache, folder: Path, key: str, scored: Sequence[Scored]) -> Path:
    """Write the values in the order of `scored`, atomically; returns the path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{key}.safetensors"
    aside = folder / f".{key}.tmp"
    values = torch.tensor([cache._values[item] for item in scored], dtype=torch.float64)
    save_file({"segment_logps": values}, aside)
    aside.replace(path)
    return path
