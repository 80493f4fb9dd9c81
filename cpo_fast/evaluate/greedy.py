"""Greedy decoding of whole chains through `model.generate`, each row stopped where its chain ends.

A chain is lines, `Step 1: ...` to `Answer: ...`. Row b of a batch stops, whatever the other rows do, when

    answer          the line that starts with `Answer:` is complete
    eos             the model ends the sequence
    question        it has run on into another question (no answer comes of that)
    max_steps       so many lines are complete and none is an answer
    max_new_tokens  so many tokens are generated

A row's tokens do not depend on the batch it is in beyond floating-point noise: rows are padded on the left and masked.
The shared few-shot prompt is computed anew for every row; nothing is sampled.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from cpo_fast.tasks import Task

Stop = Literal["answer", "eos", "question", "max_steps", "max_new_tokens"]


@dataclass(frozen=True)
class Chain:
    """One generated chain.

    Attributes:
        text: the generated text, without an end-of-sequence token and without what a token holds past the last newline
            when a newline ended the chain.
        token_ids: every generated id, the one that stopped the chain included.
        stop: why generation ended; see the module's docstring.
        seconds: wall time of the row's batch divided by the rows in it.
    """

    text: str
    token_ids: tuple[int, ...]
    stop: Stop
    seconds: float

    def answer(self, task: Task) -> str | None:
        """The normalised answer if the chain reached a complete answer line, else None.

        A chain that a cap cut inside its answer line has none: its number may be half a number.
        """
        if self.stop not in ("answer", "eos"):
            return None
        lines = [line for line in self.text.split("\n") if task.is_answer_line(line)]
        return task.parse_answer(lines[0]) if lines else None


class ChainEnd(StoppingCriteria):
    """Collects every row's new tokens and decides, token by token, which rows are done and why."""

    def __init__(
        self, tokenizer: Any, task: Task, num_rows: int, eos_ids: set[int], max_steps: int, max_new_tokens: int
    ) -> None:
        self.token_ids: list[list[int]] = [[] for _ in range(num_rows)]
        self.stops: list[Stop | None] = [None] * num_rows
        self._tokenizer = tokenizer
        self._task = task
        self._eos_ids = eos_ids
        self._max_steps = max_steps
        self._max_new_tokens = max_new_tokens
        self._has_newline: dict[int, bool] = {}

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """Read the newest column of `input_ids` [B, L] int64; return which rows are done, [B] bool."""
        for row, token in enumerate(input_ids[:, -1].tolist()):
            if self.stops[row] is None:
                self.token_ids[row].append(token)
                self.stops[row] = self._stop(self.token_ids[row])
        return torch.tensor([stop is not None for stop in self.stops], device=input_ids.device)

    def text(self, row: int) -> str:
        """The text of row `row` so far, cut after its last newline if a newline ended it."""
        text = self._decode([token for token in self.token_ids[row] if token not in self._eos_ids])
        if self.stops[row] in ("answer", "question", "max_steps"):
            text = text[: text.rindex("\n") + 1]
        return text

    def _stop(self, token_ids: list[int]) -> Stop | None:
        token = token_ids[-1]
        if token in self._eos_ids:
            return "eos"
        if token not in self._has_newline:
            self._has_newline[token] = "\n" in self._decode([token])
        if self._has_newline[token]:
            # only a token with a newline can complete a line, so the whole text is decoded once per line
            lines = [line for line in self._decode(token_ids).split("\n")[:-1] if line.strip()]
            if any(self._task.is_answer_line(line) for line in lines):
                return "answer"
            if any(self._task.leaves_question(line) for line in lines):
                return "question"
            if len(lines) >= self._max_steps:
                return "max_steps"
        return "max_new_tokens" if len(token_ids) >= self._max_new_tokens else None

    def _decode(self, token_ids: list[int]) -> str:
        text: str = self._tokenizer.decode(token_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text


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
    end = ChainEnd(tokenizer, task, len(prompts), eos_ids, max_steps, max_new_tokens)
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
        stopping_criteria=StoppingCriteriaList([end]),
    )
    seconds = (time.perf_counter() - start) / len(prompts)
    chains = []
    for row, stop in enumerate(end.stops):
        assert stop is not None, "generate returned before every row was done"
        chains.append(Chain(end.text(row), tuple(end.token_ids[row]), stop, seconds))
    return chains


def _eos_ids(model: Any, tokenizer: Any) -> set[int]:
    """The tokenizer's end-of-sequence and whatever the model's generation config adds (chat models name several)."""
    named = model.generation_config.eos_token_id
    ids = set(named if isinstance(named, list) else [named]) | {tokenizer.eos_token_id}
    return {token for token in ids if token is not None}
