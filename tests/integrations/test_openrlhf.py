"""The OpenRLHF log-prob hook against the definition computed by plain torch; OpenRLHF itself is not needed."""

import sys
import types
from typing import Any

import pytest
import torch
from torch import nn

from cpo_kernels.integrations.openrlhf import actor_log_probs, packed_actor, prepare_actor
from tests.tiny import random_pairs, tiny_llama, with_exact_norms, with_lora


class PlainActor(nn.Module):
    """The definition: a stock model, full logits, a shift by one, the last columns times the action mask."""

    packing_samples = False

    def __init__(self, model: nn.Module, temperature: float = 1.0) -> None:
        super().__init__()
        self.model = model
        self.temperature = temperature

    def forward(
        self,
        sequences: torch.Tensor,
        action_mask: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        return_output: bool = False,
        return_logprobs: bool = False,
        return_entropy: bool = False,
    ) -> Any:
        position = (attention_mask.cumsum(1) - 1).clamp(min=0)
        logits = self.model(input_ids=sequences, attention_mask=attention_mask, position_ids=position).logits[:, :-1]
        log_probs = torch.log_softmax(logits / self.temperature, -1)
        picked = log_probs.gather(2, sequences[:, 1:, None]).squeeze(2)
        if return_entropy:
            return picked, -(log_probs.exp() * log_probs).sum(-1)
        return picked if return_logprobs else picked[:, -action_mask.shape[1] :] * action_mask


def rollout() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Left-padded prompts and right-padded answers [B, L], attention mask, action mask [B, A] with a gap."""
    pairs = random_pairs(seed=4, num_rejected=3)
    widest = max(len(prompt) for prompt, _, _ in pairs)
    num_actions = max(len(answer) for _, *both in pairs for answer in both)
    ids, attention, actions = [], [], []
    for prompt, *both in pairs:
        for answer in both:
            left, right = widest - len(prompt), num_actions - len(answer)
            ids.append([0] * left + prompt + answer + [0] * right)
            attention.append([0] * left + [1] * (len(prompt) + len(answer)) + [0] * right)
            actions.append([1] * len(answer) + [0] * right)
    actions[0][1] = 0  # what a tool wrote between two actions
    return torch.tensor(ids), torch.tensor(attention), torch.tensor(actions)


def float64_model() -> nn.Module:
    return with_lora(with_exact_norms(tiny_llama(dtype=torch.float64)))


def test_action_log_probs_and_gradients_equal_the_definition() -> None:
    sequences, attention, actions = rollout()
    plain, packed = PlainActor(float64_model()), packed_actor(PlainActor)(float64_model())
    weights = torch.randn(actions.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    results = []
    for actor in (plain, packed):
        log_probs = actor(sequences, actions, attention)
        (log_probs * weights).sum().backward()
        results.append((log_probs.detach(), [p.grad for p in actor.parameters() if p.grad is not None]))
    assert torch.allclose(results[0][0], results[1][0], rtol=0, atol=1e-10)
    assert len(results[0][1]) == len(results[1][1]) > 0
    for one, other in zip(results[0][1], results[1][1], strict=True):
        assert torch.allclose(one, other, rtol=1e-9, atol=1e-11)


def test_all_log_probs_and_entropy_equal_the_definition_where_a_token_has_a_predecessor() -> None:
    sequences, attention, _ = rollout()
    expected, entropy = PlainActor(float64_model())(sequences, attention_mask=attention, return_entropy=True)
    actor = prepare_actor(PlainActor(float64_model()))
    valid = attention[:, 1:] * attention[:, :-1]
    with torch.no_grad():
        log_probs, output = actor_log_probs(
            actor, sequences, None, attention, return_output=True, return_logprobs=True, return_entropy=True
        )
    assert torch.allclose(log_probs, expected * valid, rtol=0, atol=1e-10)
    assert torch.allclose(output.entropy, entropy * valid, rtol=0, atol=1e-10)


def test_the_call_goes_through_a_wrapper_of_the_model() -> None:
    """DeepSpeed replaces actor.model by an engine whose forward calls the model's."""

    class Engine(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module, self.calls = module, 0

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            return self.module(*args, **kwargs)

    sequences, attention, actions = rollout()
    actor = packed_actor(PlainActor)(float64_model())
    before = actor(sequences, actions, attention)
    actor.model = Engine(actor.model)
    assert torch.equal(actor(sequences, actions, attention), before)
    assert actor.model.calls == 1


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"action_mask": None}, "full logits"),
        ({"attention_mask": None}, "attention_mask"),
        ({"allgather_logits": True}, "allgather_logits"),
        ({"ring_attn_group": object()}, "ring_attn_group"),
        ({"packed_seq_lens": [3]}, "packed_seq_lens"),
        ({"return_entropy": True, "return_output": True}, "under a gradient"),
    ],
)
def test_what_a_forest_does_not_give_is_refused_by_name(options: dict[str, Any], named: str) -> None:
    sequences, attention, actions = rollout()
    arguments = {"action_mask": actions, "attention_mask": attention} | options
    with pytest.raises(ValueError, match=named):
        actor_log_probs(prepare_actor(PlainActor(float64_model())), sequences, **arguments)


def test_temperature_and_sample_packing_are_refused_by_name() -> None:
    sequences, attention, actions = rollout()
    with pytest.raises(ValueError, match=r"temperature=0\.5"):
        packed_actor(PlainActor)(float64_model(), temperature=0.5)(sequences, actions, attention)
    actor = PlainActor(float64_model())
    actor.packing_samples = True
    with pytest.raises(ValueError, match="packing_samples"):
        prepare_actor(actor)


def test_the_installed_actor_is_taken_when_no_class_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = types.ModuleType("openrlhf.models")
    installed.Actor = PlainActor  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "openrlhf", types.ModuleType("openrlhf"))
    monkeypatch.setitem(sys.modules, "openrlhf.models", installed)
    assert issubclass(packed_actor(), PlainActor)


def test_another_call_shape_is_named() -> None:
    class OldActor(nn.Module):
        def forward(self, sequences: Any, num_actions: Any = None, attention_mask: Any = None) -> None:
            """The call shape before action masks."""

    with pytest.raises(RuntimeError, match="num_actions"):
        packed_actor(OldActor)
