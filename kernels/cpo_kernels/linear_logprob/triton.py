"""Scoring by Triton kernels, and which of two paths rows without a gradient take. `eager` has the formulas.

Path A ("chunk") writes a chunk of logits, from the library's matrix product, and reads it again (`triton_chunked`).
Path B ("fused") keeps logits in registers and pays with a matrix product of our own (`triton_fused`). Rows that take a
gradient always go path A: their probabilities meet the head a second time as stored operands, because the expected
embedding of a row tile, [128, E] in float32, does not fit in one program's registers. Policy and reference of one call
go the same path, kernel for kernel and variant for variant, so equal hidden states give bitwise equal log-probs.

`TABLE` holds, for an architecture and a width E, the largest number of rows that goes fused. Every entry is a prediction,
none is a measurement. The cost model behind them: a fused pass wins if its product reaches the share x of the library's
speed at which the saved traffic of the logits pays, x = 0.47 at E = 576, 0.63 at 1024, 0.77 at 2048, 0.87 at 4096, 0.93
at 8192. What a fused product can reach on an H200 is bounded by L2: a step of 64 elements of E reads (128 + 128) x 64 x 2
bytes for a tile of 128 x 128, 32 KiB for 512 clocks of tensor cores at 4,096 operations, so 64 bytes a clock and SM. On 132
SMs at 1.75 GHz that is 14.8 TB/s, of which L2 gives 5.5 to 7: 37 to 47 % of the peak of 990 TFLOP/s, x = 0.46 to 0.59 of
the 790 that a library's product was measured at. Break-even at 576, where it needs no memory for logits, and a loss at
1024. On an A100 the tile needs 32 bytes a clock and SM, 4.9 TB/s, about what its L2 gives. Products of Triton were
reported near 0.3 of the library there. Below about 160 rows the matrix product is memory-bound, so saving the logits'
traffic wins even with a slower product.

Predicted, not measured: a step (policy forward and backward, reference) on an H200 in bf16 with E 4096, against its floor,
three products of 2 R V E operations at 790 TFLOP/s. A step adds 24 bytes a logit at 4.3 TB/s: 4 written and 4 read, twice,
and of the policy 4 read, 2 written and 2 read. Chunks of 1,024 rows read the weight behind their products: 0.24 ms a
product for 1.05 GB where 1,024 rows compute for 1.36. The lower end has products at 790, the upper at 0.9 of it.

    V          rows     floor, ms    predicted, ms
    128,256     512        2.04       2.4 -  2.6
    128,256   2,048        8.17       9.6 - 10.5
    128,256   8,192        32.7      38.5 - 42.2
     32,000   2,048        2.04       2.4 -  2.6
"""

import functools
import logging
import os

import torch

from cpo_kernels.device import architecture, matmul_accumulated
from cpo_kernels.linear_logprob.results import GRADED, Head, PairScores
from cpo_kernels.linear_logprob.triton_backward import head_gradients, row_gradients
from cpo_kernels.linear_logprob.triton_chunked import (
    PROBABILITY_SCALE,
    chunk_scores,
    conditional_probabilities,
    empty_chunk,
)
from cpo_kernels.linear_logprob.triton_fused import fused_scores
from cpo_kernels.linear_logprob.triton_sums import (
    ENTROPY,
    MAX_VOCAB,
    MEAN,
    NUM_STATS,
    REST,
    ROW_MAX,
    ROW_SUM,
    Transform,
)
from cpo_kernels.logprob_plan import LogprobPlan

__all__ = ["PATHS", "choose_path", "head_gradients", "row_gradients", "score"]

logger = logging.getLogger(__name__)

ENVIRONMENT_VARIABLE = "CPO_KERNELS_LOGPROB_PATH"
PATHS = ("chunk", "fused")
ANY = 1 << 62
MEMORY_BOUND_ROWS = 160  # below it the head's bytes take longer than its products, at 153 to 165 operations a byte

# (architecture, largest E) -> largest number of rows that goes fused; the first entry that fits counts
TABLE: tuple[tuple[str, int, int], ...] = (
    ("sm90", 576, ANY),
    ("sm90", ANY, MEMORY_BOUND_ROWS),
    ("sm80", 576, ANY),
    ("sm80", ANY, MEMORY_BOUND_ROWS),
    ("other", ANY, ANY),  # unknown card, or the interpreter: the path that needs no memory for logits
)


def choose_path(device: torch.device, width: int, num_rows: int) -> str:
    """The path of `num_rows` rows of `width` that take no gradient: `CPO_KERNELS_LOGPROB_PATH`, or the table.

    Raises:
        ValueError: the variable holds neither "chunk" nor "fused".
    """
    forced = os.environ.get(ENVIRONMENT_VARIABLE)
    if forced:
        if forced not in PATHS:
            raise ValueError(f"{ENVIRONMENT_VARIABLE}={forced!r}: expected one of {', '.join(map(repr, PATHS))}")
        _log_choice(forced, "the environment", 0, 0)
        return forced
    arch = architecture(device)
    max_width, max_rows = next(entry[1:] for entry in TABLE if entry[0] == arch and width <= entry[1])
    path = "fused" if num_rows <= max_rows else "chunk"
    _log_choice(path, arch, max_width, max_rows)
    return path


@functools.cache
def _log_choice(path: str, source: str, max_width: int, max_rows: int) -> None:
    bound = f" (E <= {max_width}, fused up to {max_rows} rows)" if max_rows else ""
    logger.info("linear_logprob: path %s by %s%s", path, source, bound)


def score(
    rows: torch.Tensor,  # [R, E]
    head: Head,
    plan: LogprobPlan,
    outputs: tuple[str, ...],
    mode: str,
    path: str | None = None,
) -> PairScores:
    """One pass of rows over the head. A head that is not contiguous is copied.

    `path` is one of `PATHS`, for rows in mode "none". None leaves it to `choose_path`.

    Raises:
        ValueError: float64 inputs, or a vocabulary of 2^24 or more.
    """
    if rows.dtype == torch.float64 or head.weight.shape[0] >= MAX_VOCAB:
        raise ValueError(
            f"linear_logprob: impl='triton' does not take {rows.dtype} and a vocabulary of {head.weight.shape[0]}; "
            "expected 16 or 32 bits and less than 2^24"
        )
    head, transform, rows = head.contiguous(), Transform.of(head), rows.contiguous()
    num_rows, asked = rows.shape[0], bool(outputs)
    nothing = rows.new_empty(0, dtype=torch.float32)
    slopes = rest = expected = target_weights = normalizer = nothing
    if mode == "none" and num_rows and (path or choose_path(rows.device, rows.shape[1], num_rows)) == "fused":
        logps, stats, is_top1 = fused_scores(rows, head, plan, asked)
    else:
        picked, logps, stats, expected = _through_chunks(rows, head, plan, asked, mode == "expected")
        is_top1 = picked >= stats[ROW_MAX][plan.pair_row]
        if mode in GRADED:
            slopes, rest = torch.full_like(picked, transform.slope), stats[REST].clone()
            if transform.capped:
                slopes *= 1.0 - (picked / transform.cap).square()
        if mode == "expected":
            target_weights = head.weight[plan.pair_target]
        elif mode == "recompute":
            normalizer = torch.stack((stats[ROW_MAX], stats[ROW_SUM]))
    return PairScores(
        logps,
        slopes,
        rest,
        expected,
        target_weights,
        normalizer,
        entropy=stats[ENTROPY][plan.pair_row] if "entropy" in outputs else None,
        mean_logit=stats[MEAN][plan.pair_row] if "mean_logit" in outputs else None,
        is_top1=is_top1 if "is_top1" in outputs else None,
    )


def _through_chunks(
    rows: torch.Tensor, head: Head, plan: LogprobPlan, with_outputs: bool, with_expected: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits and log-probs [U], `stats` [NUM_STATS, R], expected embedding [R, E] ([0] unless asked)."""
    picked, logps = (rows.new_empty(plan.pair_row.shape, dtype=torch.float32) for _ in range(2))
    stats = rows.new_empty(NUM_STATS, rows.shape[0], dtype=torch.float32)
    expected = rows.new_empty(rows.shape if with_expected else (0,), dtype=torch.float32)
    num_rows, vocab = rows.shape[0], head.weight.shape[0]
    step = head.chunk_rows(num_rows)
    # made once: the next chunk's would be made before the last one's are gone
    products = empty_chunk(step, vocab, rows, torch.float32)
    probabilities = empty_chunk(step if with_expected else 0, vocab, rows, head.weight.dtype)
    for first in range(0, num_rows, step):
        chunk, count = slice(first, first + step), min(step, num_rows - first)
        logits = matmul_accumulated(rows[chunk], head.weight.t(), out=products[:count])
        chunk_scores(logits, head, plan, first, picked, logps, stats, with_outputs)
        if with_expected:
            others = conditional_probabilities(logits, head, stats[:, chunk], probabilities[:count])
            scale = stats[REST, chunk] * (Transform.of(head).slope / PROBABILITY_SCALE)
            matmul_accumulated(others, head.weight, out=expected[chunk]).mul_(scale.unsqueeze(1))
    return picked, logps, stats, expected
