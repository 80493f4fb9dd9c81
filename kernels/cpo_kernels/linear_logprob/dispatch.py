"""Which way rows that take no gradient go through the head: "chunk" (path A) or "fused" (path B).

Path A writes a chunk of logits, from the library's matrix product, and reads it again; path B keeps logits in registers
and pays with a matrix product of our own. The table holds, for an architecture and a width E, the largest number of rows
that goes fused. Every entry is a prediction and none is a measurement. The cost model behind them: a fused pass wins if
its product reaches the share x of the library's speed at which the saved traffic of the logits pays, x = 0.47 at
E = 576, 0.63 at 1024, 0.77 at 2048, 0.87 at 4096, 0.93 at 8192. Triton products were reported at 0.26 to 0.9 of the
library on compute capability 9.0 and near 0.3 on 8.0; below about 160 rows the pass waits for the weight's bytes and the
saved traffic counts whoever multiplies.

Rows that take a gradient always go path A, for their probabilities must meet the head a second time as stored operands:
one program cannot hold the expected embedding of a row tile, [128, E] in float32, in registers. Policy and
reference of one call take one path, so that equal hidden states give equal bits.
"""

import functools
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

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

_forced_path: ContextVar[str | None] = ContextVar("_forced_path", default=None)


@contextmanager
def path_forced(path: str) -> Iterator[None]:
    """Rows that take no gradient go this path here, whatever the environment and the table say: for checks."""
    assert path in PATHS, path
    token = _forced_path.set(path)
    try:
        yield
    finally:
        _forced_path.reset(token)


def choose_path(device: torch.device, width: int, num_rows: int) -> str:
    """The path of `num_rows` rows of `width` that take no gradient: `CPO_KERNELS_LOGPROB_PATH`, or the table.

    Raises:
        ValueError: the variable holds neither "chunk" nor "fused".
    """
    path_here = _forced_path.get()
    if path_here is not None:
        return path_here
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
