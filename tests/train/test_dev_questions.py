"""Greedy chains that validations ask: what they agree with, what chooses the best adapter, and that no gold is read."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from cpo_fast.cli.train import train_command
from cpo_fast.config import dump_config
from cpo_fast.data.batches import split_by_question
from cpo_fast.data.load import load_examples
from cpo_fast.data.pair_files import write_rows
from cpo_fast.errors import ConfigError, DataError
from cpo_fast.evaluate import evaluate
from cpo_fast.models import load_model
from cpo_fast.train import dev_questions
from cpo_fast.train.dev_questions import load_dev_questions
from cpo_fast.train.loop import train
from cpo_fast.tree import SearchTree, read_trees
from tests.tiny import tiny_tokenizer
from tests.train.talker_runs import COLLAPSING, DEV, SEARCHED, by_votes, config_for, make_inputs, write_questions


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `make_inputs` makes."""
    folder = tmp_path_factory.mktemp("talker")
    make_inputs(folder)
    return folder


def measured(run: Path, key: str) -> list[Any]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line[key] for line in lines if key in line]


def share_of_base(folder: Path, run: Path, trees: list[SearchTree]) -> float:
    """Of the answers that `cpo-fast eval` reads off the base's chains, those that are the votes of trees."""
    path = write_questions(run.with_suffix(".jsonl"), [tree.question for tree in trees], [None] * len(trees))
    answers = [result.answer for result in evaluate(config_for(folder, run, task={"path": str(path)})).results]
    assert None not in answers
    return sum(answer == tree.answer for answer, tree in zip(answers, trees, strict=True)) / len(trees)


def test_agreement_of_the_start_is_that_of_the_base_s_chains_with_the_votes(folder: Path, tmp_path: Path) -> None:
    """In `train.dev_trees`, and, without it, of the held-out questions of `data.path`."""
    trees = [tree for tree in read_trees(folder / "dev" / "trees.jsonl") if tree.answer is not None]
    assert len(trees) > 3
    expected = share_of_base(folder, tmp_path / "base", trees)
    result = train(by_votes(folder, tmp_path / "dev trees"))
    found = measured(tmp_path / "dev trees", "eval_agreement")
    assert found[0] == pytest.approx(expected)
    assert 0 < expected < 1
    assert len(set(found)) > 1  # training moves what chains answer
    assert result.measured_on == f"the agreement of answers to {len(trees)} questions"
    best = max(range(len(found)), key=found.__getitem__)
    assert result.best_step == min(2 * best, result.num_steps)

    config = by_votes(folder, tmp_path / "held out", data={"held_out": 0.5}, dev_trees=None)
    result = train(config)
    held_out = split_by_question(load_examples(config, load_model(config.model)[1]).examples, 0.5, config.seed)[1]
    names = {example.group for example in held_out}
    trees = [tree for tree in read_trees(folder / "searched" / "trees.jsonl") if tree.id in names]
    assert 1 < len(trees) < 6
    assert measured(tmp_path / "held out", "eval_agreement")[0] == pytest.approx(
        share_of_base(folder, tmp_path / "again", trees)
    )


def files_of(run: Path) -> dict[str, bytes]:
    """Everything that a run wrote but for times, by name."""
    found = {}
    for path in sorted(run.rglob("*")):
        if path.is_file() and path.name not in (".train.lock", "MANIFEST.json", "state.json"):
            found[str(path.relative_to(run))] = path.read_bytes()
    lines = [json.loads(line) for line in found.pop("metrics.jsonl").splitlines()]
    return found | {"metrics": json.dumps([{**line, "seconds": 0} for line in lines]).encode()}


def test_a_run_that_stops_on_agreement_reads_no_reference_answer(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same bytes with right answers, wrong ones and none, in `train.dev_path` and in both files of trees.

    Chains are sampled in it, and without them the alarm of forgotten votes is raised.
    """
    for name in ("searched", "dev"):
        (tmp_path / "files" / name).mkdir(parents=True)
        (tmp_path / "files" / name / "prompts").symlink_to(folder / name / "prompts")
    monkeypatch.chdir(tmp_path)
    data = {"path": "files/searched/trees.jsonl", "held_out": 0.2}
    options = {"dev_trees": "files/dev/trees.jsonl", **COLLAPSING}
    monkeypatch.setattr(dev_questions, "MIN_SAMPLED", 1)
    runs, unsampled = [], []
    for case, gold in (("right", "1"), ("wrong", "123"), ("none", None)):
        write_questions(tmp_path / "dev.jsonl", DEV, [gold] * len(DEV))
        for name in ("searched", "dev"):
            rows = [json.loads(line) for line in (folder / name / "trees.jsonl").read_text().splitlines()]
            changed = "".join(json.dumps({**row, "gold": gold}) + "\n" for row in rows)
            (tmp_path / "files" / name / "trees.jsonl").write_text(changed)
        config = by_votes(folder, Path("run"), data=data, dev_path="dev.jsonl", patience=2, **options)
        train(config)
        assert len(measured(Path("run"), "eval_agreement")) == len(measured(Path("run"), "eval_contradicted")) > 2
        runs.append(files_of(Path("run")))
        Path("run").rename(f"run-{case}")
        train(by_votes(folder, Path("run"), data=data, dev_path="dev.jsonl", alarm_chains=0, patience=2, **options))
        assert measured(Path("run"), "alarm")[-1] is True
        unsampled.append(files_of(Path("run")))
        Path("run").rename(f"run-{case}-unsampled")
    assert runs[0] == runs[1] == runs[2]
    assert unsampled[0] == unsampled[1] == unsampled[2]
    assert {"adapter/adapter_model.safetensors", "adapter-best/adapter_model.safetensors"} <= set(runs[0])
    # the same with accuracy, which does read them: the comparison can fail
    others = []
    for answer in ("1", "123"):
        write_questions(tmp_path / "dev.jsonl", DEV, [answer] * len(DEV))
        train(by_votes(folder, Path("run"), data=data, dev_path="dev.jsonl", stop_on="accuracy"))
        assert measured(Path("run"), "eval_contradicted") == []
        others.append(files_of(Path("run")))
        Path("run").rename(f"run-accuracy-{answer}")
    assert others[0] != others[1]


def test_the_chains_alarm_reaches_log_metrics_and_result_and_outlives_a_kill(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = by_votes(folder, tmp_path / "run", max_steps=4, save_every=2, **COLLAPSING)
    with caplog.at_level(logging.WARNING):
        result = train(config)
    before, *_, after = agreement = measured(tmp_path / "run", "eval_agreement")
    assert before > 0.5 > after
    fallen = next(step for step, share in enumerate(agreement) if share < before)
    said = f"step {fallen}: of the 5 questions that chains answered as expected at first 5 are forgotten (0 "
    assert result.alarm.startswith(said)
    assert sum(record.getMessage().startswith(said) for record in caplog.records) == 1
    assert measured(tmp_path / "run", "alarm") == [step >= fallen for step in (1, 2, 3, 4)]
    assert fallen <= 2  # so that the checkpoint gone on from knows of it
    assert measured(tmp_path / "run", "eval_answered")[0] == 1.0
    (tmp_path / "run" / "checkpoints" / "step-00000004").rename(tmp_path / "gone")
    caplog.clear()
    assert train(config).alarm == result.alarm
    assert measured(tmp_path / "run", "alarm") == [step >= fallen for step in (1, 2, 3, 4)]
    assert not any("are forgotten" in record.getMessage() for record in caplog.records)


def test_dev_path_is_asked_in_place_of_the_task_s_questions_and_chooses_among_votes(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_questions(tmp_path / "two.jsonl", [*DEV[:2], "Another?"], ["7", "7", "1"])
    config = by_votes(folder, tmp_path / "run", dev_path=str(path), max_steps=1)
    assert train(config).measured_on == "the agreement of answers to 2 questions"
    assert "1 of the 3 questions of" in caplog.text
    config = by_votes(folder, tmp_path / "gold", dev_path=str(path), stop_on="accuracy", max_steps=1)
    assert train(config).measured_on == "the accuracy of answers to 3 questions"
    assert "trained on too" not in caplog.text


@pytest.mark.parametrize("stop_on", ["accuracy", "agreement"])
def test_dev_questions_that_are_trained_on_are_counted_in_a_warning(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, stop_on: str
) -> None:
    """Pairs that were written beforehand tell it as trees do: a question's prompt begins theirs."""
    mixed = write_questions(tmp_path / "mixed.jsonl", [*DEV[:3], *SEARCHED[:2]], ["7"] * 5)
    trees = folder / "searched" / "trees.jsonl"
    options = {"stop_on": stop_on, "dev_path": str(mixed), "max_steps": 1}
    if stop_on == "agreement":
        options |= {"dev_path": None, "dev_trees": str(trees)}
    trained = load_examples(config_for(folder, tmp_path), load_model(config_for(folder, tmp_path).model)[1]).examples
    asked = {"q0", "q1"} if stop_on == "accuracy" else {f"q{number}" for number in range(6)}
    num_shared = len({example.group for example in trained} & asked)
    assert num_shared > 1
    pairs = tmp_path / "pairs.jsonl"
    write_rows(trees, pairs)
    for number, data in enumerate((trees, pairs)):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            train(by_votes(folder, tmp_path / f"run {number}", data={"path": str(data)}, **options))
        (message,) = [record.getMessage() for record in caplog.records if "trained on too" in record.getMessage()]
        assert f": {num_shared} of its " in message


def test_the_command_shows_the_agreement(folder: Path, tmp_path: Path) -> None:
    config = by_votes(folder, tmp_path / "run", max_steps=2)
    (tmp_path / "c.yaml").write_text(dump_config(config))
    shown = CliRunner().invoke(train_command, [str(tmp_path / "c.yaml")], catch_exceptions=False)
    assert "agreement with votes 0." in shown.output
    assert "on the agreement of answers to" in shown.output


def test_agreement_without_votes_is_refused_with_what_to_set(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"stop_on=agreement needs votes .*: set train\.dev_trees .*or data\.held_out"
    ):
        train(by_votes(folder, tmp_path / "a", dev_trees=None))
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"{n}", "chosen": "7", "rejected": "no"}) + "\n" for n in range(4)))
    with pytest.raises(ConfigError, match=r"from data\.path, which holds no trees .*set train\.dev_trees"):
        train(by_votes(folder, tmp_path / "b", data={"path": str(rows), "held_out": 0.5}, dev_trees=None))
    with pytest.raises(DataError, match=r"none\.jsonl"):
        train(by_votes(folder, tmp_path / "c", dev_trees=str(tmp_path / "none.jsonl")))
    other = write_questions(tmp_path / "other.jsonl", ["Another?"], [None])
    with pytest.raises(ConfigError, match=r"no question of .*other\.jsonl has a vote in .*dev/trees\.jsonl"):
        train(by_votes(folder, tmp_path / "d", dev_path=str(other)))
    config = by_votes(folder, tmp_path / "e")
    with pytest.raises(ConfigError, match=r"is of task svamp, and the configuration's is fever"):
        train(config.model_copy(update={"task": config.task.model_copy(update={"name": "fever"})}))
    with pytest.raises(ConfigError, match=r"stop_on=agreement .* ZeRO stage 3"):
        train(by_votes(folder, tmp_path / "f", zero_stage=3))


def test_reference_answers_that_cannot_be_read_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    dev = write_questions(tmp_path / "dev.jsonl", DEV[:2], ["57", "7"])
    task = {"file": str(Path(__file__).resolve().parents[2] / "examples/reasoner/plain.yaml")}
    config = config_for(tmp_path, tmp_path / "run", task=task, train={"stop_on": "accuracy", "dev_path": str(dev)})
    assert load_dev_questions(config, tiny_tokenizer(), (), (), 10**6) is not None
    assert "1 of 2 reference answers cannot be read by answer.kind=regex" in caplog.text
    assert f"the first is {dev}:2, '7'" in caplog.text
