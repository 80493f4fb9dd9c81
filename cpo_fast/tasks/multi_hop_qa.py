"""Questions that need two facts, answered in a few words from the model's own knowledge: Bamboogle, 2Wiki, HotpotQA.

Released files: Bamboogle is a CSV of (Question, Answer) without ids. 2WikiMultiHopQA and HotpotQA are JSON lists of
(_id, question, answer, type, supporting_facts, context, ...), test sets without the answer. Context is not shown to the
model: the questions are asked closed-book, as the CPO paper does. Aliases of an answer are left out.
"""

from typing import Any, ClassVar

from cpo_fast.errors import DataError
from cpo_fast.rows import first_value, row_id, row_text
from cpo_fast.tasks.answers import contains, exact_match, f1_score, is_number, normalise_number, normalise_words
from cpo_fast.tasks.task import ANSWER_MARK, VERDICT_CUE, Demonstrations, Question, Task

DEMONSTRATIONS = Demonstrations(
    "Answer each question one line at a time: numbered steps, then the answer in a few words.",
    (
        """Question: In which country was the inventor of dynamite born?
Step 1: Dynamite was invented by Alfred Nobel.
Step 2: Alfred Nobel was born in Stockholm, which is in Sweden.
Answer: Sweden""",
        """Question: Which river is longer, the Rhine or the Amazon?
Step 1: The Rhine is about 1,230 kilometres long.
Step 2: The Amazon is more than 6,000 kilometres long, so the Amazon is longer.
Answer: Amazon""",
        """Question: Were the composers Ludwig van Beethoven and Wolfgang Amadeus Mozart born in the same city?
Step 1: Ludwig van Beethoven was born in Bonn.
Step 2: Wolfgang Amadeus Mozart was born in Salzburg, which is another city.
Answer: no""",
        """Question: In which year did the first man who walked on the Moon die?
Step 1: The first man who walked on the Moon was Neil Armstrong.
Step 2: Neil Armstrong died in August 2012.
Answer: 2012""",
    ),
)

STEP_VERDICTS = Demonstrations(
    "Judge the last line of each solution. It is likely if it is true and leads to the answer, and impossible if it "
    "is false.",
    (
        f"""Question: What is the capital of the country in which the Colosseum stands?
Step 1: The Colosseum stands in Rome, which is in Italy.
{VERDICT_CUE} likely""",
        f"""Question: Who was the mother of the English queen who was born in 1533?
Step 1: The English queen who was born in 1533 was Elizabeth I.
Step 2: The mother of Elizabeth I was Catherine of Aragon.
{VERDICT_CUE} impossible""",
        f"""Question: In which country was the painter of the Mona Lisa born?
Step 1: The Mona Lisa was painted by Rembrandt.
{VERDICT_CUE} impossible""",
        f"""Question: Which mountain is higher, Mount Fuji or Mount Everest?
Step 1: Mount Fuji is 3,776 metres high.
Step 2: Mount Everest is 8,849 metres high, so Mount Everest is higher.
{VERDICT_CUE} likely""",
    ),
)

CONCLUSION_VERDICTS = Demonstrations(
    "Judge the answer at the end of each solution. It is likely if it follows from true steps and is what the question "
    "asks for, and impossible if it is not.",
    (
        f"""Question: On which continent is the country whose capital is Nairobi?
Step 1: Nairobi is the capital of Kenya.
Step 2: Kenya lies on the east coast of Africa.
Answer: Africa
{VERDICT_CUE} likely""",
        f"""Question: Who directed the film in which a shark attacks swimmers off Amity Island?
Step 1: The film about a shark off Amity Island is Jaws.
Step 2: Jaws was directed by Steven Spielberg.
Answer: Jaws
{VERDICT_CUE} impossible""",
        f"""Question: Are Oslo and Bergen in the same country?
Step 1: Oslo is the capital of Norway.
Step 2: Bergen is a city on the west coast of Norway.
Answer: no
{VERDICT_CUE} impossible""",
        f"""Question: In which year did the war end during which Anne Frank wrote her diary?
Step 1: Anne Frank wrote her diary during the Second World War.
Step 2: The Second World War ended in 1945.
Answer: 1945
{VERDICT_CUE} likely""",
    ),
)


class MultiHopQATask(Task):
    """Questions with a short answer. The vote sums values, the metric is containment, the accuracy of the paper."""

    main_metric: ClassVar[str] = "containment"
    demonstrations: ClassVar[Demonstrations] = DEMONSTRATIONS
    step_verdicts: ClassVar[Demonstrations] = STEP_VERDICTS
    conclusion_verdicts: ClassVar[Demonstrations] = CONCLUSION_VERDICTS

    def read_row(self, row: dict[str, Any], place: str) -> Question:
        """A row of any of the three sets, or of `question[, answer][, id]`."""
        text = row_text(row, ("question", "Question"), place)
        return Question(row_id(row, text, place), text, _gold(first_value(row, ("answer", "Answer")), place))

    def parse_answer(self, line: str) -> str | None:
        """The words of an `Answer: ...` line in normal form, or None if it has no letter or digit."""
        text = line.strip()
        if not text.startswith(ANSWER_MARK):
            return None
        return normalise_words(text.removeprefix(ANSWER_MARK)) or None

    def score_answer(self, answer: str | None, gold: str) -> dict[str, float]:
        """`exact`, `f1` and `containment`. Also `numeric` where the reference is a number."""
        said = answer or ""
        scores = {
            "exact": float(exact_match(said, gold)),
            "f1": f1_score(said, gold),
            "containment": float(contains(said, gold)),
        }
        if is_number(gold):
            scores["numeric"] = float(normalise_number(said) == normalise_number(gold))
        return scores


def _gold(value: Any, place: str) -> str | None:
    if value is None:
        return None
    # a bool is an int to Python
    if isinstance(value, bool) or not isinstance(value, str | int | float) or not normalise_words(str(value)):
        raise DataError(f"{place}: the answer {value!r} is no text; mend it, or leave the answer out")
    return str(value).strip()  # as written: scoring normalises both sides
