"""Reference log-probs once per unique sequence, on disk under a hash of everything that decides them.

The key covers model and adapter weights, dtype, implementation and every token id with its start. Values are sums of the
scored tokens, computed on forests like everything else. Before training a part of them is computed again online. Where the
two differ by more than the dtype's bound the file is made anew.
"""

import hashlib
import logging
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from cpo_fast.adapters import adapter_hash
from cpo_fast.config import Config
from cpo_fast.data.examples import Example
from cpo_fast.models import model_hash, weights_hash
from cpo_fast.train.objective import Scored, split_examples
from cpo_fast.train.policy import Policy
from cpo_kernels.integrations.transformers import packed_logps
from cpo_kernels.tolerances import end_to_end_bound

logger = logging.getLogger(__name__)

ReferenceLogps = dict[Scored, float]


def reference_logps(config: Config, policy: Policy, pairs: Sequence[Example], folder: Path) -> ReferenceLogps | None:
    """Log-probs of all responses where `train.reference` asks for a cache, or None for online.

    `auto` is online for one epoch, cached above. A stored file is used when its key fits and a sample of its values agrees
    with an online computation.
    """
    mode = config.train.reference
    if config.train.method == "sft" or mode == "online" or (mode == "auto" and config.train.num_epochs == 1):
        return None
    policy.model.eval()
    scored = scored_sequences(pairs)
    path = folder / f"{_key(scored, config, policy)}.safetensors"
    stored = _load(path, scored)
    if stored is not None:
        if _agrees(stored, config, policy, pairs):
            logger.info("reference: %d log-probs from %s", len(scored), folder)
            return stored
        logger.warning("reference: the values in %s differ from an online computation; making them anew", folder)
    started = time.perf_counter()
    values = _compute(config, policy, pairs)
    _save(values, path, scored)
    logger.info("reference: %d sequences scored in %.1f s", len(scored), time.perf_counter() - started)
    return values


def scored_sequences(pairs: Sequence[Example]) -> list[Scored]:
    """The distinct (sequence, start) of all pairs, in order of first appearance."""
    return list(dict.fromkeys((sequence, len(pair.prompt_ids)) for pair in pairs for sequence in pair.sequences))


def _key(scored: Sequence[Scored], config: Config, policy: Policy) -> str:
    base = policy.model.get_base_model()
    if config.model.path:
        named = model_hash(config.model.path)
    else:
        named = weights_hash({name: value for name, value in base.state_dict().items() if "lora_" not in name})
    identity = (named, adapter_hash(config.model.adapter), str(base.dtype), str(policy.impl), torch.__version__)
    digest = hashlib.sha256(repr(identity).encode())
    for sequence, start in scored:
        digest.update(torch.tensor([start, len(sequence), *sequence], dtype=torch.int64).numpy().tobytes())
    return digest.hexdigest()[:32]


def _load(path: Path, scored: Sequence[Scored]) -> ReferenceLogps | None:
    if not path.is_file():
        return None
    try:
        values = load_file(path)["segment_logps"]
    except (SafetensorError, KeyError, OSError) as error:
        logger.warning("%s: the cached reference is damaged (%s); making it anew", path, error)
        return None
    if values.shape != (len(scored),) or not torch.isfinite(values).all():
        return None
    return dict(zip(scored, values.tolist(), strict=True))


def _save(values: ReferenceLogps, path: Path, scored: Sequence[Scored]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".tmp")
    save_file({"segment_logps": torch.tensor([values[item] for item in scored], dtype=torch.float64)}, aside)
    aside.replace(path)


def _compute(config: Config, policy: Policy, pairs: Sequence[Example]) -> ReferenceLogps:
    """Score every unique sequence once under the reference, in forests of at most `train.max_tokens` tokens."""
    values: ReferenceLogps = {}
    for group in split_examples(pairs, config.train.max_tokens):
        wanted = [item for item in scored_sequences(group) if item not in values]
        if wanted:
            values.update(zip(wanted, _online(policy, wanted), strict=True))
    return values


def _agrees(values: ReferenceLogps, config: Config, policy: Policy, pairs: Sequence[Example]) -> bool:
    """Compare the first pair of every question, up to the token budget, with an online computation."""
    sample: dict[str, Example] = {}
    for pair in pairs:
        sample.setdefault(pair.group, pair)
    wanted = scored_sequences(split_examples(list(sample.values()), config.train.max_tokens)[0])
    online = torch.tensor(_online(policy, wanted), dtype=torch.float64)
    cached = torch.tensor([values[item] for item in wanted], dtype=torch.float64)
    difference = float((cached - online).norm() / online.norm().clamp_min(1e-30))
    return difference <= end_to_end_bound(policy.model.get_base_model().dtype)


def _online(policy: Policy, wanted: Sequence[Scored]) -> list[float]:
    sequences, starts = [sequence for sequence, _ in wanted], [start for _, start in wanted]
    with torch.no_grad():
        packed = packed_logps(policy.model, sequences, starts, policy.reference, impl=policy.impl)
    assert packed.ref_segment_logps is not None
    return packed.ref_segment_logps.tolist()
