"""What the tests of the engines share: small models, prompts that fork, requests, searches of two levels."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from transformers import (
    GemmaConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)
from transformers.modeling_utils import PreTrainedModel

from cpo_fast.config import SearchConfig
from cpo_fast.search.engine import Answer, Engine, Requests, SampleRequest, ScoreRequest, Search
from cpo_fast.search.engine.kv_arena import KVArena
from tests.search.tiny_llama import build_tokenizer
from tests.tiny import randomize_lora, tiny_model, with_lora

Ids = tuple[int, ...]
Outcomes = dict[str, Any]  # of searches, by name: a result or the exception that ended it

TOKENIZER = build_tokenizer()
VOCAB_SIZE = len(TOKENIZER)
NEWLINES = TOKENIZER.convert_tokens_to_ids(["\n", "\n\n"])
BOS, EOS = 1, 2
CONFIG_CLASSES = {
    "llama": LlamaConfig,
    "mistral": MistralConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
    "gemma": GemmaConfig,
    "granite": GraniteConfig,
}


def engine_config(**changes: Any) -> SearchConfig:
    """Everything in one decode batch and prompts in several forwards, unless `changes` say otherwise."""
    return SearchConfig(**{"batch_size": 64, "arena_tokens": 4096, "prefill_tokens": 64, **changes})


def small_model(
    name: str = "llama", heads: tuple[int, int] = (4, 2), initializer_range: float = 0.4, **changes: Any
) -> PreTrainedModel:
    """Two layers with the vocabulary of TOKENIZER; `heads` of queries and of keys."""
    shape = {"intermediate_size": 64, "head_dim": 8, "num_attention_heads": heads[0], "num_key_value_heads": heads[1]}
    if name == "mistral":
        shape["sliding_window"] = None
    shape |= {"vocab_size": VOCAB_SIZE, "initializer_range": initializer_range, **changes}
    return tiny_model(CONFIG_CLASSES[name], seed=1, **shape)


def with_adapter(model: PreTrainedModel) -> PeftModel:
    """The model under an adapter on its attention that changes most of what it says."""
    adapted = with_lora(model, targets=("q_proj", "k_proj", "v_proj"))
    randomize_lora(adapted, std=0.3)
    return adapted


def forked_prompts(seed: int, num_groups: int = 3, num_shared: int = 70) -> tuple[Ids, list[Ids]]:
    """What all prompts begin with, and ragged prompts that fork from it at several depths."""
    generator = np.random.default_rng(seed)

    def draw(count: int) -> Ids:
        return tuple(int(token) for token in generator.integers(3, VOCAB_SIZE, count))

    few_shot = draw(num_shared)
    prompts = []
    for _ in range(num_groups):
        question = few_shot + draw(int(generator.integers(1, 20)))
        prompts.append(question)
        for _ in range(2):
            state = question + draw(int(generator.integers(1, 12)))
            prompts.extend([state, state + draw(5), state + draw(3)])
    return few_shot, prompts


def greedy(prompts: Sequence[Ids], **changes: Any) -> list[SampleRequest]:
    """One greedy request a prompt, of up to 12 tokens."""
    values = {"temperature": 0.0, "top_p": 1.0, "max_new_tokens": 12, **changes}
    return [SampleRequest(prompt, "greedy", **values) for prompt in prompts]


def sampled(prompts: Sequence[Ids], copies: int = 2, **changes: Any) -> list[SampleRequest]:
    """Requests of up to 12 tokens at temperature 0.9, `copies` a prompt."""
    values = {"temperature": 0.9, "top_p": 1.0, "max_new_tokens": 12, **changes}
    return [SampleRequest(prompt, f"{n}/{i}", **values) for n, prompt in enumerate(prompts) for i in range(copies)]


def ask(
    engine: Engine, requests: Sequence[SampleRequest | ScoreRequest], few_shot: Ids = (), keep: bool = True
) -> list[Any]:
    """The engine's answers, `few_shot` cached before."""
    engine.cache_prefix(few_shot)
    answers: list[Answer] = engine.answer(Requests(tuple(requests), keep))
    return answers


def generated(model: PreTrainedModel, prompt: Ids, count: int = 12, **options: Any) -> Ids:
    """The line that `generate` writes greedily, cut as an engine cuts it: after a newline, before end-of-sequence."""
    ids = torch.tensor([prompt], device=model.device)
    output = model.generate(input_ids=ids, max_new_tokens=count, do_sample=False, pad_token_id=0, **options)
    new = tuple(output[0, len(prompt) :].tolist())
    for place, token in enumerate(new):
        if token in NEWLINES:
            return new[: place + 1]
        if token == EOS:
            return new[:place]
    return new


def two_level_searches(prompts: Sequence[Ids]) -> list[tuple[str, Search[list[list[Answer]]]]]:
    """A search a prompt: samples, then scores of what they wrote, then samples below them, then scores of those."""

    def search(prompt: Ids) -> Search[list[list[Answer]]]:
        first = yield Requests(tuple(sampled([prompt])), keep=True)
        states = [prompt + sample.token_ids for sample in first if sample.token_ids]
        scores = yield Requests(tuple(ScoreRequest(state, ((5,), (6, 7))) for state in states), keep=False)
        last = yield Requests(tuple(sampled(states)), keep=True)
        below = [states[place // 2] + sample.token_ids for place, sample in enumerate(last) if sample.token_ids]
        last_scores = yield Requests(tuple(ScoreRequest(state, ((5,), (6, 7))) for state in below), keep=False)
        return [first, scores, last, last_scores]

    return [(str(number), search(prompt)) for number, prompt in enumerate(prompts)]


def run_searches_of(engine: Engine, few_shot: Ids, prompts: Sequence[Ids]) -> Outcomes:
    """What `two_level_searches` end with, by name."""
    engine.cache_prefix(few_shot)
    return {name: result for name, result, _ in engine.run(two_level_searches(prompts))}


def num_free_slots(arena: KVArena) -> int:
    """KV slots that are free: as many as can be taken one by one."""
    taken = []
    while (slot := arena.allocate(1)) is not None:
        taken.append(slot)
    for slot in taken:
        arena.release(slot, 1)
    return len(taken)
