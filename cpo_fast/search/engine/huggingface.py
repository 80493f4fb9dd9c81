"""The reference engine: a stock Hugging Face model, its own KV cache, batched over the samples of one state.

A state is prefilled once, unpadded, on top of the cached few-shot prefix; its cache is then repeated for the samples,
which decode together until a newline, end-of-sequence or the cap. States never share a forward: with left padding the
sums inside attention would be grouped by the longest neighbour, and in bfloat16 that changes tokens. So a result
depends on its own request only, as long as the matrix library treats the rows of a product alike. CPU libraries do
from `MIN_ROWS` rows on (measured); a GPU library may choose another kernel for another number of rows, and there equal
results are promised for equal `batch_size` only.

Reading every shared ancestor once, and batching states, is what the arena engine is for.
"""

from collections.abc import Sequence
from copy import deepcopy
from itertools import groupby
from typing import Any

import numpy as np
import torch

from cpo_fast.search.engine.request import Request, Sample
from cpo_fast.search.engine.sampler import choose_token, uniforms
from cpo_fast.tree import Stop

# below four rows a CPU matrix library takes matrix-vector routines that sum in another order; measured for float32
MIN_ROWS = 4


class HuggingFaceEngine:
    """Samples lines and scores labels with a causal language model.

    Args:
        model: `transformers` or PEFT model with a language-model head; set to eval mode here.
        tokenizer: its tokenizer.
        batch_size: at most so many samples per forward (a smaller group is filled up to `MIN_ROWS` rows).
    """

    def __init__(self, model: Any, tokenizer: Any, batch_size: int) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self.max_positions: int | None = getattr(model.config, "max_position_embeddings", None)
        self._eos_ids = _eos_ids(model, tokenizer)
        self._prefixes: list[tuple[tuple[int, ...], Any]] = []
        self._has_newline: dict[int, bool] = {}

    @torch.inference_mode()
    def cache_prefix(self, token_ids: Sequence[int]) -> None:
        """Prefill these ids once and keep their KV; prompts that start with them, and go on, reuse it."""
        prefix = tuple(token_ids)
        if prefix and all(prefix != known for known, _ in self._prefixes):
            self._prefixes.append((prefix, self._forward(self._tensor([prefix]), None)[1]))
            self._prefixes.sort(key=lambda entry: -len(entry[0]))  # the longest that fits is found first

    @torch.inference_mode()
    def sample(self, requests: Sequence[Request]) -> list[Sample]:
        """One line per request, in order; consecutive requests with the same prompt share its prefill.

        Raises:
            ValueError: an empty prompt, a prompt too long for the model, or logits that are not finite.
        """
        samples: list[Sample] = []
        for prompt, group in groupby(requests, key=lambda request: request.token_ids):
            rows = list(group)
            self._check_length(len(prompt), max(request.max_new_tokens for request in rows))
            logits, cache = self._prefill(prompt)
            for start in range(0, len(rows), self.batch_size):
                samples.extend(self._decode(rows[start : start + self.batch_size], logits[0, -1], cache))
        return samples

    @torch.inference_mode()
    def score(self, token_ids: Sequence[int], continuations: Sequence[Sequence[int]]) -> list[float]:
        """Natural log-prob of each whole continuation, float64 sums of float64 log-softmax.

        One forward when every continuation is one token; a second one over the rest of the longer ones otherwise.

        Raises:
            ValueError: an empty prompt, a prompt too long for the model, or logits that are not finite.
        """
        longest = max((len(continuation) for continuation in continuations), default=0)
        self._check_length(len(token_ids), longest)
        logits, cache = self._prefill(tuple(token_ids))
        first = _log_softmax(logits[0, -1])
        sums = [first[continuation[0]] if continuation else 0.0 for continuation in continuations]
        if longest > 1:
            # right padding is invisible to the tokens before it; its own rows are not read
            inputs = [[*item[:-1], *[0] * (longest - 1 - len(item[:-1]))] for item in continuations]
            rest, _ = self._forward(self._tensor(inputs), _repeat(cache, len(inputs)), keep=0)
            for row, continuation in enumerate(continuations):
                for position, token in enumerate(continuation[1:]):
                    sums[row] += _log_softmax(rest[row, position])[token]
        return [float(value) for value in sums]

    def _prefill(self, prompt: tuple[int, ...]) -> tuple[torch.Tensor, Any]:
        """Logits [1, 1, V] after the prompt, and its cache of one row."""
        for prefix, cache in self._prefixes:
            if len(prompt) > len(prefix) and prompt[: len(prefix)] == prefix:
                return self._forward(self._tensor([prompt[len(prefix) :]]), deepcopy(cache))
        return self._forward(self._tensor([prompt]), None)

    def _decode(self, requests: list[Request], logits: torch.Tensor, cache: Any) -> list[Sample]:
        """Samples of one state side by side. `logits` [V] after the prompt; `cache` one row, left unchanged."""
        tables = [uniforms(request.uid, request.max_new_tokens) for request in requests]
        generated: list[list[int]] = [[] for _ in requests]
        stops: list[Stop | None] = [None] * len(requests)
        alive = list(range(len(requests)))  # indices into requests, one per row that is still read
        rows = logits.float().expand(len(requests), -1)
        past: Any = None
        num_rows = 0
        for position in range(max(request.max_new_tokens for request in requests)):
            values = rows.double().cpu().numpy()
            for row, index in enumerate(alive):
                if stops[index] is None:
                    request = requests[index]
                    uniform = float(tables[index][position])
                    token = choose_token(values[row], uniform, request.temperature, request.top_p)
                    stops[index] = self._take(token, generated[index], request.max_new_tokens)
            running = [row for row, index in enumerate(alive) if stops[index] is None]
            if not running:
                break
            if past is None or (len(running) <= num_rows // 2 and num_rows > MIN_ROWS):
                # only running rows go on, filled up with copies of the last; copies are computed and not read
                picked = running + [running[-1]] * (MIN_ROWS - len(running))
                past = _repeat(cache, len(picked)) if past is None else _select(past, picked)
                alive = [alive[row] for row in running]
                num_rows = len(picked)
            last = [generated[index][-1] if generated[index] else 0 for index in alive]
            last += [last[-1]] * (num_rows - len(last))
            rows = self._forward(self._tensor([[token] for token in last]), past)[0][: len(alive), -1]
        return [self._sample(ids, stop or "length") for ids, stop in zip(generated, stops, strict=True)]

    def _take(self, token: int, generated: list[int], max_new_tokens: int) -> Stop | None:
        """Append a token to its row, unless it is end-of-sequence, and say whether the row ends with it."""
        if token in self._eos_ids:
            return "eos"
        generated.append(token)
        if self._contains_newline(token):
            return "newline"
        return "length" if len(generated) >= max_new_tokens else None

    def _contains_newline(self, token: int) -> bool:
        if token not in self._has_newline:
            self._has_newline[token] = "\n" in self._text([token])
        return self._has_newline[token]

    def _sample(self, ids: list[int], stop: Stop) -> Sample:
        return Sample(tuple(ids), self._text(ids), stop)

    def _text(self, ids: list[int]) -> str:
        text: str = self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text

    def _forward(self, input_ids: torch.Tensor, cache: Any, keep: int = 1) -> tuple[torch.Tensor, Any]:
        """Logits of the last `keep` positions (0: all) and the cache, which grows in place when given."""
        output = self.model(input_ids=input_ids, past_key_values=cache, use_cache=True, logits_to_keep=keep)
        return output.logits, output.past_key_values

    def _tensor(self, rows: Sequence[Sequence[int]]) -> torch.Tensor:
        return torch.tensor([list(row) for row in rows], dtype=torch.long, device=self.model.device)

    def _check_length(self, prompt_length: int, num_new_tokens: int) -> None:
        if prompt_length == 0:
            raise ValueError("the prompt has no tokens")
        if self.max_positions is not None and prompt_length + num_new_tokens > self.max_positions:
            raise ValueError(
                f"prompt of {prompt_length} tokens and up to {num_new_tokens} new ones exceed the model's "
                f"{self.max_positions} positions"
            )


def _select(cache: Any, rows: list[int]) -> Any:
    """Make row i of `cache` its former row `rows[i]`, in place; any number of rows, repeats allowed."""
    device = next(layer.keys.device for layer in cache.layers if getattr(layer, "keys", None) is not None)
    cache.reorder_cache(torch.tensor(rows, device=device))
    return cache


def _repeat(cache: Any, count: int) -> Any:
    """A cache with `count` copies of the one row of `cache`, which stays as it is."""
    return _select(deepcopy(cache), [0] * count)


def _log_softmax(logits: torch.Tensor) -> Any:
    """[V] to float64 log-probs on the host."""
    values = logits.double().cpu().numpy()
    largest = values.max()
    if not np.isfinite(largest):
        raise ValueError("the model's logits are not finite; check the weights and the dtype")
    shifted = values - largest
    return shifted - np.log(np.exp(shifted).sum())


def _eos_ids(model: Any, tokenizer: Any) -> frozenset[int]:
    """Every id that ends a sequence: the tokenizer's, the model's and its generation config's."""
    found: set[int] = set()
    configs = (tokenizer, model.config, getattr(model, "generation_config", None))
    for holder in configs:
        value = getattr(holder, "eos_token_id", None)
        found.update(value if isinstance(value, list | tuple) else [] if value is None else [value])
    return frozenset(found)
