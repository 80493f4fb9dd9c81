"""`packed_logps`: the log-probs that padded rows would give, from one forward over their token forest.

    sequences (prompt + response ids) -> forest -> backbone once -> needed rows -> head once -> sums per sequence

The very token ids that would have been padded, the same numbers and gradients, a fraction of the tokens. The reference
runs on the same forest without gradient and shares the pass over the head.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from cpo_kernels.forest import Forest, build_forest
from cpo_kernels.integrations.transformers.hook import IMPLEMENTATION
from cpo_kernels.integrations.transformers.parts import ModelParts, model_parts, peft_configs, reference_adapter
from cpo_kernels.integrations.transformers.refusals import check_forward
from cpo_kernels.linear_logprob import LogprobResult, linear_logprob
from cpo_kernels.logprob_plan import LogprobPlan

ADAPTER_OFF = "adapter_off"


@dataclass(frozen=True)
class PackedLogps:
    """Summed log-probs of each sequence's scored tokens; float32 (float64 for a float64 model)."""

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
    impl: str | None = None,
    outputs: Sequence[str] = (),
) -> PackedLogps:
    """Score tokens starts[s]: of every sequence in one forward over the sequences' forest.

    Args:
        model: a prepared `PreTrainedModel` or `PeftModel`, not a wrapper around one.
        sequences: S sequences of token ids, prompt and response; equal prefixes are computed once.
        starts: first scored position of each sequence, 1 <= starts[s] <= len(sequences[s]).
        reference: None; "adapter_off"; the name of another adapter of the model; or a frozen prepared model.
        impl: implementation of the kernels, None to choose by device.
        outputs: any of "entropy", "mean_logit", "is_top1", found in `PackedLogps.result`.

    Returns:
        `PackedLogps`; one autograd graph a call.

    Raises:
        TypeError: the model is a wrapper.
        ValueError: the model was not prepared, or the rows, starts or reference do not fit.
        RuntimeError: a layer did not run tree attention.
    """
    parts = _prepared_parts(model)
    forest = build_forest(sequences)
    plan = forest.logprob_plan(starts)
    num_sequence_tokens = int(forest.path_offsets[-1])
    check_forward(model, parts, _longest_path(forest))
    device = next(parts.causal_lm.parameters()).device
    forest, plan = forest.to(device), plan.to(device)
    ref_hidden, ref_parts = _reference_hidden(model, parts, forest, reference, impl)
    hidden = forest_forward(parts, forest, impl=impl).last_hidden_state[0]
    shares_head = ref_parts is not None and ref_parts.head is parts.head
    result = _score(parts, hidden, plan, ref_hidden if shares_head else None, impl, outputs)
    ref_segment_logps = result.ref_segment_logps
    if ref_parts is not None and ref_hidden is not None and not shares_head:
        with torch.no_grad():
            ref_segment_logps = _score(ref_parts, ref_hidden, plan, None, impl, ()).segment_logps
    return PackedLogps(result.segment_logps, ref_segment_logps, forest.num_tokens, num_sequence_tokens, plan, result)


def forest_forward(parts: ModelParts, forest: Forest, impl: str | None = None, **kwargs: Any) -> Any:
    """Backbone output over a forest on the model's device; `last_hidden_state` is [1, T, E] after the final norm.

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
        tree_schedule=forest.schedule(),
        tree_impl=impl,
        layers_seen=layers_seen,
        **kwargs,
    )
    if len(layers_seen) != parts.config.num_hidden_layers:
        raise RuntimeError(
            f"tree attention ran in {len(layers_seen)} of {parts.config.num_hidden_layers} layers of "
            f"{type(parts.causal_lm).__name__}: its attention was changed after prepare(), or is not a standard one"
        )
    return output


def _longest_path(forest: Forest) -> int:
    return int(forest.path_offsets.diff().max()) if len(forest.path_offsets) > 1 else 0


def _prepared_parts(model: torch.nn.Module) -> ModelParts:
    parts = model_parts(model)
    if parts.config._attn_implementation != IMPLEMENTATION:
        raise ValueError(
            f"the model's attention is '{parts.config._attn_implementation}', not '{IMPLEMENTATION}': "
            "call prepare(model) once before packed_logps"
        )
    return parts


def _reference_hidden(
    model: torch.nn.Module,
    parts: ModelParts,
    forest: Forest,
    reference: str | torch.nn.Module | None,
    impl: str | None,
) -> tuple[torch.Tensor | None, ModelParts | None]:
    if reference is None:
        return None, None
    with torch.no_grad():
        if isinstance(reference, torch.nn.Module):
            ref_parts = _prepared_parts(reference)
            check_forward(reference, ref_parts, _longest_path(forest))
            return forest_forward(ref_parts, forest, impl=impl).last_hidden_state[0], ref_parts
        adapters = peft_configs(model)
        if not adapters or (reference != ADAPTER_OFF and reference not in adapters):
            raise ValueError(
                f"reference={reference!r}: expected '{ADAPTER_OFF}', a module, or one of the model's adapters "
                f"{sorted(adapters)}"
            )
        with reference_adapter(model, None if reference == ADAPTER_OFF else reference):
            return forest_forward(parts, forest, impl=impl).last_hidden_state[0], parts


def _score(
    parts: ModelParts,
    hidden: torch.Tensor,
    plan: LogprobPlan,
    ref_hidden: torch.Tensor | None,
    impl: str | None,
    outputs: Sequence[str],
) -> LogprobResult:
    weight, bias = parts.head.weight, parts.head.bias
    return linear_logprob(hidden, weight, plan, ref_hidden, bias=bias, outputs=outputs, impl=impl)  # type: ignore[arg-type]
