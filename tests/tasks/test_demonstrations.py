"""Demonstrations of every family: the format of the chain, balanced verdicts, and an order that the seed decides."""

import itertools
import re
import time

import pytest

from cpo_fast.tasks import Question, get_task
from cpo_fast.tasks.task import Demonstrations
from cpo_fast.tasks.task_file import VERDICT_CUE

FAMILIES = ["svamp", "bamboogle", "fever"]
GOLDS = {"svamp": "4", "bamboogle": "Rome", "fever": "REFUTES"}
NAMES = ["svamp", "gsm8k", "bamboogle", "2wikimultihopqa", "hotpotqa", "fever", "feverous", "vitaminc"]
STEPS = ["Step 1: It is so.\n", "Step 2: Her stepmother met malcolm x - twice.\n"]


def _blocks(text):
    assert text.endswith("\n\n")
    return text.strip().split("\n\n")[1:]


@pytest.mark.parametrize("name", NAMES)
def test_every_task_knows_its_name_and_shows_four_chains(name):
    task = get_task(name)
    assert task.name == name
    blocks = _blocks(task.few_shot)
    assert len(blocks) == 4
    for block in blocks:
        lines = block.split("\n")
        assert lines[0].startswith(f"{task.question_mark} ")
        assert [line.split(":")[0] for line in lines[1:]] == ["Step 1", "Step 2", "Answer"]
        assert task.is_answer_line(lines[-1])
        assert task.parse_answer(lines[-1]) is not None
        assert not any(task.leaves_question(line) for line in lines[1:])


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("which", ["few_shot_evaluator", "few_shot_conclusion_evaluator"])
def test_verdicts_are_spelt_right_balanced_and_about_the_right_kind_of_line(name, which):
    task = get_task(name)
    blocks = _blocks(getattr(task, which))
    assert len(blocks) == 4
    labels = []
    for block in blocks:
        *state, verdict = block.split("\n")
        assert verdict.startswith(VERDICT_CUE)
        labels.append(verdict.removeprefix(VERDICT_CUE))
        assert state[0].startswith(f"{task.question_mark} ")
        assert task.is_answer_line(state[-1]) is (which == "few_shot_conclusion_evaluator")
        assert all(re.match(r"(Step \d|Answer): ", line) for line in state[1:])
    assert sorted(labels) == [" impossible", " impossible", " likely", " likely"]


@pytest.mark.parametrize("name", FAMILIES)
def test_no_question_is_shown_twice_and_none_is_an_example_question(name):
    task = get_task(name)
    texts = task.few_shot + task.few_shot_evaluator + task.few_shot_conclusion_evaluator
    questions = re.findall(f"^{task.question_mark} (.*)", texts, re.MULTILINE)
    assert len(questions) == len(set(questions)) == 12


@pytest.mark.parametrize("name", FAMILIES)
def test_the_last_line_chooses_the_evaluator_and_lines_are_shown_as_they_are(name):
    task, question = get_task(name), Question("q", "Is it SO  - really = x?")
    shown = f"{task.question_mark} Is it SO  - really = x?\n{''.join(STEPS)}"
    assert task.evaluator_prompt(question, STEPS) == f"{task.few_shot_evaluator}{shown}{VERDICT_CUE}"
    assert task.evaluator_prompt(question, [*STEPS, "Answer: J. R. R. Tolkien\n"]) == (
        f"{task.few_shot_conclusion_evaluator}{shown}Answer: J. R. R. Tolkien\n{VERDICT_CUE}"
    )
    assert task.evaluator_prompt(question, []).startswith(task.few_shot_evaluator)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_seed_permutes_the_demonstrations_and_nothing_else(name):
    written = get_task(name)
    seeded = [get_task(name, demonstration_seed=seed) for seed in range(12)]
    assert get_task(name, demonstration_seed=3).few_shot == seeded[3].few_shot
    assert len({task.few_shot for task in seeded}) > 4
    for task in seeded:
        assert sorted(_blocks(task.few_shot)) == sorted(_blocks(written.few_shot))
        assert task.few_shot.split("\n\n")[0] == written.few_shot.split("\n\n")[0]
        assert task.few_shot_evaluator == written.few_shot_evaluator
    question = Question("q", "Why?")
    assert seeded[1].prompt(question).startswith(seeded[1].few_shot)


@pytest.mark.parametrize("lines", [STEPS, [*STEPS, "Answer: 3\n"]])
def test_the_evaluator_is_shuffled_by_its_own_seed(lines):
    written, question = get_task("svamp"), Question("q", "Why?")
    seeded = [get_task("svamp", evaluator_seed=seed) for seed in range(12)]
    prompts = [task.evaluator_prompt(question, lines) for task in seeded]
    assert len(set(prompts)) > 4
    assert {"".join(sorted(prompt)) for prompt in prompts} == {
        "".join(sorted(written.evaluator_prompt(question, lines)))
    }
    assert seeded[5].evaluator_prompt(question, lines) == prompts[5]
    assert seeded[5].few_shot == written.few_shot


def test_the_order_of_a_seed_never_changes():
    """A changed order would change every prompt of a run that is repeated after an update."""
    demonstrations = Demonstrations("Do.", ("a", "b", "c", "d"))
    assert demonstrations.text() == "Do.\n\na\n\nb\n\nc\n\nd\n\n"
    assert ["".join(demonstrations.ordered(seed)) for seed in (None, 0, 1, 2)] == ["abcd", "cbda", "dabc", "cabd"]


def test_every_order_is_drawn_about_equally_often():
    demonstrations = Demonstrations("Do.", ("a", "b", "c"))
    counts = dict.fromkeys(itertools.permutations("abc"), 0)
    for seed in range(600):
        counts[demonstrations.ordered(seed)] += 1
    # 100 expected, standard deviation 9: 60 to 140 is beyond four of them
    assert all(60 < count < 140 for count in counts.values())


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("unit", ["a", "the ", "7", "- ", "SUPPORTS ", "3/4 ", "\u6771", "\x00", "= x "])
def test_an_answer_line_of_100_kb_is_read_or_refused_at_once(name, unit):
    task = get_task(name)
    started = time.process_time()
    answer = task.parse_answer("Answer: " + unit * (100_000 // len(unit)))
    assert task.score_answer(answer, task.parse_answer(f"Answer: {GOLDS[name]}"))[task.main_metric] == 0.0
    assert time.process_time() - started < 10  # linear work takes a second, quadratic work minutes
