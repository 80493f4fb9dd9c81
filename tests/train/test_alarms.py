"""When the alarms of training are raised: on series made for it, and on recorded trainings that collapsed or did not."""

import json
import random
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from benchmarks.collapse import (
    PART_OF,
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
    assert "step 30: of 100 questions 9 are forgotten that chains answered as expected before (0 " in str(texts[3])
    assert "Their agreement is 81.0% and was 90.0% after step 10" in str(texts[3])
    assert alarm.text == texts[3]


def test_what_was_answered_before_training_is_counted_by_itself() -> None:
    """Five of the first fifty are gone while others are learnt; 8 % of fifty are four, of a hundred eight."""
    alarm = ChainAlarm("agreement")
    texts = [alarm.update(step, answers(50 + 10 * step, first=step)) for step in range(6)]
    assert [text is not None for text in texts] == [False] * 5 + [True]
    said = "step 5: of the 50 questions that chains answered as expected at first 5 are forgotten (0 others"
    assert said in alarm.text
    learnt_meanwhile = ChainAlarm("agreement")  # five of those that were learnt while training are gone
    for flags in (answers(50), answers(90), answers(85)):
        assert learnt_meanwhile.update(0, flags) is None


def test_what_is_learnt_meanwhile_does_not_hide_what_is_forgotten() -> None:
    alarm = ChainAlarm("agreement")
    texts = [alarm.update(step, answers(50 + 5 * step, first=2 * step)) for step in range(4)]  # 3 more a step
    assert [text is not None for text in texts] == [False, False, False, True]  # 6 of 50


@pytest.mark.parametrize(
    ("metric", "num_questions", "num_lost", "is_raised"),
    [
        ("agreement", 1000, 80, False),
        ("agreement", 1000, 81, True),
        ("accuracy", 1000, 50, False),  # reference answers are not wrong
        ("accuracy", 1000, 51, True),
        ("accuracy", 8, 3, False),
        ("accuracy", 8, 4, True),
    ],
)
def test_more_must_be_forgotten_than_some_points_and_than_comes_by_chance(
    metric: str, num_questions: int, num_lost: int, is_raised: bool
) -> None:
    for start in (answers(num_questions, num_questions), answers(0, num_questions)):
        alarm = ChainAlarm(metric)
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


def contradicted(num_contradicted: int, num_questions: int = 800, first: int = 0) -> list[bool]:
    """So many questions whose answer contradicts what was sampled, from place `first` on."""
    return answers(num_contradicted, num_questions, first)


@pytest.mark.parametrize(
    ("num_questions", "num_contradicted", "is_raised"),
    [(60, 3, False), (60, 4, True), (800, 3, False), (800, 4, True), (2000, 8, False), (2000, 9, True)],
)
def test_more_must_be_contradicted_than_some_and_than_comes_by_chance(
    num_questions: int, num_contradicted: int, is_raised: bool
) -> None:
    alarm, right = ChainAlarm("agreement"), answers(num_questions, num_questions)
    assert alarm.update(0, right, contradicted(0, num_questions)) is None
    text = alarm.update(1, right, contradicted(num_contradicted, num_questions))
    assert (text is not None) is is_raised
    if text is not None:
        said = (
            f"step 1: of {num_questions} questions {num_contradicted} are answered against what half of the chains or "
        )
        assert text.startswith(said + "more said before training (0 others came back); ")


def test_votes_that_are_forgotten_without_a_contradiction_do_not_raise_the_alarm() -> None:
    """Where chains were sampled: they are wrong votes that a model learns past."""
    alarm = ChainAlarm("agreement")
    for step, num_right in enumerate((700, 500, 100)):
        assert alarm.update(step, answers(num_right, 800), contradicted(3, first=step)) is None


def test_more_must_be_contradicted_than_at_the_start_and_what_came_back_is_taken_off() -> None:
    right = answers(800, 800)
    alarm = ChainAlarm("agreement")
    assert alarm.update(0, right, contradicted(5)) is None
    assert alarm.update(1, right, contradicted(5, first=100)) is None
    assert alarm.update(2, right, contradicted(0)) is None  # five came back
    assert alarm.update(3, right, contradicted(10, first=200)) is None
    assert "12 are answered against what half of the chains or more said before training (5 others" in str(
        alarm.update(4, right, contradicted(12, first=200))
    )
    alarm = ChainAlarm("agreement")
    for step in range(0, 20, 2):  # the same ones come and go
        assert alarm.update(step, right, contradicted(0)) is None
        assert alarm.update(step + 1, right, contradicted(3)) is None
    assert alarm.update(20, right, contradicted(6)) is None  # three that stay away, three that came back
    assert alarm.update(21, right, contradicted(14, first=6)) is not None


@pytest.mark.parametrize(("num_unsteady", "chance", "num_raised"), [(30, 0.5, 5), (100, 0.1, 33), (300, 0.05, 38)])
def test_answers_that_come_and_go_by_chance_raise_the_alarm_of_contradictions_sometimes(
    num_unsteady: int, chance: float, num_raised: int
) -> None:
    """So many of 800 are contradicted with this chance in each of 15 validations: of 100 runs in which nothing is lost."""
    found = 0
    for seed in range(100):
        rng, alarm = random.Random(seed), ChainAlarm("agreement")
        for step in range(15):
            flags = [place < num_unsteady and rng.random() < chance for place in range(800)]
            alarm.update(step, answers(800, 800), flags)
        found += alarm.raised_at is not None
    assert found == num_raised


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


def test_the_alarm_of_contradictions_goes_on_from_its_state() -> None:
    """What the start contradicted, and what came back and is contradicted again, is known behind the cut."""
    series = [
        contradicted(5),
        contradicted(1, first=5),
        contradicted(0),
        contradicted(7, first=5),
        contradicted(12, first=6),
    ]
    for cut in range(1, 5):
        alarm = ChainAlarm("agreement")
        for step, flags in enumerate(series):
            if step == cut:
                state = json.loads(json.dumps(alarm.state()))
                alarm = ChainAlarm("agreement")
                alarm.restore(state)
            alarm.update(step, answers(800, 800), flags)
            assert (alarm.raised_at is not None) is (step == 4), (cut, step)


def test_the_chains_alarm_goes_on_from_what_older_versions_saved() -> None:
    right, common = [1] * 90 + [0] * 10, {"raised_at": None, "text": "", "best_step": 7}
    for older in ({"best": right}, {"best": 90, "known": right, "lost": [0] * 100}):
        alarm = ChainAlarm("agreement")
        alarm.restore(common | older)
        assert alarm.update(8, answers(83)) is None
        assert "Their agreement is 82.0% and was 90.0% after step 7" in str(alarm.update(9, answers(82)))


def made_run(gold: list[float], num_contradicted: list[int]) -> dict[str, Any]:
    """A run with so much accuracy at steps 0, 1, ... and so many of 800 answers against what was sampled."""
    votes = ["+" * (800 - number) + "x" * number for number in num_contradicted]
    validations = zip(gold, votes, strict=True)
    return {
        "validations": [
            {"step": step, "gold": share, "votes": flags} for step, (share, flags) in enumerate(validations)
        ]
    }


@pytest.mark.parametrize(
    ("gold", "num_contradicted", "found"),
    [
        ([0.9, 0.88, 0.85], [0, 4, 12], ("collapsed", "before")),
        ([0.9, 0.88, 0.85], [0, 3, 12], ("collapsed", "at")),
        ([0.9, 0.85, 0.85], [0, 3, 12], ("collapsed", "after")),
        ([0.9, 0.85, 0.95], [0, 3, 3], ("collapsed", "silent")),
        ([0.9, 0.87, 0.9], [0, 4, 4], ("neither", "raised")),
        ([0.5, 0.9, 0.87], [0, 3, 3], ("neither", "silent")),
        ([0.9, 0.88, 0.88], [0, 4, 4], ("healthy", "raised")),
        ([0.5, 0.7, 0.9], [0, 0, 0], ("healthy", "silent")),
    ],
)
def test_a_run_is_named_by_the_most_that_it_lost_and_by_when_the_alarm_was_raised(
    gold: list[float], num_contradicted: list[int], found: tuple[str, str]
) -> None:
    run = made_run(gold, num_contradicted)
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


def counts(part: int) -> dict[tuple[str, str], int]:
    """Of one part's runs, how many are of which kind, and when the alarm of chains is raised in them."""
    return dict(Counter((kind(run), timing(run)) for run in runs() if run["part"] == part))


def test_the_chains_alarm_on_the_runs_that_it_was_chosen_on() -> None:
    assert counts(1) == {("collapsed", "before"): 6, ("healthy", "silent"): 6}
    assert counts(2) == {("collapsed", "before"): 4, ("collapsed", "at"): 1, ("healthy", "silent"): 7}


def test_the_chains_alarm_on_runs_that_were_declared_before() -> None:
    """Before the loss in every collapse, and raised in one healthy run, of the other base, that lost two points."""
    assert counts(3) == {("collapsed", "before"): 5, ("healthy", "silent"): 6, ("neither", "raised"): 1}
    assert counts(4) == {
        ("collapsed", "before"): 4,
        ("healthy", "silent"): 6,
        ("healthy", "raised"): 1,
        ("neither", "raised"): 1,
    }
    (raised,) = (run for run in runs() if (kind(run), timing(run)) == ("healthy", "raised"))
    assert raised["run"] == "sft 3e-3, 14 steps, base-1, seed 108"
    assert most_lost(raised) == pytest.approx(0.02)


def forgotten_alarm(run: dict[str, Any], num_questions: int) -> int | None:
    """The step at which the alarm of forgotten votes is raised."""
    alarm = ChainAlarm("agreement")
    for validation in run["validations"]:
        alarm.update(validation["step"], [flag == "+" for flag in validation["votes"][:num_questions]])
    return alarm.raised_at


@pytest.mark.parametrize(
    ("num_questions", "num_before", "num_raised", "num_forgotten"),
    [(800, 19, 1, 11), (400, 13, 1, 11), (150, 6, 0, 12)],
)
def test_few_questions_tell_late(num_questions: int, num_before: int, num_raised: int, num_forgotten: int) -> None:
    found = [(chain_alarm(run, num_questions).raised_at, collapsed_at(run)) for run in runs()]
    collapses = [(raised, step) for raised, step in found if step is not None]
    assert len(collapses) == 20
    assert sum(raised is not None and raised < step for raised, step in collapses) == num_before
    healthy = [chain_alarm(run, num_questions).raised_at for run in runs() if kind(run) == "healthy"]
    assert (len(healthy) - healthy.count(None), len(healthy)) == (num_raised, 26)
    by_forgotten = [(forgotten_alarm(run, num_questions), collapsed_at(run)) for run in runs()]
    assert num_forgotten == sum(
        raised is not None and step is not None and raised < step for raised, step in by_forgotten
    )
    assert not any(forgotten_alarm(run, num_questions) for run in runs() if kind(run) == "healthy")


@pytest.mark.parametrize("part", [1, 2, 3, 4])
def test_every_declared_run_is_recorded_and_validated_at_every_step(part: int) -> None:
    declared = {name: RUNS[name] for name, number in PART_OF.items() if number == part}
    found = {run["run"]: run for run in runs() if run["part"] == part}
    assert sorted(found) == sorted(declared)
    assert len(found) == 12
    for name, run in found.items():
        assert run["options"] == declared[name]
        steps = [validation["step"] for validation in run["validations"]]
        assert steps == list(range(declared[name]["max_steps"] + 1))


def test_the_adapter_with_the_best_agreement_is_near_the_best_of_a_collapse() -> None:
    losses = {}
    for run in runs():
        if collapsed_at(run) is not None:
            best, kept, _ = accuracies(run)
            assert kept == {v["step"]: v["gold"] for v in run["validations"]}[kept_step(run)]
            losses[run["run"]] = best - kept
    assert len(losses) == 20
    far = {name: round(loss, 3) for name, loss in losses.items() if loss > 0.03}
    assert far == {"cpo 7e-3, 12 steps, base-0, seed 91": 0.053}


def test_no_gold_answer_reaches_an_alarm() -> None:
    for run in runs():
        blind = {**run, "validations": [{**validation, "gold": None} for validation in run["validations"]]}
        assert chain_alarm(blind).state() == chain_alarm(run).state()
        assert drift_alarm(blind).state() == drift_alarm(run).state()


def test_the_drift_alarm_is_raised_late_in_two_thirds_of_the_collapses_and_in_no_healthy_run() -> None:
    collapses, healthy = [], []
    for run in runs():
        raised, step = drift_alarm(run).raised_at, collapsed_at(run)
        if step is not None:
            collapses.append((raised, step))
        elif kind(run) == "healthy" and "logps/chosen_drift_p10" in run["steps"]:
            healthy.append(raised)
    told = [(raised, step) for raised, step in collapses if raised is not None]
    assert (len(told), sum(raised < step for raised, step in told), len(collapses)) == (13, 2, 20)
    assert (len(healthy) - healthy.count(None), len(healthy)) == (0, 10)


def test_validations_of_a_recorded_run_are_in_order() -> None:
    for run in runs():
        steps = [validation["step"] for validation in run["validations"]]
        assert all(left < right for left, right in pairwise(steps))
        assert {len(validation["votes"]) for validation in run["validations"]} == {len(run["validations"][0]["votes"])}
