"""The hand-written questions in examples/questions: ten a family, readable by every task of it, each with an answer."""

import re
from pathlib import Path

import pytest

from cpo_fast.tasks import get_task

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "questions"
FILES = [("gsm.jsonl", ["svamp", "gsm8k"]), ("qa.jsonl", ["bamboogle", "2wikimultihopqa", "hotpotqa"])]
FILES += [("fact.jsonl", ["fever", "feverous", "vitaminc"])]
CASES = [(file, name) for file, names in FILES for name in names]


@pytest.mark.parametrize(("file", "name"), CASES)
def test_ten_questions_whose_answers_are_right_by_the_tasks_own_metric(file, name):
    task = get_task(name)
    questions = task.load(FOLDER / file)
    assert len(questions) == 10
    golds = [question.gold for question in questions]
    for gold in golds:
        assert gold is not None
        assert task.is_correct(task.parse_answer(f"Answer: {gold}\n"), gold)
    # an answer that is right for every question would make accuracy say nothing
    assert max(golds.count(gold) for gold in golds) < 6


@pytest.mark.parametrize(("file", "name"), CASES)
def test_no_example_is_a_demonstration(file, name):
    task = get_task(name)
    texts = task.few_shot + task.few_shot_evaluator + task.few_shot_conclusion_evaluator
    shown = set(re.findall(f"^{task.question_mark} (.*)", texts, re.MULTILINE))
    assert not shown & {question.text for question in task.load(FOLDER / file)}
