"""Known ways to get linear_logprob's kernels wrong, each made on purpose: the bounds of the claims must see every one."""

import importlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.cpo_kernels.kernel_device import runs_kernels
from tests.cpo_kernels.test_linear_logprob_triton import (  # noqa: F401  (the fixture acts by being here)
    _poisoned_memory,
    confident_error,
    crowded,
    excess,
)


def without_last_split(original: Callable[..., Any]) -> Callable[..., Any]:
    def wrong(*sizes: int) -> tuple[int, int]:
        splits, tiles = original(*sizes)
        return splits - 1, tiles

    return wrong


def targets_left_in(original: Callable[..., Any]) -> Callable[..., Any]:
    """The scale is not the point: any weight of a target's own row in the expected embedding must be seen."""

    def wrong(logits: torch.Tensor, *others: Any) -> torch.Tensor:
        probabilities = original(logits, *others)
        return torch.where(logits.isinf(), probabilities.amax(), probabilities)

    return wrong


def without_bias(original: Callable[..., Any]) -> Callable[..., Any]:
    return lambda products, head, *others: original(products, replace(head, bias=None), *others)


def with_scores(**changes: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., Any]:
    """The gradient of rows from scores of which these fields are changed."""

    def mutate(original: Callable[..., Any]) -> Callable[..., Any]:
        def wrong(grad: torch.Tensor, scores: Any, plan: Any) -> torch.Tensor:
            changed = {name: change(getattr(scores, name)) for name, change in changes.items()}
            return original(grad, scores._replace(**changed), plan)

        return wrong

    return mutate


# module, function, mutation
MUTATIONS: dict[str, tuple[str, str, Callable[..., Any]]] = {
    "none": ("triton_sums", "splits", lambda original: original),
    "last split skipped": ("triton_fused", "splits", without_last_split),
    "target column not excluded": ("triton", "conditional_probabilities", targets_left_in),
    "targets of the neighbouring row": ("triton", "row_gradients", with_scores(target_weights=lambda w: w.roll(1, 0))),
    "rest left out": ("triton", "row_gradients", with_scores(rest=torch.zeros_like)),
    "upstream of the row's others left out": ("triton", "row_gradients", with_scores(logps=lambda x: x - 30.0)),
    "last split of stored logits skipped": ("triton_chunked", "splits", without_last_split),
    "slope of the soft-cap left out": ("triton", "row_gradients", with_scores(slopes=torch.ones_like)),
    "bias forgotten": ("triton", "chunk_scores", without_bias),
}


@runs_kernels
@pytest.mark.parametrize("name", MUTATIONS)
def test_mutation_is_seen(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, function, mutate = MUTATIONS[name]
    place = importlib.import_module(f"cpo_kernels.linear_logprob.{module}")
    case = crowded(1300, num_rows=4, bias=True, softcap=20.0)
    monkeypatch.setattr(place, function, mutate(getattr(place, function)))
    ratios = excess(case, torch.float32)
    assert (max(ratios.values()) > 100) == (name != "none"), ratios
    assert max(ratios.values()) <= 1 or name != "none", ratios


@runs_kernels
def test_rest_as_one_minus_the_log_prob_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    from cpo_kernels.linear_logprob import triton

    original = triton.row_gradients

    def wrong(grad: torch.Tensor, scores: Any, plan: Any) -> torch.Tensor:
        return original(grad, scores._replace(rest=1 - scores.logps.exp()), plan)  # one target a row in this case

    monkeypatch.setattr(triton, "row_gradients", wrong)
    assert confident_error() > 5e-3
