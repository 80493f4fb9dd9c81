"""How many kernels a decode step of a model of 32 layers launches, which is how many nodes its CUDA graph has.

A model of Llama-2-7B's shape on the meta device, its attention by the Triton kernels. Small changes of torch or
transformers move the totals. Who makes the step cheaper lowers them.
"""

from collections import Counter
from functools import cache
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig

from cpo_fast.search.engine.cuda_graph_batch import DecodeStep
from cpo_fast.search.engine.forward_plans import ModelRunner, decode_plan
from cpo_fast.search.engine.kv_arena import KVArena
from cpo_fast.search.engine.requests import SampleRequest
from cpo_fast.search.engine.sampler import BatchSampler
from cpo_kernels import fused_layers, sample_tokens
from cpo_kernels.integrations.lora import fuse_lora
from cpo_kernels.integrations.transformers import prepare
from cpo_kernels.integrations.transformers.decode import arena_shapes, fewer_kernels
from cpo_kernels.integrations.transformers.fused import fuse_layers
from cpo_kernels.integrations.transformers.hook import IMPLEMENTATION, register
from cpo_kernels.integrations.transformers.layer_windows import KVShape, LayerAttention
from cpo_kernels.integrations.transformers.model import model_parts
from cpo_kernels.integrations.transformers.proof import keep_proof
from tests.kernel_nodes import kernel_nodes

META = torch.device("meta")
NUM_ROWS = 16
SAMPLER = ("triton _block_maxima", "triton _block_masses", "triton _choose")


@cache
def nodes(num_layers: int, fewer: bool = True, lora: bool = False, **sampling: Any) -> Counter[str]:
    """The kernels of one step, by name."""
    register()
    with META:
        config = LlamaConfig(num_hidden_layers=num_layers)
        model: Any = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=torch.bfloat16)
        model.set_attn_implementation(IMPLEMENTATION)
        if lora:
            model = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear"))
    parts = fewer_kernels(model.eval()) if fewer else model_parts(model.eval())
    keep_proof(parts, prepare, LayerAttention(shapes=[KVShape(32, 128, 128)] * num_layers))
    arena = KVArena(arena_shapes(parts), 256, torch.bfloat16, META)
    plan, _ = decode_plan([()] * NUM_ROWS, range(NUM_ROWS), [1] * NUM_ROWS, 0, arena.padding_slot)
    values: dict[str, Any] = {"temperature": 0.9, "top_p": 0.9, "max_new_tokens": 8, **sampling}
    requests = [SampleRequest((1, 2), str(row), **values) for row in range(NUM_ROWS)]
    sampler = BatchSampler.build(requests, [()] * NUM_ROWS, NUM_ROWS, config.vocab_size, torch.device("cpu"))
    step = DecodeStep(ModelRunner(parts, arena, "triton"), plan.padded(16, 16), sampler)
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        # the meta device stands for a GPU
        for op in (fused_layers, sample_tokens):
            patch.setattr(op, "available_implementations", lambda _: ("eager", "triton"))
        patch.setattr(torch, "is_autocast_enabled", lambda _: False)  # torch knows no autocast of the meta device
        if fewer:
            fuse_layers(model, "triton")
            if lora:
                fuse_lora(model, "triton")
        with kernel_nodes() as found:
            step.run()
    return found


def test_a_layer_launches_twelve_kernels() -> None:
    layer = nodes(2) - nodes(1)
    launches = ("_rotate_store_kernel", "_partial_kernel", "_merge_kernel", "_swiglu_forward")
    expected = {"mm": 4, "add": 2, "triton _norm_forward": 2} | {f"triton {name}": 1 for name in launches}
    assert dict(layer) == expected  # products: q, k and v; o; gate and up; down


def test_a_live_adapter_adds_two_kernels_for_each_linear_layer() -> None:
    layer = nodes(2, lora=True) - nodes(1, lora=True)
    assert layer.total() <= 12 + 7 * 2, layer


def test_the_counter_counts_what_an_unchanged_model_launches() -> None:
    """37 operators and three launches a layer: what the audit of the step found."""
    layer = nodes(2, fewer=False) - nodes(1, fewer=False)
    assert layer.total() == 40, layer


@pytest.mark.parametrize(
    ("sampling", "num_kernels"),
    [
        ({}, 3),
        ({"top_p": 1.0}, 3),
        ({"temperature": 0.0}, 3),
        ({"top_k": 50, "repetition_penalty": 1.2}, 3),
    ],
    ids=str,
)
def test_what_is_no_layer_is_the_same_few_kernels_for_every_sampling(
    sampling: dict[str, Any], num_kernels: int
) -> None:
    found = nodes(1, **sampling) - (nodes(2, **sampling) - nodes(1, **sampling))
    assert sum(count for name, count in found.items() if name in SAMPLER) == num_kernels
    assert found.total() <= 25, found


def test_a_step_of_32_layers_is_below_the_bar() -> None:
    assert nodes(32).total() <= 409
    assert nodes(32, lora=True).total() <= 857
