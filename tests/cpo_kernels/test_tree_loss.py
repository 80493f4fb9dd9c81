"""Losses of whole trees as ops on segment sums: derivatives, groups that do not meet, and what is refused.

That they are the papers' formulas is claimed by `tests/train/test_tree_objectives.py`. S segments, G groups.
"""

from collections.abc import Callable
from functools import partial

import pytest
import torch

from cpo_kernels import group_policy_loss, ranking_loss, step_weighted_loss, value_loss, visit_smoothing
from cpo_kernels.tree_loss import group_advantages, group_shares

GROUP, NUM_GROUPS = torch.tensor([0, 2, 0, 1, 2, 0, 1, 2, 0]), 3  # in any order
Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def drawn(seed: int, low: float = 0.0, high: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return low + (high - low) * torch.rand(len(GROUP), generator=generator, dtype=torch.float64)


VALUES, COUNTS, LENGTHS = drawn(1), torch.tensor([1, 3, 2, 1, 1, 1, 4, 2, 1]).double(), drawn(2, 1, 9).round()
CHOSEN = torch.tensor([1, 1, 0, 1, 0, 0, 0, 0, 1], dtype=torch.bool)
LOSSES: dict[str, Loss] = {
    "ranking": partial(ranking_loss, values=VALUES, group=GROUP, num_groups=NUM_GROUPS, beta=0.3),
    "value": partial(value_loss, values=VALUES, counts=COUNTS, group=GROUP, num_groups=NUM_GROUPS, beta=0.3),
    "policy": partial(
        group_policy_loss,
        sampled_logps=drawn(3, -9, -1),
        lengths=LENGTHS,
        values=VALUES,
        counts=COUNTS,
        group=GROUP,
        num_groups=NUM_GROUPS,
        beta=0.3,
    ),
    "steps": partial(
        step_weighted_loss, values=VALUES, chosen=CHOSEN, group=GROUP, num_groups=NUM_GROUPS, beta=0.3, gamma=2.0
    ),
}


@pytest.mark.parametrize("name", LOSSES)
def test_gradient_equals_finite_differences(name: str) -> None:
    logps = drawn(4, -9, -1).requires_grad_()
    assert torch.autograd.gradcheck(lambda each: LOSSES[name](each, drawn(5, -9, -1)), (logps,))


@pytest.mark.parametrize("name", LOSSES)
def test_a_group_that_is_not_finite_leaves_the_others_and_their_gradient_alone(name: str) -> None:
    logps, reference = drawn(4, -9, -1), drawn(5, -9, -1)
    spoilt = torch.where(torch.arange(len(GROUP)) == 3, torch.nan, logps).requires_grad_()  # of group 1
    logps.requires_grad_()
    want, got = LOSSES[name](logps, reference), LOSSES[name](spoilt, reference)
    assert torch.isfinite(got).tolist() == [True, False, True]
    assert torch.equal(got[[0, 2]], want[[0, 2]])
    (wanted,), (found,) = (torch.autograd.grad(x[[0, 2]].sum(), y) for x, y in ((want, logps), (got, spoilt)))
    others = GROUP != 1
    assert torch.equal(found[others], wanted[others])


@pytest.mark.parametrize("name", LOSSES)
def test_tensors_of_other_shapes_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=rf"{LOSSES[name].func.__name__}: expected ref_logps \(9,\), got \(8,\)"):
        LOSSES[name](drawn(4), drawn(5)[:8])


def test_advantages_have_mean_0_and_deviation_1_over_samples_and_equal_values_have_none() -> None:
    values = torch.where(GROUP == 1, 0.5, VALUES)
    shares = group_shares(COUNTS, GROUP, NUM_GROUPS)
    plain = group_advantages(values, shares, GROUP, NUM_GROUPS)
    normalised = group_advantages(values, shares, GROUP, NUM_GROUPS, normalised=True)
    for group in range(NUM_GROUPS):
        members = group == GROUP
        samples = values[members].repeat_interleave(COUNTS[members].long())
        torch.testing.assert_close(plain[members], values[members] - samples.mean())
        expected = (
            (values[members] - samples.mean()) / samples.std(correction=0) if group != 1 else torch.zeros(2).double()
        )
        torch.testing.assert_close(normalised[members], expected)


def test_visits_that_are_equal_or_none_say_nothing_and_lopsided_ones_turn_a_pair() -> None:
    chosen, rejected = torch.tensor([3.0, 2.0, 0.0, 0.0, 1.0]), torch.tensor([1.0, 2.0, 0.0, 5.0, 3.0])
    torch.testing.assert_close(visit_smoothing(chosen, rejected), torch.tensor([0.25, 0.5, 0.5, 1.0, 0.75]))
