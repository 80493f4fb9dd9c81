"""A tiny model on disk, a pairs file of token ids, and a way to train on them with a few options changed."""

import json
from pathlib import Path
from typing import Any

import pytest

from cpo_fast.config import Config, validate_config
from tests.tiny import save_tiny_model
from tests.train.dpo_of_trl import TrlRun, train_with_trl
from tests.train.runs import MakeConfig, id_rows


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`model/` (a tiny Llama and its tokenizer) and `pairs.jsonl`."""
    folder = tmp_path_factory.mktemp("tiny")
    save_tiny_model(folder / "model")
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in id_rows()))
    return folder


@pytest.fixture(scope="session")
def trl_run(tmp_path_factory: pytest.TempPathFactory) -> TrlRun:
    """What TRL trains, for comparisons with one process and with several ranks."""
    return train_with_trl(tmp_path_factory.mktemp("trl"))


@pytest.fixture
def make_config(tiny_folder: Path, tmp_path: Path) -> MakeConfig:
    """`make_config(lr=..., max_tokens=...)`: a training configuration with those `train` options changed."""

    def make(data: dict[str, Any] | None = None, model: dict[str, Any] | None = None, **train: Any) -> Config:
        return validate_config(
            {
                "run": str(tmp_path / f"run-{len(list(tmp_path.iterdir()))}"),
                "model": {"path": str(tiny_folder / "model"), "dtype": "float32", **(model or {})},
                "data": {"path": str(tiny_folder / "pairs.jsonl"), **(data or {})},
                "lora": {"r": 4, "alpha": 8},
                "train": {"lr": 0.01, "batch_pairs": 12, "num_epochs": 2, "max_tokens": 400, **train},
            }
        )

    return make
