"""Prompt text to token ids: the one place where it happens, so search, training and evaluation read the same ids."""

from collections.abc import Sequence
from typing import Any


def encode_prompt(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a prompt that something will continue.

    The tokenizer's own special tokens at the front (a beginning-of-sequence) are kept; an end-of-sequence that it
    appends is not, because the text goes on.

    Args:
        tokenizer: a Hugging Face tokenizer.
        text: the whole prompt. Pieces that are tokenised apart do not add up to the ids of the whole.
    """
    ids: list[int] = list(tokenizer(text)["input_ids"])
    if ids and ids[-1] == tokenizer.eos_token_id and not text.endswith(tokenizer.eos_token):
        ids.pop()
    return ids


def common_prefix_length(first: Sequence[int], second: Sequence[int]) -> int:
    """How many leading ids two sequences share."""
    length = 0
    for left, right in zip(first, second, strict=False):
        if left != right:
            break
        length += 1
    return length
