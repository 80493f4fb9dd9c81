"""A decode step by the kernels that a GPU runs: common products, fused layers, rotation as keys are stored.

`tests/search/test_fewer_kernels.py` shows the changes of the model one by one, in plain torch.
"""

import copy
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, Qwen3Config

from cpo_kernels.integrations.transformers import prepare
from cpo_kernels.integrations.transformers.decode import decode_forward, fewer_kernels, next_logits
from cpo_kernels.integrations.transformers.fused import fuse_layers
from cpo_kernels.integrations.transformers.model import kv_shape, model_parts
from cpo_kernels.tree_decode import DecodePlan
from tests.cpo_kernels.kernel_device import DEVICE, runs_kernels
from tests.tiny import VOCAB_SIZE, tiny_model, with_lora

NUM_SHARED, NUM_ROWS, NUM_STEPS = 19, 4, 2


def logits_of(model: Any, parts: Any, impl: str) -> torch.Tensor:
    """Logits of two steps of rows below a node that one forward has computed before, [NUM_STEPS, NUM_ROWS, V]."""
    num_layers, (num_kv_heads, head_dim) = parts.config.num_hidden_layers, kv_shape(parts.config)
    num_slots = NUM_SHARED + NUM_ROWS * NUM_STEPS
    arena = torch.full((num_layers, 2, num_slots, num_kv_heads, head_dim), float("nan"), device=DEVICE)
    layers = [(layer[0], layer[1]) for layer in arena]
    shared = torch.arange(NUM_SHARED) * 7919 % VOCAB_SIZE
    nothing = [0] * NUM_SHARED
    plan = DecodePlan.build(range(NUM_SHARED), [(0, NUM_SHARED, 0, NUM_SHARED, 1)], nothing, nothing)
    decode_forward(parts, shared.to(DEVICE), torch.arange(NUM_SHARED).to(DEVICE), plan.to(DEVICE), layers, impl=impl)
    found = []
    for step in range(NUM_STEPS):
        starts = [NUM_SHARED + NUM_STEPS * row for row in range(NUM_ROWS)]
        items = [(0, NUM_ROWS, 0, NUM_SHARED, NUM_SHARED)]
        plan = DecodePlan.build([start + step for start in starts], items, starts, [step + 1] * NUM_ROWS)
        ids = torch.arange(NUM_ROWS) * 13 + 31 * step
        positions = torch.full((NUM_ROWS,), NUM_SHARED + step)
        hidden = decode_forward(parts, ids.to(DEVICE), positions.to(DEVICE), plan.to(DEVICE), layers, impl=impl)
        found.append(next_logits(parts, hidden))
    return torch.stack(found)


@runs_kernels
@pytest.mark.parametrize("lora", [False, True], ids=["base", "lora"])
@pytest.mark.parametrize("config", [LlamaConfig, Qwen3Config])
def test_a_changed_model_gives_the_logits_of_the_stock_one(config: type, lora: bool) -> None:
    stock = prepare(tiny_model(config, head_dim=16), impl="eager").to(DEVICE)
    stock = with_lora(stock) if lora else stock
    expected = logits_of(stock, model_parts(stock), "eager")
    model = prepare(copy.deepcopy(stock), impl="eager")
    parts = fewer_kernels(model)
    assert parts.defers_rotation
    assert fuse_layers(model, "triton") > 2 * 3  # two norms and an MLP a layer, and the last norm
    actual = logits_of(model, parts, "triton")
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    assert actual.argmax(dim=-1).tolist() == expected.argmax(dim=-1).tolist()
