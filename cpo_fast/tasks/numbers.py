"""Which number a text means. Equal numbers have one normal form; what is not sure to be a number of this list has none.

    digits        1250, 007, .5, 145.0. A point is the decimal sign, and a comma never is
    thousands     1,250,000 or 12,50,000 or 1'250'000; in LaTeX also 1{,}250 and 1\\,250. Groups by points or spaces: none
    fractions     3/4, 1 1/2, 1/2 in one character too, \\frac{1}{2}. `2/4` is "0.5", and `1/3` stays "1/3"
    signs         -20 with any dash or minus sign, +20, -$3, $-3, "minus 20", "negative 20", "x = - 20"; the minus between
                  two words or in "10-20" and "COVID-19" is none
    magnitudes    hundred, thousand, million, billion, trillion, lakh, crore, dozen, and a k that touches: 12k is "12000"
    around it     a currency sign, a percent sign and a unit are dropped, quotes, emphasis, brackets, \\boxed{...},
                  \\text{...} and words around it too. Text with equals signs is read from the last part with a number

No number, or more than one, or one beside what would change it has no normal form: digits of other scripts that are no
decimal digits, exponents, roots and other functions, pi, other LaTeX commands, other magnitude words and abbreviations (m,
bn, mille) and those that stand apart from it ("5 (in thousands)"), fraction and number words (half, thirds, twenty), a
"minus" that is not beside it, "below zero". A number that is misread would put wrong chains among the winners.
"""

import re
from fractions import Fraction

from cpo_fast.tasks.folding import fold

_MAGNITUDES = {
    "hundred": 10**2,
    "thousand": 10**3,
    "million": 10**6,
    "billion": 10**9,
    "trillion": 10**12,
    "lakh": 10**5,
    "crore": 10**7,
    "dozen": 12,
    "k": 10**3,
}
_SPELT = "|".join(name for name in _MAGNITUDES if name != "k")
_CURRENCY = "[$\u20ac\u00a3\u00a5\u20b9]"
# sign, whole part of a mixed number, digits with or without groups, decimals, denominator, magnitude; the bounds keep the
# work on run-on text linear and every integer short enough to convert
NUMBER = (
    r"(?P<sign>(?<![\w)])-)?"
    rf"(?:{_CURRENCY}\s?)?"
    r"(?:(?P<whole>\d{1,30})\s+(?=\d{1,30}\s?/\s?\d))?"  # "1 1/2", while "1 12" are two numbers
    r"(?P<number>(?<!\d)(?:[1-9]\d{0,2}(?:,\d{3}){1,9}|[1-9]\d?(?:,\d\d){1,9},\d{3}|[1-9]\d{0,2}(?:'\d{3}){1,9}|\d{1,30})"
    r"(?:\.\d{1,30})?(?!\d)|(?<![\w.])\.\d{1,30})"
    r"(?:\s?/\s?(?P<denominator>\d{1,30}))?"
    rf"(?:[\s-]?(?P<magnitude>{_SPELT})s?\b|(?P<thousands>k)\b)?"
)
_NUMBER = re.compile(NUMBER, re.ASCII | re.IGNORECASE)
_NAME_WITH_DIGITS = re.compile(r"\b[^\W\d_]\w*\d[\w.,/:-]*")  # km2, A4
_OPENING_MINUS = re.compile(rf"\A([\s(]*(?:{_CURRENCY}\s?)?)-\s+")  # "x = - 20" is negative, "the rest - 20" is not
_UNCLEAR = "\0"  # stands for what may be a sign or not
_SIGN_WORD = re.compile(rf"(?<![\w-])(minus|negative)\s+(?=(?:{_CURRENCY}\s?)?\.?\d)", re.IGNORECASE)
# after these "minus 20" is a number, and after anything else it may be a difference
_BEFORE_A_SIGN = re.compile(
    r"(?:\A|\b(?:is|be|are|was|were|equals?|to|of|at|by|about|around|exactly|only|an?)|[:,;(])\s*\Z", re.IGNORECASE
)
_EMPHASIS = re.compile(r"(.?)(?<![*_\"`'])([*_\"`']++)(?=(.?))")
_TAGS = re.compile(r"()(?:</?[a-zA-Z][^<>]{0,40}>){1,8}")

_UNITS = "one two three four five six seven eight nine ten eleven twelve"
_WORDS = "|".join(
    [
        *f"zero {_UNITS} twenty thirty forty fifty sixty seventy eighty ninety".split(),
        r"\w{3,5}teen",
        *(f"{name}s?" for name in _MAGNITUDES if name != "k"),
        *("half", "halves", "thirds?", "quarters?", "point"),
    ]
)
_OPERATOR = "[+*\u00d7\u00f7\u00b7\u2219\u22c5]"
# what makes another number of the one before it
_AFTER = re.compile(
    rf"[\s-]*(?:and\s+(?:an?\s+)?|an?\s+)?(?:{_WORDS}|tens"
    r"|(?:four|fif|six|seven|eigh|nin|ten|eleven|twelf|hundred|thousand|million|billion)ths?"
    r"|(?:quadr|quint|sext|zill)\w*ion\w*|mil(?:le|l|lones|lionen|iones|h.es|iardy?)?|millones|milliard\w*|tausend|myriads?"
    r"|mio|mln|mrd|mld|mn|bn|bln|tn|trn|thou|grand|gross|score|kilo|mega|giga|lacs?|crs?|doz|googols?"
    r"|squared|cubed|factorial|doubled|tripled|halved|below|under\s+zero)\b"
    # "5m" may be metres or millions, "5 m" is metres
    r"|\s?(?-i:MM?|[BbT])\b|(?-i:[mt]|k+s?|K+s?)\b|\s(?-i:[kK])\b"
    r"|\s?\^|\s?[/*\u00d7\u00b7\u22c5]?\s?(?:pi\b|[\u03c0\u221e])|\s?/\s?[nxyz]\b"
    r"|[^\d=]{0,40}\bbelow\b|\s?-[\s.,;:!?)]*\Z",
    re.IGNORECASE,
)
_BEFORE = re.compile(
    rf"(?:\b(?:(?:{_WORDS}|twice|double|triple|root|squared)(?:\s+(?:of|past|to))?"
    r"|(?:square|cube|opposite|reciprocal|inverse|factorial|logarithm)\s+of)(?:\s+the)?[\s-]+|(?<!\.)\.\.|[^\W\d_]\."
    rf"|[\w)](?:{_OPERATOR}|\s{_OPERATOR}\s)|/\s?)\Z",
    re.IGNORECASE,
)
# anywhere around a number: a magnitude that is not its own, or a minus that is not beside it
_ELSEWHERE = re.compile(
    r"\b(?:(?:hundred|thousand|million|billion|trillion|lakh|crore|dozen)\w*|minus|negative|neg)\b", re.IGNORECASE
)
_SPELT_OUT = re.compile(rf"(?:(?:minus|negative)\s+)?(?:{_WORDS})\b", re.IGNORECASE)
_CHANGED = re.compile(
    rf"[\^\u221a\u221b\u00b1\u2260{_UNCLEAR}]|\\[a-zA-Z]|!=|\d{{31}}"
    # a line over a digit repeats it, and one before it may be a minus sign
    r"|\d[\u0300-\u036f\u20d0-\u20dc]|[\u0304\u0305\u02c9\u2053\u2238\u2296\u2500\u2501]\s?\.?\d"
    r"|\b(?:abs|ceil|cos|exp|floor|gcd|lcm|ln|log|max|min|mod|round|sin|tan)\d*\s?\(|\b(?:cbrt|cos|exp|ln|log|sin|sqrt|tan)\b"
    # a minus that is not beside its number: --5, -(5), (-)5, -EUR 5
    rf"|(?<![\w)])-\s?(?:\)|(?:(?!{_CURRENCY}\s?\.?\d|\.\d)[^\w\s]){{1,12}}\s?{_CURRENCY}?\s?\.?\d"
    rf"|[^\W\d_]{{1,3}}\.?\s?{_CURRENCY}?\s?\.?\d)"
)


def _apart(match: re.Match[str]) -> str:
    """The first group, with a space where it would bring two digits together: 5{2} is not 52."""
    before, after = match.string[: match.start()][-1:], match.string[match.end() : match.end() + 1]
    text = f" {match[1]}" if before.isdigit() and (match[1] or after)[:1].isdigit() else match[1]
    return f"{text} " if after.isdigit() and text[-1:].isdigit() else text


_BOXED = re.compile(r"\\f?box(?:ed)?\s*\{((?:[^{}]|\{[^{}]*\})*+)\}")
_FRACTION = re.compile(r"\\[dtc]?frac\s*(?:\{\s*(-?[\d.,]{1,40})\s*\}|(\d))\s*(?:\{\s*([\d.,]{1,40})\s*\}|(\d))")
_LATEX = (  # what is written for how it is meant
    (re.compile(r"\\(?:text|math|operatorname|mbox|emph)[a-z]*\s*\{([^{}]*)\}"), _apart),
    (re.compile(r"(?<=\d)(?:\{,\}|\\,)(?=\d{3}(?!\d))"), ","),
    (re.compile(r"\^\s*\{?\s*\\(?:circ|degree)\b\s*\}?|\\(?:left|right|displaystyle)\b"), ""),
    (re.compile(r"\\(?:q?quad)\b|\\[,;: ()\[\]]"), " "),
    (re.compile(r"\\([$%#&_])"), r"\1"),
    (re.compile(r"()(?:\\!)+"), _apart),
    (re.compile(r"()[{}]+"), _apart),
)


def normalise_number(text: str) -> str | None:
    """The only number in `text` (in the last part between equals signs that has one) in normal form, or None.

    Integers without commas or decimals, terminating fractions as decimals, others as numerator/denominator.
    """
    text = fold(text)
    if "\\" in text or "{" in text:
        boxed = set(_BOXED.findall(text))
        text = _without_latex(boxed.pop() if len(boxed) == 1 else text)
    for part in reversed(_TAGS.sub(_apart, text).split("=")):
        clean = _SIGN_WORD.sub(_sign, _EMPHASIS.sub(_without_emphasis, part).strip())
        clean = _OPENING_MINUS.sub(r"\1-", _NAME_WITH_DIGITS.sub(" ", clean).strip())
        matches = list(_NUMBER.finditer(clean))
        if matches or _CHANGED.search(clean) or _SPELT_OUT.match(clean):
            # of several, guessing which is meant would put wrong chains among the winners
            return _read(matches[0]) if len(matches) == 1 else None
    return None


def _without_emphasis(match: re.Match[str]) -> str:
    """What stands before a run of marks, with the run where it may be part of a number, a product or a name: 5**2, x_1."""
    before, marks, after = match[1], match[2], match[3]
    digits = before.isdigit() and after.isdigit()
    product = set(marks) == {"*"} and all(side.isdigit() or side.isspace() for side in (before, after))
    name = set(marks) == {"_"} and before.isalnum() and after.isalnum()
    return before + marks if digits or product or name else before


def _without_latex(text: str) -> str:
    # apart from a digit before it, a mixed number, and from one after it, which TeX does not take in
    text = _FRACTION.sub(
        lambda match: (
            f"{' ' * match.string[: match.start()][-1:].isdigit()}{match[1] or match[2]}/{match[3] or match[4]} "
        ),
        text,
    )
    for pattern, meant in _LATEX:
        text = pattern.sub(meant, text)
    return " ".join(text.split())


def _sign(match: re.Match[str]) -> str:
    before = match.string[: match.start()][-40:]
    return "-" if match[1].lower() == "negative" or _BEFORE_A_SIGN.search(before) else _UNCLEAR


def _read(match: re.Match[str]) -> str | None:
    text = match.string
    before, after = text[max(0, match.start() - 40) : match.start()], text[match.end() : match.end() + 80]
    if _CHANGED.search(text) or _AFTER.match(after) or _BEFORE.search(before):
        return None
    if _ELSEWHERE.search(text, 0, match.start()) or _ELSEWHERE.search(text, match.end()):
        return None
    if not text.isascii() and any(character.isnumeric() and not character.isascii() for character in text):
        return None  # a numeral that is no decimal digit: ten thousand in Chinese
    value = Fraction(match["number"].replace(",", "").replace("'", ""))
    if match["denominator"]:
        if int(match["denominator"]) == 0:
            return None
        value /= int(match["denominator"])
    if match["whole"]:
        if value >= 1:
            return None  # "2 5/4" is two numbers or a slip, and no mixed number
        value += int(match["whole"])
    name = match["magnitude"] or match["thousands"]
    if name and re.match(r"-\w", after):
        return None  # "5 hundred-dollar bills"
    value *= _MAGNITUDES[name.lower()] if name else 1
    form = _normal_form(-value if match["sign"] else value)
    return form if _NUMBER.fullmatch(form) else None  # more digits than are read


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
