"""The KV arena: keys and values of every cached token in one tensor, each node's tokens in one piece.

    storage [L, 2, C, Hkv, D]      layer, key or value, arena row, key head, element

A node of the prompt trie and a row that is being generated each own one contiguous interval of the C rows; there are no
pages and no block tables. Permanent intervals (few-shot and evaluator prompts) are handed out from the left and stay;
intervals of questions and of scratch come from what is left, first fit, and merge with their neighbours when they are
given back. The last row is nobody's: rows of a forward that only fill it up write there.
"""

from typing import Any

import torch

CPU_SHARE = 0.25  # of the memory that is free on a CPU, where the arena has no device of its own
CUDA_SHARE = 0.8  # the rest is for the activations of a prefill and the logits of a wave
MAX_DEFAULT_TOKENS = 1 << 20  # more than 16 questions with 50 states a level ever hold


class Arena:
    """Rows of keys and values, allocated in contiguous intervals.

    Args:
        config: a model's text configuration: layers, key heads and head size.
        num_tokens: C - 1, how many tokens fit.
        dtype, device: of the storage; those of the model's keys.

    Attributes:
        num_tokens: as given.
        dump_row: the arena row of fill-up queries.
        layers: (keys, values) of each layer, views [C, Hkv, D] of the storage.
        bytes_per_token: over all layers.
    """

    def __init__(self, config: Any, num_tokens: int, dtype: torch.dtype, device: torch.device) -> None:
        heads, head_dim = kv_shape(config)
        self.num_tokens = num_tokens
        self.dump_row = num_tokens
        storage = torch.empty(config.num_hidden_layers, 2, num_tokens + 1, heads, head_dim, dtype=dtype, device=device)
        storage[:, :, self.dump_row] = 0
        self.layers = [(layer[0], layer[1]) for layer in storage]
        self.bytes_per_token = kv_bytes_per_token(config, dtype)
        self._free: list[tuple[int, int]] = [(0, num_tokens)]  # (start, stop), ascending, never adjacent

    @property
    def num_free(self) -> int:
        """Rows that nobody owns; the largest interval may be smaller."""
        return sum(stop - start for start, stop in self._free)

    def allocate(self, count: int) -> int | None:
        """First row of a free interval of `count` >= 1 rows, now owned; None where no free interval is large enough."""
        for index, (start, stop) in enumerate(self._free):
            if stop - start >= count:
                if stop - start == count:
                    del self._free[index]
                else:
                    self._free[index] = (start + count, stop)
                return start
        return None

    def release(self, start: int, count: int) -> None:
        """Give back an interval that `allocate` returned."""
        stop = start + count
        index = next((i for i, (first, _) in enumerate(self._free) if first >= stop), len(self._free))
        if index < len(self._free) and self._free[index][0] == stop:
            stop = self._free.pop(index)[1]
        if index > 0 and self._free[index - 1][1] == start:
            start = self._free.pop(index - 1)[0]
            index -= 1
        self._free.insert(index, (start, stop))


def kv_shape(config: Any) -> tuple[int, int]:
    """Key heads and head size of a model's text configuration."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return heads, getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def kv_bytes_per_token(config: Any, dtype: torch.dtype) -> int:
    """Bytes of one token's keys and values over all layers."""
    heads, head_dim = kv_shape(config)
    return int(config.num_hidden_layers * 2 * heads * head_dim * dtype.itemsize)


def default_num_tokens(config: Any, dtype: torch.dtype, device: torch.device) -> int:
    """How many tokens the arena holds when the configuration does not say: a share of the memory that is free now."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # held by torch, in no tensor
        free = int((torch.cuda.mem_get_info(device)[0] + unused) * CUDA_SHARE)
    else:
        import psutil  # type: ignore[import-untyped]  # comes with DeepSpeed and accelerate

        free = int(psutil.virtual_memory().available * CPU_SHARE)
    return max(1, min(MAX_DEFAULT_TOKENS, free // kv_bytes_per_token(config, dtype)))
