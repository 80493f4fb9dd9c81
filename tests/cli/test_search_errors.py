"""What a user of `collect` and `eval` sees when the arena engine cannot do it: one sentence, the exit code, a status."""

import json
import logging
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import Gemma2Config, Phi3Config

from cpo_fast import tasks
from cpo_fast.cli import main
from cpo_fast.config import Config
from cpo_fast.search.engine.kv_arena import KVTrie
from cpo_fast.tasks import Prompts, load_task
from tests.tiny import save_tiny_model, tiny_llama, tiny_model, tiny_tokenizer, with_lora

POSITIONS = 6000
SETTINGS: dict[str, Any] = {
    "search": {"num_candidates": 2, "num_kept": 1, "max_steps": 2, "max_thought_tokens": 6, "arena_tokens": 30_000},
    "eval": {"max_new_tokens": 6, "method": "both"},
}
COMMANDS = pytest.mark.parametrize("command", ["collect", "eval"])
Run = Callable[..., tuple[int, str, str]]


def save(folder: Path, config_class: type, **changes: Any) -> Path:
    tokenizer = tiny_tokenizer(folder)
    tiny_model(config_class, vocab_size=len(tokenizer), max_position_embeddings=POSITIONS, **changes).save_pretrained(
        folder
    )
    return folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("llama"), max_position_embeddings=POSITIONS)


@pytest.fixture
def run(tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """run(command, *overrides, questions=[...], debug=False, flags=()) -> exit code, stdout, stderr of the program."""

    def start(
        command: str,
        *overrides: str,
        questions: tuple[str, ...] = ("How many?", "And?"),
        debug: bool = False,
        flags: tuple[str, ...] = (),
    ):
        rows = [{"id": str(number), "question": text, "answer": 1} for number, text in enumerate(questions)]
        (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        settings = {
            "run": str(tmp_path / "run"),
            "model": {"path": str(llama), "dtype": "float32", "device": "cpu"},
            "task": {"path": str(tmp_path / "q.jsonl")},
            **SETTINGS,
        }
        (tmp_path / "c.yaml").write_text(json.dumps(settings))
        flags = ("--debug", *flags) if debug else flags
        monkeypatch.setattr(sys, "argv", ["cpo-fast", *flags, command, str(tmp_path / "c.yaml"), *overrides])
        code = 0
        try:
            main()
        except SystemExit as end:
            code = int(end.code or 0)
        captured = capfd.readouterr()
        assert debug or "Traceback" not in captured.err
        return code, captured.out, captured.err

    return start


def error_line(stderr: str) -> str:
    (line,) = [line for line in stderr.splitlines() if line.startswith("error: ")]
    return line


@COMMANDS
def test_a_path_limit_below_the_prompt_names_the_engine_that_can(run: Run, tmp_path: Path, command: str):
    rope = {"rope_type": "longrope", "rope_theta": 100.0, "factor": 4.0}
    rope |= {"short_factor": [1.0, 1.5, 2.0, 1.0], "long_factor": [2.0, 4.0, 9.0, 3.0]}
    lengths = {"sliding_window": None, "original_max_position_embeddings": 64}
    folder = save(tmp_path / "phi", Phi3Config, rope_parameters=rope, **lengths)
    code, _, stderr = run(command, f"model.path={folder}")
    assert code == 2
    assert error_line(stderr).startswith("error: search.engine: arena: every prompt of the task has more than ")
    limit = "RoPE of type longrope, the same up to 64"
    assert error_line(stderr).endswith(f"the model has {limit}; set search.engine=hf")
    assert run(command, f"model.path={folder}", "search.engine=hf")[0] == 0


@COMMANDS
def test_soft_capped_attention_is_searched_by_both_engines(run: Run, tmp_path: Path, command: str):
    folder = save(tmp_path / "gemma", Gemma2Config, attention="eager", head_dim=8)
    for engine in ("arena", "hf"):
        assert run(command, f"model.path={folder}", f"search.engine={engine}", f"run={tmp_path}/{engine}")[0] == 0


@COMMANDS
def test_an_adapter_on_the_head_is_refused_before_a_model_is_loaded(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
):
    adapter = tmp_path / "adapter"
    with_lora(tiny_llama(vocab_size=len(tiny_tokenizer())), targets=("lm_head",)).save_pretrained(adapter)

    def loads(*_: Any, **__: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", loads)
    code, _, stderr = run(command, f"model.adapter={adapter}")
    assert code == 2
    assert "changes the output head (target_modules has lm_head)" in error_line(stderr)


@COMMANDS
@pytest.mark.parametrize("room", [-1, 20], ids=["no shared prompt", "no question"])
def test_an_arena_that_is_too_small_names_the_option(run: Run, command: str, room: int):
    # the tokens that stay: what all prompts share, each of its nodes once
    trie = KVTrie()
    for prefix in Prompts(load_task(Config()), tiny_tokenizer()).prefixes:
        trie.insert([prefix])
    num_shared = sum(map(len, trie.nodes))
    code, _, stderr = run(command, f"search.arena_tokens={num_shared + room}")
    # eval records a question that does not fit, as any other that cannot be asked, and goes on
    assert code == (1 if command == "eval" and room > 0 else 6)
    what = "the shared prompts" if room < 0 else "one prompt and its longest continuation"
    assert f"the KV arena of {num_shared + room} tokens cannot hold {what}; raise search.arena_tokens" in error_line(
        stderr
    )


@COMMANDS
def test_a_question_longer_than_the_context_is_recorded_and_the_next_is_asked(
    run: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture, command: str
):
    questions = ("very " * 1500 + "long?", "How many?")
    code, _, stderr = run(command, questions=questions)
    assert code == 0
    reason = r"ValueError: prompt of \d+ tokens and up to 6 new ones exceed the model's 6000 positions"
    name = "trees" if command == "collect" else "eval-base-tot"
    first, second = map(json.loads, (tmp_path / "run" / f"{name}.jsonl").read_text().splitlines())
    assert re.fullmatch(reason, first["detail"])
    assert (first.get("stop", first.get("status")), second["detail"]) == ("failed", "")
    # collect tells it in its line of progress, eval in a warning for each of its two methods
    assert len(re.findall(reason, stderr)) == (command == "collect")
    assert len(re.findall(reason, caplog.text)) == (2 if command == "eval" else 0)
    assert not any(record.exc_info for record in caplog.records)
    try:
        run(command, f"run={tmp_path}/again", questions=questions, debug=True)
    finally:
        logging.getLogger("cpo_fast").setLevel(logging.NOTSET)
    assert any(record.exc_info for record in caplog.records)


@COMMANDS
def test_a_context_shorter_than_every_prompt_fails_with_the_first_reason(run: Run, tmp_path: Path, command: str):
    folder = save_tiny_model(tmp_path / "short", max_position_embeddings=500)
    code, _, stderr = run(command, f"model.path={folder}")
    assert code == 1
    assert error_line(stderr).startswith("error: every question failed; the first")
    assert "exceed the model's 500 positions" in error_line(stderr)


def test_lora_dropout_changes_no_tree(run: Run, tmp_path: Path, llama: Path):
    found = []
    for dropout in (0.0, 0.5):
        adapter = tmp_path / f"adapter-{dropout}"
        with_lora(tiny_llama(vocab_size=len(tiny_tokenizer())), dropout=dropout).save_pretrained(adapter)
        code, _, stderr = run("collect", f"model.adapter={adapter}", f"run={tmp_path}/{dropout}")
        assert code == 0, stderr
        lines = (tmp_path / f"{dropout}" / "trees.jsonl").read_text().splitlines()
        found.append([json.loads(line)["nodes"] for line in lines])
    assert found[0] == found[1]
    assert any(found[0])


TASK_CODE = """
from pathlib import Path
from cpo_fast.tasks import Task
Path({marker!r}).write_text("ran")
class MyTask(Task):
    pass
"""


@COMMANDS
def test_the_code_of_a_task_runs_when_the_flag_says_so(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
):
    monkeypatch.setattr(tasks, "_code_allowed", False)
    module, marker = tmp_path / "my_task.py", tmp_path / "ran"
    module.write_text(TASK_CODE.format(marker=str(marker)))
    code, _, stderr = run(command, f"task.module={module}:MyTask")
    assert code == 2
    assert "my_task.py is Python code, which is not run" in error_line(stderr)
    assert error_line(stderr).endswith("cpo-fast --trust-task-code")
    assert not marker.exists()
    code, _, stderr = run(command, f"task.module={module}:MyTask", flags=("--trust-task-code",))
    assert code == 0, stderr
    assert "warning: the code of task.module will run with your rights" in stderr
    assert marker.exists()
    code, _, stderr = run(command, f"task.module={module}:Other", flags=("--trust-task-code",))
    assert code == 2
    assert "my_task.py has no class Other that derives from cpo_fast.tasks.Task" in error_line(stderr)
