"""Short answers in words: when two are equal, and how near they are. Numbers have a module of their own, `numbers`.

    normal form   folded (see `folding`), lower case, punctuation and the articles a, an, the removed, whitespace collapsed
                  (SQuAD); numbers in the normal form of `numbers`, with their magnitude and sign: "2 million" is one word.
                  Text of which nothing would be left, such as `!!!`, is its own normal form
    exact         equal normal forms
    F1            2 P R / (P + R) over the multiset of common words (HotpotQA)
    containment   the words of the reference stand in the answer, next to each other and in order: the accuracy of
                  the CPO paper made strict, which still accepts a list that holds the reference

An answer that opens with yes or no and a pause ("No, they were born in two cities") is that word. "no one" is not "no", and
"No. 5" is not either.
"""

import re
import string
import unicodedata
from collections import Counter

from cpo_fast.tasks.folding import fold, with_spaced_dashes
from cpo_fast.tasks.numbers import NUMBER, normalise_number

# a number that SQuAD's removal of punctuation would change: it makes 1450 of 145.0 and 20 of -20
_NUMBER_WORD = re.compile(r"(?=.*[-./])-?\$?-?(?:\d[\d,]{0,30})?(?:\.\d{1,30}|/\d{1,9})?", re.ASCII)
# a number whose words mean it together: minus 5, 2 million, 1 1/2
_NUMBER_PHRASE = re.compile(rf"(?<![\w.,/-])(?P<word>(?:minus|negative)\s+)?{NUMBER}", re.ASCII | re.IGNORECASE)
_AROUND = ".,;:!?%()[]\"'"
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
# match themselves alone (HotpotQA); each with the word that contradicts it
_SPECIAL = {"yes": "no", "no": "yes", "noanswer": "noanswer"}
# "No. 5" is a number, and no answer to a question
_OPENING = re.compile(r"\s*[\"'*(]*(yes|no)[\"'*)]*(?:\s*(?:[,;:!?]|\.(?!\s?#?\d))|\s+-\s)", re.IGNORECASE)


def normalise_words(text: str) -> str:
    """The normal form: words separated by single spaces. Applying it twice is once. "" for nothing but whitespace."""
    form, again = text, _normal_form(text)
    while again != form:  # punctuation that has gone may have kept a number from its unit: "0-K" is "0k", and that is 0
        form, again = again, _normal_form(again)
    return form


def _normal_form(text: str) -> str:
    # "İ" in lower case has an accent of its own, which is folded again
    text = fold(fold(text).casefold())
    words = [word for raw in _NUMBER_PHRASE.sub(_number_phrase, text).split() for word in _words(raw)]
    if not words:  # SQuAD's rule leaves nothing of "The The" and "A"
        words = _without_punctuation(text).split()
    joined = fold(" ".join(words))
    return joined if any(character.isalnum() for character in joined) else text


def read_words(text: str) -> str:
    """The normal form of an answer: of yes or no alone where a pause follows and the rest does not say the opposite."""
    words, opening = normalise_words(text), _OPENING.match(fold(with_spaced_dashes(text)))
    special = opening[1].lower() if opening else ""
    return special if special and _SPECIAL[special] not in words.split() else words


def exact_match(answer: str, gold: str) -> bool:
    """Whether both have the same normal form, and have one at all."""
    return read_words(answer) == normalise_words(gold) != ""


def f1_score(answer: str, gold: str) -> float:
    """Harmonic mean of precision and recall of the answer's words, from 0 to 1."""
    ours, theirs = read_words(answer), normalise_words(gold)
    if ours != theirs and (ours in _SPECIAL or theirs in _SPECIAL):
        return 0.0
    num_common = sum((Counter(ours.split()) & Counter(theirs.split())).values())
    if num_common == 0:
        return 0.0
    precision, recall = num_common / len(ours.split()), num_common / len(theirs.split())
    return 2 * precision * recall / (precision + recall)


def contains(answer: str, gold: str) -> bool:
    """Whether the reference's words stand in the answer.

    A reference yes or no must be the whole answer, or open it before a pause.
    """
    ours, theirs = read_words(answer).split(), normalise_words(gold).split()
    if not ours or not theirs:
        return False
    if len(theirs) == 1 and theirs[0] in _SPECIAL:
        return ours == theirs
    # by words, never by characters: "no" is not in "Norway"
    return any(ours[start : start + len(theirs)] == theirs for start in range(len(ours) - len(theirs) + 1))


def is_number(text: str) -> bool:
    """Whether a reference answer is a number and nothing else: no letter beside it, and readable as one."""
    return normalise_number(text) is not None and not any(character.isalpha() for character in text)


def _number_phrase(match: re.Match[str]) -> str:
    """The normal form of a number in several words, else the text as it stands."""
    together = match["word"] or match["whole"] or match["magnitude"] or match["thousands"]
    return (together and normalise_number(match[0])) or match[0]


def _without_punctuation(text: str) -> str:
    if text.isascii():
        return text.translate(_NO_PUNCTUATION)
    return "".join(
        character
        for character in text.translate(_NO_PUNCTUATION)
        if not unicodedata.category(character).startswith(("P", "Sc"))
    )


def _words(raw: str) -> list[str]:
    # a full stop before the word may open a decimal: .5
    bare = raw.rstrip(_AROUND).lstrip(_AROUND.replace(".", ""))
    number = normalise_number(bare) if _NUMBER_WORD.fullmatch(bare) else None
    if number is not None:
        return [number]
    return _ARTICLES.sub(" ", _without_punctuation(raw)).split()
