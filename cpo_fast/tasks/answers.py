"""Answers in text: which number is meant, and when short answers in words are equal.

Equal numbers have one normal form: `$1,250.00` and `1250 dollars` are "1250". `0.5`, `1/2` and `2/4` are "0.5". `1 1/2` is
"1.5". `1/3` stays "1/3". A unit or a percent sign is dropped. Text in which it is not clear which number is meant has
none. Text with equals signs is read from the last part that has a number.

Short answers in words have a normal form too, and three measures:

    normal form   lower case, ASCII punctuation and the articles a, an, the removed, whitespace collapsed (SQuAD)
    exact         equal normal forms
    F1            2 P R / (P + R) over the multiset of common words (HotpotQA)
    containment   the words of the reference stand in the answer, next to each other and in order: the accuracy of
                  the CPO paper made strict, which still accepts a list that holds the reference
"""

import re
import string
from collections import Counter
from fractions import Fraction

# sign, whole part of a mixed number, digits with or without thousands commas, decimals, denominator; the bounds keep
# the work on run-on text linear and every integer short enough to convert
_NUMBER = re.compile(
    r"(?P<sign>(?<![\w)])[-\u2212])?\$?"  # the minus of "10-20" or "COVID-19" is no sign
    r"(?:(?P<whole>\d{1,30})\s+(?=\d{1,30}\s?/\s?\d))?"  # "1 1/2", while "1 12" are two numbers
    r"(?P<number>(?:\d{1,3}(?:,\d{3}){1,9}|\d{1,30})(?:\.\d{1,30})?|\.\d{1,30})"
    r"(?:\s?/\s?(?P<denominator>\d{1,30}))?",
    re.ASCII,
)
_NAME_WITH_DIGITS = re.compile(r"\b[^\W\d_]\w*\d[\w.]*")  # km2, A4
_OPENING_MINUS = re.compile(r"\A[-\u2212]\s+")  # "x = - 20" is negative, "the rest - 20" is not


def normalise_number(text: str) -> str | None:
    """The only number in `text` (in the last part between equals signs that has one) in normal form, or None.

    Integers without commas or decimals, terminating fractions as decimals, others as numerator/denominator.
    """
    for part in reversed(text.split("=")):
        clean = _OPENING_MINUS.sub("-", _NAME_WITH_DIGITS.sub(" ", part).strip())
        matches = list(_NUMBER.finditer(clean))
        if matches:
            # of several, guessing which is meant would put wrong chains among the winners
            return _read(matches[0]) if len(matches) == 1 else None
    return None


def _read(match: re.Match[str]) -> str | None:
    value = Fraction(match["number"].replace(",", ""))
    if match["denominator"]:
        if int(match["denominator"]) == 0:
            return None
        value /= int(match["denominator"])
    if match["whole"]:
        if value >= 1:
            return None  # "2 5/4" is two numbers or a slip, and no mixed number
        value += int(match["whole"])
    return _normal_form(-value if match["sign"] else value)


def _normal_form(value: Fraction) -> str:
    if value.denominator == 1:
        return str(value.numerator)
    num_decimals, scaled = 0, value
    # a denominator of 2^a 5^b terminates after max(a, b) decimals; 60 covers the 30 digits that are read
    while scaled.denominator != 1 and num_decimals < 60:
        num_decimals, scaled = num_decimals + 1, scaled * 10
    if scaled.denominator != 1:
        return f"{value.numerator}/{value.denominator}"
    digits = str(abs(scaled.numerator)).zfill(num_decimals + 1)
    sign = "-" if value < 0 else ""
    return f"{sign}{digits[:-num_decimals]}.{digits[-num_decimals:]}"


# a number that SQuAD's removal of punctuation would change: it makes 1450 of 145.0 and 20 of -20
_NUMBER_WORD = re.compile(r"(?=.*[-./])-?\$?-?(?:\d[\d,]{0,30})?(?:\.\d{1,30}|/\d{1,9})?", re.ASCII)
_AROUND = ".,;:!?%()[]\"'"
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
# match themselves alone (HotpotQA); each with the word that contradicts it
_SPECIAL = {"yes": "no", "no": "yes", "noanswer": "noanswer"}


def normalise_words(text: str) -> str:
    """The normal form: words separated by single spaces, "" if no letter or digit is left. Applying it twice is once."""
    text = text.lower().replace("\u2212", "-")  # the typographic minus is punctuation as well
    words = [word for raw in text.split() for word in _words(raw)]
    if not words:  # SQuAD's rule leaves nothing of "The The" and "A"
        words = text.translate(_NO_PUNCTUATION).split()
    joined = " ".join(words)
    return joined if any(character.isalnum() for character in joined) else ""


def exact_match(answer: str, gold: str) -> bool:
    """Whether both have the same normal form, and have one at all."""
    return normalise_words(answer) == normalise_words(gold) != ""


def f1_score(answer: str, gold: str) -> float:
    """Harmonic mean of precision and recall of the answer's words, from 0 to 1."""
    ours, theirs = normalise_words(answer), normalise_words(gold)
    if ours != theirs and (ours in _SPECIAL or theirs in _SPECIAL):
        return 0.0
    num_common = sum((Counter(ours.split()) & Counter(theirs.split())).values())
    if num_common == 0:
        return 0.0
    precision, recall = num_common / len(ours.split()), num_common / len(theirs.split())
    return 2 * precision * recall / (precision + recall)


def contains(answer: str, gold: str) -> bool:
    """Whether the reference's words stand in the answer.

    A reference yes or no must be the answer's first word, and its opposite must not follow.
    """
    ours, theirs = normalise_words(answer).split(), normalise_words(gold).split()
    if not ours or not theirs:
        return False
    if len(theirs) == 1 and theirs[0] in _SPECIAL:
        return ours[0] == theirs[0] and _SPECIAL[theirs[0]] not in ours[1:]
    # by words, never by characters: "no" is not in "Norway"
    return any(ours[start : start + len(theirs)] == theirs for start in range(len(ours) - len(theirs) + 1))


def is_number(text: str) -> bool:
    """Whether a reference answer is a number and nothing else: no letter beside it, and readable as one."""
    return normalise_number(text) is not None and not any(character.isalpha() for character in text)


def _words(raw: str) -> list[str]:
    # a full stop before the word may open a decimal: .5
    bare = raw.rstrip(_AROUND).lstrip(_AROUND.replace(".", ""))
    number = normalise_number(bare) if _NUMBER_WORD.fullmatch(bare) else None
    if number is not None:
        return [number]
    return _ARTICLES.sub(" ", raw.translate(_NO_PUNCTUATION)).split()
