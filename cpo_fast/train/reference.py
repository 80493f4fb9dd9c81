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
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from cpo_fast import progress
from cpo_fast.adapters import adapter_hash
from cpo_fast.config import Config
from cpo_fast.data.examples import Example
from cpo_fast.files import aside_of
from cpo_fast.train.communication import Communicator
from cpo_fast.train.objective import Scored, split_examples
from cpo_fast.train.policy import Policy
from cpo_kernels.integrations.transformers import packed_logps
from cpo_kernels.tolerances import end_to_end_bound

logger = logging.getLogger(__name__)

ReferenceLogps = dict[Scored, float]


class ReferenceCache:
    """The log-probs of all responses under the reference, from a file of the run or computed by all ranks."""

    def __init__(self, config: Config, base: str, dtype: torch.dtype, pairs: Sequence[Example], folder: Path) -> None:
        """`base` names the base's weights and `dtype` is theirs. `pairs` are all that will be scored."""
        self.config, self.pairs, self.folder, self.dtype = config, pairs, folder, dtype
        self.names = (base, adapter_hash(config.reference_adapter), str(dtype))

    def logps(self, model: Any, policy: Policy, communicator: Communicator) -> ReferenceLogps:
        """The file's values where its key fits and a sample of them agrees with an online computation, else new ones.

        Args:
            model: that of the policy. Under ZeRO 3 the engine passes it in.
            policy: prepared.
            communicator: every rank calls, and computes its share.
        """
        model.eval()
        scored = scored_sequences(self.pairs)
        path = self.folder / f"{self._key(scored, policy)}.safetensors"
        stored = communicator.from_first(lambda: _load(path, scored))
        if stored is not None:
            values = dict(zip(scored, stored, strict=True))
            if communicator.broadcast(self._agrees(values, policy)):
                logger.info("reference: %d log-probs from %s", len(scored), self.folder)
                return values
            logger.warning(
                "reference: the values in %s differ from an online computation; making them anew", self.folder
            )
        started = time.perf_counter()
        with progress.stage("reference"):
            values = self._compute(policy, communicator, scored)
        if communicator.writes:
            _save(values, path, scored)
        logger.info("reference: %d sequences scored in %.1f s", len(scored), time.perf_counter() - started)
        return values

    def _key(self, scored: Sequence[Scored], policy: Policy) -> str:
        digest = hashlib.sha256(repr((*self.names, str(policy.impl), torch.__version__)).encode())
        for sequence, start in scored:
            digest.update(torch.tensor([start, len(sequence), *sequence], dtype=torch.int64).numpy().tobytes())
        return digest.hexdigest()[:32]

    def _compute(self, policy: Policy, communicator: Communicator, scored: Sequence[Scored]) -> ReferenceLogps:
        """Score every unique sequence once, in forests of at most `train.max_tokens` tokens that ranks take in turn.

        The forests do not depend on the number of ranks, so neither do the values.
        """
        forests: list[list[Scored]] = []
        known: set[Scored] = set()
        for places in split_examples(self.pairs, self.config.train.max_tokens):
            wanted = [item for item in scored_sequences([self.pairs[place] for place in places]) if item not in known]
            known.update(wanted)
            if wanted:
                forests.append(wanted)
        place_of = {item: place for place, item in enumerate(scored)}
        values = torch.zeros(len(scored), dtype=torch.float64, device=communicator.device)
        for first in range(0, len(forests), communicator.world_size):
            progress.at(first, len(forests), "forests")
            turn = first + communicator.rank
            # a rank without a forest of its own repeats the first: under ZeRO 3 all ranks make equally many forwards
            logps = _online(policy, forests[turn] if turn < len(forests) else forests[0])
            if turn < len(forests):
                values[[place_of[item] for item in forests[turn]]] = logps.double()
        return dict(zip(scored, communicator.sum(values).tolist(), strict=True))

    def _agrees(self, values: ReferenceLogps, policy: Policy) -> bool:
        """Compare the first pair of every question, up to the token budget, with an online computation."""
        sample: dict[str, Example] = {}
        for pair in self.pairs:
            sample.setdefault(pair.group, pair)
        firsts = list(sample.values())
        places = split_examples(firsts, self.config.train.max_tokens)[0]
        wanted = scored_sequences([firsts[place] for place in places])
        online = _online(policy, wanted).double().cpu()
        cached = torch.tensor([values[item] for item in wanted], dtype=torch.float64)
        difference = float((cached - online).norm() / online.norm().clamp_min(1e-30))
        return difference <= end_to_end_bound(self.dtype)


def is_cached(config: Config, stage: int) -> bool:
    """Whether `train.reference` asks for the reference's log-probs once and for all. Imitation has no reference.

    `auto` caches for several epochs, and under ZeRO 3, where it saves every micro-batch one gather of the base.
    """
    if config.train.method == "sft":
        return False
    if config.train.reference == "auto":
        return config.train.num_epochs > 1 or stage == 3
    return config.train.reference == "cached"


def scored_sequences(pairs: Sequence[Example]) -> list[Scored]:
    """The distinct (sequence, start) of all pairs, in order of first appearance."""
    return list(dict.fromkeys((sequence, len(pair.prompt_ids)) for pair in pairs for sequence in pair.sequences))


def _load(path: Path, scored: Sequence[Scored]) -> list[float] | None:
    if not path.is_file():
        return None
    try:
        values = load_file(path)["segment_logps"]
    except (SafetensorError, KeyError, OSError) as error:
        logger.warning("%s: the cached reference is damaged (%s); making it anew", path, error)
        return None
    if values.shape != (len(scored),) or not torch.isfinite(values).all():
        return None
    return list(values.tolist())


def _save(values: ReferenceLogps, path: Path, scored: Sequence[Scored]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = aside_of(path)
    try:
        save_file({"segment_logps": torch.tensor([values[item] for item in scored], dtype=torch.float64)}, aside)
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def _online(policy: Policy, wanted: Sequence[Scored]) -> torch.Tensor:
    """Log-probs [S] of sequences under the reference."""
    sequences, starts = [sequence for sequence, _ in wanted], [start for _, start in wanted]
    with torch.no_grad():
        packed = packed_logps(policy.model, sequences, starts, policy.reference, impl=policy.impl)
    assert packed.ref_segment_logps is not None
    return packed.ref_segment_logps
