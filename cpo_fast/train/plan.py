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
from cpo_fast.dtype import dtype_name, resolve_dtype
from cpo_fast.errors import EnvironmentProblem
from cpo_fast.models import SAFETENSORS_NAMES, free_device_bytes, model_folder, numbers_by_dtype, resolve_device
from cpo_fast.ranks import Ranks
from cpo_fast.train.dealing import deal, num_tokens
from cpo_fast.train.deepspeed_engine import deepspeed_config
from cpo_fast.train.memory import (
    USABLE_SHARE,
    base_bytes,
    choose_checkpointing,
    choose_stage,
    device_bytes,
    predict_step_memory,
)
from cpo_fast.train.objective import split_examples
from cpo_fast.train.policy import load_policy
from cpo_kernels import build_forest

PAIRS_A_RANK = {"pairs": 16, "questions": 64}  # from which on ranks are busy for about 0.85 of a step
MAX_LIVE_PARAMETERS = 1_000_000_000  # DeepSpeed's default of stage3_max_live_parameters
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
        recomputes: whether training will checkpoint gradients, where `auto` goes by the memory that is free here and now.
        device: cuda or cpu. memory: predicted bytes by component, as training will have them in its largest micro-batch.
        loading_bytes: while the base is loaded, where that is more than it takes afterwards.
        kept_bytes, checkpointed_bytes: of a step without gradient checkpointing, and with.
        room: bytes that a training may use of a GPU.
        copied_bytes: of a base that each rank casts from another dtype, where it could have been mapped from its files.
        file_dtypes: of these files, as safetensors names them.
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
    recomputes: bool
    device: str
    memory: dict[str, float]
    loading_bytes: float
    kept_bytes: float
    checkpointed_bytes: float
    room: float
    copied_bytes: int
    file_dtypes: list[str]
    checkpoint_bytes: int
    disk_bytes: int
    deepspeed: dict[str, Any]

    @property
    def total_bytes(self) -> float:
        """The peak on a GPU, or what one process on a CPU grows by after its imports."""
        return max(self.loading_bytes, sum(self.memory.values()))


def make_plan(config: Config, num_ranks: int) -> Plan:
    """Plan a training on so many GPUs like this machine's device, or on its CPU.

    Raises:
        CpoFastError: as training does for configuration, data and model.
    """
    device = resolve_device(config.model.device)
    stage = choose_stage(config, device, Ranks(0, num_ranks, 0, num_ranks))
    policy = load_policy(config, *without_weights(config, device))
    loaded = load_examples(config, policy.tokenizer)
    examples, held_out = split_by_question(loaded.examples, config.data.held_out, config.seed)
    train = config.train
    batches = epoch_batches(
        [example.group for example in examples], train.batch_pairs, train.batch_order, config.seed, epoch=0
    )
    num_steps = train.length(len(batches))
    row_tokens = forest_tokens = rank_tokens = num_micro_batches = largest_whole = 0
    largest = (0, [examples[0]])  # micro-batch of a rank, by tokens
    efficiencies = []
    for indices in batches:
        batch = [examples[index] for index in indices]
        loads = []
        for places in deal(batch, num_ranks):
            micro_batches = _micro_batches(batch, places, train.max_tokens)
            num_micro_batches += len(micro_batches)
            largest = max(largest, *micro_batches, key=lambda each: each[0]) if micro_batches else largest
            loads.append(sum(count for count, _ in micro_batches))
        micro_batches = _micro_batches(batch, range(len(batch)), train.max_tokens)
        alone = sum(count for count, _ in micro_batches)
        largest_whole = max(largest_whole, alone if len(micro_batches) == 1 else train.max_tokens)
        row_tokens += sum(len(ids) for example in batch for ids in example.sequences)
        forest_tokens += alone
        rank_tokens += sum(loads)
        efficiencies.append(alone / (num_ranks * max(loads)))
    on_cpu, cut_over = device.type == "cpu", num_ranks if stage == 3 else 1
    memory = predict_step_memory(policy.model, largest[0], _head_rows(largest[1]), stage, device.type)
    trainable = sum(each.numel() for each in policy.model.parameters() if each.requires_grad)
    base = base_bytes(config.model, device)
    file_dtypes, file_bytes = _files(config)
    is_cast = file_dtypes != [SAFETENSORS_NAMES[dtype_name(policy.model.get_base_model().dtype)]]
    weights: dict[str, float] = {"base": base / cut_over, "adapter": 4 * trainable}
    if stage == 3:
        zero = deepspeed_config(train, stage)["zero_optimization"]
        weights["gathered weights"] = _gathered_bytes(policy.model, zero)
        # allocated whole in float32, however few gradients there are; a CPU gives pages to what is used of it
        weights["gradient bucket"] = 0 if on_cpu else 4 * zero["reduce_bucket_size"]
    free = free_device_bytes(device) / (num_ranks if on_cpu else 1)
    if is_cast or not on_cpu:
        free -= base / cut_over  # pages that are mapped from files count as free
    recomputes = train.gradient_checkpointing == "non_reentrant" or (
        train.gradient_checkpointing == "auto"
        and choose_checkpointing(policy.model, largest_whole, stage, int(free), device.type) != "off"
    )
    kept, checkpointed = (
        sum(weights.values()) + sum(memory.peak_parts(each, device.type).values()) for each in (False, True)
    )
    checkpoint = COPIES * trainable
    num_kept = train.keep_last + (1 if config.data.held_out or train.stop_on != "held_out_loss" else 0)
    return Plan(
        num_examples=len(examples),
        num_held_out=len(held_out),
        dropped=loaded.dropped_by_reason,
        num_steps=num_steps,
        num_warmup=math.ceil(train.warmup_ratio * num_steps),
        row_tokens=row_tokens,
        forest_tokens=forest_tokens,
        rank_tokens=rank_tokens,
        micro_batch_tokens=rank_tokens / num_micro_batches,
        num_ranks=num_ranks,
        stage=stage,
        efficiency=sum(efficiencies) / len(efficiencies),
        wanted_pairs=PAIRS_A_RANK[train.batch_order] * num_ranks if num_ranks > 1 else 1,
        recomputes=recomputes,
        device=device.type,
        memory=weights | memory.peak_parts(recomputes, device.type),
        loading_bytes=_loading_bytes(base, file_bytes, is_cast, cut_over) if on_cpu else 0,
        kept_bytes=kept,
        checkpointed_bytes=checkpointed,
        room=USABLE_SHARE * device_bytes(device) / (num_ranks if on_cpu else 1),
        copied_bytes=base if is_cast and (on_cpu or stage == 3) else 0,
        file_dtypes=file_dtypes,
        checkpoint_bytes=checkpoint,
        disk_bytes=num_kept * checkpoint + 3 * 4 * trainable,  # the adapter, the best one and the last one
        deepspeed=deepspeed_config(train, stage),
    )


def _micro_batches(batch: list[Example], places: Any, max_tokens: int) -> list[tuple[int, list[Example]]]:
    """Tokens and examples of each micro-batch of the examples at `places`."""
    chosen = [batch[place] for place in places]
    groups = split_examples(chosen, max_tokens) if chosen else []
    return [(num_tokens(chosen, group), [chosen[index] for index in group]) for group in groups]


def _head_rows(examples: list[Example]) -> int:
    """Rows of the examples' forest that predict a scored token."""
    scored = [entry for example in examples for entries in example.scored for entry in entries]
    plan = build_forest([ids for ids, _ in scored]).logprob_plan([start for _, start in scored])
    return plan.unique_rows.shape[0]


def _files(config: Config) -> tuple[list[str], int]:
    """The dtypes of the base's files, as safetensors names them, and their size in bytes."""
    folder = model_folder(config.model.path)
    return sorted(numbers_by_dtype(folder)), sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def _gathered_bytes(model: Any, zero: dict[str, Any]) -> float:
    """What ZeRO 3 may hold of the base's weights in whole at one time."""
    most = zero.get("stage3_max_live_parameters", MAX_LIVE_PARAMETERS)
    frozen = [each for each in model.parameters() if not each.requires_grad]
    # a weight that is in use is whole, whatever the limit
    return min(sum(each.numel() for each in frozen), max(most, *(each.numel() for each in frozen))) * frozen[0].itemsize


def _loading_bytes(base: float, file_bytes: int, is_cast: bool, cut_over: int) -> float:
    """Host memory while the base is loaded on a CPU: its files are mapped, and a copy is made where it is cast or cut."""
    return file_bytes + (base if is_cast else 0) + (base / cut_over if cut_over > 1 else 0)


def without_weights(config: Config, device: torch.device) -> tuple[Any, Any]:
    """The model on torch's meta device, in the dtype that training would give it, and its tokenizer.

    Raises:
        EnvironmentProblem: it cannot be made without its files of weights.
    """
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
