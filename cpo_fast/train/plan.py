"""What a training will do, without training: rows, exact tokens, steps, memory, disk, and how well it fills its GPUs.

The data is read and tokenised as training reads it, and the first epoch is dealt and cut as training deals and cuts it, so
counts are exact. The model is built without weights. Memory is predicted (see `cpo_fast.train.memory`).
"""

import math
from dataclasses import dataclass
from typing import Any

import torch

from cpo_fast.config import Config
from cpo_fast.data.batches import epoch_batches, split_by_question
from cpo_fast.data.examples import Example
from cpo_fast.data.load import load_examples
from cpo_fast.dtype import resolve_dtype
from cpo_fast.errors import EnvironmentProblem
from cpo_fast.models import model_folder, resolve_device
from cpo_fast.ranks import Ranks
from cpo_fast.train.dealing import deal, num_tokens
from cpo_fast.train.deepspeed_engine import deepspeed_config
from cpo_fast.train.memory import USABLE_SHARE, base_bytes, choose_stage, device_bytes, predict_step_memory
from cpo_fast.train.objective import split_examples
from cpo_fast.train.policy import load_policy

PAIRS_A_RANK = {"pairs": 16, "questions": 64}  # from which on ranks are busy for about 0.85 of a step
COPIES = 12  # bytes a trainable number in a checkpoint: weight and two moments in float32


@dataclass(frozen=True)
class Plan:
    """A training in numbers. Bytes are of one GPU, tokens and steps of the whole training.

    Attributes:
        num_examples, num_held_out: rows that are trained and validated on. dropped: rows left out, by reason.
        num_steps: optimizer steps, of which num_warmup raise the rate.
        row_tokens: tokens of the first epoch's sequences, as padded rows would have at least.
        forest_tokens: what one process computes of them. rank_tokens: what all ranks compute together.
        micro_batch_tokens: mean tokens of a micro-batch.
        efficiency: tokens of one process over ranks times those of the busiest, mean over the steps of an epoch.
        wanted_pairs: `train.batch_pairs` from which on the ranks are busy.
        memory: predicted bytes by component, without gradient checkpointing and with.
        room: bytes that a training may use of a GPU.
        checkpoint_bytes: of one checkpoint. disk_bytes: of the run at its end.
    """

    num_examples: int
    num_held_out: int
    dropped: dict[str, int]
    num_steps: int
    num_warmup: int
    row_tokens: int
    forest_tokens: int
    rank_tokens: int
    micro_batch_tokens: float
    num_ranks: int
    stage: int
    efficiency: float
    wanted_pairs: int
    memory: dict[str, float]
    checkpointed_bytes: float
    room: float
    checkpoint_bytes: int
    disk_bytes: int
    deepspeed: dict[str, Any]

    @property
    def total_bytes(self) -> float:
        """Of a GPU, without gradient checkpointing."""
        return sum(self.memory.values())


def make_plan(config: Config, num_ranks: int) -> Plan:
    """Plan a training on so many GPUs like this machine's device, or on its CPU.

    Raises:
        CpoFastError: as training does for configuration, data and model.
    """
    device = resolve_device(config.model.device)
    stage = choose_stage(config, device, Ranks(0, num_ranks, 0, num_ranks))
    policy = load_policy(config, *_without_weights(config, device))
    loaded = load_examples(config, policy.tokenizer)
    examples, held_out = split_by_question(loaded.examples, config.data.held_out, config.seed)
    train = config.train
    batches = epoch_batches(
        [example.group for example in examples], train.batch_pairs, train.batch_order, config.seed, epoch=0
    )
    num_steps = min(len(batches) * train.num_epochs, train.max_steps or math.inf)
    row_tokens = forest_tokens = rank_tokens = num_micro_batches = largest = 0
    efficiencies = []
    for indices in batches:
        batch = [examples[index] for index in indices]
        loads = []
        for places in deal(batch, num_ranks):
            micro_batches = _micro_batches(batch, places, train.max_tokens)
            num_micro_batches += len(micro_batches)
            largest = max(largest, *micro_batches, 0)
            loads.append(sum(micro_batches))
        alone = sum(_micro_batches(batch, range(len(batch)), train.max_tokens))
        row_tokens += sum(len(ids) for example in batch for ids in example.sequences)
        forest_tokens += alone
        rank_tokens += sum(loads)
        efficiencies.append(alone / (num_ranks * max(loads)))
    memory = predict_step_memory(policy.model, largest, zero_stage=stage)
    trainable = sum(each.numel() for each in policy.model.parameters() if each.requires_grad)
    base = base_bytes(config.model, device) / (num_ranks if stage == 3 else 1)
    parts = {
        "base": base,
        "adapter": 4 * trainable,
        "gradients, moments, workspace": memory.fixed_bytes,
        "activations": memory.activation_bytes,
        "output head": memory.head_bytes,
        "working memory": memory.num_tokens * memory.working_bytes,
    }
    checkpoint = COPIES * trainable
    kept = train.keep_last + (1 if config.data.held_out or train.stop_on == "accuracy" else 0)
    return Plan(
        num_examples=len(examples),
        num_held_out=len(held_out),
        dropped=loaded.dropped_by_reason,
        num_steps=int(num_steps),
        num_warmup=math.ceil(train.warmup_ratio * num_steps),
        row_tokens=row_tokens,
        forest_tokens=forest_tokens,
        rank_tokens=rank_tokens,
        micro_batch_tokens=rank_tokens / num_micro_batches,
        num_ranks=num_ranks,
        stage=stage,
        efficiency=sum(efficiencies) / len(efficiencies),
        wanted_pairs=PAIRS_A_RANK[train.batch_order] * num_ranks if num_ranks > 1 else 1,
        memory=parts,
        checkpointed_bytes=base + 4 * trainable + memory.checkpointed_bytes,
        room=USABLE_SHARE * device_bytes(device) / (num_ranks if device.type == "cpu" else 1),
        checkpoint_bytes=checkpoint,
        disk_bytes=kept * checkpoint + 3 * 4 * trainable,  # the adapter, the best one and the last one
        deepspeed=deepspeed_config(train, stage),
    )


def _micro_batches(batch: list[Example], places: Any, max_tokens: int) -> list[int]:
    """Tokens of each micro-batch of the examples at `places`."""
    chosen = [batch[place] for place in places]
    return [num_tokens(chosen, group) for group in split_examples(chosen, max_tokens)] if chosen else []


def _without_weights(config: Config, device: torch.device) -> tuple[Any, Any]:
    """The model on torch's meta device, in the dtype that training would give it, and its tokenizer."""
    import transformers

    folder = model_folder(config.model.path)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        settings = transformers.AutoConfig.from_pretrained(folder)
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(
                settings, dtype=resolve_dtype(config.model.dtype, device), attn_implementation="sdpa"
            )
    except (OSError, ValueError, ImportError) as error:
        raise EnvironmentProblem(f"model.path: {config.model.path} cannot be planned ({error})") from None
    return model, tokenizer
