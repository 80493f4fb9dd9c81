"""The training objective as one module: a micro-batch of pairs in, the summed loss and its statistics out.

    loss = sum over the micro-batch's pairs of weight * -log sigmoid(beta (margin - reference margin))

Backbone, needed head rows, log-probs and reference all happen in this module's forward, so that DeepSpeed gathers and
releases each weight where it is used. The sum is scaled to the step's mean outside, where the global pair count is known.

Pairs to groups that fit one forest of `train.max_tokens` tokens; a pair that never fits is named by its row.

Supervised fine-tuning on winning paths (the paper's TS-SFT baseline): next-token loss on completions, prompt masked.

    loss = - sum over the step's completion tokens of log p / number of those tokens

which is Hugging Face's loss of the same rows padded into one batch. Winning paths of a question share their steps, so they
are computed as a forest like preference pairs.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.profiler import record_function

from cpo_fast.config import TrainConfig
from cpo_fast.data.examples import PreferencePair, SftExample
from cpo_fast.errors import DataError
from cpo_fast.tasks import common_prefix_length
from cpo_kernels import preference_loss
from cpo_kernels.device import to_device
from cpo_kernels.implementation import Implementations
from cpo_kernels.integrations.transformers import PackedLogps, packed_logps, split_pairs
from cpo_kernels.linear_logprob import LogprobResult

OUTPUTS = ("entropy", "mean_logit", "is_top1")


@dataclass(frozen=True)
class MicroBatch:
    """Pairs that share one forest, with their cached reference log-probs where there are any."""

    pairs: Sequence[PreferencePair]
    ref_chosen: Sequence[float] | None = None
    ref_rejected: Sequence[float] | None = None


@dataclass(frozen=True)
class MicroBatchResult:
    """Loss and statistics of one micro-batch of N pairs; all detached but `loss_sum`."""

    loss_sum: torch.Tensor  # scalar, differentiable
    losses: torch.Tensor  # [N]
    chosen_rewards: torch.Tensor  # [N]
    rejected_rewards: torch.Tensor  # [N]
    chosen_logps: torch.Tensor  # [N]
    rejected_logps: torch.Tensor  # [N]
    chosen_lengths: Sequence[int]  # [N] scored tokens
    rejected_lengths: Sequence[int]  # [N]
    entropy_sum: torch.Tensor  # scalar, nats over all scored tokens
    chosen_logit_sum: torch.Tensor  # scalar, mean logits summed over chosen tokens
    rejected_logit_sum: torch.Tensor  # scalar
    num_top1: torch.Tensor  # scalar, chosen tokens that have the row's largest logit
    num_tokens: int  # tokens that met the backbone once
    num_sequence_tokens: int  # tokens of the 2 N rows


class PreferenceObjective(torch.nn.Module):
    """Policy and reference log-probs of a micro-batch and their preference loss."""

    def __init__(
        self, model: torch.nn.Module, config: TrainConfig, reference: str, impl: Implementations | None = None
    ) -> None:
        """`model` is a prepared PeftModel, `reference` a name that `packed_logps` accepts, `impl` what the run resolved."""
        super().__init__()
        self.model = model
        self.config = config
        self.reference = reference
        self.impl = impl or Implementations.of(config.impl)

    def forward(self, batch: MicroBatch) -> MicroBatchResult:
        """Score chosen and rejected of every pair on one forest; the reference online unless the batch carries it."""
        pairs = batch.pairs
        sequences = [pair.chosen_sequence for pair in pairs] + [pair.rejected_sequence for pair in pairs]
        starts = [len(pair.prompt_ids) for pair in pairs] * 2
        reference = self.reference if batch.ref_chosen is None else None
        packed = packed_logps(self.model, sequences, starts, reference, impl=self.impl, outputs=OUTPUTS)
        lengths = [len(sequence) - start for sequence, start in zip(sequences, starts, strict=True)]
        with record_function("loss"):
            return self._loss(batch, packed, lengths)

    def _loss(self, batch: MicroBatch, packed: PackedLogps, lengths: Sequence[int]) -> MicroBatchResult:
        chosen, rejected = packed.segment_logps.chunk(2)
        chosen_lengths, rejected_lengths = _like(lengths, chosen).chunk(2)
        if packed.ref_segment_logps is None:
            assert batch.ref_chosen is not None
            assert batch.ref_rejected is not None
            ref_chosen, ref_rejected = _like([*batch.ref_chosen, *batch.ref_rejected], chosen).chunk(2)
        else:
            ref_chosen, ref_rejected = packed.ref_segment_logps.chunk(2)
        loss = preference_loss(
            chosen,
            rejected,
            ref_chosen,
            ref_rejected,
            beta=self.config.beta,
            loss_type=self.config.loss_type,
            label_smoothing=self.config.label_smoothing,
            chosen_lengths=chosen_lengths,
            rejected_lengths=rejected_lengths,
            nll_weight=self.config.nll_weight,
            pair_weight=_pair_weight(batch.pairs, chosen),
        )
        num_pairs = len(batch.pairs)
        return MicroBatchResult(
            loss_sum=loss.losses.sum(),
            losses=loss.losses.detach(),
            chosen_rewards=loss.chosen_rewards,
            rejected_rewards=loss.rejected_rewards,
            chosen_logps=chosen.detach(),
            rejected_logps=rejected.detach(),
            chosen_lengths=lengths[:num_pairs],
            rejected_lengths=lengths[num_pairs:],
            **_token_sums(packed.result, sum(lengths[:num_pairs])),
            num_tokens=packed.num_tokens,
            num_sequence_tokens=packed.num_sequence_tokens,
        )


def _pair_weight(pairs: Sequence[PreferencePair], like: torch.Tensor) -> torch.Tensor | None:
    if all(pair.weight == 1.0 for pair in pairs):
        return None
    return _like([pair.weight for pair in pairs], like)


def _like(values: Sequence[float], like: torch.Tensor) -> torch.Tensor:
    return to_device(torch.tensor(values, dtype=like.dtype), like.device)


def _token_sums(result: LogprobResult, num_chosen: int) -> dict[str, torch.Tensor]:
    """Sums over tokens; a plan is segment-major, so the chosen responses' tokens are the first `num_chosen`."""
    assert result.entropy is not None
    assert result.mean_logit is not None
    assert result.is_top1 is not None
    return {
        "entropy_sum": result.entropy.sum(),
        "chosen_logit_sum": result.mean_logit[:num_chosen].sum(),
        "rejected_logit_sum": result.mean_logit[num_chosen:].sum(),
        "num_top1": result.is_top1[:num_chosen].sum(),
    }


def group_pairs(pairs: Sequence[PreferencePair], max_tokens: int) -> list[list[PreferencePair]]:
    """Cut pairs into micro-batches whose forests have at most `max_tokens` tokens.

    Raises:
        DataError: a pair alone has more; names its row and the option.
    """
    for pair in pairs:
        common = common_prefix_length(pair.chosen_ids, pair.rejected_ids)
        num_tokens = len(pair.prompt_ids) + len(pair.chosen_ids) + len(pair.rejected_ids) - common
        if num_tokens > max_tokens:
            raise DataError(
                f"{pair.source}: the pair alone has {num_tokens} tokens, more than train.max_tokens={max_tokens}; "
                "raise the budget or set data.max_length to drop such rows"
            )
    triples = [(pair.prompt_ids, pair.chosen_ids, pair.rejected_ids) for pair in pairs]
    return [[pairs[index] for index in indices] for indices in split_pairs(triples, max_tokens)]


def group_examples(examples: Sequence[SftExample], max_tokens: int) -> list[list[SftExample]]:
    """Cut completions into micro-batches whose forests have at most `max_tokens` tokens.

    Raises:
        DataError: a completion with its prompt alone has more; names its row and the option.
    """
    for example in examples:
        num_tokens = len(example.prompt_ids) + len(example.completion_ids)
        if num_tokens > max_tokens:
            raise DataError(
                f"{example.source}: the row has {num_tokens} tokens, more than train.max_tokens={max_tokens}; "
                "raise the budget or set data.max_length to drop such rows"
            )
    # a completion is a pair whose two responses are one: equal sequences share every row
    triples = [(example.prompt_ids, example.completion_ids, example.completion_ids) for example in examples]
    return [[examples[index] for index in indices] for indices in split_pairs(triples, max_tokens)]


@dataclass(frozen=True)
class SftResult:
    """Loss and statistics of one micro-batch of N examples; all detached but `loss_sum`."""

    loss_sum: torch.Tensor  # scalar, differentiable: summed negative log-likelihood
    losses: torch.Tensor  # [N] mean negative log-likelihood per token
    lengths: Sequence[int]  # [N] scored tokens
    entropy_sum: torch.Tensor  # scalar, nats over all scored tokens
    num_top1: torch.Tensor  # scalar
    num_tokens: int  # tokens that met the backbone once
    num_sequence_tokens: int  # tokens of the N rows


class SftObjective(torch.nn.Module):
    """Next-token loss of completions; the one module that DeepSpeed wraps."""

    def __init__(self, model: torch.nn.Module, config: TrainConfig, impl: Implementations | None = None) -> None:
        """`model` is a prepared PeftModel, `impl` what the run resolved."""
        super().__init__()
        self.model = model
        self.config = config
        self.impl = impl or Implementations.of(config.impl)

    def forward(self, examples: Sequence[SftExample]) -> SftResult:
        """Score every completion on one forest."""
        sequences = [example.prompt_ids + example.completion_ids for example in examples]
        starts = [len(example.prompt_ids) for example in examples]
        packed = packed_logps(self.model, sequences, starts, impl=self.impl, outputs=("entropy", "is_top1"))
        result, logps = packed.result, packed.segment_logps
        lengths = [len(example.completion_ids) for example in examples]
        assert result.entropy is not None
        assert result.is_top1 is not None
        with record_function("loss"):
            return SftResult(
                loss_sum=-logps.sum(),
                losses=-logps.detach() / to_device(torch.tensor(lengths), logps.device),
                lengths=lengths,
                entropy_sum=result.entropy.sum(),
                num_top1=result.is_top1.sum(),
                num_tokens=packed.num_tokens,
                num_sequence_tokens=packed.num_sequence_tokens,
            )
