"""Text that a tokenizer does not know: it gives the same token for all of it, and the model cannot tell one from another.

Tokenizers that fall back to bytes know every text. Those of words, and small ones that are made for one task, do not.
"""

from collections.abc import Iterable, Sequence
from typing import Any


def unknown_token(tokenizer: Any) -> str | None:
    """What the tokenizer writes for text that it does not know, None where it has no such token."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    # a tokenizer that was made from a file need not say what its model falls back to
    token = getattr(getattr(backend, "model", None), "unk_token", None) or getattr(tokenizer, "unk_token", None)
    return None if token is None else str(token)


def unknown_piece(tokenizer: Any, text: str, token_ids: Sequence[int]) -> str | None:
    """The first piece of a text that its tokenizer does not know, None where it knows all, or does not say where.

    Args:
        text: a plain text. token_ids: those that the tokenizer gives for it, special tokens included.
    """
    token = unknown_token(tokenizer)
    if token is None or not getattr(tokenizer, "is_fast", False):
        return None
    unknown = tokenizer.convert_tokens_to_ids(token)
    if unknown not in token_ids:
        return None
    encoded = tokenizer(text, return_offsets_mapping=True)
    pieces = zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
    # a special token that is put around a text spans none of it, and may be the same token
    found = (text[start:end].strip() for one, (start, end) in pieces if one == unknown)
    return next((piece for piece in found if piece not in ("", token)), None)


def unknown_questions(tokenizer: Any, asked: Iterable[tuple[str, str]]) -> str | None:
    """A sentence for the user where the tokenizer does not know the texts of questions, by `(name, text)`; else None."""
    if unknown_token(tokenizer) is None:
        return None
    asked = [(name, text) for name, text in asked if _is_unicode(text)]
    encoded = tokenizer([text for _, text in asked])["input_ids"] if asked else []
    found = [
        (name, piece)
        for (name, text), ids in zip(asked, encoded, strict=True)
        if (piece := unknown_piece(tokenizer, text, ids)) is not None
    ]
    return unknown_sentence(tokenizer, f"{len(found)} of {len(asked)} questions", *found[0]) if found else None


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # half a surrogate pair, which no tokenizer reads: its question fails by itself
        return False
    return True


def unknown_sentence(tokenizer: Any, where: str, name: str, piece: str) -> str:
    """What, where, why and how to mend it."""
    shown = piece if len(piece) <= 40 else f"{piece[:40]}..."
    return (
        f"the model's tokenizer does not know all of the text of {where}: it reads {unknown_token(tokenizer)!r} there, "
        f"whatever stands there, so the model cannot know what is said; the first is '{name}' with {shown!r}. Take a model "
        "whose tokenizer knows the text"
    )
