"""One generated chain, and the reader that says, token by token, whether it has ended and why.

A chain is lines, `Step 1: ...` to `Answer: ...`. It ends with

    answer          the line that starts with `Answer:` is complete
    eos             the model ends the sequence
    question        it has run on into another question (no answer comes of that)
    max_steps       so many lines are complete and none is an answer
    max_new_tokens  so many tokens are generated

`greedy` and `line_by_line` generate by different means and share this reader, so they agree on what a chain is.
"""

from dataclasses import dataclass
from typing import Any, Literal

from cpo_fast.tasks import Task

Stop = Literal["answer", "eos", "question", "max_steps", "max_new_tokens"]


@dataclass(frozen=True)
class Chain:
    """One generated chain.

    Attributes:
        text: the generated text, without what a token holds past the last newline when a newline ended the chain.
        token_ids: the generated ids, an end-of-sequence left out.
        stop: why generation ended; see the module's docstring.
        seconds: wall time; for a row of a batch, the batch's divided by the rows in it.
    """

    text: str
    token_ids: tuple[int, ...]
    stop: Stop
    seconds: float

    @property
    def num_tokens(self) -> int:
        """Generated tokens; an end-of-sequence was generated too and counts."""
        return len(self.token_ids) + (self.stop == "eos")

    def answer(self, task: Task) -> str | None:
        """The normalised answer if the chain reached a complete answer line, else None.

        A chain that a cap cut inside its answer line has none: its number may be half a number.
        """
        if self.stop not in ("answer", "eos"):
            return None
        lines = [line for line in self.text.split("\n") if task.is_answer_line(line)]
        return task.parse_answer(lines[0]) if lines else None


class ChainReader:
    """Takes the tokens of one chain as they are generated.

    Args:
        tokenizer: turns ids into text.
        task: says what an answer line is.
        max_steps: cap on the lines, the answer line included.
        max_new_tokens: cap on the tokens.

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
        if "\n" in self._decode([token]):
            # only a token with a newline can complete a line, so the whole text is decoded once per line
            self.stop = self._stop_at_newline()
        if self.stop is None and len(self.token_ids) >= self._max_new_tokens:
            self.stop = "max_new_tokens"

    def end_sequence(self) -> None:
        """The model generated an end-of-sequence."""
        assert self.stop is None, "an end-of-sequence after the end of its chain"
        self.stop = "eos"

    def chain(self, seconds: float) -> Chain:
        """The finished chain, which took `seconds`."""
        assert self.stop is not None, "the chain has not ended"
        text = self._decode(self.token_ids)
        if self.stop in ("answer", "question", "max_steps"):
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
