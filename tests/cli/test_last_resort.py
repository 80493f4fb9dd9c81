"""Whatever ends a command is one sentence and its exit code, and nothing half-written is left."""

import errno
import json
import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path

import click
import jinja2
import pytest
import yaml
from click.testing import CliRunner
from safetensors import SafetensorError

from cpo_fast import cli
from cpo_fast.errors import FAILURES, FAULT, DataError, Interrupted, outcome
from cpo_fast.interrupts import stopped_by_signals
from cpo_fast.progress import doing, stage
from cpo_fast.report.page import _rendered
from tests.cli.commands import run

FULL = OSError(errno.ENOSPC, "No space left on device", "/data/run/x")


class OutOfMemoryError(RuntimeError):
    """Torch's is called so."""


def json_error() -> Exception:
    with pytest.raises(json.JSONDecodeError) as caught:
        json.loads("{")
    return caught.value


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (DataError("rows.jsonl:2: no object; mend it"), 3, "error: rows.jsonl:2: no object; mend it"),
        (Interrupted("SIGINT after step 3", 130), 130, "SIGINT after step 3"),
        (KeyboardInterrupt(), 130, "interrupted at train, step 3"),
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), 141, ""),
        (FULL, 5, "/data/run/x: cannot be written (No space left on device); free some space"),
        (PermissionError(errno.EACCES, "Permission denied", "a"), 5, "a: cannot be used (Permission denied)"),
        (OSError(errno.EROFS, "Read-only file system", b"a"), 5, "a: cannot be used (Read-only file system)"),
        (
            IsADirectoryError(errno.EISDIR, "Is a directory", "a"),
            2,
            "a: cannot be used (Is a directory); check the path",
        ),
        (NotADirectoryError(errno.ENOTDIR, "Not a directory", "a"), 2, "check the path"),
        (FileNotFoundError(errno.ENOENT, "No such file", Path("a")), 2, "check the path"),
        (OSError(errno.ENAMETOOLONG, "File name too long", "a"), 2, "check the path"),
        (OSError("Unable to load weights"), 5, "the system refused (Unable to load weights)"),
        (MemoryError(), 6, "memory ran out (MemoryError)"),
        (OutOfMemoryError("CUDA out of memory. Tried"), 6, "lower train.max_tokens"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate"), 6, "memory ran out"),
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"), 3, "text is not UTF-8"),
        (UnicodeEncodeError("ascii", "é", 0, 1, "ordinal not in range"), 5, "set PYTHONUTF8=1"),
        (json_error(), 3, "a file is not valid JSON (Expecting property name"),
        (RecursionError("maximum recursion depth exceeded"), 3, "nested too deeply"),
        (SafetensorError("Error while deserializing header"), 4, "a file of tensors is damaged (Error while deser"),
        (jinja2.UndefinedError("'x' is undefined"), 2, "chat template failed ('x' is undefined)"),
        (yaml.YAMLError("bad"), 2, "not valid YAML"),
        (ImportError("libcudart.so.12: cannot open"), 5, "cpo-fast doctor"),
        (KeyError("x"), 1, "KeyError: 'x'; this is likely a fault of cpo-fast: `cpo-fast --debug`"),
        (EOFError("Ran out of input"), 1, "EOFError: Ran out of input; this is likely a fault of cpo-fast"),
        (AssertionError(), 1, "AssertionError: AssertionError; this is likely a fault"),
        (ValueError("two\nlines"), 1, "ValueError: two; this is likely"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
def test_every_exception_of_a_command_is_one_sentence(
    error: BaseException, code: int, said: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        with stage("train"):
            doing("step 3")
            raise error

    monkeypatch.setattr(sys, "argv", ["cpo-fast", "collect"])
    monkeypatch.setattr(cli, "COMMANDS", {"collect": "fails"})
    monkeypatch.setattr(cli.LazyGroup, "get_command", lambda *_: click.Command("collect", callback=fail))
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == code
    out, err = capfd.readouterr()
    assert out == ""
    assert said in err
    assert err.count("\n") == bool(said)  # one line
    if code not in (130, 141) and not isinstance(error, DataError):
        assert err.startswith("error: cpo-fast collect, train, step 3: ")


def test_a_template_of_the_report_is_not_the_tokenizers() -> None:
    with pytest.raises(jinja2.UndefinedError) as caught:
        _rendered({}, None)
    code, sentence = outcome(caught.value, "report")
    assert (code, sentence.endswith(FAULT)) == (1, True)
    assert sentence.startswith("error: cpo-fast report: UndefinedError: 'runs' is undefined; ")


def test_an_interrupt_says_what_is_kept() -> None:
    def search() -> None:
        with stopped_by_signals("nothing yet") as kept, stage("search"):
            kept.say = lambda: "3 of 8 questions are kept"
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as caught:
        search()
    assert outcome(caught.value, "collect") == (130, "interrupted at search; 3 of 8 questions are kept")


@pytest.mark.parametrize(
    ("command", "place", "said"),
    [
        (["eval", "CONFIG"], "cpo_fast.evaluate.evaluate_methods", "evaluations that were finished are kept"),
        (["demo"], "cpo_fast.cli.demo._demonstrate", "the same command keeps the trees that it has"),
        (["iterate", "CONFIG"], "cpo_fast.iterate.iterate", "the same command goes on from there"),
    ],
)
def test_a_signal_ends_long_work_with_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: list[str], place: str, said: str
) -> None:
    """Whatever is at work then, and as soon as Python sees it."""
    monkeypatch.chdir(tmp_path)
    Path("config.yaml").write_text("run: runs/x\nmodel: {path: nowhere}\n")
    before = signal.getsignal(signal.SIGTERM)

    def works(*arguments: object, **options: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("it goes on")

    monkeypatch.setattr(place, works)
    words = ["config.yaml" if word == "CONFIG" else word for word in command]
    result = CliRunner().invoke(cli.cli, words)
    assert isinstance(result.exception, Interrupted), result.exception
    assert result.exception.exit_code == 143
    assert str(result.exception).startswith(f"SIGTERM: {said}")
    assert signal.getsignal(signal.SIGTERM) is before


def test_debug_adds_the_traceback_and_keeps_the_code(tmp_path: Path) -> None:
    result = run("--debug", "pairs", str(tmp_path / "none.jsonl"))
    assert result.returncode == 3
    assert "Traceback (most recent call last)" in result.stderr
    assert result.stderr.splitlines()[-1].startswith("error: ")


def test_a_rank_says_which_it_is_and_leaves_a_note(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", FAILURES: str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    assert cli.guarded(lambda: {}["x"]) == 1
    assert capfd.readouterr().err.startswith("rank 1: error: cpo-fast")
    note = json.loads((tmp_path / "1.json").read_text())
    assert note["exit_code"] == 1
    assert "KeyError: 'x'; this is likely a fault" in note["text"]


def test_an_agent_that_is_told_nonsense_says_so() -> None:
    for told in ("", "{", '{"folder": "/nowhere", "commands": [], "grace": 1}'):
        result = subprocess.run(
            [sys.executable, "-m", "cpo_fast.cli.agent"], input=told, capture_output=True, text=True, timeout=600
        )
        assert result.returncode in (1, 2, 3)
        assert result.stderr.count("\n") == 1, result.stderr
        assert result.stderr.startswith("error: cpo-fast")


@pytest.mark.parametrize("arguments", [["--help"], ["collect", "--help"], ["doctor", "--json"]])
def test_a_reader_that_goes_ends_a_command_without_a_word(arguments: list[str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    process = subprocess.Popen(
        [sys.executable, "-m", "cpo_fast", *arguments], stdout=writer, stderr=subprocess.PIPE, text=True
    )
    os.close(writer)
    _, errors = process.communicate(timeout=600)
    assert (process.returncode, errors) == (141, "")


PROGRAM = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a test session in the background ignores it
import cpo_fast.config.load as load
def wait(*_):
    print("waits", flush=True)
    time.sleep(1000)
load._read_yaml = wait
from cpo_fast.cli import main
main()
"""


def test_an_interrupt_is_130_and_no_traceback() -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, "collect", "c.yaml"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "waits\n"
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=600)
    assert (process.returncode, errors) == (130, "interrupted\n")


def test_a_note_of_the_place_survives_the_way_between_ranks() -> None:
    with pytest.raises(Interrupted) as caught, stage("train"):
        raise Interrupted("x", 130)
    assert outcome(pickle.loads(pickle.dumps(caught.value))) == (130, "x")


@pytest.mark.parametrize(
    "overrides", [["run=taken"], ["run=taken/below"], ["train.lr=inf"], ["seed=" + "9" * 40], ["data.path=#1.jsonl"]]
)
def test_rows_of_inputs_from_the_wild_end_in_one_sentence(tmp_path: Path, overrides: list[str]) -> None:
    (tmp_path / "taken").touch()
    (tmp_path / "c.yaml").write_text("run: runs/x\n")
    result = subprocess.run(
        [sys.executable, "-m", "cpo_fast", "train", "c.yaml", "model.path=nowhere", *overrides],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == (3 if overrides[0].startswith("data.") else 2), result.stderr
    assert result.stderr.count("\n") == 1, result.stderr
    assert result.stderr.startswith("error: ")
    if overrides[0].startswith("data."):
        assert "#1.jsonl: cannot read" in result.stderr
