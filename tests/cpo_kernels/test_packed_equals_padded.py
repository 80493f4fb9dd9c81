"""packed_logps against one padded row per sequence: the same loss and the same gradient, whatever the tree looks like.

In fp64, with the RMSNorm of both sides replaced by an fp64 one (the stock module rounds to fp32), to 1e-12 relative per
LoRA tensor; in fp32 with unmodified modules to 1e-5. The padded side is `padded_oracle`, which shares no code with the
packed one.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

from cpo_kernels import build_forest, preference_loss
from cpo_kernels.integrations.transformers import PackedLogps, packed_logps, prepare, split_pairs
from tests.cpo_kernels.model_copies import Builder, copies
from tests.cpo_kernels.padded_oracle import (
    padded_logps,
    padded_step,
    pair_sequences,
    relative_error,
    sum_gradients,
    trained_gradients,
    worst_gradient_error,
)
from tests.tiny import Pair, random_pairs, randomize_lora, tiny_llama, tiny_mistral, with_exact_norms, with_lora

FEW_SHOT = [5, 6, 7, 8, 9, 10, 11]
FIRST, SECOND = [*FEW_SHOT, 12, 13], [*FEW_SHOT, 14, 15, 16]
A, B, C = [20, 21, 22], [30, 31], [40, 41, 42, 43]

CASES: dict[str, list[Pair]] = {
    "several questions under one few-shot prompt": random_pairs(seed=1, num_questions=3),
    "siblings diverge at their first token": [(FIRST, A, B), (FIRST, A, C)],
    "siblings diverge at a later token": [(FIRST, [20, 21, 22], [20, 21, 33]), (FIRST, [20, 21, 22], [20, 44])],
    "a sibling is a prefix of another": [(FIRST, [20, 21], [20, 21, 22]), (FIRST, [20, 21], [20])],
    "one thought in several pairs": [(FIRST, A, B), (FIRST, A, C), (FIRST, A, [50]), (FIRST + A, B, C)],
    "a thought both chosen and rejected": [(FIRST, A, B), (FIRST, B, C), (FIRST, C, A)],
    "the same text under two parents": [(FIRST, A, B), (FIRST + A, A, B), (SECOND, A, B), (SECOND + B, A, C)],
    "one-token thoughts": [(FIRST, [20], [21]), (FIRST, [20], [22]), ([*FIRST, 20], [23], [20])],
    "several roots": [([60, 61], A, B), ([62], A, B), ([63, 64, 65], C, B)],
    "a prompt of one token": [([60], A, B), ([60], [21], A)],
    "the very same pair twice": [(FIRST, A, B), (FIRST, A, B), (SECOND, B, A)],
}


@dataclass
class Step:
    """One packed step: mean loss over the pairs, log-probs of every sequence, gradients."""

    loss: torch.Tensor
    logps: torch.Tensor
    gradients: dict[str, torch.Tensor]
    packed: PackedLogps


def packed_loss(packed: PackedLogps) -> torch.Tensor:
    """[N] DPO losses, chosen and rejected in turn."""
    logps, reference = packed.segment_logps, packed.ref_segment_logps
    return preference_loss(logps[0::2], logps[1::2], reference[0::2], reference[1::2], beta=0.1).losses


def packed_step(
    model: nn.Module, pairs: Sequence[Pair], impl: str | None = None, num_pairs: int | None = None, **options: Any
) -> Step:
    """Loss (sum over these pairs / num_pairs) and gradient through packed_logps."""
    model.zero_grad(set_to_none=True)
    packed = packed_logps(model, *pair_sequences(pairs), **({"reference": "adapter_off"} | options), impl=impl)
    loss = packed_loss(packed).sum() / (num_pairs or len(pairs))
    loss.backward()
    gradients = trained_gradients(model)
    model.zero_grad(set_to_none=True)
    return Step(loss.detach(), packed.segment_logps.detach(), gradients, packed)


def exact(build: Callable[..., nn.Module], **changes: Any) -> Builder:
    """fp64 throughout, so that right code agrees to 1e-12."""
    return copies(lambda: with_lora(with_exact_norms(build(dtype=torch.float64, **changes))))


EXACT: dict[str, Builder] = {
    "llama": exact(tiny_llama),
    "llama tied": exact(tiny_llama, tie_word_embeddings=True),
    "llama without grouped heads": exact(tiny_llama, num_key_value_heads=4),
    "llama one key head, head size 10": exact(tiny_llama, num_key_value_heads=1, head_dim=10),
    "mistral": exact(tiny_mistral),
}
UNMODIFIED: dict[str, Builder] = {
    "llama": copies(lambda: with_lora(tiny_llama())),
    "mistral": copies(lambda: with_lora(tiny_mistral())),
}


def assert_equals_padded(build: Builder, pairs: Sequence[Pair], bound: float, impl: str | None = None) -> None:
    want = padded_step(build(), pairs)
    got = packed_step(prepare(build()), pairs, impl)
    assert relative_error(got.loss, want.loss) <= bound
    assert relative_error(got.logps, want.logps) <= bound
    assert relative_error(got.packed.ref_segment_logps, want.ref_logps) <= bound
    assert len(want.gradients) == 28  # A and B of 7 layers in each of 2 blocks
    assert worst_gradient_error(got.gradients, want.gradients) <= bound


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("model", ["llama", "mistral"])
def test_loss_and_gradient_equal_padded_in_fp64(model: str, case: str) -> None:
    assert_equals_padded(EXACT[model], CASES[case], 1e-12)


@pytest.mark.parametrize("impl", ["reference", "eager"])
@pytest.mark.parametrize("model", EXACT)
def test_every_model_and_implementation_equals_padded_in_fp64(model: str, impl: str) -> None:
    assert_equals_padded(EXACT[model], random_pairs(seed=2), 1e-12, impl)


@pytest.mark.parametrize("model", UNMODIFIED)
@pytest.mark.parametrize("case", CASES)
def test_unmodified_fp32_modules_equal_padded(case: str, model: str) -> None:
    assert_equals_padded(UNMODIFIED[model], CASES[case], 1e-5)


def test_packing_computes_each_shared_token_once() -> None:
    pairs = CASES["several questions under one few-shot prompt"]
    sequences, starts = pair_sequences(pairs)
    packed = packed_logps(prepare(with_lora(tiny_llama())), sequences, starts)
    prefixes = {tuple(sequence[:n]) for sequence in sequences for n in range(1, len(sequence) + 1)}
    assert packed.num_tokens == len(prefixes)
    assert packed.num_sequence_tokens == sum(len(sequence) for sequence in sequences)
    assert packed.ref_segment_logps is None


def test_order_of_siblings_and_questions_does_not_change_the_gradient() -> None:
    pairs = random_pairs(seed=3, num_questions=3)
    model = prepare(EXACT["llama"]())
    want = packed_step(model, pairs)
    for seed in range(3):
        shuffled = random.Random(seed).sample(pairs, len(pairs))
        got = packed_step(model, shuffled)
        assert got.packed.num_tokens == want.packed.num_tokens
        assert relative_error(got.loss, want.loss) <= 1e-12
        assert worst_gradient_error(got.gradients, want.gradients) <= 1e-12


@pytest.mark.parametrize("max_tokens", [32, 45, 70, 10_000])
def test_any_token_budget_gives_the_gradient_of_one_batch(max_tokens: int) -> None:
    pairs = random_pairs(seed=4, num_questions=3)
    model = prepare(EXACT["llama"]())
    want = packed_step(model, pairs)
    batches = split_pairs(pairs, max_tokens)
    assert sorted(index for batch in batches for index in batch) == list(range(len(pairs)))
    for batch in batches:
        assert batch
        assert build_forest(pair_sequences([pairs[i] for i in batch])[0]).num_tokens <= max_tokens
    assert (len(batches) == 1) is (max_tokens == 10_000)
    parts = [packed_step(model, [pairs[i] for i in batch], num_pairs=len(pairs)) for batch in batches]
    assert relative_error(sum(part.loss for part in parts), want.loss) <= 1e-12
    assert worst_gradient_error(sum_gradients(part.gradients for part in parts), want.gradients) <= 1e-12


def test_split_names_a_pair_over_budget_and_keeps_one_that_just_fits() -> None:
    pairs = [(FIRST, A, B), (FIRST, A, C)]
    largest = len(FIRST) + len(A) + len(C)
    assert sorted(split_pairs(pairs, largest)) in ([[0], [1]], [[0, 1]])
    with pytest.raises(ValueError, match=r"\b1\b"):
        split_pairs(pairs, largest - 1)
    assert split_pairs([], 10) == []


def count_calls(model: nn.Module) -> list[int]:
    """A counter of forwards through the first layer, to see that checkpointing recomputes at all."""
    calls = [0]

    def count(*_: Any) -> None:
        calls[0] += 1

    next(m for n, m in model.named_modules() if n.endswith("layers.0.self_attn.q_proj")).register_forward_hook(count)
    return calls


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_does_not_change_the_gradient(use_reentrant: bool) -> None:
    pairs = random_pairs(seed=5)
    want = padded_step(EXACT["llama"](), pairs)
    model = prepare(EXACT["llama"]()).train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    if use_reentrant:
        model.enable_input_require_grads()
    calls = count_calls(model)
    packed_logps(model, [[3, 4]], [1])  # a hook that came after `prepare` is proved at the first call
    calls[0] = 0
    got = packed_step(model, pairs)
    assert calls == [3]  # reference, policy, and the policy again in backward
    assert relative_error(got.loss, want.loss) <= 1e-12
    assert worst_gradient_error(got.gradients, want.gradients) <= 1e-12


def test_reference_is_bitwise_the_policy_while_b_is_zero() -> None:
    sequences, starts = pair_sequences(random_pairs(seed=6))
    for dtype in (torch.float32, torch.bfloat16):
        packed = packed_logps(
            prepare(with_lora(tiny_llama(dtype=dtype), zero_b=True)), sequences, starts, reference="adapter_off"
        )
        assert torch.equal(packed.segment_logps, packed.ref_segment_logps)
        assert packed.segment_logps.dtype == torch.float32
        assert packed.segment_logps.requires_grad
        assert not packed.ref_segment_logps.requires_grad


def test_adapter_off_reference_is_the_base_model_once_b_is_not_zero() -> None:
    sequences, starts = pair_sequences(random_pairs(seed=7))
    with torch.no_grad():
        want = padded_logps(with_exact_norms(tiny_llama(dtype=torch.float64)), sequences, starts)
    packed = packed_logps(prepare(EXACT["llama"]()), sequences, starts, reference="adapter_off")
    assert relative_error(packed.ref_segment_logps, want) <= 1e-12
    assert relative_error(packed.segment_logps.detach(), want) > 1e-3


def test_named_adapter_and_frozen_module_serve_as_reference() -> None:
    sequences, starts = pair_sequences(random_pairs(seed=8))
    model = EXACT["llama"]()
    model.add_adapter("ref", model.peft_config["default"])
    model.to(torch.float64)
    randomize_lora(model, seed=9)
    requires_grad = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    with torch.no_grad():
        policy = padded_logps(model, sequences, starts)
        model.set_adapter("ref")
        reference = padded_logps(model, sequences, starts)
        model.set_adapter("default")
    assert relative_error(policy, reference) > 1e-3
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(requires_grad[name])

    packed = packed_logps(prepare(model), sequences, starts, reference="ref")
    assert relative_error(packed.segment_logps.detach(), policy) <= 1e-12
    assert relative_error(packed.ref_segment_logps, reference) <= 1e-12
    assert model.active_adapter == "default"
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == requires_grad

    frozen = with_exact_norms(tiny_llama(seed=5, dtype=torch.float64)).requires_grad_(False)
    with torch.no_grad():
        want = padded_logps(frozen, sequences, starts)
    packed = packed_logps(model, sequences, starts, reference=prepare(frozen))
    assert relative_error(packed.segment_logps.detach(), policy) <= 1e-12
    assert relative_error(packed.ref_segment_logps, want) <= 1e-12
    with pytest.raises(ValueError, match="no_such_adapter"):
        packed_logps(model, sequences, starts, reference="no_such_adapter")


def test_reference_builds_no_graph() -> None:
    """The reference runs without gradient: a graph over it would double the memory and then be thrown away."""
    pairs = random_pairs(seed=10)
    frozen, model = prepare(tiny_llama(seed=5)), prepare(with_lora(tiny_llama()))
    for reference, watched, expected in (("adapter_off", model, [False, True]), (frozen, frozen, [False])):
        enabled: list[bool] = []
        layer = next(module for name, module in watched.named_modules() if name.endswith("layers.0"))
        handle = layer.register_forward_hook(lambda *_, seen=enabled: seen.append(torch.is_grad_enabled()))
        packed_logps(watched, [[3, 4]], [1])  # a hook that came after `prepare` is proved at the first call
        enabled.clear()
        packed_step(model, pairs, reference=reference)
        handle.remove()
        assert enabled == expected
    assert all(parameter.grad is None for parameter in frozen.parameters())


def test_full_fine_tuning_gradient_equals_padded() -> None:
    """Without LoRA, the head and the embedding (tied: one tensor, two uses) get their gradient too."""
    pairs = CASES["the same text under two parents"]
    for tied in (False, True):

        def build(tied: bool = tied) -> nn.Module:
            return with_exact_norms(tiny_llama(dtype=torch.float64, tie_word_embeddings=tied))

        reference = build().requires_grad_(False)
        with torch.no_grad():
            ref_logps = padded_logps(reference, *pair_sequences(pairs))
        padded = build()
        margins = (padded_logps(padded, *pair_sequences(pairs)) - ref_logps).reshape(-1, 2)
        (-torch.nn.functional.logsigmoid(0.1 * (margins[:, 0] - margins[:, 1]))).mean().backward()
        got = packed_step(prepare(build()), pairs, reference=prepare(reference))
        assert worst_gradient_error(got.gradients, trained_gradients(padded)) <= 1e-12


@pytest.mark.parametrize("start", [0, 6, -1])
def test_start_without_a_parent_row_or_past_the_end_is_refused(start: int) -> None:
    model = prepare(tiny_llama())
    with pytest.raises(ValueError, match="1"):
        packed_logps(model, [[3, 4, 5], [3, 4, 5, 6, 7]], [2, start])


def test_start_at_the_end_scores_nothing() -> None:
    logps = packed_logps(prepare(tiny_llama()), [[3, 4, 5], [3, 4, 6]], [3, 2]).segment_logps.detach()
    assert float(logps[0]) == 0.0
    assert float(logps[1]) < 0.0
