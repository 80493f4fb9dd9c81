"""How many kernels a layer launches in a training step: forward, and recomputed and differentiated in backward.

A bfloat16 model of Llama-2-7B's shape with float32 adapters on all seven linear layers, on the meta device. Attention,
norms, rotation, MLP and adapters go by the Triton kernels. Small changes of torch or transformers move the totals. Who
makes the step cheaper lowers them.
"""

from collections import Counter
from functools import cache
from importlib import import_module
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig

from cpo_kernels.device import to_device
from cpo_kernels.forest import build_forest
from cpo_kernels.integrations.lora import fuse_lora, keep_input_dtype
from cpo_kernels.integrations.transformers.fused import fuse_layers
from cpo_kernels.integrations.transformers.hook import IMPLEMENTATION, register
from cpo_kernels.integrations.transformers.model import model_parts
from cpo_kernels.integrations.transformers.packed import forest_forward
from tests.kernel_nodes import kernel_nodes
from tests.tiny import ALL_LINEAR

META = torch.device("meta")
FEWER = (fuse_layers, fuse_lora)


@cache
def launches(num_layers: int, changes: tuple[Any, ...] = FEWER, checkpointing: bool = True) -> Counter[str]:
    """The kernels of forward and backward over one forest, by name."""
    register()
    with META:
        config = LlamaConfig(num_hidden_layers=num_layers, use_cache=False)
        base: Any = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=torch.bfloat16)
        adapter = LoraConfig(r=8, target_modules=list(ALL_LINEAR), task_type="CAUSAL_LM")
        model: Any = get_peft_model(base, adapter, autocast_adapter_dtype=True)
    base.set_attn_implementation(IMPLEMENTATION)
    keep_input_dtype(model)
    if checkpointing:
        base.gradient_checkpointing_enable({"use_reentrant": False})
    forest = build_forest([[5, *range(6, 60)], [5, *range(100, 180)]])
    forest, schedule = to_device((forest, forest.schedule()), META)
    with pytest.MonkeyPatch.context() as patch:
        # the meta device stands for a GPU
        patch.setattr(torch, "is_autocast_enabled", lambda *_: False)
        # DeepSpeed leaves its own there once a process has had ZeRO 3: recomputation then ends a product later
        patch.setattr(torch.nn.functional, "linear", torch._C._nn.linear)
        for op in ("fused_layers", "tree_attention"):
            patch.setattr(
                import_module(f"cpo_kernels.{op}"), "available_implementations", lambda _: ("eager", "triton")
            )
        for change in changes:
            assert change(model.train(), "triton") > 0
        with kernel_nodes() as found:
            hidden = forest_forward(model_parts(model), forest, schedule, "triton").last_hidden_state
            hidden.sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    return found


def of_a_layer(*arguments: Any) -> Counter[str]:
    return launches(2, *arguments) - launches(1, *arguments)


def test_a_recomputed_layer_launches_no_more_kernels_than_it_did() -> None:
    layer = of_a_layer()
    assert layer.total() <= 109, layer
    forward_and_backward = {"_reduce_columns": 3, "_expand_columns": 3, "_sum_rows": 2}  # of each adapted layer
    assert {name: layer[f"triton {name}"] / 7 for name in forward_and_backward} == forward_and_backward
    assert layer["mm"] == 3 * 7  # of the base's weights: forward, again, and for the input's gradient


def test_without_checkpointing_a_layer_launches_fewer() -> None:
    assert of_a_layer(FEWER, False).total() <= 82, of_a_layer(FEWER, False)


def test_the_counter_counts_what_an_unchanged_model_launches() -> None:
    layer = of_a_layer(())
    assert layer.total() == 287, layer


@pytest.mark.parametrize(("change", "kept"), [(fuse_layers, "fuse_lora"), (fuse_lora, "fuse_layers")])
def test_each_change_lowers_the_count(change: Any, kept: str) -> None:
    assert of_a_layer(FEWER).total() < of_a_layer((change,)).total() < of_a_layer(()).total(), kept
