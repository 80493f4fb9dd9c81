"""What is said where a model's tokenizer does not know the text that it is asked or trained on."""

import json
import logging
from pathlib import Path
from types import SimpleNamespace

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import cpo_fast
from cpo_fast.config import load_config
from cpo_fast.data.load import load_examples
from cpo_fast.evaluate import evaluate
from cpo_fast.search.collect import collect
from cpo_fast.tasks.unknown_text import unknown_piece, unknown_questions
from tests.tiny import tiny_tokenizer

REASONER = Path(cpo_fast.__file__).parent / "demo" / "reasoner"


@pytest.fixture(scope="module")
def reasoner() -> PreTrainedTokenizerFast:
    """A tokenizer of words, whose own model alone says what it falls back to."""
    return AutoTokenizer.from_pretrained(REASONER / "base-0")


def of_words(**special: str) -> PreTrainedTokenizerFast:
    inner = Tokenizer(models.WordLevel({"<s>": 0, "one": 1, "two": 2}, unk_token="<s>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, **special)


def piece(tokenizer: PreTrainedTokenizerFast, text: str) -> str | None:
    return unknown_piece(tokenizer, text, tokenizer(text)["input_ids"])


def test_the_first_piece_that_is_not_known_is_named(reasoner: PreTrainedTokenizerFast) -> None:
    assert reasoner.unk_token is None
    assert piece(reasoner, "Question: 53-7+4-8\n") is None
    assert piece(reasoner, "Question: 53*7+4\n") == "*"
    assert piece(reasoner, "Question: Janet has 53 eggs\n") == "Janet"


def test_a_special_token_that_is_the_unknown_one_too_is_not_taken_for_unknown_text() -> None:
    """As with tokenizers that begin every text with the token that they fall back to."""
    tokenizer = of_words(bos_token="<s>", unk_token="<s>")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    assert tokenizer("one two")["input_ids"] == [0, 1, 2]
    assert piece(tokenizer, "one two") is None
    assert piece(tokenizer, "one <s> two") is None
    assert piece(tokenizer, "one three") == "three"


def test_a_tokenizer_that_knows_every_text_or_tells_no_places_is_not_asked() -> None:
    assert piece(tiny_tokenizer(), "Jänet 東京 \x00") is None
    slow = SimpleNamespace(unk_token="<s>", is_fast=False, convert_tokens_to_ids=lambda _: 0)
    assert unknown_piece(slow, "three", [0]) is None


def test_the_sentence_counts_the_questions_and_names_the_first(reasoner: PreTrainedTokenizerFast) -> None:
    asked = [("a", "53-7"), ("b", "Janet has 53"), ("c", "4+4"), ("d", "x" * 100)]
    said = unknown_questions(reasoner, asked)
    assert said is not None
    assert "does not know all of the text of 2 of 4 questions: it reads '<pad>' there" in said
    assert "the first is 'b' with 'Janet'" in said
    assert unknown_questions(reasoner, asked[::2]) is None
    assert unknown_questions(reasoner, []) is None
    assert unknown_questions(reasoner, [("half a pair", "53-7\ud83d"), ("a", "53-7")]) is None  # it fails by itself
    long = unknown_questions(reasoner, asked[3:])
    assert long is not None
    assert f"'{'x' * 40}...'" in long


def test_search_evaluation_and_training_say_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    questions = tmp_path / "questions.jsonl"
    rows = [{"id": "good", "question": "53-7+4-8", "answer": "42"}, {"id": "eggs", "question": "53 eggs"}]
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    pairs = tmp_path / "pairs.jsonl"
    prompt = "Solve.\n\nQuestion: 53-7+4-8\n"
    texts = [("53-7=46\n", "53-7=45\n"), ("53-7 makes 46\n", "53-7=44\n")]
    pairs.write_text("".join(json.dumps({"prompt": prompt, "chosen": a, "rejected": b}) + "\n" for a, b in texts))
    config = load_config(
        None,
        [
            f"run={tmp_path / 'run'}",
            *(f"model.path={REASONER / 'base-0'}", "model.device=cpu", f"task.file={REASONER / 'plain.yaml'}"),
            *(
                f"task.path={questions}",
                "search.max_steps=2",
                "search.num_candidates=2",
                "search.max_thought_tokens=12",
            ),
            *("eval.max_new_tokens=24", f"data.path={pairs}"),
        ],
    )
    for ask in (collect, evaluate):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            ask(config)
        (said,) = [text for text in caplog.messages if "does not know" in text]
        assert "1 of 2 questions" in said
        assert "'eggs' with 'eggs'" in said
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        load_examples(config, AutoTokenizer.from_pretrained(REASONER / "base-0"))
    (said,) = [text for text in caplog.messages if "does not know" in text]
    assert "1 of 2 rows" in said
    assert f"the first is '{pairs}:2' with 'makes'" in said
