"""Claims: the released formats, three labels and nothing else, votes by count."""

import json

import pytest

from cpo_fast.errors import DataError
from cpo_fast.tasks import Question, get_task

TASK = get_task("fever")
SUPPORTS, REFUTES, NOT_ENOUGH_INFO = "SUPPORTS", "REFUTES", "NOT ENOUGH INFO"


def _jsonl(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_fever_keeps_its_ids_and_hides_its_evidence(tmp_path):
    row = {
        "id": 75397,
        "verifiable": "VERIFIABLE",
        "label": "SUPPORTS",
        "claim": "The Danube is a river.",
        "evidence": [[[92206, 104971, "Danube_page", 7]]],
    }
    path = _jsonl(tmp_path / "train.jsonl", row, {"id": 3, "claim": "A test claim."})
    first, unlabelled = TASK.load(path)
    assert first == Question("75397", "The Danube is a river.", SUPPORTS)
    assert unlabelled.gold is None
    assert "Danube_page" not in TASK.prompt(first)
    assert TASK.prompt(first).endswith("\n\nClaim: The Danube is a river.\n")


def test_the_header_of_feverous_is_skipped_and_no_other_empty_claim_is(tmp_path):
    header = {"evidence": [{"content": [], "context": {}}], "id": "", "claim": "", "label": "", "challenge": ""}
    row = {"evidence": [], "id": 24435, "claim": "Iron is a metal.", "label": "NOT ENOUGH INFO", "challenge": "Other"}
    path = _jsonl(tmp_path / "feverous.jsonl", header, row)
    assert get_task("feverous").load(path) == [Question("24435", "Iron is a metal.", NOT_ENOUGH_INFO)]
    path = _jsonl(tmp_path / "bad.jsonl", row, {**row, "id": 24436, "claim": ""})
    with pytest.raises(DataError, match=r"bad\.jsonl:2: the claim is empty"):
        get_task("feverous").load(path)


def test_vitaminc_asks_one_claim_under_several_ids(tmp_path):
    row = {"unique_id": "5eb_1", "case_id": "5eb", "claim": "It sold 5 copies.", "evidence": "Six.", "label": "REFUTES"}
    path = _jsonl(tmp_path / "dev.jsonl", row, {**row, "unique_id": "5eb_2", "evidence": "5.", "label": "SUPPORTS"})
    questions = get_task("vitaminc").load(path)
    assert [(question.id, question.gold) for question in questions] == [("5eb_1", REFUTES), ("5eb_2", SUPPORTS)]


def test_a_claim_with_a_row_for_each_evidence_is_one_claim(tmp_path):
    rows = [{"id": 1, "claim": "Iron is a metal.", "label": "SUPPORTS", "evidence_id": each} for each in range(3)]
    assert len(TASK.load(_jsonl(tmp_path / "q.jsonl", *rows))) == 1
    rows[2]["label"] = "REFUTES"
    with pytest.raises(DataError, match=r"q\.jsonl:3: .*already at .*q\.jsonl:1"):
        TASK.load(_jsonl(tmp_path / "q.jsonl", *rows))


@pytest.mark.parametrize("row", [{"claim": "C.", "label": "refutes"}, {"question": "C.", "answer": "REFUTES"}])
def test_own_files_may_say_claim_or_question_and_label_or_answer(tmp_path, row):
    question = TASK.load(_jsonl(tmp_path / "q.jsonl", row))[0]
    assert (question.text, question.gold) == ("C.", REFUTES)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"claim": "C.", "label": "MAYBE"}, r"q\.jsonl:1: the label 'MAYBE' is none of SUPPORTS, REFUTES"),
        ({"claim": "C.", "label": 1}, r"q\.jsonl:1: the label 1 is none of"),
        ({"claim": "C.", "label": "not SUPPORTS"}, "is none of"),
        ({"label": "SUPPORTS"}, r"q\.jsonl:1: expected text in 'claim' or 'question'"),
        ({"claim": ["C."], "label": "SUPPORTS"}, "expected text"),
        ({"claim": "", "label": "SUPPORTS"}, "the claim is empty"),
        ({"claim": "", "label": ""}, "holds no question"),
    ],
)
def test_a_bad_row_is_named(tmp_path, row, message):
    with pytest.raises(DataError, match=message):
        TASK.load(_jsonl(tmp_path / "q.jsonl", row))


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("SUPPORTS", SUPPORTS),
        ("REFUTES.", REFUTES),
        ("not enough info", NOT_ENOUGH_INFO),
        ("NOT ENOUGH INFORMATION", NOT_ENOUGH_INFO),
        ("**SUPPORTS**", SUPPORTS),
        ('"REFUTES"', REFUTES),
        ("Supported", SUPPORTS),
        ("REFUTES. The text that he supports is another.", REFUTES),
        ("SUPPORTS or REFUTES", None),
        ("SUPPORTS, REFUTES", None),
        ("not SUPPORTS", None),
        ("It SUPPORTS", None),
        ("supporters say so", None),
        ("support", None),
        ("SUPPORTS-like", None),
        ("yes", None),
        ("", None),
    ],
)
def test_an_answer_is_one_label_or_none(text, label):
    assert TASK.parse_answer(f"Answer: {text}\n") == label


def test_labels_are_equal_or_wrong_and_votes_are_counted():
    assert TASK.vote_by == "count"
    assert get_task("svamp").vote_by == get_task("bamboogle").vote_by == "value"
    assert TASK.score_answer(SUPPORTS, "SUPPORTS") == {"exact": 1.0}
    assert TASK.score_answer(None, SUPPORTS) == {"exact": 0.0}
    assert TASK.is_correct(REFUTES, REFUTES)
    assert not TASK.is_correct(NOT_ENOUGH_INFO, SUPPORTS)
    assert not TASK.is_correct("no label", "no label")


def test_a_run_on_into_another_claim_is_seen():
    assert TASK.leaves_question("Claim: Another one.\n")
    assert TASK.leaves_question("Question: Another one?\n")
    assert not TASK.leaves_question("Step 2: The claim: it stands.\n")
