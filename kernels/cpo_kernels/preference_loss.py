"""Preference losses on summed log-probabilities: DPO and its relatives, one number per pair.

With h = (logp_chosen - ref_chosen) - (logp_rejected - ref_rejected):

    sigmoid  -(1 - e) log sigmoid(beta h) - e log sigmoid(-beta h)       DPO, arXiv 2305.18290, e: label smoothing (cDPO)
    hinge    max(0, 1 - beta h)                                          SLiC, arXiv 2305.10425
    ipo      (h_mean - 1 / (2 beta))^2, h of per-token mean log-ratios    IPO, arXiv 2310.12036, normalised as TRL does

`visit_smoothing` is the e of a pair from a Monte Carlo tree search. `nll_weight` adds the chosen response's mean negative
log-likelihood (as RPO does), `pair_weight` scales each pair. The caller reduces, because a step's mean is over the pairs of
all its micro-batches. Losses of more than two responses: `cpo_kernels.tree_loss`.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

LOSS_TYPES = ("sigmoid", "hinge", "ipo")


@dataclass(frozen=True)
class PreferenceLoss:
    """Per-pair losses (differentiable) and rewards beta (logp - ref_logp) (detached)."""

    losses: torch.Tensor  # [N]
    chosen_rewards: torch.Tensor  # [N]
    rejected_rewards: torch.Tensor  # [N]


def preference_loss(
    chosen: torch.Tensor,  # [N]
    rejected: torch.Tensor,  # [N]
    ref_chosen: torch.Tensor,  # [N]
    ref_rejected: torch.Tensor,  # [N]
    beta: float = 0.1,
    loss_type: str = "sigmoid",
    label_smoothing: float | torch.Tensor = 0.0,  # [N]
    chosen_lengths: torch.Tensor | None = None,  # [N]
    rejected_lengths: torch.Tensor | None = None,  # [N]
    nll_weight: float = 0.0,
    pair_weight: torch.Tensor | None = None,  # [N]
) -> PreferenceLoss:
    """Loss of each preference pair from summed response log-probs of policy and reference.

    Args:
        chosen, rejected: [N] summed log-probs under the policy.
        ref_chosen, ref_rejected: [N] the same under the reference.
        beta: strength of the pull towards the reference.
        loss_type: "sigmoid", "hinge" or "ipo".
        label_smoothing: probability that a label is flipped, for "sigmoid" only, one for all or [N] one a pair.
        chosen_lengths, rejected_lengths: [N] response lengths in tokens. "ipo" needs both, `nll_weight` the first.
        nll_weight: weight of the chosen response's mean negative log-likelihood.
        pair_weight: [N] factor on each pair's loss, or None.

    Raises:
        ValueError: unknown loss type, a length that is needed and missing, or shapes that differ.
    """
    if loss_type not in LOSS_TYPES:
        raise ValueError(
            f"preference_loss: loss_type {loss_type!r} is unknown; expected one of {', '.join(LOSS_TYPES)}"
        )
    for name, value in (("rejected", rejected), ("ref_chosen", ref_chosen), ("ref_rejected", ref_rejected)):
        if value.shape != chosen.shape:
            raise ValueError(f"preference_loss: expected {name} {tuple(chosen.shape)}, got {tuple(value.shape)}")
    is_smoothed = isinstance(label_smoothing, torch.Tensor) or label_smoothing != 0
    if is_smoothed and loss_type != "sigmoid":
        raise ValueError(f"preference_loss: label_smoothing is defined for 'sigmoid' only, got {loss_type!r}")
    chosen_ratio, rejected_ratio = chosen - ref_chosen, rejected - ref_rejected
    margin = chosen_ratio - rejected_ratio
    if loss_type == "sigmoid":
        losses = -F.logsigmoid(beta * margin) * (1 - label_smoothing) - F.logsigmoid(-beta * margin) * label_smoothing
    elif loss_type == "hinge":
        losses = torch.relu(1 - beta * margin)
    else:
        if chosen_lengths is None or rejected_lengths is None:
            raise ValueError("preference_loss: loss_type 'ipo' needs chosen_lengths and rejected_lengths")
        mean_margin = chosen_ratio / chosen_lengths.clamp(min=1) - rejected_ratio / rejected_lengths.clamp(min=1)
        losses = (mean_margin - 1 / (2 * beta)).square()
    if nll_weight:
        if chosen_lengths is None:
            raise ValueError("preference_loss: nll_weight needs chosen_lengths")
        losses = losses - nll_weight * chosen / chosen_lengths.clamp(min=1)
    if pair_weight is not None:
        losses = losses * pair_weight
    return PreferenceLoss(losses, beta * chosen_ratio.detach(), beta * rejected_ratio.detach())


def visit_smoothing(chosen_visits: torch.Tensor, rejected_visits: torch.Tensor) -> torch.Tensor:
    """[N] label smoothing 1 / (N_chosen / N_rejected + 1) from visit counts, as MCTS-DPO has it (arXiv 2405.00451).

    Equal counts give 1/2, also where neither was visited.
    """
    visits = chosen_visits + rejected_visits
    return torch.where(visits > 0, rejected_visits / visits, 0.5)
