"""A greedy chain: generated line by line through the search engine or in batches by `generate`, read token by token.

A chain is lines, `Step 1: ...` to `Answer: ...`. It ends with

    answer          the line that starts with `Answer:` is complete
    eos             the model ends the sequence
    question        it has run on into another question (no answer comes of that)
    max_steps       so many lines are complete and none is an answer
    max_new_tokens  so many tokens are generated

`ChainReader` decides that for both ways of generating. `engine_chain` asks the engine that grows the trees, so that
seconds of a chain and of a tree compare. `greedy_chains` calls `model.generate` on batches, for throughput.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from cpo_fast.search.engine import Engine, Requests, Sample, SampleRequest
from cpo_fast.tasks import Task

Stop = Literal["answer", "eos", "question", "max_steps", "max_new_tokens"]


@dataclass(frozen=True)
class Chain:
    """One generated chain."""

    text: str
    token_ids: tuple[int, ...]  # as generated, an end-of-sequence left out
    stop: Stop
    seconds: float  # wall time, of a row of a batch the batch's divided by its rows

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids) + (self.stop == "eos")  # an end-of-sequence was generated too

    def answer(self, task: Task) -> str | None:
        """The normalised answer if the chain reached a complete answer line, else None."""
        if self.stop not in ("answer", "eos"):
            return None  # a cap may have cut the number in half
        lines = [line for line in self.text.split("\n") if task.is_answer_line(line)]
        return task.parse_answer(lines[0]) if lines else None


class ChainReader:
    """Takes the tokens of one chain as they are generated.

    Args:
        tokenizer: turns ids into text. task: says what an answer line is.
        max_steps, max_new_tokens: caps on the lines, the answer line included, and on the tokens.

    Attributes:
        token_ids: the ids so far.
        stop: why the chain has ended, None while it has not.
    """

    def __init__(self, tokenizer: Any, task: Task, max_steps: int, max_new_tokens: int) -> None:
        self.token_ids: list[int] = []
        self.stop: Stop | None = None
        self._tokenizer = tokenizer
        self._task = task
        self._max_steps = max_steps
        self._max_new_tokens = max_new_tokens

    def add(self, token: int) -> None:
        """Take one more token, which is no end-of-sequence."""
        assert self.stop is None, "a token after the end of its chain"
        self.token_ids.append(token)
        # only a token with a newline can complete a line, so the whole text is decoded once per line
        if "\n" in self._decode([token]):
            self.stop = self._stop_at_newline()
        if self.stop is None and len(self.token_ids) >= self._max_new_tokens:
            self.stop = "max_new_tokens"

    def end_sequence(self) -> None:
        assert self.stop is None, "an end-of-sequence after the end of its chain"
        self.stop = "eos"

    def chain(self, seconds: float) -> Chain:
        assert self.stop is not None, "the chain has not ended"
        text = self._decode(self.token_ids)
        if self.stop in ("answer", "question", "max_steps"):
            # the token that brought the newline may go on after it
            text = text[: text.rindex("\n") + 1]
        return Chain(text, tuple(self.token_ids), self.stop, seconds)

    def _stop_at_newline(self) -> Stop | None:
        lines = [line for line in self._decode(self.token_ids).split("\n")[:-1] if line.strip()]
        if any(self._task.is_answer_line(line) for line in lines):
            return "answer"
        if any(self._task.leaves_question(line) for line in lines):
            return "question"
        return "max_steps" if len(lines) >= self._max_steps else None

    def _decode(self, token_ids: list[int]) -> str:
        text: str = self._tokenizer.decode(token_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text


def engine_chain(
    engine: Engine, tokenizer: Any, prompt: Sequence[int], task: Task, max_new_tokens: int, max_steps: int
) -> Chain:
    """One greedy chain after `prompt`, at least one token id. The caps are as for `ChainReader`.

    Raises:
        ValueError: a cap is below 1. From the engine, a prompt that does not fit the model, or logits not finite.
    """
    if min(max_new_tokens, max_steps) < 1:
        raise ValueError(f"expected caps >= 1, got {max_new_tokens=}, {max_steps=}")
    start = time.perf_counter()
    reader = ChainReader(tokenizer, task, max_steps, max_new_tokens)
    # line by line, because a request to an engine ends at a newline
    while reader.stop is None:
        state = (*prompt, *reader.token_ids)
        num_left = max_new_tokens - len(reader.token_ids)
        # greedy: no random number is drawn, so the name does not matter; kept, because the next line continues it
        (line,) = engine.answer(Requests((SampleRequest(state, "greedy", 0.0, 1.0, num_left),), keep=True))
        assert isinstance(line, Sample), "a request is answered by a sample"
        for token in line.token_ids:
            reader.add(token)
        if line.stop == "eos":
            reader.end_sequence()
    return reader.chain(time.perf_counter() - start)


class ChainEnd(StoppingCriteria):
    """Hands every row's new token to its reader and tells `generate` which rows are done."""

    def __init__(self, readers: Sequence[ChainReader], eos_ids: set[int]) -> None:
        self._readers = readers
        self._eos_ids = eos_ids

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """Read the newest column of `input_ids` [B, L] int64, and return which rows are done, [B] bool."""
        for reader, token in zip(self._readers, input_ids[:, -1].tolist(), strict=True):
            # a row that has ended is padded while others go on
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

    A row's tokens do not depend on its batch beyond floating-point noise.

    Args:
        model: a causal language model in eval mode, from `load_model`, with its tokenizer.
        prompts: token ids of each prompt, none empty.
        task, max_new_tokens, max_steps: as for `ChainReader`.
        batch_size: prompts per call of `generate`, which computes the few-shot prompt anew for every one.

    Raises:
        ValueError: a cap or the batch size is below 1, or a prompt is empty.
    """
    if min(max_new_tokens, max_steps, batch_size) < 1:
        raise ValueError(f"expected caps and batch size >= 1, got {max_new_tokens=}, {max_steps=}, {batch_size=}")
    if not all(prompts):
        raise ValueError("expected prompts of at least one token, got an empty one")
    if prompts:  # one token, thrown away: what a first call pays once is no question's cost
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
    # padded on the left, so that every row's next token follows its prompt
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
    # chat models name several ends in their generation config, and not always the tokenizer's
    named = model.generation_config.eos_token_id
    ids = set(named if isinstance(named, list) else [named]) | {tokenizer.eos_token_id}
    return {token for token in ids if token is not None}
