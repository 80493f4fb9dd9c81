"""Text of models and files as something to look at: nothing in it may hide, steer the page or fill it.

    visible("a\\x1b[31m\\u202eb")   "a␛[31m\\u202eb"

Controls become their pictures (U+2400 and on) or an escape, as do marks that change the direction of what follows, marks
without a width, and halves of surrogate pairs. Line feeds and tabs stay. `static/tree_parts.js` follows the same rule.
"""

import re

MAX_CHARACTERS = 2_000  # of one text; the whole stands in its file

_HIDDEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f"
    "\u00ad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff0-\ufffb\ufffe\uffff"
    "\ud800-\udfff\U000e0000-\U000e0fff]"
)


def visible(text: str, max_characters: int = MAX_CHARACTERS) -> str:
    """`text` with its hidden characters shown, cut after `max_characters` of them with a note of how many are missing."""
    cut = ""
    if len(text) > max_characters:
        cut = f" … ({len(text) - max_characters:,} characters cut)"
        text = text[:max_characters]
    return _HIDDEN.sub(lambda match: _shown(match[0]), text) + cut


def _shown(character: str) -> str:
    code = ord(character)
    if code < 0x20:
        return chr(0x2400 + code)
    if code == 0x7F:
        return "\u2421"
    if code < 0x100:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
