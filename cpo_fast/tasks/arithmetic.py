"""Arithmetic word problems with one number as the answer: SVAMP, GSM8K.

Released files: SVAMP is a JSON list of (ID, Body, Question, Equation, Answer, Type), where body and question are joined
with a space. GSM8K is JSON lines of (question, answer), the answer being a solution whose last line is `#### 42`, and
has no ids. An answer is a rational number in the normal form of `cpo_fast.tasks.answers`.
"""

from typing import Any, ClassVar

from cpo_fast.errors import DataError
from cpo_fast.rows import first_value, row_id, row_text
from cpo_fast.tasks.answers import normalise_number
from cpo_fast.tasks.task import ANSWER_MARK, VERDICT_CUE, Demonstrations, Question, Task

# stands before the number in a GSM8K solution
GSM8K_MARK = "####"

DEMONSTRATIONS = Demonstrations(
    "Solve each word problem one line at a time: numbered steps, then the answer as a number.",
    (
        """Question: A bakery baked 48 rolls in the morning and 35 rolls in the afternoon. It sold 59 rolls that day. \
How many rolls were left?
Step 1: The bakery baked 48 + 35 = 83 rolls in all.
Step 2: After selling 59 rolls, 83 - 59 = 24 rolls were left.
Answer: 24""",
        """Question: Nadia is 12 years old. She rides her bicycle for 25 minutes each day. \
How many minutes does she ride in 6 days?
Step 1: Her age does not matter, only the 25 minutes each day.
Step 2: In 6 days she rides 25 * 6 = 150 minutes.
Answer: 150""",
        """Question: A farmer picked 96 pears and 40 plums. He packed the pears into boxes of 8. \
How many boxes of pears did he fill?
Step 1: Only the 96 pears go into the boxes.
Step 2: With 8 pears in a box he filled 96 / 8 = 12 boxes.
Answer: 12""",
        """Question: Omar had 52 stamps. He gave some of them to his sister and then had 37 stamps. \
How many stamps did he give to his sister?
Step 1: Omar started with 52 stamps and ended with 37 stamps.
Step 2: He gave away 52 - 37 = 15 stamps.
Answer: 15""",
    ),
)

STEP_VERDICTS = Demonstrations(
    "Judge the last line of each solution. It is likely if it is right and leads to the answer, and impossible if it "
    "is wrong.",
    (
        f"""Question: Lena collected 31 shells on Monday and 18 shells on Tuesday. Her brother gave her 7 more. \
How many shells does she have?
Step 1: She collected 31 + 18 = 49 shells herself.
{VERDICT_CUE} likely""",
        f"""Question: A school has 14 classrooms. Each classroom has 20 chairs and 3 windows. \
How many chairs are there in all?
Step 1: There are 14 + 20 = 34 chairs in all.
{VERDICT_CUE} impossible""",
        f"""Question: A cook had 90 eggs. He used 36 of them for cakes and 24 of them for soup. \
How many eggs did he not use?
Step 1: He used 36 + 24 = 60 eggs.
Step 2: He did not use 90 - 60 = 40 eggs.
{VERDICT_CUE} impossible""",
        f"""Question: Ines reads 15 pages each evening. Her book has 105 pages. How many evenings does she need?
Step 1: She has to read 105 pages, 15 of them each evening.
Step 2: She needs 105 / 15 = 7 evenings.
{VERDICT_CUE} likely""",
    ),
)

CONCLUSION_VERDICTS = Demonstrations(
    "Judge the answer at the end of each solution. It is likely if it follows from right steps and is what the question "
    "asks for, and impossible if it is not.",
    (
        f"""Question: Tomas had 65 marbles. He lost 28 of them in the park. How many marbles does he have now?
Step 1: Tomas started with 65 marbles and lost 28 marbles.
Step 2: He has 65 - 28 = 47 marbles now.
Answer: 47
{VERDICT_CUE} impossible""",
        f"""Question: 72 children are going on a trip. 9 children fit in each van. How many vans are needed?
Step 1: The children are split into groups of 9.
Step 2: The trip needs 72 / 9 = 8 vans.
Answer: 8
{VERDICT_CUE} likely""",
        f"""Question: A shop sold 23 red scarves and 19 blue scarves. Each scarf costs 6 dollars. \
How many scarves did it sell?
Step 1: The price does not matter, only the scarves.
Step 2: It sold 23 + 19 = 42 scarves.
Answer: 42
{VERDICT_CUE} likely""",
        f"""Question: Paula has 80 beads. She makes 4 bracelets of 12 beads each. How many beads are left?
Step 1: The bracelets take 4 * 12 = 48 beads.
Step 2: Of the 80 beads, 80 - 48 = 32 are left.
Answer: 48
{VERDICT_CUE} impossible""",
    ),
)


class ArithmeticTask(Task):
    """Word problems with one number as the answer. The vote sums values, the metric is numeric equality."""

    main_metric: ClassVar[str] = "numeric"
    demonstrations: ClassVar[Demonstrations] = DEMONSTRATIONS
    step_verdicts: ClassVar[Demonstrations] = STEP_VERDICTS
    conclusion_verdicts: ClassVar[Demonstrations] = CONCLUSION_VERDICTS

    def read_row(self, row: dict[str, Any], place: str) -> Question:
        """A row of SVAMP, of GSM8K, or of `question[, answer][, id]`."""
        if "Body" in row:  # SVAMP
            body, asked = row["Body"], row.get("Question")
            if not isinstance(body, str) or not isinstance(asked, str):
                raise DataError(f"{place}: expected text in 'Body' and 'Question'")
            text = f"{body.strip()} {asked.strip()}".strip()
            if not text:
                raise DataError(f"{place}: the question is empty; delete the row")
        else:
            text = row_text(row, ("question", "Question", "problem"), place)
        return Question(row_id(row, text, place), text, _gold(first_value(row, ("Answer", "answer")), place))

    def may_repeat(self, row: dict[str, Any]) -> bool:
        """GSM8K has no ids: the same problem twice is not the user's mistake."""
        return GSM8K_MARK in str(row.get("answer"))

    def parse_answer(self, line: str) -> str | None:
        """The number of an `Answer: ...` line in normal form, or None where none or more than one can be meant."""
        text = line.strip()
        if not text.startswith(ANSWER_MARK):
            return None
        return normalise_number(text.removeprefix(ANSWER_MARK))

    def score_answer(self, answer: str | None, gold: str) -> dict[str, float]:
        number = None if answer is None else normalise_number(answer)
        return {"numeric": float(number is not None and number == normalise_number(gold))}


def _gold(value: Any, place: str) -> str | None:
    if value is None:
        return None
    text = str(value).rpartition(GSM8K_MARK)[2]  # all of it where there is no mark
    gold = None if isinstance(value, bool) else normalise_number(text)
    if gold is None:
        raise DataError(f"{place}: the answer {value!r} is not a number; mend it, or leave the answer out")
    return gold
