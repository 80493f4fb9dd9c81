"""Arithmetic word problems: SVAMP's released file, a JSONL of `question[, answer]`, numeric answers.

An answer is a rational number. `Answer: $1,250.00` and `Answer: 1250 dollars` are both "1250"; 0.5 and 1/2 are both
"0.5"; 1/3 stays "1/3". A line with no number, or with several and no equals sign before the last one, has no readable
answer: guessing which was meant would put wrong chains among the winners.
"""

import hashlib
import json
import re
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

from cpo_fast.errors import DataError
from cpo_fast.files import read_jsonl
from cpo_fast.tasks.task import ANSWER_MARK, VERDICT_CUE, Question, Task

FEW_SHOT = """Solve each word problem one line at a time: numbered steps, then the answer as a number.

Question: A bakery baked 48 rolls in the morning and 35 rolls in the afternoon. It sold 59 rolls that day. \
How many rolls were left?
Step 1: The bakery baked 48 + 35 = 83 rolls in all.
Step 2: After selling 59 rolls, 83 - 59 = 24 rolls were left.
Answer: 24

Question: Nadia is 12 years old. She rides her bicycle for 25 minutes each day. \
How many minutes does she ride in 6 days?
Step 1: Her age does not matter, only the 25 minutes each day.
Step 2: In 6 days she rides 25 * 6 = 150 minutes.
Answer: 150

Question: A farmer picked 96 pears and 40 plums. He packed the pears into boxes of 8. \
How many boxes of pears did he fill?
Step 1: Only the 96 pears go into the boxes.
Step 2: With 8 pears in a box he filled 96 / 8 = 12 boxes.
Answer: 12

Question: Omar had 52 stamps. He gave some of them to his sister and then had 37 stamps. \
How many stamps did he give to his sister?
Step 1: Omar started with 52 stamps and ended with 37 stamps.
Step 2: He gave away 52 - 37 = 15 stamps.
Answer: 15

"""

FEW_SHOT_EVALUATOR = f"""Judge the last line of each solution. It is likely if it is right and leads to the answer, \
and impossible if it is wrong.

Question: Lena collected 31 shells on Monday and 18 shells on Tuesday. Her brother gave her 7 more. \
How many shells does she have?
Step 1: She collected 31 + 18 = 49 shells herself.
{VERDICT_CUE} likely

Question: A school has 14 classrooms. Each classroom has 20 chairs and 3 windows. How many chairs are there in all?
Step 1: There are 14 + 20 = 34 chairs in all.
{VERDICT_CUE} impossible

Question: Tomas had 65 marbles. He lost 28 of them in the park. How many marbles does he have now?
Step 1: Tomas started with 65 marbles and lost 28 marbles.
Step 2: He has 65 - 28 = 47 marbles now.
Answer: 47
{VERDICT_CUE} impossible

Question: 72 children are going on a trip. 9 children fit in each van. How many vans are needed?
Step 1: The children are split into groups of 9.
Step 2: The trip needs 72 / 9 = 8 vans.
Answer: 8
{VERDICT_CUE} likely

"""

# sign, digits with or without thousands commas, decimals, denominator; 30 digits bound the work on run-on text
_NUMBER = re.compile(
    r"(?P<sign>[-\u2212]\s?)?\$?(?P<number>(?:\d{1,3}(?:,\d{3})+|\d{1,30})(?:\.\d{1,30})?|\.\d{1,30})"
    r"(?:\s?/\s?(?P<denominator>\d{1,30}))?",
    re.ASCII,
)


class ArithmeticTask(Task):
    """Word problems with one number as the answer."""

    name = "svamp"
    few_shot = FEW_SHOT
    few_shot_evaluator = FEW_SHOT_EVALUATOR

    def load(self, path: str | Path, limit: int | None = None, skip: int = 0) -> list[Question]:
        """Read the released JSON list (ID, Body, Question, Answer) or a JSONL of `question[, answer][, id]`.

        A row without an id is named by a hash of its text. The whole file is checked, whatever part is used.

        Raises:
            DataError: unreadable file, a row without a question, an answer that is no number, a duplicate id or a
                row that appears twice; names file:line (or the row of a JSON list).
        """
        questions: list[Question] = []
        first_place: dict[str, str] = {}
        for place, row in _rows(Path(path)):
            question = _question(row, place)
            if question.id in first_place:
                raise DataError(
                    f"{place}: question '{question.id}' is already at {first_place[question.id]}; delete one, or give "
                    "each its own id"
                )
            first_place[question.id] = place
            questions.append(question)
        if not questions:
            raise DataError(f"{path}: the file holds no question")
        end = None if limit is None else skip + limit
        return questions[skip:end]

    def parse_answer(self, line: str) -> str | None:
        """The number of an `Answer: ...` line in normal form, or None; see the module's docstring."""
        text = line.strip()
        if not text.startswith(ANSWER_MARK):
            return None
        return normalise_number(text.removeprefix(ANSWER_MARK))

    def is_correct(self, answer: str | None, gold: str) -> bool:
        """Numeric equality of the normal forms."""
        return answer is not None and normalise_number(answer) == normalise_number(gold)


def normalise_number(text: str) -> str | None:
    """The only number in `text` (after its last equals sign, if any) in normal form, or None.

    Integers without commas or decimals, terminating fractions as decimals, others as numerator/denominator.
    """
    matches = list(_NUMBER.finditer(text.rpartition("=")[2]))
    if len(matches) != 1:
        return None
    match = matches[0]
    value = Fraction(match["number"].replace(",", ""))
    if match["denominator"]:
        if int(match["denominator"]) == 0:
            return None
        value /= int(match["denominator"])
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


def _rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (place for messages, row) from a JSON list or from JSON lines, told apart by the first character."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot read ({error.strerror}); check task.path") from None
    if not content.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
        for number, row in read_jsonl(path):
            yield f"{path}:{number}", row
        return
    try:
        rows = json.loads(content.decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise DataError(f"{path}: the file is not UTF-8; save it as UTF-8") from None
    except (json.JSONDecodeError, RecursionError) as error:
        line = getattr(error, "lineno", 1)
        raise DataError(f"{path}:{line}: the file is not valid JSON ({error}); download it again") from None
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise DataError(f"{path}: row {number}: expected a JSON object, got {type(row).__name__}")
        yield f"{path}: row {number}", row


def _question(row: dict[str, Any], place: str) -> Question:
    if "Body" in row:
        body, asked = row["Body"], row.get("Question")
        if not isinstance(body, str) or not isinstance(asked, str):
            raise DataError(f"{place}: expected text in 'Body' and 'Question'")
        text = f"{body.strip()} {asked.strip()}".strip()
    else:
        if not isinstance(row.get("question"), str):
            raise DataError(f"{place}: expected text in 'question' (or SVAMP's 'Body' and 'Question')")
        text = row["question"].strip()
    if not text:
        raise DataError(f"{place}: the question is empty; delete the row")
    identity = row.get("ID", row.get("id"))
    if identity is None:
        identity = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]
    elif not isinstance(identity, str | int) or isinstance(identity, bool):
        raise DataError(f"{place}: the id must be text or an integer, got {identity!r}")
    return Question(str(identity), text, _gold(row.get("Answer", row.get("answer")), place))


def _gold(value: Any, place: str) -> str | None:
    if value is None:
        return None
    gold = None if isinstance(value, bool) else normalise_number(str(value))
    if gold is None:
        raise DataError(f"{place}: the answer {value!r} is not a number; mend it, or leave the answer out")
    return gold
