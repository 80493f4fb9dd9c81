"""A greedy chain through the search engine, line by line: what one question costs when it is asked alone.

The chain is that of `greedy`, and of `generate`, token for token: the same largest logits, stopped by the same reader.
The engine that grows the trees is used so that seconds of a chain and of a tree compare: both read the few-shot prompt
from one cache and pay the same cost a token. The reference engine prefills the lines before
again for each line, and on a CPU fills one row up to a few.
"""

import time
from collections.abc import Sequence
from typing import Any

from cpo_fast.evaluate.chain import Chain, ChainReader
from cpo_fast.search.engine import Ask, Engine, Request, Sample
from cpo_fast.tasks import Task


def engine_chain(
    engine: Engine, tokenizer: Any, prompt: Sequence[int], task: Task, max_new_tokens: int, max_steps: int
) -> Chain:
    """One greedy chain.

    Args:
        engine: continues a prompt by one line, greedily at temperature 0.
        tokenizer: its tokenizer.
        prompt: token ids, at least one.
        task: says what an answer line is.
        max_new_tokens: cap on the chain.
        max_steps: cap on its lines, the answer line included.

    Raises:
        ValueError: a cap is below 1; from the engine, a prompt that does not fit the model, or logits not finite.
    """
    if min(max_new_tokens, max_steps) < 1:
        raise ValueError(f"expected caps >= 1, got {max_new_tokens=}, {max_steps=}")
    start = time.perf_counter()
    reader = ChainReader(tokenizer, task, max_steps, max_new_tokens)
    while reader.stop is None:
        state = (*prompt, *reader.token_ids)
        num_left = max_new_tokens - len(reader.token_ids)
        # greedy: no random number is drawn, so the name does not matter
        (line,) = engine.answer(Ask((Request(state, "greedy", 0.0, 1.0, num_left),), keep=True))
        assert isinstance(line, Sample), "a request is answered by a sample"
        for token in line.token_ids:
            reader.add(token)
        if line.stop == "eos":
            reader.end_sequence()
    return reader.chain(time.perf_counter() - start)
