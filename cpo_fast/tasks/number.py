"""Numbers in text: one normal form for equal values, and None where it is not clear which number is meant.

`$1,250.00` and `1250 dollars` are "1250"; `0.5`, `1/2` and `2/4` are "0.5"; `1 1/2` is "1.5"; `1/3` stays "1/3"; a unit
or a percent sign is dropped. A minus belongs to a number if it touches it and no word or number touches the minus, or
if it opens the text: "-20" and "x = - 20" are negative, "10-20", "COVID-19" and "the rest - 20" are not. Digits inside
a name (km2, A4) are no number. Text with equals signs is read from the last part that has a number.
"""

import re
from fractions import Fraction

# sign, whole part of a mixed number, digits with or without thousands commas, decimals, denominator; the bounds keep
# the work on run-on text linear and every integer short enough to convert
_NUMBER = re.compile(
    r"(?P<sign>(?<![\w)])[-\u2212])?\$?"
    r"(?:(?P<whole>\d{1,30})\s+(?=\d{1,30}\s?/\s?\d))?"
    r"(?P<number>(?:\d{1,3}(?:,\d{3}){1,9}|\d{1,30})(?:\.\d{1,30})?|\.\d{1,30})"
    r"(?:\s?/\s?(?P<denominator>\d{1,30}))?",
    re.ASCII,
)
_NAME_WITH_DIGITS = re.compile(r"\b[^\W\d_]\w*\d[\w.]*")
_OPENING_MINUS = re.compile(r"\A[-\u2212]\s+")


def normalise_number(text: str) -> str | None:
    """The only number in `text` (in the last part between equals signs that has one) in normal form, or None.

    Integers without commas or decimals, terminating fractions as decimals, others as numerator/denominator.
    """
    for part in reversed(text.split("=")):
        clean = _OPENING_MINUS.sub("-", _NAME_WITH_DIGITS.sub(" ", part).strip())
        matches = list(_NUMBER.finditer(clean))
        if matches:
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
