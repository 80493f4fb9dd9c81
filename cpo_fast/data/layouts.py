"""Rows of other code bases to ours: which column is the question, and which are the responses.

Columns are told by their names, as TRL, LLaMA-Factory, axolotl, OpenRLHF and the sets UltraFeedback, Orca and HH-RLHF name
them (`NAMES`), or as `data.columns` maps them:

    prompt       a text that the response continues as it stands, or a conversation
    messages     a conversation: messages of role and content, or of from and value (ShareGPT)
    instruction  the user's turn, under `input` joined to it by a newline, after `system` and the turns of `history`

Turns that stand in columns of their own become a conversation where the tokenizer has a chat template, else one text: the
turns joined by newlines, which the response continues. Turns of the prompt that a response repeats are taken once, parts
of a content that are text are joined. Nothing is left out silently: a column that is known and not used is a `BadRow`,
any other with text that is not used is counted in `Layout.unused`.
"""

import logging
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from cpo_fast.errors import DataError
from cpo_fast.rows import ID_FIELDS, BadRow, Row, columns_hint

logger = logging.getLogger(__name__)

Message = dict[str, Any]

# our names, with those of others in the order of preference
NAMES: dict[str, tuple[str, ...]] = {
    "prompt": ("prompt",),
    "messages": ("messages", "conversations", "conversation", "context_messages"),
    "instruction": ("instruction", "question", "query"),
    "input": ("input", "context"),
    "system": ("system", "system_prompt"),
    "history": ("history",),
    "tools": ("tools",),
    "chosen": ("chosen", "chosen_response"),
    "rejected": ("rejected", "rejected_response"),
    "completion": ("completion", "output", "response"),
}
QUESTIONS = ("prompt", "messages", "instruction", "input")  # the first that a row has is its question
MEDIA = ("image", "images", "video", "videos", "audio", "audios")
# columns of our own files, of a template's options and of a table's index, that hold no text to train on
OURS = {"chat_template_kwargs", "task", "tree", "step", "node", *ID_FIELDS, "", "Unnamed: 0", "__index_level_0__"}

# the speakers of ShareGPT and others to the roles of chat templates
ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "model", "bot"), "assistant"),
    "system": "system",
    **dict.fromkeys(("observation", "tool"), "tool"),
}
TEMPLATE_ROLES = ("observation",)  # as `role` they are left to the template, which may know them
UNWANTED = ("label", "kto_tag")  # false in a row of KTO: its completion is one to avoid
NOT_A_RESPONSE = ("user", "system", "developer")  # roles that a response cannot begin with
TEXT_PARTS = ("text", "input_text", "output_text")
_WRITTEN_MESSAGES = re.compile(r"""\s*\[\s*\{\s*['"](role|content|from|value|type)['"]\s*:""")
_LONG = 12  # characters of one word that a response does not begin with by chance


class Layout:
    """Reads the rows of one data set.

    Args:
        responses: the names of the responses to read, as `train.method` wants them.
        columns: our names to those of the data, as `data.columns`.
        chat: the tokenizer has a chat template.

    Attributes:
        unused: rows by column whose text is not used.
        num_repeats: rows of text whose responses began with the prompt, which was taken once.
        read_as: rows by `our name=their name` of the columns that were read, and by what was made of them.
    """

    def __init__(self, responses: Sequence[str], columns: Mapping[str, str], chat: bool) -> None:
        self.responses, self.columns, self.chat = responses, columns, chat
        self.unused: Counter[str] = Counter()
        self._unused_length: Counter[str] = Counter()
        self.num_repeats = 0
        self.read_as: Counter[str] = Counter()

    def read(self, row: Row) -> Row:
        """The row under our names: `prompt`, unless it has none, and the responses, all text or all conversations.

        A row of token ids is returned as it is. What is still wrong with the kind of a value is for the parser to say.

        Raises:
            BadRow: with the reason.
        """
        if all(f"{name}_token_ids" in row for name in ("prompt", *self.responses)):
            return row
        names = self._columns(row)
        for key in MEDIA:
            if row.get(key) and key not in names.values():
                raise BadRow(f"'{key}' is not empty, and only text is trained")
        values = {name: _value(name, row[theirs]) for name, theirs in names.items()}
        _refuse_table(values)
        if self.responses == ("completion",):
            _refuse_unwanted(row)
            if "completion" not in values:
                _split_last_turn(values)
        for name in self.responses:
            if name not in values:
                raise BadRow(f"missing key '{name}'", self._hint(row, names))
        taken, turns = self._turns(values)
        made = {name: values[name] for name in self.responses}
        messages = any(isinstance(values.get(name), list) for name in QUESTIONS)
        messages |= any(_is_dialogue(values[name]) for name in self.responses)
        chat = turns is not None and (self.chat or messages)
        if turns is None:
            if "prompt" in taken:
                made["prompt"] = values["prompt"]
                self._take_once(made, made["prompt"], chat)
        elif chat:
            self._take_once(made, _said(turns[-1]) if turns and _role(turns[-1]) == "user" else "", chat)
            responses = {name: _as_turns(made[name]) for name in made}
            turns = _without_answer(turns, list(responses.values()))
            made = {name: _overlapping(turns, response) for name, response in responses.items()} | {"prompt": turns}
        else:
            made["prompt"] = "\n".join(turn["content"] for turn in turns)
            self._take_once(made, made["prompt"], chat)
        if "tools" in values and any(isinstance(value, list) for value in made.values()):
            taken.add("tools")
            made["tools"] = values["tools"]
        self._account(row, names, taken, made)
        kept = ["chat_template_kwargs", "tree", "task", "step"]
        kept += [f"{name}_{what}" for name in self.responses for what in ("final", "visits")]
        return made | {key: row[key] for key in kept if key in row}

    def check_columns(self, path: str, rows: Sequence[Row]) -> None:
        """Raise DataError for a column of `data.columns` that no row has."""
        missing = {name: key for name, key in self.columns.items() if rows and not any(key in row for row in rows)}
        for name, key in missing.items():
            found = ", ".join(f"'{other}'" for other in list(rows[0])[:12])
            raise DataError(f"{path}: no row has the column '{key}' that data.columns.{name} names; there are {found}")

    def report(self, path: str) -> None:
        """Say once what was read as what, and what was not used."""
        for reading, count in self.read_as.most_common():
            logger.info("%s: %d rows read as %s", path, count, reading)
        if self.unused:
            columns = ", ".join(f"'{key}' ({count} rows)" for key, count in self.unused.most_common(12))
            logger.warning(
                "%s: the text of these columns is not trained on: %s; if one belongs to the prompt, name it by "
                "data.columns, such as data.columns.instruction=%s",
                path,
                columns,
                max(self.unused, key=lambda key: self._unused_length[key]),  # the likeliest
            )
        if self.num_repeats:
            logger.warning(
                "%s: in %d rows both responses repeat the prompt, which is taken once", path, self.num_repeats
            )

    def _columns(self, row: Row) -> dict[str, str]:
        """Our names to the row's columns. A blank column is taken only where there is no other and it must not be blank."""
        names = {name: theirs for name, theirs in self.columns.items() if theirs in row}
        chosen_by_user = any(name in self.columns for name in QUESTIONS)
        for name, candidates in NAMES.items():
            if name in self.columns or (chosen_by_user and name in QUESTIONS):
                continue
            present = [key for key in candidates if key in row and key not in self.columns.values()]
            filled = [key for key in present if not _is_blank(row[key])]
            if filled or (present and name in ("prompt", *self.responses)):
                names[name] = (filled or present)[0]
        if "prompt" in names and _is_blank(row[names["prompt"]]) and any(name in names for name in QUESTIONS[1:]):
            del names["prompt"]
        return names

    def _turns(self, values: Row) -> tuple[set[str], list[Message] | None]:
        """(the names that are used, the prompt's turns or None where it is text, or the beginning of the responses)."""
        question = next((name for name in QUESTIONS if name in values), None)
        dialogues = all(isinstance(values[name], list) and values[name] for name in self.responses)
        opens = dialogues and all(_role(values[name][0]) in NOT_A_RESPONSE for name in self.responses)
        if question == "messages" and any(values["messages"] == values[name] for name in self.responses):
            question = None  # UltraFeedback repeats the chosen conversation
        used = {*self.responses} | ({question} if question else set())
        asked = values[question] if question and not (opens and _is_blank(values[question])) else None
        if opens and len(self.responses) == 2 and not isinstance(asked, list):
            # whole conversations: the question is what they begin with in common, and a text only repeats it
            first, second = (values[name] for name in self.responses)
            turns = _system_first(first[: _common(first, second)], values, used)
            if isinstance(asked, str) and not any(_said(turn) == asked.strip() for turn in turns):
                raise BadRow(f"'{question}' is not a turn that both responses begin with", f"{asked.strip()[:60]!r}")
            return used, turns if question or "system" in used else None
        if isinstance(asked, list):
            turns = _system_first(asked, values, used)
        elif isinstance(asked, str):
            beside = [name for name in ("system", "history") if name in values]
            if question == "prompt" and not beside and not any(_is_dialogue(values[n]) for n in self.responses):
                return used, None
            if question == "instruction" and "input" in values:
                asked, used = "\n".join([asked, *_texts("input", values["input"])]), used | {"input"}
            used |= {*beside}
            turns = _system_first([*_history(values.get("history")), {"role": "user", "content": asked}], values, used)
        elif question in ("prompt", None):
            return used, None  # the responses hold it, or the parser says what is wrong
        else:
            raise BadRow(f"'{question}' is not text", type(asked).__name__)
        return used, turns

    def _take_once(self, made: Row, prompt: Any, chat: bool) -> None:
        """Cut a prompt of text off the responses where all of them repeat it, and the white space that parts the two."""
        asked = prompt.strip() if isinstance(prompt, str) else ""
        if len(asked.split()) < 2 and len(asked) < _LONG:
            return
        said = [made[name] for name in self.responses]
        if all(isinstance(each, str) and each.lstrip().startswith(asked) for each in said):
            for name, each in zip(self.responses, said, strict=True):
                rest = each.lstrip()[len(asked) :]
                made[name] = rest if prompt == asked and not chat else rest.lstrip()
            self.num_repeats += 1

    def _account(self, row: Row, names: Mapping[str, str], used: set[str], made: Row) -> None:
        """Refuse a known column that is not used, and count the others whose text is not in what was made."""
        whole = "\n".join(_strings(list(made.values())))
        read = {names[name] for name in used if name in names}
        known = {key for candidates in NAMES.values() for key in candidates} - {*NAMES["completion"], *NAMES["tools"]}
        if "completion" in self.responses:
            known -= {*NAMES["chosen"], *NAMES["rejected"]}
        known |= {names[name] for name in names}
        for key, value in row.items():
            if key in read or key in OURS or _is_ours(key) or all(text in whole for text in _strings(value)):
                continue
            if key.strip().lower() in known and not (self.columns and key not in self.columns.values()):
                beside = ", ".join(f"'{name}'" for name in sorted(read))
                raise BadRow(f"'{key}' would not be used", f"beside {beside}; say what it is by data.columns")
            self.unused[key] += 1
            self._unused_length[key] += sum(map(len, _strings(value)))
        kind = "conversations" if any(isinstance(value, list) for value in made.values()) else "text"
        pairs = ", ".join(f"{name}={names[name]}" for name in NAMES if name in used and name in names)
        self.read_as[f"{kind}: {pairs}"] += 1

    def _hint(self, row: Row, names: Mapping[str, str]) -> str:
        """What to do about a row without responses, where the others may have none either."""
        if "prompt" in names and any(name in names for name in self.responses):
            return ""
        if "messages" in names:
            return (
                f"'{names['messages']}' is one conversation, as ShareGPT has it: train.method=sft learns its last turn, a "
                "pair needs 'chosen' and 'rejected' beside it"
            )
        if "instruction" in names and "output" in row:
            return "'instruction' and 'output' are Alpaca's, one answer a row: train.method=sft learns it"
        return columns_hint(row, f"data.columns.{self.responses[0]}=...")


def _is_ours(key: str) -> bool:
    return key.endswith(("_id", "_final", "_node", "_value", "_token_ids"))


def _is_blank(value: Any) -> bool:
    return value is None or (isinstance(value, str) and not value.strip()) or value in ([], {})


def _is_dialogue(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict)


def _role(message: Any) -> Any:
    return message.get("role") if isinstance(message, dict) else None


def _said(message: Any) -> str:
    content = message.get("content") if isinstance(message, dict) else None
    return content.strip() if isinstance(content, str) else ""


def _same(one: Any, other: Any) -> bool:
    calls = [message.get("tool_calls") or None if isinstance(message, dict) else message for message in (one, other)]
    return _role(one) == _role(other) and _said(one) == _said(other) and calls[0] == calls[1]


def _common(first: Sequence[Any], second: Sequence[Any]) -> int:
    shorter = min(len(first), len(second))
    return next((place for place in range(shorter) if not _same(first[place], second[place])), max(shorter - 1, 0))


def _overlapping(turns: list[Message], response: Any) -> Any:
    """The response without the turns of the prompt's end, or all of them, that it begins with."""
    if not isinstance(response, list) or not response or _role(response[0]) not in NOT_A_RESPONSE:
        return response
    for count in range(min(len(turns), len(response)), 0, -1):
        if all(_same(one, other) for one, other in zip(turns[-count:], response, strict=False)):
            return response[count:]
    return response


def _system_first(turns: list[Message], values: Row, used: set[str]) -> list[Message]:
    """The turns after the text of column `system`, which is taken once."""
    texts = _texts("system", values["system"]) if "system" in values else []
    if not texts:
        return turns
    used.add("system")
    if turns and _role(turns[0]) == "system":
        if _said(turns[0]) != texts[0].strip():
            raise BadRow("the row has two system prompts", "the column's is not the conversation's")
        return turns
    return [{"role": "system", "content": texts[0]}, *turns]


def _as_turns(response: Any) -> Any:
    return [{"role": "assistant", "content": response}] if isinstance(response, str) else response


def _without_answer(turns: list[Message], responses: Sequence[Any]) -> list[Message]:
    """The prompt's turns without the answer that some layouts keep behind them. Raises BadRow for another one."""
    if not turns or _role(turns[-1]) != "assistant":
        return turns
    if any(isinstance(response, list) and response and _same(turns[-1], response[0]) for response in responses):
        return turns[:-1]
    if all(isinstance(response, list) and response and _role(response[0]) == "assistant" for response in responses):
        raise BadRow("the prompt ends with a turn of the assistant", "a response would be its second one in a row")
    return turns


def _refuse_unwanted(row: Row) -> None:
    for key in UNWANTED:
        if row.get(key) is False or (row.get(key) == 0 and type(row[key]) is int):
            raise BadRow(f"'{key}' says that the completion is one to avoid", "train.method=sft learns what it reads")


def _split_last_turn(values: Row) -> None:
    """Take the completion of a conversation that has none beside it: its last turn, which must be the assistant's."""
    turns = values.get("messages")
    if isinstance(turns, list) and len(turns) > 1 and "prompt" not in values:
        if _role(turns[-1]) != "assistant":
            raise BadRow("the conversation does not end with the assistant's turn")
        if turns[-1].get("weight") == 0 or turns[-1].get("train", turns[-1].get("training")) is False:
            raise BadRow("the conversation's last turn says that it is not to be learnt")
        values["messages"], values["completion"] = turns[:-1], turns[-1:]


def _history(value: Any) -> list[Message]:
    """The turns of [[question, answer], ...], or of messages."""
    if value is None:
        return []
    if isinstance(value, list) and all(isinstance(turn, dict) and _said(turn) for turn in value):
        return value
    if not isinstance(value, list) or not all(
        isinstance(turn, list) and len(turn) == 2 and all(isinstance(text, str) for text in turn) for turn in value
    ):
        raise BadRow("'history' is not a list of [question, answer]")
    return [
        {"role": role, "content": text}
        for turn in value
        for role, text in zip(("user", "assistant"), turn, strict=True)
    ]


def _texts(name: str, value: Any) -> list[str]:
    if not isinstance(value, str):
        raise BadRow(f"'{name}' is not text", type(value).__name__)
    return [value] if value.strip() else []


def _refuse_table(values: Row) -> None:
    columns = [values[name] for name in ("prompt", "chosen", "rejected") if name in values]
    lists = [isinstance(value, list) and value and all(isinstance(one, str) for one in value) for value in columns]
    numbered = [isinstance(value, dict) and value and all(str(key).isdigit() for key in value) for value in columns]
    if len(columns) > 1 and (all(lists) or all(numbered)):
        raise BadRow(
            "the file is a table by columns", "save one object a row, with pandas to_json(orient='records', lines=True)"
        )


def _value(name: str, value: Any) -> Any:
    """A column's value with a single message as a list of it, messages under `role` and `content`, and parts joined."""
    if name in ("tools", "history") and not (name == "history" and isinstance(value, list)):
        return value
    if isinstance(value, str):
        if name in ("messages", "prompt", "chosen", "rejected", "completion") and _WRITTEN_MESSAGES.match(value):
            raise BadRow(
                f"'{name}' is a conversation written as text", "save lists as JSON lines or parquet, not as CSV"
            )
        return value
    if isinstance(value, dict) and ("role" in value or "from" in value):
        return [_message(value)]
    if isinstance(value, list) and value and all(isinstance(one, dict) for one in value):
        if all("type" in one and "role" not in one and "from" not in one for one in value):
            return _joined(value)
        return [_message(one) for one in value]
    return value


def _message(message: Message) -> Message:
    speaker = message.get("role", message.get("from"))
    role = ROLES.get(speaker.strip().lower()) if isinstance(speaker, str) else None
    if "role" not in message and "from" in message:
        if role is None:
            raise BadRow("a ShareGPT message has a role that is not known", repr(speaker)[:60])
        message = {"role": role, **{key: value for key, value in message.items() if key != "from"}}
    elif role is not None and speaker not in TEMPLATE_ROLES:
        message = {**message, "role": role}
    if "content" not in message and "value" in message:
        message = {"content" if key == "value" else key: value for key, value in message.items()}
    content = message.get("content")
    if isinstance(content, dict):
        content = [content]
    return {**message, "content": _joined(content)} if isinstance(content, list) else message


def _joined(parts: Sequence[Any]) -> str:
    """The text of a content's parts. Raises BadRow for a part that is not text, by the name of its type."""
    texts = []
    for part in parts:
        text = part.get("text") if isinstance(part, dict) and part.get("type", "text") in TEXT_PARTS else part
        if not isinstance(text, str):
            kind = part.get("type", "no type") if isinstance(part, dict) else type(part).__name__
            raise BadRow("a part of a content is not text", str(kind)[:60])
        texts.append(text)
    return "".join(texts)


def _strings(value: Any) -> Iterator[str]:
    """Every text in a value that is more than white space; of a message or a part, what it says."""
    if isinstance(value, str):
        if value.strip():
            yield value.strip()
    elif isinstance(value, list):
        for one in value:
            yield from _strings(one)
    elif isinstance(value, dict):
        said = [value[key] for key in ("content", "value", "text") if key in value]
        for one in said or value.values():
            yield from _strings(one)
