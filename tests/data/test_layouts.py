"""The layouts of other libraries are trained as their text says: ids are decoded and compared with what was written."""

import json
import logging
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cpo_fast.config import validate_config
from cpo_fast.data.load import LoadedExamples, load_examples
from cpo_fast.errors import DataError
from cpo_fast.files import write_jsonl
from cpo_fast.tasks import Prompts, get_task
from cpo_fast.tasks.task import Question
from tests.tiny import tiny_tokenizer

TEMPLATE = """{% for m in messages %}{{ '[' + m.role + ']' + m.content + '[/]' }}{% endfor %}\
{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"""
Q, YES, NO = "Name a sea near Riga.", "It is the Baltic.", "It is the Red Sea."
GOOD_ROW = {"prompt": "p", "chosen": "c", "rejected": "r"}


def say(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


def said(sender: str, value: Any) -> dict[str, Any]:
    return {"from": sender, "value": value}


def tokenizer_with(template: str | None, add_bos: bool = False) -> Any:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    if add_bos:
        from tokenizers.processors import TemplateProcessing

        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", 1)]
        )
    return tokenizer


def load(rows: list[Any], path: Path, template: str | None = TEMPLATE, method: str = "preference", **data: Any) -> Any:
    write_jsonl(path / "rows.jsonl", rows)
    return load_file(path / "rows.jsonl", tokenizer_with(template), method, **data)


def load_file(path: Path, tokenizer: Any, method: str = "preference", **data: Any) -> LoadedExamples:
    config = {"data": {"path": str(path), "max_drop": 1.0, "eos": "never"} | data, "train": {"method": method}}
    return load_examples(validate_config(config), tokenizer)


def texts(loaded: LoadedExamples) -> list[tuple[str, ...]]:
    """The trained text of every example, read off its ids alone."""
    decode = tiny_tokenizer().decode
    return [(decode(one.prompt_ids), *map(decode, one.responses)) for one in loaded.examples]


def reason(rows: list[Any], path: Path, **data: Any) -> str:
    """Why the first row is refused; a good one follows, so that something is left."""
    loaded = load([*rows, GOOD_ROW], path, **data)
    assert len(loaded.examples) == 1
    return f"{loaded.dropped[0]['reason']} ({loaded.dropped[0]['detail']})"


ANSWERS = {"chosen": YES, "rejected": NO}
DIALOGUES = {
    "chosen": [say("user", Q), say("assistant", YES)],
    "rejected": [say("user", Q), say("assistant", NO)],
}
REPLIES = {"chosen": [say("assistant", YES)], "rejected": [say("assistant", NO)]}
ASKED = f"[user]{Q}[/][assistant]"
BRIEF = f"[system]Be brief.[/]{ASKED}"
TALK = f"[user]Hi[/][assistant]Hello[/]{ASKED}"
TURNS: list[tuple[str, dict[str, Any], str]] = [
    ("alpaca", {"instruction": Q, "input": "", **ANSWERS}, ASKED),
    ("alpaca with input", {"instruction": "Answer.", "input": Q, **ANSWERS}, f"[user]Answer.\n{Q}[/][assistant]"),
    ("alpaca history", {"instruction": Q, "history": [["Hi", "Hello"]], "system": None, **ANSWERS}, TALK),
    ("alpaca system", {"instruction": Q, "system": "Be brief.", **ANSWERS}, BRIEF),
    ("orca", {"system": "Be brief.", "question": Q, **ANSWERS}, BRIEF),
    ("orca without system", {"system": "", "question": Q, **ANSWERS}, ASKED),
    ("axolotl icr", {"system": "Be brief.", "input": Q, **ANSWERS}, BRIEF),
    ("axolotl prompt_pairs", {"system": "Be brief.", "prompt": Q, **ANSWERS}, BRIEF),
    ("query", {"query": Q, **ANSWERS}, ASKED),
    ("argilla", {"instruction": Q, "chosen_response": YES, "rejected_response": NO}, ASKED),
    ("axolotl chat_template", {"messages": [say("user", Q)], **ANSWERS}, ASKED),
    (
        "sharegpt ranking",
        {"conversations": [said("human", Q)], "chosen": said("gpt", YES), "rejected": said("gpt", NO)},
        ASKED,
    ),
    (
        "sharegpt with system",
        {"conversations": [said("system", "Be brief."), said("human", Q)], "system": "Be brief.", **ANSWERS},
        BRIEF,
    ),
    ("trl", {"prompt": [say("user", Q)], **REPLIES}, ASKED),
    ("trl implicit", DIALOGUES, ASKED),
    ("single messages", {"prompt": say("user", Q), "chosen": say("assistant", YES), "rejected": NO}, ASKED),
    ("ultrafeedback", {"prompt": Q, "prompt_id": "77", **DIALOGUES, "messages": DIALOGUES["chosen"]}, ASKED),
    ("ultrafeedback with system", {"prompt": Q, "system": "Be brief.", **DIALOGUES}, BRIEF),
    ("text prompt, replies", {"prompt": Q, **REPLIES}, ASKED),
    ("repeated turns", {"prompt": [say("user", Q)], **DIALOGUES}, ASKED),
    ("repeated last turn", {"prompt": [say("system", "Be brief."), say("user", Q)], **DIALOGUES}, BRIEF),
    ("one repeats", {"prompt": [say("user", Q)], **DIALOGUES, "rejected": REPLIES["rejected"]}, ASKED),
    ("parts", {"prompt": [say("user", [{"type": "text", "text": Q}])], **REPLIES}, ASKED),
    (
        "parts in pieces",
        {"prompt": [say("user", [{"type": "text", "text": Q[:5]}, {"type": "text", "text": Q[5:]}])], **REPLIES},
        ASKED,
    ),
    (
        "parts of a response",
        {
            "prompt": [say("user", Q)],
            "chosen": [say("assistant", {"type": "text", "text": YES, "image_url": None})],
            "rejected": [say("assistant", [NO])],
        },
        ASKED,
    ),
    ("parts as prompt", {"prompt": [{"type": "text", "text": Q}], "system": "Be brief.", **ANSWERS}, BRIEF),
    ("blank prompt beside dialogues", {"prompt": None, **DIALOGUES}, ASKED),
    ("no turns beside dialogues", {"prompt": [], "system": "Be brief.", **DIALOGUES}, BRIEF),
    ("messages with the answer", {"messages": DIALOGUES["chosen"], **ANSWERS}, ASKED),
    ("prompt with the answer", {"prompt": DIALOGUES["rejected"], **REPLIES}, ASKED),
    (
        "sharegpt with the answer",
        {
            "conversations": [said("human", Q), said("gpt", YES)],
            "chosen": said("gpt", YES),
            "rejected": said("gpt", NO),
        },
        ASKED,
    ),
    ("sharegpt's speakers as roles", {"prompt": [say("Human", Q)], **REPLIES, "chosen": [say("gpt", YES)]}, ASKED),
    ("role and value", {"conversations": [{"role": "user", "value": Q}], **ANSWERS}, ASKED),
    (
        "speakers with capitals",
        {"conversations": [said("Human", Q)], "chosen": said("GPT", YES), "rejected": NO},
        ASKED,
    ),
    ("openrlhf context", {"context_messages": [say("user", Q)], **ANSWERS}, ASKED),
    ("dolly context", {"instruction": "Answer.", "context": Q, **ANSWERS}, f"[user]Answer.\n{Q}[/][assistant]"),
    ("repeated text", {"instruction": Q, "chosen": f"{Q}\n{YES}", "rejected": f" {Q} {NO}"}, ASKED),
    ("message keys of axolotl", {"messages": [{**say("user", Q), "weight": 0}], **ANSWERS, "tools": None}, ASKED),
]


@pytest.mark.parametrize(("row", "prompt"), [case[1:] for case in TURNS], ids=[case[0] for case in TURNS])
def test_turns_of_every_layout_are_trained_once(row: dict[str, Any], prompt: str, tmp_path: Path) -> None:
    assert texts(load([row], tmp_path)) == [(prompt, f"{YES}[/]", f"{NO}[/]")]


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"instruction": Q, **ANSWERS}, Q),
        ({"question": Q, "system": "Be brief.", **ANSWERS}, f"Be brief.\n{Q}"),
        ({"instruction": "Answer.", "input": Q, "history": [["Hi", "Hello"]], **ANSWERS}, f"Hi\nHello\nAnswer.\n{Q}"),
        ({"prompt": Q, "system": "Be brief.", **ANSWERS}, f"Be brief.\n{Q}"),
        ({"prompt": Q, "chosen": Q + YES, "rejected": Q + NO}, Q),  # repeated text is taken once
        ({"prompt": "2", "chosen": "2" + YES, "rejected": "2" + NO}, "2"),  # by chance
        ({"prompt": Q + "\n", "chosen": f"{Q} {YES}", "rejected": f"\n{Q}\n{NO}"}, Q + "\n"),
        (
            {"question": Q, "context": "Riga.", "chosen": f"{Q}\nRiga.{YES}", "rejected": f"{Q}\nRiga.{NO}"},
            f"{Q}\nRiga.",
        ),
    ],
)
def test_without_a_template_columns_of_text_are_one_text(row: dict[str, Any], prompt: str, tmp_path: Path) -> None:
    extra = prompt if prompt == "2" else ""
    assert texts(load([row], tmp_path, None)) == [(prompt, extra + YES, extra + NO)]


def test_columns_are_named_by_the_configuration(tmp_path: Path) -> None:
    row = {"ask": Q, "good": YES, "bad": NO, "question": "not this"}
    names = {"chosen": "good", "rejected": "bad"}
    as_turn = load([row], tmp_path, columns={"instruction": "ask", **names})
    as_text = load([row], tmp_path, columns={"prompt": "ask", **names})
    assert texts(as_turn) == [(ASKED, f"{YES}[/]", f"{NO}[/]")]
    assert texts(as_text) == [(Q, YES, NO)]
    with pytest.raises(
        DataError, match=r"no row has the column 'aks' that data\.columns\.prompt names; there are 'ask'"
    ):
        load([row], tmp_path, columns={"prompt": "aks", **names})
    write_jsonl(tmp_path / "a.jsonl", [row])
    write_jsonl(tmp_path / "b.jsonl", [GOOD_ROW])
    items = [
        {"path": str(tmp_path / "a.jsonl"), "columns": {"prompt": "ask", **names}},
        {"path": str(tmp_path / "b.jsonl")},
    ]
    config = validate_config({"data": {"mixture": items, "eos": "never"}})
    assert texts(load_examples(config, tiny_tokenizer())) == [(Q, YES, NO), ("p", "c", "r")]


def test_a_text_that_is_not_used_is_named_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"ask": f"{n} {Q}", "chosen": f"{n} {YES}", "rejected": f"{n} {NO}", "id": "7"} for n in range(3)]
    with caplog.at_level(logging.WARNING):
        assert len(load(rows, tmp_path, None).examples) == 3
    (message,) = [record.getMessage() for record in caplog.records if "not trained on" in record.getMessage()]
    assert "'ask' (3 rows)" in message
    assert "data.columns.instruction=ask" in message
    assert "'id'" not in message


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"prompt": "Say.", "question": Q, **ANSWERS}, "'question' would not be used (beside"),
    ({"prompt": "Say.", "input": Q, **ANSWERS}, "'input' would not be used (beside"),
    ({"instruction": "Say.", "query": Q, **ANSWERS}, "'query' would not be used (beside"),
    ({"system": "Be brief.", **ANSWERS}, "'system' would not be used"),
    ({"history": Q, **ANSWERS}, "'history' would not be used"),
    ({"instruction": 5, **ANSWERS}, "'instruction' is not text (int)"),
    ({"instruction": Q, "history": [["Hi"]], **ANSWERS}, "'history' is not a list of [question, answer]"),
    ({"prompt": Q, "images": ["a.png"], **ANSWERS}, "'images' is not empty, and only text is trained"),
    ({"prompt": [say("user", [{"type": "image_url", "image_url": "x"}])], **REPLIES}, "not text (image_url)"),
    ({"prompt": [say("user", [{"type": "text"}])], **REPLIES}, "a part of a content is not text (text)"),
    ({"prompt": "Another question.", **DIALOGUES}, "'prompt' is not a turn that both responses begin with"),
    ({"prompt": [say("user", "Other")], **DIALOGUES}, "'chosen' begins with a turn of the user"),
    ({"prompt": [say("system", "a"), say("user", Q)], "system": "b", **REPLIES}, "two system prompts"),
    ({"conversations": [said("human", Q), said("gpt", YES)]}, "ShareGPT has it: train.method=sft learns its last turn"),
    ({"conversations": [said("narrator", Q)], **ANSWERS}, "a ShareGPT message has a role that is not known"),
    ({"instruction": Q, "output": YES}, "Alpaca's, one answer a row: train.method=sft"),
    ({"Prompt": Q, "Chosen": YES}, "the row has 'Chosen', 'Prompt'; name the column by data.columns.chosen="),
    ({"prompt": json.dumps([say("user", Q)]), **ANSWERS}, "'prompt' is a conversation written as text"),
    ({"prompt": Q, "chosen": str([say("assistant", YES)]), "rejected": NO}, "'chosen' is a conversation written as"),
    ({"prompt": ["a", "b"], "chosen": ["c", "d"], "rejected": ["e", "f"]}, "the file is a table by columns"),
    ({"prompt": {"0": "a"}, "chosen": {"0": "c"}, "rejected": {"0": "e"}}, "the file is a table by columns"),
    ({"train": [GOOD_ROW]}, "the rows stand under 'train': save that list alone"),
    ({"Prompt": Q, **ANSWERS}, "'Prompt' would not be used"),
    ({" question ": Q, **ANSWERS}, "' question ' would not be used"),
    (
        {"prompt": [say("user", Q), say("assistant", "It is")], **REPLIES},
        "the prompt ends with a turn of the assistant",
    ),
    (
        {"prompt": [say("user", Q)], **REPLIES, "chosen": [{**say("assistant", YES), "reasoning_content": "A sea?"}]},
        "leaves out what a response thought (its 'reasoning_content'",
    ),
    (
        {"instruction": f"<bos>{Q}", **ANSWERS},
        "a turn of the user begins with a special token of the tokenizer ('<bos>",
    ),
    ({"prompt": [say("system", "<eos>")], **REPLIES}, "a turn of the system begins with a special token"),
    ({"instruction": Q, "chosen": "<eos>", "rejected": NO}, "empty response ('chosen' only ends"),
    (
        {"prompt": Q, "response_0": YES, "response_1": NO, "better_response_id": 0},
        "name the column by data.columns.chosen",
    ),
    ({"conversations": [said("function_call", "{}")], **ANSWERS}, "a role that is not known ('function_call'"),
]


@pytest.mark.parametrize(("row", "sentence"), REFUSED)
def test_what_cannot_be_read_is_one_sentence_with_the_remedy(
    row: dict[str, Any], sentence: str, tmp_path: Path
) -> None:
    assert sentence in reason([row], tmp_path)


def test_a_turn_that_the_template_leaves_out_is_refused(tmp_path: Path) -> None:
    silent = "{% for m in messages %}{% if m.role != 'system' %}{{ m.content }}{% endif %}{% endfor %}"
    row = {"prompt": [say("system", "Be brief."), say("user", Q)], **REPLIES}
    assert "leaves out or changes what a turn says (of the system)" in reason([row], tmp_path, template=silent)
    says_the_last = "{% for m in messages %}[{{ m.role }}]{{ m.content.split('</think>')[-1] }}{% endfor %}"
    thought = {"prompt": [say("user", Q)], **REPLIES, "chosen": [say("assistant", f"<think>A sea?</think>{YES}")]}
    assert "leaves out what a response thought (its <think>" in reason([thought], tmp_path, template=says_the_last)
    before = [say("user", "Hi"), say("assistant", "<think>A greeting.</think>Hello"), say("user", Q)]
    ((prompt, *_),) = texts(load([{**thought, **REPLIES, "prompt": before}], tmp_path, says_the_last))
    assert prompt == f"[user]Hi[assistant]Hello[user]{Q}"
    parts_alone = "{% for m in messages %}{% for part in m.content %}{{ part.text }}{% endfor %}{% endfor %}"
    assert "leaves out" in reason([row], tmp_path, template=parts_alone)


def test_completions_of_other_layouts_are_read(tmp_path: Path) -> None:
    talk = [say("user", Q), say("assistant", YES)]
    rows = [
        {"instruction": Q, "input": "", "output": YES},
        {"messages": [say("system", "Be brief."), *talk]},
        {"conversations": [said("human", "Sea?"), said("gpt", NO)]},
    ]
    expected = [(ASKED, f"{YES}[/]"), (BRIEF, f"{YES}[/]"), ("[user]Sea?[/][assistant]", f"{NO}[/]")]
    assert texts(load(rows, tmp_path, method="sft")) == expected
    rows.append({"messages": [say("user", "Hi"), *talk[1:]], "completion": YES})  # which repeats the answer
    bad = [
        {"messages": [say("user", Q), say("user", Q)]},
        {"prompt": Q, "completion": NO, "label": False},
        {"instruction": Q, "output": NO, "kto_tag": False},
        {"messages": [say("user", Q), {**say("assistant", NO), "weight": 0}]},
    ]
    loaded = load([*rows, *bad, {"prompt": Q, "completion": YES, "label": True}], tmp_path, method="sft")
    assert texts(loaded) == [*expected, ("[user]Hi[/][assistant]", f"{YES}[/]"), (Q, YES)]
    assert loaded.dropped_by_reason == {
        "the conversation does not end with the assistant's turn": 1,
        "'label' says that the completion is one to avoid": 1,
        "'kto_tag' says that the completion is one to avoid": 1,
        "the conversation's last turn says that it is not to be learnt": 1,
    }


BOS, EOS = 1, 2
LLAMA_2 = """{% for m in messages %}{% if m.role == 'assistant' %} {{ m.content + ' ' + eos_token }}\
{% else %}{{ bos_token + '[INST] ' + m.content + ' [/INST]' }}{% endif %}{% endfor %}"""


@pytest.mark.parametrize("end", ["", "<eos>", " <eos>\n"])
@pytest.mark.parametrize("row", [{"prompt": [say("user", Q)]}, {"question": Q}], ids=["turns", "columns"])
def test_a_conversation_whose_text_ends_itself_ends_once(row: dict[str, Any], end: str, tmp_path: Path) -> None:
    answers = {name: text + end for name, text in ANSWERS.items()}
    ((prompt, *responses),) = texts(load([{**row, **answers}], tmp_path, LLAMA_2))
    assert prompt == f"<bos>[INST] {Q} [/INST]"
    assert [" ".join(each.split()) for each in responses] == [f"{YES} <eos>", f"{NO} <eos>"]
    kept = texts(load([{**row, **answers}], tmp_path))  # a template that does not end it leaves the text as it is
    assert kept == [(ASKED, f"{YES}{end}[/]", f"{NO}{end}[/]")]


@pytest.mark.parametrize("prompt", ["<bos>[user]Hi[/]", "[user]Hi[/]"])
@pytest.mark.parametrize("end", ["", "<eos>", "<eos>\n", "<eos> \n"])
def test_rendered_text_has_one_beginning_and_one_end(prompt: str, end: str, tmp_path: Path) -> None:
    row = {"prompt": prompt, "chosen": "yes" + end, "rejected": "no" + end}
    write_jsonl(tmp_path / "rows.jsonl", [row])
    (pair,) = load_file(tmp_path / "rows.jsonl", tokenizer_with(None, add_bos=True), eos="every").examples
    for sequence, text in zip(pair.sequences, ("yes", "no"), strict=True):
        assert (sequence.count(BOS), sequence[0], sequence.count(EOS)) == (1, BOS, 1)
        assert tiny_tokenizer().decode(sequence) == "<bos>[user]Hi[/]" + text + (end or "<eos>")
    assert tiny_tokenizer().decode(pair.prompt_ids) == "<bos>[user]Hi[/]"


def test_responses_rendered_by_themselves_lose_their_beginning(tmp_path: Path) -> None:
    rows = [
        {"prompt": "<bos>ask", "chosen": "<bos>yes", "rejected": "<bos>no"},
        {"chosen": "<bos>ask yes", "rejected": "<bos>ask no"},
    ]
    for row in rows:
        write_jsonl(tmp_path / "rows.jsonl", [row])
        (pair,) = load_file(tmp_path / "rows.jsonl", tokenizer_with(None, add_bos=True)).examples
        assert [sequence.count(BOS) for sequence in pair.sequences] == [1, 1]


def test_search_and_training_are_told_the_same_day(tmp_path: Path) -> None:
    form = "%A %d %B %Y %H:%M %j"
    template = "{{ strftime_now('" + form + "') }}|" + TEMPLATE
    tokenizer = tokenizer_with(template)
    task, question = get_task("svamp"), Question("1", "How many?")
    asked = Prompts(task, tokenizer, chat=True).encode(question)
    row = {"prompt": [say("user", task.prompt(question).rstrip())], **REPLIES}
    (pair,) = load([row], tmp_path, template).examples
    assert list(pair.prompt_ids) == asked
    day = datetime.fromisoformat(validate_config({}).data.template_date)
    assert tokenizer.decode(asked).startswith(f"{day.strftime(form)}|[user]")


def test_copies_are_dropped_counted_and_not_bad(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{**GOOD_ROW, "rejected": str(n % 4)} for n in range(20)]
    with caplog.at_level(logging.WARNING):
        loaded = load(rows, tmp_path, max_drop=0.0)
    assert (len(loaded.examples), loaded.dropped_by_reason) == (4, {"duplicate": 16})
    assert "16 rows repeat an earlier row and are trained once" in caplog.text
    with pytest.raises(DataError, match=r"1 of 5 rows are bad, more than data\.max_drop=0\.19"):
        load([*rows, {"prompt": "p"}], tmp_path, max_drop=0.19)


CLOCKS = {  # as templates of Llama 3.2 and others ask for the day
    "{% if strftime_now is defined %}{{ strftime_now('%d %b %Y') }}{% else %}no clock{% endif %}": "26 Jul 2024",
    "{%- set today = strftime_now('%Y-%m-%d') %}{{ today }} {{ today }}": "2024-07-26 2024-07-26",
    "{{ date_string | default(strftime_now('%B %d, %Y')) }}": "July 26, 2024",
}


@pytest.mark.parametrize("clock", CLOCKS)
def test_every_way_of_asking_for_the_day_gives_the_same_one(clock: str, tmp_path: Path) -> None:
    (pair,) = load([{"prompt": [say("user", Q)], **REPLIES}], tmp_path, f"{clock}|{TEMPLATE}").examples
    assert tiny_tokenizer().decode(pair.prompt_ids) == f"{CLOCKS[clock]}|{ASKED}"


def test_copies_are_found_across_layouts(tmp_path: Path) -> None:
    """What is trained decides: the same ids in another layout are a copy, other white space or another order is not."""
    same = [
        {"prompt": ASKED, "chosen": f"{YES}[/]", "rejected": f"{NO}[/]"},
        {"question": Q, "chosen": YES, "rejected": NO},
        {"prompt": [say("user", Q)], **REPLIES},
    ]
    swapped = {"prompt": [say("user", Q)], "chosen": REPLIES["rejected"], "rejected": REPLIES["chosen"]}
    spaced = {"prompt": [say("user", f"{Q} Now.")], **REPLIES}
    loaded = load([same[2], swapped, same[2], same[1], spaced, {**same[2], "id": 7}], tmp_path, max_drop=0.0)
    assert (len(loaded.examples), loaded.dropped_by_reason) == (3, {"duplicate": 3})
    write_jsonl(tmp_path / "text.jsonl", [same[0], same[0]])
    assert load_file(tmp_path / "text.jsonl", tokenizer_with(None)).dropped_by_reason == {"duplicate": 1}


ROWS = [{"prompt": f"Q{n}?\n", "chosen": "yes", "rejected": "é no"} for n in range(3)]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.txt"])
@pytest.mark.parametrize("bom", ["", "\ufeff"])
def test_json_over_several_lines_is_read(name: str, bom: str, tmp_path: Path) -> None:
    expected = [(row["prompt"], row["chosen"], row["rejected"]) for row in ROWS]
    contents = (
        json.dumps(ROWS, indent=2),
        "\n".join(json.dumps(row, indent=2, ensure_ascii=False) for row in ROWS),
        "\n\n" + json.dumps(ROWS[0], indent=1) + "".join(json.dumps(row) + "\n" for row in ROWS[1:]),
    )
    for content in contents:
        (tmp_path / name).write_text(bom + content, encoding="utf-8")
        assert texts(load_file(tmp_path / name, tiny_tokenizer())) == expected
    (tmp_path / name).write_text(bom + json.dumps(ROWS[0], indent=2), encoding="utf-8")
    (example,) = load_file(tmp_path / name, tiny_tokenizer()).examples
    assert example.source == f"{tmp_path / name}:1"
    (tmp_path / name).write_text(bom + json.dumps({"data": ROWS}, indent=2), encoding="utf-8")
    with pytest.raises(DataError, match="the rows stand under 'data': save that list alone"):
        load_file(tmp_path / name, tiny_tokenizer())


words = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12).map(lambda text: f"<{text}>")
words |= words.map(lambda text: 300 * text)
contents = st.sampled_from(
    [
        lambda text: text,
        lambda text: [{"type": "text", "text": text}],
        lambda text: [{"type": "text", "text": text[:2]}, {"type": "text", "text": text[2:]}],
        lambda text: {"type": "text", "text": text},
    ]
)


@st.composite
def written(draw: Any) -> tuple[dict[str, Any], str, str, str]:
    """(a row, and the text of prompt, chosen and rejected that it says under TEMPLATE), made without the parser."""
    question, system, before, answer = draw(words), draw(words), draw(words), draw(words)
    yes, no = "y" + draw(words), "n" + draw(words)
    part = draw(contents)
    layout = draw(
        st.sampled_from(["alpaca", "messages", "sharegpt", "implicit", "repeated", "ultra", "text", "answered"])
    )
    with_system, with_history = draw(st.booleans()), draw(st.booleans())
    turns = [("system", system)] * with_system + [("user", before), ("assistant", answer)] * with_history
    turns.append(("user", question))
    shown = "".join(f"[{role}]{text}[/]" for role, text in turns) + "[assistant]"
    chat = [say(role, part(text)) for role, text in turns]
    row: dict[str, Any] = {"chosen": [say("assistant", part(yes))], "rejected": [say("assistant", no)]}
    if layout == "text":
        return {"prompt": question, "chosen": yes, "rejected": no}, question, yes, no
    if layout == "alpaca":
        once = draw(st.sampled_from(["", question + " " if len(question) > 11 else ""]))  # repeated by both responses
        asked = draw(st.sampled_from(["instruction", "question", "query"]))
        row = {asked: question, "chosen": once + yes, "rejected": once + no}
        row |= {"system": system} if with_system else {}
        row |= {"history": [[before, answer]]} if with_history else {}
    elif layout == "messages":
        row["messages"] = chat
    elif layout == "sharegpt":
        names = {"user": "human", "assistant": "gpt", "system": "system"}
        if draw(st.booleans()):
            names = {role: speaker.upper() for role, speaker in names.items()}
        keys = draw(st.sampled_from([("from", "value"), ("role", "content"), ("role", "value"), ("from", "content")]))
        row = {"conversations": [dict(zip(keys, (names[role], text), strict=True)) for role, text in turns]}
        row |= {"chosen": said("gpt", yes), "rejected": draw(st.sampled_from([said("gpt", no), no]))}
    else:
        row = {name: [*chat, *value] for name, value in row.items()}
        if layout == "repeated":
            row["prompt"] = chat
        elif layout == "answered":  # the prompt holds one of the answers already
            name = draw(st.sampled_from(["chosen", "rejected"]))
            row = {"prompt": row[name], "chosen": row["chosen"][-1:], "rejected": row["rejected"][-1:]}
        elif layout == "implicit":
            row |= draw(st.sampled_from([{}, {"prompt": None}, {"prompt": ""}, {"prompt": []}]))
        elif layout == "ultra":
            row |= {"prompt": question, "messages": row["chosen"], "score_chosen": 1.5}
    return row, shown, f"{yes}[/]", f"{no}[/]"


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(written())
def test_rows_of_any_layout_are_trained_as_their_text_says(
    tmp_path: Path, case: tuple[dict[str, Any], str, str, str]
) -> None:
    row, *expected = case
    ((prompt, chosen, rejected),) = texts(load([row], tmp_path))
    assert (prompt, chosen, rejected) == tuple(expected)


scalars = st.none() | st.booleans() | st.integers(-3, 2**70) | st.floats() | st.text(max_size=6)
ODD = st.sampled_from(
    ["x" * 5000, "e\u0301\u200b\ufb01" * 30, "<bos>a", "a<eos>", "<think>a</think>b", "\ud800", " ", None]
)
scalars |= ODD
roles = st.sampled_from(["user", "assistant", "system", "human", "gpt", "tool", "", None, 3])
COLUMNS = ("prompt", "question", "input", "system", "messages", "conversations", "history", "chosen", "rejected")
OTHERS = ("completion", "tools", "images", "tree", "step", "chat_template_kwargs", "chosen_final", "other", "context")
OTHERS += ("Prompt", "label", "instruction", "output")
IDS = ("prompt_token_ids", "chosen_token_ids", "rejected_token_ids")
keys = st.sampled_from(COLUMNS + OTHERS + IDS)
objects = st.dictionaries(
    st.sampled_from(["role", "content", "from", "value", "type", "text", "tool_calls", "0", "thinking", "weight"]),
    scalars | roles,
    max_size=4,
)
values = st.recursive(scalars | objects, lambda inner: st.lists(inner, max_size=3), max_leaves=6)


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """(the list or object, the index or key in it) of every value inside."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, one in inner:
        yield value, key
        yield from places(one)


@st.composite
def damaged(draw: Any) -> dict[str, Any]:
    """A row that is good but for one or two values or columns."""
    row: dict[str, Any] = json.loads(json.dumps(draw(written())[0]))
    for _ in range(draw(st.integers(1, 2))):
        change = draw(st.sampled_from(["text", "text", "value", "column", "away", "twice"]))
        inside = [
            place for place in places(row) if change != "text" or place[1] in ("content", "value", "text", *COLUMNS)
        ]
        holder, key = draw(st.sampled_from(inside)) if inside else (row, "other")
        if change == "away":
            del holder[key]
        elif change == "column":
            row[draw(keys)] = draw(values)
        elif change == "twice":
            holder[key] = [holder[key], holder[key]]
        else:
            holder[key] = draw(values if change == "value" else ODD)
    return row


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(damaged() | st.dictionaries(keys, values, max_size=6), min_size=1, max_size=3),
    st.sampled_from([TEMPLATE, LLAMA_2, None]),
)
def test_any_row_is_an_example_or_one_sentence(tmp_path: Path, rows: list[Any], template: str | None) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for method in ("preference", "sft"):
        sentence = ""
        try:
            loaded = load_file(path, tokenizer_with(template), method, max_length=200)
        except DataError as error:
            sentence = str(error)
        else:
            assert len(loaded.examples) + len(loaded.dropped) == len(rows)
            assert all(2 <= len(ids) <= 200 for one in loaded.examples for ids in one.sequences)
        assert "\n" not in sentence
