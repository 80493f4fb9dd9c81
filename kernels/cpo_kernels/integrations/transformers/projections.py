"""Projections of one input as one product: q, k and v, and gate and up.

    x [.., E]   W = [Wq; Wk; Wv]   ->   x W^T, of which each projection's output is some columns

The modules stay: each keeps its `weight` and `bias`, which become views of one storage, so state dicts, adapters, merging
and in-place changes are what they were. The first projection of a group multiplies for all of them. The others hand out
their columns if they are called with the same tensor. Only forwards without gradients do so.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear

# children of one module that read the same input, in the order in which it calls them
GROUPS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


class MergedLinear(nn.Linear):
    """A linear layer whose weight is some rows of its group's. `merge_projections` makes it of one that exists."""

    group: "_Group"
    place: int

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[.., out], a view of the whole group's output where that was computed."""
        output = self.group.output(self.place, input)
        return super().forward(input) if output is None else output


class _Group:
    """The layers of a group, their common storage, and the product that is being handed out."""

    def __init__(self, layers: Sequence[MergedLinear]) -> None:
        self._layers = tuple(layers)
        self._sizes = [layer.out_features for layer in layers]
        self._weight = _one_storage([layer.weight for layer in layers])
        biases = [layer.bias for layer in layers if layer.bias is not None]
        self._bias = _one_storage(biases) if biases else None
        self._last: tuple[torch.Tensor, tuple[torch.Tensor, ...]] | None = None  # the input and all outputs

    def output(self, place: int, x: torch.Tensor) -> torch.Tensor | None:
        """The output of one layer, or None where it must multiply alone."""
        if torch.is_grad_enabled():
            return None  # the storage takes no gradient
        if place == 0:
            if not self._is_whole():
                return None
            self._last = (x, linear(x, self._weight, self._bias).split(self._sizes, dim=-1))
        last = self._last  # read once: another thread may put its own in place
        if last is None or last[0] is not x:
            return None
        if place == len(self._layers) - 1:
            self._last = None
        return last[1][place]

    def _is_whole(self) -> bool:
        """Whether every layer still has its rows of the storage: a move or a cast of the model gives it others."""
        offset = 0
        for layer in self._layers:
            parts = [(layer.weight, self._weight, offset * layer.in_features)]
            if self._bias is not None:
                parts.append((layer.bias, self._bias, offset))
            for part, whole, first in parts:
                # by storage, since on the meta device every address is 0
                if part.untyped_storage()._cdata != whole.untyped_storage()._cdata or part.storage_offset() != first:
                    return False
            offset += layer.out_features
        return True


def merge_projections(model: nn.Module) -> int:
    """Lay the projections of one input out in one storage, in place, wherever layers of a group fit together.

    Left as they are: layers of another class than `torch.nn.Linear` (quantised ones), of several dtypes or devices, some
    with a bias and some without, with hooks, or whose weight somebody else holds too. LoRA layers around them stay.

    Returns:
        How many groups are one product now, those that were before included.
    """
    holders: dict[int, int] = {}  # modules by the weight that they hold
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            holders[id(parameter)] = holders.get(id(parameter), 0) + 1
    num_merged = 0
    for module in list(model.modules()):
        for names in GROUPS:
            children: list[Any] = [getattr(module, name, None) for name in names]
            layers = [getattr(child, "base_layer", child) for child in children]
            if all(type(layer) is MergedLinear for layer in layers):
                num_merged += 1
            elif all(type(layer) is nn.Linear for layer in layers) and _fit_together(layers, holders):
                for place, layer in enumerate(layers):
                    layer.__class__ = MergedLinear
                    layer.place = place
                group = _Group(layers)
                for layer in layers:
                    layer.group = group
                num_merged += 1
    return num_merged


def _fit_together(layers: Sequence[nn.Linear], holders: dict[int, int]) -> bool:
    parameters = [parameter for layer in layers for parameter in layer.parameters(recurse=False)]
    kinds = {(layer.in_features, layer.bias is None) for layer in layers}
    places = {(parameter.dtype, parameter.device) for parameter in parameters}
    plain = all(
        type(parameter) is nn.Parameter and holders[id(parameter)] == 1 and parameter.is_contiguous()
        for parameter in parameters
    )
    hooked = any(layer._forward_hooks or layer._forward_pre_hooks or "forward" in vars(layer) for layer in layers)
    return len(kinds) == 1 and len(places) == 1 and plain and not hooked and parameters[0].is_floating_point()


def _one_storage(parameters: Sequence[torch.Tensor]) -> torch.Tensor:
    """Copy parameters into one tensor, one below the other, and make each a view of it."""
    with torch.no_grad(), torch.inference_mode(False):
        whole = torch.cat([parameter.detach() for parameter in parameters])
        parts = whole.split([len(parameter) for parameter in parameters])
        for parameter, part in zip(parameters, parts, strict=True):
            parameter.data = part
    return whole
