"""LoRA layers that keep their input as it came: bitwise PEFT's numbers, less memory, nothing else changed."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch.autograd.graph import saved_tensors_hooks

from cpo_kernels.integrations.lora import RecastLinear, keep_input_dtype
from cpo_kernels.integrations.transformers import packed_logps, prepare
from tests.tiny import ALL_LINEAR, randomize_lora, tiny_llama

SEQUENCES = [[5, 6, 7, 8, 9, 10], [5, 6, 7, 20, 21], [5, 6, 7, 8, 30]]
STARTS = [3, 3, 4]


def adapted(dtype: torch.dtype, second: bool = False, **options: Any) -> PeftModel:
    config = LoraConfig(r=4, lora_alpha=8, target_modules=list(ALL_LINEAR), task_type="CAUSAL_LM", **options)
    torch.manual_seed(0)
    model = get_peft_model(tiny_llama(dtype=dtype), config, autocast_adapter_dtype=True)
    if second:
        model.add_adapter("second", config)
    randomize_lora(model)
    return model.train()


def step(model: PeftModel, changed: bool, **options: Any) -> list[torch.Tensor]:
    """Log-probs of policy and reference, and the gradient of every trained parameter."""
    if changed:
        assert keep_input_dtype(model) == 2 * len(ALL_LINEAR)
    prepare(model)
    model.zero_grad()
    out = packed_logps(model, SEQUENCES, STARTS, **({"reference": "adapter_off"} | options))
    (out.segment_logps * torch.tensor([1.0, -2.0, 0.5])).sum().backward()
    gradients = [p.grad for _, p in sorted(model.named_parameters(), key=lambda item: item[0]) if p.grad is not None]
    assert out.ref_segment_logps is not None
    assert len(gradients) == 2 * 2 * len(ALL_LINEAR)
    return [out.segment_logps.detach(), out.ref_segment_logps, *gradients]


def bitwise(left: list[torch.Tensor], right: list[torch.Tensor]) -> bool:
    return len(left) == len(right) and all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_loss_and_every_gradient_are_bitwise_those_of_peft(dtype: torch.dtype) -> None:
    expected = step(adapted(dtype), changed=False)
    assert bitwise(step(adapted(dtype), changed=True), expected)
    assert expected[2].dtype == torch.float32


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_keeps_the_bits(reentrant: bool) -> None:
    results = []
    for changed in (False, True):
        model = adapted(torch.bfloat16)
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
        results.append(step(model, changed))
    assert bitwise(*results)


def test_a_second_adapter_as_reference_keeps_the_bits() -> None:
    results = [step(adapted(torch.bfloat16, second=True), changed, reference="second") for changed in (False, True)]
    assert bitwise(*results)
    assert not torch.equal(results[0][0], results[0][1])


def test_merging_and_saving_do_not_notice(tmp_path: Path) -> None:
    plain, changed = adapted(torch.bfloat16), adapted(torch.bfloat16)
    keep_input_dtype(changed)
    for name, model in (("plain", plain), ("changed", changed)):
        model.save_pretrained(tmp_path / name)
    assert [name for name, _ in plain.named_parameters()] == [name for name, _ in changed.named_parameters()]
    one, two = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("plain", "changed"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)
    ids = torch.tensor([SEQUENCES[0]])
    merged = [model.merge_and_unload()(ids).logits for model in (plain, changed)]
    assert torch.equal(*merged)


def kept_bytes_per_token(model: PeftModel, num_tokens: int) -> float:
    """What the three attention adapters of one layer keep of their common input and their A's output."""
    attention = model.get_base_model().model.layers[0].self_attn
    hidden = torch.randn(1, num_tokens, 32).to(torch.bfloat16).requires_grad_()
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    seen: dict[int, int] = {}
    alive = []  # an address may be used again once its tensor is gone

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            seen[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = [projection(hidden) for projection in (attention.q_proj, attention.k_proj, attention.v_proj)]
    assert len(outputs) == 3
    return sum(seen.values()) / num_tokens


def test_one_16_bit_input_is_kept_where_peft_keeps_three_float32_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    # DeepSpeed's ZeRO 3, once started in a process, replaces this function by one that keeps every input
    monkeypatch.setattr(torch.nn.functional, "linear", torch._C._nn.linear)
    model = adapted(torch.bfloat16)
    rank_outputs = 3 * 4 * 4  # float32 [T, r] of each A
    assert kept_bytes_per_token(model, 64) == 3 * 4 * 32 + rank_outputs
    keep_input_dtype(model)
    assert kept_bytes_per_token(model, 64) == 2 * 32 + rank_outputs


def test_dora_and_dropout_layers_are_left_to_peft() -> None:
    for options in ({"use_dora": True}, {"lora_dropout": 0.1}):
        model = adapted(torch.bfloat16, **options)
        assert keep_input_dtype(model) == 0
        assert not any(isinstance(module, RecastLinear) for module in model.modules())
        model(torch.tensor([SEQUENCES[0]]))


def test_an_adapter_added_later_needs_and_takes_another_call() -> None:
    model = adapted(torch.bfloat16)
    keep_input_dtype(model)
    config = LoraConfig(r=2, target_modules=list(ALL_LINEAR), task_type="CAUSAL_LM")
    model.add_adapter("later", config)
    model.set_adapter("later")
    with pytest.raises(RuntimeError, match="dtype"):
        model(torch.tensor([SEQUENCES[0]]))
    keep_input_dtype(model)
    model(torch.tensor([SEQUENCES[0]]))
