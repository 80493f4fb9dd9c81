"""`cpo-fast collect` from the outside: errors before torch, exit codes, summary."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import CliRunner

from cpo_fast.cli.collect import QuestionLines, collect_command
from cpo_fast.errors import ConfigError, CpoFastError, DataError
from tests.search.tiny_llama import build_model

ROOT = Path(__file__).parents[2]


@pytest.fixture
def workspace(tmp_path, model, tokenizer):
    """A model folder, one question and a configuration over both."""
    model_dir = tmp_path / "model"
    model.save_pretrained(model_dir)
    tokenizer.save_pretrained(model_dir)
    (tmp_path / "questions.jsonl").write_text('{"question": "how many", "answer": 3}\n')
    (tmp_path / "config.yaml").write_text(
        f"run: {tmp_path}/run\n"
        f"model: {{path: {model_dir}, dtype: float32, device: cpu}}\n"
        f"task: {{path: {tmp_path}/questions.jsonl}}\n"
        "search: {num_candidates: 2, num_kept: 1, max_steps: 2, max_thought_tokens: 8}\n"
    )
    return tmp_path


def _invoke(*arguments):
    return CliRunner().invoke(collect_command, [str(argument) for argument in arguments])


def test_json_summary_is_one_object_and_the_trees_are_written(workspace):
    result = _invoke(workspace / "config.yaml", "--json")
    assert result.exit_code == 0, result.output
    summary = json.loads(result.stdout)
    assert summary["num_questions"] == sum(summary["statuses"].values()) == 1
    assert summary["num_samples"] >= summary["num_thoughts"]
    assert "1/1 " in result.stderr
    assert len((workspace / "run" / "trees.jsonl").read_text().splitlines()) == 1
    table = _invoke(workspace / "config.yaml").stdout
    assert "unique thoughts" in table
    assert "1 finished before" in table
    assert "on winning paths)" in table
    assert "trees of other questions" not in table
    (workspace / "more.jsonl").write_text('{"question": "how many more"}\n')
    more = _invoke(workspace / "config.yaml", f"task.path={workspace}/more.jsonl").stdout
    assert "trees of other questions" in more
    assert "1 (in the same file, trained on too)" in more


def test_text_of_a_model_cannot_drive_the_terminal():
    from cpo_fast.cli.collect import _shown

    assert _shown("7\x1b[2J\n\u202e\ud800") == "7\\x1b[2J\\n\\u202e\\ud800"
    assert _shown("caf\u00e9 \u6570\u5b66") == "caf\u00e9 \u6570\u5b66"
    assert _shown("x" * 100_000) == "x" * 80 + "..."


def failed(number, detail, status="failed"):
    return SimpleNamespace(id=f"q{number}", status=status, detail=detail, nodes=(), winning_nodes=(), answer=None)


def test_equal_reasons_of_failures_are_three_lines_and_a_count(capsys):
    with QuestionLines() as lines:
        for number in range(1, 301):
            lines(number, 302, failed(number, "ValueError: too long"), 1.0)
        lines(301, 302, failed(301, "OSError: gone"), 1.0)
        lines(302, 302, failed(302, "", status="ok"), 1.0)
        said = capsys.readouterr().err.splitlines()
        assert [line.split(":")[0] for line in said] == [
            "1/302 q1",
            "2/302 q2",
            "3/302 q3",
            "301/302 q301",
            "302/302 q302",
            "297 more questions failed for the same reason",
        ]
        assert said[0].startswith("1/302 q1: failed (ValueError: too long), 0 thoughts")
        assert said[-1].endswith(": ValueError: too long")
        for number in range(1, 5):  # the next round of the same command, which is stopped
            lines(number, 9, failed(number, "ValueError: too long"), 1.0)
    said = capsys.readouterr().err.splitlines()
    assert [line.split()[0] for line in said] == ["1/9", "2/9", "3/9", "1"]
    assert said[-1] == "1 more question failed for the same reason: ValueError: too long"


def test_every_question_failing_is_an_error(workspace, tokenizer):
    broken = build_model(len(tokenizer))
    broken.lm_head.weight.data[0] = float("nan")
    broken.save_pretrained(workspace / "model")
    result = _invoke(workspace / "config.yaml", "search.engine=hf")
    assert isinstance(result.exception, CpoFastError)
    assert "every question failed" in str(result.exception)
    result = _invoke(workspace / "config.yaml", "search.engine=arena", f"run={workspace}/other")
    assert isinstance(result.exception, ConfigError)
    assert "set search.engine=hf" in str(result.exception)


def test_a_worker_searches_its_own_questions_and_the_last_one_writes_the_file(workspace, monkeypatch):
    (workspace / "questions.jsonl").write_text("".join(f'{{"question": "how many {n}"}}\n' for n in "abcdefgh"))
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    first = _invoke(workspace / "config.yaml")
    assert first.exit_code == 0, first.output
    assert "of other workers" in first.stdout
    assert not (workspace / "run" / "trees.jsonl").exists()
    second = _invoke(workspace / "config.yaml", "--worker", "1/2", "--json")
    assert json.loads(second.stdout)["num_missing"] == 0
    assert len((workspace / "run" / "trees.jsonl").read_text().splitlines()) == 8
    assert "8 finished before)" in _invoke(workspace / "config.yaml").stdout


def test_a_wrong_worker_is_a_configuration_error_before_anything_is_read(workspace, monkeypatch):
    result = _invoke(workspace / "config.yaml", "--worker", "2/2")
    assert isinstance(result.exception, ConfigError)
    assert str(result.exception).startswith("--worker 2/2: expected I/N")
    monkeypatch.setenv("RANK", "two")
    assert "RANK=two" in str(_invoke(workspace / "config.yaml").exception)


def test_wrong_configuration_and_questions_are_named(workspace):
    result = _invoke(workspace / "config.yaml", "search.num_candidate=3")
    assert isinstance(result.exception, ConfigError)
    assert "search.num_candidates" in str(result.exception)
    assert isinstance(_invoke(workspace / "config.yaml", "model.path=").exception, ConfigError)
    (workspace / "questions.jsonl").write_text('{"question": "a"}\n{"question": \n')
    result = _invoke(workspace / "config.yaml")
    assert isinstance(result.exception, DataError)
    assert "questions.jsonl:2" in str(result.exception)


def test_a_wrong_question_file_is_reported_without_importing_torch(workspace):
    (workspace / "questions.jsonl").write_text("{}\n")
    code = (
        "import sys\n"
        "from cpo_fast.cli import cli\n"
        "try:\n"
        f"    cli.main(['collect', {str(workspace / 'config.yaml')!r}], standalone_mode=False)\n"
        "except Exception as error:\n"
        "    assert 'questions.jsonl:1' in str(error), error\n"
        "loaded = {'torch', 'transformers', 'numpy'} & set(sys.modules)\n"
        "assert not loaded, loaded\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
