"""A merged model is base plus adapter, or it is not written."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from cpo_fast.config import Config
from cpo_fast.errors import CheckpointError, ConfigError
from cpo_fast.models import load_model, merge
from cpo_fast.train.loop import train
from tests.cli.commands import run


@pytest.fixture
def trained(make_config: Callable[..., Config]) -> Config:
    config = make_config(num_epochs=1, lr=0.05)
    adapter = train(config).adapter_path
    return config.model_copy(update={"model": config.model.model_copy(update={"adapter": str(adapter)})})


def test_merged_model_gives_the_logits_of_base_plus_adapter(trained: Config, tmp_path: Path) -> None:
    result = merge(trained, tmp_path / "merged", ["1 + 1 = 2", "hello"], max_mean_kl=1e-6)
    assert result.mean_kl < 1e-9
    ids = torch.tensor([[7, 9, 30, 200]])
    with_adapter, _ = load_model(trained.model)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(merged(ids).logits, with_adapter(ids).logits, rtol=1e-5, atol=1e-5)
    untrained, _ = load_model(trained.model.model_copy(update={"adapter": None}))
    assert float((merged(ids).logits - untrained(ids).logits).abs().max()) > 1e-3


def test_merge_that_drifts_is_refused_and_writes_nothing(trained: Config, tmp_path: Path) -> None:
    low = trained.model_copy(update={"model": trained.model.model_copy(update={"dtype": "bfloat16"})})
    with pytest.raises(CheckpointError, match="differs from base plus adapter") as raised:
        merge(low, tmp_path / "merged", ["1 + 1 = 2"], max_mean_kl=1e-12)
    assert raised.value.exit_code == 4
    assert not (tmp_path / "merged").exists()


def test_merge_needs_an_adapter_and_an_empty_folder(trained: Config, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.adapter is not set"):
        merge(
            trained.model_copy(update={"model": trained.model.model_copy(update={"adapter": None})}),
            tmp_path / "m",
            [],
            1,
        )
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "precious").write_text("x")
    with pytest.raises(ConfigError, match="not empty"):
        merge(trained, tmp_path / "m", ["a"], 1.0)
    assert (tmp_path / "m" / "precious").read_text() == "x"


def test_command_prints_the_divergence(trained: Config, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(f"model: {{path: {trained.model.path}, dtype: float32}}\n")
    result = run(
        "merge", str(tmp_path / "c.yaml"), f"model.adapter={trained.model.adapter}", "-o", str(tmp_path / "m"), "--json"
    )
    assert result.returncode == 0, result.stderr
    values = json.loads(result.stdout)
    assert values["mean_kl"] < 1e-9
    assert (tmp_path / "m" / "model.safetensors").is_file()
