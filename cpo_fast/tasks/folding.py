"""One form for spellings that read the same: every answer is folded before it is parsed, voted on or scored.

    compatibility     NFKC: a decomposed accent, a ligature, a full-width or mathematical letter is its plain form
    digits            the decimal digits of every script are 0 to 9
    punctuation       all dashes and minus signs are "-", quotes and primes ' or ", slashes of fractions "/"
    spaces            one plain space between words, and no invisible characters (soft hyphen, zero width, bidi, variants)
    numerals in one   a half sign is 1/2, with a space after a digit: 1 1/2. Raised and lowered digits are kept apart from
    character         what stands before them by ^, circled ones by spaces: plain NFKC makes 102 of ten squared

Case and accents stay. ASCII text changes in its whitespace alone.
"""

import re
import unicodedata

_DASHES = (  # not the wave dashes of Japanese, which mean "about" and "to"
    "\u02d7\u058a\u05be\u1400\u1806\u2010\u2011\u2012\u2013\u2014\u2015\u2043\u2212\u2796\u2e17\u2e1a\u2e3a\u2e3b\u2e40\ufe31"
    "\ufe32\ufe58\ufe63\uff0d"
)
_PLAIN = str.maketrans(
    {
        **dict.fromkeys(_DASHES, "-"),
        # the okina and the modifier apostrophe are typed as an apostrophe, the spacing accents too
        **dict.fromkeys("\u2018\u2019\u201a\u201b\u2032\u2035\u2039\u203a\u02b9\u02bb\u02bc\u02bd\u00b4\uff07", "'"),
        **dict.fromkeys("\u201c\u201d\u201e\u201f\u2033\u2036\u00ab\u00bb\u301d\u301e\uff02", '"'),
        **dict.fromkeys("\u2044\u2215\u29f8", "/"),
        "\u066b": ".",  # decimal and thousands separators of Arabic digits
        "\u066c": ",",
    }
)
_INVISIBLE = {
    "\u034f",
    "\u115f",
    "\u1160",
    "\u3164",
    *map(chr, range(0xFE00, 0xFE10)),
    *map(chr, range(0xE0100, 0xE01F0)),
}
_RAISED = "\u2070\u00b9\u00b2\u00b3\u2074-\u207f\u2080-\u208e"
_RAISED_NUMBER = re.compile(f"(?<![^\\W\\d_])[{_RAISED}]+")  # after a letter they belong to a unit or a name
_FRACTIONS = "\u00bc-\u00be\u2150-\u215e\u2189"
# a fraction is no part of the digits beside it, but for the sign of one over what follows
_BESIDE_A_FRACTION = re.compile(f"(?<=\\d)(?=[{_FRACTIONS}\u215f])|(?<=[{_FRACTIONS}])(?=[\\d{_FRACTIONS}\u215f])")


def fold(text: str) -> str:
    """`text` in its plain form. Folding twice is folding once."""
    if not text.isascii():
        text = _BESIDE_A_FRACTION.sub(" ", _RAISED_NUMBER.sub(lambda run: f"^{run[0]}", text.translate(_PLAIN)))
        text = unicodedata.normalize("NFKC", "".join(map(_apart, text))).translate(_PLAIN)
        text = "".join(map(_plain_character, text))
        # without the characters removed above, a letter and its accent may have become neighbours
        text = unicodedata.normalize("NFKC", text)
    return " ".join(text.split())


def with_spaced_dashes(text: str) -> str:
    """`text` with a pause written as a dash between spaces: "No--they are not" is "No - they are not"."""
    return text.replace("\u2014", " - ").replace("--", " - ")


def _apart(character: str) -> str:
    """A numeral of one character, kept apart from its neighbours."""
    if unicodedata.category(character) != "No":
        return character
    is_part = unicodedata.decomposition(character).startswith(("<fraction>", "<super>", "<sub>"))
    return character if is_part else f" {character} "


def _plain_character(character: str) -> str:
    category = unicodedata.category(character)
    if category == "Cf" or character in _INVISIBLE:
        return ""
    return str(unicodedata.decimal(character)) if category == "Nd" else character
