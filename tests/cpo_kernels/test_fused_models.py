"""Claims about `fuse_layers`: which modules it takes, that their numbers stay, that a CPU's model is not touched."""

import copy
from types import FunctionType
from typing import Any

import pytest
import torch
from transformers import (
    GemmaConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from cpo_kernels.integrations.transformers.fused import fuse_layers, unfuse_layers
from tests.cpo_kernels.kernel_device import DEVICE, not_interpreted, runs_kernels
from tests.tiny import tiny_llama, tiny_model, with_lora

IDS = torch.tensor([[5, 6, 7, 8, 9, 10, 11], [12, 5, 20, 21, 22, 23, 24]])
# two layers with two norms, an MLP and an attention module each, and the last norm; Qwen3 normalises queries and keys too
FUSED = {LlamaConfig: 9, MistralConfig: 9, Qwen2Config: 9, SmolLM3Config: 9, GraniteConfig: 9, Qwen3Config: 13}
# Gemma's norms add one to the weight and its MLP is gelu; Olmo2's norms multiply before they round, its rotation is another
LEFT = {GemmaConfig: 2, Olmo2Config: 2}


def outputs(model: Any, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """Logits, and the gradient of every parameter that has one."""
    model.zero_grad()
    logits = model(IDS.to(DEVICE)).logits
    upstream = torch.randn(logits.shape, generator=torch.Generator().manual_seed(3)).to(DEVICE, dtype)
    logits.backward(upstream)
    return [logits.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def relative_errors(found: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    pairs = zip(found, expected, strict=True)
    return max(float((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-30)) for a, b in pairs)


def bitwise(found: list[torch.Tensor], expected: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@runs_kernels
@pytest.mark.parametrize(
    ("config", "count"), list((FUSED | LEFT).items()), ids=lambda value: getattr(value, "__name__", "")
)
def test_norms_and_mlps_that_repeat_llamas_are_fused_and_no_others(config: type, count: int) -> None:
    model = tiny_model(config, dtype=torch.float32).to(DEVICE)
    names, expected = list(model.state_dict()), outputs(model)
    assert fuse_layers(model, "triton") == count
    assert fuse_layers(model, "triton") == count  # again changes nothing
    found = outputs(model)
    assert relative_errors(found, expected) <= 1e-5
    assert list(model.state_dict()) == names
    assert config is GemmaConfig or not bitwise(found, expected)  # what rotates alone has the same bits here
    assert unfuse_layers(model) == count
    assert bitwise(outputs(model), expected)


@runs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_lora_and_recomputed_layers_keep_their_gradients(dtype: torch.dtype) -> None:
    model = with_lora(tiny_llama(dtype=dtype)).to(DEVICE).train()
    expected = outputs(model, dtype)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert fuse_layers(model, "triton") == 9
    found = outputs(model, dtype)
    assert len(found) == 1 + 2 * 2 * 7
    assert relative_errors(found, expected) <= (1e-5 if dtype == torch.float32 else 2e-2)


@runs_kernels
def test_weights_that_hooks_of_the_modules_bring_are_read_when_they_are_there() -> None:
    """As ZeRO 3 does it: a parameter holds nothing but from the hook before a module to the one after it."""
    model = with_lora(tiny_llama()).to(DEVICE)
    expected = outputs(model)
    fuse_layers(model, "triton")
    whole: dict[torch.nn.Parameter, torch.Tensor] = {}

    def gather(module: torch.nn.Module, *_: Any) -> None:
        for parameter in module.parameters(recurse=False):
            parameter.data = whole[parameter]

    def release(module: torch.nn.Module, *_: Any) -> None:
        for parameter in module.parameters(recurse=False):
            parameter.data = torch.empty(0, device=DEVICE)

    for module in model.modules():
        parameters = list(module.parameters(recurse=False))
        if parameters and not any(parameter.requires_grad for parameter in parameters):
            whole |= {parameter: parameter.data for parameter in parameters}
            release(module)
            module.register_forward_pre_hook(gather)
            module.register_forward_hook(release)
            module.register_full_backward_pre_hook(gather)
            module.register_full_backward_hook(release)
    assert relative_errors(outputs(model), expected) <= 1e-5


@runs_kernels
def test_a_copy_reads_its_own_weights() -> None:
    model = tiny_llama().to(DEVICE)
    fuse_layers(model, "triton")
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.model.norm.weight.mul_(2)
    assert torch.allclose(other(IDS.to(DEVICE)).logits, 2 * model(IDS.to(DEVICE)).logits)


@runs_kernels
def test_a_replaced_forward_and_a_subclass_with_another_are_left() -> None:
    class Shifted(LlamaRMSNorm):
        def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
            return super().forward(hidden_states) + 1

    model = tiny_llama().to(DEVICE)
    model.model.norm.__class__ = Shifted
    mlp = model.model.layers[0].mlp
    mlp.forward = lambda x: x
    model.model.layers[1].mlp.act_fn = torch.nn.ReLU()
    assert fuse_layers(model, "triton") == 6
    assert unfuse_layers(model) == 6
    assert "forward" in vars(mlp)


@runs_kernels
@pytest.mark.parametrize(("part", "old", "new"), [("co_consts", 2, 4), ("co_names", "mean", "sum")])
def test_a_forward_that_differs_in_a_number_or_a_name_alone_is_left(part: str, old: Any, new: Any) -> None:
    stock = LlamaRMSNorm.forward
    code = stock.__code__.replace(
        **{part: tuple(new if value == old else value for value in getattr(stock.__code__, part))}
    )
    other = type("Other", (LlamaRMSNorm,), {"forward": FunctionType(code, stock.__globals__)})
    model = tiny_llama().to(DEVICE)
    model.model.norm.__class__ = other
    assert fuse_layers(model, "triton") == 8


@not_interpreted
def test_a_models_modules_on_a_cpu_are_not_touched() -> None:
    model = tiny_llama()
    assert [fuse_layers(model, impl) for impl in (None, "eager", "reference")] == [0, 0, 0]
    assert not any("forward" in vars(module) for module in model.modules())
    with pytest.raises(ValueError, match="fused_layers: impl='triton' cannot run on cpu"):
        fuse_layers(model, "triton")
    with pytest.raises(TypeError):
        fuse_layers(torch.nn.Linear(2, 2))
