"""Predicted against measured: the bytes that autograd really keeps, counted by storage, and what `auto` makes of them."""

import logging
import re
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch.autograd.graph import saved_tensors_hooks
from transformers import LlamaConfig, MistralConfig, Qwen2Config

from cpo_fast.config import TrainConfig
from cpo_fast.errors import OutOfMemory
from cpo_fast.models import free_device_bytes
from cpo_fast.train import memory
from cpo_fast.train.deepspeed_engine import adamw
from cpo_fast.train.loop import train
from cpo_fast.train.memory import GIB, choose_checkpointing, predict_step_memory
from cpo_kernels import build_forest
from cpo_kernels.integrations.lora import keep_input_dtype
from cpo_kernels.integrations.transformers import prepare
from cpo_kernels.integrations.transformers.model import model_parts
from cpo_kernels.integrations.transformers.packed import forest_forward
from cpo_kernels.linear_logprob import chunk_size
from tests.cpo_kernels.random_forests import random_sequences
from tests.tiny import ALL_LINEAR, tiny_model
from tests.train.runs import CONSTANT_RATE, MakeConfig, adapter_of, largest_difference, metrics_of, sgd

SHAPES = {
    "tiny": {"num_hidden_layers": 4},
    "smollm2": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "num_hidden_layers": 3,
    },
}
ARCHITECTURES = {"llama": LlamaConfig, "mistral": MistralConfig, "qwen2": Qwen2Config}
PAPER = ("q_proj", "k_proj", "v_proj")


@pytest.fixture(autouse=True)
def _plain_linear(monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed's ZeRO 3, once started, replaces the linear function of the whole process, also for later tests."""
    monkeypatch.setattr(torch.nn.functional, "linear", torch._C._nn.linear)


def adapted(architecture: str, shape: str, dtype: torch.dtype, targets: tuple[str, ...], recast: bool) -> Any:
    changes = {"sliding_window": None} if architecture == "mistral" else {}
    model = tiny_model(ARCHITECTURES[architecture], dtype=dtype, **SHAPES[shape], **changes)
    config = LoraConfig(r=8, target_modules=list(targets), task_type="CAUSAL_LM")
    model = get_peft_model(model, config, autocast_adapter_dtype=True)
    if recast:
        keep_input_dtype(model)
    return prepare(model)


def kept_bytes(model: Any) -> tuple[int, int]:
    """Tokens of a forest, and bytes that a forward over it keeps for backward, each storage once, weights left out."""
    forest = build_forest(random_sequences(3, num_sequences=16)[0])
    weights = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    seen: dict[int, int] = {}
    alive = []  # an address may be used again once its tensor is gone

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            seen[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        output = forest_forward(model_parts(model), forest).last_hidden_state
    assert output.requires_grad
    return forest.num_tokens, sum(seen.values())


@pytest.mark.parametrize("targets", [PAPER, ALL_LINEAR], ids=["qkv", "all"])
@pytest.mark.parametrize(
    ("dtype", "recast"),
    [(torch.float32, True), (torch.bfloat16, True), (torch.bfloat16, False)],
    ids=["fp32", "bf16", "bf16-peft"],
)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_prediction_is_within_ten_percent_of_what_autograd_keeps(
    architecture: str, shape: str, dtype: torch.dtype, recast: bool, targets: tuple[str, ...]
) -> None:
    model = adapted(architecture, shape, dtype, targets, recast)
    num_tokens, measured = kept_bytes(model)
    predicted = predict_step_memory(model, num_tokens).activation_bytes
    assert 0.9 < predicted / measured < 1.1


@pytest.mark.parametrize(("dtype", "recast"), [(torch.float32, True), (torch.bfloat16, True), (torch.bfloat16, False)])
@pytest.mark.parametrize("targets", [PAPER, ALL_LINEAR], ids=["qkv", "all"])
def test_prediction_counts_the_inputs_that_zero_3_keeps(
    dtype: torch.dtype, recast: bool, targets: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    from deepspeed.runtime.zero.linear import zero3_linear_wrap

    model = adapted("llama", "smollm2", dtype, targets, recast)
    monkeypatch.setattr(torch.nn.functional, "linear", zero3_linear_wrap)
    num_tokens, measured = kept_bytes(model)
    predicted = predict_step_memory(model, num_tokens, zero_stage=3).activation_bytes
    assert 0.9 < predicted / measured < 1.1


def test_checkpointed_prediction_is_within_ten_percent_of_what_autograd_keeps() -> None:
    """Between forward and backward only the layers' inputs and what lies outside the layers are kept."""
    model = adapted("llama", "smollm2", torch.bfloat16, PAPER, recast=True)
    model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    num_tokens, measured = kept_bytes(model)
    predicted = predict_step_memory(model, num_tokens)
    kept = num_tokens * (predicted.num_layers * predicted.checkpoint_bytes + predicted.once_bytes)
    assert 0.9 < kept / measured < 1.1


def test_auto_turns_checkpointing_on_exactly_where_a_step_does_not_fit(caplog: pytest.LogCaptureFixture) -> None:
    model = adapted("llama", "tiny", torch.float32, PAPER, recast=True)
    needed = predict_step_memory(model, 5000).total_bytes
    enough = int(needed / memory.USABLE_SHARE) + 1
    with caplog.at_level(logging.INFO):
        assert choose_checkpointing(model, 5000, free_bytes=enough) == "off"
        assert choose_checkpointing(model, 5000, free_bytes=enough - 2) == "non_reentrant"
    first, second = (record.message for record in caplog.records if "gradient checkpointing" in record.message)
    assert first.startswith("gradient checkpointing: off; a step of 5000 tokens needs about")
    assert f"{needed / GIB:.2f} GiB" in first
    assert second.startswith("gradient checkpointing: non_reentrant;")


def test_memory_grows_with_tokens_and_checkpointing_saves_most_of_it() -> None:
    model = adapted("llama", "smollm2", torch.bfloat16, PAPER, recast=True)
    small, large = (predict_step_memory(model, count) for count in (1000, 8000))
    assert large.activation_bytes == 8 * small.activation_bytes
    assert large.checkpointed_bytes < large.total_bytes


def test_a_smaller_bound_on_logits_is_memory_that_is_not_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted("llama", "tiny", torch.float32, PAPER, recast=True)
    whole = predict_step_memory(model, 5000).head_bytes
    monkeypatch.setenv("CPO_KERNELS_MAX_CHUNK_LOGITS", str(3 * model.config.vocab_size))
    saved = (5000 - 3) * model.config.vocab_size
    assert whole - predict_step_memory(model, 5000).head_bytes == 4 * 4 * saved


def test_prediction_for_a_gpu_counts_the_chunk_that_a_pass_makes_there(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted("llama", "tiny", torch.bfloat16, PAPER, recast=True)
    vocab = model.config.vocab_size
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # the card is elsewhere
    monkeypatch.setattr(chunk_size, "MOST_LOGITS", 200 * vocab)
    made = chunk_size.chunk_rows(5000, vocab, torch.device("cuda")) * chunk_size.row_stride(vocab)
    assert 128 * vocab <= made < 256 * vocab
    assert predict_step_memory(model, 5000, device_type="cuda").logits_bytes == 12 * made


def test_free_memory_of_the_cpu_is_asked_for() -> None:
    assert 0 < free_device_bytes(torch.device("cpu")) < 1 << 46


def test_training_decides_by_its_largest_forest_and_the_adapter_is_the_same(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    usual = {**CONSTANT_RATE, "num_epochs": 1}
    expected = adapter_of(make_config(**usual, gradient_checkpointing="off"), make_optimizer=sgd)
    available = psutil.virtual_memory()
    monkeypatch.setattr(psutil, "virtual_memory", lambda: available._replace(available=0))
    config = make_config(**usual)
    with caplog.at_level(logging.INFO):
        computed = [line["tokens/computed"] for line in metrics_of(config, make_optimizer=sgd)]
        train(make_config(**usual, max_tokens=100))
    decided = [record.message for record in caplog.records if record.message.startswith("gradient checkpointing: non_")]
    assert [int(re.findall(r"a step of (\d+) tokens", text)[0]) for text in decided] == [max(computed), 100]
    assert len(set(computed)) > 1
    assert largest_difference(expected, load_file(Path(config.run) / "adapter" / "adapter_model.safetensors")) == 0.0


@pytest.mark.parametrize(
    ("options", "remedies"),
    [
        (
            {"gradient_checkpointing": "off"},
            ["gradient_checkpointing=non_reentrant", "max_tokens=200", "zero_stage=3 on"],
        ),
        ({"gradient_checkpointing": "non_reentrant", "zero_stage": 3}, ["max_tokens=200", "offload=all"]),
    ],
)
def test_a_step_that_runs_out_of_memory_says_what_it_takes_and_what_to_change(
    make_config: MakeConfig, options: dict[str, Any], remedies: list[str]
) -> None:
    def out_of_memory(*args: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    def optimizer(config: TrainConfig, parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
        made = adamw(config, parameters)
        made.register_step_pre_hook(out_of_memory)
        return made

    with pytest.raises(OutOfMemory, match=r"ran out of memory\. .* GiB of activations") as caught:
        train(make_config(**options), make_optimizer=optimizer)
    assert caught.value.exit_code == 6
    asked = str(caught.value).partition("in this order: ")[2].split("; ")
    assert len(asked) == len(remedies)
    for said, wanted in zip(asked, remedies, strict=True):
        assert f"train.{wanted}" in said
