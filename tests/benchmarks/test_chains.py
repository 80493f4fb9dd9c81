"""Chains side by side against one at a time: the same ones, and different questions."""

import pytest

from benchmarks.chains import main, varied
from cpo_fast.tasks import Question


def test_questions_differ_by_their_numbers_alone():
    found = varied([Question("a", "5 hens and 3 eggs"), Question("b", "2 pens")], 6)
    assert len({question.text for question in found}) == len({question.id for question in found}) == 6
    assert all(question.gold is None for question in found)


def test_chains_are_compared_before_a_ratio_is_shown(capsys: pytest.CaptureFixture[str]):
    arguments = ["--model", "reasoner", "--num-chains", "6", "--max-new-tokens", "12", "--threads", "1"]
    assert main([*arguments, "--clock", "cpu", "--no-record"]) == 0
    assert "6 chains" in capsys.readouterr().out
