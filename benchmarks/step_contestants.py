"""One DPO step in three ways over one model: packed, as padded rows, and by TRL's DPOTrainer.

All have the same random weights, the same LoRA adapter, the same dtype and the same checkpointing; the reference is the
model with its adapter off. A contestant's step runs over micro-batches and leaves the gradient of the mean loss of the
step's pairs.
"""

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.listed_dataset import stand_in_for_datasets
from benchmarks.train_step import BETA, lora_config, randomize_adapter
from benchmarks.workload import Pair, sequences_of
from cpo_kernels import preference_loss
from cpo_kernels.integrations.lora import fuse_lora, keep_input_dtype
from cpo_kernels.integrations.transformers import packed_logps, prepare
from cpo_kernels.integrations.transformers.fused import fuse_layers

LLAMA_2_7B = {
    "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 32, "max_position_embeddings": 4096,
}  # fmt: skip
TINY_LLAMA = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "initializer_range": 0.2,
}  # fmt: skip
CHECKPOINTING = {"use_reentrant": False}  # what both libraries use by default

Loss = Callable[[Sequence[Pair]], torch.Tensor]


@dataclass(frozen=True)
class StepContestant:
    """A model and the sum of the losses of some pairs."""

    model: nn.Module
    loss: Loss

    def step(self, micro_batches: Sequence[Sequence[Pair]]) -> float:
        """Forward and backward of all micro-batches; returns the mean loss of the pairs."""
        self.model.zero_grad(set_to_none=True)
        num_pairs = sum(map(len, micro_batches))
        total = 0.0
        for pairs in micro_batches:
            loss = self.loss(pairs) / num_pairs
            loss.backward()
            total += loss.detach()
        return float(total)

    def gradient(self) -> torch.Tensor:
        """Every adapter gradient as one float32 vector on the CPU, in the order of names."""
        trained = sorted((name, p) for name, p in self.model.named_parameters() if p.requires_grad)
        return torch.cat([parameter.grad.float().flatten().cpu() for _, parameter in trained])


def random_model(shape: dict[str, Any], num_layers: int, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """A Llama with random weights, made on the device; the same weights at every call."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(**(shape | {"num_hidden_layers": num_layers, "pad_token_id": 0}))
    torch.manual_seed(0)
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    return model.to(device).train()


def packed(
    base: nn.Module, checkpointing: bool, reference: dict[tuple[int, ...], float] | None = None
) -> StepContestant:
    """Our step. `reference` holds cached reference log-probs by `sequence_key`; None computes them online."""
    from peft import get_peft_model

    model = prepare(_with_adapter(get_peft_model(base, lora_config()), checkpointing))
    keep_input_dtype(model)  # as training does
    fuse_layers(model)
    fuse_lora(model)

    def loss(pairs: Sequence[Pair]) -> torch.Tensor:
        sequences, starts = sequences_of(list(pairs))
        out = packed_logps(model, sequences, starts, reference="adapter_off" if reference is None else None)
        logps, fixed = out.segment_logps, out.ref_segment_logps
        if reference is not None:
            known = [reference[sequence_key(ids, start)] for ids, start in zip(sequences, starts, strict=True)]
            fixed = torch.tensor(known, device=logps.device)
        return preference_loss(logps[0::2], logps[1::2], fixed[0::2], fixed[1::2], beta=BETA).losses.sum()

    return StepContestant(model, loss)


def sequence_key(ids: Sequence[int], start: int) -> tuple[int, ...]:
    """What a cached reference log-prob belongs to."""
    return (start, *ids)


def cached_reference(
    contestant: StepContestant, micro_batches: Sequence[Sequence[Pair]]
) -> dict[tuple[int, ...], float]:
    """Reference log-probs of all sequences of a packed contestant's micro-batches."""
    found: dict[tuple[int, ...], float] = {}
    with torch.no_grad():
        for pairs in micro_batches:
            sequences, starts = sequences_of(list(pairs))
            out = packed_logps(contestant.model, sequences, starts, reference="adapter_off")
            assert out.ref_segment_logps is not None
            keys = map(sequence_key, sequences, starts)
            found |= dict(zip(keys, out.ref_segment_logps.tolist(), strict=True))
    return found


def padded(base: nn.Module, checkpointing: bool) -> StepContestant:
    """Right-padded rows through the stock model, causal attention without a mask, head on the responses' rows only."""
    from peft import get_peft_model

    model = _with_adapter(get_peft_model(base, lora_config()), checkpointing)
    causal_lm = model.get_base_model()

    def logps(pairs: Sequence[Pair]) -> torch.Tensor:
        sequences, starts = sequences_of(list(pairs))
        device = causal_lm.device
        rows = nn.utils.rnn.pad_sequence([torch.tensor(ids) for ids in sequences], batch_first=True).to(device)
        hidden = causal_lm.model(input_ids=rows, use_cache=False).last_hidden_state
        place = [(row, at) for row, start in enumerate(starts) for at in range(start, len(sequences[row]))]
        row, at = torch.tensor(place, device=device).T
        losses = F.cross_entropy(causal_lm.lm_head(hidden[row, at - 1]).float(), rows[row, at], reduction="none")
        return torch.zeros(len(sequences), device=device).index_add(0, row, -losses)

    def loss(pairs: Sequence[Pair]) -> torch.Tensor:
        with torch.no_grad(), model.disable_adapter():
            fixed = logps(pairs)
        ratio = logps(pairs) - fixed
        return -F.logsigmoid(BETA * (ratio[0::2] - ratio[1::2])).sum()

    return StepContestant(model, loss)


def trl(base: nn.Module, checkpointing: bool) -> StepContestant:
    """The installed DPOTrainer's own collator and compute_loss, its fused head on, as it ships.

    Raises:
        ImportError: TRL is not installed.
    """
    stand_in_for_datasets()
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    device = base.device
    with tempfile.TemporaryDirectory() as scratch:
        trainer = DPOTrainer(
            model=base,
            args=DPOConfig(
                output_dir=scratch, use_cpu=device.type == "cpu", bf16=False, beta=BETA, max_length=None,
                gradient_checkpointing=checkpointing, gradient_checkpointing_kwargs=CHECKPOINTING,
                per_device_train_batch_size=1, report_to=[], disable_tqdm=True, save_strategy="no",
            ),
            train_dataset=Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}]),
            processing_class=three_word_tokenizer(),
            peft_config=lora_config(),
        )  # fmt: skip
    _with_adapter(trainer.model, checkpointing)

    def loss(pairs: Sequence[Pair]) -> torch.Tensor:
        keys = ("prompt_ids", "chosen_ids", "rejected_ids")
        batch = trainer.data_collator([dict(zip(keys, pair, strict=True)) for pair in pairs])
        inputs = {name: value.to(device) for name, value in batch.items()}
        return trainer.compute_loss(trainer.model, inputs) * len(pairs)  # TRL's is the mean

    return StepContestant(trainer.model, loss)


def _with_adapter(model: Any, checkpointing: bool) -> Any:
    """The same adapter in every contestant, and checkpointing as asked."""
    randomize_adapter(model)
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable(CHECKPOINTING)
    else:
        model.gradient_checkpointing_disable()
    return model


def three_word_tokenizer() -> Any:
    """What the trainer's constructor wants to see; the benchmark's batches are token ids already."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 1, "a": 2, "b": 3, "c": 4, "?": 5}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="?")
