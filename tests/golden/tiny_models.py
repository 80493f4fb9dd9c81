"""The models, tokenizers and adapters that the golden runs read, equal on every machine and for every version.

Weights are drawn from the raw words of NumPy's Philox generator and scaled by powers of two, so that no library's own
normal or uniform distribution decides a bit of them. Nothing here imports the product.

`talker` is a two-layer Llama that talks in the form the tasks expect. Ten of its hidden dimensions hold one constant and
the kind of the last token (end of a line, `Step`, `Answer:`, digit, ...); no layer writes there, so the head can prefer
what should follow: lines are steps or answers, answers are numbers, labels or words, verdicts are mostly readable. All
other dimensions are random, so that every choice also depends on the whole prompt. Trees get winners, ties, duplicates,
empty samples, lines that are cut and lines that run on into another question.

`babbler` is a two-layer Qwen2 (biases on q, k and v, tied embeddings) over single bytes without any such form: nearly
nothing it says can be read.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

SPECIALS = ["<unk>", "<s>", "</s>", "<|end|>", "<|user|>", "<|assistant|>"]
CUE = "? It is"  # how every evaluator prompt ends
VERDICTS = [" likely", " impossible"]
LABELS = [" SUPPORTS", " REFUTES", " NOT ENOUGH INFO"]
NAMES = [" yes", " no", " Paris", " the Rhine"]
ANSWERS = [*LABELS, *NAMES]
PIECES = ["Question:", "Claim:", "Answer:", "Step", CUE, *VERDICTS, *ANSWERS, "\n\n", "\n"]
# words of the demonstrations that are one token: fewer tokens, fewer seconds
_COMMON = (
    "a the is line last and in The was of It which each or born answer many solution country capital How English steps "
    "minutes does not it numbered that if on are question did has follows them then left into with what true she had "
    "who coast wrote to at her his from he for evening"
)
COMMON = _COMMON.split()
DIGITS = list("0123456789")
LETTERS = [chr(code) for first, last in ("az", "AZ") for code in range(ord(first), ord(last) + 1)]
SIGNS = list(" .,:;?!'\"()+-*/=$%<>|")
WORDS = [*SPECIALS, *PIECES, *(f" {word}" for word in COMMON), *DIGITS, *LETTERS, *SIGNS]

TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{% if m.role == 'assistant' %}<|end|>{% endif %}\n"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)

# the kinds of last token, and how often each kind of next token follows: shares, spread evenly over a kind's tokens
LINE_END, STEP, ANSWER, DIGIT, CUE_END, VERDICT, SAID, OTHER = range(8)
FOLLOWS: dict[int, list[tuple[Sequence[str], float]]] = {
    LINE_END: [(["Step"], 48), (["Answer:"], 40), (["\n"], 2), ([" "], 2), (["Question:", "Claim:"], 3), (["</s>"], 3)],
    STEP: [(["1", "2", "3"], 55), (["x", "y"], 25), ([" "], 10), (["\n"], 5), (["<|end|>"], 2)],
    ANSWER: [(["1", "2", "7"], 46), (LABELS, 30), (NAMES, 14), (["x", "y"], 5), (["\n"], 4), (["</s>", "<|end|>"], 3)],
    DIGIT: [(["\n"], 45), (DIGITS, 12), (["+", "=", ".", "x"], 32), (["</s>", "<|end|>"], 6)],
    CUE_END: [(VERDICTS, 80), (["x", " "], 14), (["\n"], 3)],
    VERDICT: [(["\n"], 52), (["."], 22), (VERDICTS, 8), (["</s>", "<|end|>"], 10)],
    SAID: [(["\n"], 58), ([".", ","], 14), (["</s>", "<|end|>"], 14), (ANSWERS, 6)],
    OTHER: [(["\n"], 38), (DIGITS, 22), (["a", "b", "x", "y"], 22), (["+", "="], 8), (["</s>"], 4)],
}
RARE = 1e-3  # share of everything else, in all

HIDDEN = 32
NUM_RESERVED = 2 + len(FOLLOWS)  # the constant, one dimension a kind, and one left free
CONSTANT, KIND = 0.5, 2.0  # what stands in the reserved dimensions
NORMED = 3.0  # about what the last norm makes of KIND
SHAPE = {
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def uniform_tensor(seed: int, shape: Sequence[int], bound: float) -> torch.Tensor:
    """Float32 numbers in [-bound, bound), exact on every machine; `bound` is a power of two."""
    words = numpy.random.Philox(key=[seed, 0]).random_raw(math.prod(shape)) >> numpy.uint64(42)  # 22 bits
    values = (words.astype(numpy.float64) / 2**21 - 1.0) * bound
    return torch.from_numpy(values.astype(numpy.float32)).reshape(*shape)


def talker_tokenizer() -> PreTrainedTokenizerFast:
    """Words of `WORDS`, everything else is `<unk>`; a beginning-of-sequence before plain text, and a chat template."""
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unk>"))
    pattern = "|".join([*(_escaped(piece) for piece in PIECES), f" (?:{'|'.join(COMMON)})(?![A-Za-z])", "."])
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.add_special_tokens(SPECIALS)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", chat_template=TEMPLATE
    )


def save_talker(folder: Path, answer_bonus: float = 0.0) -> None:
    """Write the talker and its tokenizer; two ids end its sequences.

    With an `answer_bonus` of 0.25 it would rather answer than write another step, so that greedy chains come to answers.
    """
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(WORDS), **SHAPE))
    _fill(model, seed=1, bound=0.5)
    kinds = [_kind(word) for word in WORDS]
    with torch.no_grad():
        embeddings, head = model.model.embed_tokens.weight, model.lm_head.weight
        embeddings[:, :NUM_RESERVED] = 0
        embeddings[:, 0] = CONSTANT
        for token, kind in enumerate(kinds):
            embeddings[token, 1 + kind] = KIND
        for layer in model.model.layers:
            for projection in (layer.self_attn.o_proj, layer.mlp.down_proj):
                projection.weight[:NUM_RESERVED] = 0
                projection.weight[NUM_RESERVED:] *= 0.0625
        head[:, NUM_RESERVED:] *= 0.5
        head[:, :NUM_RESERVED] = 0
        for kind, follows in FOLLOWS.items():
            head[:, 1 + kind] = _preferences(follows)
        head[WORDS.index("Answer:"), 1 + LINE_END] += answer_bonus
    model.generation_config = GenerationConfig(eos_token_id=[2, 3], bos_token_id=1, pad_token_id=0)
    _save(model, talker_tokenizer(), folder)


def save_babbler(folder: Path) -> None:
    """Write the babbler and its byte-level tokenizer."""
    specials = ["<unk>", "<s>", "</s>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={token: number for number, token in enumerate(specials + alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<unk>"
    )
    config = Qwen2Config(vocab_size=len(tokenizer), tie_word_embeddings=True, **{**SHAPE, "num_key_value_heads": 1})
    model = Qwen2ForCausalLM(config)
    _fill(model, seed=2, bound=0.5)
    _save(model, tokenizer, folder)


def save_adapter(model_folder: Path, folder: Path) -> None:
    """Write a LoRA adapter of `model_folder` whose A and B are both random: it changes what the model says."""
    model = get_peft_model(
        LlamaForCausalLM.from_pretrained(model_folder, dtype=torch.float32),
        LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM"),
    )
    with torch.no_grad():
        for seed, (name, parameter) in enumerate(sorted(model.named_parameters())):
            if "lora_" in name:
                bound = 0.25 if "lora_A" in name else 0.125
                parameter.copy_(uniform_tensor(100 + seed, parameter.shape, bound))
    model.save_pretrained(folder)


def _fill(model: PreTrainedModel, seed: int, bound: float) -> None:
    """Random matrices, one seed each in the order of their names; norms stay 1."""
    with torch.no_grad():
        for number, (name, parameter) in enumerate(sorted(model.named_parameters())):
            if "norm" not in name:
                parameter.copy_(uniform_tensor(1000 * seed + number, parameter.shape, bound))


def _save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    model.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _kind(word: str) -> int:
    if word in ("\n", "\n\n"):
        return LINE_END
    if word in DIGITS:
        return DIGIT
    if word in VERDICTS:
        return VERDICT
    if word in ANSWERS:
        return SAID
    return {"Step": STEP, "Answer:": ANSWER, CUE: CUE_END}.get(word, OTHER)


def _preferences(follows: Sequence[tuple[Sequence[str], float]]) -> torch.Tensor:
    """Logit of every word after one kind, as a column of the head; exact: rounded to 1/64."""
    shares = dict.fromkeys(WORDS, RARE)
    for words, share in follows:
        for word in words:
            shares[word] += share / 100 / len(words)
    logits = [math.log(share) / NORMED for share in shares.values()]
    return torch.tensor([round(64 * logit) / 64 for logit in logits])


def _escaped(piece: str) -> str:
    return piece.replace("?", r"\?").replace("\n", r"\n")
