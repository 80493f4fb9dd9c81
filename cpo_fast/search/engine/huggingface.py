"""The reference engine: a stock Hugging Face model, its own KV cache, batched over the samples of one state.

A state is prefilled once, unpadded, on top of the cached few-shot prefix. Its cache is then repeated for the samples,
which decode together until a newline, end-of-sequence or the cap. A result depends on its own request only, as long as the
libraries below treat the rows of a batch alike. On a CPU in float32 they do: measured, tokens and log-probs are the same
bits for any batch and any number of threads. A GPU library may choose another kernel for another number of rows, and there
equal results are promised for equal `batch_size` only.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from itertools import groupby
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from cpo_fast.search.engine.requests import (
    EMPTY_SAMPLE,
    Answer,
    AnswerCache,
    R,
    Requests,
    Sample,
    SampleRequest,
    ScoreRequest,
    Search,
    check_length,
    run_searches,
)
from cpo_fast.search.engine.sampler import choose_token, log_probs, uniforms
from cpo_fast.search.engine.stopping import StopChecker
from cpo_fast.tree import Stop

# a CPU matrix library sums a row in another order where a thread is left with fewer than four rows: measured for float32
# on 1 to 6 threads, of 1 to 256 rows 1, 2, 3, 5, 6, 7, 9, 10 and 11 differ, and no multiple of four does
ROW_MULTIPLE = 4


class HuggingFaceEngine:
    """Samples lines and scores labels with a causal language model.

    Args:
        model, tokenizer: `transformers` or PEFT model with a language-model head. Set to eval mode here.
        batch_size: at most so many samples per forward (filled up to a multiple of `ROW_MULTIPLE`).
        stop_checker: says when a line ends. None is newline and end-of-sequence.
    """

    def __init__(self, model: Any, tokenizer: Any, batch_size: int, stop_checker: StopChecker | None = None) -> None:
        self.model = model.eval()
        self.batch_size = batch_size
        self.max_positions: int | None = getattr(model.config, "max_position_embeddings", None)
        self._stop_checker = stop_checker or StopChecker(model, tokenizer)
        self._num_thoughts = self._num_tokens = 0
        self._prefixes: list[tuple[tuple[int, ...], Any]] = []

    @torch.inference_mode()
    def cache_prefix(self, token_ids: Sequence[int]) -> None:
        """Prefill these ids once and keep their KV. Prompts that start with them, and go on, reuse it."""
        prefix = tuple(token_ids)
        if prefix and all(prefix != known for known, _ in self._prefixes):
            self._prefixes.append((prefix, self._forward(self._tensor([prefix]), None)[1]))
            self._prefixes.sort(key=lambda entry: -len(entry[0]))  # the longest that fits is found first

    def answer(self, requests: Requests) -> list[Answer]:
        # nothing but the shared prefixes is kept between calls, whatever `requests.keep` says
        wanted = [item for item in requests.items if isinstance(item, SampleRequest)]
        samples = iter(self.sample(wanted))
        self._num_thoughts += len(wanted) * requests.keep
        return [
            self.score(item.token_ids, item.continuations) if isinstance(item, ScoreRequest) else next(samples)
            for item in requests.items
        ]

    def counts(self) -> tuple[int, int]:
        """Thoughts and tokens generated so far, for whoever watches."""
        return self._num_thoughts, self._num_tokens

    def run(
        self, searches: Iterable[tuple[str, Search[R]]], cache: AnswerCache | None = None
    ) -> Iterator[tuple[str, R | Exception, float]]:
        return run_searches(self, searches, cache)

    @torch.inference_mode()
    def sample(self, requests: Sequence[SampleRequest]) -> list[Sample]:
        """One line per request, in order. Consecutive requests with the same prompt share its prefill.

        Raises:
            ValueError: an empty prompt, a prompt too long for the model, or logits that are not finite.
        """
        samples: list[Sample] = []
        # a state a forward: left padding would group the sums in attention by the longest neighbour, which changes tokens
        for prompt, group in groupby(requests, key=lambda request: request.token_ids):
            rows = list(group)
            check_length(len(prompt), max(request.max_new_tokens for request in rows), self.max_positions)
            found: list[Sample] = []
            if wanted := [row for row in rows if row.max_new_tokens > 0]:
                logits, cache = self._prefill(prompt)
                for start in range(0, len(wanted), self.batch_size):
                    found.extend(self._decode(wanted[start : start + self.batch_size], logits[0, -1], cache))
            new = iter(found)
            samples.extend(next(new) if row.max_new_tokens > 0 else EMPTY_SAMPLE for row in rows)
        return samples

    @torch.inference_mode()
    def score(self, token_ids: Sequence[int], continuations: Sequence[Sequence[int]]) -> list[float]:
        """Natural log-prob of each whole continuation, float64 sums of float64 log-softmax.

        One forward when every continuation is one token. A second one over the rest of the longer ones otherwise.

        Raises:
            ValueError: an empty prompt, a prompt too long for the model, or logits that are not finite.
        """
        longest = max((len(continuation) for continuation in continuations), default=0)
        check_length(len(token_ids), longest, self.max_positions)
        if longest == 0:
            return [0.0] * len(continuations)
        logits, cache = self._prefill(tuple(token_ids))
        first = log_probs(_on_host(logits[0, -1]))
        sums = [first[continuation[0]] if continuation else 0.0 for continuation in continuations]
        if longest > 1:
            # right padding is invisible to the tokens before it. Its own rows are not read
            inputs = [[*item[:-1], *[0] * (longest - 1 - len(item[:-1]))] for item in continuations]
            rest, _ = self._forward(self._tensor(inputs), _repeat(cache, len(inputs)), keep=0)
            for row, continuation in enumerate(continuations):
                for position, token in enumerate(continuation[1:]):
                    sums[row] += log_probs(_on_host(rest[row, position]))[token]
        return [float(value) for value in sums]

    def _prefill(self, prompt: tuple[int, ...]) -> tuple[torch.Tensor, Any]:
        """Logits [1, 1, V] after the prompt, and its cache of one row."""
        for prefix, cache in self._prefixes:
            # longer: the logits after the prefix itself are not kept
            if len(prompt) > len(prefix) and prompt[: len(prefix)] == prefix:
                # a copy, because a forward lets the cache grow in place
                return self._forward(self._tensor([prompt[len(prefix) :]]), deepcopy(cache))
        return self._forward(self._tensor([prompt]), None)

    def _decode(self, requests: list[SampleRequest], logits: torch.Tensor, cache: Any) -> list[Sample]:
        """Samples of one state side by side. `logits` [V] after the prompt. `cache` one row, left unchanged."""
        lines = [_Line(request) for request in requests]
        active = list(range(len(lines)))  # indices into lines, one per row that is still read
        rows = logits.float().expand(len(lines), -1)
        past: Any = None
        num_rows = 0
        for _ in range(max(request.max_new_tokens for request in requests)):
            values = _on_host(rows)  # [rows, V] float64
            for row, index in enumerate(active):
                if lines[index].stop is None:
                    lines[index].append(values[row], self._stop_checker)
                    self._num_tokens += 1
            running = [row for row, index in enumerate(active) if lines[index].stop is None]
            if not running:
                break
            if past is None or (len(running) <= num_rows // 2 and num_rows > ROW_MULTIPLE):
                # only running rows go on, filled up with copies of the last. Copies are computed and not read
                picked = running + [running[-1]] * (-len(running) % ROW_MULTIPLE)
                past = _repeat(cache, len(picked)) if past is None else _select(past, picked)
                active = [active[row] for row in running]
                num_rows = len(picked)
            # rows that have finished since go on too, and their logits are ignored
            last = [lines[index].generated[-1] if lines[index].generated else 0 for index in active]
            last += [last[-1]] * (num_rows - len(last))
            with self._plain_attention():
                rows = self._forward(self._tensor([[token] for token in last]), past)[0][: len(active), -1]
        text = self._stop_checker.text
        return [
            Sample(tuple(line.generated), text(line.generated), line.stop or "length", tuple(line.logps))
            for line in lines
        ]

    def _plain_attention(self) -> AbstractContextManager[None]:
        # torch's fused CPU attention gives other last bits to the rows of other threads
        on_cpu = self.model.device.type == "cpu"
        return sdpa_kernel(SDPBackend.MATH) if on_cpu else nullcontext()

    def _forward(self, input_ids: torch.Tensor, cache: Any, keep: int = 1) -> tuple[torch.Tensor, Any]:
        """Logits of the last `keep` positions (0: all) and the cache, which grows in place when given."""
        output = self.model(input_ids=input_ids, past_key_values=cache, use_cache=True, logits_to_keep=keep)
        return output.logits, output.past_key_values

    def _tensor(self, rows: Sequence[Sequence[int]]) -> torch.Tensor:
        return torch.tensor([list(row) for row in rows], dtype=torch.long, device=self.model.device)


class _Line:
    """A line while it is sampled."""

    def __init__(self, request: SampleRequest) -> None:
        self.generated: list[int] = []
        self.logps: list[float] = []
        self.stop: Stop | None = None
        self._request = request
        self._uniforms = uniforms(request.uid, request.max_new_tokens)

    def append(self, logits: Any, stop_checker: StopChecker) -> None:
        """Sample the next token from `logits` [V] float64."""
        request = self._request
        uniform = float(self._uniforms[len(self.generated)])
        # joined for a penalty only: a prompt is long
        seen = (*request.token_ids, *self.generated) if request.repetition_penalty != 1 else ()
        token = choose_token(
            logits, uniform, request.temperature, request.top_p, request.top_k, request.repetition_penalty, seen
        )
        self.logps.append(float(log_probs(logits)[token]))
        self.stop = stop_checker.append(token, self.generated, request)


def _select(cache: Any, rows: list[int]) -> Any:
    """Make row i of `cache` its former row `rows[i]`, in place. Any number of rows, repeats allowed."""
    device = next(layer.keys.device for layer in cache.layers if getattr(layer, "keys", None) is not None)
    cache.reorder_cache(torch.tensor(rows, device=device))
    return cache


def _repeat(cache: Any, count: int) -> Any:
    """A cache with `count` copies of the one row of `cache`, which stays as it is."""
    return _select(deepcopy(cache), [0] * count)


def _on_host(logits: torch.Tensor) -> Any:
    return logits.double().cpu().numpy()  # [..., V] float64
