"""Rotary position encoding left to the attention op, which rotates as it stores the keys: one kernel instead of ten.

    stock      q, k -> apply_rotary_pos_emb (ten kernels) -> attention function
    deferred   q, k -> apply_rotary_pos_emb hands them through and notes cos, sin -> attention function rotates

A model's attention calls `apply_rotary_pos_emb` by its name in the module that defines it. `defer_rotation` puts a wrapper
there, once, which is the original function except inside `deferred_rotation`. Where that function is another one than the
op computes (interleaved pairs, a part of the head), the model is left as it is.
"""

import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn

from cpo_kernels.tree_decode.rotation import rotate

FUNCTION = "apply_rotary_pos_emb"
Rotated = tuple[torch.Tensor, torch.Tensor]


class DeferredRotation:
    """What one forward has still to rotate: at most one layer's queries and keys.

    Args:
        head_dims: head sizes of the arena's layers. Heads of others are a part of what attends, and rotated at once.
    """

    def __init__(self, head_dims: Collection[int]) -> None:
        self.head_dims = head_dims
        self._pending: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor] | None = None

    def put(self, query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
        """Note a layer's queries and keys [1, .., N, D], handed through as they are, and their tables [1, N, D]."""
        self._pending = (query, key, cos, sin)

    def take(self, query: torch.Tensor, key: torch.Tensor) -> Rotated | None:
        """Tables [N, D] by which the attention function must rotate these. None: they are rotated already.

        Raises:
            RuntimeError: the model changed queries or keys between the rotation and its attention function.
        """
        pending, self._pending = self._pending, None
        if pending is None:
            return None
        if pending[0] is not query or pending[1] is not key:
            raise RuntimeError(
                "tree_decode: this model changes queries or keys after their rotation, which cannot be left to the "
                "attention then; set CPO_KERNELS_IMPL=eager to search without it"
            )
        return pending[2][0], pending[3][0]


_current: ContextVar[DeferredRotation | None] = ContextVar("deferred_rotation", default=None)


@contextmanager
def deferred_rotation(head_dims: Collection[int]) -> Iterator[DeferredRotation]:
    """Hand whole queries and keys through unrotated in this block, in the calls of this thread."""
    rotation = DeferredRotation(head_dims)
    token = _current.set(rotation)
    try:
        yield rotation
    finally:
        _current.reset(token)


def defer_rotation(model: nn.Module) -> bool:
    """Prepare every layer of a model for `deferred_rotation`.

    Returns:
        Whether all layers can leave the rotation to their attention function. False changes nothing.
    """
    places = {
        type(module).__module__
        for module in model.modules()
        if hasattr(module, "layer_idx") and hasattr(module, "q_proj")
    }
    functions = {place: getattr(sys.modules[place], FUNCTION, None) for place in places}
    if not functions or not all(_is_known(function) for function in functions.values()):
        return False
    for place, function in functions.items():
        if function is not None and not isinstance(function, RotationWrapper):
            setattr(sys.modules[place], FUNCTION, RotationWrapper(function))
    return True


class RotationWrapper:
    """A model's own function, unless the rotation is left to the attention function."""

    def __init__(self, original: Callable[..., Rotated]) -> None:
        self.original = original
        self.__doc__ = original.__doc__

    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *args: Any, **kwargs: Any
    ) -> Rotated:
        rotation = _current.get()
        if rotation is None or args or kwargs or cos.ndim != 3 or cos.shape[::2] != (1, q.shape[-1]):
            return self.original(q, k, cos, sin, *args, **kwargs)
        if q.shape[-1] not in rotation.head_dims:
            return self.original(q, k, cos, sin, *args, **kwargs)
        rotation.put(q, k, cos, sin)
        return q, k


def _is_known(function: Any) -> bool:
    """Whether a function computes what `rotate` does. Random tables show a pairing of other elements."""
    if isinstance(function, RotationWrapper):
        return True
    if not callable(function):
        return False
    generator = torch.Generator().manual_seed(0)
    q, k, cos, sin = (torch.randn(1, heads, 5, 8, dtype=torch.float64, generator=generator) for heads in (3, 2, 1, 1))
    try:
        found = function(q, k, cos[0], sin[0])
    except Exception:  # another signature, which says enough
        return False
    return len(found) == 2 and all(
        one.shape == x.shape
        and torch.allclose(one[0].transpose(0, 1), rotate(x[0].transpose(0, 1), cos[0, 0], sin[0, 0]))
        for one, x in zip(found, (q, k), strict=True)
    )
