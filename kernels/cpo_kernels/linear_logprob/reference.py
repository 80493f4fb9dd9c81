"""Log-probabilities of chosen tokens from hidden states, by autograd: the specification.

    logp[p] = z[rows[p], targets[p]] - logsumexp_v z[rows[p], v]

A chunk of distinct rows at a time; a chunk's logits are recomputed in backward (`torch.utils.checkpoint`), so neither
pass holds [T, V]. Gradients flow to hidden rows, weight and bias, whichever require them.
"""

import torch
from torch.utils.checkpoint import checkpoint

from cpo_kernels.linear_logprob.results import Head


def reference_token_logps(
    rows: torch.Tensor,  # [R, E] hidden state of each distinct row
    row_index: torch.Tensor,  # [P] int64, index into rows
    targets: torch.Tensor,  # [P] int64
    head: Head,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Token log-probs [P] (differentiable) and the per-token `entropy`, `mean_logit`, `is_top1` [P] (not)."""
    order = torch.argsort(row_index, stable=True)
    first_rows = torch.arange(0, rows.shape[0], head.chunk_rows, device=rows.device)
    edges = [*torch.searchsorted(row_index[order], first_rows).tolist(), row_index.shape[0]]
    pieces: list[tuple[torch.Tensor, ...]] = []
    for index, first_row in enumerate(first_rows.tolist()):
        tokens = order[edges[index] : edges[index + 1]]
        chunk = rows[first_row : first_row + head.chunk_rows]
        arguments = (chunk, row_index[tokens] - first_row, targets[tokens], head)
        if torch.is_grad_enabled():
            pieces.append(checkpoint(_chunk, *arguments, use_reentrant=False))
        else:
            pieces.append(_chunk(*arguments))
    if not pieces:
        empty = rows.sum(dtype=head.logits(rows).dtype).expand(0)
        return empty, {"entropy": empty.detach(), "mean_logit": empty.detach(), "is_top1": empty.detach().bool()}
    inverse = torch.argsort(order)
    logps, entropy, mean_logit, is_top1 = (torch.cat(column)[inverse] for column in zip(*pieces, strict=True))
    return logps, {"entropy": entropy.detach(), "mean_logit": mean_logit.detach(), "is_top1": is_top1}


def _chunk(
    rows: torch.Tensor, row_index: torch.Tensor, targets: torch.Tensor, head: Head
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    log_probs = torch.log_softmax(logits := head.logits(rows), dim=-1)
    with torch.no_grad():
        entropy = -(log_probs.exp() * log_probs).sum(dim=-1)
        mean_logit = logits.mean(dim=-1)
        is_top1 = logits[row_index, targets] >= logits.amax(dim=-1)[row_index]
    return log_probs[row_index, targets], entropy[row_index], mean_logit[row_index], is_top1
