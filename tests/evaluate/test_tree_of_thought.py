"""Tree of thought as an answer: the vote of the real search over a scripted engine, and every token of it counted."""

from typing import Any

from cpo_fast.config import Config, SearchConfig
from cpo_fast.evaluate.evaluation import QuestionAnswer, tree_answer
from cpo_fast.search.engine import Sample, SampleRequest
from cpo_fast.tasks import Prompts, Question, get_task
from tests.evaluate.scripted import ScriptedEngine

TASK = get_task("svamp")
QUESTION = Question("q", "What is the sum?", "3")
THOUGHTS = {
    ("sum", 0): ["Step 1: good\n", "Step 1: bad\n", "Step 1: good\n", " \n"],  # a duplicate and an empty sample
    ("sum", 1): ["Answer: 3\n", "Answer: 4", "Answer: none\n", "Answer: 3\n"],
}
SETTINGS = {"num_candidates": 4, "num_kept": 1, "max_steps": 2, "max_thought_tokens": 40, "shuffle_evaluator": False}


def _answer(engine: ScriptedEngine, **settings: Any) -> QuestionAnswer:
    config = Config(search=SearchConfig(**SETTINGS, **settings))
    return tree_answer(engine, config, Prompts(TASK, engine.tokenizer), QUESTION)


def test_tree_answers_by_its_vote_and_counts_what_every_sample_cost() -> None:
    engine = ScriptedEngine({}, THOUGHTS, eos_after=("Answer: 4",))
    answer = _answer(engine)
    assert (answer.answer, answer.stop, answer.text) == ("3", "ok", "Step 1: good\nAnswer: 3\n")
    # one state is kept and expanded, so each list is sampled once; the sequence's end stands for a token
    expected = sum(len(line) for lines in THOUGHTS.values() for line in lines) + 1
    assert (answer.num_tokens, answer.num_verdict_tokens) == (expected, 0)
    assert answer.seconds > 0


class JudgingEngine(ScriptedEngine):
    """Says one line wherever a verdict is sampled."""

    verdict = " likely\n"

    def line(self, number: int, request: SampleRequest) -> Sample:
        if "/verdict/" in request.uid:
            return ScriptedEngine({}, {("", count): [self.verdict] for count in range(9)}).line(number, request)
        return super().line(number, request)


def test_sampled_verdicts_are_tokens_too() -> None:
    said = JudgingEngine.verdict
    answer = _answer(JudgingEngine({}, THOUGHTS, eos_after=("Answer: 4",)), evaluator="sample", num_verdicts=3)
    # two distinct states of the first level, three of the second, each judged three times
    assert answer.num_verdict_tokens == (2 + 3) * 3 * len(said)
    thoughts = sum(len(line) for lines in THOUGHTS.values() for line in lines) + 1
    assert answer.num_tokens == thoughts + answer.num_verdict_tokens


def test_tree_that_abstains_answers_nothing() -> None:
    answer = _answer(ScriptedEngine({}, THOUGHTS, eos_after=("Answer: 4",)), min_value=10.0)
    assert (answer.answer, answer.stop, answer.text) == (None, "abstained", "")


def test_tree_without_an_answer_says_so_and_still_costs_tokens() -> None:
    engine = ScriptedEngine({}, {("sum", 0): ["Step 1: bad\n"], ("sum", 1): ["Step 2: worse\n"]})
    answer = _answer(engine)
    assert (answer.answer, answer.stop, answer.text) == (None, "no_answer", "")
    assert answer.num_tokens == 4 * len("Step 1: bad\n") + 4 * len("Step 2: worse\n")
