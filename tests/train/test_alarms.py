"""When the alarms of training are raised: on series made for it, and on recorded trainings that collapsed or did not."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from benchmarks.collapse import RUNS, chain_alarm, collapsed_at, drift_alarm, recorded
from cpo_fast.train.alarms import ChainAlarm, DriftAlarm

RECORD = Path(__file__).parents[2] / "benchmarks" / "results" / "collapse.jsonl"


def answers(num_right: int, num_questions: int = 100, first: int = 0) -> list[bool]:
    """So many questions answered as expected, from place `first` on."""
    return [first <= place < first + num_right for place in range(num_questions)]


def test_drift_alarm_is_raised_once_when_the_lowest_chosen_fall_while_margins_grow() -> None:
    alarm = DriftAlarm(limit_nats=0.5)
    texts = [alarm.update(step, -0.1 * step, margin=0.05 * step, num_pairs=8) for step in range(1, 30)]
    (text,) = [text for text in texts if text is not None]
    assert "have lost 0.55 nats per token or more since the start" in text
    assert alarm.raised_at == 8  # steps 5 to 8 have 32 pairs together: 0.65 on average, of which step 1 had 0.1


@pytest.mark.parametrize(("drift", "margin"), [(-0.01, 0.1), (0.2, 0.1), (-0.3, -0.1)])
def test_drift_alarm_stays_silent_for_small_falls_rises_and_shrinking_margins(drift: float, margin: float) -> None:
    alarm = DriftAlarm(limit_nats=0.5)
    assert all(alarm.update(step, drift * step, margin * step, 32) is None for step in range(1, 30))


def test_one_small_batch_among_large_ones_does_not_raise_the_drift_alarm() -> None:
    """The lowest tenth of two pairs is one pair."""
    for num_pairs, is_raised in ((2, False), (32, True)):
        alarm = DriftAlarm(limit_nats=0.5)
        for step in range(1, 9):
            low = -1.0 if step == 6 else 0.0
            alarm.update(step, low, 0.1 * step, num_pairs if step == 6 else 32)
        assert (alarm.raised_at == 6) is is_raised


def test_chain_alarm_is_raised_once_and_says_what_fell_and_when() -> None:
    alarm = ChainAlarm("agreement")
    shares = [answers(50), answers(90), answers(88), answers(84), answers(60)]
    texts = [alarm.update(10 * step, flags) for step, flags in enumerate(shares)]
    assert [text is not None for text in texts] == [False, False, False, True, False]
    assert "step 30: the agreement of chains has fallen from 90.0% after step 10 to 84.0%" in str(texts[3])
    assert "of 100 questions 6 were lost and 0 gained" in str(texts[3])
    assert alarm.text == texts[3]


@pytest.mark.parametrize(
    ("now", "is_raised"),
    [
        (answers(86), True),  # 4 lost
        (answers(87), False),  # 3 lost: one time in eight by chance
        (answers(85, first=10), False),  # 10 lost and 5 gained: one time in seven by chance
        (answers(90, first=10), False),
        (answers(95), False),
    ],
)
def test_chain_alarm_is_raised_by_losses_beyond_chance_alone(now: list[bool], is_raised: bool) -> None:
    alarm = ChainAlarm("accuracy")
    assert alarm.update(0, answers(90)) is None
    assert (alarm.update(1, now) is not None) is is_raised


def test_a_loss_beyond_chance_of_few_points_is_no_collapse() -> None:
    alarm = ChainAlarm("accuracy")
    alarm.update(0, answers(900, 1000))
    assert alarm.update(1, answers(870, 1000)) is None
    assert alarm.update(2, answers(869, 1000)) is not None


def test_alarms_go_on_from_their_states() -> None:
    for cut in range(1, 8):
        chains, drift = ChainAlarm("agreement"), DriftAlarm(0.5)
        for step in range(8):
            if step == cut:
                chain_state, drift_state = chains.state(), drift.state()
                chains, drift = ChainAlarm("agreement"), DriftAlarm(0.5)
                chains.restore(chain_state)
                drift.restore(drift_state)
            chains.update(step, answers(90 - 3 * step))
            drift.update(step, -0.2 * step, 0.1 * step, 20)
        assert (chains.raised_at, drift.raised_at) == (2, 4), cut


def runs() -> list[dict[str, Any]]:
    return recorded(RECORD)


def test_record_holds_at_least_five_runs_that_collapsed_and_five_that_did_not() -> None:
    steps = [collapsed_at(run) for run in runs()]
    assert len(steps) - steps.count(None) >= 5
    assert steps.count(None) >= 5
    assert {run["run"] for run in runs()} <= set(RUNS)


@pytest.mark.parametrize("half", [0, 1])
def test_agreement_with_votes_tells_recorded_collapses_from_healthy_runs(half: int) -> None:
    for run in runs():
        if run["half"] == half:
            raised_at, collapsed = chain_alarm(run).raised_at, collapsed_at(run)
            assert (raised_at is None) == (collapsed is None), run["run"]
            if raised_at is None or collapsed is None:
                continue
            assert raised_at <= collapsed, run["run"]
            gold = {validation["step"]: validation["gold"] for validation in run["validations"]}
            assert max(gold.values()) - gold[raised_at] < 0.074, run["run"]  # 11 of 150 questions, in two steps
            votes = {validation["step"]: validation["votes"].count("+") for validation in run["validations"]}
            kept = max(votes, key=lambda step: (votes[step], -step))  # by stop_on=agreement
            assert max(gold.values()) - gold[kept] < 0.05, run["run"]


def test_no_gold_answer_reaches_an_alarm() -> None:
    for run in runs():
        blind = {**run, "validations": [{**validation, "gold": None} for validation in run["validations"]]}
        assert chain_alarm(blind).state() == chain_alarm(run).state()
        assert drift_alarm(blind).state() == drift_alarm(run).state()


def test_drift_tells_recorded_collapses_too_but_later() -> None:
    for run in runs():
        raised_at = drift_alarm(run).raised_at
        assert (raised_at is None) == (collapsed_at(run) is None or run["options"].get("method") == "sft"), run["run"]


def test_validations_of_a_recorded_run_are_in_order() -> None:
    for run in runs():
        steps = [validation["step"] for validation in run["validations"]]
        assert all(left < right for left, right in pairwise(steps))
        assert {len(validation["votes"]) for validation in run["validations"]} == {len(run["validations"][0]["votes"])}
