"""selective_linear_logprob, the dense drop-in, against full logits, log_softmax and gather in fp64.

B rows, L positions, E hidden, V vocabulary; labels are shifted already.
"""

import pytest
import torch

from cpo_kernels import selective_linear_logprob


@pytest.mark.parametrize("use_mask", [False, True])
def test_selective_equals_dense_log_softmax_and_skips_ignored_tokens(use_mask: bool) -> None:
    generator = torch.Generator().manual_seed(29)
    hidden = torch.randn(3, 7, 16, generator=generator, dtype=torch.float64)
    weight = torch.randn(50, 16, generator=generator, dtype=torch.float64)
    labels = torch.randint(50, (3, 7), generator=generator)
    keep = torch.rand(3, 7, generator=generator) > 0.4
    expected_leaf, leaf = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    logps = (expected_leaf @ weight.T).log_softmax(-1).gather(2, labels[..., None]).squeeze(2)
    want = torch.where(keep, logps, torch.zeros((), dtype=torch.float64))
    given = labels if use_mask else labels.masked_fill(~keep, -100)
    got = selective_linear_logprob(leaf, weight, given, mask=keep if use_mask else None)
    assert got.shape == (3, 7)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    assert torch.equal(got == 0, ~keep)
    upstream_weight = torch.randn(3, 7, generator=generator, dtype=torch.float64)
    (want * upstream_weight).sum().backward()
    (got * upstream_weight).sum().backward()
    torch.testing.assert_close(leaf.grad, expected_leaf.grad, rtol=1e-11, atol=1e-11)
    skipped_rows = ~keep
    assert torch.equal(leaf.grad[skipped_rows], torch.zeros_like(leaf.grad[skipped_rows]))


def test_selective_with_both_mask_and_ignored_labels_and_nothing_left() -> None:
    hidden = torch.randn(2, 3, 8, requires_grad=True)
    weight = torch.randn(11, 8)
    labels = torch.tensor([[1, -100, 2], [3, 4, -100]])
    mask = torch.tensor([[True, True, False], [False, True, True]])
    got = selective_linear_logprob(hidden, weight, labels, mask=mask)
    assert (got != 0).tolist() == [[True, False, False], [False, True, False]]
    nothing = selective_linear_logprob(hidden, weight, torch.full((2, 3), -100))
    assert torch.equal(nothing, torch.zeros(2, 3))
    nothing.sum().backward()
    assert torch.equal(hidden.grad, torch.zeros_like(hidden))
