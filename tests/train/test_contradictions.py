"""Chains sampled before training: what contradicts them, and the alarm of it on a real collapse."""

import json
import logging
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from cpo_fast.config import Config, load_config
from cpo_fast.evaluate.chain import chain_search
from cpo_fast.models import load_model
from cpo_fast.ranks import Ranks
from cpo_fast.search.collect import collect
from cpo_fast.search.engine import Sample
from cpo_fast.tasks import load_task
from cpo_fast.train import dev_questions
from cpo_fast.train.communication import Communicator
from cpo_fast.train.dev_questions import DevQuestions, contradicts, load_dev_questions
from cpo_fast.train.loop import train

REASONER = Path(__file__).parents[2] / "examples" / "reasoner"
NUM_VOTED = 40


@pytest.mark.parametrize(
    ("answer", "counts", "expected"),
    [
        ("7", {"7": 0, "9": 16}, False),  # as voted, whatever was sampled
        ("9", {"7": 16}, True),
        ("9", {"7": 12, "9": 4}, True),
        ("9", {"7": 11, "9": 4}, False),
        (None, {"7": 8}, True),  # it comes to no answer, as half of the sampled chains did
        (None, {"7": 7}, False),
        ("9", {}, False),
    ],
)
def test_a_vote_that_leads_by_half_of_the_chains_is_contradicted(
    answer: str | None, counts: dict[str, int], expected: bool
) -> None:
    assert contradicts(answer, "7", counts, 16) is expected


def test_a_sampled_chain_is_drawn_from_the_model_s_own_distribution() -> None:
    """Temperature 1, nothing cut, and random numbers by name and by where its line begins."""
    _, tokenizer = load_model(config_for(Path("run")).model)
    task = load_task(config_for(Path("run")))
    line = tuple(tokenizer("12+3=15\n", add_special_tokens=False)["input_ids"])
    found = []
    for sampled in (None, "a"):
        chain = chain_search(tokenizer, [5, 6], task, 96, 4, sampled)
        (first,) = next(chain).items
        # as an engine answers that ends every request with its line
        (second,) = chain.send([Sample(line, "12+3=15\n", "newline", (0.0,) * len(line))]).items
        found.append([(each.temperature, each.top_p, each.top_k, each.repetition_penalty) for each in (first, second)])
    assert found == [[(0.0, 1.0, 0, 1.0)] * 2, [(1.0, 1.0, 0, 1.0)] * 2]
    assert (first.uid, second.uid) == ("a/0", f"a/{len(line)}")


def config_for(run: Path, *overrides: str) -> Config:
    """The reasoner's settings."""
    common = [f"run={run}", f"model.path={REASONER / 'base-0'}", f"task.file={REASONER / 'plain.yaml'}"]
    return load_config(REASONER / "config.yaml", [*common, *overrides])


@pytest.fixture(autouse=True, scope="module")
def few_questions() -> Iterator[None]:
    """They are enough for a collapse that leaves nothing."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dev_questions, "MIN_SAMPLED", NUM_VOTED)
        yield


@pytest.fixture(scope="module")
def trees(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Trees of 40 questions to train on, and of others to vote on."""
    folder, found = tmp_path_factory.mktemp("reasoner"), {}
    for name, number in (("search-0", 40), ("votes", NUM_VOTED)):
        asked = [f"task.path={REASONER / 'questions' / 'plain' / name}.jsonl", f"task.num_questions={number}"]
        collect(config_for(folder / name, *asked))
        found[name] = folder / name / "trees.jsonl"
    return found


def training(trees: dict[str, Path], run: Path, *overrides: str) -> Config:
    """At a rate at which it collapses within a few steps."""
    options = [
        "stop_on=agreement",
        f"dev_trees={trees['votes']}",
        "lr=3e-2",
        "max_steps=5",
        "eval_every=1",
        "save_every=2",
    ]
    return config_for(run, f"data.path={trees['search-0']}", *(f"train.{option}" for option in options), *overrides)


@pytest.fixture(scope="module")
def collapsed(trees: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A training that collapses, and what its alarm said."""
    run = tmp_path_factory.mktemp("collapsed") / "run"
    return run, train(training(trees, run)).alarm


def lines_of(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def state_of(run: Path) -> dict[str, Any]:
    folder = run / "checkpoints"
    state: dict[str, Any] = json.loads((folder / (folder / "LATEST").read_text() / "state.json").read_text())
    return state


def cut_back(run: Path, copy: Path) -> None:
    """The run as it was after step 2, before the alarm."""
    shutil.copytree(run, copy)
    steps = {folder.name: folder for folder in (copy / "checkpoints").glob("step-*")}
    assert "step-00000002" in steps
    for name, folder in steps.items():
        if name > "step-00000002":
            shutil.rmtree(folder)


def test_a_collapse_contradicts_what_was_sampled_and_the_alarm_says_so(collapsed: tuple[Path, str]) -> None:
    run, alarm = collapsed
    shares = [line["eval_contradicted"] for line in lines_of(run) if "eval_contradicted" in line]
    assert len(shares) == 6
    assert shares[0] <= 2 / NUM_VOTED
    assert max(shares) > 0.1
    assert f" of {NUM_VOTED} questions " in alarm
    assert " are answered against what half of the chains or more said before training (" in alarm
    raised = next(line["step"] for line in lines_of(run) if line.get("alarm"))
    assert alarm.startswith(f"step {raised}: ")
    assert shares[raised] * NUM_VOTED >= 4


def test_a_run_goes_on_with_the_chains_that_were_sampled_before_it(
    collapsed: tuple[Path, str], trees: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From a checkpoint before the alarm to the same one; nothing is sampled from the model that was trained since."""
    run, alarm = collapsed
    cut_back(run, tmp_path / "run")
    monkeypatch.setattr(DevQuestions, "sample", None)
    assert train(training(trees, tmp_path / "run")).alarm == alarm
    assert lines_of(tmp_path / "run") == lines_of(run)


@pytest.mark.parametrize("changed", ["train.alarm_chains=0", "train.alarm_chains=4", "train.stop_on=accuracy"])
def test_with_other_chains_or_questions_the_alarm_begins_anew(
    collapsed: tuple[Path, str],
    trees: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    changed: str,
) -> None:
    """Counts of 16 chains say nothing to another number of them, nor votes to reference answers."""
    run, _ = collapsed
    cut_back(run, tmp_path / "run")
    monkeypatch.setattr(DevQuestions, "sample", None)
    config = training(trees, tmp_path / "run", changed)
    with caplog.at_level(logging.WARNING):
        result = train(config, allow_mismatch=[changed.split("=")[0]])
    assert "its alarm of chains begins anew" in caplog.text
    assert "are answered against" not in result.alarm
    assert "eval_contradicted" not in lines_of(tmp_path / "run")[-1]


def asked(trees: dict[str, Path], model: Any, tokenizer: Any) -> DevQuestions:
    found = load_dev_questions(training(trees, Path("run")), tokenizer, (), (), model.config.vocab_size)
    assert found is not None
    return found


def test_what_is_sampled_is_the_training_s_and_a_rank_samples_its_own_questions_alike(
    collapsed: tuple[Path, str], trees: dict[str, Path]
) -> None:
    model, tokenizer = load_model(training(trees, Path("run")).model)
    questions = asked(trees, model.eval(), tokenizer)
    questions.sample(model, Communicator(Ranks(), torch.device("cpu")))
    assert questions.sampled == state_of(collapsed[0])["validator"]["sampled"]
    assert len(questions.sampled) == NUM_VOTED
    assert all(sum(counts.values()) <= 16 for counts in questions.sampled)
    assert Counter(len(counts) for counts in questions.sampled)[1] < NUM_VOTED / 2  # most questions get several answers
    part = asked(trees, model, tokenizer)
    part.questions = part.questions[1::3]
    part.sample(model, Communicator(Ranks(), torch.device("cpu")))
    assert part.sampled == questions.sampled[1::3]
    part.config = training(trees, Path("run"), "seed=1")
    part.sample(model, Communicator(Ranks(), torch.device("cpu")))
    assert part.sampled != questions.sampled[1::3]


def test_chains_that_are_asked_for_and_not_sampled_are_said(
    trees: dict[str, Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(dev_questions, "MIN_SAMPLED", NUM_VOTED + 1)
    for chains, is_said in (("train.alarm_chains=8", True), ("train.alarm_chains=0", False), ("seed=0", False)):
        caplog.clear()
        config = training(trees, Path("run"), chains)
        load_dev_questions(config, load_model(config.model)[1], (), (), 10**6)
        assert (f"of {NUM_VOTED} questions no chains are sampled" in caplog.text) is is_said, chains


def test_of_few_questions_and_without_chains_nothing_is_sampled(
    trees: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = load_model(training(trees, Path("run")).model)
    questions = asked(trees, model, tokenizer)
    assert questions.is_sampled
    monkeypatch.setattr(dev_questions, "MIN_SAMPLED", NUM_VOTED + 1)
    assert not questions.is_sampled
    monkeypatch.setattr(dev_questions, "MIN_SAMPLED", 1)
    config = training(trees, Path("run"), "train.alarm_chains=0")
    unsampled = load_dev_questions(config, tokenizer, (), (), model.config.vocab_size)
    assert unsampled is not None
    assert not unsampled.is_sampled
