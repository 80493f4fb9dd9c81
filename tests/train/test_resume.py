"""A training goes on from its checkpoints bit for bit, and only if it is the same training."""

import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner
from filelock import FileLock
from safetensors.torch import load_file, save_file

from cpo_fast.cli.train import train_command
from cpo_fast.config import Config, TrainConfig, validate_config
from cpo_fast.errors import CheckpointError, ConfigError, EnvironmentProblem
from cpo_fast.ranks import Ranks
from cpo_fast.train import memory
from cpo_fast.train.deepspeed_engine import deepspeed_config
from cpo_fast.train.loop import train
from cpo_fast.train.resume import check_same_training
from tests.train.runs import MakeConfig

LAST = "checkpoints/step-00000009"


def steps_of(run: Path) -> list[dict[str, Any]]:
    """Metrics without times."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


@pytest.fixture(scope="module")
def whole(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """An uninterrupted run of nine steps in three epochs, with a checkpoint of every step and a best adapter."""
    config = validate_config(
        {
            "run": str(tmp_path_factory.mktemp("whole") / "run"),
            "model": {"path": str(tiny_folder / "model"), "dtype": "float32"},
            "data": {"path": str(tiny_folder / "pairs.jsonl"), "held_out": 0.25},
            "lora": {"r": 4, "alpha": 8},
            "train": {
                "lr": 0.02,
                "batch_pairs": 10,
                "num_epochs": 3,
                "save_every": 1,
                "keep_last": 100,
                "eval_every": 2,
            },
        }
    )
    train(config)
    return config


def interrupted(whole: Config, step: int, folder: Path) -> Config:
    """The run as a kill after the save of a step leaves it: later lines are written already, later checkpoints are not."""
    run = folder / "run"
    shutil.copytree(whole.run, run)
    for path in (run / "checkpoints").glob("step-*"):
        if int(path.name.removeprefix("step-")) > step:
            shutil.rmtree(path)
    shutil.rmtree(run / "adapter")
    return whole.model_copy(update={"run": str(run)})


@pytest.mark.parametrize(
    "step", [1, 2, 3, 4, 9]
)  # of an epoch: the first, in the middle, the last; epoch 2; the last of all
def test_a_run_goes_on_bit_for_bit_after_any_step(whole: Config, step: int, tmp_path: Path) -> None:
    config = interrupted(whole, step, tmp_path)
    result = train(config)
    before, after = Path(whole.run), Path(config.run)
    for name in ("adapter.safetensors", "optimizer.safetensors"):
        assert (after / LAST / name).read_bytes() == (before / LAST / name).read_bytes()
    for name in ("adapter", "adapter-best"):
        file = f"{name}/adapter_model.safetensors"
        assert (after / file).read_bytes() == (before / file).read_bytes()
    assert steps_of(after) == steps_of(before)
    assert result.num_steps == 9
    assert result.first["step"] == 1


def test_a_run_that_ended_in_a_validation_validates_that_step_and_goes_on_bit_for_bit(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    # the only checkpoints are those before a validation, and the last
    options = {"num_epochs": 3, "eval_every": 2, "lr": 0.02, "save_every": 1000, "keep_last": 9}
    whole = make_config(data={"held_out": 0.25}, **options)
    train(whole)
    config = interrupted(whole, 4, tmp_path)
    before, after = Path(whole.run), Path(config.run)
    saved = json.loads((after / "checkpoints" / "step-00000004" / "state.json").read_text())
    assert saved["unvalidated"]["step"] == 4
    assert saved["validator"]["best_step"] <= 2
    train(config)
    assert steps_of(after) == steps_of(before)
    newest = max((before / "checkpoints").glob("step-*")).name
    for name in (
        *(f"checkpoints/{newest}/{kind}.safetensors" for kind in ("adapter", "optimizer")),
        "adapter-best/adapter_model.safetensors",
    ):
        assert (after / name).read_bytes() == (before / name).read_bytes()

    # where that step is not validated any more, it is forgotten
    other = tmp_path / "other"
    other.mkdir()
    config = interrupted(whole, 4, other)
    changed = config.model_copy(update={"train": config.train.model_copy(update={"eval_every": 5, "save_every": 1})})
    train(changed, allow_mismatch=["train.eval_every"])
    state = json.loads((other / "run" / "checkpoints" / "step-00000006" / "state.json").read_text())
    assert state["unvalidated"] is None
    steps = [line["step"] for line in steps_of(other / "run")]
    assert steps == list(range(len(steps)))


def test_a_best_adapter_that_is_another_one_is_not_shipped(
    make_config: MakeConfig, caplog: pytest.LogCaptureFixture
) -> None:
    config = make_config(
        data={"held_out": 0.25},
        num_epochs=20,
        eval_every=2,
        patience=2,
        batch_pairs=9,
        lr=0.2,
        schedule="constant",
        warmup_ratio=0.0,
        reference="online",
    )
    done = train(config)
    assert done.best_step < done.num_steps  # else nothing is copied
    run = Path(config.run)
    weights = run / "adapter-best" / "adapter_model.safetensors"
    save_file({name: value + 1 for name, value in load_file(weights).items()}, weights)
    with caplog.at_level(logging.WARNING):
        train(config)
    assert "is not the adapter of the best step" in caplog.text
    last, shipped = (run / name / "adapter_model.safetensors" for name in ("adapter-last", "adapter"))
    assert shipped.read_bytes() == last.read_bytes()


def test_a_changed_training_is_refused_with_what_differs_unless_it_is_allowed(whole: Config, tmp_path: Path) -> None:
    config = interrupted(whole, 6, tmp_path)
    changed = config.model_copy(update={"seed": 5, "train": config.train.model_copy(update={"lr": 0.03})})
    with pytest.raises(CheckpointError, match=r"seed was 0, is 5; train\.lr was 0\.02, is 0\.03") as caught:
        train(changed)
    assert caught.value.exit_code == 4
    assert "--allow-mismatch seed --allow-mismatch train.lr" in str(caught.value)
    with pytest.raises(CheckpointError, match=r"\(train\.lr was"):
        train(changed, allow_mismatch=["seed"])
    assert train(changed, allow_mismatch=["seed", "train.lr"]).num_steps == 9


def test_changed_data_is_refused(whole: Config, tmp_path: Path) -> None:
    config = interrupted(whole, 6, tmp_path)
    rows = [json.loads(line) for line in Path(config.data.path or "").read_text().splitlines()]
    rows[3]["rejected_token_ids"][0] += 1
    other = tmp_path / "pairs.jsonl"
    other.write_text("".join(json.dumps(row) + "\n" for row in rows))
    changed = config.model_copy(update={"data": config.data.model_copy(update={"path": str(other)})})
    with pytest.raises(CheckpointError, match=r"another training \(data was ") as caught:
        train(changed)
    rest = rf"{len(rows)} rows \(hash [0-9a-f]{{16}}\)"
    was, is_now = (re.escape(str(path)) for path in (config.data.path, other))
    assert re.search(rf"data was {was}, {rest}, is {is_now}, {rest}\);", str(caught.value))
    assert "--allow-mismatch" not in str(caught.value)  # other data is another training, whatever is allowed
    with pytest.raises(CheckpointError, match=r"\(model was 'x', is here \(hash y\)\);") as caught:
        check_same_training({"model": "x"}, {"model": "y"}, (), "run", ({}, {"model": "here"}))
    assert "--allow-mismatch" not in str(caught.value)


def test_what_says_how_to_compute_may_change(whole: Config, tmp_path: Path) -> None:
    config = interrupted(whole, 6, tmp_path)
    other = config.train.model_copy(update={"max_tokens": 70, "zero_stage": 2, "save_every": 7, "log_every": 1})
    train(config.model_copy(update={"train": other}))
    assert [line["step"] for line in steps_of(Path(config.run))] == list(range(10))


def test_an_unknown_key_to_allow_is_named() -> None:
    with pytest.raises(ConfigError, match=r"train\.rate: there is no such key; the keys are seed, train\.lr"):
        check_same_training({"seed": 0, "train.lr": 1.0}, {"seed": 0, "train.lr": 1.0}, ["train.rate"], "run")


def test_a_run_folder_is_trained_by_one_process_at_a_time(make_config: MakeConfig) -> None:
    config = make_config()
    Path(config.run).mkdir(parents=True)
    with (
        FileLock(Path(config.run) / ".train.lock"),
        pytest.raises(EnvironmentProblem, match="by another process") as caught,
    ):
        train(config)
    assert caught.value.exit_code == 5


def test_sigterm_ends_the_command_with_143_and_the_same_command_goes_on(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    config = make_config(max_steps=5000, num_epochs=5000, reference="online", schedule="constant")
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    process = subprocess.Popen(
        [sys.executable, "-m", "cpo_fast", "train", str(path)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    metrics = Path(config.run) / "metrics.jsonl"
    while process.poll() is None and (not metrics.exists() or metrics.read_text().count("\n") < 3):
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=3000)
    assert process.returncode == 143, errors
    assert errors.rstrip().endswith("the same command goes on from the newest checkpoint")
    step = steps_of(Path(config.run))[-1]["step"]
    assert f"SIGTERM after step {step} of 5000" in errors
    assert "error" not in errors.splitlines()[-1]
    overrides = [f"train.max_steps={step + 2}"]
    refused = CliRunner().invoke(train_command, [str(path), *overrides])
    assert f"train.max_steps was 5000, is {step + 2}" in str(refused.exception)
    went_on = CliRunner().invoke(
        train_command, [str(path), *overrides, "--allow-mismatch", "train.max_steps", "--json"], catch_exceptions=False
    )
    assert json.loads(went_on.stdout)["num_steps"] == step + 2
    assert [line["step"] for line in steps_of(Path(config.run))] == list(range(1, step + 3))


def user_json(tmp_path: Path, values: Any) -> TrainConfig:
    path = tmp_path / "ds.json"
    path.write_text(values if isinstance(values, str) else json.dumps(values))
    return TrainConfig(deepspeed=str(path))


def test_a_user_s_deepspeed_json_is_merged(tmp_path: Path) -> None:
    theirs = {
        "zero_optimization": {"stage": 3, "stage3_prefetch_bucket_size": 7, "reduce_bucket_size": "auto"},
        "comms_logger": {},
    }
    merged = deepspeed_config(user_json(tmp_path, theirs), 3)
    assert merged["zero_optimization"]["stage3_prefetch_bucket_size"] == 7
    assert isinstance(merged["zero_optimization"]["reduce_bucket_size"], int)
    assert merged["comms_logger"] == {}
    assert merged["gradient_clipping"] == 1.0


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"gradient_clipping": 0.5}, "gradient_clipping is 0.5 there and 1.0"),
        ({"zero_optimization": {"stage": 2}}, r"zero_optimization\.stage is 2 there and 3"),
        ({"bf16": {"enabled": True}}, "bf16: it would cast the float32 adapters"),
        ({"optimizer": {"type": "Adam"}}, "optimizer: the optimizer is set by train.lr"),
        ({"zero_optimization": {"zero_hpz_partition_size": 8}}, "hpZ"),
        ({"zero_optimization": {"zero_quantized_weights": True}}, r"ZeRO\+\+"),
        ("[1]", "no JSON object"),
        ("{", "not valid JSON"),
    ],
)
def test_a_user_s_deepspeed_json_that_contradicts_is_refused_by_name(tmp_path: Path, values: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        deepspeed_config(user_json(tmp_path, values), 3)


def test_the_base_is_cut_over_ranks_where_it_takes_too_much_of_one(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    cpu, two = torch.device("cpu"), Ranks(0, 2, 0, 2, "torchrun")
    config = make_config()
    base = memory.base_bytes(config.model, cpu)
    assert base > 4 * 2000
    for share, stage in ((0.69, 0), (0.71, 3)):
        # two ranks of one host share its memory
        monkeypatch.setattr(memory, "device_bytes", lambda device, room=2 * base / share: room)
        assert memory.choose_stage(config, cpu, two) == stage
        assert memory.choose_stage(config, cpu, Ranks()) == 0
    assert memory.choose_stage(make_config(zero_stage=1), cpu, two) == 1


def test_accuracy_cannot_stop_a_run_under_zero_3(make_config: MakeConfig) -> None:
    with pytest.raises(ConfigError, match=r"train\.stop_on=accuracy .* ZeRO stage 3 .*train\.zero_stage=0"):
        train(make_config(zero_stage=3, stop_on="accuracy"))


def test_temporary_names_differ_between_hosts_with_equal_process_numbers() -> None:
    from cpo_fast.files import aside_of

    name = aside_of(Path("/x/file")).name
    assert str(os.getpid()) in name
    assert os.uname().nodename in name
