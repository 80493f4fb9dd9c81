"""TRL's own, unmodified DPOTrainer on eighty pairs, and the configuration of the same twenty SGD steps for our training."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from cpo_fast.data.batches import epoch_batches
from tests.tiny import save_tiny_model, tiny_tokenizer, with_lora
from tests.train.runs import largest_difference

BATCH, STEPS, LEARNING_RATE = 4, 20, 0.05
BOUND = 1e-4  # of the largest movement of a weight
ADAPTER_FILE = "adapter_model.safetensors"


@dataclass(frozen=True)
class TrlRun:
    """A tiny Llama, a saved adapter whose B is not zero, the pairs as JSONL, and the adapter that TRL makes of them."""

    folder: Path
    start: dict[str, torch.Tensor]
    end: dict[str, torch.Tensor]

    def config(self, run: Path, **train_options: Any) -> dict[str, Any]:
        """Our configuration of the same training. Its optimizer is `tests.train.runs.sgd`."""
        return {
            "run": str(run),
            "model": {
                "path": str(self.folder / "model"),
                "adapter": str(self.folder / "adapter"),
                "dtype": "float32",
                "device": "cpu",
            },
            "data": {"path": str(self.folder / "pairs.jsonl"), "eos": "every"},
            "train": {
                "lr": LEARNING_RATE,
                "schedule": "constant",
                "warmup_ratio": 0.0,
                "max_grad_norm": 0.0,
                "num_epochs": 1,
                "batch_pairs": BATCH,
                "max_tokens": 600,
                **train_options,
            },
        }

    @property
    def movement(self) -> float:
        return largest_difference(self.start, self.end)

    def difference(self, run: Path) -> float:
        """Between TRL's adapter and that of a run of ours."""
        return largest_difference(self.end, load_file(run / "adapter" / ADAPTER_FILE))


def train_with_trl(folder: Path) -> TrlRun:
    """Make model, adapter and pairs in `folder`, and train with TRL, on the same batches as ours."""
    from datasets import Dataset
    from peft import PeftModel
    from transformers import AutoModelForCausalLM
    from trl import DPOConfig, DPOTrainer

    save_tiny_model(folder / "model", pad_token_id=0, bos_token_id=1, eos_token_id=2)
    untrained = AutoModelForCausalLM.from_pretrained(folder / "model")
    with_lora(untrained, targets=("q_proj", "k_proj", "v_proj")).save_pretrained(folder / "adapter")
    rows = _text_pairs()
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    order = [index for batch in epoch_batches([""] * len(rows), BATCH, "pairs", 0, 0) for index in batch]
    base = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    options = DPOConfig(
        output_dir=str(folder / "trl"),
        per_device_train_batch_size=BATCH,
        max_steps=STEPS,
        train_sampling_strategy="sequential",
        learning_rate=LEARNING_RATE,
        optim="sgd",
        lr_scheduler_type="constant",
        warmup_steps=0,
        max_grad_norm=0.0,
        weight_decay=0.0,
        beta=0.1,
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        max_length=None,
        logging_steps=1000,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = DPOTrainer(
        model=PeftModel.from_pretrained(base, folder / "adapter", is_trainable=True),
        args=options,
        train_dataset=Dataset.from_list([rows[index] for index in order]),
        processing_class=tiny_tokenizer(),
    )
    trainer.train()
    trainer.model.save_pretrained(folder / "trl-adapter", selected_adapters=["default"])
    return TrlRun(
        folder, load_file(folder / "adapter" / ADAPTER_FILE), load_file(folder / "trl-adapter" / ADAPTER_FILE)
    )


def _text_pairs() -> list[dict[str, str]]:
    """Eighty pairs of five questions under one few-shot prompt: siblings, prefixes of siblings, repeated thoughts."""
    rows = []
    shared = "Question: 2 + 2?\nStep 1: add them.\nAnswer: 4\n\n"
    for question in range(5):
        prompt = f"{shared}Question: {question} + {question + 3}?\n"
        thoughts = [
            f"Step 1: {word}.\n" for word in ("add", "ad", "subtract", "add the two", "9", "so it is", "hm", "no")
        ]
        for chosen in thoughts[:2]:
            rows += [{"prompt": prompt, "chosen": chosen, "rejected": bad} for bad in thoughts[2:]]
        later = prompt + thoughts[0]
        rows += [
            {"prompt": later, "chosen": f"Answer: {2 * question + 3}\n", "rejected": f"Answer: {n}\n"} for n in "468x"
        ]
    return rows[: BATCH * STEPS]
