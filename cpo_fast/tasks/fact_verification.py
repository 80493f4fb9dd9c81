"""Claims to be judged from the model's own knowledge: FEVER, FEVEROUS, VitaminC.

Released files, all JSON lines: FEVER (id, verifiable, label, claim, evidence). FEVEROUS (id, claim, label, evidence,
annotator_operations, challenge, ...), whose first line may be a header with an empty claim. VitaminC (unique_id,
case_id, claim, evidence, label, page, ...), where claims come back with other evidence under other ids. Evidence is not
shown to the model: claims are judged closed-book, as the CPO paper does.
"""

import re
from typing import Any, ClassVar, Literal

from cpo_fast.errors import DataError
from cpo_fast.rows import first_value, row_id, row_text
from cpo_fast.tasks.task import ANSWER_MARK, CLAIM_MARK, VERDICT_CUE, Demonstrations, Question, Task

SUPPORTS = "SUPPORTS"
REFUTES = "REFUTES"
NOT_ENOUGH_INFO = "NOT ENOUGH INFO"

DEMONSTRATIONS = Demonstrations(
    "Judge each claim one line at a time: numbered steps, then the answer as SUPPORTS, REFUTES or NOT ENOUGH INFO.",
    (
        """Claim: The Danube flows into the Black Sea.
Step 1: The Danube rises in Germany and runs east across Europe.
Step 2: It ends in a delta in Romania and Ukraine, on the coast of the Black Sea.
Answer: SUPPORTS""",
        """Claim: The painter Vincent van Gogh was born in Spain.
Step 1: Vincent van Gogh was a Dutch painter.
Step 2: He was born in Zundert, which lies in the Netherlands and not in Spain.
Answer: REFUTES""",
        """Claim: Isaac Newton ate an apple on his tenth birthday.
Step 1: Isaac Newton was an English scientist of the seventeenth century.
Step 2: No record tells what he ate on his tenth birthday, so the claim can be neither shown nor denied.
Answer: NOT ENOUGH INFO""",
        """Claim: The author of the novel Frankenstein was a woman.
Step 1: The novel Frankenstein was written by Mary Shelley.
Step 2: Mary Shelley was an English writer and a woman.
Answer: SUPPORTS""",
    ),
)

STEP_VERDICTS = Demonstrations(
    "Judge the last line of each solution. It is likely if it is true and helps to judge the claim, and impossible if "
    "it is false.",
    (
        f"""Claim: The Great Wall of China is in Japan.
Step 1: The Great Wall of China is a line of walls in the north of China.
{VERDICT_CUE} likely""",
        f"""Claim: Leo Tolstoy wrote the novel War and Peace.
Step 1: War and Peace was written by Charles Dickens.
{VERDICT_CUE} impossible""",
        f"""Claim: The capital of Turkey is Ankara.
Step 1: Turkey is a country that lies partly in Asia and partly in Europe.
Step 2: The capital of Turkey is Istanbul.
{VERDICT_CUE} impossible""",
        f"""Claim: Helium is a metal.
Step 1: Helium is the chemical element with the symbol He.
Step 2: Helium is a noble gas, and noble gases are not metals.
{VERDICT_CUE} likely""",
    ),
)

CONCLUSION_VERDICTS = Demonstrations(
    "Judge the answer at the end of each solution. It is likely if it follows from true steps, and impossible if it "
    "does not.",
    (
        f"""Claim: The Nile flows through Egypt.
Step 1: The Nile is a river in Africa that flows north to the Mediterranean Sea.
Step 2: It reaches the sea in Egypt.
Answer: SUPPORTS
{VERDICT_CUE} likely""",
        f"""Claim: William Shakespeare was born in Paris.
Step 1: William Shakespeare was an English playwright.
Step 2: He was born in Stratford-upon-Avon, which is in England.
Answer: SUPPORTS
{VERDICT_CUE} impossible""",
        f"""Claim: Marie Curie had a cup of tea on the morning of 3 March 1890.
Step 1: Marie Curie was a scientist who was born in Warsaw in 1867.
Step 2: Nothing that is known tells what she drank on that morning.
Answer: NOT ENOUGH INFO
{VERDICT_CUE} likely""",
        f"""Claim: The ostrich is a bird.
Step 1: The ostrich has feathers and lays eggs.
Step 2: It is the largest bird that is alive today.
Answer: REFUTES
{VERDICT_CUE} impossible""",
    ),
)

_LABELS = {
    "supports": SUPPORTS,
    "supported": SUPPORTS,
    "refutes": REFUTES,
    "refuted": REFUTES,
    "not enough info": NOT_ENOUGH_INFO,
    "not enough information": NOT_ENOUGH_INFO,
}
# a hyphen makes another word of it: SUPPORTS-like
_LABEL = re.compile(r"\b(?:supports|supported|refutes|refuted|not enough info(?:rmation)?)\b(?!-)", re.IGNORECASE)


class FactVerificationTask(Task):
    """Claims with one of three labels. The vote counts complete paths, the metric is equality of labels."""

    question_mark: ClassVar[str] = CLAIM_MARK
    vote_by: ClassVar[Literal["value", "count"]] = "count"  # an answer is one of three labels
    main_metric: ClassVar[str] = "exact"
    demonstrations: ClassVar[Demonstrations] = DEMONSTRATIONS
    step_verdicts: ClassVar[Demonstrations] = STEP_VERDICTS
    conclusion_verdicts: ClassVar[Demonstrations] = CONCLUSION_VERDICTS

    def read_row(self, row: dict[str, Any], place: str) -> Question | None:
        """A row of any of the three sets, or of claim (or question) and label (or answer)."""
        if _is_header(row):
            return None
        text = row_text(row, ("claim", "question"), place)
        return Question(row_id(row, text, place), text, _gold(first_value(row, ("label", "answer")), place))

    def may_repeat(self, row: dict[str, Any]) -> bool:
        """Some editions give a claim one row for each piece of evidence."""
        return any(key.startswith("evidence") for key in row)

    def parse_answer(self, line: str) -> str | None:
        """The label that an `Answer: ...` line opens with, or None without one, or if its sentence names another too."""
        text = line.strip()
        if not text.startswith(ANSWER_MARK):
            return None
        return parse_label(text.removeprefix(ANSWER_MARK))

    def score_answer(self, answer: str | None, gold: str) -> dict[str, float]:
        label = None if answer is None else parse_label(answer)
        return {"exact": float(label is not None and label == parse_label(gold))}


def parse_label(text: str) -> str | None:
    """The label that `text` opens with, in any case, quotes and emphasis aside, or None.

    "SUPPORTS. It is known ..." is SUPPORTS. "not SUPPORTS", "SUPPORTS or REFUTES" and "supporters say" are no label.
    """
    # what follows the first clause explains the label, and may name others
    opening = re.split(r"[.;:!(\n]", text.strip().lstrip("\"'*` "), maxsplit=1)[0]
    found = _LABEL.findall(opening)
    if not found or not opening.lower().startswith(found[0].lower()):
        return None
    labels = {_LABELS[each.lower()] for each in found}
    return labels.pop() if len(labels) == 1 else None


def _is_header(row: dict[str, Any]) -> bool:
    """Whether this is FEVEROUS's first line, which only shows the fields."""
    return row.get("claim") == "" and not row.get("label") and not row.get("id") and "evidence" in row


def _gold(value: Any, place: str) -> str | None:
    if value is None or value == "":  # as in test sets
        return None
    label = _LABELS.get(value.strip().lower()) if isinstance(value, str) else None
    if label is None:
        raise DataError(
            f"{place}: the label {value!r} is none of {SUPPORTS}, {REFUTES} and {NOT_ENOUGH_INFO}; mend it, or leave the "
            "label out"
        )
    return label
