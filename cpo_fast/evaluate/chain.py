"""One chain, greedy unless it is sampled: generated through the search engine, and read token by token.

A chain is lines, `Step 1: ...` to `Answer: ...`. It ends with

    answer          the line that starts with `Answer:` is complete
    eos             the model ends the sequence
    question        it has run on into another question (no answer comes of that)
    max_steps       so many lines are complete and none is an answer
    max_new_tokens  so many tokens are generated

`chain_search` asks the engine that grows the trees, as a search does. Many chains run side by side in one `Engine.run`,
and a chain that is asked alone takes seconds that compare with those of a tree.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from cpo_fast.search.engine import Requests, Sample, SampleRequest, Search
from cpo_fast.tasks import Task

Stop = Literal["answer", "eos", "question", "max_steps", "max_new_tokens"]


@dataclass(frozen=True)
class Chain:
    """One generated chain."""

    text: str
    token_ids: tuple[int, ...]  # as generated, an end-of-sequence left out
    stop: Stop

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

    def chain(self) -> Chain:
        assert self.stop is not None, "the chain has not ended"
        text = self._decode(self.token_ids)
        if self.stop in ("answer", "question", "max_steps"):
            # the token that brought the newline may go on after it
            text = text[: text.rindex("\n") + 1]
        return Chain(text, tuple(self.token_ids), self.stop)

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


def chain_search(
    tokenizer: Any,
    prompt: Sequence[int],
    task: Task,
    max_new_tokens: int,
    max_steps: int,
    sampled: str | None = None,
) -> Search[Chain]:
    """One chain after `prompt`, at least one token id. The caps are as for `ChainReader`.

    `sampled`: None for the greedy chain; else it is drawn from the model's own distribution (temperature 1, no cut), with
    random numbers that this name decides.

    Raises:
        ValueError: a cap is below 1. From the engine, a prompt that does not fit the model, or logits not finite.
    """
    if min(max_new_tokens, max_steps) < 1:
        raise ValueError(f"expected caps >= 1, got {max_new_tokens=}, {max_steps=}")
    reader = ChainReader(tokenizer, task, max_steps, max_new_tokens)
    num_read = 0  # before the request under way
    failure: Exception | None = None

    def goes_on(generated: Sequence[int]) -> bool:
        nonlocal failure
        try:
            for token in generated[len(reader.token_ids) - num_read :]:
                reader.add(token)
        except Exception as error:  # of a task's own code, say: raised below, as here it would end every other search
            failure = error
            return False
        return reader.stop is None

    # one request for all lines, so that none is read a second time; an engine that ends at a newline is asked again
    while reader.stop is None:
        num_read = len(reader.token_ids)
        # of a greedy chain the name does not matter, because no random number is drawn
        uid, temperature = ("greedy", 0.0) if sampled is None else (f"{sampled}/{num_read}", 1.0)
        request = SampleRequest(
            (*prompt, *reader.token_ids), uid, temperature, 1.0, max_new_tokens - num_read, goes_on=goes_on
        )
        # kept, because a next request continues it
        (lines,) = yield Requests((request,), keep=True)
        assert isinstance(lines, Sample), "a request is answered by a sample"
        if failure is not None:
            raise failure
        for token in lines.token_ids[len(reader.token_ids) - num_read :]:
            reader.add(token)
        if lines.stop == "eos":
            reader.end_sequence()
    return reader.chain()
