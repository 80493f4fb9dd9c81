"""Short answers in words: the normal form, exact match, F1 and containment.

    normal form   lower case, ASCII punctuation and the articles a, an, the removed, whitespace collapsed (SQuAD)
    exact         equal normal forms
    F1            2 P R / (P + R) over the multiset of common words; yes, no and noanswer match only themselves (HotpotQA)
    containment   the words of the reference stand in the answer, next to each other and in order

Two departures from those scripts, both where they are wrong. A word that is a number with a sign, a decimal point or
a slash is read as a number before punctuation goes: SQuAD's rule makes 1450 of 145.0 and 20 of -20. And an answer that
would vanish ("The The", "A") keeps its articles. Containment goes by words, never by characters: "no" is not in
"Norway". It is the accuracy of the CPO paper made strict, and still accepts a list that holds the reference.
"""

import re
import string
from collections import Counter

from cpo_fast.tasks.number import normalise_number

# a lone number that SQuAD's removal of punctuation would change; what may surround it is stripped before
_NUMBER_WORD = re.compile(r"(?=.*[-./])-?\$?-?(?:\d[\d,]{0,30})?(?:\.\d{1,30}|/\d{1,9})?", re.ASCII)
_AROUND = ".,;:!?%()[]\"'"
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
_SPECIAL = {"yes": "no", "no": "yes", "noanswer": "noanswer"}


def normalise_words(text: str) -> str:
    """The normal form: words separated by single spaces, "" if no letter or digit is left. Applying it twice is once."""
    text = text.lower().replace("\u2212", "-")  # the typographic minus is punctuation as well
    words = [word for raw in text.split() for word in _words(raw)]
    if not words:
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
    return any(ours[start : start + len(theirs)] == theirs for start in range(len(ours) - len(theirs) + 1))


def is_number(text: str) -> bool:
    """Whether a reference answer is a number and nothing else: no letter beside it, and readable as one."""
    return normalise_number(text) is not None and not any(character.isalpha() for character in text)


def _words(raw: str) -> list[str]:
    bare = raw.rstrip(_AROUND).lstrip(_AROUND.replace(".", ""))
    number = normalise_number(bare) if _NUMBER_WORD.fullmatch(bare) else None
    if number is not None:
        return [number]
    return _ARTICLES.sub(" ", raw.translate(_NO_PUNCTUATION)).split()
