"""Reference log-probs once per unique sequence, kept on disk under a hash of everything that decides them.

A sequence's hash covers every token id and its start, and stands beside one of model and adapter weights, dtype, device and
implementation (`reference_store`). So a changed row computes its own sequences and no other, and runs may share a folder
(`train.reference_cache`). Values are sums of the scored tokens, computed on forests like everything else: in which forest
a sequence is computed decides the last bits, so they may hang on what a shared folder held before. Before training a part
of what was read is computed again online. Where the two differ by more than the dtype's bound everything is made anew.
"""

import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from cpo_fast import progress
from cpo_fast.adapters import adapter_hash
from cpo_fast.config import Config
from cpo_fast.data.examples import Example
from cpo_fast.train.communication import Communicator
from cpo_fast.train.objective import Scored, split_examples
from cpo_fast.train.policy import Policy
from cpo_fast.train.reference_store import LogpStore, sequence_key
from cpo_kernels.integrations.transformers import packed_logps
from cpo_kernels.tolerances import end_to_end_bound

logger = logging.getLogger(__name__)

ReferenceLogps = dict[Scored, float]


class ReferenceCache:
    """The log-probs of all responses under the reference, from files or computed by all ranks."""

    def __init__(self, config: Config, base: str, dtype: torch.dtype, pairs: Sequence[Example], folder: Path) -> None:
        """`base` names the base's weights and `dtype` is theirs. `pairs` are all that will be scored."""
        self.config, self.pairs, self.folder, self.dtype = config, pairs, folder, dtype
        self.names = (base, adapter_hash(config.reference_adapter), str(dtype))

    def logps(self, model: Any, policy: Policy, communicator: Communicator) -> ReferenceLogps:
        """The stored values where a sample of them agrees with an online computation, and new ones for the rest.

        Args:
            model: that of the policy. Under ZeRO 3 the engine passes it in.
            policy: prepared.
            communicator: every rank calls, and computes its share. Rank 0 reads and writes.
        """
        model.eval()
        scored = scored_sequences(self.pairs)
        context = (*self.names, str(policy.impl), communicator.device.type, torch.__version__)
        store = LogpStore(self.folder, repr(context))
        keys = {item: sequence_key(*item) for item in scored}
        stored = communicator.from_first(lambda: store.read(list(keys.values())))
        values = {item: value for item, value in zip(scored, stored, strict=True) if value is not None}
        agrees = not values or communicator.broadcast(self._agrees(values, policy))
        if not agrees:
            logger.warning(
                "reference: the values in %s differ from an online computation; making them anew", self.folder
            )
            values = {}
        missing = [item for item in scored if item not in values]
        if not missing:
            logger.info("reference: %d log-probs from %s", len(scored), self.folder)
            return values
        started = time.perf_counter()
        with progress.stage("reference"):
            computed = self._compute(policy, communicator, missing)
        seconds = time.perf_counter() - started
        added = {keys[item]: computed[item] for item in missing}
        standing = communicator.from_first(lambda: store.add(added, instead=not agrees))
        logger.info(
            "reference: %d log-probs from %s, %d sequences scored in %.1f s",
            len(values),
            self.folder,
            len(missing),
            seconds,
        )
        return values | dict(zip(missing, standing, strict=True))

    def _compute(self, policy: Policy, communicator: Communicator, missing: Sequence[Scored]) -> ReferenceLogps:
        """Score every missing sequence once, in forests of at most `train.max_tokens` tokens that ranks take in turn.

        The forests do not depend on the number of ranks, so neither do the values.
        """
        place_of = {item: place for place, item in enumerate(missing)}
        pairs = [pair for pair in self.pairs if any(item in place_of for item in scored_sequences([pair]))]
        forests: list[list[Scored]] = []
        taken: set[Scored] = set()
        for places in split_examples(pairs, self.config.train.max_tokens):
            members = scored_sequences([pairs[place] for place in places])
            wanted = [item for item in members if item in place_of and item not in taken]
            taken.update(wanted)
            if wanted:
                forests.append(wanted)
        values = torch.zeros(len(missing), dtype=torch.float64, device=communicator.device)
        for first in range(0, len(forests), communicator.world_size):
            progress.at(first, len(forests), "forests")
            turn = first + communicator.rank
            # a rank without a forest of its own repeats the first: under ZeRO 3 all ranks make equally many forwards
            logps = _online(policy, forests[turn] if turn < len(forests) else forests[0])
            if turn < len(forests):
                values[[place_of[item] for item in forests[turn]]] = logps.double()
        return dict(zip(missing, communicator.sum(values).tolist(), strict=True))

    def _agrees(self, values: ReferenceLogps, policy: Policy) -> bool:
        """Compare the first stored pair of every question, up to the token budget, with an online computation."""
        sample: dict[str, Example] = {}
        for pair in self.pairs:
            if any(item in values for item in scored_sequences([pair])):
                sample.setdefault(pair.group, pair)
        firsts = list(sample.values())
        places = split_examples(firsts, self.config.train.max_tokens)[0]
        wanted = [item for item in scored_sequences([firsts[place] for place in places]) if item in values]
        online = _online(policy, wanted).double().cpu()
        cached = torch.tensor([values[item] for item in wanted], dtype=torch.float64)
        difference = float((cached - online).norm() / online.norm().clamp_min(1e-30))
        return difference <= end_to_end_bound(self.dtype)


def is_cached(config: Config, stage: int, repeats: bool) -> bool:
    """Whether `train.reference` asks for the reference's log-probs once and for all. Imitation has no reference.

    `auto` caches for several epochs, and under ZeRO 3, where it saves every micro-batch one gather of the base. Where
    `train.num_epochs` does not say how many, `repeats` says whether the steps take more than one.
    """
    if config.train.method == "sft":
        return False
    if config.train.reference == "auto":
        several = repeats if config.train.num_epochs is None else config.train.num_epochs > 1
        return several or stage == 3
    return config.train.reference == "cached"


def scored_sequences(pairs: Sequence[Example]) -> list[Scored]:
    """The distinct (sequence, start) of all pairs, in order of first appearance."""
    return list(dict.fromkeys(entry for pair in pairs for entries in pair.scored for entry in entries))


def _online(policy: Policy, wanted: Sequence[Scored]) -> torch.Tensor:
    """Log-probs [S] of sequences under the reference."""
    sequences, starts = [sequence for sequence, _ in wanted], [start for _, start in wanted]
    with torch.no_grad():
        packed = packed_logps(policy.model, sequences, starts, policy.reference, impl=policy.impl)
    assert packed.ref_segment_logps is not None
    return packed.ref_segment_logps
