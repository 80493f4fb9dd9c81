"""prepare: supported models pass its probe and still generate, the others are refused by a sentence that names why."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import PromptTuningConfig, get_peft_model
from torch import nn
from transformers import (
    Gemma2Config,
    GemmaConfig,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from cpo_kernels.implementation import Implementations
from cpo_kernels.integrations.transformers import packed_logps, prepare
from cpo_kernels.kernel_check import KernelCheckError
from tests.cpo_kernels.padded_oracle import padded_step, pair_sequences, relative_error
from tests.tiny import random_pairs, tiny_llama, tiny_mistral, tiny_model, with_lora

ROWS = [list(range(3, 23)), [*range(3, 13), *range(40, 50)]]  # two paths of 20 tokens, shared to the tenth
STARTS = [10, 10]

SUPPORTED: dict[str, tuple[type, dict[str, Any]]] = {
    "llama": (LlamaConfig, {}),
    "mistral": (MistralConfig, {"sliding_window": None}),
    "qwen2": (Qwen2Config, {}),
    "qwen3": (Qwen3Config, {"head_dim": 8}),
    "gemma": (GemmaConfig, {"head_dim": 8}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", SUPPORTED)
def test_supported_model_passes_the_probe(name: str, dtype: torch.dtype) -> None:
    config_class, changes = SUPPORTED[name]
    model = tiny_model(config_class, dtype=dtype, **changes)
    assert prepare(model) is model
    assert model.config._attn_implementation == "cpo_tree"


@pytest.mark.parametrize("name", SUPPORTED)
def test_supported_model_equals_padded(name: str) -> None:
    config_class, changes = SUPPORTED[name]
    pairs = random_pairs(seed=1)
    want = padded_step(with_lora(tiny_model(config_class, **changes)), pairs)
    packed = packed_logps(
        prepare(with_lora(tiny_model(config_class, **changes))), *pair_sequences(pairs), reference="adapter_off"
    )
    assert relative_error(packed.segment_logps.detach(), want.logps) <= 1e-5
    assert relative_error(packed.ref_segment_logps, want.ref_logps) <= 1e-5


def test_what_a_models_own_code_raises_names_the_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(error: Exception) -> Callable[..., Any]:
        def forward(*_args: Any, **_kwargs: Any) -> Any:
            raise error

        return forward

    model = tiny_llama()
    mlp = model.model.layers[0].mlp
    for error in (
        RuntimeError("shapes\nof tensors"),
        IndexError("5 of 2"),
        TypeError("an argument"),
        ValueError("odd"),
    ):
        monkeypatch.setattr(mlp, "forward", failing(error))
        words = f"^LlamaForCausalLM .* a forward of two tokens ended in {type(error).__name__}: {str(error).split()[0]}"
        with pytest.raises(ValueError, match=words) as caught:
            prepare(model)
        assert caught.value.__cause__ is error
        assert "of tensors" not in str(caught.value)
    for error in (torch.OutOfMemoryError("full"), MemoryError(), KernelCheckError("wrong"), ImportError("no flash")):
        monkeypatch.setattr(mlp, "forward", failing(error))
        with pytest.raises(type(error)):
            prepare(model)
    assert model.config._attn_implementation == "sdpa"


def test_streams_between_layers_are_compared_where_their_tokens_are() -> None:
    class Streams(nn.Module):  # hidden states [2, 1, T, E] between layers, as AltUp has them, or [1, T, 2, E]
        def __init__(self, layer: nn.Module, place: int, last: bool) -> None:
            super().__init__()
            self.layer, self.place, self.last = layer, place, last

        def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
            one = hidden_states if hidden_states.dim() == 3 else hidden_states.select(self.place, 1)
            one = self.layer(one, **kwargs)
            return one if self.last else torch.stack([0 * one, one], dim=self.place)

    for place in (0, 2):
        model = tiny_llama()
        layers = model.model.layers
        for index, layer in enumerate(list(layers)):
            layers[index] = Streams(layer, place, index == len(layers) - 1)
        want = prepare(tiny_llama())
        actual, expected = (packed_logps(each, ROWS, STARTS).segment_logps for each in (prepare(model), want))
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_prepare_leaves_training_mode_gradients_and_random_state_as_they_were() -> None:
    model = with_lora(tiny_llama()).train()
    model.base_model.model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    requires_grad = [parameter.requires_grad for parameter in model.parameters()]
    random_state = torch.get_rng_state()
    prepare(model)
    assert [module.training for module in model.modules()] == modes
    assert [parameter.requires_grad for parameter in model.parameters()] == requires_grad
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), random_state)
    prepare(model)  # a second call changes nothing
    assert [module.training for module in model.modules()] == modes


# families without `sdpa`, whose prepared models must still do to scores what their own attention does
EAGER: dict[str, tuple[type, dict[str, Any]]] = {
    "gemma2": (Gemma2Config, {"head_dim": 8, "attn_logit_softcapping": 0.5, "sliding_window": 6}),
    "gpt-oss": (GptOssConfig, {"head_dim": 8, "num_local_experts": 2, "num_experts_per_tok": 1, "sliding_window": 6}),
}


@pytest.mark.parametrize("name", SUPPORTED | EAGER)
def test_left_padded_generation_equals_the_stock_model(name: str) -> None:
    config_class, changes = (SUPPORTED | EAGER)[name]
    stock = tiny_model(config_class, attention="eager" if name in EAGER else "sdpa", **changes)
    prepared = prepare(copy.deepcopy(stock))
    generator = torch.Generator().manual_seed(3)
    input_ids = torch.randint(3, 97, (3, 9), generator=generator)
    attention_mask = torch.ones_like(input_ids)
    for row, padding in enumerate((0, 3, 7)):
        input_ids[row, :padding], attention_mask[row, :padding] = 0, 0
    options = {
        "attention_mask": attention_mask, "max_new_tokens": 12, "do_sample": False, "eos_token_id": None,
        "return_dict_in_generate": True, "output_logits": True,
    }  # fmt: skip
    want, got = stock.generate(input_ids, **options), prepared.generate(input_ids, **options)
    assert torch.equal(got.sequences, want.sequences)
    torch.testing.assert_close(torch.stack(got.logits), torch.stack(want.logits), rtol=1e-5, atol=1e-5)
    # The mask matters here: without it the padded rows would continue differently.
    unmasked = prepared.generate(input_ids, **(options | {"attention_mask": torch.ones_like(input_ids)}))
    assert not torch.allclose(torch.stack(unmasked.logits)[:, 2], torch.stack(want.logits)[:, 2], rtol=1e-3, atol=1e-3)


def test_right_padded_forward_equals_sdpa() -> None:
    stock = tiny_llama()
    prepared = prepare(copy.deepcopy(stock))
    input_ids = torch.randint(3, 97, (2, 11), generator=torch.Generator().manual_seed(4))
    attention_mask = torch.ones_like(input_ids)
    attention_mask[1, 6:] = 0
    for mask in (attention_mask, None):
        want, got = stock(input_ids, attention_mask=mask).logits, prepared(input_ids, attention_mask=mask).logits
        kept = torch.ones_like(attention_mask, dtype=torch.bool) if mask is None else attention_mask.bool()
        torch.testing.assert_close(got[kept], want[kept], rtol=1e-6, atol=1e-6)


def test_a_prepared_model_is_compiled_as_one_graph() -> None:
    for model in (tiny_llama(), tiny_mistral(sliding_window=4)):
        prepare(model)
        input_ids = torch.randint(3, 97, (2, 9), generator=torch.Generator().manual_seed(5))
        mask = torch.ones_like(input_ids)
        mask[0, :3] = 0
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        want, got = (one(input_ids, attention_mask=mask).logits for one in (model, compiled))
        assert torch.equal(got, want)


def score(model: nn.Module) -> None:
    """Prepare and score: some refusals need the model alone, some the rows."""
    packed_logps(prepare(model), ROWS, STARTS)


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "adapter on the head": (
        lambda: with_lora(tiny_llama(), targets=("q_proj", "lm_head"), zero_b=True),
        "(?i)head",
    ),
    "attention dropout": (lambda: tiny_llama(attention_dropout=0.1).train(), "(?i)attention.?dropout"),
    "LoRA dropout in training": (lambda: with_lora(tiny_llama(), dropout=0.1).train(), "(?i)lora.?dropout"),
    "prompt learning": (
        lambda: get_peft_model(tiny_llama(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)),
        "(?i)prompt",
    ),
}  # fmt: skip


@pytest.mark.parametrize("reason", REFUSED)
def test_unsupported_model_is_refused_by_name(reason: str) -> None:
    build, words = REFUSED[reason]
    with pytest.raises(ValueError, match=words):
        score(build())


def test_probe_refuses_a_head_transform_that_no_configuration_names() -> None:
    """The head is a plain linear layer, but the model's logits are half as large again."""
    model = tiny_llama()
    model.lm_head.register_forward_hook(lambda _module, _inputs, logits: 1.5 * logits)
    with pytest.raises(ValueError, match=r"(?i)head.*logits|logits.*head"):
        prepare(model)
    assert model.config._attn_implementation == "sdpa"


def test_probe_names_the_first_layer_that_differs() -> None:
    """Layer 1 (from 0) looks at the batch as a whole, which a forest cannot be split into."""
    model = tiny_llama()

    def mix_rows(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        hidden = output[0] if isinstance(output, tuple) else output
        mixed = hidden + hidden.mean(dim=1, keepdim=True)
        return (mixed, *output[1:]) if isinstance(output, tuple) else mixed

    model.model.layers[1].register_forward_hook(mix_rows)
    with pytest.raises(ValueError, match=r"(?i)layer 1\b"):
        prepare(model)
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("wrong", [False, True])
def test_depth_does_not_refuse_a_right_model_nor_hide_a_wrong_layer(wrong: bool) -> None:
    """Weights this large amplify rounding: over 32 layers of bfloat16 the hidden states differ by 0.066 in the end."""
    model = tiny_llama(
        hidden_size=256, intermediate_size=1024, num_hidden_layers=32, num_attention_heads=4, num_key_value_heads=4,
        head_dim=64, initializer_range=0.1,
    ).to(torch.bfloat16)  # fmt: skip
    if not wrong:
        prepare(model)
        return
    attention = model.model.layers[30].self_attn
    before = type(attention).forward

    def other_scale(self: Any, *args: Any, **kwargs: Any) -> Any:
        self.scaling = before_scale * (4.0 if "subtree_end" in kwargs else 1.0)
        return before(self, *args, **kwargs)

    before_scale, attention.forward = attention.scaling, other_scale.__get__(attention)
    with pytest.raises(ValueError, match=r"decoder layer 30 differs"):
        prepare(model)


def test_dropout_of_an_adapter_is_accepted_in_evaluation_mode() -> None:
    model = with_lora(tiny_llama(), dropout=0.1).eval()
    packed = packed_logps(prepare(model), ROWS, STARTS)
    want = packed_logps(prepare(with_lora(tiny_llama())), ROWS, STARTS)
    assert torch.equal(packed.segment_logps, want.segment_logps)


def test_window_that_no_path_outgrows_is_accepted_and_exact() -> None:
    want = packed_logps(prepare(tiny_mistral()), ROWS, STARTS)
    for window in (20, 4096):
        packed = packed_logps(prepare(tiny_mistral(sliding_window=window)), ROWS, STARTS)
        torch.testing.assert_close(packed.segment_logps, want.segment_logps, rtol=1e-6, atol=1e-6)
    shorter = packed_logps(prepare(tiny_mistral(sliding_window=8)), ROWS, STARTS)
    assert not torch.allclose(shorter.segment_logps, want.segment_logps, rtol=1e-5)


def test_frozen_reference_is_held_to_the_same_rules() -> None:
    policy = prepare(tiny_mistral())
    windowed = prepare(tiny_mistral(seed=3, sliding_window=8))
    alone, beside = packed_logps(windowed, ROWS, STARTS), packed_logps(policy, ROWS, STARTS, reference=windowed)
    torch.testing.assert_close(beside.ref_segment_logps, alone.segment_logps.detach())
    with pytest.raises(ValueError, match=r"(?i)dropout"):
        packed_logps(policy, ROWS, STARTS, reference=prepare(tiny_mistral(seed=3, attention_dropout=0.1)).train())
    with pytest.raises(ValueError, match="prepare"):
        packed_logps(policy, ROWS, STARTS, reference=tiny_mistral(seed=3))


def test_wrapper_is_a_type_error() -> None:
    is_own = not torch.distributed.is_initialized()  # a training of this process keeps its group
    if is_own:
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(prepare(with_lora(tiny_llama())))
        for call in (prepare, lambda model: packed_logps(model, ROWS, STARTS)):
            with pytest.raises(TypeError, match="DistributedDataParallel"):
                call(wrapped)
    finally:
        if is_own:
            torch.distributed.destroy_process_group()


def test_unprepared_model_is_refused() -> None:
    with pytest.raises(ValueError, match="prepare"):
        packed_logps(tiny_llama(), ROWS, STARTS)


def test_forward_with_the_hook_taken_away_is_refused() -> None:
    model = prepare(tiny_llama())
    model.set_attn_implementation("sdpa")
    with pytest.raises((ValueError, RuntimeError), match="prepare"):
        packed_logps(model, ROWS, STARTS)


def test_environment_overrides_the_choice_and_an_argument_overrides_both(monkeypatch: pytest.MonkeyPatch) -> None:
    """In fp32 the two implementations round differently, so equality tells which one ran."""
    model, (sequences, starts) = prepare(tiny_llama()), pair_sequences(random_pairs(seed=2))
    dense, eager = (packed_logps(model, sequences, starts, impl=impl).segment_logps for impl in ("reference", "eager"))
    assert not torch.equal(dense, eager)
    monkeypatch.setenv("CPO_KERNELS_IMPL", "reference")
    assert torch.equal(packed_logps(model, sequences, starts).segment_logps, dense)
    assert torch.equal(packed_logps(model, sequences, starts, impl="eager").segment_logps, eager)


def test_temperature_divides_the_logits_of_policy_and_reference() -> None:
    cooled, model = prepare(with_lora(tiny_llama())), prepare(with_lora(tiny_llama()))
    with torch.no_grad():
        cooled.get_output_embeddings().weight /= 0.5
    want = packed_logps(cooled, ROWS, STARTS, "adapter_off")
    packed = packed_logps(model, ROWS, STARTS, "adapter_off", temperature=0.5)
    torch.testing.assert_close(packed.segment_logps, want.segment_logps)
    torch.testing.assert_close(packed.ref_segment_logps, want.ref_segment_logps)
    assert not torch.allclose(packed.segment_logps, packed_logps(model, ROWS, STARTS).segment_logps, rtol=1e-2)


@pytest.mark.parametrize("op", ["tree_attention", "linear_logprob"])
def test_each_op_can_be_told_its_own_implementation(op: str) -> None:
    """A name that no op has is refused by the op that was told it."""
    model = prepare(tiny_llama())
    told = Implementations(**{"tree_attention": "reference", "linear_logprob": "eager"} | {op: "nothing"})
    with pytest.raises(ValueError, match=f"^{op}: impl='nothing' cannot run"):
        packed_logps(model, ROWS, STARTS, impl=told)
