"""The example as training sees it, and how one data row becomes one.

A row gives its ids in `*_token_ids`, which are used as they are, or its text or conversations, which are tokenised as a
preference trainer of Hugging Face TRL tokenises them: text together with its prompt, as it would stand in one sequence, a
conversation through the tokenizer's chat template. Either way

    prompt = the longest prefix that the ids of the prompt share with the ids of prompt + response, for every response

Nothing is cut: a row becomes a whole example, or a `BadRow` says why not.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Any

from cpo_fast.config import TREE_METHODS, Config
from cpo_fast.data.layouts import NOT_A_RESPONSE
from cpo_fast.errors import DataError, first_line
from cpo_fast.rows import BadRow, Row
from cpo_fast.tasks import common_prefix_length, encode_prompt, with_clock
from cpo_fast.tasks.unknown_text import unknown_piece, unknown_token

Ids = tuple[int, ...]
Scored = tuple[Ids, int]  # a sequence and its first scored position

REASONING = ("reasoning_content", "reasoning", "thinking")  # keys of a message beside its content

# what the responses of a row are called, by train.method
RESPONSES = {"preference": ("chosen", "rejected"), "sft": ("completion",)}


@dataclass(frozen=True)
class Thoughts:
    """What a search tree knows of a response, thought by thought.

    Attributes:
        lengths: tokens of each thought, end-of-sequence included.
        values: of each, from 0 (impossible) to 1 (likely).
        count: how many samples the response stands for.
        sampled_logp: log-prob of the response under the model that sampled it, at temperature 1, or None.
    """

    lengths: tuple[int, ...]
    values: tuple[float, ...]
    count: int
    sampled_logp: float | None


@dataclass(frozen=True)
class Example:
    """One prompt and its responses, as token ids: chosen and rejected make it a pair, a single one is a completion.

    For an objective that reads whole trees the responses are the thoughts after a state, the best first and the worst
    second, or two whole chains.

    Attributes:
        prompt_ids: the tokens that every response continues, at least one. They are read and not learnt.
        responses: at least one token each, end-of-sequence included where it is trained.
        group: the question it belongs to. Order `questions` keeps a question together, and a split never parts one.
        step: depth of the thought in its chain from 1, or 0 for data that has no steps.
        source: file:line, for messages.
        weight: factor of a pair's loss (`cpo_fast.data.batches.weigh` sets it).
        visits: of chosen and rejected in a Monte Carlo tree search, with `train.visit_smoothing`.
        thoughts: of each response, for an objective that reads whole trees.
    """

    prompt_ids: Ids
    responses: tuple[Ids, ...]
    group: str
    step: int
    source: str
    weight: float = 1.0
    visits: tuple[int, ...] = ()
    thoughts: tuple[Thoughts, ...] = ()

    @property
    def sequences(self) -> tuple[Ids, ...]:
        return tuple(self.prompt_ids + response for response in self.responses)

    @property
    def scored(self) -> tuple[tuple[Scored, ...], ...]:
        """For each response what is scored of it: all, or each thought of a chain by itself."""
        start = len(self.prompt_ids)
        if not self.thoughts:
            return tuple(((sequence, start),) for sequence in self.sequences)
        found = []
        for sequence, thoughts in zip(self.sequences, self.thoughts, strict=True):
            ends = accumulate(thoughts.lengths, initial=start)
            found.append(tuple((sequence[:end], begin) for begin, end in pairwise(ends)))
        return tuple(found)


class RowParser:
    """Rows to examples of `train.method`, with one tokenizer under one configuration."""

    def __init__(self, config: Config, tokenizer: Any) -> None:
        self.config, self.tokenizer, self.train, self.search = config.data, tokenizer, config.train, config.search
        self.names = RESPONSES.get(config.train.method, ())
        token = unknown_token(tokenizer)
        self._unknown = None if token is None else tokenizer.convert_tokens_to_ids(token)

    def parse(self, row: Row, source: str, group: str, implicit_prompt: bool = False) -> tuple[Example, bool]:
        """The example, and whether its prompt's last token merged with a response.

        Args:
            row: ids, text or conversations of `prompt` and of each response, and, for the template of a conversation,
                `tools` and `chat_template_kwargs`.
            source, group: of the example.
            implicit_prompt: a pair without a prompt has it as the common beginning of its two responses.

        Raises:
            BadRow: with the reason. DataError: a conversation, and the tokenizer has no chat template. Or a tree lacks what
                the objective reads of it.
        """
        if self.train.method in TREE_METHODS:
            return self._of_tree(row, source, group), False
        keys = [f"{name}_token_ids" for name in ("prompt", *self.names)]
        conversational = merged = False
        if all(key in row for key in keys):
            prompt, *responses = (_token_ids(row, key) for key in keys)
        else:
            if implicit_prompt and len(self.names) == 2 and "prompt" not in row:
                row = with_extracted_prompt(row)
            prompt, responses, merged = _encode(row, self.names, self.tokenizer)
            conversational = isinstance(row["prompt"], list)
        if not prompt:
            raise BadRow("empty prompt")
        for name, ids in zip(self.names, responses, strict=True):
            if not ids:
                raise BadRow("empty response", f"'{name}' has no tokens")
        if not conversational:  # its template ended a conversation already
            finals = [row.get(f"{name}_final", True) for name in self.names]
            ended = [self._says_end(row.get(name)) for name in self.names]
            responses = [
                ids if end else self._ended(ids, final)
                for ids, final, end in zip(responses, finals, ended, strict=True)
            ]
        if len(set(responses)) < len(responses):  # texts that differ may have the same tokens
            raise BadRow("chosen equals rejected after tokenisation")
        self._check_length(len(prompt), max(len(ids) for ids in responses))
        step = row.get("step")  # data of others may hold no number there
        example = Example(prompt, tuple(responses), group, step if type(step) is int else 0, source)
        return (replace(example, visits=_visits(row, source)) if self.train.visit_smoothing else example), merged

    def unknown_piece(self, row: Row, example: Example) -> str | None:
        """What the tokenizer does not know of the texts that became this example, the first piece of it."""
        if self._unknown is None or not any(self._unknown in ids for ids in (example.prompt_ids, *example.responses)):
            return None
        for name in ("prompt", *self.names):
            value = row.get(name)
            messages = value if isinstance(value, list) else [{"content": value}]
            for text in (message.get("content") for message in messages if isinstance(message, dict)):
                if isinstance(text, str) and (
                    piece := unknown_piece(self.tokenizer, text, self.tokenizer(text)["input_ids"])
                ):
                    return piece
        return None

    def _of_tree(self, row: Row, source: str, group: str) -> Example:
        """An example of an objective that reads whole trees, from `cpo_fast.data.pair_files.valued_row`."""
        prompt, responses, thoughts = tuple(row["prompt_token_ids"]), [], []
        for nodes in row["responses"]:
            ids = tuple(token for node in nodes for token in node["token_ids"])
            lengths, last = [len(node["token_ids"]) for node in nodes], nodes[-1]
            sampled = None
            if self.train.method == "tree_grpo":  # what was sampled and nothing else: no end-of-sequence
                sampled = self._sampled_logp(last, source)
            else:
                ended = self._ended(ids, last["final"])
                ids, lengths[-1] = ended, lengths[-1] + len(ended) - len(ids)
            values = tuple(self._unit_value(node["value"], source) for node in nodes)
            responses.append(ids)
            thoughts.append(Thoughts(tuple(lengths), values, last["count"], sampled))
        self._check_length(len(prompt), max(map(len, responses)))
        return Example(prompt, tuple(responses), group, row["step"], source, thoughts=tuple(thoughts))

    def _unit_value(self, value: float, source: str) -> float:
        low, high = self.search.value_impossible, self.search.value_likely
        if not low <= value <= high:
            raise DataError(
                f"{source}: the value {value:g} is not between search.value_impossible={low:g} and "
                f"search.value_likely={high:g}; set both as they were when the trees were searched"
            )
        return (value - low) / (high - low)

    def _sampled_logp(self, node: Row, source: str) -> float:
        if not node["logps"]:
            raise DataError(
                f"{source}: the thoughts have no log-probs of their sampling, which train.method=tree_grpo needs; imported "
                "trees have none, those of cpo-fast collect have"
            )
        return math.fsum(node["logps"][: len(node["token_ids"])])  # one more is that of end-of-sequence

    def _ended(self, ids: Ids, final: Any) -> Ids:
        """With end-of-sequence where `data.eos` wants it. `final` says that the chain ends with this response."""
        eos = self.tokenizer.eos_token_id
        if self.config.eos == "never" or (self.config.eos == "final" and not final) or ids[-1] == eos:
            return ids
        return (*ids, eos)

    def _says_end(self, response: Any) -> bool:
        """Whether a text ends in end-of-sequence already, with or without white space after it."""
        eos = self.tokenizer.eos_token
        return bool(eos) and isinstance(response, str) and response.rstrip().endswith(eos)

    def _check_length(self, prompt_length: int, response_length: int) -> None:
        limit = self.config.max_length
        if limit is not None and prompt_length + response_length > limit:
            prompt_alone = prompt_length >= limit
            reason = "the prompt alone reaches data.max_length" if prompt_alone else "longer than data.max_length"
            raise BadRow(reason, f"{prompt_length} + {response_length} tokens")


def with_extracted_prompt(row: Row) -> Row:
    """The row with `prompt` as what `chosen` and `rejected` begin with in common, by character or by message.

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
    # as TRL's `extract_prompt`: where one response begins the other, the last common piece stays with the responses, and a
    # space before the first difference goes to the responses
    shorter = min(len(chosen), len(rejected))
    common = next((place for place in range(shorter) if chosen[place] != rejected[place]), max(shorter - 1, 0))
    if isinstance(chosen, str) and 0 < common < shorter and chosen[common] != rejected[common]:
        common -= chosen[common - 1] == " "
    return {**row, "prompt": chosen[:common], "chosen": chosen[common:], "rejected": rejected[common:]}


def prompt_text(row: Row) -> str:
    """What names the question of a row that has no id: its prompt, in canonical form."""
    return json.dumps(row["prompt"], sort_keys=True, separators=(",", ":"), default=str)


def _visits(row: Row, source: str) -> tuple[int, ...]:
    found = [row.get(f"{name}_visits") for name in RESPONSES["preference"]]
    counts = tuple(visits for visits in found if type(visits) is int and visits >= 0)
    if len(counts) < len(found):
        raise DataError(
            f"{source}: no visit counts (chosen_visits and rejected_visits), which train.visit_smoothing needs; trees of "
            "search.strategy=mcts have them, and train.label_smoothing needs none"
        )
    return counts


def _token_ids(row: Row, key: str) -> Ids:
    value = row[key]
    # `type`, because a bool passes isinstance
    if not isinstance(value, list) or any(type(token) is not int or token < 0 for token in value):
        raise BadRow(f"'{key}' is not a list of token ids")
    return tuple(value)


def _encode(row: Row, names: Sequence[str], tokenizer: Any) -> tuple[Ids, list[Ids], bool]:
    """(prompt ids, ids of each response, whether a token merged across the boundary) of text or conversations."""
    for name in ("prompt", *names):
        _check_kind(row, name)
    try:  # JSON lets half a surrogate pair through, which no tokenizer reads
        json.dumps([row[name] for name in ("prompt", *names)], ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadRow("a text holds a lone surrogate", f"character {error.object[error.start : error.end]!a}") from None
    for name in names:
        if _is_blank(row[name]):
            raise BadRow("empty response", f"'{name}'")
    if len(names) == 2 and row[names[0]] == row[names[1]]:
        raise BadRow("chosen equals rejected")
    if isinstance(row["prompt"], list):
        prompt, sequences = _conversation_ids(row, names, tokenizer)
    else:
        responses = [_without_bos(tokenizer, row[name]) for name in names]
        prompt = _text_ids(tokenizer, row["prompt"])
        sequences = [_text_ids(tokenizer, row["prompt"] + response) for response in responses]
    # a token that merges across the boundary belongs to the response and is trained
    common = min(common_prefix_length(prompt, ids) for ids in sequences)
    return tuple(sequences[0][:common]), [tuple(ids[common:]) for ids in sequences], common < len(prompt)


def _without_bos(tokenizer: Any, response: str) -> str:
    """A response that was rendered by itself, without the beginning-of-sequence that belongs before the prompt alone."""
    bos = getattr(tokenizer, "bos_token", None)
    return response.removeprefix(bos) if bos and bos != tokenizer.eos_token else response


def _text_ids(tokenizer: Any, text: str) -> list[int]:
    """Ids of a text with one beginning- and one end-of-sequence, where the text and the tokenizer both write it."""
    ids = encode_prompt(tokenizer, text)
    bos, eos = getattr(tokenizer, "bos_token", None), tokenizer.eos_token
    if bos and text.startswith(bos) and not text.startswith(bos + bos) and ids[:2] == [tokenizer.bos_token_id] * 2:
        ids = ids[1:]
    if eos and text.endswith(eos) and not text.endswith(eos + eos) and ids[-2:] == [tokenizer.eos_token_id] * 2:
        ids = ids[:-1]
    return ids


def _check_kind(row: Row, name: str) -> None:
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
            if not isinstance(message.get("content"), str) and not message.get("tool_calls"):
                raise BadRow(f"'{name}' is not a conversation", "a message has no 'content'")
        if name == "prompt" and not value:
            raise BadRow("empty prompt")
        if name != "prompt" and value and value[0]["role"] in NOT_A_RESPONSE:
            raise BadRow(f"'{name}' begins with a turn of the {value[0]['role']}", "only what the model says is learnt")
    elif not isinstance(value, str):
        raise BadRow(f"'{name}' is not text", type(value).__name__)


def _is_blank(response: str | list[dict[str, Any]]) -> bool:
    if isinstance(response, str):
        return not response.strip()
    return all(
        not message.get("tool_calls") and isinstance(message["content"], str) and not message["content"].strip()
        for message in response
    )


def _conversation_ids(row: Row, names: Sequence[str], tokenizer: Any) -> tuple[list[int], list[list[int]]]:
    from jinja2 import TemplateError

    template = getattr(tokenizer, "chat_template", None)
    if not template:
        raise DataError("the data holds conversations, but the tokenizer has no chat template; use an instruct model")
    try:
        tools = row.get("tools")
        # TRL takes tools as JSON text too
        options = {"tools": json.loads(tools) if isinstance(tools, str) else tools}
        options |= row.get("chat_template_kwargs") or {}
        if "strftime_now" in str(template) or "chat_template" in options:
            named = tokenizer.get_chat_template(options.get("chat_template"), options["tools"])
            options["chat_template"] = with_clock(named)

        def render(messages: list[dict[str, Any]], **more: Any) -> str:
            text: str = tokenizer.apply_chat_template(messages, tokenize=False, **more, **options)
            return text

        # the prompt ends in the cue for an answer; in a sequence the template itself opens the response
        prompt = render(row["prompt"], add_generation_prompt=True)
        responses = [row[name] for name in names]
        sequences = [render(row["prompt"] + response) for response in responses]
        eos = tokenizer.eos_token
        for place, response in enumerate(responses):
            open_ended = _without_end(response, eos)
            if _is_blank(open_ended):
                raise BadRow("empty response", f"'{names[place]}' only ends")
            if open_ended is not response and (text := render(row["prompt"] + open_ended)).rstrip().endswith(eos):
                responses[place], sequences[place] = open_ended, text  # the template ends it by itself
    except (TemplateError, ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        if isinstance(error, RecursionError):
            raise
        raise BadRow("the chat template refuses the conversation", first_line(error)) from None
    _check_not_rendered(row["prompt"], tokenizer)
    for response, text in zip(responses, sequences, strict=True):
        for message in row["prompt"] + response:
            _check_shown(message, text)
        _check_learnt(response[-1], text)
    # a template writes its own special tokens
    ids = [list(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in (prompt, *sequences)]
    return ids[0], ids[1:]


def _check_shown(message: dict[str, Any], text: str) -> None:
    """Raise BadRow for a turn that the template leaves out or changes. What a model thought before it may be left out."""
    content = message.get("content")
    if message["role"] not in (*NOT_A_RESPONSE, "assistant") or message.get("tool_calls") or not content:
        return
    if content.rpartition("</think>")[2].strip() not in text:
        raise BadRow("the chat template leaves out or changes what a turn says", f"of the {message['role']}")


def _check_learnt(message: dict[str, Any], text: str) -> None:
    """Raise BadRow where a response's last turn loses what it thought, as templates do to the turns of a prompt."""
    content = message.get("content")
    if message["role"] != "assistant" or message.get("tool_calls") or not isinstance(content, str):
        return
    parts = {f"'{key}'": message.get(key) for key in REASONING} | {"<think>": content.rpartition("</think>")[0]}
    for key, part in parts.items():
        if isinstance(part, str) and part.replace("<think>", "").strip() not in text:
            raise BadRow(
                "the chat template leaves out what a response thought", f"its {key}; use a template that shows it"
            )


def _check_not_rendered(prompt: list[dict[str, Any]], tokenizer: Any) -> None:
    """Raise BadRow for a turn that a template has made already, which would be wrapped a second time."""
    for message in prompt:
        content = message.get("content")
        if isinstance(content, str) and content.lstrip().startswith(tuple(tokenizer.all_special_tokens)):
            raise BadRow(
                f"a turn of the {message['role']} begins with a special token of the tokenizer",
                f"{content.strip()[:40]!r}; give a text that is rendered already as 'prompt', by data.columns.prompt",
            )


def _without_end(response: list[dict[str, Any]], eos: str | None) -> list[dict[str, Any]]:
    """The response without the end-of-sequence that its last turn's text ends in, or the same list."""
    content = response[-1].get("content") if response else None
    if not eos or not isinstance(content, str) or not content.rstrip().endswith(eos):
        return response
    return [*response[:-1], {**response[-1], "content": content.rstrip().removesuffix(eos)}]
