"""Kernels for preference training on trees: tensors in, tensors out, no dependency but torch, triton and numpy.

    forest = build_forest(sequences)                    # token trie in depth-first preorder, shared prefixes once
    plan = forest.logprob_plan(starts)                  # which rows predict which targets
    out = tree_attention(q, k, v, forest.subtree_end)   # row i sees row j iff j <= i < subtree_end[j]
    result = linear_logprob(hidden, weight, plan)       # head, log-softmax and gather in one op
    loss = preference_loss(...)                         # DPO and relatives on segment sums
    losses = ranking_loss(...)                          # and objectives of whole search trees

`cpo_kernels.integrations` holds the drop-ins for other code bases.
"""

try:
    import cpo_kernels._csrc  # noqa: F401
except ModuleNotFoundError as error:
    if error.name != "cpo_kernels._csrc":
        raise
    raise ModuleNotFoundError(
        "cpo_kernels: its compiled part, _csrc, is missing, or built for another Python; in a checkout build it with "
        "'pip install -e .', elsewhere install a wheel of cpo-fast for this Python",
        name=error.name,
    ) from None

from cpo_kernels.forest import Forest, build_forest
from cpo_kernels.linear_logprob import LogprobResult, linear_logprob, selective_linear_logprob
from cpo_kernels.logprob_plan import LogprobPlan
from cpo_kernels.preference_loss import PreferenceLoss, preference_loss, visit_smoothing
from cpo_kernels.tree_attention import TreeSchedule, tree_attention, tree_schedule
from cpo_kernels.tree_loss import group_policy_loss, ranking_loss, step_weighted_loss, value_loss

__all__ = [
    "Forest",
    "LogprobPlan",
    "LogprobResult",
    "PreferenceLoss",
    "TreeSchedule",
    "build_forest",
    "group_policy_loss",
    "linear_logprob",
    "preference_loss",
    "ranking_loss",
    "selective_linear_logprob",
    "step_weighted_loss",
    "tree_attention",
    "tree_schedule",
    "value_loss",
    "visit_smoothing",
]
