"""A synthetic corpus: sums of one-digit operations on a two-digit odometer (mod 100), by sloppy writers and a judge.

    Solve.                                       Judge.
    (blank)                                      (blank)
    Question: 53-7+4-8                           Question: 53-7+4-8
    53-7=46                                      53-7=54
    46+4 is 50                                   Is the last line likely or impossible? It is impossible
    so 50-8=42
    Answer: 42

Solutions carry their writers' habits: a borrow is done right by 35 % of them, a carry by 70 %, and a wrong total is
carried on. Judged documents are by someone who can calculate: half of them quote one wrong line, and a mark says `likely`
while every line so far is right. So a model of this corpus writes worse than it judges, by construction.

`HARD` has more operations, more right wordings of a line, lines that only restate the total, and a judge who overlooks
one habit. Its documents open with other instructions, so one model can learn both variants.

A question belongs to evaluation (search, dev, test) if the SHA-256 of its text begins with a byte that is 0 modulo 8. No
document has such a question. Everything follows from a `random.Random`.
"""

import hashlib
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

CUE = "Is the last line likely or impossible? It is"
LIKELY, IMPOSSIBLE = " likely", " impossible"
ANSWER = "Answer: {t}\n"
PAD, EOS = "<pad>", "<eos>"
# one token each; what a variant adds comes behind, so that a model of `PLAIN` alone has no rows for it
WORDS = (
    *(PAD, EOS, "\n", "Solve.\n\n", "Judge.\n\n", "Question: ", "Answer: ", CUE, LIKELY, IMPOSSIBLE),
    *(" is ", "so ", "+", "-", "=", " ", *"0123456789"),
)

# habits of writers, as shares of the steps where a borrow or a carry is due
SMALLER_FROM_LARGER, BORROW_NOT_PAID, CARRY_FORGOTTEN = 0.40, 0.25, 0.30
SLIP = 0.02  # of all steps: any digit is another
WRONG_DOCUMENTS = 0.5  # judged documents with a wrong line
WRONG_IS_LAST = 0.6  # of those: the wrong line is the last one, else any
WRONG_BY_HABIT = 0.75  # of wrong lines where a habit applies
MARK_EARLIER = 0.6  # lines before the last that are marked too
PROMPT_WEIGHT, LABEL_WEIGHT = 0.1, 2.0  # of tokens in the loss; lines have 1, wrong lines of judged documents 0


@dataclass(frozen=True)
class Variant:
    """What a question and its lines look like.

    Attributes:
        solve, judge: instructions of the two kinds of documents, without their blank line.
        num_operations: of a question. minus: share of subtractions.
        wordings: of a step; `{t}` total before, `{o}` operation, `{d}` digit, `{v}` value. All are as likely.
        restatements: lines that repeat the total `{t}`. restated: share of steps that one stands before.
        overlooked_from: the judge takes the smaller digit from the larger one for right from this digit on. 10: never.
        overlooked_quoted: share of judged documents with a step where that can happen that quote such a line.
        words: tokens that `WORDS` lacks.
    """

    solve: str
    judge: str
    num_operations: int
    minus: float
    wordings: tuple[str, ...]
    restatements: tuple[str, ...] = ()
    restated: float = 0.0
    overlooked_from: int = 10
    overlooked_quoted: float = 0.0
    words: tuple[str, ...] = ()


PLAIN = Variant(
    solve="Solve.",
    judge="Judge.",
    num_operations=3,
    minus=0.35,
    wordings=("{t}{o}{d}={v}\n", "{t}{o}{d} is {v}\n", "so {t}{o}{d}={v}\n"),
)
HARD = Variant(
    solve="Solve at length.",
    judge="Judge at length.",
    num_operations=4,
    minus=0.30,
    wordings=(*PLAIN.wordings, "so {t}{o}{d} is {v}\n", "now {t}{o}{d}={v}\n", "then {t}{o}{d} is {v}\n"),
    restatements=("{t} so far\n", "still {t}\n"),
    restated=0.15,
    overlooked_from=7,
    overlooked_quoted=0.7,
    words=("Solve at length.\n\n", "Judge at length.\n\n", "now ", "then ", "still ", " so far"),
)
VARIANTS = {"plain": PLAIN, "hard": HARD}


# ---- questions and arithmetic


def held_out(question: str) -> bool:
    """Whether a question belongs to evaluation, so that no document has it."""
    return hashlib.sha256(question.encode()).digest()[0] % 8 == 0


def draw_question(rng: random.Random, variant: Variant, evaluation: bool) -> str:
    """A question such as `53-7+4-8`, of evaluation or of the corpus."""
    while True:
        text = f"{rng.randrange(100):02d}" + "".join(
            ("-" if rng.random() < variant.minus else "+") + str(rng.randrange(1, 10))
            for _ in range(variant.num_operations)
        )
        if held_out(text) == evaluation:
            return text


def parse(question: str) -> tuple[int, list[tuple[str, int]]]:
    """The first total of a question and its (operation, digit)."""
    return int(question[:2]), [(operation, int(digit)) for operation, digit in re.findall(r"([+-])(\d)", question[2:])]


def right(total: int, operation: str, digit: int) -> int:
    """The right value of one step."""
    return (total + digit if operation == "+" else total - digit) % 100


def gold(question: str) -> str:
    """The right answer, two digits."""
    total, steps = parse(question)
    for step in steps:
        total = right(total, *step)
    return f"{total:02d}"


def habits(total: int, operation: str, digit: int) -> list[int]:
    """The wrong values that a habit gives here. None where nothing is carried or borrowed."""
    tens, units = divmod(total, 10)
    if operation == "+":
        return [tens * 10 + (units + digit) % 10] if units + digit > 9 else []  # the carry is forgotten
    # smaller from larger, then the borrow that is not paid
    return [tens * 10 + digit - units, tens * 10 + (units - digit) % 10] if units < digit else []


def overlooks(variant: Variant, total: int, operation: str, digit: int, value: int) -> bool:
    """Whether the variant's judge takes this wrong value for right."""
    return digit >= variant.overlooked_from and operation == "-" and habits(total, operation, digit)[:1] == [value]


def slip(rng: random.Random, value: int) -> int:
    """Another two-digit number: one digit is off, mostly by one."""
    tens, units = divmod(value, 10)
    shift = rng.choice((1, 1, 9, 9, rng.randrange(2, 9)))
    return tens * 10 + (units + shift) % 10 if rng.random() < 0.5 else (tens + shift) % 10 * 10 + units


def written_value(rng: random.Random, total: int, operation: str, digit: int) -> int:
    """The value that some writer gives to a step."""
    value, chance = right(total, operation, digit), rng.random()
    wrong = habits(total, operation, digit)
    if len(wrong) == 2 and chance < SMALLER_FROM_LARGER + BORROW_NOT_PAID:
        value = wrong[0] if chance < SMALLER_FROM_LARGER else wrong[1]
    elif len(wrong) == 1 and chance < CARRY_FORGOTTEN:
        value = wrong[0]
    return slip(rng, value) if rng.random() < SLIP else value


def step_wordings(variant: Variant, total: int, step: tuple[str, int], value: int) -> list[str]:
    """One step in all its wordings."""
    parts = {"t": f"{total:02d}", "o": step[0], "d": step[1], "v": f"{value:02d}"}
    return [wording.format(**parts) for wording in variant.wordings]


def is_right(variant: Variant, question: str, lines: Sequence[str]) -> bool:
    """Whether every line of a state is one that a flawless writer could have written there."""
    total, steps = parse(question)
    num_done, has_answer = 0, False
    for line in (f"{line.strip()}\n" for line in lines):
        t = f"{total:02d}"
        if has_answer:
            return False
        if num_done == len(steps) and line == ANSWER.format(t=t):
            has_answer = True
        elif line not in [wording.format(t=t) for wording in variant.restatements]:
            if num_done == len(steps):
                return False
            total = right(total, *steps[num_done])
            if line not in step_wordings(variant, int(t), steps[num_done], total):
                return False
            num_done += 1
    return True


# ---- documents


@dataclass(frozen=True)
class Part:
    """A piece of a document.

    Attributes:
        text: of one or more words. weight: of each of its tokens in the loss.
        sound: 1 if this digit of a value and all lines before it are right, as far as the judge sees; 0 if not; -1: not a
            digit of a judged value.
    """

    text: str
    weight: float
    sound: float = -1.0


def outline(rng: random.Random, variant: Variant, steps: Sequence[tuple[str, int]]) -> list[tuple[str, int] | str]:
    """The steps in order, a restatement (its wording) before some, and the answer's wording at the end."""
    lines: list[tuple[str, int] | str] = []
    for step in steps:
        if variant.restated and rng.random() < variant.restated:
            lines.append(rng.choice(variant.restatements))
        lines.append(step)
    return [*lines, ANSWER]


def blind_places(variant: Variant, total: int, lines: Sequence[tuple[str, int] | str]) -> list[int]:
    """Where among an outline's lines the judge can overlook a habit, if all before are right."""
    places = []
    for place, line in enumerate(lines):
        if not isinstance(line, str):
            wrong = habits(total, *line)
            if wrong and overlooks(variant, total, *line, wrong[0]):
                places.append(place)
            total = right(total, *line)
    return places


def solution(rng: random.Random, variant: Variant) -> list[Part]:
    """A document of a writer."""
    question = draw_question(rng, variant, evaluation=False)
    total, steps = parse(question)
    text = ""
    for line in outline(rng, variant, steps):
        if isinstance(line, str):
            text += line.format(t=f"{total:02d}")
        else:
            value = written_value(rng, total, *line)
            text += rng.choice(step_wordings(variant, total, line, value))
            total = value
    return [Part(f"{variant.solve}\n\nQuestion: {question}\n", PROMPT_WEIGHT), Part(f"{text}{EOS}", 1.0)]


def judged(rng: random.Random, variant: Variant) -> list[Part]:
    """A document of the judge: a chain's beginning with marks, the last line always marked."""
    question = draw_question(rng, variant, evaluation=False)
    total, steps = parse(question)
    lines = outline(rng, variant, steps)
    num_lines = rng.randrange(1, len(lines) + 1)
    wrong_at = -1
    if rng.random() < WRONG_DOCUMENTS:
        wrong_at = num_lines - 1 if rng.random() < WRONG_IS_LAST else rng.randrange(num_lines)
    blind_at = -1
    if variant.overlooked_quoted and (places := blind_places(variant, total, lines[:num_lines])):
        # random errors alone would show the judge its blind spot in one document of a hundred
        blind_at = rng.choice(places) if rng.random() < variant.overlooked_quoted else -1
    parts = [Part(f"{variant.judge}\n\nQuestion: {question}\n", PROMPT_WEIGHT)]
    noticed = False  # a wrong line so far
    for place, line in enumerate(lines[:num_lines]):
        is_wrong = place in (wrong_at, blind_at)
        if isinstance(line, str):
            expected = total
            value = slip(rng, total) if is_wrong else total
            text = line.format(t=f"{value:02d}")
        else:
            value = expected = right(total, *line)
            if is_wrong:
                wrong = habits(total, *line)
                if place == blind_at and wrong:
                    value = wrong[0]
                else:
                    value = rng.choice(wrong) if wrong and rng.random() < WRONG_BY_HABIT else slip(rng, value)
                if overlooks(variant, total, *line, value):
                    expected = value
            text = rng.choice(step_wordings(variant, total, line, value))
        parts += _line_parts(text, value, expected, 0.0 if is_wrong else 1.0, noticed)
        noticed = noticed or value != expected
        total = value
        label = Part(IMPOSSIBLE if noticed else LIKELY, LABEL_WEIGHT)
        if place == num_lines - 1:
            parts += [Part(CUE, 0.0), label]
        elif rng.random() < MARK_EARLIER:
            parts += [Part(CUE, 0.0), label, Part("\n", 0.0)]
    return parts


def _line_parts(text: str, value: int, expected: int, weight: float, noticed: bool) -> list[Part]:
    """A judged line, the two digits of its value apart."""
    shown, good = f"{value:02d}", f"{expected:02d}"
    start = text.rindex(shown)
    tens = not noticed and shown[0] == good[0]
    units = tens and shown[1] == good[1]
    return [
        Part(text[:start], weight),
        Part(shown[0], weight, float(tens)),
        Part(shown[1], weight, float(units)),
        Part(text[start + 2 :], weight),
    ]


def document(rng: random.Random, variants: Sequence[Variant], judged_share: float) -> list[Part]:
    """A document of one of the variants, all as likely, by the judge with probability `judged_share`."""
    is_judged = rng.random() < judged_share
    variant = variants[0] if len(variants) == 1 else rng.choice(variants)
    return judged(rng, variant) if is_judged else solution(rng, variant)


# ---- tokens


class Vocabulary:
    """The tokens of some variants' documents.

    Attributes:
        words: the text of each id. ids: the id of each text. pattern: splits any document into words.
    """

    def __init__(self, variants: Sequence[Variant]) -> None:
        self.words = (*WORDS, *dict.fromkeys(word for variant in variants for word in variant.words))
        self.ids = {word: number for number, word in enumerate(self.words)}
        # longest first, as one word may begin another
        self.pattern = "|".join(re.escape(word) for word in sorted(self.words, key=len, reverse=True))
        self._split = re.compile(self.pattern)

    def encode(self, text: str) -> list[int]:
        """Ids of a text that is made of words."""
        return [self.ids[word] for word in self._split.findall(text)]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids."""
        return "".join(self.words[number] for number in ids)
