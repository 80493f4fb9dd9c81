"""An adapter that training wrote goes onto its base, in whatever dtype and folder, and onto no other one."""

import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from cpo_fast.base_sample import NAME
from cpo_fast.config import ModelConfig
from cpo_fast.errors import CheckpointError
from cpo_fast.models import load_model
from cpo_fast.train.loop import train
from tests.tiny import save_tiny_model
from tests.train.runs import MakeConfig


@pytest.fixture
def adapter(make_config: MakeConfig) -> Path:
    return train(make_config(max_steps=1, data={"held_out": 0.25})).adapter_path


def load(base: Path, adapter: Path) -> Any:
    return load_model(ModelConfig(path=str(base), adapter=str(adapter), device="cpu"))


def test_another_base_of_the_same_shapes_is_refused(
    make_config: MakeConfig, adapter: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    """By whatever loads a model, of every adapter that a run leaves. One changed matrix makes another base."""
    other = save_tiny_model(tmp_path / "other", seed=9)
    for each in (adapter, adapter.with_name("adapter-best")):
        with pytest.raises(
            CheckpointError, match=f"{each} was trained on other weights than those in {other}"
        ) as caught:
            load(other, each)
        assert f"names {tiny_folder / 'model'})" in str(caught.value)
        assert caught.value.exit_code == 4
    with pytest.raises(CheckpointError, match="was trained on other weights"):
        train(make_config(model={"path": str(other), "adapter": str(adapter)}))
    near = shutil.copytree(tiny_folder / "model", tmp_path / "near")
    weights = load_file(near / "model.safetensors")
    weights["model.layers.1.self_attn.k_proj.weight"] *= 1.001
    save_file(weights, near / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="was trained on other weights"):
        load(near, adapter)
    (adapter / NAME).unlink()
    load(other, adapter.with_name("adapter-best").parent / "adapter")  # as the message says


def test_the_same_base_elsewhere_in_another_dtype_or_with_another_tokenizer_is_accepted(
    adapter: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    moved = shutil.copytree(tiny_folder / "model", tmp_path / "moved")
    (moved / "tokenizer_config.json").write_text((moved / "tokenizer_config.json").read_text() + "\n")
    load(moved, adapter)
    model, _ = load_model(ModelConfig(path=str(moved), dtype="bfloat16", device="cpu"))
    model.save_pretrained(tmp_path / "moved", max_shard_size="20KB")  # in several files
    (moved / "model.safetensors").unlink()
    load(moved, adapter)


def test_an_adapter_of_others_is_warned_of_where_it_names_a_base_to_compare_with(
    adapter: Path, tiny_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = save_tiny_model(tmp_path / "other", seed=9)
    (adapter / NAME).unlink()
    load(tiny_folder / "model", adapter)
    assert "other weights" not in caplog.text
    with caplog.at_level(logging.WARNING):
        load(other, adapter)
    assert f"was trained on {tiny_folder / 'model'}" in caplog.text
    caplog.clear()
    named = (adapter / "adapter_config.json").read_text().replace(str(tiny_folder / "model"), "gone/model")
    (adapter / "adapter_config.json").write_text(named)
    load(other, adapter)
    assert caplog.text == ""


@pytest.mark.parametrize("text", ["{", "[]", '{"model.embed_tokens.weight": 3}'])
def test_a_damaged_file_is_named(adapter: Path, tiny_folder: Path, text: str) -> None:
    (adapter / NAME).write_text(text)
    with pytest.raises(CheckpointError, match=f"{NAME} cannot be read"):
        load(tiny_folder / "model", adapter)
