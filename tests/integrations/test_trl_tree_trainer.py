"""TRL's AsyncGRPOTrainer with our attention, on a CPU: it ends where samples trained one by one end.

All of the trainer is TRL's but the one place that asks CUDA for the card's name, to print a share of its peak.
"""

import queue
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM
from trl.experimental.async_grpo import AsyncGRPOConfig, AsyncGRPOTrainer, async_grpo_trainer, packing

from cpo_kernels.integrations.trl_tree import register_tree_attention
from tests.integrations.trl_rows import log_probs_alone, random_samples
from tests.tiny import save_tiny_model, tiny_tokenizer

THEIRS = packing.tree_attention
STEPS, BATCH, LEARNING_RATE, EPSILON = 4, 12, 0.2, 0.2


class Idle:
    """A rollout worker with finished rollouts, of which one batch is fetched ahead, and a weight transfer to nowhere."""

    def __init__(self, samples: list[Any]) -> None:
        self.rollout_buffer: queue.Queue[Any] = queue.Queue()
        self.metrics_queue: queue.Queue[Any] = queue.Queue()
        for each in samples:
            texts = {"prompt": [], "completion": [], "model_version": 0, "enqueued_at": None}
            self.rollout_buffer.put(SimpleNamespace(**each, **texts))

    def check_health(self, stale_after_s: float) -> None:
        """Asked when nothing is left."""
        raise RuntimeError("the trainer asks for more rollouts than there are")

    def __getattr__(self, name: str) -> Any:
        return lambda *arguments: None


@pytest.fixture(autouse=True)
def theirs_again() -> Iterator[None]:
    yield
    packing.tree_attention = THEIRS
    packing.register_tree_attention()


def rollouts(model: Any) -> list[list[Any]]:
    """Batches of samples with shared prefixes, whose old log-probs lie around the model's, so that some are clipped."""
    batches = [random_samples(seed, BATCH, num_trees=2) for seed in range(STEPS + 1)]
    generator = torch.Generator().manual_seed(0)
    for each in [each for batch in batches for each in batch]:
        trained = each["completion_mask"].bool()
        with torch.no_grad():
            own = log_probs_alone(model, [each])
        each["old_log_probs"][trained] = own + 0.3 * torch.randn(own.shape, generator=generator)
    return batches


def loss_alone(model: Any, batch: list[Any]) -> torch.Tensor:
    """The clipped policy-gradient loss of a batch, each sample alone, averaged over trained tokens."""
    losses = []
    for each in batch:
        old = each["old_log_probs"][each["completion_mask"].bool()]
        ratio = (log_probs_alone(model, [each]) - old).exp()
        clipped = ratio.clamp(1 - EPSILON, 1 + EPSILON)
        losses.append(-torch.min(ratio * each["advantage"], clipped * each["advantage"]))
    return torch.cat(losses).mean()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_async_grpo_trains_as_if_each_sample_were_alone(
    tmp_path: Path, checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(async_grpo_trainer, "get_peak_flops_per_device", lambda *arguments: None)
    folder = str(save_tiny_model(tmp_path / "model"))
    alone = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    start = {name: parameter.detach().clone() for name, parameter in alone.named_parameters()}
    batches = rollouts(alone)
    register_tree_attention()
    trainer = AsyncGRPOTrainer(
        model=folder,
        args=AsyncGRPOConfig(
            output_dir=str(tmp_path / "run"),
            per_device_train_batch_size=BATCH,
            max_steps=STEPS,
            learning_rate=LEARNING_RATE,
            optim="sgd",
            max_grad_norm=0.0,
            epsilon=EPSILON,
            token_budget=0,
            max_staleness=2 * STEPS,
            gradient_checkpointing=checkpointing,
            dtype="float32",
            bf16=False,
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_dict({"prompt": ["a", "b"]}),
        processing_class=tiny_tokenizer(),
        rollout_worker=Idle([each for batch in batches for each in batch]),
        weight_transfer=Idle([]),
    )
    trainer.train()
    optimizer = torch.optim.SGD(alone.parameters(), lr=LEARNING_RATE)
    for batch in batches[:STEPS]:
        optimizer.zero_grad()
        loss_alone(alone, batch).backward()
        optimizer.step()
    ours, theirs = (
        {name: parameter.detach() for name, parameter in model.named_parameters()} for model in (trainer.model, alone)
    )
    moved = max(float((parameter - start[name]).abs().max()) for name, parameter in theirs.items())
    apart = max(float((parameter - ours[name]).abs().max()) for name, parameter in theirs.items())
    assert moved > 1e-2
    assert apart < 1e-4 * moved
    assert trainer.state.global_step == STEPS
