"""How far results may differ by rounding, typed once for checks, tests and benchmarks. And a random forest for them.

`end_to_end_bound` is the relative L2 difference allowed between a packed and a padded computation of one model, by dtype.
The two sum in different orders. Per layer that is a few units of the dtype's rounding, and it does not grow beyond these
bounds over the depths that were measured.
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
        magnitude: max abs value of the float64 result. The band is one rounding step at that size.
    """
    return 2.0 * eager_error + torch.finfo(dtype).eps * magnitude


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
