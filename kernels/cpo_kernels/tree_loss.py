"""Losses that read a whole search tree: one number for each group of segments, from their summed log-probs.

A group is what a tree holds together: the thoughts that continue one state, or the thoughts of two chains. With
l = logp - ref_logp of a segment, v its value and q its share of the group's samples:

    ranking_loss        sum over v_i > v_j of w_ij -log sigmoid(beta (l_i - l_j))
                        w_ij = |2^v_i - 2^v_j| |1 / log(1 + rank_i) - 1 / log(1 + rank_j)|
                        TPO, arXiv 2410.12854, with the weights of LiPO-lambda, arXiv 2402.01878
    value_loss          sum of q (beta l - a)^2, a = v - (the group's mean value)
                        DVO, arXiv 2502.13723
    group_policy_loss   sum of q (-min(r a, clip(r, 1 - eps, 1 + eps) a) + beta (exp(-l / n) + l / n - 1))
                        r = exp((logp - sampled_logp) / n) over n tokens, a = (v - mean) / (standard deviation)
                        the form of Tree-GRPO, arXiv 2509.21240, with one ratio a segment as in GSPO, arXiv 2507.18071
    step_weighted_loss  -log sigmoid(beta (sum of the chosen's w l - sum of the rejected's w l))
                        w: softmax of gamma v over the chosen chain's thoughts, of -gamma v over the rejected one's
                        Full-Step-DPO, arXiv 2502.14356

No loss looks beyond its group, so a batch may be cut anywhere between groups. The caller reduces, because a step's mean is
over the groups of all its micro-batches.

    S segments, G groups, group [S] int64: the group of each segment, in [0, G)
"""

import torch
import torch.nn.functional as F

# nats by which log-ratios differ where only rounding does; before the first step all are 0 up to that
RANK_RESOLUTION = 1e-3


def ranking_loss(
    logps: torch.Tensor,  # [S]
    ref_logps: torch.Tensor,  # [S]
    values: torch.Tensor,  # [S]
    group: torch.Tensor,  # [S]
    num_groups: int,
    beta: float = 0.1,
) -> torch.Tensor:
    """[G] losses of ranking each group's segments by value: every couple counts, those at the top the most.

    A segment's rank (from 1) is its place by the policy's log-ratio. Log-ratios within `RANK_RESOLUTION` are ranked by
    value, and equal values in the order of the segments. Memory grows as S^2.

    Raises:
        ValueError: shapes differ.
    """
    _check("ranking_loss", logps, ref_logps=ref_logps, values=values, group=group)
    ratio = logps - ref_logps
    with torch.no_grad():
        together = group[:, None] == group
        better = together & (values[:, None] > values)
        settled, place = torch.round(ratio / RANK_RESOLUTION), torch.arange(len(group), device=group.device)
        # whether the second (column) stands ahead of the first (row)
        ahead = settled > settled[:, None]
        tied = settled == settled[:, None]
        ahead |= tied & ((values > values[:, None]) | ((values == values[:, None]) & (place < place[:, None])))
        discount = 1 / torch.log(2.0 + (ahead & together).sum(1).to(values))  # 1 + rank, and the first has rank 1
        gain = torch.exp2(values)
        weight = (gain[:, None] - gain).abs() * (discount[:, None] - discount).abs()
        weight = torch.where(better, weight, 0)
    # left out before the logarithm too, where backward would make NaN of 0 times a number that is not finite
    gap = torch.where(better, ratio[:, None] - ratio, 0)  # [S, S]
    return _sums((weight * -F.logsigmoid(beta * gap)).sum(1), group, num_groups)


def value_loss(
    logps: torch.Tensor,  # [S]
    ref_logps: torch.Tensor,  # [S]
    values: torch.Tensor,  # [S]
    counts: torch.Tensor,  # [S]
    group: torch.Tensor,  # [S]
    num_groups: int,
    beta: float = 0.1,
) -> torch.Tensor:
    """[G] mean squared differences between beta times the log-ratio and the advantage, over a group's samples.

    Args:
        counts: how many samples each segment stands for.

    Raises:
        ValueError: shapes differ.
    """
    _check("value_loss", logps, ref_logps=ref_logps, values=values, counts=counts, group=group)
    shares = group_shares(counts, group, num_groups)
    advantages = group_advantages(values, shares, group, num_groups)
    return _sums(shares * (beta * (logps - ref_logps) - advantages).square(), group, num_groups)


def group_policy_loss(
    logps: torch.Tensor,  # [S]
    ref_logps: torch.Tensor,  # [S]
    sampled_logps: torch.Tensor,  # [S]
    lengths: torch.Tensor,  # [S]
    values: torch.Tensor,  # [S]
    counts: torch.Tensor,  # [S]
    group: torch.Tensor,  # [S]
    num_groups: int,
    beta: float = 0.1,
    clip_range: float = 0.2,
) -> torch.Tensor:
    """[G] clipped policy-gradient losses of a group's samples under the advantage of each over the others.

    Args:
        sampled_logps: the segments' log-probs under the model that sampled them, at the temperature of `logps`.
        lengths: tokens of each segment.
        counts: how many samples each segment stands for.
        beta: weight of the estimated divergence from the reference, per token.
        clip_range: how far the ratio to the sampling model may move from 1 and still be rewarded.

    Raises:
        ValueError: shapes differ.
    """
    shapes = {"ref_logps": ref_logps, "sampled_logps": sampled_logps, "lengths": lengths}
    _check("group_policy_loss", logps, **shapes, values=values, counts=counts, group=group)
    shares = group_shares(counts, group, num_groups)
    advantages = group_advantages(values, shares, group, num_groups, normalised=True)
    ratio = ((logps - sampled_logps) / lengths).exp()
    surrogate = torch.minimum(ratio * advantages, ratio.clamp(1 - clip_range, 1 + clip_range) * advantages)
    away = (ref_logps - logps) / lengths
    divergence = torch.expm1(away) - away  # never negative, and 0 with gradient 0 at the reference
    return _sums(shares * (beta * divergence - surrogate), group, num_groups)


def step_weighted_loss(
    logps: torch.Tensor,  # [S]
    ref_logps: torch.Tensor,  # [S]
    values: torch.Tensor,  # [S]
    chosen: torch.Tensor,  # [S] bool
    group: torch.Tensor,  # [S]
    num_groups: int,
    beta: float = 0.1,
    gamma: float = 1.0,
) -> torch.Tensor:
    """[G] losses of pairs of chains, whose thoughts are the segments: good ones of the chosen and bad ones of the rejected
    chain count more.

    Args:
        chosen: whether a segment belongs to its pair's chosen chain.
        gamma: how strongly a weight follows the value. With 0 all thoughts of a chain weigh the same.

    Raises:
        ValueError: shapes differ.
    """
    _check("step_weighted_loss", logps, ref_logps=ref_logps, values=values, chosen=chosen, group=group)
    signs = torch.where(chosen, 1.0, -1.0).to(values)
    exponents = (gamma * signs * values).exp()
    weights = group_shares(exponents, 2 * group + chosen, 2 * num_groups)
    return -F.logsigmoid(beta * _sums(signs * weights * (logps - ref_logps), group, num_groups))


def group_shares(counts: torch.Tensor, group: torch.Tensor, num_groups: int) -> torch.Tensor:
    """[S] positive `counts` over the sum of their group's."""
    return counts / _sums(counts, group, num_groups)[group]


def group_advantages(
    values: torch.Tensor,  # [S]
    shares: torch.Tensor,  # [S]
    group: torch.Tensor,  # [S]
    num_groups: int,
    normalised: bool = False,
) -> torch.Tensor:
    """[S] values over the mean of their group, whose members have `shares` of its samples, in [0, 1].

    `normalised` divides by the group's standard deviation (of the samples, not an estimate beyond them) and gives 0 where
    all values are equal.
    """
    above = values - _sums(shares * values, group, num_groups)[group]
    if not normalised:
        return above
    deviation = _sums(shares * above.square(), group, num_groups).sqrt()[group]
    return torch.where(deviation > 0, above / deviation, 0)


def _sums(values: torch.Tensor, group: torch.Tensor, num_groups: int) -> torch.Tensor:
    # [G]; dense, because a scattered sum has another order, and so other bits, each time on a GPU
    members = group == torch.arange(num_groups, device=group.device)[:, None]
    return torch.where(members, values, 0).sum(1)


def _check(name: str, logps: torch.Tensor, **others: torch.Tensor) -> None:
    for other, value in others.items():
        if value.shape != logps.shape:
            raise ValueError(f"{name}: expected {other} {tuple(logps.shape)}, got {tuple(value.shape)}")
