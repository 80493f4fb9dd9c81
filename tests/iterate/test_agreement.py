"""Rounds that are chosen and ended by the agreement of chains with votes: no reference answer has a say."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from cpo_fast.config import Config, validate_config
from cpo_fast.errors import CheckpointError, ConfigError, CpoFastError, DataError
from cpo_fast.evaluate import evaluate
from cpo_fast.iterate import Rounds, Watch, iterate
from cpo_fast.search.collect import collect
from cpo_fast.train.dev_questions import voted_trees
from cpo_fast.tree import read_trees
from tests.golden.tiny_models import save_talker
from tests.iterate.rounds import QUESTIONS, results, values, write_questions

DEV = [(f"How many are {first} less {second}?", "7") for first in (7, 12) for second in (1, 2, 3)]
# after a step at this rate chains come to no answer any more
COLLAPSING = {"lr": 1.0, "schedule": "constant", "warmup_ratio": 0.0}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`model/`, which comes to answers, `asked.jsonl` and `dev.jsonl`."""
    folder = tmp_path_factory.mktemp("agreement")
    save_talker(folder / "model", answer_bonus=0.25)
    write_questions(folder / "asked.jsonl", list(QUESTIONS))
    write_questions(folder / "dev.jsonl", list(DEV))
    return folder


@pytest.fixture(scope="module")
def voted(inputs: Path) -> Path:
    """The trees of the dev questions, searched by the model that rounds begin with."""
    asked = {"path": str(inputs / "dev.jsonl"), "num_questions": None}
    collect(validate_config(values(inputs, inputs / "voted", task=asked)))
    return inputs / "voted" / "trees.jsonl"


def by_votes(inputs: Path, run: Path, trees: Path, **sections: Any) -> Config:
    """Rounds that go by the votes of `trees`."""
    train = COLLAPSING | {"dev_path": None, "dev_trees": str(trees)} | sections.pop("train", {})
    rounds = {"stop_on": "agreement"} | sections.pop("iterate", {})
    return validate_config(values(inputs, run, train=train, iterate=rounds, **sections))


def copied(trees: Path, folder: Path, rows: list[dict[str, Any]]) -> Path:
    """Other rows beside the same prompts."""
    shutil.copytree(trees.parent / "prompts", folder / "prompts")
    path = folder / "trees.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def without_gold(summary: dict[str, Any]) -> list[dict[str, Any]]:
    """What a summary says of its rounds, without seconds and what a search is told by reference answers."""
    left_out = ("seconds", "vote_accuracy", "num_graded", "num_correct", "coverage")
    return [
        {
            name: {key: value for key, value in record.items() if key not in left_out}
            for name, record in one["stages"].items()
        }
        for one in summary["rounds"]
    ]


def test_a_round_is_measured_by_the_votes_and_no_reference_answer_is_read(
    inputs: Path, voted: Path, tmp_path: Path
) -> None:
    lines: list[str] = []
    config = by_votes(inputs, tmp_path / "run", voted, iterate={"num_rounds": 1})
    summary = iterate(config, Watch(on_stage=lines.append))
    assert "gold answers: none decides anything" in lines
    votes = {tree.id: tree.answer for tree in read_trees(voted) if tree.answer is not None}
    shares = []
    for number in (0, 1):
        adapter = {"adapter": str(tmp_path / "run/round-1/adapter")} if number else {}
        asked = {"path": str(inputs / "dev.jsonl"), "num_questions": None}
        again = values(inputs, tmp_path / f"again-{number}", model=adapter, task=asked)
        answers = {result.id: result.answer for result in evaluate(validate_config(again)).results}
        found = summary["rounds"][number]["stages"]["votes"]
        num_agreeing = sum(answers[name] == vote for name, vote in votes.items())
        assert (found["num_agreeing"], found["num_questions"]) == (num_agreeing, len(votes))
        assert found["num_unanswered"] == sum(answers[name] is None for name in votes)
        shares.append(found["agreement"])
    assert shares[0] > 0.5 > shares[1]
    assert (summary["best_round"], summary["adapter"]) == (0, None)
    assert "eval" not in summary["rounds"][1]["stages"]

    asked_file = write_questions(tmp_path / "asked.jsonl", [(question, "99") for question, _ in QUESTIONS])
    rows = [json.loads(line) | {"gold": "99"} for line in voted.read_text().splitlines()]
    other = copied(voted, tmp_path / "other", rows)
    task = {"path": str(asked_file)}
    wrong = iterate(by_votes(inputs, tmp_path / "wrong", other, task=task, iterate={"num_rounds": 1}))
    assert without_gold(wrong) == without_gold(summary)
    assert wrong["best_round"] == summary["best_round"]
    name = "round-1/adapter/adapter_model.safetensors"
    assert results(tmp_path / "wrong")[name] == results(tmp_path / "run")[name]


def test_the_best_agreement_is_chosen_and_ends_the_rounds_whatever_the_accuracy(
    inputs: Path, voted: Path, tmp_path: Path
) -> None:
    settings = {"num_rounds": 5, "patience": 1, "min_gain": 0.05}
    config = by_votes(inputs, tmp_path, voted, iterate=settings, train={"dev_path": str(inputs / "dev.jsonl")})
    rounds = Rounds(config, {}, Watch(), lambda name, its: None)
    assert rounds.stages(0) == ["eval", "votes"]
    assert rounds.stages(1)[-2:] == ["eval", "votes"]
    assert rounds.config_of("votes", 0).model.adapter is None
    assert rounds.config_of("votes", 2).model.adapter == str(tmp_path / "round-2" / "adapter")
    for number, (agreement, accuracy) in enumerate([(0.5, 0.9), (0.75, 0.8), (0.78, 1.0)]):
        assert not number or not rounds._reason_to_stop(number - 1)
        measured = {"votes": {"agreement": agreement}, "eval": {"accuracy": accuracy}, "train": {}}
        stages = {name: record | {"seconds": 1.0} for name, record in measured.items()}
        rounds.summary["rounds"].append({"round": number, "stages": stages})
    assert rounds.scores() == [0.5, 0.75, 0.78]
    assert rounds.best() == 2
    said = "round 2 does not help: dev agreement 0.780, not better than 0.750 by more than 0.05"
    assert rounds._reason_to_stop(2) == said


def test_questions_without_a_vote_are_warned_of_once_a_run(
    inputs: Path, voted: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    dev = write_questions(tmp_path / "dev.jsonl", [*DEV, ("What else?", "1")])
    config = by_votes(inputs, tmp_path / "run", voted, train={"dev_path": str(dev)})

    def round_by_round(command: str, its: Config) -> None:
        for _ in range(3):
            voted_trees(its, ())
        raise CpoFastError("enough")

    for number_of_runs in (1, 2):
        with pytest.raises(CpoFastError, match="enough"):
            iterate(config, Watch(), round_by_round)
        assert sum("have no vote in" in each.getMessage() for each in caplog.records) == number_of_runs


def test_votes_that_are_missing_damaged_or_of_another_task_are_refused_before_the_first_search(
    inputs: Path, voted: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    with pytest.raises(ConfigError, match=r"^iterate\.stop_on=agreement .* train\.dev_trees names none; set it to"):
        iterate(by_votes(inputs, run, voted, train={"dev_trees": None}))
    with pytest.raises(DataError, match=r"none\.jsonl"):
        iterate(by_votes(inputs, run, tmp_path / "none.jsonl"))
    rows = [json.loads(line) | {"task": "gsm8k"} for line in voted.read_text().splitlines()]
    with pytest.raises(
        ConfigError, match=r"is of task gsm8k, and the configuration's is .*; set task\.name or task\.file"
    ):
        iterate(by_votes(inputs, run, copied(voted, tmp_path / "other", rows)))
    others = write_questions(tmp_path / "others.jsonl", [("What else?", "1")])
    with pytest.raises(
        ConfigError, match=r"no question of .*others\.jsonl has a vote in .*trees\.jsonl; collect trees"
    ):
        iterate(by_votes(inputs, run, voted, train={"dev_path": str(others)}))
    assert not run.exists()


def test_voted_questions_that_are_searched_too_are_named(inputs: Path, voted: Path, tmp_path: Path) -> None:
    asked = write_questions(tmp_path / "asked.jsonl", [QUESTIONS[0], DEV[0], DEV[1]])
    lines: list[str] = []

    def stop(name: str, config: Config) -> None:
        raise CpoFastError("enough")

    config = by_votes(inputs, tmp_path / "run", voted, task={"path": str(asked), "num_questions": 3})
    with pytest.raises(CpoFastError, match="round 1, collect: enough"):
        iterate(config, Watch(on_stage=lines.append), stop)
    voted_texts = {tree.question for tree in read_trees(voted) if tree.answer is not None}
    num_both = len(voted_texts & {DEV[0][0], DEV[1][0]})
    assert num_both > 0
    said = f"warning: {num_both} of the {len(voted_texts)} questions of train.dev_trees are searched and trained on too"
    assert said in lines

    rows = [json.loads(line) for line in voted.read_text().splitlines()]
    changed = copied(voted, tmp_path / "changed", [row | {"answer": row["answer"] and "12345"} for row in rows])
    config = by_votes(inputs, tmp_path / "run", changed, task={"path": str(asked), "num_questions": 3})
    with pytest.raises(CheckpointError, match="dev votes was"):
        iterate(config, Watch(), stop)
