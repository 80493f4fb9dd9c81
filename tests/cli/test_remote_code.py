"""Code that comes with a model runs when the flag says so, and not otherwise."""

import json
from pathlib import Path

import pytest

from tests.cli.test_errors import run
from tests.tiny import save_tiny_model

CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM
Path({marker!r}).write_text("ran")
class OddConfig(LlamaConfig):
    model_type = "odd_llama"
class OddModel(LlamaForCausalLM):
    config_class = OddConfig
"""


@pytest.fixture
def odd_model(tmp_path: Path) -> Path:
    """A model folder whose architecture is Python code in the folder; running it leaves a file `ran`."""
    folder = save_tiny_model(tmp_path / "model")
    (folder / "odd.py").write_text(CODE.format(marker=str(tmp_path / "ran")))
    config = json.loads((folder / "config.json").read_text())
    config["model_type"] = "odd_llama"
    config["auto_map"] = {"AutoConfig": "odd.OddConfig", "AutoModelForCausalLM": "odd.OddModel"}
    (folder / "config.json").write_text(json.dumps(config))
    rows = [{"prompt": f"Q{i}\n", "chosen": "yes\n", "rejected": "no\n"} for i in range(2)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "c.yaml").write_text(
        f"run: {tmp_path}/run\nmodel: {{path: {folder}, dtype: float32}}\ndata: {{path: {tmp_path}/rows.jsonl}}\n"
        "train: {num_epochs: 1}\n"
    )
    return tmp_path


def test_model_with_code_of_its_own_is_refused_and_not_run(odd_model: Path) -> None:
    result = run("train", str(odd_model / "c.yaml"))
    assert result.returncode == 2, result.stderr
    assert "--trust-remote-code" in result.stderr
    assert not (odd_model / "ran").exists()


def test_flag_runs_it_with_a_warning(odd_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_MODULES_CACHE", str(odd_model / "modules"))
    result = run("--trust-remote-code", "train", str(odd_model / "c.yaml"), "--json")
    assert result.returncode == 0, result.stderr
    assert "warning: code in the model's folder will run" in result.stderr
    assert (odd_model / "ran").exists()
