"""What is optimised: a batch as forests, and the loss of one forest.

    batch of examples -> micro-batches within `train.max_tokens` -> one forest each -> log-probs -> summed loss, statistics

`train.method` says which loss it is. Preferences (CPO on siblings, FPO on whole paths), with frozen reference log-probs:

    sum over the micro-batch's pairs of weight * -log sigmoid(beta (margin - reference margin))   / pairs of the step

Supervised fine-tuning on winning paths (the paper's TS-SFT baseline), which is Hugging Face's loss of the same rows padded
into one batch, prompt masked:

    sum over the micro-batch's completion tokens of -log p   / completion tokens of the step

Objectives of whole trees, whose examples are the thoughts after a state, or two chains (`cpo_kernels.tree_loss`):

    sum over the micro-batch's examples of weight * loss of the example's segments   / examples of the step

The division is the loop's, by `normaliser`: only a step knows how many pairs or tokens it has.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch.profiler import record_function

from cpo_fast.config import TREE_METHODS, TrainConfig
from cpo_fast.data.examples import Example, Scored
from cpo_fast.errors import CpoFastError, DataError
from cpo_fast.train.communication import Communicator
from cpo_fast.train.dealing import token_rows
from cpo_fast.tree import LOGP_DECIMALS
from cpo_kernels import (
    group_policy_loss,
    preference_loss,
    ranking_loss,
    step_weighted_loss,
    value_loss,
    visit_smoothing,
)
from cpo_kernels.device import to_device
from cpo_kernels.implementation import Implementations
from cpo_kernels.integrations.transformers import PackedLogps, PairTooLarge, packed_logps, split_pairs
from cpo_kernels.integrations.transformers.model import reference_adapter
from cpo_kernels.tolerances import end_to_end_bound

# per-token values that the statistics need, beside the log-probs
OUTPUTS = {"preference": ("entropy", "mean_logit", "is_top1"), "sft": ("entropy", "is_top1")}
# columns of a result with a value for each example, and those that are sums over tokens
EXAMPLE_COLUMNS = {
    "preference": ("losses", "chosen_rewards", "rejected_rewards", "chosen_logps", "rejected_logps"),
    "sft": ("losses",),
}
SUM_COLUMNS = {
    "preference": ("entropy_sum", "chosen_logit_sum", "rejected_logit_sum", "num_top1"),
    "sft": ("loss_sum", "entropy_sum", "num_top1"),
}
for _table in (
    OUTPUTS,
    EXAMPLE_COLUMNS,
    SUM_COLUMNS,
):  # the best thought of a state counts as chosen, the worst as rejected
    _table.update(dict.fromkeys(TREE_METHODS, _table["preference"]))


@dataclass(frozen=True)
class MicroBatch:
    """Examples that share one forest.

    Attributes:
        examples: pairs or completions.
        ref_logps: cached reference log-probs of `scored`, or None to compute the reference with the policy.
        places: where each example stands among those of its step, for `Metrics`.
    """

    examples: Sequence[Example]
    ref_logps: Sequence[float] | None = None
    places: Sequence[int] = ()

    @property
    def scored(self) -> list[Scored]:
        """What is scored of every sequence: of all chosen and then of all rejected, or of all completions.

        Of examples with more responses the first ones of all, then the second ones, and so on.
        """
        return [entry for *_, entry in self.segments]

    @property
    def segments(self) -> list[tuple[int, int, int, Scored]]:
        """(example, response, thought, what is scored of it), in the order of `scored`."""
        found = [
            (place, which, thought, entry)
            for place, example in enumerate(self.examples)
            for which, entries in enumerate(example.scored)
            for thought, entry in enumerate(entries)
        ]
        return sorted(
            found, key=lambda segment: (segment[1], segment[0])
        )  # stable: thoughts in the order of their chain


@dataclass(frozen=True)
class MicroBatchResult:
    """Loss and statistics of N examples on one forest.

    Attributes:
        loss_sum: scalar, the one value with a graph.
        columns: by name, detached: values [N] of each example, and scalars that are sums over tokens.
        num_scored: scored tokens of all chosen, of all rejected and of all other responses, or of all completions.
        num_tokens: tokens of the forest, which met the backbone once.
        num_sequence_tokens: tokens of the sequences, which a padded batch would have computed.
    """

    loss_sum: torch.Tensor
    columns: dict[str, torch.Tensor]
    num_scored: tuple[int, ...]
    num_tokens: int
    num_sequence_tokens: int


class Objective(torch.nn.Module):
    """The one module that DeepSpeed wraps: a micro-batch in, its summed loss and statistics out.

    Backbone, needed head rows, log-probs and reference all happen in its forward, so that DeepSpeed gathers and releases
    each weight where it is used.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        config: TrainConfig,
        reference: str = "adapter_off",
        impl: Implementations | None = None,
        ref_logps: Mapping[Scored, float] | None = None,
    ) -> None:
        """Keep what every step needs.

        Args:
            model: a prepared PeftModel.
            config: method, loss and token budget.
            reference: a name that `packed_logps` accepts.
            impl: what the run resolved.
            ref_logps: cached reference log-probs of every sequence, or None to compute them online.
        """
        super().__init__()
        self.model, self.config, self.reference, self.ref_logps = model, config, reference, ref_logps
        self.impl = impl or Implementations.of(config.impl)

    def forward(self, batch: MicroBatch | Callable[[torch.nn.Module], Any]) -> MicroBatchResult | None:
        """`score` a micro-batch, or call a function with the model, whose weights ZeRO 3 gathers in this forward only."""
        if isinstance(batch, MicroBatch):
            return self.score(batch)
        batch(self.model)
        return None  # what the function returned is not handed on: DeepSpeed looks into every result

    def score(self, batch: MicroBatch) -> MicroBatchResult:
        """Score every response of the micro-batch on one forest."""
        method = self.config.method
        sequences, starts = zip(*batch.scored, strict=True)
        online = method != "sft" and batch.ref_logps is None
        reference = self.reference if online else None
        packed = packed_logps(self.model, sequences, starts, reference, impl=self.impl, outputs=OUTPUTS[method])
        lengths = [len(sequence) - start for sequence, start in zip(sequences, starts, strict=True)]
        with record_function("loss"):
            if method == "sft":
                return _completion_loss(packed, lengths)
            if method in TREE_METHODS:
                return _tree_loss(batch, packed, lengths, self.config)
            return _pair_loss(batch, packed, lengths, self.config)

    def micro_batches(
        self, examples: Sequence[Example], places: Sequence[int] | None = None, online: bool = False
    ) -> Iterator[MicroBatch]:
        """Cut the examples at `places` (None: all) into forests within the token budget.

        `online` leaves the cached reference out.
        """
        places = range(len(examples)) if places is None else places
        for group in split_examples([examples[place] for place in places], self.config.max_tokens):
            members = [places[index] for index in group]
            batch = MicroBatch([examples[place] for place in members], places=members)
            if self.ref_logps is not None and not online:
                batch = replace(batch, ref_logps=[self.ref_logps[entry] for entry in batch.scored])
            yield batch

    def normaliser(self, examples: Sequence[Example]) -> int:
        """What the summed loss of a batch is divided by.

        Pairs, and states with their thoughts, count as one each: weights average to 1 over the whole set, not over a batch.
        Of completions every token counts, so that a long chain counts for more than a short one, as in Hugging Face's
        loss.
        """
        if self.config.method == "sft":
            return sum(len(example.responses[0]) for example in examples)
        return len(examples)

    def self_test(
        self, engine: Any, examples: Sequence[Example], communicator: Communicator, off_reference: bool = False
    ) -> None:
        """Policy and reference on one forest before the first step: rewards must be bitwise 0 on every rank.

        Every rank calls with the same examples, and all of them raise where one has other rewards. Of a policy that
        starts from an adapter and is measured against the base (`off_reference`), the log-probs without that adapter must
        be the reference's, to the last bit.

        Raises:
            CpoFastError: the policy at step 0, or its base, is not its reference.
        """
        if self.config.method == "sft":
            return  # no reference
        batch, found = next(self.micro_batches(examples, online=True)), "rewards at step 0 reach {}{}, not 0"
        with torch.no_grad():
            if off_reference:
                found = "log-probs of the reference differ by {}{} from those of the base"
                differences: list[torch.Tensor] = []
                engine(lambda model: differences.append(self._from_base(model, batch)))
                largest = differences[0].abs().max()
            else:
                columns = engine(batch).columns
                largest = torch.stack([columns["chosen_rewards"], columns["rejected_rewards"]]).abs().max()
        for rank, value in enumerate(communicator.gather(largest[None])[:, 0].tolist()):
            if value != 0:  # NaN if one is
                where = f" on rank {rank}" if communicator.world_size > 1 else ""
                raise CpoFastError(
                    f"self-test: {found.format(f'{value:.1e}', where)}, so the reference is not "
                    f"{'the base' if off_reference else 'the starting point of the policy'} (an adapter that was trained, "
                    "or dropout)"
                )

    def sampling_test(self, engine: Any, examples: Sequence[Example], communicator: Communicator) -> None:
        """With `tree_grpo`, the policy before the first step on one forest: the trees must hold its own log-probs.

        Every rank calls with the same examples, and all of them raise where one finds others.

        Raises:
            CpoFastError: another model, adapter or dtype has sampled the trees.
        """
        if self.config.method != "tree_grpo":
            return
        with torch.no_grad():
            off = engine(next(self.micro_batches(examples, online=True))).columns["off_sampling"]
        farthest = float(communicator.gather(off[None]).max())
        model: Any = self.model
        bound = max(end_to_end_bound(model.get_base_model().dtype), 10.0**-LOGP_DECIMALS)  # the file rounds
        if not farthest <= bound:
            raise CpoFastError(
                f"self-test: the log-probs that the trees hold of their sampling are {farthest:.1e} nats a token from the "
                f"policy's at step 0, more than rounding ({bound:.0e}), so another model, adapter or dtype sampled them; "
                "train.method=tree_grpo needs trees of the model that it starts from"
            )

    def _from_base(self, model: torch.nn.Module, batch: MicroBatch) -> torch.Tensor:
        """Log-probs [S] of the reference less those of the policy with every adapter off."""
        sequences, starts = zip(*batch.scored, strict=True)
        score = partial(packed_logps, model, sequences, starts, self.reference, impl=self.impl)
        expected = score().ref_segment_logps
        assert expected is not None
        with reference_adapter(model, None):
            return expected - score().segment_logps


def _pair_loss(batch: MicroBatch, packed: PackedLogps, lengths: Sequence[int], config: TrainConfig) -> MicroBatchResult:
    chosen, rejected = packed.segment_logps.chunk(2)  # [N] each
    chosen_lengths, rejected_lengths = _like(lengths, chosen).chunk(2)
    if packed.ref_segment_logps is not None:
        ref_chosen, ref_rejected = packed.ref_segment_logps.chunk(2)
    else:
        assert batch.ref_logps is not None
        ref_chosen, ref_rejected = _like(batch.ref_logps, chosen).chunk(2)
    weights = [pair.weight for pair in batch.examples]
    smoothing: float | torch.Tensor = config.label_smoothing
    if config.visit_smoothing:
        smoothing = visit_smoothing(*_like([n for pair in batch.examples for n in pair.visits], chosen).view(-1, 2).T)
    loss = preference_loss(
        chosen,
        rejected,
        ref_chosen,
        ref_rejected,
        beta=config.beta,
        loss_type=config.loss_type,
        label_smoothing=smoothing,
        chosen_lengths=chosen_lengths,
        rejected_lengths=rejected_lengths,
        nll_weight=config.nll_weight,
        pair_weight=None if all(weight == 1.0 for weight in weights) else _like(weights, chosen),
    )
    num_chosen = sum(lengths[: len(weights)])
    num_scored = (num_chosen, sum(lengths) - num_chosen, 0)
    columns = {
        "losses": loss.losses.detach(),
        "chosen_rewards": loss.chosen_rewards,
        "rejected_rewards": loss.rejected_rewards,
        "chosen_logps": chosen.detach(),
        "rejected_logps": rejected.detach(),
        **_token_sums(packed, num_scored),
    }
    return MicroBatchResult(loss.losses.sum(), columns, num_scored, packed.num_tokens, packed.num_sequence_tokens)


def _tree_loss(batch: MicroBatch, packed: PackedLogps, lengths: Sequence[int], config: TrainConfig) -> MicroBatchResult:
    logps, ref_logps = packed.segment_logps, packed.ref_segment_logps  # [S]
    if ref_logps is None:
        assert batch.ref_logps is not None
        ref_logps = _like(batch.ref_logps, logps)
    segments = batch.segments
    # what is known of each segment in one tensor, so that it is sent once
    parts = []
    for (place, which, thought, _), length in zip(segments, lengths, strict=True):
        known = batch.examples[place].thoughts[which]
        parts.append((place, which, known.values[thought], known.count, length, known.sampled_logp or 0.0))
    sent = to_device(torch.tensor(parts, dtype=torch.float64).T.contiguous(), logps.device)
    group, response = sent[0].long(), sent[1].long()
    value, count, length, sampled = sent[2:].to(logps.dtype)
    num_groups, beta = len(batch.examples), config.beta
    if config.method == "tpo":
        losses = ranking_loss(logps, ref_logps, value, group, num_groups, beta)
    elif config.method == "dvo":
        losses = value_loss(logps, ref_logps, value, count, group, num_groups, beta)
    elif config.method == "tree_grpo":
        losses = group_policy_loss(
            logps, ref_logps, sampled, length, value, count, group, num_groups, beta, config.clip_range
        )
    else:
        losses = step_weighted_loss(logps, ref_logps, value, response == 0, group, num_groups, beta, config.gamma)
    weights = [example.weight for example in batch.examples]
    if any(weight != 1.0 for weight in weights):
        losses = losses * _like(weights, logps)
    places = torch.arange(num_groups, device=logps.device)[:, None] == group  # [G, S]
    with torch.no_grad():
        rewards = beta * (logps - ref_logps)
        columns = {"losses": losses.detach()}
        for which, name in enumerate(("chosen", "rejected")):
            members = places & (response == which)
            columns[f"{name}_rewards"] = torch.where(members, rewards, 0).sum(1)
            columns[f"{name}_logps"] = torch.where(members, logps, 0).sum(1)
        if config.method == "tree_grpo":
            columns["off_sampling"] = (logps - sampled).abs().sum() / length.sum()
    sums = [0, 0, 0]  # tokens of the best, of the worst and of the others
    for (_, which, *_), tokens in zip(segments, lengths, strict=True):
        sums[min(which, 2)] += tokens
    num_scored = (sums[0], sums[1], sums[2])
    columns |= _token_sums(packed, num_scored)
    return MicroBatchResult(losses.sum(), columns, num_scored, packed.num_tokens, packed.num_sequence_tokens)


def _token_sums(packed: PackedLogps, num_scored: tuple[int, int, int]) -> dict[str, torch.Tensor]:
    """Sums over tokens, whose values stand sequence by sequence: those of the chosen responses are the first."""
    result = packed.result
    assert result.entropy is not None
    assert result.mean_logit is not None
    assert result.is_top1 is not None
    first, second = num_scored[0], num_scored[0] + num_scored[1]
    return {
        "entropy_sum": result.entropy.sum(),
        "chosen_logit_sum": result.mean_logit[:first].sum(),
        "rejected_logit_sum": result.mean_logit[first:second].sum(),
        "num_top1": result.is_top1[:first].sum(),
    }


def _completion_loss(packed: PackedLogps, lengths: Sequence[int]) -> MicroBatchResult:
    logps, result = packed.segment_logps, packed.result  # [N]
    assert result.entropy is not None
    assert result.is_top1 is not None
    loss_sum = -logps.sum()
    columns = {
        "losses": -logps.detach() / _like(lengths, logps),  # a mean per token
        "loss_sum": loss_sum.detach(),
        "entropy_sum": result.entropy.sum(),
        "num_top1": result.is_top1.sum(),
    }
    return MicroBatchResult(loss_sum, columns, (sum(lengths),), packed.num_tokens, packed.num_sequence_tokens)


def _like(values: Sequence[float], like: torch.Tensor) -> torch.Tensor:
    return to_device(torch.tensor(values, dtype=like.dtype), like.device)


def split_examples(examples: Sequence[Example], max_tokens: int) -> list[list[int]]:
    """Cut examples into micro-batches, given by places, whose forests have at most `max_tokens` tokens.

    Raises:
        DataError: an example alone has more. It names the row and the option.
    """
    try:
        return split_pairs(token_rows(examples), max_tokens)
    except PairTooLarge as error:
        index = min(error.num_tokens)
        what = "the pair alone" if len(examples[index].responses) == 2 else "the row"
        raise DataError(
            f"{examples[index].source}: {what} has {error.num_tokens[index]} tokens, more than "
            f"train.max_tokens={max_tokens}; raise the budget or set data.max_length to drop such rows"
        ) from None
