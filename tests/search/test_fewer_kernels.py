"""A model changed for fewer kernels a decode step writes the same tokens, and is otherwise the model that it was.

On a GPU the engine makes the change itself. Here it is forced, on a CPU in float32.
"""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers.models.llama import modeling_llama

from cpo_fast.adapters import merged_adapter
from cpo_fast.search.engine.arena_engine import ArenaEngine, weights_fingerprint
from cpo_fast.search.engine.decode_batch import DecodeBatch
from cpo_fast.search.engine.forward_plans import ModelRunner
from cpo_fast.search.engine.stopping import StopChecker
from cpo_kernels.integrations.transformers.decode import fewer_kernels
from cpo_kernels.integrations.transformers.model import model_parts
from cpo_kernels.integrations.transformers.projections import MergedLinear, merge_projections, separate_projections
from cpo_kernels.integrations.transformers.rotary import defer_rotation, deferred_rotation
from tests.search.engine_cases import (
    CONFIG_CLASSES,
    TOKENIZER,
    Outcomes,
    engine_config,
    forked_prompts,
    run_searches_of,
    small_model,
    with_adapter,
)

IDS = torch.tensor([[5, 6, 7, 40, 9]])


@pytest.fixture(autouse=True)
def _stock_rotation(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test puts into a module of Transformers is taken out again."""
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", modeling_llama.apply_rotary_pos_emb)


def engine_of(model: Any, fewer: bool) -> ArenaEngine:
    """The engine for a CPU, with or without the change."""

    def make_batch(runner: ModelRunner, stop_checker: StopChecker) -> DecodeBatch:
        if fewer:
            runner.parts = fewer_kernels(model)
        return DecodeBatch(runner, stop_checker)

    return ArenaEngine(model, TOKENIZER, engine_config(), make_batch)


def assert_same(actual: Outcomes, expected: Outcomes) -> None:
    """Tokens alike, log-probs and scores to rounding."""
    assert actual.keys() == expected.keys()
    for name, (first, scores, last, last_scores) in expected.items():
        got_first, got_scores, got_last, got_last_scores = actual[name]
        for one, other in zip([*got_first, *got_last], [*first, *last], strict=True):
            assert one.token_ids == other.token_ids
            assert one.logps == pytest.approx(other.logps, abs=1e-4)
        assert [*got_scores, *got_last_scores] == [pytest.approx(pair, abs=1e-4) for pair in [*scores, *last_scores]]


@pytest.mark.parametrize("adapt", [False, True], ids=["base", "live adapter"])
@pytest.mark.parametrize("name", CONFIG_CLASSES)
def test_every_architecture_samples_what_it_sampled(name: str, adapt: bool) -> None:
    few_shot, prompts = forked_prompts(11, num_groups=2)
    make: Callable[[], Any] = lambda: with_adapter(small_model(name)) if adapt else small_model(name)  # noqa: E731
    expected = run_searches_of(engine_of(make(), fewer=False), few_shot, prompts)
    model = make()
    engine = engine_of(model, fewer=True)
    assert engine._runner.parts.defers_rotation
    num_merged = sum(type(module) is MergedLinear for module in model.modules())
    assert num_merged == 2 * 5  # q, k, v, gate and up of two layers
    assert_same(run_searches_of(engine, few_shot, prompts), expected)


def test_a_merge_inside_a_search_and_a_changed_weight_reach_the_common_product() -> None:
    few_shot, prompts = forked_prompts(7, num_groups=2)
    found = []
    for fewer in (False, True):
        model = with_adapter(small_model())
        engine = engine_of(model, fewer)
        names = [weights_fingerprint(model)]
        with merged_adapter(model):
            found.append([run_searches_of(engine, few_shot, prompts)])
            names.append(weights_fingerprint(model))
        with torch.no_grad():
            model.get_base_model().model.layers[1].mlp.up_proj.weight.mul_(1.5)
        names.append(weights_fingerprint(model))
        found[-1].append(run_searches_of(engine, few_shot, prompts))
        assert len(set(names)) == 3
    for expected, actual in zip(*found, strict=True):
        assert_same(actual, expected)
    assert found[0][0] != found[0][1]


def test_a_search_that_begins_merged_gives_every_weight_back() -> None:
    model = with_adapter(small_model())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    few_shot, prompts = forked_prompts(7, num_groups=1)
    with merged_adapter(model):
        run_searches_of(engine_of(model, fewer=True), few_shot, prompts)  # lays the merged weights out anew
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_a_group_is_one_product(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes: list[tuple[int, ...]] = []
    model = small_model(attention_bias=True, mlp_bias=True)
    linear = nn.functional.linear
    stock = model(IDS, use_cache=False).logits

    def watched(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        shapes.append(tuple(weight.shape))
        return linear(x, weight, bias)

    assert merge_projections(model) == 4 == merge_projections(model)  # a second time changes nothing
    monkeypatch.setattr(nn.functional, "linear", watched)
    monkeypatch.setattr("cpo_kernels.integrations.transformers.projections.linear", watched)
    with torch.no_grad():
        merged = model(IDS, use_cache=False).logits
    torch.testing.assert_close(merged, stock, rtol=1e-5, atol=1e-5)
    per_layer = [(64, 32), (32, 32), (128, 32), (32, 64)]  # 4 + 2 + 2 heads of 8; o; gate and up; down
    assert shapes == [*per_layer, *per_layer, tuple(model.lm_head.weight.shape)]


def test_weights_keep_names_values_gradients_and_files(tmp_path: Path) -> None:
    model, plain = small_model("qwen2"), small_model("qwen2")
    merge_projections(model)
    for name, value in plain.state_dict().items():
        assert torch.equal(model.state_dict()[name], value)
    assert list(model.state_dict()) == list(plain.state_dict())
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(saved[name], value) for name, value in plain.state_dict().items() if name in saved)
    assert sum(value.numel() for value in saved.values()) == sum(p.numel() for p in plain.parameters())
    for one in (model, plain):
        one(IDS, labels=IDS, use_cache=False).loss.backward()
    for (name, one), other in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert one.grad is not None, name
        assert torch.equal(one.grad, other.grad), name


@pytest.mark.parametrize("how", ["cast", "copy", "one weight"])
def test_weights_that_have_left_their_storage_are_still_the_ones_that_count(how: str) -> None:
    model, plain = small_model(), small_model()
    merge_projections(model)
    if how == "cast":
        model, plain = model.double(), plain.double()
    elif how == "copy":
        model = copy.deepcopy(model)
    for one in (model, plain):
        projection = one.model.layers[0].self_attn.v_proj
        with torch.no_grad():
            if how == "one weight":
                projection.weight = nn.Parameter(projection.weight * 2)
            else:
                projection.weight.mul_(2)
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, plain(IDS).logits, rtol=1e-5, atol=1e-5)


def test_outputs_are_handed_out_for_the_very_same_input_only() -> None:
    model, plain = small_model(), small_model()
    merge_projections(model)
    ours, theirs = model.model.layers[0].mlp, plain.model.layers[0].mlp
    x, y = torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(0)).unbind()
    with torch.no_grad():
        ours.gate_proj(x)
        torch.testing.assert_close(ours.up_proj(y), theirs.up_proj(y))
        torch.testing.assert_close(ours.up_proj(x), theirs.up_proj(x))
        torch.testing.assert_close(ours.up_proj(x), theirs.up_proj(x))


def test_a_copy_holds_no_weight_twice_and_layers_can_be_separated_again() -> None:
    model = small_model()
    expected = model(IDS).logits
    merge_projections(model)
    twin = copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})
    mine, its = (one.model.layers[0].self_attn.v_proj.group for one in (model, twin))
    assert mine is not its
    assert mine._weight is its._weight
    with torch.no_grad():
        twin.model.layers[0].self_attn.q_proj(IDS.new_zeros(1, 32).float())  # hands nothing to the other model
    assert mine._last is None
    assert separate_projections(twin) == 2 * 5
    assert not any(isinstance(module, MergedLinear) for module in twin.modules())
    assert torch.equal(twin(IDS).logits, expected)
    assert merge_projections(model) == 4


def _one_bias(layer: Any) -> None:
    layer.mlp.up_proj.bias = nn.Parameter(torch.zeros(64))


def _two_dtypes(layer: Any) -> None:
    layer.mlp.up_proj.double()


def _shared(layer: Any) -> None:
    layer.mlp.up_proj.weight = layer.mlp.gate_proj.weight


def _hooked(layer: Any) -> None:
    layer.mlp.up_proj.register_forward_hook(lambda *_: None)


def _other_class(layer: Any) -> None:
    layer.mlp.up_proj.__class__ = type("Quantised", (nn.Linear,), {})


@pytest.mark.parametrize("change", [_one_bias, _two_dtypes, _shared, _hooked, _other_class])
def test_layers_that_do_not_fit_together_are_left_as_they_are(change: Callable[[Any], None]) -> None:
    model = small_model()
    change(model.model.layers[0])
    assert merge_projections(model) == 3
    assert not isinstance(model.model.layers[0].mlp.gate_proj, MergedLinear)
    assert isinstance(model.model.layers[0].self_attn.q_proj, MergedLinear)


def test_outside_a_decode_forward_the_rotation_is_the_models_own() -> None:
    model = small_model()
    expected = model(IDS).logits
    assert defer_rotation(model)
    assert torch.equal(model(IDS).logits, expected)
    with deferred_rotation({4}):  # heads of 8 are a part of what attends
        assert torch.equal(model(IDS).logits, expected)
    with deferred_rotation({8}):
        assert not torch.equal(model(IDS).logits, expected)  # nobody rotated
    assert torch.equal(model(IDS).logits, expected)


def _interleaved(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, ...]:
    def turned(x: torch.Tensor) -> torch.Tensor:
        return torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)

    return tuple(x * cos.unsqueeze(1) + turned(x) * sin.unsqueeze(1) for x in (q, k))


def _keys_alone(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return q, modeling_llama.rotate_half(k) * sin.unsqueeze(1) + k * cos.unsqueeze(1)


@pytest.mark.parametrize("function", [_interleaved, _keys_alone, None, lambda q: q])
def test_a_rotation_that_the_op_does_not_compute_stays_with_the_model(
    monkeypatch: pytest.MonkeyPatch, function: Any
) -> None:
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", function)
    assert not fewer_kernels(small_model()).defers_rotation
    assert modeling_llama.apply_rotary_pos_emb is function


def test_keys_that_change_after_their_rotation_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    few_shot, prompts = forked_prompts(7, num_groups=1)
    engine = engine_of(small_model(), fewer=True)
    deferred = modeling_llama.apply_rotary_pos_emb

    def scaled(*args: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        q, k = deferred(*args)
        return q, k * 1.0

    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", scaled)
    with pytest.raises(RuntimeError, match="changes queries or keys after their rotation"):
        run_searches_of(engine, few_shot, prompts)


def test_parts_of_a_model_that_was_not_changed_defer_nothing() -> None:
    assert not model_parts(small_model()).defers_rotation
