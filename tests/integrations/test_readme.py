"""The README's Python blocks run as they stand, and its numbers are the padded ones."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface

from cpo_kernels.integrations.trl_tree import tree_row_attention
from tests.cpo_kernels.padded_oracle import padded_step, trained_gradients, worst_gradient_error
from tests.integrations.trainers import base_model, save_model, text_pairs
from tests.tiny import random_pairs, tiny_llama, tiny_tokenizer, with_exact_norms, with_lora

README = Path(__file__).resolve().parents[2] / "README.md"


def block_with(text: str) -> str:
    """The one Python block of the README that contains `text`."""
    blocks = [block for block in re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL) if text in block]
    assert len(blocks) == 1
    return blocks[0]


def test_the_plain_torch_example_gives_the_padded_loss_and_gradient() -> None:
    pairs = random_pairs()
    model = with_lora(with_exact_norms(tiny_llama(dtype=torch.float64)))
    expected = padded_step(model, pairs, beta=0.1)
    names: dict[str, Any] = {
        "model": model,
        "chosen_rows": [prompt + chosen for prompt, chosen, _ in pairs],
        "rejected_rows": [prompt + rejected for prompt, _, rejected in pairs],
        "prompt_lengths": [len(prompt) for prompt, _, _ in pairs],
    }
    block = block_with("packed_logps")
    exec(compile(block, "README.md", "exec"), names)
    assert torch.allclose(names["loss"], expected.loss, rtol=1e-12, atol=0)
    assert worst_gradient_error(trained_gradients(model), expected.gradients) < 1e-10
    statements = [line for line in block.splitlines() if line and not line.startswith(("from", "import"))]
    assert len(statements) <= 10


def test_the_trl_example_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets, trl, peft = (pytest.importorskip(name) for name in ("datasets", "trl", "peft"))
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {
        "model": base_model(save_model(tmp_path)),
        "args": trl.DPOConfig("out", max_steps=1, use_cpu=True, bf16=False, report_to=[], disable_tqdm=True),
        "dataset": datasets.Dataset.from_list(text_pairs(8)),
        "tokenizer": tiny_tokenizer(),
        "lora": peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"),
    }
    exec(compile(block_with("PackedDPOTrainer"), "README.md", "exec"), names)
    assert names["trainer"].state.global_step == 1


def test_the_async_grpo_example_registers_our_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    packing = pytest.importorskip("trl.experimental.async_grpo.packing")
    monkeypatch.setattr(packing, "tree_attention", packing.tree_attention)  # put back afterwards
    for interface in (AttentionInterface, AttentionMaskInterface):
        monkeypatch.setattr(interface, "_global_mapping", dict(interface._global_mapping))
    exec(compile(block_with("register_tree_attention"), "README.md", "exec"), {})
    assert AttentionInterface()[packing.TREE_ATTENTION] is tree_row_attention
