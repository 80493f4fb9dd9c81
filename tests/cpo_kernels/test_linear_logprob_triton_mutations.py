"""Known ways to get linear_logprob's kernels wrong, each made on purpose: the bounds of the claims must see every one.

Run as `test_linear_logprob_triton` says.
"""

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.cpo_kernels.test_linear_logprob_triton import (  # noqa: F401  (the fixture acts by being here)
    _poisoned_memory,
    claim,
    confident_error,
    crowded,
    excess,
)


def without_last_split(original: Callable[..., Any]) -> Callable[..., Any]:
    def wrong(num_tiles: int, programs: int) -> tuple[int, int]:
        splits, tiles = original(num_tiles, programs)
        return splits - 1, tiles

    return wrong


def targets_left_in(original: Callable[..., Any]) -> Callable[..., Any]:
    """The scale is not the point: any weight of a target's own row in the expected embedding must be seen."""

    def wrong(logits: torch.Tensor, *others: Any) -> torch.Tensor:
        probabilities = original(logits, *others)
        return torch.where(logits.isinf(), probabilities.amax(), probabilities)

    return wrong


def with_argument(index: int, change: Callable[[Any], Any]) -> Callable[..., Any]:
    """The function with its positional argument `index` changed."""

    def mutate(original: Callable[..., Any]) -> Callable[..., Any]:
        def wrong(*arguments: Any) -> Any:
            changed = list(arguments)
            changed[index] = change(changed[index])
            return original(*changed)

        return wrong

    return mutate


MUTATIONS: dict[str, tuple[str, str, Callable[..., Any]]] = {
    "none": ("partials", "splits", lambda original: original),
    "last split skipped": ("fused", "splits", without_last_split),
    "target column not excluded": ("triton_scores", "conditional_probabilities", targets_left_in),
    "targets of the neighbouring row": ("triton_scores", "row_gradients", with_argument(4, lambda w: w.roll(1, 0))),
    "rest left out": ("triton_scores", "row_gradients", with_argument(2, torch.zeros_like)),
    "upstream of the row's others left out": ("triton_scores", "row_gradients", with_argument(1, lambda x: x - 30.0)),
    "last split of stored logits skipped": ("chunk", "splits", without_last_split),
    "slope of the soft-cap left out": ("triton_scores", "row_gradients", with_argument(5, torch.ones_like)),
    "bias forgotten": ("triton_scores", "chunk_scores", with_argument(1, lambda bias: None)),
}


@claim
@pytest.mark.parametrize("name", MUTATIONS)
def test_mutation_is_seen(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, function, mutate = MUTATIONS[name]
    place = importlib.import_module(f"cpo_kernels.linear_logprob.{module}")
    case = crowded(1300, num_rows=9, bias=True, softcap=20.0)
    monkeypatch.setattr(place, function, mutate(getattr(place, function)))
    ratios = excess(case, torch.float32)
    assert (max(ratios.values()) > 100) == (name != "none"), ratios
    assert max(ratios.values()) <= 1 or name != "none", ratios


@claim
def test_rest_as_one_minus_the_log_prob_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    from cpo_kernels.linear_logprob import triton as triton_scores

    original = triton_scores.row_gradients

    def wrong(grad: torch.Tensor, logps: torch.Tensor, rest: torch.Tensor, *others: Any) -> torch.Tensor:
        return original(grad, logps, 1 - logps.exp(), *others)  # one target a row in this case

    monkeypatch.setattr(triton_scores, "row_gradients", wrong)
    assert confident_error() > 5e-3
