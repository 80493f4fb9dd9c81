"""How many threads compute: one for a tiny model on a CPU, in a command, where OMP_NUM_THREADS does not say how many.

Threads share out a product and then wait for the last of them. In products as small as a tiny model's that gains nothing,
and beside other work the last one waits for a core.
"""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

logger = logging.getLogger(__name__)

# parameters. The shipped reasoner has 0.6 million and gains nothing by a second thread, SmolLM2 has 135 million and does
TINY = 10_000_000
_in_command = False
_before: int | None = None  # threads that were set before one was chosen


@contextmanager
def one_for_tiny_models() -> Iterator[None]:
    """Let `choose_threads` choose for the length of the block. Only the command line opens it: it is for the process."""
    global _in_command, _before
    _in_command = True
    try:
        yield
    finally:
        if _before is not None:
            import torch

            torch.set_num_threads(_before)
        _in_command, _before = False, None


def choose_threads(model: Any) -> None:
    """Compute with one thread from here on, if `model` is tiny and on a CPU."""
    global _before
    if not _in_command or _before is not None or "OMP_NUM_THREADS" in os.environ or model.device.type != "cpu":
        return
    num_parameters = sum(each.numel() for each in model.parameters())
    if num_parameters < TINY:
        import torch

        _before = torch.get_num_threads()
        torch.set_num_threads(1)
        logger.debug("one thread for a model of %d parameters; OMP_NUM_THREADS sets another number", num_parameters)
