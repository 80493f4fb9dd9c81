"""The inputs of the log-prob benchmark are what they are called, and their truth is that of autograd in float64."""

import pytest
import torch

from benchmarks.logprob_case import BETA, CONFIDENT, SEQUENCE_TOKENS, LogprobCase, make_case

T, E, V = 128, 32, 211
CPU = torch.device("cpu")


def case_of(kind: str) -> LogprobCase:
    return make_case(kind, T, E, V, torch.float32, CPU)


def logps(hidden: torch.Tensor, case: LogprobCase) -> torch.Tensor:
    return (hidden @ case.weight.double().T).log_softmax(-1)[case.rows, case.targets]


@pytest.mark.parametrize("kind", ["flat", "many", "confident"])
def test_truth_is_the_gradient_of_the_preference_loss(kind: str) -> None:
    case = case_of(kind)
    leaf = case.hidden.double().requires_grad_()
    ours, theirs = logps(leaf, case), logps(case.ref_hidden.double(), case)
    sums = torch.zeros(T // SEQUENCE_TOKENS, dtype=torch.float64)
    sums = sums.index_add(0, case.rows // SEQUENCE_TOKENS, ours - theirs)
    loss = -torch.nn.functional.logsigmoid(BETA * (sums[0::2] - sums[1::2])).mean()
    (grad,) = torch.autograd.grad(loss, leaf)
    torch.testing.assert_close(case.truth.logps, ours.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(case.truth.ref_logps, theirs, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(case.truth.grad_rows, grad, rtol=1e-5, atol=1e-12)  # upstream is float32


def test_every_confident_target_is_confident_and_none_is_certain() -> None:
    probability = logps(case_of("confident").hidden.double(), case_of("confident")).exp()
    assert float(probability.min()) > CONFIDENT
    assert float(probability.max()) < 1.0


def test_a_tenth_of_the_rows_has_several_targets() -> None:
    counts = torch.bincount(case_of("many").rows, minlength=T)
    assert int((counts > 1).sum()) == T // 10
    assert 2 <= int(counts.max()) <= 8
    assert int(counts.min()) == 1


def test_dense_rows_are_the_scored_ones_among_others() -> None:
    case = case_of("flat")
    assert torch.equal(case.dense_hidden[case.dense_rows()], case.hidden)
    labels = case.dense_column(case.targets, -100)
    assert torch.equal(labels[case.dense_rows()], case.targets)
    assert int((labels == -100).sum()) == 3 * T
    assert torch.equal((labels != -100).nonzero().squeeze(1), case.dense_rows())


def test_rows_that_fill_no_pair_are_refused() -> None:
    with pytest.raises(ValueError, match="multiple of 64, got 65"):
        make_case("flat", 65, E, V, torch.float32, CPU)
