"""`packed_logps`: the log-probs that padded rows would give, from one forward over their token forest.

    sequences (prompt + response ids) -> forest -> backbone once -> needed rows -> head once -> sums per sequence

The very token ids that would have been padded, the same numbers and gradients, a fraction of the tokens. The reference
runs on the same forest without gradient and shares the pass over the head. Forest, schedule and plan are made on the host
and sent to the device without waiting for it, so a caller that reads nothing keeps the device's queue full. Each part is a
named range in a `torch.profiler` trace. `split_pairs` cuts a step's pairs into micro-batches whose forests fit a budget.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.profiler import record_function

import cpo_kernels._csrc as _csrc
from cpo_kernels.device import autocast_inputs, to_device
from cpo_kernels.forest import Forest, build_forest, flatten
from cpo_kernels.implementation import Implementations
from cpo_kernels.integrations.transformers.hook import check_layers_seen, prepared_parts
from cpo_kernels.integrations.transformers.layer_windows import forest_windows
from cpo_kernels.integrations.transformers.logits import logit_transform
from cpo_kernels.integrations.transformers.model import ModelParts, peft_configs, reference_adapter
from cpo_kernels.integrations.transformers.proof import check_call, check_path, proved_heads, proved_windows
from cpo_kernels.linear_logprob import LogprobResult, linear_logprob
from cpo_kernels.logprob_plan import LogprobPlan
from cpo_kernels.tree_attention import TreeSchedule, resolve_tree_attention

ADAPTER_OFF = "adapter_off"


@dataclass(frozen=True)
class PackedLogps:
    """Summed log-probs of each sequence's scored tokens in float32 (float64 for a float64 model)."""

    segment_logps: torch.Tensor  # [S], differentiable
    ref_segment_logps: torch.Tensor | None  # [S]
    num_tokens: int  # tokens that met the backbone
    num_sequence_tokens: int  # tokens of all sequences: what padding-free rows would have computed
    plan: LogprobPlan
    result: LogprobResult  # per-token values in the order of the plan


def packed_logps(
    model: torch.nn.Module,
    sequences: Sequence[Sequence[int]],
    starts: Sequence[int],
    reference: str | torch.nn.Module | None = None,
    impl: str | Implementations | None = None,
    outputs: Sequence[str] = (),
    temperature: float = 1.0,
) -> PackedLogps:
    """Score tokens starts[s]: of every sequence in one forward over the sequences' forest.

    Under `torch.autocast` the backbone, attention and the head's inputs are in its dtype. Logits are not rounded to it.

    Args:
        model: a prepared `PreTrainedModel` or `PeftModel`, not a wrapper around one.
        sequences: S sequences of token ids, prompt and response. Equal prefixes are computed once.
        starts: first scored position of each sequence, 1 <= starts[s] <= len(sequences[s]).
        reference: None, "adapter_off", the name of another adapter of the model, or a frozen prepared model.
        impl: implementation of the kernels, by op or one name for all, None to choose by device.
        outputs: any of "entropy", "mean_logit", "is_top1", found in `PackedLogps.result`.
        temperature: divisor of the final logits, of policy and reference alike.

    Returns:
        `PackedLogps`, with one autograd graph a call.

    Raises:
        TypeError: the model is a wrapper.
        ValueError: the model was not prepared, was changed since into one that is not exact (`proof.check_call`), or the
            rows, starts or reference do not fit.
        RuntimeError: a layer did not run tree attention.
    """
    parts, impl = prepared_parts(model, "packed_logps"), Implementations.of(impl)
    check_call(model, parts)
    with record_function("pack"):
        inputs = _pack(parts, sequences, starts, impl.tree_attention)
    with record_function("backbone reference"):
        ref_hidden, ref_parts = _reference_hidden(model, parts, inputs, reference, impl.tree_attention)
    with record_function("backbone policy"):
        hidden = inputs.hidden(parts, impl.tree_attention)
    logps = partial(linear_logprob, plan=inputs.plan, temperature=temperature, impl=impl.linear_logprob)
    head: Any = parts.head
    shares_head = ref_parts is not None and ref_parts.head is head
    with record_function("head"):
        frozen = ref_hidden if shares_head else None
        with autocast_inputs(hidden, head.weight, head.bias, frozen) as (hidden, weight, bias, frozen):
            result = logps(hidden, weight, ref_hidden=frozen, bias=bias, outputs=outputs, **logit_transform(parts))
        ref_segment_logps = result.ref_segment_logps
        if ref_parts is not None and ref_hidden is not None and not shares_head:
            ref_head: Any = ref_parts.head
            with torch.no_grad(), autocast_inputs(ref_hidden, ref_head.weight, ref_head.bias) as (rows, weight, bias):
                ref_segment_logps = logps(rows, weight, bias=bias, **logit_transform(ref_parts)).segment_logps
    return PackedLogps(
        result.segment_logps,
        ref_segment_logps,
        inputs.forest.num_tokens,
        inputs.num_sequence_tokens,
        inputs.plan,
        result,
    )


@dataclass(frozen=True)
class PackedInputs:
    """What a forward over a forest needs, on the device of the model."""

    forest: Forest
    schedule: TreeSchedule
    plan: LogprobPlan
    longest_path: int  # tokens
    num_sequence_tokens: int  # tokens of all sequences

    def hidden(self, parts: ModelParts, impl: str | None) -> torch.Tensor:
        """Last hidden states [T, E] of the forest's rows."""
        windows = forest_windows(proved_windows(parts), self.forest.position_ids, self.longest_path)
        output = forest_forward(parts, self.forest, self.schedule, impl, tree_windows=windows)
        hidden: torch.Tensor = output.last_hidden_state[0]
        return hidden


def _pack(
    parts: ModelParts, sequences: Sequence[Sequence[int]], starts: Sequence[int], impl: str | None
) -> PackedInputs:
    """Make everything on the host, then send it to the model's device."""
    forest = build_forest(sequences)
    plan, schedule = forest.logprob_plan(starts), forest.schedule(heads=proved_heads(parts))
    longest_path = int(forest.path_offsets.diff().max()) if len(sequences) else 0
    device = next(parts.causal_lm.parameters()).device
    check_path(parts, longest_path, resolve_tree_attention(impl, device.type))
    return to_device(PackedInputs(forest, schedule, plan, longest_path, int(forest.path_offsets[-1])), device)


def forest_forward(
    parts: ModelParts, forest: Forest, schedule: TreeSchedule | None = None, impl: str | None = None, **kwargs: Any
) -> Any:
    """Backbone output over a forest on the model's device, whose `last_hidden_state` is [1, T, E] after the final norm.

    Args:
        parts: parts of a prepared model.
        forest: on the device of the model.
        schedule: the forest's, on the same device. None makes it here and waits for a CUDA device.
        impl: implementation of tree attention, None to choose by device. It is resolved here, once for all layers.
        kwargs: handed to the backbone. `tree_windows` (of `forest_windows`) where a path outgrows a sliding window.

    Raises:
        RuntimeError: a layer did not run tree attention (its attention was swapped, or ignores keyword arguments).
    """
    layers_seen: set[int] = set()
    output = parts.backbone(
        input_ids=forest.tokens.long().unsqueeze(0),
        position_ids=forest.position_ids.long().unsqueeze(0),
        # a mask of four dimensions is handed through as it is: no T x T mask is made, and tree attention reads none
        attention_mask=torch.ones(1, 1, 1, 1, dtype=torch.bool, device=forest.tokens.device),
        use_cache=False,
        subtree_end=forest.subtree_end,
        tree_schedule=forest.schedule(heads=proved_heads(parts)) if schedule is None else schedule,
        tree_impl=resolve_tree_attention(impl, forest.tokens.device.type),
        layers_seen=layers_seen,
        **kwargs,
    )
    check_layers_seen("tree attention", layers_seen, parts)
    return output


def _reference_hidden(
    model: torch.nn.Module,
    parts: ModelParts,
    inputs: PackedInputs,
    reference: str | torch.nn.Module | None,
    impl: str | None,
) -> tuple[torch.Tensor | None, ModelParts | None]:
    """The reference's hidden states [T, E] and the parts whose head scores them, None twice without a reference."""
    if reference is None:
        return None, None
    with torch.no_grad():
        if isinstance(reference, torch.nn.Module):
            ref_parts = prepared_parts(reference, "packed_logps")
            check_call(reference, ref_parts)
            check_path(ref_parts, inputs.longest_path, resolve_tree_attention(impl, inputs.forest.tokens.device.type))
            return inputs.hidden(ref_parts, impl), ref_parts
        adapters = peft_configs(model)
        if not adapters or (reference != ADAPTER_OFF and reference not in adapters):
            raise ValueError(
                f"reference={reference!r}: expected '{ADAPTER_OFF}', a module, or one of the model's adapters "
                f"{sorted(adapters)}"
            )
        with reference_adapter(model, None if reference == ADAPTER_OFF else reference):
            if reference != ADAPTER_OFF:  # with adapters off less runs than what was checked
                check_call(model, parts)
            return inputs.hidden(parts, impl), parts


Pair = tuple[Sequence[int], ...]  # prompt ids, then the ids of two responses or more


class PairTooLarge(ValueError):
    """Pairs that no micro-batch can hold: `num_tokens` of each by its index."""

    def __init__(self, num_tokens: dict[int, int], max_tokens: int) -> None:
        self.num_tokens = num_tokens
        index, count = next(iter(num_tokens.items()))
        super().__init__(
            f"pair {index} alone has {count} tokens, more than the budget of {max_tokens}; raise the budget or "
            "drop the pair"
        )


def split_pairs(pairs: Sequence[Pair], max_tokens: int) -> list[list[int]]:
    """Micro-batches of pair indices, whose forests have at most `max_tokens` tokens each.

    Pairs are visited in the lexicographic order of their prompts, so pairs of one prompt, then of one question, are
    neighbours. A micro-batch is closed when the next pair's new tokens would exceed the budget. The token count is exact:
    a pair costs the tokens that it adds to the micro-batch's token trie, which csrc keeps.

    Args:
        pairs: (prompt ids, chosen ids, rejected ids) of each pair, or a prompt with any number of responses.
        max_tokens: budget of one micro-batch in forest tokens.

    Returns:
        Lists of indices into `pairs`, in which every index appears exactly once.

    Raises:
        PairTooLarge: pairs that have more tokens alone than the budget.
        ValueError: a token id is no integer in [0, 2^31).
    """
    if all(len(pair) == 3 for pair in pairs):
        tokens, offsets = flatten([[*prompt, *response] for prompt, *responses in pairs for response in responses])
        prompt_lengths = np.array([len(prompt) for prompt, *_ in pairs], np.int64)
        order, batch_offsets, batch_tokens = _csrc.split_pairs(tokens, offsets, prompt_lengths, max_tokens)
        batches = [part.tolist() for part in np.split(order, batch_offsets[1:-1])] if pairs else []
        num_tokens = batch_tokens.tolist()
    else:
        batches = _split_groups(pairs, max_tokens)
        num_tokens = [_num_tokens(pairs, batch) for batch in batches]
    too_large = {batch[0]: count for batch, count in zip(batches, num_tokens, strict=True) if count > max_tokens}
    if too_large:
        raise PairTooLarge(too_large, max_tokens)
    return batches


def _split_groups(groups: Sequence[Pair], max_tokens: int) -> list[list[int]]:
    """As csrc splits pairs: the longest runs of groups that fit, found by doubling and bisection."""
    left = sorted(range(len(groups)), key=lambda index: tuple(groups[index][0]))
    batches: list[list[int]] = []
    while left:
        size = 1  # a group that does not fit is a micro-batch of its own
        while size < len(left) and _num_tokens(groups, left[: 2 * size]) <= max_tokens:
            size *= 2
        # the longest that fits is in [size, 2 size)
        more = range(size + 1, min(2 * size, len(left) + 1))
        size += bisect_right(more, max_tokens, key=lambda end: _num_tokens(groups, left[:end]))
        batches.append(left[:size])
        left = left[size:]
    return batches


def _num_tokens(groups: Sequence[Pair], places: Sequence[int]) -> int:
    sequences = [[*groups[place][0], *response] for place in places for response in groups[place][1:]]
    return build_forest(sequences).num_tokens
