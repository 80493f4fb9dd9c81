"""Random forests and error bounds, used by tests and benchmarks alike, so that a bound is typed once.

`end_to_end_bound`: relative L2 difference allowed between a packed and a padded computation of one model, by dtype. The
two sum in different orders; per layer that is a few units of the dtype's rounding, and it does not grow beyond these
over the depths that were measured.
"""

import random

import torch

_END_TO_END_BOUND = {
    torch.float64: 1e-10,
    torch.float32: 1e-4,
    torch.float16: 1e-2,
    torch.bfloat16: 5e-2,
}


def end_to_end_bound(dtype: torch.dtype) -> float:
    """Relative L2 bound between packed and padded results of a model in `dtype`."""
    return _END_TO_END_BOUND[dtype]


def kernel_bound(eager_error: float, dtype: torch.dtype, magnitude: float) -> float:
    """Largest error a kernel may have: twice the same-dtype eager error against float64, plus a rounding band.

    Args:
        eager_error: max abs error of the eager op in `dtype` against float64.
        dtype: dtype of inputs and outputs.
        magnitude: max abs value of the float64 result; the band is one rounding step at that size.
    """
    return 2.0 * eager_error + torch.finfo(dtype).eps * magnitude


def random_sequences(
    seed: int, num_prompts: int = 2, num_sequences: int = 12, vocab_size: int = 50, max_tokens: int = 24
) -> tuple[list[list[int]], list[int]]:
    """Random sequences with shared prefixes at several levels, and the first scored position of each.

    Siblings diverge at their first token as often as later, some are prefixes of others, some are equal, and single-token
    responses occur.
    """
    generator = random.Random(seed)

    def tokens(low: int, high: int) -> list[int]:
        return [generator.randrange(1, vocab_size) for _ in range(generator.randint(low, high))]

    shared = tokens(1, max_tokens)
    contexts = [shared + tokens(1, max_tokens) for _ in range(num_prompts)]
    sequences: list[list[int]] = []
    starts: list[int] = []
    for _ in range(num_sequences):
        context = generator.choice(contexts)
        response = tokens(1, max_tokens)
        if sequences and generator.random() < 0.2:
            response = sequences[-1][starts[-1] :][: generator.randint(1, max_tokens)] or response
        sequences.append(context + response)
        starts.append(len(context))
        if generator.random() < 0.5:
            contexts.append(context + response)
    return sequences, starts


def random_subtree_end(seed: int, num_rows: int, num_padding: int = 0) -> torch.Tensor:
    """Laminar `subtree_end` [num_rows] int32 of a random forest, the last `num_padding` rows padding.

    Depths, arities and run lengths vary, so nodes start at every offset modulo any tile size.
    """
    generator = random.Random(seed)
    ends = list(range(1, num_rows + 1))
    live = num_rows - num_padding
    stack = [(0, live)]  # intervals still to be cut into subtrees
    while stack:
        low, high = stack.pop()
        while low < high:
            end = high if generator.random() < 0.7 else generator.randint(low + 1, high)
            ends[low] = end
            if generator.random() < 0.85:
                low, high_inner = low + 1, end
                if end < high:
                    stack.append((end, high))
                high = high_inner
            else:
                stack.append((low + 1, end))
                low = end
    return torch.tensor(ends, dtype=torch.int32)
