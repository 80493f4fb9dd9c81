"""Greedy decoding of whole chains through `model.generate`, each row stopped where its chain ends.

Row b of a batch stops when its own chain ends (`chain` says when), whatever the other rows do. A row's tokens do not
depend on the batch it is in beyond floating-point noise: rows are padded on the left and masked. The shared few-shot
prompt is computed anew for every row; nothing is sampled. This is the path for throughput; for one question at a time
see `line_by_line`.
"""

import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from cpo_fast.evaluate.chain import Chain, ChainReader
from cpo_fast.tasks import Task


class ChainEnd(StoppingCriteria):
    """Hands every row's new token to its reader and tells `generate` which rows are done."""

    def __init__(self, readers: Sequence[ChainReader], eos_ids: set[int]) -> None:
        self._readers = readers
        self._eos_ids = eos_ids

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """Read the newest column of `input_ids` [B, L] int64; return which rows are done, [B] bool."""
        for reader, token in zip(self._readers, input_ids[:, -1].tolist(), strict=True):
            if reader.stop is None and token in self._eos_ids:
                reader.end_sequence()
            elif reader.stop is None:
                reader.add(token)
        return torch.tensor([reader.stop is not None for reader in self._readers], device=input_ids.device)


def greedy_chains(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[list[int]],
    task: Task,
    max_new_tokens: int,
    max_steps: int,
    batch_size: int = 1,
) -> Iterator[Chain]:
    """Yield one greedy chain per prompt, in order, a batch at a time.

    Before the first batch one token is generated and thrown away: what a first call pays once is no question's cost.

    Args:
        model: a causal language model in eval mode, from `load_model`.
        tokenizer: its tokenizer.
        prompts: token ids of each prompt, none empty.
        task: says what an answer line is.
        max_new_tokens: cap on one chain.
        max_steps: cap on its lines, the answer line included.
        batch_size: prompts per call of `generate`.

    Raises:
        ValueError: a cap or the batch size is below 1, or a prompt is empty.
    """
    if min(max_new_tokens, max_steps, batch_size) < 1:
        raise ValueError(f"expected caps and batch size >= 1, got {max_new_tokens=}, {max_steps=}, {batch_size=}")
    if not all(prompts):
        raise ValueError("expected prompts of at least one token, got an empty one")
    if prompts:
        _generate(model, tokenizer, prompts[:1], task, 1, max_steps)
    for start in range(0, len(prompts), batch_size):
        yield from _generate(model, tokenizer, prompts[start : start + batch_size], task, max_new_tokens, max_steps)


def _generate(
    model: Any, tokenizer: Any, prompts: Sequence[list[int]], task: Task, max_new_tokens: int, max_steps: int
) -> list[Chain]:
    eos_ids = _eos_ids(model, tokenizer)
    # masked positions never reach a result, so any valid id serves as padding
    pad_id = next((token for token in (tokenizer.pad_token_id, *sorted(eos_ids)) if token is not None), 0)
    readers = [ChainReader(tokenizer, task, max_steps, max_new_tokens) for _ in prompts]
    start = time.perf_counter()
    longest = max(map(len, prompts))
    input_ids = torch.tensor([[pad_id] * (longest - len(prompt)) + prompt for prompt in prompts])  # [B, L] int64
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])  # [B, L] int64
    model.generate(
        input_ids=input_ids.to(model.device),
        attention_mask=mask.to(model.device),
        generation_config=GenerationConfig(
            do_sample=False,
            num_beams=1,
            max_new_tokens=max_new_tokens,
            pad_token_id=pad_id,
            eos_token_id=sorted(eos_ids) or None,
        ),
        stopping_criteria=StoppingCriteriaList([ChainEnd(readers, eos_ids)]),
    )
    seconds = (time.perf_counter() - start) / len(prompts)
    return [reader.chain(seconds) for reader in readers]


def _eos_ids(model: Any, tokenizer: Any) -> set[int]:
    """The tokenizer's end-of-sequence and whatever the model's generation config adds (chat models name several)."""
    named = model.generation_config.eos_token_id
    ids = set(named if isinstance(named, list) else [named]) | {tokenizer.eos_token_id}
    return {token for token in ids if token is not None}
