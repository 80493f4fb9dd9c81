"""Text and conversations to token ids, as a preference trainer of Hugging Face TRL tokenises them.

Text is tokenised together with its prompt, as it would stand in one row. A conversation goes through the tokenizer's chat
template: the prompt with the cue for an answer, the prompt followed by each response without. Either way

    prompt = the longest prefix that the ids of the prompt share with the ids of prompt + response, for every response

so a token that merges across the boundary belongs to the response and is trained. A conversation ends as its template
ends it; end-of-sequence is not added to it.

The preference pair as training sees it: three sequences of token ids, its weight, and where it came from.

One row to one training item, or the reason why not. Ids that a row carries are used as they are; nothing is cut.

The supervised example as training sees it: a prompt that is read and a completion that is learnt, as token ids.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cpo_fast.config import DataConfig
from cpo_fast.errors import DataError
from cpo_fast.rows import BadRow
from cpo_fast.tasks import common_prefix_length, encode_prompt

Ids = tuple[int, ...]


@dataclass(frozen=True)
class Encoded:
    """A prompt and its responses in ids.

    Attributes:
        prompt: what all responses continue.
        responses: one per response, in the order given.
        merged: the end of the prompt alone is not the end of the prompt in the row.
        conversational: it went through a chat template.
    """

    prompt: Ids
    responses: tuple[Ids, ...]
    merged: bool
    conversational: bool


def encode_row(row: dict[str, Any], names: Sequence[str], tokenizer: Any, implicit_prompt: bool = False) -> Encoded:
    """Ids of `row["prompt"]` and of the responses called `names`, all of them text or all of them conversations.

    Args:
        row: may hold `tools` and `chat_template_kwargs` for the template of a conversation.
        names: `chosen` and `rejected`, or `completion`.
        tokenizer: a Hugging Face tokenizer.
        implicit_prompt: a row without a prompt has it as the common beginning of its two responses.

    Raises:
        BadRow: with the reason. DataError: a conversation, and the tokenizer has no chat template.
    """
    if implicit_prompt and "prompt" not in row:
        row = with_extracted_prompt(row)
    for name in ("prompt", *names):
        _check_kind(row, name)
    try:
        json.dumps([row[name] for name in ("prompt", *names)], ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadRow("a text holds a lone surrogate", f"character {error.object[error.start : error.end]!a}") from None
    for name in names:
        if _is_blank(row[name]):
            raise BadRow("empty response", f"'{name}'")
    if len(names) == 2 and row[names[0]] == row[names[1]]:
        raise BadRow("chosen equals rejected")
    conversational = isinstance(row["prompt"], list)
    if conversational:
        prompt, rows = _conversation_ids(row, names, tokenizer)
    else:
        prompt = encode_prompt(tokenizer, row["prompt"])
        rows = [encode_prompt(tokenizer, row["prompt"] + row[name]) for name in names]
    common = min(common_prefix_length(prompt, ids) for ids in rows)
    responses = tuple(tuple(ids[common:]) for ids in rows)
    return Encoded(tuple(rows[0][:common]), responses, common < len(prompt), conversational)


def with_extracted_prompt(row: dict[str, Any]) -> dict[str, Any]:
    """The row with `prompt` as what `chosen` and `rejected` begin with in common, by character or by message.

    As TRL's `extract_prompt`: where one response begins the other, the last common piece stays with the responses, and a
    space before the first difference goes to the responses.

    Raises:
        BadRow: the two responses are not both text or both conversations.
    """
    for name in ("chosen", "rejected"):
        if name not in row:
            raise BadRow(f"missing key '{name}'")
        if row[name] is None:
            raise BadRow(f"'{name}' is null")
    chosen, rejected = row["chosen"], row["rejected"]
    if isinstance(chosen, list) and not isinstance(rejected, list):
        raise BadRow("'rejected' is not a conversation", type(rejected).__name__)
    for name in ("chosen", "rejected"):
        if not isinstance(chosen, list) and not isinstance(row[name], str):
            raise BadRow(f"'{name}' is not text", type(row[name]).__name__)
    shorter = min(len(chosen), len(rejected))
    common = next((place for place in range(shorter) if chosen[place] != rejected[place]), max(shorter - 1, 0))
    if isinstance(chosen, str) and 0 < common < shorter and chosen[common] != rejected[common]:
        common -= chosen[common - 1] == " "
    return {**row, "prompt": chosen[:common], "chosen": chosen[common:], "rejected": rejected[common:]}


def prompt_text(row: dict[str, Any]) -> str:
    """What names the question of a row that has no id: its prompt, in canonical form."""
    return json.dumps(row["prompt"], sort_keys=True, separators=(",", ":"), default=str)


def _check_kind(row: dict[str, Any], name: str) -> None:
    if name not in row:
        raise BadRow(f"missing key '{name}'")
    value = row[name]
    if value is None:
        raise BadRow(f"'{name}' is null")
    if isinstance(row["prompt"], list):
        if not isinstance(value, list):
            raise BadRow(f"'{name}' is not a conversation", type(value).__name__)
        for message in value:
            if not isinstance(message, dict) or not isinstance(message.get("role"), str):
                raise BadRow(f"'{name}' is not a conversation", "a message needs a 'role' and a 'content'")
            if not isinstance(message.get("content"), str | list) and not message.get("tool_calls"):
                raise BadRow(f"'{name}' is not a conversation", "a message has no 'content'")
        if name == "prompt" and not value:
            raise BadRow("empty prompt")
    elif not isinstance(value, str):
        raise BadRow(f"'{name}' is not text", type(value).__name__)


def _is_blank(response: str | list[dict[str, Any]]) -> bool:
    if isinstance(response, str):
        return not response.strip()
    return all(
        not message.get("tool_calls") and isinstance(message["content"], str) and not message["content"].strip()
        for message in response
    )


def _conversation_ids(row: dict[str, Any], names: Sequence[str], tokenizer: Any) -> tuple[list[int], list[list[int]]]:
    from jinja2 import TemplateError

    if not getattr(tokenizer, "chat_template", None):
        raise DataError("the data holds conversations, but the tokenizer has no chat template; use an instruct model")
    try:
        tools = row.get("tools")
        options = {"tools": json.loads(tools) if isinstance(tools, str) else tools}
        options |= row.get("chat_template_kwargs") or {}

        def ids(messages: list[dict[str, Any]], **more: Any) -> list[int]:
            encoded = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **more, **options)
            return list(encoded["input_ids"])

        return ids(row["prompt"], add_generation_prompt=True), [ids(row["prompt"] + row[name]) for name in names]
    except (TemplateError, TypeError, ValueError, KeyError) as error:
        raise BadRow("the chat template refuses the conversation", str(error)) from None


@dataclass(frozen=True)
class PreferencePair:
    """One prompt, the response that won and one that lost, as token ids.

    Attributes:
        prompt_ids: the tokens both responses continue; at least one.
        chosen_ids, rejected_ids: the responses, at least one token each; end-of-sequence included where it is trained.
        group: the question the pair belongs to; order `questions` keeps equal groups together, and a split never parts
            them.
        step: depth of the thought in its chain from 1, or 0 for data that has no steps.
        source: file:line, for messages.
        weight: factor of its loss; the mean over all loaded pairs is 1 (see `pairs.weight`).
    """

    prompt_ids: tuple[int, ...]
    chosen_ids: tuple[int, ...]
    rejected_ids: tuple[int, ...]
    group: str
    step: int
    source: str
    weight: float = 1.0

    @property
    def chosen_sequence(self) -> tuple[int, ...]:
        """Prompt and chosen response."""
        return self.prompt_ids + self.chosen_ids

    @property
    def rejected_sequence(self) -> tuple[int, ...]:
        """Prompt and rejected response."""
        return self.prompt_ids + self.rejected_ids

    @property
    def num_tokens(self) -> int:
        """Tokens of the two rows that a pairwise trainer would compute."""
        return 2 * len(self.prompt_ids) + len(self.chosen_ids) + len(self.rejected_ids)


@dataclass(frozen=True)
class SftExample:
    """One prompt and the completion whose tokens the loss is over.

    Attributes:
        prompt_ids: the tokens that are only read; at least one.
        completion_ids: the tokens that are learnt, at least one; end-of-sequence included where it is trained.
        group: the question the example belongs to.
        source: file:line, for messages.
    """

    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]
    group: str
    source: str

    @property
    def sequence(self) -> tuple[int, ...]:
        """Prompt and completion."""
        return self.prompt_ids + self.completion_ids


class RowParser:
    """Rows to pairs or examples with one tokenizer under one configuration.

    End-of-sequence follows `data.eos` for text and for ids; a conversation ends as its chat template ends it.
    """

    def __init__(self, config: DataConfig, tokenizer: Any) -> None:
        """Keep both; nothing is read yet."""
        self.config, self.tokenizer = config, tokenizer

    def pair(self, row: dict[str, Any], source: str, group: str, implicit_prompt: bool) -> tuple[PreferencePair, bool]:
        """The pair, and whether its prompt's last token merged with a response. Raises BadRow with the reason."""
        prompt, (chosen, rejected), merged = self._ids(row, ("chosen", "rejected"), implicit_prompt)
        if chosen == rejected:
            raise BadRow("chosen equals rejected after tokenisation")
        self._check_length(prompt, max(len(chosen), len(rejected)))
        step = row.get("step")
        return PreferencePair(prompt, chosen, rejected, group, step if type(step) is int else 0, source), merged

    def example(self, row: dict[str, Any], source: str, group: str) -> tuple[SftExample, bool]:
        """The example, and whether its prompt's last token merged with the completion. Raises BadRow."""
        prompt, (completion,), merged = self._ids(row, ("completion",), implicit_prompt=False)
        self._check_length(prompt, len(completion))
        return SftExample(prompt, completion, group, source), merged

    def _ids(self, row: dict[str, Any], names: tuple[str, ...], implicit_prompt: bool) -> tuple[Ids, list[Ids], bool]:
        keys = [f"{name}_token_ids" for name in ("prompt", *names)]
        conversational = merged = False
        if all(key in row for key in keys):
            prompt, *responses = (_token_ids(row, key) for key in keys)
        else:
            encoded = encode_row(row, names, self.tokenizer, implicit_prompt)
            prompt, responses = encoded.prompt, list(encoded.responses)
            conversational, merged = encoded.conversational, encoded.merged
        if not prompt:
            raise BadRow("empty prompt")
        for name, ids in zip(names, responses, strict=True):
            if not ids:
                raise BadRow("empty response", f"'{name}' has no tokens")
        if not conversational:
            responses = [
                self._ended(ids, row.get(f"{name}_final", True)) for name, ids in zip(names, responses, strict=True)
            ]
        return prompt, responses, merged

    def _ended(self, ids: Ids, final: Any) -> Ids:
        eos = self.tokenizer.eos_token_id
        if self.config.eos == "never" or (self.config.eos == "final" and not final) or ids[-1] == eos:
            return ids
        return (*ids, eos)

    def _check_length(self, prompt: Ids, response_length: int) -> None:
        limit = self.config.max_length
        if limit is None or len(prompt) + response_length <= limit:
            return
        detail = f"{len(prompt)} + {response_length} tokens"
        if len(prompt) >= limit:
            raise BadRow("the prompt alone reaches data.max_length", detail)
        raise BadRow("longer than data.max_length", detail)


def _token_ids(row: dict[str, Any], key: str) -> Ids:
    value = row[key]
    if not isinstance(value, list) or any(type(token) is not int or token < 0 for token in value):
        raise BadRow(f"'{key}' is not a list of token ids")
    return tuple(value)
