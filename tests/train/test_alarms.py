"""When the alarms of training are raised: on series made for it, and on recorded trainings that collapsed or did not."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from benchmarks.collapse import (
    RUNS,
    accuracies,
    chain_alarm,
    collapsed_at,
    drift_alarm,
    kept_step,
    kind,
    most_lost,
    recorded,
    timing,
)
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


def test_chain_alarm_is_raised_once_and_says_what_was_forgotten_and_when() -> None:
    alarm = ChainAlarm("agreement")
    shares = [answers(50), answers(90), answers(85), answers(81), answers(60)]
    texts = [alarm.update(10 * step, flags) for step, flags in enumerate(shares)]
    assert [text is not None for text in texts] == [False, False, False, True, False]
    assert "step 30: of 100 questions chains have forgotten 9 that they answered as expected once (0 " in str(texts[3])
    assert "Their agreement is 81.0% and was 90.0% after step 10" in str(texts[3])
    assert alarm.text == texts[3]


def test_what_was_answered_before_training_is_counted_by_itself() -> None:
    """Five of the first fifty are gone while others are learnt; 8 % of fifty are four, of a hundred eight."""
    alarm = ChainAlarm("agreement")
    texts = [alarm.update(step, answers(50 + 10 * step, first=step)) for step in range(6)]
    assert [text is not None for text in texts] == [False] * 5 + [True]
    assert "step 5: of the 50 questions that they answered as expected before training chains have forgotten 5" in (
        alarm.text
    )
    learnt_meanwhile = ChainAlarm("agreement")  # five of those that were learnt while training are gone
    for flags in (answers(50), answers(90), answers(85)):
        assert learnt_meanwhile.update(0, flags) is None


def test_what_is_learnt_meanwhile_does_not_hide_what_is_forgotten() -> None:
    alarm = ChainAlarm("agreement")
    texts = [alarm.update(step, answers(50 + 5 * step, first=2 * step)) for step in range(4)]  # 3 more a step
    assert [text is not None for text in texts] == [False, False, False, True]  # 6 of 50


@pytest.mark.parametrize(("num_questions", "num_lost", "is_raised"), [(1000, 80, False), (1000, 81, True), (8, 3, False),
                                                                      (8, 4, True)])  # fmt: skip
def test_more_must_be_forgotten_than_eight_points_and_than_comes_by_chance(
    num_questions: int, num_lost: int, is_raised: bool
) -> None:
    for start in (answers(num_questions, num_questions), answers(0, num_questions)):
        alarm = ChainAlarm("accuracy")
        assert alarm.update(0, start) is None
        assert alarm.update(1, answers(num_questions, num_questions)) is None
        assert (alarm.update(2, answers(num_questions - num_lost, num_questions)) is not None) is is_raised


def test_answers_that_come_and_go_do_not_raise_the_alarm_and_those_that_stay_away_do() -> None:
    """Up to 8 of 100 questions are not answered as expected, but other ones in every validation."""
    alarm = ChainAlarm("agreement")
    for step in range(20):
        away = {(10 * step + place) % 40 for place in range(min(step, 8))}
        assert alarm.update(step, [place not in away for place in range(100)]) is None, step
    assert alarm.update(20, answers(94 - 40, first=40)) is not None  # 46 are away together


def test_alarms_go_on_from_their_states() -> None:
    for cut in range(1, 8):
        chains, drift = ChainAlarm("agreement"), DriftAlarm(0.5)
        for step in range(8):
            if step == cut:
                chain_state, drift_state = chains.state(), drift.state()
                chains, drift = ChainAlarm("agreement"), DriftAlarm(0.5)
                chains.restore(json.loads(json.dumps(chain_state)))
                drift.restore(drift_state)
            chains.update(step, answers(90, first=2 * step))
            drift.update(step, -0.2 * step, 0.1 * step, 20)
        assert (chains.raised_at, drift.raised_at) == (4, 4), cut


def test_the_chains_alarm_goes_on_from_what_older_versions_saved() -> None:
    right, common = [1] * 90 + [0] * 10, {"raised_at": None, "text": "", "best_step": 7}
    for older in ({"best": right}, {"best": 90, "known": right, "lost": [0] * 100}):
        alarm = ChainAlarm("agreement")
        alarm.restore(common | older)
        assert alarm.update(8, answers(83)) is None
        assert "Their agreement is 82.0% and was 90.0% after step 7" in str(alarm.update(9, answers(82)))


def made_run(gold: list[float], num_forgotten: list[int]) -> dict[str, Any]:
    """A run with so much accuracy at steps 0, 1, ... and so many of 100 votes no longer agreed with."""
    votes = ["+" * (100 - number) + "-" * number for number in num_forgotten]
    validations = zip(gold, votes, strict=True)
    return {
        "validations": [
            {"step": step, "gold": share, "votes": flags} for step, (share, flags) in enumerate(validations)
        ]
    }


@pytest.mark.parametrize(
    ("gold", "num_forgotten", "found"),
    [
        ([0.9, 0.88, 0.85], [0, 9, 12], ("collapsed", "before")),
        ([0.9, 0.88, 0.85], [0, 8, 12], ("collapsed", "at")),
        ([0.9, 0.85, 0.85], [0, 8, 12], ("collapsed", "after")),
        ([0.9, 0.85, 0.95], [0, 8, 8], ("collapsed", "silent")),
        ([0.9, 0.87, 0.9], [0, 9, 9], ("neither", "raised")),
        ([0.5, 0.9, 0.87], [0, 8, 8], ("neither", "silent")),
        ([0.9, 0.88, 0.88], [0, 9, 9], ("healthy", "raised")),
        ([0.5, 0.7, 0.9], [0, 0, 0], ("healthy", "silent")),
    ],
)
def test_a_run_is_named_by_the_most_that_it_lost_and_by_when_the_alarm_was_raised(
    gold: list[float], num_forgotten: list[int], found: tuple[str, str]
) -> None:
    run = made_run(gold, num_forgotten)
    assert (kind(run), timing(run)) == found


def test_what_a_run_lost_is_counted_from_the_best_before() -> None:
    run = made_run([0.6, 0.5, 0.9, 0.86, 0.95], [3, 2, 0, 0, 1])
    assert most_lost(run) == pytest.approx(0.1)
    assert accuracies(run) == (0.95, 0.9, 0.95)  # agreement keeps the first of its best validations


def runs() -> list[dict[str, Any]]:
    return recorded(RECORD)


def test_record_holds_at_least_five_runs_that_collapsed_and_five_that_did_not() -> None:
    steps = [collapsed_at(run) for run in runs()]
    assert len(steps) - steps.count(None) >= 5
    assert steps.count(None) >= 5
    assert {run["run"] for run in runs()} <= set(RUNS)


# not collapsed by our measure, but at a rate at which others did: it ends 2.7 points below its best
ON_THE_WAY = "cpo 3e-3, 20 steps, seed 5"
# healthy by what was declared before it was run: it loses 1.3 points. Of the 8 votes that it has forgotten 5 are wrong
RAISED_FOR_NOTHING = "cpo 3e-3, 20 steps, seed 15"


def test_the_chains_alarm_is_raised_before_five_points_are_lost_in_most_collapses_and_in_one_healthy_run() -> None:
    found = [(run["half"], kind(run), timing(run), run["run"]) for run in runs()]
    assert [name for _, _, when, name in found if when == "raised"] == [ON_THE_WAY, RAISED_FOR_NOTHING]
    assert [named for _, named, when, _ in found if when == "raised"] == ["neither", "healthy"]
    assert sum(named == "healthy" for _, named, _, _ in found) == 18
    for halves, counts in (((0, 1, 2), (9, 3)), ((3,), (5, 0)), ((0, 1, 2, 3), (14, 3))):
        collapses = [when for half, named, when, _ in found if half in halves and named == "collapsed"]
        assert (collapses.count("before"), collapses.count("at")) == counts
        assert sum(counts) == len(collapses)  # none is missed, and none told after the loss
    assert 14 >= 0.8 * 17 > 9 / 12 * 17  # 0.8 are wanted; halves 0 to 2 alone fall short of it


def test_the_adapter_with_the_best_agreement_is_near_the_best_of_a_collapse() -> None:
    losses = {}
    for run in runs():
        if collapsed_at(run) is not None:
            best, kept, _ = accuracies(run)
            assert kept == {v["step"]: v["gold"] for v in run["validations"]}[kept_step(run)]
            losses[run["run"]] = best - kept
    assert len(losses) == 17
    far = {name: round(loss, 3) for name, loss in losses.items() if loss > 0.03}
    assert far == {"cpo 7e-3, 12 steps, seed 9": 0.067, "cpo 5e-3, 14 steps, seed 11": 0.067}


def test_no_gold_answer_reaches_an_alarm() -> None:
    for run in runs():
        blind = {**run, "validations": [{**validation, "gold": None} for validation in run["validations"]]}
        assert chain_alarm(blind).state() == chain_alarm(run).state()
        assert drift_alarm(blind).state() == drift_alarm(run).state()


def test_drift_tells_most_collapses_on_which_it_was_chosen_but_few_of_half_3_where_it_rings_in_healthy_runs() -> None:
    counts = {}
    for halves in ((0, 1, 2), (3,)):
        found = [(drift_alarm(run).raised_at, collapsed_at(run)) for run in runs() if run["half"] in halves]
        collapses = [(raised, step) for raised, step in found if step is not None]
        told = [(raised, step) for raised, step in collapses if raised is not None]
        counts[halves] = (len(collapses), len(told), sum(raised < step for raised, step in told))
    assert counts == {(0, 1, 2): (12, 10, 5), (3,): (5, 2, 0)}
    others = [run["run"] for run in runs() if collapsed_at(run) is None and drift_alarm(run).raised_at is not None]
    assert others == [ON_THE_WAY, "cpo 1e-3, 24 steps, seed 12", "cpo 1e-3, 24 steps, seed 20", RAISED_FOR_NOTHING]


def test_only_what_was_declared_before_is_counted_in_half_3() -> None:
    """Validated at every step, with the limits that halves 0 to 2 were played to; every declared run is recorded."""
    half = [run for run in runs() if run["half"] == 3]
    declared = {name: options for name, (number, options) in RUNS.items() if number == 3}
    assert sorted(run["run"] for run in half) == sorted(declared)
    for run in half:
        steps = [validation["step"] for validation in run["validations"]]
        assert run["options"] == declared[run["run"]]
        assert steps == list(range(declared[run["run"]]["max_steps"] + 1))
    silent = ("healthy", "silent")
    assert {run["run"]: (kind(run), timing(run)) for run in half} == {
        "cpo 5e-3, 14 steps, seed 11": ("collapsed", "before"),
        "cpo 1e-3, 24 steps, seed 12": silent,
        "cpo 1e-2, 10 steps, seed 13": ("collapsed", "before"),
        "sft 1e-3, 24 steps, seed 14": silent,
        RAISED_FOR_NOTHING: ("healthy", "raised"),
        "cpo 7e-4, 24 steps, seed 16": silent,
        "cpo 7e-3, 12 steps, seed 17": ("collapsed", "before"),
        "sft 5e-4, 24 steps, seed 18": silent,
        "fpo 3e-3, 14 steps, seed 19": ("collapsed", "before"),
        "cpo 1e-3, 24 steps, seed 20": silent,
        "fpo 5e-3, 10 steps, seed 21": ("collapsed", "before"),
        "sft 3e-3, 14 steps, seed 22": silent,
    }


def test_in_half_3_the_alarm_is_one_to_three_steps_before_five_points_and_less_than_three_are_lost_by_then() -> None:
    leads, lost = [], []
    for run in runs():
        raised, step = chain_alarm(run).raised_at, collapsed_at(run)
        if run["half"] == 3 and step is not None:
            assert raised is not None
            gold = {validation["step"]: validation["gold"] for validation in run["validations"]}
            leads.append(step - raised)
            lost.append(max(share for at, share in gold.items() if at <= raised) - gold[raised])
    assert sorted(leads) == [1, 1, 1, 2, 3]
    assert [round(share, 3) for share in sorted(lost)] == [0, 0, 0, 0.027, 0.027]


def test_validations_of_a_recorded_run_are_in_order() -> None:
    for run in runs():
        steps = [validation["step"] for validation in run["validations"]]
        assert all(left < right for left, right in pairwise(steps))
        assert {len(validation["votes"]) for validation in run["validations"]} == {len(run["validations"][0]["votes"])}
