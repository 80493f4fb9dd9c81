"""Models that are built once: to wrap a tiny one by LoRA takes longer than to run it forward and backward."""

import copy
import functools
from collections.abc import Callable

from torch import nn

Builder = Callable[[], nn.Module]


def copies(build: Builder) -> Builder:
    """`build`, called once at most; every model it gives is a copy of its own, which a test may change."""
    original = functools.cache(build)
    return lambda: copy.deepcopy(original())
