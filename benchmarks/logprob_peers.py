"""Who is measured by the log-prob benchmark: our op, the installed peers as they are, and the floor of bare products.

A peer is a function (hidden [N, E], weight [V, E], labels [N]) -> log-probs [N] in which a label of -100 scores nothing;
what its library returns is only negated or masked, never touched otherwise. A contestant binds a peer to one case and
layout and offers up to three modes:

    forward   log-probs of the policy, without gradient
    policy    log-probs and the gradient of the hidden states
    step      policy, and log-probs of the reference without gradient
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.logprob_case import BETA, DENSE_FACTOR, SEQUENCE_TOKENS, LogprobCase
from cpo_kernels import LogprobPlan, linear_logprob

IGNORED = -100
TRL_CHUNK = 32768  # columns a tile, what TRL 1.16's trainers pass
FLOOR_ROWS = 4096  # rows a product: bounds the floor's logits to 2 GB at the largest vocabulary

Peer = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Result:
    """What one run gave; None for what the mode or the contestant does not give."""

    logps: torch.Tensor | None = None  # [P]
    grad: torch.Tensor | None = None  # [T, E]
    ref_logps: torch.Tensor | None = None  # [P]


Modes = dict[str, Callable[[], Result]]


def _masked(logps: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return logps.masked_fill(labels == IGNORED, 0.0)


def naive(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Full logits, upcast, log-softmax, gather: what most trainers do."""
    logps = F.linear(hidden, weight).float().log_softmax(dim=-1)
    return _masked(logps.gather(1, labels.clamp(min=0).unsqueeze(1)).squeeze(1), labels)


def trl_selective(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, upcast: bool) -> torch.Tensor:
    """`trl.trainer.utils.selective_log_softmax` on full logits in the model's dtype, or upcast."""
    from trl.trainer.utils import selective_log_softmax

    logits = F.linear(hidden, weight).unsqueeze(0)
    index = labels.clamp(min=0).unsqueeze(0)
    mask = (labels != IGNORED).unsqueeze(0)
    return selective_log_softmax(logits.float() if upcast else logits, index, row_mask=mask).squeeze(0)


def trl_chunked(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """`trl.kernels.ChunkedLogProbFunction`, log-probs only, without a mask of its own."""
    from trl.kernels import ChunkedLogProbFunction

    logps = ChunkedLogProbFunction.apply(hidden, weight, None, labels.clamp(min=0), 1.0, TRL_CHUNK, None, 1.0, ())[0]
    return _masked(logps, labels)


def liger_cross_entropy(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Liger's fused linear cross-entropy, `reduction="none"`."""
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return -liger_fused_linear_cross_entropy(hidden, weight, labels, ignore_index=IGNORED, reduction="none")


def apple_cce(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, exact: bool) -> torch.Tensor:
    """Apple's cut cross-entropy, by default (small gradients dropped) or exact (none dropped)."""
    from cut_cross_entropy import LinearCrossEntropyImpl, linear_cross_entropy

    options: dict[str, Any] = {}
    if exact:  # releases after 25.1 name the exact settings, 25.1 has the filter alone
        options = {"impl": "cce_exact"} if hasattr(LinearCrossEntropyImpl, "CCE_EXACT") else {"filter_eps": None}
    return -linear_cross_entropy(hidden, weight, labels, ignore_index=IGNORED, reduction="none", **options)


def torch_fused(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """`torch.nn.functional.linear_cross_entropy`, chunked, `reduction="none"` (torch 2.13 and later)."""
    if not hasattr(F, "linear_cross_entropy"):
        raise ImportError(f"torch {torch.__version__} has no linear_cross_entropy")
    options = torch.nn.LinearCrossEntropyOptions()
    return -F.linear_cross_entropy(hidden, weight, labels, reduction="none", ignore_index=IGNORED, options=options)


PEERS: dict[str, Peer] = {
    "torch naive": naive,
    "TRL selective": partial(trl_selective, upcast=False),
    "TRL selective fp32": partial(trl_selective, upcast=True),
    "TRL chunked": trl_chunked,
    "Liger FLCE": liger_cross_entropy,
    "CCE": partial(apple_cce, exact=False),
    "CCE exact": partial(apple_cce, exact=True),
    "torch linear_cross_entropy": torch_fused,
}
OURS = ("ours triton", "ours eager")
LIGER_DPO = "Liger DPO"
FLOORS = ("floor 3 GEMMs", "floor 4 GEMMs")
NAMES = (*OURS, *PEERS, LIGER_DPO, *FLOORS)
LAYOUTS = ("gathered", "dense")


def contestant(name: str, case: LogprobCase, layout: str) -> Modes:
    """The modes that a contestant has on a case in a layout; empty where it has none.

    Raises:
        ImportError: its library is not installed.
    """
    if layout == "dense" and not case.one_target_a_row:
        return {}  # a masked row holds one label
    if name in OURS:
        return _ours(name.removeprefix("ours "), case, layout)
    if name in FLOORS:
        return _floor(case, four=name == FLOORS[1]) if layout == "gathered" else {}
    if name == LIGER_DPO:
        return _liger_dpo(case, layout) if case.one_target_a_row else {}
    return _peer(PEERS[name], case, layout)


def _gradient(logps: torch.Tensor, leaf: torch.Tensor, upstream: torch.Tensor) -> torch.Tensor:
    (grad,) = torch.autograd.grad(logps, leaf, upstream.to(logps.dtype))
    return grad


def _rows(case: LogprobCase, dense: bool) -> tuple[torch.Tensor, torch.Tensor]:
    return (case.dense_hidden, case.dense_ref_hidden) if dense else (case.hidden, case.ref_hidden)


def _ours(impl: str, case: LogprobCase, layout: str) -> Modes:
    dense = layout == "dense"
    hidden, ref_hidden = _rows(case, dense)
    rows = case.dense_rows()[case.rows] if dense else case.rows
    num_segments = case.hidden.shape[0] // SEQUENCE_TOKENS
    plan = LogprobPlan.build(rows, case.targets, case.rows // SEQUENCE_TOKENS, num_segments)

    def run(reference: torch.Tensor | None, with_grad: bool) -> Result:
        leaf = hidden.detach().requires_grad_(with_grad)
        out = linear_logprob(leaf, case.weight, plan, reference, impl=impl)
        if not with_grad:
            return Result(out.token_logps)
        grad = _gradient(out.token_logps, leaf, case.upstream)
        return Result(out.token_logps.detach(), grad[case.dense_rows()] if dense else grad, out.ref_token_logps)

    def forward() -> Result:
        with torch.no_grad():
            return run(None, False)

    return {"forward": forward, "policy": lambda: run(None, True), "step": lambda: run(ref_hidden, True)}


def _peer(peer: Peer, case: LogprobCase, layout: str) -> Modes:
    dense = layout == "dense"
    hidden, ref_hidden = _rows(case, dense)
    labels = case.dense_column(case.targets, IGNORED) if dense else case.targets
    upstream = case.dense_column(case.upstream, 0.0) if dense else case.upstream
    scored = case.dense_rows() if dense else None

    def logps_of(source: torch.Tensor) -> torch.Tensor:
        return peer(source if case.one_target_a_row else source.index_select(0, case.rows), case.weight, labels)

    def picked(values: torch.Tensor) -> torch.Tensor:
        return values.detach() if scored is None else values.detach()[scored]

    def forward() -> Result:
        with torch.no_grad():
            return Result(picked(logps_of(hidden)))

    def policy() -> Result:
        leaf = hidden.detach().requires_grad_()
        logps = logps_of(leaf)
        return Result(picked(logps), picked(_gradient(logps, leaf, upstream)))

    def step() -> Result:
        result = policy()
        with torch.no_grad():
            return Result(result.logps, result.grad, picked(logps_of(ref_hidden)))

    return {"forward": forward, "policy": policy, "step": step}


def _liger_dpo(case: LogprobCase, layout: str) -> Modes:
    """Liger's fused linear DPO loss: a whole step, chosen sequences first; it returns no log-probs per token."""
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

    dense = layout == "dense"
    length = SEQUENCE_TOKENS * (DENSE_FACTOR if dense else 1)
    order = torch.arange(case.hidden.shape[0] // SEQUENCE_TOKENS, device=case.hidden.device)
    order = torch.cat([order[0::2], order[1::2]])
    back = torch.argsort(order)

    def chosen_first(rows: torch.Tensor) -> torch.Tensor:
        return rows.view(-1, length, *rows.shape[1:])[order]

    hidden, ref_hidden = map(chosen_first, _rows(case, dense))
    labels = chosen_first(case.dense_column(case.targets, IGNORED) if dense else case.targets)
    # compiled where compilation is part of what the peer offers: on a GPU
    loss = LigerFusedLinearDPOLoss(beta=BETA, compiled=case.hidden.is_cuda)

    def step() -> Result:
        leaf = hidden.detach().requires_grad_()
        value = loss(case.weight, leaf, labels, ref_input=ref_hidden, ref_weight=case.weight)
        (grad,) = torch.autograd.grad(value[0] if isinstance(value, tuple) else value, leaf)
        return Result(grad=grad[back][:, -SEQUENCE_TOKENS:].flatten(0, 1))

    return {"step": step}


def _floor(case: LogprobCase, four: bool) -> Modes:
    """The matrix products alone, a bounded number of rows at a time: logits and expected embedding of the policy (and
    the logits once more, which is what recomputation costs), logits of the reference."""
    weight = case.weight

    def products(source: torch.Tensor, num_logits: int, with_grad: bool) -> None:
        for rows in source.split(FLOOR_ROWS):
            for _ in range(num_logits):
                logits = torch.mm(rows, weight.t())
            if with_grad:
                torch.mm(logits, weight)

    def policy() -> Result:
        products(case.hidden, 2 if four else 1, True)
        return Result()

    def forward() -> Result:
        products(case.hidden, 1, False)
        return Result()

    def step() -> Result:
        policy()
        products(case.ref_hidden, 1, False)
        return Result()

    return {"forward": forward, "policy": policy, "step": step}
