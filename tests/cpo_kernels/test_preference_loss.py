"""preference_loss against its closed forms, and against the loss that the installed TRL computes. N pairs."""

import math
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cpo_kernels import preference_loss

BETA = 0.3
CHOSEN_LENGTHS, REJECTED_LENGTHS = torch.tensor([3, 1, 7, 2, 5]), torch.tensor([2, 4, 1, 6, 5])


def random_logps(seed: int = 0) -> list[torch.Tensor]:
    """chosen, rejected, ref_chosen, ref_rejected: [N] fp64, of the size of summed log-probs."""
    generator = torch.Generator().manual_seed(seed)
    return [-20 * torch.rand(5, generator=generator, dtype=torch.float64) for _ in range(4)]


def log_sigmoid(value: float) -> float:
    """log(1 / (1 + exp(-value))) by the standard library."""
    return -math.log1p(math.exp(-value)) if value > 0 else value - math.log1p(math.exp(value))


def closed_form(index: int, logps: list[torch.Tensor], loss_type: str, smoothing: float) -> float:
    chosen, rejected, ref_chosen, ref_rejected = (float(tensor[index]) for tensor in logps)
    if loss_type == "ipo":
        mean_chosen = (chosen - ref_chosen) / int(CHOSEN_LENGTHS[index])
        mean_rejected = (rejected - ref_rejected) / int(REJECTED_LENGTHS[index])
        return (mean_chosen - mean_rejected - 1 / (2 * BETA)) ** 2
    margin = BETA * ((chosen - ref_chosen) - (rejected - ref_rejected))
    if loss_type == "hinge":
        return max(0.0, 1 - margin)
    return -(1 - smoothing) * log_sigmoid(margin) - smoothing * log_sigmoid(-margin)


def lengths_for(loss_type: str) -> dict[str, torch.Tensor]:
    return {"chosen_lengths": CHOSEN_LENGTHS, "rejected_lengths": REJECTED_LENGTHS} if loss_type == "ipo" else {}


@pytest.mark.parametrize(("loss_type", "smoothing"), [("sigmoid", 0.0), ("sigmoid", 0.2), ("hinge", 0.0), ("ipo", 0.0)])
def test_losses_equal_the_closed_form(loss_type: str, smoothing: float) -> None:
    logps = random_logps()
    result = preference_loss(
        *logps, beta=BETA, loss_type=loss_type, label_smoothing=smoothing, **lengths_for(loss_type)
    )
    want = torch.tensor([closed_form(i, logps, loss_type, smoothing) for i in range(5)], dtype=torch.float64)
    torch.testing.assert_close(result.losses, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("loss_type", "smoothing"), [("sigmoid", 0.0), ("sigmoid", 0.2), ("hinge", 0.0), ("ipo", 0.0)])
def test_gradient_equals_finite_differences(loss_type: str, smoothing: float) -> None:
    chosen, rejected, *reference = random_logps(1)
    chosen.requires_grad_()
    rejected.requires_grad_()

    def total(c: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
        options = {"beta": BETA, "loss_type": loss_type, "label_smoothing": smoothing} | lengths_for(loss_type)
        return preference_loss(c, r, *reference, **options).losses

    assert torch.autograd.gradcheck(total, (chosen, rejected))


def test_equal_policy_and_reference_give_ln_2_and_zero_rewards() -> None:
    chosen, rejected, _, _ = random_logps(2)
    result = preference_loss(chosen, rejected, chosen.clone(), rejected.clone())
    torch.testing.assert_close(result.losses, torch.full((5,), math.log(2), dtype=torch.float64), rtol=1e-15, atol=0)
    assert torch.equal(result.chosen_rewards, torch.zeros(5, dtype=torch.float64))
    assert torch.equal(result.rejected_rewards, torch.zeros(5, dtype=torch.float64))


def test_rewards_are_beta_times_log_ratio_and_detached() -> None:
    logps = [tensor.requires_grad_() for tensor in random_logps(3)]
    result = preference_loss(*logps, beta=BETA)
    chosen, rejected, ref_chosen, ref_rejected = (tensor.detach() for tensor in logps)
    torch.testing.assert_close(result.chosen_rewards, BETA * (chosen - ref_chosen))
    torch.testing.assert_close(result.rejected_rewards, BETA * (rejected - ref_rejected))
    assert result.losses.requires_grad
    assert not result.chosen_rewards.requires_grad
    assert not result.rejected_rewards.requires_grad


def test_margins_of_a_thousand_stay_finite() -> None:
    extreme = torch.tensor([1e4, -1e4], dtype=torch.float32, requires_grad=True)
    zero = torch.zeros(2)
    result = preference_loss(extreme, zero, zero, zero, beta=0.1)
    torch.testing.assert_close(result.losses.detach(), torch.tensor([0.0, 1000.0]))
    (gradient,) = torch.autograd.grad(result.losses.sum(), extreme)
    torch.testing.assert_close(gradient, torch.tensor([0.0, -0.1]))


def test_pair_weight_scales_each_pair() -> None:
    logps = random_logps(4)
    weight = torch.tensor([0.0, 1.0, 2.0, 0.5, 3.0], dtype=torch.float64)
    plain, weighted = preference_loss(*logps), preference_loss(*logps, pair_weight=weight)
    torch.testing.assert_close(weighted.losses, weight * plain.losses)
    torch.testing.assert_close(weighted.chosen_rewards, plain.chosen_rewards)


def test_nll_weight_adds_the_negative_log_likelihood_per_chosen_token() -> None:
    chosen, *rest = random_logps(5)
    lengths = {"chosen_lengths": CHOSEN_LENGTHS, "rejected_lengths": REJECTED_LENGTHS}
    plain = preference_loss(chosen, *rest, **lengths)
    with_nll = preference_loss(chosen, *rest, nll_weight=0.7, **lengths)
    torch.testing.assert_close(with_nll.losses - plain.losses, -0.7 * chosen / CHOSEN_LENGTHS)


def test_missing_lengths_and_unknown_names_are_refused() -> None:
    logps = random_logps(6)
    with pytest.raises(ValueError, match="length"):
        preference_loss(*logps, loss_type="ipo")
    with pytest.raises(ValueError, match="sigmoidd"):
        preference_loss(*logps, loss_type="sigmoidd")
    with pytest.raises(ValueError, match="expected"):
        preference_loss(logps[0][:3], *logps[1:])


class FixedLogps(torch.nn.Module):
    """Stands where TRL expects a model: answers with given per-token log-probs, so that only TRL's loss runs."""

    def __init__(self, log_probs: torch.Tensor) -> None:
        super().__init__()
        self.log_probs = log_probs
        self.config = SimpleNamespace(use_cache=False)
        self.is_gradient_checkpointing = False

    def forward(self, **inputs: Any) -> SimpleNamespace:
        zeros = torch.zeros_like(self.log_probs)
        return SimpleNamespace(log_probs=self.log_probs, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())


def trl_loss(policy: torch.Tensor, reference: torch.Tensor, mask: torch.Tensor, loss_type: str) -> torch.Tensor:
    """Mean loss by the body of the installed DPOTrainer; per-token log-probs [2 N, L - 1], completion mask [2 N, L]."""
    trl = pytest.importorskip("trl")
    model = FixedLogps(policy)
    identity = SimpleNamespace(
        device=torch.device("cpu"), gather=lambda value: value, gather_for_metrics=lambda value: value
    )
    trainer = SimpleNamespace(
        model=model, ref_model=FixedLogps(reference), accelerator=identity, aux_loss_enabled=False, ld_alpha=None,
        precompute_ref_logps=False, f_divergence_type="reverse_kl", loss_types=[loss_type], loss_weights=[1.0],
        beta=BETA, label_smoothing=0.0, use_weighting=False, _tp_size=1, _total_train_tokens=0,
        args=SimpleNamespace(gradient_checkpointing_kwargs=None),
        _metrics={mode: defaultdict(list) for mode in ("train", "eval")},
    )  # fmt: skip
    inputs = {"input_ids": torch.zeros_like(mask), "attention_mask": torch.ones_like(mask), "completion_mask": mask}
    return trl.DPOTrainer._compute_loss(trainer, model, inputs, return_outputs=False)


@pytest.mark.parametrize("loss_type", ["sigmoid", "hinge", "ipo"])
def test_losses_and_gradient_equal_trl(loss_type: str) -> None:
    generator = torch.Generator().manual_seed(8)
    lengths = torch.cat([CHOSEN_LENGTHS, REJECTED_LENGTHS])
    width = int(lengths.max()) + 2
    mask = (torch.arange(width)[None] >= 2) & (torch.arange(width)[None] < 2 + lengths[:, None])
    tokens = [-3 * torch.rand(10, width - 1, generator=generator, dtype=torch.float64) * mask[:, 1:] for _ in range(2)]
    policy, reference = tokens[0].requires_grad_(), tokens[1]
    (chosen, rejected), (ref_chosen, ref_rejected) = (t.sum(1).chunk(2) for t in (policy, reference))
    ours = preference_loss(
        chosen, rejected, ref_chosen, ref_rejected, beta=BETA, loss_type=loss_type, **lengths_for(loss_type)
    )
    theirs = trl_loss(policy, reference, mask.long(), loss_type)
    torch.testing.assert_close(ours.losses.mean(), theirs, rtol=1e-12, atol=1e-12)
    (our_gradient,) = torch.autograd.grad(ours.losses.mean(), policy)
    (their_gradient,) = torch.autograd.grad(trl_loss(policy, reference, mask.long(), loss_type), policy)
    torch.testing.assert_close(our_gradient, their_gradient, rtol=1e-12, atol=1e-12)
