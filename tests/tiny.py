"""Models of a few thousand parameters, an offline tokenizer and preference pairs, made from seeds.

Every test builds its models here, so that a claim holds on the same weights everywhere. Weights are drawn wider than
a checkpoint's usual 0.02: with near-uniform attention a wrong mask hardly moves the loss. LoRA B is never zero unless
asked: at B = 0 every gradient into A vanishes, and policy equals reference whatever the code does.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, PreTrainedTokenizerFast
from transformers.modeling_utils import PreTrainedModel

if TYPE_CHECKING:
    from peft import PeftModel

Pair = tuple[list[int], list[int], list[int]]

VOCAB_SIZE = 97  # prime and no multiple of any block size
ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def tiny_model(
    config_class: type, seed: int = 0, dtype: torch.dtype = torch.float32, attention: str = "sdpa", **changes: Any
) -> PreTrainedModel:
    """A causal language model of `config_class` with SHAPE overridden by `changes`, random weights, eval mode."""
    config = config_class(**(SHAPE | changes))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    return model.to(dtype).eval()


def tiny_llama(seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> PreTrainedModel:
    """A two-layer Llama: 4 query heads, 2 key/value heads, hidden 32, vocabulary 97."""
    return tiny_model(LlamaConfig, seed, dtype, **changes)


def tiny_mistral(seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> PreTrainedModel:
    """A two-layer Mistral without a sliding window, as later releases of that model are."""
    return tiny_model(MistralConfig, seed, dtype, **({"sliding_window": None} | changes))


def randomize_lora(model: nn.Module, seed: int = 1, std: float = 0.1) -> None:
    """Fill every lora_A and lora_B of `model` from one generator, in the order of the sorted parameter names."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters(), key=lambda item: item[0]):
            if "lora_" in name:
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.copy_(std * noise)


def with_lora(
    model: PreTrainedModel,
    r: int = 4,
    targets: tuple[str, ...] = ALL_LINEAR,
    seed: int = 1,
    dropout: float = 0.0,
    zero_b: bool = False,
    **changes: Any,
) -> "PeftModel":
    """Wrap `model` by a LoRA adapter in the model's own dtype; A and B random, or B zero as PEFT leaves it."""
    dtype = next(model.parameters()).dtype
    from peft import LoraConfig, get_peft_model  # tests of kernels run where it is not installed

    config = LoraConfig(
        r=r, lora_alpha=2 * r, lora_dropout=dropout, target_modules=list(targets), task_type="CAUSAL_LM", **changes
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        peft_model = get_peft_model(model, config, autocast_adapter_dtype=False)
    peft_model.to(dtype)
    if not zero_b:
        randomize_lora(peft_model, seed)
    return peft_model.eval()


class ExactRMSNorm(nn.Module):
    """RMSNorm in the dtype of its input. The stock Llama and Mistral module computes in fp32 whatever it is given."""

    def __init__(self, weight: nn.Parameter, eps: float) -> None:
        super().__init__()
        self.weight = weight
        self.eps = eps

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[..., E] -> [..., E]: hidden / sqrt(mean(hidden^2) + eps) * weight."""
        return self.weight * hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + self.eps)


def with_exact_norms(model: nn.Module) -> nn.Module:
    """Replace every Llama or Mistral RMSNorm in place by ExactRMSNorm with the same weight."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child).__name__ in ("LlamaRMSNorm", "MistralRMSNorm"):
                setattr(parent, name, ExactRMSNorm(child.weight, child.variance_epsilon))
    return model


def tiny_tokenizer(directory: str | Path | None = None) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer without merges: any text is reversible, pad (0), bos (1) and eos (2) are all different.

    Bytes take ids 3 to 258, so a model needs vocab_size >= 259 (`len(tokenizer)`). Saved to `directory` if given.
    """
    specials = ["<pad>", "<bos>", "<eos>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(specials + alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", padding_side="left"
    )
    if directory is not None:
        tokenizer.save_pretrained(directory)
    return tokenizer


def save_tiny_model(directory: str | Path, seed: int = 0, **changes: Any) -> Path:
    """Write a tiny Llama and its tokenizer to `directory`, as `from_pretrained` reads them; returns the directory."""
    tokenizer = tiny_tokenizer(directory)
    model = tiny_llama(seed, **({"vocab_size": len(tokenizer)} | changes))
    model.save_pretrained(directory)
    return Path(directory)


def random_pairs(
    seed: int = 0,
    num_questions: int = 2,
    num_levels: int = 3,
    num_rejected: int = 2,
    few_shot_tokens: int = 9,
    question_tokens: tuple[int, int] = (3, 6),
    thought_tokens: tuple[int, int] = (1, 5),
    vocab_size: int = VOCAB_SIZE,
) -> list[Pair]:
    """Preference pairs of a chosen chain per question under one few-shot prompt: (prompt, chosen, rejected) ids.

    Siblings start with different tokens (a rejected thought never starts as the chosen one does): with an equal first
    token, wrongly dropped first-token supervision would cancel out of the loss and go unseen. Length ranges inclusive.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (1,), generator=generator))

    def ids(count: int) -> list[int]:
        return torch.randint(3, vocab_size, (count,), generator=generator).tolist()

    few_shot = ids(few_shot_tokens)
    pairs: list[Pair] = []
    for _ in range(num_questions):
        path = few_shot + ids(draw(*question_tokens))
        for _ in range(num_levels):
            firsts = (torch.randperm(vocab_size - 3, generator=generator)[: num_rejected + 1] + 3).tolist()
            thoughts = [[first, *ids(draw(*thought_tokens) - 1)] for first in firsts]
            pairs += [(list(path), thoughts[0], rejected) for rejected in thoughts[1:]]
            path += thoughts[0]
    return pairs
