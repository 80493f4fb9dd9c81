"""Pretrain a reasoner from scratch: `python examples/reasoner/pretrain.py OUT`.

A Llama of five layers (605,088 parameters for `plain`) learns the documents of `corpus.py`, drawn while it trains. The
loss is the weighted mean cross-entropy of their tokens plus that of an auxiliary head: a linear layer on the third layer's
output that tells of every digit of a judged value whether it is right. Without it the labels are learned much later than
the arithmetic. The head is thrown away.

One thread, float32, fixed seeds: the same command gives the same weights on the same machine and torch. OUT gets the
model, its tokenizer and `pretrain.json` with the settings and what was measured on the way.
"""

import argparse
import json
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from corpus import EOS, IMPOSSIBLE, LIKELY, PAD, VARIANTS, Variant, Vocabulary, document, draw_question, gold, judged
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WIDTH, LAYERS, HEADS = 96, 5, 4
MAX_POSITIONS = 256  # a document is 20-150 tokens
BATCH = 32  # documents a step
JUDGED_SHARE = 0.6  # judging is the harder half
LEARNING_RATE, BETAS, WEIGHT_DECAY, MAX_NORM = 2e-3, (0.9, 0.98), 0.01, 1.0
WARMUP_STEPS, DECAY_STEPS, LAST_RATE = 100, 400, 0.05  # the rate rises linearly, stays, and falls linearly to 5 %
AUXILIARY_LAYER, AUXILIARY_WEIGHT = 3, 1.0
REPORT_EVERY, SAVE_EVERY = 100, 500


def make_tokenizer(vocabulary: Vocabulary) -> PreTrainedTokenizerFast:
    """The vocabulary as a Hugging Face tokenizer. It adds no special tokens."""
    inner = Tokenizer(models.WordLevel(vocabulary.ids, unk_token=PAD))
    # the pattern of Python's re escapes spaces, which the tokenizer's expressions do not know
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(vocabulary.pattern.replace("\\ ", " ")), "isolated")
    inner.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token=EOS, pad_token=PAD, clean_up_tokenization_spaces=False
    )


def make_model(vocabulary: Vocabulary) -> LlamaForCausalLM:
    """The untrained model, drawn from torch's global generator."""
    config = LlamaConfig(
        vocab_size=len(vocabulary.words),
        hidden_size=WIDTH,
        intermediate_size=3 * WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=vocabulary.ids[EOS],
        pad_token_id=vocabulary.ids[PAD],
        attn_implementation="sdpa",
    )
    return LlamaForCausalLM(config).train()


def take_over(model: LlamaForCausalLM, start: Path) -> None:
    """Give a model the weights of another one whose vocabulary is the beginning of its own. New tokens stay as drawn."""
    ours = model.state_dict()
    with torch.no_grad():
        for name, weight in LlamaForCausalLM.from_pretrained(start).state_dict().items():
            ours[name][: len(weight)] = weight  # only embedding and head have more rows


def draw_batch(
    rng: random.Random, vocabulary: Vocabulary, variants: Sequence[Variant]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Token ids, weights in the loss and soundness (see `corpus.Part`) of a batch of documents, each `[BATCH, T]`."""
    rows = []
    for _ in range(BATCH):
        parts = document(rng, variants, JUDGED_SHARE)
        tokens = [(token, part.weight, part.sound) for part in parts for token in vocabulary.encode(part.text)]
        rows.append(tokens)
    longest = max(map(len, rows))
    padding = (vocabulary.ids[PAD], 0.0, -1.0)
    ids, weights, sound = zip(
        *(zip(*(row + [padding] * (longest - len(row))), strict=True) for row in rows), strict=True
    )
    return torch.tensor(ids), torch.tensor(weights), torch.tensor(sound)


def step_loss(
    model: LlamaForCausalLM, head: torch.nn.Linear, ids: torch.Tensor, weights: torch.Tensor, sound: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The language model's loss and the auxiliary one, of a batch as `draw_batch` gives it."""
    output = model(ids, use_cache=False, output_hidden_states=True)
    logits = output.logits[:, :-1]
    losses = cross_entropy(logits.reshape(-1, logits.shape[-1]), ids[:, 1:].reshape(-1), reduction="none")
    factors = weights[:, 1:].reshape(-1)
    told = sound >= 0
    scores = head(output.hidden_states[AUXILIARY_LAYER][told]).squeeze(-1)
    return (losses * factors).sum() / factors.sum(), binary_cross_entropy_with_logits(scores, sound[told])


@torch.no_grad()
def label_accuracy(
    model: LlamaForCausalLM, vocabulary: Vocabulary, variant: Variant, rng: random.Random, num_documents: int = 256
) -> dict[str, float]:
    """The share of judged documents whose last label is right, for each label."""
    documents = []
    for _ in range(num_documents):
        documents.append([token for part in judged(rng, variant) for token in vocabulary.encode(part.text)])
    longest = max(map(len, documents))
    ids = torch.tensor([tokens + [vocabulary.ids[PAD]] * (longest - len(tokens)) for tokens in documents])
    model.eval()
    logits = model(ids).logits
    model.train()
    likely, impossible = vocabulary.ids[LIKELY], vocabulary.ids[IMPOSSIBLE]
    found: dict[str, list[bool]] = {"likely": [], "impossible": []}
    for row, tokens in enumerate(documents):
        says_likely = bool(logits[row, len(tokens) - 2, likely] > logits[row, len(tokens) - 2, impossible])
        is_likely = tokens[-1] == likely
        found["likely" if is_likely else "impossible"].append(says_likely == is_likely)
    return {label: round(sum(right) / max(1, len(right)), 3) for label, right in found.items()}


@torch.no_grad()
def chain_accuracy(
    model: LlamaForCausalLM, vocabulary: Vocabulary, variant: Variant, instruction: str, num_questions: int = 200
) -> float:
    """The share of questions (of the corpus' part) that a greedy chain answers right after an instruction.

    After the judge's instruction it says whether the model can calculate at all.
    """
    rng = random.Random(1)
    questions = [draw_question(rng, variant, evaluation=False) for _ in range(num_questions)]
    ids = torch.tensor([vocabulary.encode(f"{instruction}\n\nQuestion: {question}\n") for question in questions])
    model.eval()
    output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=96, do_sample=False)
    model.train()
    texts = [vocabulary.decode(row[ids.shape[1] :]) for row in output.tolist()]
    right = [f"Answer: {gold(question)}\n" in text for question, text in zip(questions, texts, strict=True)]
    return round(sum(right) / len(right), 3)


def rate_at(step: int, num_steps: int) -> float:
    """The learning rate of a step (1, 2, ...)."""
    fall = max(0.0, (step - (num_steps - DECAY_STEPS)) / DECAY_STEPS)
    return LEARNING_RATE * (min(1.0, step / WARMUP_STEPS) * (1.0 - (1.0 - LAST_RATE) * fall))


def pretrain(out: Path, names: Sequence[str], num_steps: int, seed: int, start: Path | None) -> None:
    """Train and write the model to `out`, every `SAVE_EVERY` steps and at the end. Prints what it measures.

    Args:
        out: a folder that exists. names: of the variants. start: a model of the first of them to go on from.
    """
    torch.set_num_threads(1)  # the order of sums, and with it the bits, depends on it
    torch.manual_seed(seed)
    rng, label_rng = random.Random(seed), random.Random(10_000 + seed)
    variants = [VARIANTS[name] for name in names]
    vocabulary = Vocabulary(variants)
    model = make_model(vocabulary)
    if start is not None:
        take_over(model, start)
    head = torch.nn.Linear(WIDTH, 1)
    parameters = [*model.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, betas=BETAS, weight_decay=WEIGHT_DECAY)
    record: dict[str, Any] = {
        "variants": list(names),
        "start": None if start is None else start.name,
        "seed": seed,
        "steps": num_steps,
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "torch": torch.__version__,
    }
    log: list[dict[str, Any]] = []
    started = time.perf_counter()
    for step in range(1, num_steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = rate_at(step, num_steps)
        loss, auxiliary_loss = step_loss(model, head, *draw_batch(rng, vocabulary, variants))
        (loss + AUXILIARY_WEIGHT * auxiliary_loss).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % REPORT_EVERY == 0 or step == num_steps:
            entry: dict[str, Any] = {"step": step, "loss": round(float(loss.detach()), 4)}
            entry["auxiliary_loss"] = round(float(auxiliary_loss.detach()), 4)
            for name, variant in zip(names, variants, strict=True):
                entry[name] = {"labels": label_accuracy(model, vocabulary, variant, label_rng)}
                if step % SAVE_EVERY == 0 or step == num_steps:
                    for mode, instruction in (("solve", variant.solve), ("judge", variant.judge)):
                        entry[name][mode] = chain_accuracy(model, vocabulary, variant, instruction)
            log.append(entry)
            print(json.dumps({**entry, "seconds": round(time.perf_counter() - started)}), flush=True)
        if step % SAVE_EVERY == 0 or step == num_steps:
            model.save_pretrained(out)
            make_tokenizer(vocabulary).save_pretrained(out)
            seconds = round(time.perf_counter() - started)
            lines = ",\n".join(f"  {json.dumps(entry)}" for entry in log)
            settings = json.dumps({**record, "steps_done": step, "seconds": seconds}, indent=1)
            (out / "pretrain.json").write_text(f'{settings[:-2]},\n "log": [\n{lines}\n ]\n}}\n', encoding="utf-8")


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=2200)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=["plain"])
    parser.add_argument("--start", type=Path, help="the folder of a model of the first variants, to go on from")
    settings = parser.parse_args()
    settings.out.mkdir(parents=True, exist_ok=True)
    pretrain(settings.out, settings.variants, settings.steps, settings.seed, settings.start)


if __name__ == "__main__":
    main()
