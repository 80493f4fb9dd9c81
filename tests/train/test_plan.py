"""What `cpo-fast plan` counts is what training then does."""

import json
import re
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from click.testing import CliRunner

from cpo_fast.cli.plan import plan_command, warnings
from cpo_fast.config import Config
from cpo_fast.train.deepspeed_engine import deepspeed_config
from cpo_fast.train.loop import train
from cpo_fast.train.plan import make_plan
from tests.tiny import tiny_llama, tiny_tokenizer
from tests.train.runs import MakeConfig, metrics_of


@pytest.mark.parametrize("options", [{}, {"max_tokens": 60}, {"batch_order": "questions", "batch_pairs": 5}])
def test_rows_steps_and_tokens_are_those_of_the_training(make_config: MakeConfig, options: dict[str, object]) -> None:
    config = make_config(data={"held_out": 0.25}, **options)
    plan = make_plan(config, 1)
    lines = metrics_of(config)
    epoch = [line for line in lines if 0 < line["epoch"] <= 1]
    assert plan.num_steps == lines[-1]["step"]
    assert plan.num_examples == sum(line["pairs"] for line in epoch)
    assert plan.row_tokens == sum(line["tokens/rows"] for line in epoch)
    assert plan.forest_tokens == plan.rank_tokens == sum(line["tokens/computed"] for line in epoch)
    assert plan.micro_batch_tokens == plan.rank_tokens / sum(line["micro_batches"] for line in epoch)
    assert plan.efficiency == 1


def test_a_checkpoint_and_the_run_are_as_large_as_planned(make_config: MakeConfig) -> None:
    config = make_config(data={"held_out": 0.25}, save_every=1)
    plan = make_plan(config, 1)
    train(config)
    run = Path(config.run)
    newest = sorted((run / "checkpoints").glob("step-*"))[-1]
    size = sum(file.stat().st_size for file in newest.glob("*.safetensors"))
    assert plan.checkpoint_bytes <= size <= 1.1 * plan.checkpoint_bytes + 20_000
    whole = sum(file.stat().st_size for file in run.rglob("*") if file.is_file())
    assert whole <= 1.1 * plan.disk_bytes + 200_000


def test_more_gpus_compute_a_shared_prompt_more_often_and_are_less_busy(make_config: MakeConfig) -> None:
    config = make_config()
    one, four = make_plan(config, 1), make_plan(config, 4)
    assert four.forest_tokens == one.forest_tokens
    assert four.rank_tokens > one.rank_tokens
    assert 0.2 < four.efficiency < 1
    assert four.wanted_pairs == 64


def test_rows_that_are_dropped_are_counted_by_reason(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config()
    rows = Path(config.data.path or "").read_text().splitlines()
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join([*rows, rows[0], json.dumps({"prompt_token_ids": [1], "chosen_token_ids": [2]})]))
    changed = config.model_copy(update={"data": config.data.model_copy(update={"path": str(path), "max_drop": 0.5})})
    plan = make_plan(changed, 1)
    assert sum(plan.dropped.values()) == 2
    assert "duplicate" in plan.dropped


def write_yaml(config: Config, tmp_path: Path) -> str:
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    return str(path)


def test_the_command_shows_warns_and_writes_the_deepspeed_json(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config(zero_stage=3)
    written = tmp_path / "ds.json"
    arguments = [write_yaml(config, tmp_path), "--gpus", "8", "--deepspeed", str(written)]
    shown = CliRunner().invoke(plan_command, arguments, catch_exceptions=False)
    assert "predicted memory on the CPU, ZeRO stage 3" in shown.stdout
    assert not re.search(r"(base|adapter|head) +│ +0\.00 ", shown.stdout)  # rows that say nothing
    assert "train.batch_pairs=12 keeps 8 GPUs busy" in shown.stdout
    assert "below 4,096" in shown.stdout
    assert json.loads(written.read_text()) == deepspeed_config(config.train, 3)
    values = json.loads(CliRunner().invoke(plan_command, [*arguments, "--json"]).stdout)
    assert values["num_ranks"] == 8
    assert not (Path(config.run) / "metrics.jsonl").exists()


def test_memory_is_that_of_the_checkpointing_that_training_will_choose(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = make_plan(make_config(), 1)
    assert not free.recomputes
    assert make_plan(make_config(gradient_checkpointing="non_reentrant"), 1).recomputes
    assert sum(free.memory.values()) == pytest.approx(free.kept_bytes)
    available = psutil.virtual_memory()
    monkeypatch.setattr(psutil, "virtual_memory", lambda: available._replace(available=0))
    full = make_plan(make_config(), 1)
    assert full.recomputes
    assert sum(full.memory.values()) == pytest.approx(full.checkpointed_bytes)
    assert not make_plan(make_config(gradient_checkpointing="off"), 1).recomputes


def test_a_base_that_every_rank_will_copy_is_told(make_config: MakeConfig, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(tmp_path / "half")
    tiny_llama(dtype=torch.bfloat16, vocab_size=len(tokenizer)).save_pretrained(tmp_path / "half")
    config = make_config(model={"path": str(tmp_path / "half")})
    plan = make_plan(config, 2)
    (told,) = (text for text in warnings(plan, config) if "casts a copy" in text)
    assert told.startswith("the base's files are BF16, other than")
    assert plan.copied_bytes == plan.memory["base"]  # float32
    assert plan.loading_bytes > 1.5 * plan.copied_bytes  # with the files that it is read from
    config = make_config()
    assert not any("casts a copy" in text for text in warnings(make_plan(config, 2), config))
