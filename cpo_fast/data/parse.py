"""One row to one training item, or the reason why not. Ids that a row carries are used as they are; nothing is cut."""

from typing import Any

from cpo_fast.config import DataConfig
from cpo_fast.data.encode import Ids, encode_row
from cpo_fast.data.pair import PreferencePair
from cpo_fast.data.rows import BadRow
from cpo_fast.data.sft import SftExample


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
