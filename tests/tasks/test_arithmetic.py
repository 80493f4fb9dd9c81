"""Arithmetic: loading the released formats, reading answers, prompts in the format of the chain."""

import json
import re

import pytest

from cpo_fast.errors import ConfigError, DataError
from cpo_fast.tasks import Question, get_task
from cpo_fast.tasks.task_file import VERDICT_CUE

TASK = get_task("svamp")

RELEASED = [
    {
        "ID": f"made-{number}",
        "Body": body,
        "Question": "How many are there?",
        "Equation": "( 1.0 + 2.0 )",
        "Answer": answer,
        "Type": "Addition",
    }
    for number, (body, answer) in enumerate([("There are 3 red and 4 blue cups.", 7.0), ("A box holds 2.5 kg", 2.5)], 1)
]


def _write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


def _lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def test_the_released_format_joins_body_and_question_with_a_space(tmp_path):
    questions = TASK.load(_write(tmp_path / "SVAMP.json", json.dumps(RELEASED, indent=4)))
    assert questions[0] == Question("made-1", "There are 3 red and 4 blue cups. How many are there?", "7")
    assert questions[1] == Question("made-2", "A box holds 2.5 kg How many are there?", "2.5")


def test_json_lines_may_leave_out_id_and_answer(tmp_path):
    path = _write(tmp_path / "q.jsonl", _lines({"question": "One?"}, {"id": 7, "question": "Two?", "answer": "1,200"}))
    first, second = TASK.load(path)
    assert first.gold is None
    assert re.fullmatch("[0-9a-f]{16}", first.id)
    assert second == Question("7", "Two?", "1200")
    assert TASK.load(path)[0].id == first.id


def test_a_gsm8k_solution_ends_in_its_answer(tmp_path):
    task = get_task("gsm8k")
    solution = "He has 2*6 = <<2*6=12>>12 boxes.\nThat is 12*150 = $1,800.\n#### 1,800"
    path = _write(tmp_path / "train.jsonl", _lines({"question": "How much?", "answer": solution}))
    assert [(question.text, question.gold) for question in task.load(path)] == [("How much?", "1800")]
    path = _write(tmp_path / "bad.jsonl", _lines({"question": "How much?", "answer": "12 boxes\n#### many"}))
    with pytest.raises(DataError, match=r"bad\.jsonl:1: the answer .* is not a number"):
        task.load(path)


def test_a_problem_that_gsm8k_repeats_is_asked_once_but_not_with_two_answers(tmp_path, caplog):
    caplog.set_level("INFO")
    rows = [{"question": "How much?", "answer": "a\n#### 3"}, {"question": "How much? ", "answer": "b\n#### 3"}]
    assert len(get_task("gsm8k").load(_write(tmp_path / "q.jsonl", _lines(*rows)))) == 1
    assert "1 rows repeat" in caplog.text
    rows[1]["answer"] = "b\n#### 4"
    with pytest.raises(DataError, match="already at"):
        get_task("gsm8k").load(_write(tmp_path / "q.jsonl", _lines(*rows)))


def test_skip_and_limit_cut_the_list(tmp_path):
    path = _write(tmp_path / "q.jsonl", _lines(*({"id": n, "question": str(n)} for n in range(6))))
    assert [question.id for question in TASK.load(path, limit=2, skip=3)] == ["3", "4"]
    assert TASK.load(path, skip=6) == []


def test_duplicates_are_named_with_both_places(tmp_path):
    path = _write(tmp_path / "q.jsonl", _lines({"question": "Same?"}, {"question": "Other?"}, {"question": "Same? "}))
    with pytest.raises(DataError, match=r"q\.jsonl:3: .*already at .*q\.jsonl:1"):
        TASK.load(path)
    path = _write(tmp_path / "s.json", json.dumps([RELEASED[0], RELEASED[0]]))
    with pytest.raises(DataError, match=r"s\.json: row 2: .*made-1.*row 1"):
        TASK.load(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"question": "a"}\n{"question": "b"\n', r":2: the line is not valid JSON"),
        (
            '{"question": "a"}\n{"ask": "a", "answer": 3}\n',
            r":2: .*'question'.* \(the row has 'ask', 'answer'; name the column by rows\.question of task\.file\)",
        ),
        ('{"question": ["a", "b"]}\n', r":1: expected text in 'question'.*, got list; a row is one question"),
        ('{"data": [{"question": "a"}]}\n', r":1: .*the rows stand under 'data': save that list alone"),
        ('{\n"data": [\n{"question": "a"}]}\n', r":1: a JSON object over several lines; the rows stand under 'data'"),
        ('\n{\n"question": "a"}\n{"question": "b"}\n', r":2: a JSON object over several lines; write each object on"),
        ("{}\n", r":1: .*the row is empty"),
        ('{"question": " "}\n', r":1: the question is empty"),
        ('{"question": "a", "answer": "a dozen"}\n', r":1: the answer 'a dozen' is not a number"),
        ('{"question": "a", "answer": true}\n', r":1: the answer True is not a number"),
        ('{"id": [1], "question": "a"}\n', r":1: the id must be"),
        ('[{"Body": "a"}]', r"row 1: expected text in 'Body' and 'Question' \(the row has 'Body'; name"),
        ("[3]", r"row 1: expected a JSON object"),
        ("[\n{]", r":2: the file is not valid JSON"),
        ("", "holds no question"),
    ],
)
def test_a_bad_row_is_named(tmp_path, text, message):
    with pytest.raises(DataError, match=message):
        TASK.load(_write(tmp_path / "q", text))


def test_a_missing_file_is_a_data_error(tmp_path):
    with pytest.raises(DataError, match="cannot read"):
        TASK.load(tmp_path / "absent.json")


def test_only_an_answer_line_has_an_answer():
    assert TASK.parse_answer("Answer: 24\n") == "24"
    assert TASK.parse_answer("Answer: 24\n\n") == "24"
    assert TASK.parse_answer("Step 2: 24\n") is None
    assert TASK.parse_answer("The Answer: 24") is None
    assert TASK.parse_answer("Answer:\n") is None


@pytest.mark.parametrize(
    ("line", "answer"),
    [
        ("Answer: He has 4 x 5 = 20 boxes - all of them blue.", "20"),
        ("Answer: x = 20", "20"),
        ("Answer: 20 = x", "20"),
        ("Answer: the rest - 20 boxes", "20"),
        ("Answer: -20", "-20"),
        ("Answer: $5", "5"),
        ("Answer: 1,912 people", "1912"),
        ("Answer: 145.0", "145"),
        ("Answer: 3/4 of a cup", "0.75"),
        ("Answer: malcolm x", None),
        ("Answer: 3 or 4", None),
    ],
)
def test_signs_of_arithmetic_inside_prose_are_read_as_meant(line, answer):
    assert TASK.parse_answer(line + "\n") == answer


def test_two_answers_without_a_number_are_not_equal():
    assert not TASK.is_correct("none", "nothing")
    assert TASK.score_answer(None, "3") == {"numeric": 0.0}
    assert TASK.score_answer("$3.00", "3") == {"numeric": 1.0}


def test_correct_is_numeric_equality_not_containment():
    assert TASK.is_correct("24", "24.0")
    assert TASK.is_correct("0.5", "1/2")
    assert not TASK.is_correct("2", "12")
    assert not TASK.is_correct("-24", "24")
    assert not TASK.is_correct(None, "24")


def test_demonstrations_follow_the_chain_format_and_their_arithmetic_is_right():
    blocks = TASK.few_shot.strip().split("\n\n")[1:]
    assert len(blocks) == 4
    for block in blocks:
        lines = block.split("\n")
        assert lines[0].startswith("Question: ")
        assert [line.split(":")[0] for line in lines[1:]] == ["Step 1", "Step 2", "Answer"]
        answer = TASK.parse_answer(lines[-1])
        for left, right in re.findall(r"(\d+ [-+*/] \d+) = (\d+)", block):
            assert eval(left) == int(right)  # digits and one operator, by the pattern
        assert answer == re.findall(r"= (\d+)", block)[-1]
    assert TASK.few_shot.endswith("\n\n")


@pytest.mark.parametrize(
    ("few_shot", "wrong", "meant_wrong"),
    [
        # the classrooms are added right where a product is asked for
        (TASK.few_shot_evaluator, [False, False, True, False], "14 + 20"),
        # the beads are counted right, and the answer is those that were used
        (TASK.few_shot_conclusion_evaluator, [True, False, False, False], "Answer: 48"),
    ],
)
def test_verdict_demonstrations_say_impossible_exactly_where_something_is_wrong(few_shot, wrong, meant_wrong):
    blocks = few_shot.strip().split("\n\n")[1:]
    verdicts = [block.rpartition("\n")[2].removeprefix(VERDICT_CUE) for block in blocks]
    found = [any(eval(a) != int(b) for a, b in re.findall(r"(\d+ [-+*/] \d+) = (\d+)", block)) for block in blocks]
    assert found == wrong
    impossible = [is_wrong or meant_wrong in block for is_wrong, block in zip(wrong, blocks, strict=True)]
    assert verdicts == [" impossible" if each else " likely" for each in impossible]
    assert sum(impossible) == 2


def test_prompts_keep_the_question_as_it_is_and_end_where_the_model_goes_on():
    question = Question("q", "How MANY  $ signs?")
    prompt = TASK.prompt(question)
    assert prompt == TASK.few_shot + "Question: How MANY  $ signs?\n"
    state = TASK.evaluator_prompt(question, ["Step 1: a\n", "Answer: 3\n\n"])
    shown = "Question: How MANY  $ signs?\nStep 1: a\n"
    assert state == f"{TASK.few_shot_conclusion_evaluator}{shown}Answer: 3\n{VERDICT_CUE}"
    assert TASK.evaluator_prompt(question, ["Step 1: a\n"]) == f"{TASK.few_shot_evaluator}{shown}{VERDICT_CUE}"


def test_an_unknown_task_is_a_configuration_error():
    with pytest.raises(ConfigError, match="'svmap' is not a task"):
        get_task("svmap")
