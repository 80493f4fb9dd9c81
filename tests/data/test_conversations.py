"""Conversations, implicit prompts and text are tokenised as TRL tokenises them: its own functions are the oracle."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import trl
from datasets import Dataset
from trl import DPOTrainer, extract_prompt
from trl.data_utils import _tokenize, common_prefix_length

from cpo_fast.config import validate_config
from cpo_fast.data.examples import with_extracted_prompt
from cpo_fast.data.load import LoadedExamples, load_examples
from cpo_fast.errors import DataError
from cpo_fast.files import write_jsonl
from tests.tiny import tiny_tokenizer

CHATML = """{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
# the cue for an answer holds what a finished answer does not: the prompt ends where the two part
THINKING = CHATML.replace("'<|im_start|>assistant\n'", "'<|im_start|>assistant\n<think>\n\n</think>'")
TEMPLATES = Path(trl.__file__).parent / "chat_templates"


def template(name: str) -> str:
    known = {"chatml": CHATML, "thinking": THINKING}
    return known.get(name) or (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")


def say(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


SYSTEM, ASK = say("system", "Be brief."), say("user", "What is 2 + 2? é数")
EXPLICIT = [
    {"prompt": [ASK], "chosen": [say("assistant", "4")], "rejected": [say("assistant", "5")]},
    {
        "prompt": [SYSTEM, ASK, say("assistant", "4"), say("user", "Sure?")],
        "chosen": [say("assistant", "Yes, 4.")],
        "rejected": [say("assistant", "Yes"), say("user", "Then?"), say("assistant", "No")],
    },
]
IMPLICIT = [
    {"chosen": [*row["prompt"], *row["chosen"]], "rejected": [*row["prompt"], *row["rejected"]]} for row in EXPLICIT
]
TEXT_IMPLICIT = [
    {"chosen": "\n\nHuman: sum?\n\nAssistant: It is 4.", "rejected": "\n\nHuman: sum?\n\nAssistant: It was 5."},
    {"chosen": "Q: one two three", "rejected": "Q: one four"},
    {"chosen": "Q: abc", "rejected": "Q: abcd"},
]


def ours(rows: list[dict[str, Any]], path: Path, tokenizer: Any, **options: Any) -> LoadedExamples:
    write_jsonl(path, rows)
    return load_examples(validate_config({"data": {"path": str(path), "eos": "every"} | options}), tokenizer)


def theirs(rows: list[dict[str, Any]], tokenizer: Any) -> list[dict[str, Any]]:
    arguments = SimpleNamespace(dataset_num_proc=None, max_length=None, truncation_mode="keep_start")
    holder: Any = SimpleNamespace(_tokenizer=tokenizer)
    return list(DPOTrainer._prepare_dataset(holder, Dataset.from_list(rows), tokenizer, arguments, "train"))


def assert_equal(rows: list[dict[str, Any]], path: Path, tokenizer: Any) -> LoadedExamples:
    loaded = ours(rows, path, tokenizer)
    found = [tuple(map(list, (p.prompt_ids, *p.responses))) for p in loaded.examples]
    oracle = [(row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]) for row in theirs(rows, tokenizer)]
    assert found == oracle
    assert len(found) == len(rows)
    return loaded


@pytest.mark.parametrize("name", ["chatml", "thinking", "qwen2_5", "qwen3", "llama3"])
@pytest.mark.parametrize("rows", [EXPLICIT, IMPLICIT], ids=["explicit", "implicit"])
def test_conversations_have_the_ids_of_trl(rows: list[dict[str, Any]], name: str, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template(name)
    loaded = assert_equal(rows, tmp_path / "rows.jsonl", tokenizer)
    if name in ("chatml", "thinking"):
        assert loaded.num_merged_boundaries == (len(rows) if name == "thinking" else 0)


def test_a_conversation_ends_as_its_template_ends_it(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHATML
    for eos in ("final", "every", "never"):
        pair = ours(EXPLICIT, tmp_path / "rows.jsonl", tokenizer, eos=eos).examples[0]
        assert tokenizer.decode(pair.responses[0]) == "4<|im_end|>\n"
        assert tokenizer.decode(pair.prompt_ids).endswith("<|im_start|>assistant\n")


def test_text_rows_have_the_ids_of_trl(tmp_path: Path) -> None:
    rows = [
        {"prompt": "1 + 1 = ", "chosen": "2", "rejected": "é数3"},
        {"prompt": "a", "chosen": " b<eos>", "rejected": " c"},
    ]
    assert_equal(rows, tmp_path / "rows.jsonl", tiny_tokenizer())


def test_text_with_implicit_prompts_has_the_ids_of_trl(tmp_path: Path) -> None:
    loaded = assert_equal(TEXT_IMPLICIT, tmp_path / "rows.jsonl", tiny_tokenizer())
    assert tiny_tokenizer().decode(loaded.examples[0].prompt_ids) == "\n\nHuman: sum?\n\nAssistant: It"


def test_extracted_prompts_are_those_of_trl() -> None:
    """Every couple of short texts over two letters and a space that begins alike (TRL loses a piece of the others)."""
    alphabet = ["a", "b", " "]
    words = ["", *alphabet]
    for _ in range(3):
        words = sorted({word + letter for word in words for letter in ["", *alphabet]})
    for first in words:
        for second in words:
            row = {"chosen": "." + first, "rejected": "." + second}
            ours, oracle = with_extracted_prompt(row), extract_prompt(row)
            assert {key: ours[key] for key in oracle} == oracle


def test_sft_conversations_and_text_have_the_ids_of_trl(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHATML
    rows: list[dict[str, Any]] = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in EXPLICIT]
    rows.append({"prompt": "1 + 1 = ", "completion": "2"})
    write_jsonl(tmp_path / "rows.jsonl", rows)
    config = validate_config({"data": {"path": str(tmp_path / "rows.jsonl")}, "train": {"method": "sft"}})
    examples = load_examples(config, tokenizer).examples
    for row, example in zip(rows, examples, strict=True):
        cue = {"add_generation_prompt": True} if isinstance(row["prompt"], list) else {}
        ended = row["completion"] if cue else row["completion"] + "<eos>"
        prompt = _tokenize(tokenizer, row["prompt"], **cue)["input_ids"]
        whole = _tokenize(tokenizer, row["prompt"] + ended)["input_ids"]
        start = common_prefix_length(prompt, whole)
        assert (list(example.prompt_ids), list(*example.responses)) == (whole[:start], whole[start:])


def test_tools_and_template_options_reach_the_template(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ tools | length if tools else 0 }}{{ mood }}|" + CHATML
    row = {**EXPLICIT[0], "tools": '[{"name": "f"}, {"name": "g"}]', "chat_template_kwargs": {"mood": "calm"}}
    (pair,) = ours([row], tmp_path / "rows.jsonl", tokenizer).examples
    assert tokenizer.decode(pair.prompt_ids).startswith("2calm|")


def test_questions_of_conversations_are_their_prompts(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHATML
    again = {**EXPLICIT[0], "rejected": [say("assistant", "6")]}
    pairs = ours([*EXPLICIT, again], tmp_path / "rows.jsonl", tokenizer).examples
    assert pairs[0].group == pairs[2].group != pairs[1].group


def test_bad_conversations_are_counted_by_reason(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% if messages[0].role == 'tool' %}{{ raise_exception('no') }}{% endif %}" + CHATML
    good = EXPLICIT[0]
    rows = [
        good,
        {**good, "prompt": []},
        {**good, "chosen": []},
        {**good, "chosen": [say("assistant", " \n")]},
        {**good, "chosen": 4},
        {**good, "chosen": [{"content": "4"}]},
        {**good, "chosen": [{"role": "assistant"}]},
        {**good, "prompt": ["hello"]},
        {**good, "rejected": good["chosen"]},
        {**good, "prompt": [say("tool", "x")]},
        {**good, "prompt": [say("user", "\ud800")]},
        {"prompt": "a", "chosen": [say("assistant", "4")], "rejected": 5},
    ]
    loaded = ours(rows, tmp_path / "rows.jsonl", tokenizer, max_drop=1.0)
    assert len(loaded.examples) == 1
    assert loaded.dropped_by_reason == {
        "empty prompt": 1,
        "empty response": 2,
        "'chosen' is not a conversation": 3,
        "'prompt' is not a conversation": 1,
        "chosen equals rejected": 1,
        "the chat template refuses the conversation": 1,
        "a text holds a lone surrogate": 1,
        "'rejected' is not a conversation": 1,
    }


def test_conversations_without_a_chat_template_are_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="the tokenizer has no chat template; use an instruct model"):
        ours(EXPLICIT, tmp_path / "rows.jsonl", tiny_tokenizer())
