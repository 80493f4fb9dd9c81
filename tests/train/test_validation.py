"""Held-out questions, the best adapter, patience, and the watch for a model that collapses."""

import json
import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from cpo_fast.config import Config
from cpo_fast.data.batches import split_by_question
from cpo_fast.data.load import load_examples
from cpo_fast.data.pair_rules import draw
from cpo_fast.errors import ConfigError, DataError, NonFiniteError
from cpo_fast.evaluate.chain import Chain
from cpo_fast.models import load_model
from cpo_fast.report.runs import read_runs
from cpo_fast.report.summary import summary
from cpo_fast.tasks import Prompts, get_task
from cpo_fast.train.loop import train
from tests.tiny import save_tiny_model, tiny_tokenizer
from tests.train.runs import MakeConfig, id_rows, largest_difference


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_held_out_questions_are_validated_and_never_trained(make_config: MakeConfig, tmp_path: Path) -> None:
    """A run on the other questions alone takes the very same steps."""
    options = {"num_epochs": 2, "batch_pairs": 9, "reference": "online"}
    config = make_config(data={"held_out": 0.25}, **options)
    result = train(config)
    examples = load_examples(config, tiny_tokenizer()).examples
    held_out = split_by_question(examples, 0.25, config.seed)[1]
    (name,) = {example.group for example in held_out}
    others = tmp_path / "others.jsonl"
    others.write_text("".join(json.dumps(row) + "\n" for row in id_rows() if row["tree"] != name))
    steps = lines(result.metrics_path)
    validated = [line for line in steps if "eval_loss" in line]
    assert [(line["step"], line["eval_pairs"]) for line in validated] == [(n, len(held_out)) for n in (0, 3, 6)]
    assert result.num_held_out == len(held_out)
    assert {"eval_rewards/accuracies", "eval_rewards/margins", "eval_logps/chosen"} <= set(validated[0])
    assert steps.pop(0)["step"] == 0
    for line in steps:
        for key in [key for key in line if key.startswith("eval_") or key == "seconds"]:
            del line[key]
    alone = lines(train(make_config(data={"path": str(others)}, **options)).metrics_path)
    assert steps == [{key: value for key, value in line.items() if key != "seconds"} for line in alone]
    assert result.num_items + result.num_held_out == 36


@pytest.mark.parametrize("held_out", [0.0, 0.25])
def test_weights_average_to_one_over_the_pairs_that_are_trained(
    make_config: MakeConfig, held_out: float, tmp_path: Path
) -> None:
    """Before the first update every pair's loss is its weight times ln 2."""
    rows = id_rows()[:-5]  # a question with fewer pairs than the others
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"path": str(tmp_path / "rows.jsonl"), "held_out": held_out}
    config = make_config(data=data, batch_pairs=100, max_steps=1, reference="online")
    config = config.model_copy(update={"pairs": config.pairs.model_copy(update={"weight": "question"})})
    *_, line = lines(train(config).metrics_path)
    assert line["pairs"] == (22 if held_out else len(rows))  # weights of all 31 would average to 31 / 4 / 9 over these
    assert line["loss"] == pytest.approx(math.log(2), rel=1e-6)


def test_best_adapter_is_kept_and_patience_stops(make_config: MakeConfig) -> None:
    """At this rate the pairs that are trained are learnt by heart, and those of other questions get worse."""
    usual = {"batch_pairs": 9, "lr": 0.2, "schedule": "constant", "warmup_ratio": 0.0, "reference": "online"}
    config = make_config(data={"held_out": 0.25}, num_epochs=20, eval_every=2, patience=2, **usual)
    result = train(config)
    losses = {line["step"]: line["eval_loss"] for line in lines(result.metrics_path) if "eval_loss" in line}
    assert result.stopped_early
    assert result.best_step == min(losses, key=losses.__getitem__)
    assert result.num_steps == result.best_step + 2 * 2 == max(losses)
    stopped_there = train(make_config(data={"held_out": 0.25}, max_steps=result.best_step, **usual))
    best, there, last = (
        load_file(folder / "adapter_model.safetensors")
        for folder in (result.adapter_path, stopped_there.adapter_path, Path(config.run) / "adapter-last")
    )
    assert largest_difference(best, there) == 0.0
    assert largest_difference(best, last) > 0.0


def alike(path: Path, is_opposed: bool) -> Path:
    """Twelve questions with the same two responses, so that what is learnt holds for those of the other half.

    With `is_opposed` the half that `held_out` 0.5 holds out prefers the other response: every step makes it worse.
    """
    names = [f"q{number}" for number in range(12)]
    held_out = draw(names, 6, 0, "held_out")
    rows = []
    for number, name in enumerate(names):
        chosen, rejected = [7, 8, 9], [30, 31]
        if is_opposed and name in held_out:
            chosen, rejected = rejected, chosen
        ids = {"prompt_token_ids": [5, 9, 40 + number], "chosen_token_ids": chosen, "rejected_token_ids": rejected}
        rows.append({**ids, "tree": name, "step": 1, "chosen_final": False, "rejected_final": False})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


STEADY = {"schedule": "constant", "warmup_ratio": 0.0, "batch_pairs": 3, "reference": "online"}


@pytest.mark.parametrize("from_adapter", [False, True])
def test_an_adapter_that_is_worse_than_its_start_is_never_the_best(
    make_config: MakeConfig, tmp_path: Path, from_adapter: bool
) -> None:
    """What is shipped is the start, of a new adapter (which changes nothing) or of a loaded one, after a resume too."""
    start = train(make_config(num_epochs=1)).adapter_path if from_adapter else None
    model = {"adapter": str(start)} if start else {}
    data = {"path": str(alike(tmp_path / "opposed.jsonl", is_opposed=True)), "held_out": 0.5}
    config = make_config(data=data, model=model, num_epochs=3, eval_every=2, **STEADY)
    result = train(config)
    run = Path(config.run)
    measured = [line for line in lines(result.metrics_path) if "eval_loss" in line]
    assert [line["step"] for line in measured] == [0, 2, 4, 6]
    assert measured[0]["eval_loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert min(line["eval_loss"] for line in measured[1:]) > measured[0]["eval_loss"]
    assert [line["eval_best_step"] for line in measured] == [0] * 4
    assert result.best_step == 0
    (remark,) = result.remarks
    assert remark.startswith("no step was better than the starting point")
    assert str(start) in remark if start else "the base;" in remark
    assert remark.endswith("try a lower train.lr, fewer steps or more questions")
    assert summary(read_runs([run])[0]).warnings[-1] == f"N{remark[1:]}."  # at the head of the report
    shipped, last = (load_file(run / name / "adapter_model.safetensors") for name in ("adapter", "adapter-last"))
    assert largest_difference(shipped, last) > 0.01
    if start is not None:
        assert largest_difference(shipped, load_file(start / "adapter_model.safetensors")) == 0.0
    else:
        assert all(not bool(value.any()) for name, value in shipped.items() if "lora_B" in name)
    # a kill after the save of step 4, before its validation or after
    (run / "checkpoints" / "step-00000006").rename(run / "gone")
    before, metrics = (run / "adapter" / "adapter_model.safetensors").read_bytes(), lines(result.metrics_path)
    again = train(config)
    assert (again.best_step, again.remarks) == (0, result.remarks)
    hardly = train(make_config(data=data, model=model, num_epochs=1, lr=1e-7, **STEADY))
    assert hardly.best_step == 0
    assert hardly.remarks[0].endswith("hardly moved the model, so raise train.lr or train.max_steps")
    assert (run / "adapter" / "adapter_model.safetensors").read_bytes() == before
    assert [{**line, "seconds": 0} for line in lines(again.metrics_path)] == [
        {**each, "seconds": 0} for each in metrics
    ]


def test_patience_counts_validations_after_the_warm_up_alone(make_config: MakeConfig, tmp_path: Path) -> None:
    """The rate of the first step is 0: it cannot be better than the start, and says nothing of those that follow."""
    data = {"path": str(alike(tmp_path / "opposed.jsonl", is_opposed=True)), "held_out": 0.5}
    usual = STEADY | {"warmup_ratio": 0.4}
    result = train(make_config(data=data, num_epochs=5, eval_every=1, patience=2, **usual))
    losses = [line["eval_loss"] for line in lines(result.metrics_path)]
    assert losses[0] == losses[1]
    assert result.stopped_early
    assert result.best_step == 0  # nothing was better, and 4 of 10 steps are warm-up
    assert result.num_steps == 4 + 2


def test_a_better_step_is_shipped_without_a_remark(make_config: MakeConfig, tmp_path: Path) -> None:
    data = {"path": str(alike(tmp_path / "alike.jsonl", is_opposed=False)), "held_out": 0.5}
    result = train(make_config(data=data, num_epochs=1, **STEADY))
    before, after = (line["eval_loss"] for line in lines(result.metrics_path) if "eval_loss" in line)
    assert after < before
    assert (result.best_step, result.remarks) == (2, ())


@pytest.fixture
def asked(make_config: MakeConfig, tmp_path: Path) -> Config:
    """Training that moves nothing and stops on the accuracy of two questions, with a model of enough positions for them."""
    questions = tmp_path / "questions.jsonl"
    questions.write_text('{"question": "1 + 1?", "answer": "2"}\n{"question": "2 + 2?", "answer": "4"}\n')
    folder = save_tiny_model(tmp_path / "model", seed=3, max_position_embeddings=4096)
    config = make_config(num_epochs=1, stop_on="accuracy", lr=1e-12, model={"path": str(folder)})
    changes = {"path": str(questions)}, {"max_new_tokens": 4}
    sections = {name: getattr(config, name) for name in ("task", "eval")}
    return config.model_copy(
        update={name: sections[name].model_copy(update=new) for name, new in zip(sections, changes, strict=True)}
    )


def test_accuracy_is_that_of_greedy_chains_of_the_model_in_training(
    asked: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One question is answered as plain `generate` answers it, and the other is not."""
    model, tokenizer = load_model(asked.model)
    prompts = Prompts(get_task("svamp"), tokenizer)
    questions = get_task("svamp").load(asked.task.path)
    ids = torch.tensor([prompts.encode(questions[0])])
    said = tokenizer.decode(model.generate(ids, do_sample=False, max_new_tokens=4)[0, ids.shape[1] :])
    assert len(said) == 4
    monkeypatch.setattr(Chain, "answer", lambda chain, task: chain.text)
    monkeypatch.setattr(
        type(get_task("svamp")), "is_correct", lambda task, answer, gold: gold == "2" and answer == said
    )
    result = train(asked)
    measured = [line for line in lines(result.metrics_path) if "eval_accuracy" in line]
    assert [line["eval_accuracy"] for line in measured] == [0.5, 0.5]
    assert result.best_step == 0  # as good is not better
    assert result.measured_on == "the accuracy of answers to 2 questions"


def test_a_question_that_does_not_fit_the_model_counts_as_wrong_and_all_of_them_are_refused(
    asked: Config, caplog: pytest.LogCaptureFixture
) -> None:
    path = Path(asked.task.path)
    fits = path.read_text()
    long = json.dumps({"question": "very " * 900 + "long?", "answer": "2"}) + "\n"
    path.write_text(fits + long)
    for line in lines(train(asked).metrics_path):
        assert line.get("eval_accuracy", 0.0) == 0.0
    assert "1 of 3 chains could not be asked and come to no answer" in caplog.text
    path.write_text(long)
    with pytest.raises(ConfigError, match=r"stop_on=accuracy: no question .* exceed the model's 4096 positions"):
        train(asked.model_copy(update={"run": f"{asked.run}-again"}))


def test_holding_out_everything_is_refused(make_config: MakeConfig, tmp_path: Path) -> None:
    rows = [{"prompt": "p", "chosen": "a", "rejected": "b"}, {"prompt": "p", "chosen": "a", "rejected": "c"}]
    path = tmp_path / "one.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match="held_out"):
        train(make_config(data={"path": str(path), "held_out": 0.9}))


def test_alarm_reaches_metrics_log_and_result(
    make_config: MakeConfig, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    healthy = train(make_config(num_epochs=2))
    assert healthy.alarm == ""
    assert lines(healthy.metrics_path)[-1]["alarm"] is False
    # the loser repeats the winner's token more often: margins grow as that token loses probability, the winner's too
    ids = {"chosen_token_ids": [7] * 2, "rejected_token_ids": [7] * 8, "chosen_final": False, "rejected_final": False}
    rows = [{"prompt_token_ids": [5, 9, 20 + q], "tree": f"q{q}", "step": 1, **ids} for q in range(24)]
    path = tmp_path / "repeated.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with caplog.at_level(logging.WARNING):
        result = train(make_config(num_epochs=5, data={"path": str(path)}))
    assert "have lost" in result.alarm
    assert sum("may be collapsing" in record.message for record in caplog.records) == 1
    assert lines(result.metrics_path)[-1]["alarm"] is True


def test_a_held_out_loss_that_is_not_finite_ends_the_run_and_names_the_rows(make_config: MakeConfig) -> None:
    """The weights overflow in the step before the validation."""
    with pytest.raises(NonFiniteError, match=r"the loss of \d+ held-out rows is not finite \(rows .*pairs\.jsonl:\d+"):
        train(make_config(data={"held_out": 0.25}, lr=1e30, eval_every=1, warmup_ratio=0.0))


def test_p10_is_the_lowest_tenth_of_the_drifts_of_single_pairs(make_config: MakeConfig) -> None:
    """Of weights that stand still, away from the reference: steps of one pair and of twelve take them in one order."""
    start = str(train(make_config(num_epochs=1, lr=0.1)).adapter_path)
    usual = {
        "model": {"adapter": start},
        "reference_model": "base",
        "reference": "online",
        "lr": 1e-12,
        "num_epochs": 1,
    }
    alone = lines(train(make_config(batch_pairs=1, **usual)).metrics_path)
    drifts = [line["logps/chosen_drift"] for line in alone]
    assert [line["logps/chosen_drift_p10"] for line in alone] == drifts
    together = [
        line["logps/chosen_drift_p10"] for line in lines(train(make_config(batch_pairs=12, **usual)).metrics_path)
    ]
    expected = [np.quantile(drifts[first : first + 12], 0.1) for first in (0, 12, 24)]
    assert together == pytest.approx(expected, rel=1e-4)
    assert len({round(value, 4) for value in together}) == 3


def test_drift_is_the_mean_log_ratio_per_chosen_token(make_config: MakeConfig) -> None:
    for line in lines(train(make_config(num_epochs=2, lr=0.05)).metrics_path):
        # beta 0.1: rewards/chosen is 0.1 times the summed log-ratio of a response, averaged over the pairs
        tokens_a_pair = line["logps/chosen"] / line["logps/chosen_per_token"]
        assert line["logps/chosen_drift"] == pytest.approx(10 * line["rewards/chosen"] / tokens_a_pair, rel=1e-5)
