"""Inputs of the log-prob benchmark and their oracle in float64.

T scored rows, cut into sequences of 32 tokens; sequences 2i and 2i + 1 are chosen and rejected of pair i. Each sequence
has three unscored rows for every scored one before it, so the same tokens come in two layouts: `gathered`, the T scored
rows alone, and `dense`, all rows with labels of -100 where nothing is scored. (Prompts of preference data are longer
than that; four times the rows is kind to whoever computes all of them.)

The upstream gradient is that of the DPO loss, taken from the oracle, so that contestants who return log-probs and
contestants who fuse the loss must give one and the same gradient.
"""

import math
from dataclasses import dataclass
from functools import cached_property

import torch

SEQUENCE_TOKENS = 32  # a thought is 20 to 200 tokens
DENSE_FACTOR = 4
BETA = 0.1
LOGIT_STD = 2.0
CHECKED_PAIRS = 16  # the oracle of a float64 head over all rows of a large shape would take longer than all timings
ORACLE_ROWS = 64  # rows of float64 logits at a time: 131 MB at the largest vocabulary
CONFIDENT = 0.9999
MULTI_SHARE, MAX_TARGETS = 0.1, 8  # of the rows, in the set with many targets


@dataclass(frozen=True)
class Truth:
    """What float64 says about the checked rows. C checked rows, S their sequences."""

    rows: torch.Tensor  # [C] int64, hidden rows that are checked
    tokens: torch.Tensor  # [C'] int64, scored tokens on those rows
    logps: torch.Tensor  # [C'] float64
    ref_logps: torch.Tensor  # [C'] float64
    grad_rows: torch.Tensor  # [C, E] float64
    sequences: torch.Tensor  # [C'] int64, sequence of each checked token


@dataclass(frozen=True)
class LogprobCase:
    """One set of inputs. T rows, P scored tokens (P = T unless rows have many targets), E hidden, V vocabulary."""

    hidden: torch.Tensor  # [T, E] bf16 or fp32
    ref_hidden: torch.Tensor  # [T, E]
    weight: torch.Tensor  # [V, E]
    rows: torch.Tensor  # [P] int64, ascending
    targets: torch.Tensor  # [P] int64
    upstream: torch.Tensor  # [P] fp32, dloss / dlogp
    truth: Truth

    @property
    def one_target_a_row(self) -> bool:
        """Whether token p stands on row p."""
        return self.rows.shape[0] == self.hidden.shape[0]

    @cached_property
    def dense_hidden(self) -> torch.Tensor:
        """[DENSE_FACTOR T, E]: `hidden` among unscored rows, made once for all contestants."""
        return self._dense(self.hidden)

    @cached_property
    def dense_ref_hidden(self) -> torch.Tensor:
        """[DENSE_FACTOR T, E]: `ref_hidden` likewise."""
        return self._dense(self.ref_hidden)

    def _dense(self, rows: torch.Tensor) -> torch.Tensor:
        """Unscored rows repeat other sequences' hidden states."""
        sequences = rows.view(-1, SEQUENCE_TOKENS, rows.shape[1])
        prompts = sequences.flip(0).repeat(1, DENSE_FACTOR - 1, 1)
        return torch.cat([prompts, sequences], dim=1).flatten(0, 1).contiguous()

    def dense_column(self, values: torch.Tensor, fill: float) -> torch.Tensor:
        """[T] values of scored rows -> [DENSE_FACTOR T] with `fill` at the unscored ones."""
        sequences = values.view(-1, SEQUENCE_TOKENS)
        prompts = sequences.new_full((sequences.shape[0], (DENSE_FACTOR - 1) * SEQUENCE_TOKENS), fill)
        return torch.cat([prompts, sequences], dim=1).flatten()

    def dense_rows(self) -> torch.Tensor:
        """[T] int64, where the scored rows stand in the dense layout."""
        index = torch.arange(DENSE_FACTOR * self.hidden.shape[0], device=self.hidden.device)
        return index.view(-1, DENSE_FACTOR * SEQUENCE_TOKENS)[:, -SEQUENCE_TOKENS:].flatten()


def make_case(
    kind: str, num_rows: int, hidden_size: int, vocab_size: int, dtype: torch.dtype, device: torch.device, seed: int = 0
) -> LogprobCase:
    """Random inputs and their truth.

    Args:
        kind: "flat" (logits of standard deviation 2), "many" (a tenth of the rows with 2 to 8 targets) or "confident"
            (every target has p > 0.9999).
        num_rows: T, a multiple of two sequences.
        hidden_size: E.
        vocab_size: V.
        dtype: of hidden states and head.
        device: where the inputs live and the truth is computed.
        seed: of the generator, which runs on the device.

    Raises:
        ValueError: an unknown kind, or rows that do not fill pairs.
    """
    if num_rows % (2 * SEQUENCE_TOKENS) or num_rows == 0:
        raise ValueError(f"num_rows: expected a multiple of {2 * SEQUENCE_TOKENS}, got {num_rows}")
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int, std: float) -> torch.Tensor:
        return (std * torch.randn(shape, generator=generator, device=device)).to(dtype)

    weight = normal(vocab_size, hidden_size, std=hidden_size**-0.5)
    hidden, ref_hidden = (normal(num_rows, hidden_size, std=LOGIT_STD) for _ in range(2))
    rows = torch.arange(num_rows, device=device)
    if kind == "many":
        repeats = torch.ones(num_rows, dtype=torch.int64, device=device)
        crowded = torch.randperm(num_rows, generator=generator, device=device)[: max(1, int(MULTI_SHARE * num_rows))]
        repeats[crowded] = torch.randint(2, MAX_TARGETS + 1, crowded.shape, generator=generator, device=device)
        rows = torch.repeat_interleave(rows, repeats)
    elif kind not in ("flat", "confident"):
        raise ValueError(f"kind: expected 'flat', 'many' or 'confident', got {kind!r}")
    targets = torch.randint(vocab_size, rows.shape, generator=generator, device=device)
    if kind == "confident":
        hidden = _confident_rows(weight, targets)
    upstream, truth = _truth(hidden, ref_hidden, weight, rows, targets)
    return LogprobCase(hidden, ref_hidden, weight, rows, targets, upstream, truth)


def _confident_rows(weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """[T, E]: multiples of the targets' head rows, each just long enough for p > CONFIDENT."""
    direction = weight[targets].double()
    direction /= direction.square().sum(dim=1, keepdim=True)
    strength = torch.full_like(direction[:, 0], math.log(weight.shape[0]) + 10.0)
    head = weight.double()
    while True:
        hidden = (direction * strength.unsqueeze(1)).to(weight.dtype)
        weak = torch.cat(
            [
                _float64_logps(hidden[index], head, torch.arange(len(index), device=index.device), targets[index])
                for index in torch.arange(len(targets), device=targets.device).split(ORACLE_ROWS)
            ]
        ).exp() <= CONFIDENT  # fmt: skip
        if not bool(weak.any()):
            return hidden
        strength[weak] *= 1.05


def _float64_logps(hidden: torch.Tensor, head: torch.Tensor, rows: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    logits = hidden.double() @ head.T
    return logits[rows, targets] - torch.logsumexp(logits, dim=-1)[rows]


def _truth(
    hidden: torch.Tensor, ref_hidden: torch.Tensor, weight: torch.Tensor, rows: torch.Tensor, targets: torch.Tensor
) -> tuple[torch.Tensor, Truth]:
    """Upstream gradient [P] and the truth about the first, the last and some pairs between.

    In float64 the plain difference W[t] - E[W] is good enough for confident rows: 1 - p > 1e-6 leaves ten digits.
    """
    head = weight.double()
    num_pairs = hidden.shape[0] // (2 * SEQUENCE_TOKENS)
    pairs = torch.linspace(0, num_pairs - 1, min(CHECKED_PAIRS, num_pairs), device=rows.device).long().unique()
    first = pairs * 2 * SEQUENCE_TOKENS
    checked_rows = (first.unsqueeze(1) + torch.arange(2 * SEQUENCE_TOKENS, device=rows.device)).flatten()
    tokens = torch.isin(rows, checked_rows).nonzero().squeeze(1)
    local = torch.searchsorted(checked_rows, rows[tokens])
    sequences = rows[tokens] // SEQUENCE_TOKENS
    logps, ref_logps = (
        torch.cat(
            [
                _float64_logps(
                    source[checked_rows[low : low + ORACLE_ROWS]], head, local[span] - low, targets[tokens[span]]
                )
                for low, span in _spans(local, len(checked_rows))
            ]
        )
        for source in (hidden, ref_hidden)
    )  # fmt: skip
    # d(-log sigmoid(margin)) / dlogp, the mean over pairs; pairs that are not checked get the gradient at margin 0
    pair_of_token = rows // (2 * SEQUENCE_TOKENS)
    sign = 1.0 - 2.0 * ((rows // SEQUENCE_TOKENS) % 2).double()
    margins = torch.zeros(num_pairs, dtype=torch.float64, device=rows.device)
    margins.index_add_(0, pair_of_token[tokens], BETA * sign[tokens] * (logps - ref_logps))
    upstream = (-BETA / num_pairs * sign * torch.sigmoid(-margins)[pair_of_token]).float()
    grads = torch.cat(
        [
            _float64_gradient(hidden[checked_rows[low : low + ORACLE_ROWS]], head, local[span] - low,
                              targets[tokens[span]], upstream[tokens[span]].double())
            for low, span in _spans(local, len(checked_rows))
        ]
    )  # fmt: skip
    return upstream, Truth(checked_rows, tokens, logps, ref_logps, grads, sequences)


def _spans(local: torch.Tensor, num_rows: int) -> list[tuple[int, slice]]:
    """(first row, tokens on the rows from it) of every chunk of ORACLE_ROWS rows; `local` ascends."""
    lows = list(range(0, num_rows, ORACLE_ROWS))
    edges = [*torch.searchsorted(local, torch.tensor(lows, device=local.device)).tolist(), len(local)]
    return [(low, slice(edges[i], edges[i + 1])) for i, low in enumerate(lows)]


def _float64_gradient(
    hidden: torch.Tensor, head: torch.Tensor, rows: torch.Tensor, targets: torch.Tensor, upstream: torch.Tensor
) -> torch.Tensor:
    """[R, E]: the sum over a row's tokens of upstream times (W[target] - sum_v p_v W[v])."""
    logits = hidden.double() @ head.T
    coefficients = -torch.softmax(logits, dim=-1)
    coefficients *= logits.new_zeros(len(hidden)).index_add_(0, rows, upstream).unsqueeze(1)
    coefficients.index_put_((rows, targets), upstream, accumulate=True)
    return coefficients @ head
