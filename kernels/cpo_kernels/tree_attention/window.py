"""A sliding window over a forest: counted in depth on a row's own path, because siblings stand between rows."""

from typing import NamedTuple

import torch


class Window(NamedTuple):
    """A row sees those of its ancestors that are less than `size` tokens above it, itself included."""

    depths: torch.Tensor  # [T] integer, each row's place on its own path
    size: int

    def hides(self, queries: slice, keys: slice) -> torch.Tensor:
        """[queries, keys] bool, True where a key is too far above a query."""
        return self.depths[queries, None] - self.depths[None, keys] >= self.size
