"""What is optimised: preferences (CPO, and FPO on whole paths) or supervised fine-tuning on winning paths.

A method owns its items, the module that DeepSpeed wraps, how a batch becomes micro-batches, and what a step's sum is
divided by: pairs for preferences, completion tokens for fine-tuning. The loop knows nothing else about either.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from cpo_fast.config import Config
from cpo_fast.data.examples import PreferencePair, SftExample
from cpo_fast.errors import CpoFastError, DataError
from cpo_fast.train.metrics import PreferenceMetrics, SftMetrics
from cpo_fast.train.objective import (
    MicroBatch,
    MicroBatchResult,
    PreferenceObjective,
    SftObjective,
    group_examples,
    group_pairs,
)
from cpo_fast.train.policy import Policy
from cpo_fast.train.reference import reference_cache


class Method(Protocol):
    """Everything the loop needs to know about an objective."""

    module: torch.nn.Module

    def micro_batches(self, items: Sequence[Any]) -> Iterator[Any]:
        """Cut a batch into inputs of `module`, each one forest within the token budget."""

    def sequences(self, items: Sequence[Any]) -> list[tuple[int, ...]]:
        """The token ids of every row that a batch's forests are made of."""

    def normaliser(self, items: Sequence[Any]) -> float:
        """What the summed loss of a batch is divided by."""

    def metrics(self) -> Any:
        """A fresh collector: `add(micro_batch, result)`, `read(*scalars)`, `summary()`, `nonfinite()`."""

    def self_test(self, engine: Any, items: Sequence[Any]) -> None:
        """Check what must hold before the first step."""


@dataclass
class PreferenceMethod:
    """Pairs against a frozen reference, online or cached."""

    config: Config
    policy: Policy

    def __post_init__(self) -> None:
        self.module = PreferenceObjective(self.policy.model, self.config.train, self.policy.reference, self.policy.impl)
        self._cache: Any = None

    def prepare(self, pairs: Sequence[PreferencePair], run: Path) -> None:
        """Check the ids and load or compute the reference log-probs, before the engine takes the weights."""
        check_vocabulary([(pair.chosen_sequence + pair.rejected_sequence, pair.source) for pair in pairs], self.policy)
        self._cache = reference_cache(self.config, self.policy, pairs, run / "reference")

    def micro_batches(self, items: Sequence[PreferencePair], online: bool = False) -> Iterator[MicroBatch]:
        """Forests of pairs, with cached reference log-probs unless there are none or `online` is asked for."""
        for pairs in group_pairs(items, self.config.train.max_tokens):
            if self._cache is None or online:
                yield MicroBatch(pairs)
            else:
                yield MicroBatch(pairs, self._cache.chosen(pairs), self._cache.rejected(pairs))

    def sequences(self, items: Sequence[PreferencePair]) -> list[tuple[int, ...]]:
        """Chosen and rejected of every pair, prompts included."""
        return [sequence for pair in items for sequence in (pair.chosen_sequence, pair.rejected_sequence)]

    def normaliser(self, items: Sequence[PreferencePair]) -> float:
        """Number of pairs; weights average to 1 over the whole set, not over a batch."""
        return len(items)

    def metrics(self) -> PreferenceMetrics:
        """Rewards, margins, accuracies and log-probs."""
        return PreferenceMetrics(self.config.train.beta)

    def self_test(self, engine: Any, items: Sequence[PreferencePair]) -> None:
        """Policy and reference on one forest before the first step: rewards must be bitwise 0.

        Raises:
            CpoFastError: the policy at step 0 is not its own reference.
        """
        micro = next(self.micro_batches(items, online=True))
        with torch.no_grad():
            result: MicroBatchResult = engine(micro)
        rewards = torch.stack([result.chosen_rewards, result.rejected_rewards])
        if bool((rewards != 0).any()):
            raise CpoFastError(
                f"self-test: rewards at step 0 reach {float(rewards.abs().max()):.1e} instead of exactly 0, so the "
                "reference is not the policy's starting point (an adapter that was trained, or dropout)"
            )


@dataclass
class SftMethod:
    """Completions with their prompt masked; no reference."""

    config: Config
    policy: Policy

    def __post_init__(self) -> None:
        self.module = SftObjective(self.policy.model, self.config.train, self.policy.impl)

    def prepare(self, examples: Sequence[SftExample], run: Path) -> None:
        """Check the ids."""
        check_vocabulary([(item.prompt_ids + item.completion_ids, item.source) for item in examples], self.policy)

    def micro_batches(self, items: Sequence[SftExample]) -> Iterator[list[SftExample]]:
        """Forests of examples."""
        yield from group_examples(items, self.config.train.max_tokens)

    def sequences(self, items: Sequence[SftExample]) -> list[tuple[int, ...]]:
        """Prompt and completion of every example."""
        return [item.prompt_ids + item.completion_ids for item in items]

    def normaliser(self, items: Sequence[SftExample]) -> float:
        """Completion tokens of the batch: a long chain counts for more than a short one, as in Hugging Face's loss."""
        return sum(len(item.completion_ids) for item in items)

    def metrics(self) -> SftMetrics:
        """Loss, entropy and token accuracy."""
        return SftMetrics()

    def self_test(self, engine: Any, items: Sequence[SftExample]) -> None:
        """Nothing to check: there is no reference."""


def check_vocabulary(rows: Sequence[tuple[Sequence[int], str]], policy: Policy) -> None:
    """Raise DataError, naming the row, where a token id lies outside the model's embeddings."""
    size = policy.model.get_base_model().get_input_embeddings().num_embeddings
    for ids, source in rows:
        if max(ids) >= size:
            raise DataError(
                f"{source}: token id {max(ids)} is outside the model's {size} embeddings; the file was made with another "
                "tokenizer"
            )
