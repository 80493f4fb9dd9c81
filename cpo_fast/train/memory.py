"""What an optimizer step keeps in memory, predicted from the model's shape, and whether it fits without checkpointing.

Bytes that autograd keeps for one token in one decoder layer, with b bytes a number, E hidden, I intermediate, H query
and K key heads of size D, and adapters of rank r. The base is frozen, so a plain linear layer keeps nothing.

    two RMSNorms       8 E + 8            their float32 input and 1 / rms
    tree attention     b D (2 H + 2 K) + 4 H        q, k, v, the output and one float32 a head
    gated MLP          3 b I              gate, its activation, up
    each adapter       4 r, and its input: b a number once for all layers that read it, or 4 a number each as PEFT keeps it
    ZeRO 3             the input of every linear layer, b a number: DeepSpeed's own linear keeps it

With checkpointing a layer keeps its input, b E, and one layer's sum exists at a time. Recomputing costs a third more
arithmetic, so it is chosen only where the step would not fit. The forward's working memory, the gradients of one layer
and the output head are added as upper bounds. Shapes are those of Llama, Mistral and Qwen2. Other decoders are taken
for one of them. What other processes take later is not known here.

A step's peak is either at the end of the forward, beside the logits, or in the first layer of the backward, when they are
gone. The bound adds both, because a GPU's allocator may not fit one into the place of the other. On a CPU the larger one is
taken, beside which glibc keeps 20 to 60 % of freed tensors for the next ones (measured, and not derived). With
MALLOC_MMAP_THRESHOLD_=1048576 in the environment it keeps none, and a step took half as long again.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from cpo_fast.config import Config, ModelConfig, TrainConfig
from cpo_fast.dtype import resolve_dtype
from cpo_fast.errors import OutOfMemory
from cpo_fast.models import free_device_bytes, model_folder, numbers_by_dtype
from cpo_fast.ranks import Ranks
from cpo_kernels.integrations.transformers.model import kv_shape, model_parts
from cpo_kernels.linear_logprob.chunk_size import BYTES_A_LOGIT, chunk_rows, row_stride
from cpo_kernels.tree_attention.eager import BLOCK_KEYS, MAX_RUN_SCORES

logger = logging.getLogger(__name__)

# share of the free memory that a step may take: the rest is for what an allocator cannot give back in one piece
USABLE_SHARE = 0.8
BASE_SHARE = 0.7  # of a card that a whole base may take: activations and adapters need the rest
WORKSPACE_BYTES = 256 << 20  # on a GPU: tiles of attention and the libraries' own buffers
LIBRARY_BYTES = 48 << 20  # on a CPU, measured: code that is first run, and objects that are first made, while training
GIB = 1 << 30
# linear layers of one decoder layer that read the same tensor, while a name that is not here reads one of its own
SHARED_INPUT = {
    "q_proj": "attention",
    "k_proj": "attention",
    "v_proj": "attention",
    "gate_proj": "mlp",
    "up_proj": "mlp",
}
KEPT_ANYWAY = "o_proj"  # reads the attention's output, which attention keeps


@dataclass(frozen=True)
class StepMemory:
    """Bytes of one micro-batch of `num_tokens` tokens, beside the weights that are loaded already."""

    num_tokens: int
    num_layers: int
    layer_bytes: float  # a token and layer, everything kept
    checkpoint_bytes: float  # a token and layer, only the layer's input kept
    once_bytes: float  # a token, outside the layers
    head_bytes: float  # what the output head keeps, and its logits
    logits_bytes: float  # of it, what is gone when backward begins
    fixed_bytes: float  # gradients and optimizer state of the adapters, workspace
    working_bytes: float  # a token: tensors of one layer that live only while it runs

    @property
    def activation_bytes(self) -> float:
        """Kept by the decoder for backward, without checkpointing."""
        return self.num_tokens * (self.num_layers * self.layer_bytes + self.once_bytes)

    @property
    def total_bytes(self) -> float:
        """Peak of a step without checkpointing."""
        return self.activation_bytes + self._rest

    @property
    def checkpointed_bytes(self) -> float:
        """Peak of a step with checkpointing: every layer's input, and everything of one layer."""
        kept = self.num_layers * self.checkpoint_bytes + self.layer_bytes + self.once_bytes
        return self.num_tokens * kept + self._rest

    def peak_parts(self, recomputes: bool, device_type: str) -> dict[str, float]:
        """Bytes by component, whose sum is the peak on a CPU and the bound elsewhere."""
        layers = self.num_layers * (self.checkpoint_bytes if recomputes else self.layer_bytes)
        working = self.num_tokens * (self.working_bytes + (self.layer_bytes if recomputes else 0))
        if device_type == "cpu":
            working = max(0, working - self.logits_bytes)  # these two do not meet
        return {
            "gradients, moments, workspace": self.fixed_bytes,
            "activations": self.num_tokens * (layers + self.once_bytes),
            "output head": self.head_bytes,
            "working memory": working,
        }

    @property
    def _rest(self) -> float:
        return self.head_bytes + self.fixed_bytes + self.num_tokens * self.working_bytes


def predict_step_memory(
    model: Any, num_tokens: int, num_rows: int | None = None, zero_stage: int = 0, device_type: str | None = None
) -> StepMemory:
    """Memory of a micro-batch on a `PeftModel`.

    Args:
        model: read for its configuration, dtype, adapters, and how these keep their input.
        num_tokens: tokens of the forest.
        num_rows: rows that meet the output head, or None for all of them, an upper bound.
        zero_stage: DeepSpeed's ZeRO stage.
        device_type: where it will train, or None for where the model is.
    """
    parts = model_parts(model)
    config, dtype = parts.config, parts.causal_lm.dtype
    device = torch.device(device_type) if device_type else next(model.parameters()).device
    on_cpu = device.type == "cpu"
    size = dtype.itemsize
    hidden, heads = config.hidden_size, config.num_attention_heads
    kv_heads, head_dim = kv_shape(config)
    intermediate = getattr(config, "intermediate_size", None) or 4 * hidden
    attention = size * head_dim * (2 * heads + 2 * kv_heads) + 4 * heads
    layer = 8 * hidden + 8 + attention + 3 * size * intermediate
    num_rows = num_tokens if num_rows is None else num_rows
    chunk = chunk_rows(num_rows, config.vocab_size, device)  # rows
    # logits, probabilities and a temporary; with the entropy a second one, where no kernel reads the logits in place
    logits = chunk * (16 * config.vocab_size if on_cpu else BYTES_A_LOGIT * row_stride(config.vocab_size))
    if on_cpu and size < 4:
        # a CPU has no product of 16-bit numbers that adds up in float32, so the head is copied
        logits = max(logits, 4 * config.vocab_size * (2 * chunk + hidden))
    # a layer's forward and backward hold about the float32 input of a norm and the MLP's tensors twice
    working = 2.0 * (4 * hidden + 3 * size * intermediate)
    if on_cpu:
        # eager attention: q, out and their gradients, k, v and theirs in float32, and three tensors of one run's scores
        scores = min(MAX_RUN_SCORES, num_tokens * heads * BLOCK_KEYS)
        working = max(working, 16 * head_dim * (heads + kv_heads) + 12 * scores / max(1, num_tokens))
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    num_trainable = sum(
        getattr(parameter, "ds_numel", parameter.numel()) for parameter in trainable
    )  # cut up by ZeRO 3
    return StepMemory(
        num_tokens=num_tokens,
        num_layers=config.num_hidden_layers,
        layer_bytes=layer + sum(_linear_bytes(parts.backbone, size, zero_stage == 3)) / config.num_hidden_layers,
        checkpoint_bytes=size * hidden,
        once_bytes=4 * hidden + 4 + 2 * size * head_dim,  # the last norm and the rotary tables
        # last hidden states of policy and reference, and for every row an expected embedding in float32 and target weights
        head_bytes=2 * num_tokens * size * hidden + num_rows * (4 + size) * hidden + logits,
        logits_bytes=logits,
        # float32: gradient, two moments and the copy that an update makes
        fixed_bytes=16 * num_trainable + (LIBRARY_BYTES if on_cpu else WORKSPACE_BYTES),
        working_bytes=working,
    )


def choose_stage(config: Config, device: torch.device, ranks: Ranks) -> int:
    """ZeRO's stage: as asked, where `auto` is 3 if the base takes more than 0.7 of this rank's device, else 0.

    One rank has nobody to share with and stays at 0. The answer depends on the files and on the device's size, so it is
    the same on equal cards.
    """
    if config.train.zero_stage != "auto":
        return config.train.zero_stage
    if ranks.world_size == 1 or not config.model.path:
        return 0
    base, room = (
        base_bytes(config.model, device),
        device_bytes(device) / (ranks.local_world_size if device.type == "cpu" else 1),
    )
    stage = 3 if base > BASE_SHARE * room else 0
    logger.info("ZeRO stage %d: the base takes %.2f GiB of %.2f GiB", stage, base / GIB, room / GIB)
    return stage


def base_bytes(config: ModelConfig, device: torch.device) -> int:
    """Bytes of the base's weights in the dtype they will have, from the headers of its files."""
    return numbers_by_dtype(model_folder(config.path)).total() * resolve_dtype(config.dtype, device).itemsize


def free_rank_bytes(model: Any, device: torch.device, ranks: Ranks, zero_stage: int) -> int:
    """What this rank can still allocate on its device: ranks of one host share a CPU's memory, and ZeRO 3 still has to
    put this rank's part of the model there."""
    free = free_device_bytes(device) // (ranks.local_world_size if device.type == "cpu" else 1)
    if zero_stage == 3 and next(model.parameters()).device != device:
        free -= sum(parameter.nbytes for parameter in model.parameters()) // ranks.world_size
    return free


def device_bytes(device: torch.device) -> int:
    """All memory of a device, or of the host for a CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    import psutil  # type: ignore[import-untyped]  # comes with DeepSpeed and accelerate

    return int(psutil.virtual_memory().total)


def choose_checkpointing(
    model: Any, num_tokens: int, zero_stage: int = 0, free_bytes: int | None = None, device_type: str | None = None
) -> str:
    """`off` where a micro-batch of `num_tokens` fits the device's free memory, else `non_reentrant`. Logs the numbers.

    Args:
        model: a `PeftModel`.
        num_tokens: tokens of the largest micro-batch.
        zero_stage: DeepSpeed's ZeRO stage.
        free_bytes: free memory of this rank, or None to ask the model's device.
        device_type: where it will train, or None for where the model is.
    """
    memory = predict_step_memory(model, num_tokens, zero_stage=zero_stage, device_type=device_type)
    free = free_device_bytes(next(model.parameters()).device) if free_bytes is None else free_bytes
    fits = memory.total_bytes <= USABLE_SHARE * free
    logger.info(
        "gradient checkpointing: %s; a step of %d tokens needs about %.2f GiB without (%d layers x %.1f KiB a token, "
        "head %.2f GiB, the rest %.2f GiB), %.2f GiB with, and %.0f %% of %.2f GiB free may be used",
        "off" if fits else "non_reentrant",
        num_tokens,
        memory.total_bytes / GIB,
        memory.num_layers,
        memory.layer_bytes / 1024,
        memory.head_bytes / GIB,
        (memory.total_bytes - memory.activation_bytes - memory.head_bytes) / GIB,
        memory.checkpointed_bytes / GIB,
        100 * USABLE_SHARE,
        free / GIB,
    )
    return "off" if fits else "non_reentrant"


def out_of_memory(model: Any, train: TrainConfig, stage: int, num_ranks: int, recomputes: bool) -> OutOfMemory:
    """The error of a training that ran out of memory: what a step takes by prediction, and what to change, best first.

    Args:
        model: the policy's `PeftModel`.
        train: its configuration. stage: ZeRO's. num_ranks: of the training.
        recomputes: whether gradient checkpointing was on.
    """
    memory = predict_step_memory(model, train.max_tokens, zero_stage=stage)
    kept = memory.num_tokens * memory.num_layers * memory.checkpoint_bytes if recomputes else memory.activation_bytes
    remedies = [f"train.max_tokens={train.max_tokens // 2} (same result)"]
    if not recomputes:
        remedies.insert(0, "train.gradient_checkpointing=non_reentrant (same result, a third slower)")
    if stage < 3:
        remedies.append("train.zero_stage=3" + ("" if num_ranks > 1 else " on several GPUs"))
    if train.offload != "all":
        remedies.append(f"train.offload={'all' if stage == 3 else 'optimizer with train.zero_stage=1'}")
    return OutOfMemory(
        f"a training step ran out of memory. By prediction a forest of train.max_tokens={train.max_tokens} tokens takes "
        f"{kept / GIB:.2f} GiB of activations, {memory.head_bytes / GIB:.2f} GiB at the output head, "
        f"{memory.num_tokens * memory.working_bytes / GIB:.2f} GiB of working memory and "
        f"{memory.fixed_bytes / GIB:.2f} GiB beside them, and the base comes on top. Try, in this order: "
        f"{'; '.join(remedies[:3])}"
    )


def _linear_bytes(backbone: torch.nn.Module, size: int, keeps_inputs: bool) -> Iterator[float]:
    """What every linear layer of the decoder adds, per token: its adapters, and its input once for all that read it."""
    seen: set[str] = set()
    for name, module in backbone.named_modules():
        parent, _, kind = name.rpartition(".")
        adapters = getattr(module, "lora_A", None)
        inside_adapter = kind == "base_layer" or ".lora_" in name
        if adapters is None and (not keeps_inputs or inside_adapter or type(module) is not torch.nn.Linear):
            continue
        recast = True
        if adapters is not None:
            active = [adapters[name] for name in module.active_adapters if name in adapters]
            yield sum(4 * adapter.out_features for adapter in active)
            recast = size == 4 or not module.cast_input_dtype_enabled
            if not recast:
                yield 4 * module.in_features
        shared = f"{parent}.{SHARED_INPUT.get(kind, kind)}"
        if (recast or keeps_inputs) and shared not in seen and kind != KEPT_ANYWAY:
            seen.add(shared)
            yield size * module.in_features
