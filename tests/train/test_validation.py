"""Held-out questions, the best adapter, patience, and the watch for a model that collapses."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from cpo_fast.errors import DataError
from cpo_fast.train.loop import Trainer, train
from cpo_fast.train.metrics import Metrics, OverOptimisationAlarm
from cpo_fast.train.validation import Validator
from tests.train.runs import MakeConfig, id_rows


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_held_out_questions_are_validated_and_never_trained(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, set[str]] = {"train": set(), "eval": set()}
    step, run = Trainer.step, Validator.run

    def watched_step(self: Any, batch: Any) -> Any:
        seen["train"] |= {pair.group for pair in batch}
        return step(self, batch)

    def watched_run(self: Any, engine: Any, at: int) -> Any:
        seen["eval"] |= {pair.group for pair in self.held_out}
        return run(self, engine, at)

    monkeypatch.setattr(Trainer, "step", watched_step)
    monkeypatch.setattr(Validator, "run", watched_run)
    result = train(make_config(data={"held_out": 0.25}, num_epochs=2, batch_pairs=9))
    assert seen["train"]
    assert seen["eval"]
    assert not seen["train"] & seen["eval"]
    assert result.num_items + result.num_held_out == 36
    validated = [line for line in lines(result.metrics_path) if "eval_loss" in line]
    assert len(validated) == 2
    assert {"eval_rewards/accuracies", "eval_rewards/margins", "eval_logps/chosen"} <= set(validated[0])


@pytest.mark.parametrize("held_out", [0.0, 0.25])
def test_weights_average_to_one_over_the_pairs_that_are_trained(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, held_out: float, tmp_path: Path
) -> None:
    rows = id_rows()[:-5]  # a question with fewer pairs than the others
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = make_config(data={"path": str(tmp_path / "rows.jsonl"), "held_out": held_out}, num_epochs=1)
    config = config.model_copy(update={"pairs": config.pairs.model_copy(update={"weight": "question"})})
    by_group: dict[str, list[float]] = {}
    step = Trainer.step

    def watched(self: Any, batch: Any) -> Any:
        for pair in batch:
            by_group.setdefault(pair.group, []).append(pair.weight)
        return step(self, batch)

    monkeypatch.setattr(Trainer, "step", watched)
    result = train(config)
    weights = [weight for group in by_group.values() for weight in group]
    assert len(weights) == result.num_items
    assert sum(weights) == pytest.approx(len(weights))
    shares = [sum(group) for group in by_group.values()]
    assert shares == pytest.approx([shares[0]] * len(shares))


def test_best_adapter_is_kept_and_patience_stops(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    losses = iter([0.6, 0.5, 0.7, 0.55, 0.1])
    saved: list[dict[str, torch.Tensor]] = []

    def scripted(self: Validator, engine: Any) -> dict[str, float]:
        saved.append({n: p.detach().clone() for n, p in self.policy.model.named_parameters() if "lora_" in n})
        return {"eval_loss": next(losses)}

    monkeypatch.setattr(Validator, "measure", scripted)
    config = make_config(data={"held_out": 0.25}, num_epochs=20, batch_pairs=9, eval_every=2, patience=2)
    result = train(config)
    assert result.stopped_early
    assert result.best_step == 4
    assert result.num_steps == 8
    best = load_file(result.adapter_path / "adapter_model.safetensors")
    for name, value in best.items():
        expected = saved[1][name.replace(".weight", ".default.weight")]
        assert torch.equal(value, expected)
    last = load_file(Path(config.run) / "adapter-last" / "adapter_model.safetensors")
    assert any(not torch.equal(best[name], last[name]) for name in best)


def test_accuracy_on_questions_with_answers_can_choose_the_adapter(make_config: MakeConfig, tmp_path: Path) -> None:
    questions = tmp_path / "questions.jsonl"
    questions.write_text('{"question": "1 + 1?", "answer": "2"}\n{"question": "2 + 2?", "answer": "4"}\n')
    config = make_config(num_epochs=1, stop_on="accuracy")
    config = config.model_copy(
        update={
            "task": config.task.model_copy(update={"path": str(questions)}),
            "eval": config.eval.model_copy(update={"max_new_tokens": 4}),
        }
    )
    (line,) = [line for line in lines(train(config).metrics_path) if "eval_accuracy" in line]
    assert 0.0 <= line["eval_accuracy"] <= 1.0


def test_holding_out_everything_is_refused(make_config: MakeConfig, tmp_path: Path) -> None:
    rows = [{"prompt": "p", "chosen": "a", "rejected": "b"}, {"prompt": "p", "chosen": "a", "rejected": "c"}]
    path = tmp_path / "one.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match="held_out"):
        train(make_config(data={"path": str(path), "held_out": 0.9}))


def test_alarm_is_raised_once_when_chosen_fall_while_margins_grow() -> None:
    alarm = OverOptimisationAlarm(limit_nats=0.5)
    texts = [alarm.update(step, chosen_drift=-0.1 * step, margin=0.05 * step) for step in range(1, 30)]
    (text,) = [text for text in texts if text is not None]
    assert "have lost" in text
    assert alarm.raised_at is not None
    assert alarm.raised_at > 5


@pytest.mark.parametrize(("drift", "margin"), [(-0.01, 0.1), (0.2, 0.1), (-0.3, -0.1)])
def test_alarm_stays_silent_for_small_falls_rises_and_shrinking_margins(drift: float, margin: float) -> None:
    alarm = OverOptimisationAlarm(limit_nats=0.5)
    assert all(alarm.update(step, drift * step, margin * step) is None for step in range(1, 30))


def test_alarm_reaches_metrics_log_and_result(
    make_config: MakeConfig, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    healthy = train(make_config(num_epochs=2))
    assert healthy.alarm == ""
    assert lines(healthy.metrics_path)[-1]["alarm"] is False
    summary, calls = Metrics.summary, iter(range(1, 100))

    def collapsing(self: Metrics) -> dict[str, float]:
        step = next(calls)
        return {**summary(self), "logps/chosen_drift": -0.2 * step, "rewards/margins": 0.1 * step}

    monkeypatch.setattr(Metrics, "summary", collapsing)
    with caplog.at_level(logging.WARNING):
        result = train(make_config(num_epochs=5))
    assert "have lost" in result.alarm
    assert sum("may be collapsing" in record.message for record in caplog.records) == 1
    assert lines(result.metrics_path)[-1]["alarm"] is True


def test_drift_is_the_mean_log_ratio_per_chosen_token(make_config: MakeConfig) -> None:
    for line in lines(train(make_config(num_epochs=2, lr=0.05)).metrics_path):
        # beta 0.1: rewards/chosen is 0.1 times the summed log-ratio of a response, averaged over the pairs
        tokens_a_pair = line["logps/chosen"] / line["logps/chosen_per_token"]
        assert line["logps/chosen_drift"] == pytest.approx(10 * line["rewards/chosen"] / tokens_a_pair, rel=1e-5)
