"""Our training loop against TRL's own, unmodified DPOTrainer: the same pairs, the same batches, twenty SGD steps."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from cpo_fast.config import validate_config
from cpo_fast.data.batches import epoch_batches
from cpo_fast.train.loop import train
from tests.tiny import save_tiny_model, tiny_tokenizer, with_lora
from tests.train.runs import sgd

BATCH, STEPS, LEARNING_RATE = 4, 20, 0.05


def text_pairs() -> list[dict[str, str]]:
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


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A tiny Llama with its tokenizer, a saved adapter whose B is not zero, and the pairs as JSONL."""
    folder = tmp_path_factory.mktemp("parity")
    save_tiny_model(folder / "model", pad_token_id=0, bos_token_id=1, eos_token_id=2)
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(folder / "model")
    with_lora(base, targets=("q_proj", "k_proj", "v_proj")).save_pretrained(folder / "adapter")
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in text_pairs()))
    return {"folder": folder, "start": load_file(folder / "adapter" / "adapter_model.safetensors")}


def our_adapter(folder: Path, **train_options: Any) -> dict[str, torch.Tensor]:
    config = validate_config(
        {
            "run": str(folder / f"ours-{len(list(folder.iterdir()))}"),
            "model": {"path": str(folder / "model"), "adapter": str(folder / "adapter"), "dtype": "float32"},
            "data": {"path": str(folder / "pairs.jsonl"), "eos": "every"},
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
    )
    return load_file(train(config, make_optimizer=sgd).adapter_path / "adapter_model.safetensors")


def trl_adapter(folder: Path) -> dict[str, torch.Tensor]:
    from datasets import Dataset
    from peft import PeftModel
    from transformers import AutoModelForCausalLM
    from trl import DPOConfig, DPOTrainer

    rows = text_pairs()
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
    return load_file(folder / "trl-adapter" / "adapter_model.safetensors")


def movement_and_difference(
    start: dict[str, torch.Tensor], ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]
) -> tuple[float, float]:
    assert start.keys() == ours.keys() == theirs.keys()
    movement = max(float((theirs[key] - start[key]).abs().max()) for key in start)
    difference = max(float((theirs[key] - ours[key]).abs().max()) for key in start)
    return movement, difference


def test_twenty_steps_end_at_the_parameters_of_trl(setup: dict[str, Any]) -> None:
    theirs = trl_adapter(setup["folder"])
    movement, difference = movement_and_difference(setup["start"], our_adapter(setup["folder"]), theirs)
    assert movement >= 1e-2
    assert difference <= 1e-4 * movement
    # the comparison has teeth: a slightly different objective ends elsewhere
    _, other_beta = movement_and_difference(setup["start"], our_adapter(setup["folder"], beta=0.101), theirs)
    assert other_beta > 1e-4 * movement
    print(f"movement {movement:.3e}, difference {difference:.1e}, with beta 0.101 {other_beta:.1e}")
