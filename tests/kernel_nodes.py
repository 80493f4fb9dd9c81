"""Counts the kernels that a computation launches on a GPU, without one: on tensors of the meta device, which hold nothing.

Every call of an operator that is no view and no allocation counts as one kernel, and so does every launch of Triton,
which does not run. A node of a CUDA graph is a kernel, so a recorded step has as many nodes (a sort, a scan or a product
that the library cuts in parts has a few more).
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.jit import JITFunction

NO_KERNEL = {"empty", "empty_like", "empty_strided", "new_empty", "detach", "lift_fresh", "_unsafe_view"}


class _Operators(TorchDispatchMode):
    def __init__(self, nodes: Counter[str]) -> None:
        super().__init__()
        self._nodes = nodes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operator and count it."""
        name = func._schema.name.partition("::")[2]
        is_view = any(one.alias_info is not None and not one.alias_info.is_write for one in func._schema.returns)
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor | tuple | list) and not is_view and name not in NO_KERNEL:
            self._nodes[name] += 1  # else the answer to a question of Python's, as which dtype two promote to
        return result


@contextmanager
def kernel_nodes() -> Iterator[Counter[str]]:
    """The kernels that are launched inside, by the name of operator or Triton function. Nothing may need a gradient."""
    nodes: Counter[str] = Counter()

    def launch(kernel: Any, *args: Any, **kwargs: Any) -> None:
        nodes[f"triton {kernel.fn.__name__}"] += 1

    with pytest.MonkeyPatch.context() as patch, _Operators(nodes):
        patch.setattr(JITFunction, "run", launch)
        yield nodes
