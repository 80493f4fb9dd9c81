"""When what is generated ends, and what its ids are as text."""

from functools import lru_cache
from typing import Any

from cpo_fast.search.engine.requests import SampleRequest
from cpo_fast.tree import Stop


class StopChecker:
    """Ends requests for one model and tokenizer: at a newline, at end-of-sequence, at the cap.

    Args:
        model: gives the end-of-sequence ids of its configuration and its generation configuration.
        tokenizer: gives its own, and the text of ids.
    """

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._eos_ids = _eos_ids(model, tokenizer)
        self._has_newline: dict[int, bool] = {}  # by token id, each decoded once
        self._text = lru_cache(maxsize=4096)(self._decoded)  # samples of a state often say the same

    def append(self, token: int, generated: list[int], request: SampleRequest) -> Stop | None:
        """Append a token to what a request has generated, unless it is end-of-sequence. Why that ends with it, or None."""
        if token in self._eos_ids:
            return "eos"
        generated.append(token)
        if token not in self._has_newline:
            self._has_newline[token] = "\n" in self.text([token])
        if self._has_newline[token] and (request.goes_on is None or not request.goes_on(generated)):
            return "newline"  # before the cap: a line that ends with its last token is whole
        return "length" if len(generated) >= request.max_new_tokens else None

    def text(self, ids: list[int]) -> str:
        """The ids as text, special tokens kept."""
        return self._text(tuple(ids))

    def _decoded(self, ids: tuple[int, ...]) -> str:
        # cleaning up would drop blanks before punctuation
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text


def _eos_ids(model: Any, tokenizer: Any) -> frozenset[int]:
    # chat models name several ends, some in their generation config only
    found: set[int] = set()
    for holder in (tokenizer, model.config, getattr(model, "generation_config", None)):
        value = getattr(holder, "eos_token_id", None)
        found.update(value if isinstance(value, list | tuple) else [] if value is None else [value])
    return frozenset(found)
