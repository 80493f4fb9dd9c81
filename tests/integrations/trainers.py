"""TRL trainers over one tiny saved model, unmodified or packed, with the same data and settings."""

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from transformers import AutoModelForCausalLM
from trl import DPOConfig, DPOTrainer

from tests.tiny import save_tiny_model, tiny_tokenizer, with_lora

BATCH, STEPS = 4, 20
SETTINGS: dict[str, Any] = {
    "per_device_train_batch_size": BATCH,
    "per_device_eval_batch_size": BATCH,
    "max_steps": STEPS,
    "train_sampling_strategy": "sequential",
    "learning_rate": 0.05,
    "optim": "sgd",
    "lr_scheduler_type": "constant",
    "warmup_steps": 0,
    "max_grad_norm": 0.0,
    "weight_decay": 0.0,
    "beta": 0.1,
    "bf16": False,
    "use_cpu": True,
    "gradient_checkpointing": False,
    "max_length": None,
    "logging_steps": 1,
    "report_to": [],
    "save_strategy": "no",
    "disable_tqdm": True,
}


def text_pairs(count: int = BATCH * STEPS) -> list[dict[str, str]]:
    """Pairs of ten questions under one few-shot prompt: siblings that differ at once, and prefixes of siblings."""
    rows = []
    for question in range(10):
        prompt = f"Question: 2 + 2?\nStep 1: add.\nAnswer: 4\n\nQuestion: {question} + {question + 3}?\n"
        for rejected in ("9\n", "Step 1: ad", "Step 1: subtract.\n", "hm\n"):
            rows.append({"prompt": prompt, "chosen": "Step 1: add.\n", "rejected": rejected})
        later = prompt + "Step 1: add.\n"
        for number in "468x":
            rows.append({"prompt": later, "chosen": f"Answer: {2 * question + 3}\n", "rejected": f"{number}.\n"})
    return rows[:count]


def save_model(folder: Path) -> Path:
    """A tiny Llama with its tokenizer and an adapter whose B is not zero."""
    save_tiny_model(folder / "model", pad_token_id=0, bos_token_id=1, eos_token_id=2)
    base = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    with_lora(base, targets=("q_proj", "k_proj", "v_proj")).save_pretrained(folder / "adapter")
    return folder


def base_model(folder: Path) -> Any:
    """The model without its adapter."""
    return AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)


def adapted_model(folder: Path) -> Any:
    """The model with its adapter, to be trained."""
    return PeftModel.from_pretrained(base_model(folder), folder / "adapter", is_trainable=True)


def make_trainer(trainer_class: type[DPOTrainer], model: Any, folder: Path, **options: Any) -> DPOTrainer:
    """A trainer of `trainer_class`; `rows`, `ref_model` and `processing_class` go to it, all else to `DPOConfig`."""
    rows = options.pop("rows", text_pairs())
    arguments = {key: options.pop(key) for key in ("ref_model", "compute_metrics", "eval_dataset") if key in options}
    return trainer_class(
        model=model,
        args=DPOConfig(output_dir=str(folder / "run"), **(SETTINGS | options)),
        train_dataset=Dataset.from_list(rows),
        processing_class=tiny_tokenizer(),
        **arguments,
    )


def trained(model: Any) -> dict[str, torch.Tensor]:
    """A copy of every parameter that is trained."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def largest_difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """Largest absolute difference over equally named tensors."""
    assert one.keys() == other.keys() != set()
    return max(float((one[name] - other[name]).abs().max()) for name in one)
