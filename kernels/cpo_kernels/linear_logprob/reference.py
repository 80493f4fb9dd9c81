"""Log-probabilities of chosen tokens from hidden states, by autograd: the specification.

    logp[p] = z[rows[p], targets[p]] - logsumexp_v z[rows[p], v]

It works on a chunk of distinct rows at a time and recomputes a chunk's logits in backward (`torch.utils.checkpoint`), so
neither pass holds [T, V]. Gradients flow to hidden rows, weight and bias, whichever require them.
"""

from collections.abc import Sequence

import torch
from torch.utils.checkpoint import checkpoint

from cpo_kernels.linear_logprob.results import OUTPUTS, Head, LogprobResult, segment_sums
from cpo_kernels.logprob_plan import LogprobPlan


def reference_linear_logprob(
    hidden: torch.Tensor,  # [T, E]
    ref_hidden: torch.Tensor | None,  # [T, E]
    head: Head,
    plan: LogprobPlan,
    outputs: Sequence[str],
) -> LogprobResult:
    """`linear_logprob` of inputs that are checked."""
    logps, columns = _token_logps(hidden.index_select(0, plan.unique_rows), head, plan)
    ref_logps = ref_sums = None
    if ref_hidden is not None:
        with torch.no_grad():
            ref_logps, _ = _token_logps(ref_hidden.index_select(0, plan.unique_rows), head, plan)
            ref_sums = segment_sums(ref_logps, plan)
    asked = {name: column for name, column in zip(OUTPUTS, columns, strict=True) if name in outputs}
    return LogprobResult(logps, segment_sums(logps, plan), ref_logps, ref_sums, **asked)


def _token_logps(
    rows: torch.Tensor,  # [R, E] hidden state of each distinct row
    head: Head,
    plan: LogprobPlan,
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Token log-probs [P] (differentiable) and `OUTPUTS` [P] each (not)."""
    row_index = plan.pair_row[plan.pair_index]
    order = torch.argsort(row_index, stable=True)
    chunk_rows = head.chunk_rows(rows.shape[0])
    first_rows = torch.arange(0, rows.shape[0], chunk_rows, device=rows.device)
    edges = [*torch.searchsorted(row_index[order], first_rows).tolist(), row_index.shape[0]]
    pieces: list[tuple[torch.Tensor, ...]] = []
    for index, first_row in enumerate(first_rows.tolist()):
        tokens = order[edges[index] : edges[index + 1]]
        chunk = rows[first_row : first_row + chunk_rows]
        arguments = (chunk, row_index[tokens] - first_row, plan.targets[tokens], head)
        if torch.is_grad_enabled():
            pieces.append(checkpoint(_chunk, *arguments, use_reentrant=False))
        else:
            pieces.append(_chunk(*arguments))
    if not pieces:
        empty = rows.sum(dtype=head.logits(rows).dtype).expand(0)
        return empty, [empty.detach(), empty.detach(), empty.detach().bool()]
    inverse = torch.argsort(order)
    logps, *columns = (torch.cat(column)[inverse] for column in zip(*pieces, strict=True))
    return logps, [column.detach() for column in columns]


def _chunk(
    rows: torch.Tensor, row_index: torch.Tensor, targets: torch.Tensor, head: Head
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    log_probs = torch.log_softmax(logits := head.logits(rows), dim=-1)
    with torch.no_grad():
        entropy = -(log_probs.exp() * log_probs).sum(dim=-1)
        mean_logit = logits.mean(dim=-1)
        is_top1 = logits[row_index, targets] >= logits.amax(dim=-1)[row_index]
    return log_probs[row_index, targets], entropy[row_index], mean_logit[row_index], is_top1
