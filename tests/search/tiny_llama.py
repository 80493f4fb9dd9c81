"""A tiny random Llama and a small tokenizer, made on the spot: no files, no network."""

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

PIECES = ["Question:", "Answer:", "Step", " likely", " impossible", "\n", "\n\n", " ", ".", ",", ":", "$"]


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Words of `PIECES`, digits and letters; everything else is <unk>. Decoding joins pieces without spaces."""
    letters = [chr(code) for code in (*range(ord("a"), ord("z") + 1), *range(ord("A"), ord("Z") + 1))]
    words = ["<unk>", "<s>", "</s>", *PIECES, *"0123456789+-*/=?", *letters]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    pattern = "|".join([r"\n\n", *(piece.replace("$", r"\$").replace(".", r"\.") for piece in PIECES[:6]), "."])
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def build_byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte: any text can be read, and a model can write bytes that are no text."""
    specials = ["<unk>", "<s>", "</s>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={token: number for number, token in enumerate(specials + alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def build_model(
    vocab_size: int, bias: dict[int, float] | None = None, eos_token_id: int | None = 2, max_positions: int = 4096
) -> LlamaForCausalLM:
    """Two-layer Llama with grouped queries, random weights, float32; `bias` is added to the logits of these tokens."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=max_positions,
        initializer_range=0.4,  # wide enough that the next token depends on the whole prompt
        bos_token_id=1,
        eos_token_id=eos_token_id,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config).eval()
    head = torch.nn.Linear(32, vocab_size, bias=True)
    head.weight.data.copy_(model.lm_head.weight.data)
    head.bias.data.zero_()
    for token, value in (bias or {}).items():
        head.bias.data[token] = value
    model.lm_head = head
    return model
