"""Scoring by Triton kernels, and which of two paths rows without a gradient take. `eager` has the formulas.

Path A ("chunk") writes a chunk of logits, from the library's matrix product, and reads it again (`triton_chunked`).
Path B ("fused") keeps logits in registers and pays with a matrix product of our own (`triton_fused`). Rows that take a
gradient always go path A: their probabilities meet the head a second time as stored operands, because the expected
embedding of a row tile, [128, E] in float32, does not fit in one program's registers. Policy and reference of one call
go the same path, kernel for kernel and variant for variant, so equal hidden states give bitwise equal log-probs.

`TABLE` holds, for an architecture and a width E, the largest number of rows that goes fused. Every entry is a prediction,
none is a measurement. The cost model behind them: a fused pass wins if its product reaches the share x of the library's
speed at which the saved traffic of the logits pays, x = 0.47 at E = 576, 0.63 at 1024, 0.77 at 2048, 0.87 at 4096, 0.93
at 8192. Triton products were reported at 0.26 to 0.9 of the library on compute capability 9.0 and near 0.3 on 8.0. Below
about 160 rows the matrix product is memory-bound, so saving the logits' traffic wins even with a slower product.
"""

import functools
import logging
import os

import torch

from cpo_kernels.device import matmul_accumulated
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
    ("sm90", 1024, ANY),
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


def architecture(device: torch.device) -> str:
    """Row of the table for a device: "sm80", "sm90" or "other"."""
    if device.type != "cuda":
        return "other"
    capability = torch.cuda.get_device_capability(device)
    return {(8, 0): "sm80", (9, 0): "sm90"}.get(capability, "other")


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
