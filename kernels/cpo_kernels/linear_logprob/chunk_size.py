"""How many rows meet the head at once: as many as memory holds, since every chunk of rows reads the whole weight.

A chunk's logits [rows, V] are the largest tensor of a pass. On a GPU a pass may hold 2^27 of them where a card of 80 GB is
mostly free, a smaller power of two on a smaller or a fuller card. That is decided once a process and device, when the
first pass or the first prediction of memory asks, and counts what the allocator has cached as free. No more than 1,024
rows: reading the weight takes 2 V E / 4.3e12 seconds on an H200 and a product 2 V E rows / 790e12, so from there on a read
is 0.18 of the product that hides it, and more rows would take memory for nothing. A pass of more rows is cut into the
fewest chunks, of about equal sizes. On a CPU the bound is 2^25 logits.

Policy and reference of one call are cut alike, so equal hidden states give bitwise equal log-probs whatever the size. From
one size to another float32 sums may round otherwise: a matrix library may choose another algorithm, and a row's partial
sums are over other splits. Nothing else depends on it, so ranks may have sizes of their own. Whoever needs the same bits
on cards of which one is fuller names the bound in `CPO_KERNELS_MAX_CHUNK_LOGITS`.
"""

import functools
import logging
import os

import torch

from cpo_kernels.device import free_and_total_bytes

logger = logging.getLogger(__name__)

CHUNK_VARIABLE = "CPO_KERNELS_MAX_CHUNK_LOGITS"
CPU_LOGITS = 1 << 25  # 128 MiB in float32
MOST_LOGITS = 1 << 27  # 512 MiB in float32
MOST_ROWS = 1024
BYTES_A_LOGIT = 12  # at most: float32 products, probabilities or gradients in the head's dtype, and a product of these
SHARE_OF_CARD, SHARE_OF_FREE = 32, 8  # a chunk takes at most one part of so many
ROW_TILE = 128  # rows of a matrix product's tile on sm80 and sm90
ALIGNED = 16  # a row of stored logits begins at a multiple of so many: 16-byte accesses whatever the vocabulary


def max_chunk_logits(device: torch.device) -> int:
    """Logits held at once on a device: `CPO_KERNELS_MAX_CHUNK_LOGITS`, or by memory.

    Raises:
        ValueError: the variable holds no positive whole number.
    """
    text = os.environ.get(CHUNK_VARIABLE)
    if not text:
        if device.type != "cuda":
            return CPU_LOGITS
        if not torch.cuda.is_available():  # a prediction for a card that is elsewhere
            return MOST_LOGITS
        return _logits_of_card(torch.cuda.current_device() if device.index is None else device.index)
    if not text.isdecimal() or int(text) == 0:
        raise ValueError(f"{CHUNK_VARIABLE}={text!r}: expected a positive whole number of logits")
    return int(text)


def chunk_rows(num_rows: int, vocab: int, device: torch.device) -> int:
    """Rows whose logits are held at once, from 1 to `num_rows`: whole tiles of a product where that many fit."""
    most = max(1, max_chunk_logits(device) // vocab)
    if device.type != "cpu" and not os.environ.get(CHUNK_VARIABLE):
        most = min(most, MOST_ROWS)
    tile = ROW_TILE if most >= ROW_TILE else 1
    most -= most % tile
    if device.type != "cpu" and num_rows > most:  # equal chunks: a short last one would wait for the weight
        num_chunks = -(-num_rows // most)
        most = -(-num_rows // (num_chunks * tile)) * tile
    return max(1, min(most, num_rows))


def row_stride(vocab: int) -> int:
    """Elements from one row of a chunk's logits to the next where kernels read them."""
    return -(-vocab // ALIGNED) * ALIGNED


def logits_that_fit(free_bytes: int, total_bytes: int) -> int:
    """The largest power of two, up to 2^27, of logits that take a small part of a card and of what is free on it."""
    room = min(total_bytes // SHARE_OF_CARD, free_bytes // SHARE_OF_FREE) // BYTES_A_LOGIT
    return min(MOST_LOGITS, 1 << max(0, room.bit_length() - 1))


@functools.cache
def _logits_of_card(index: int) -> int:
    """Asked once: the driver's answer takes longer than a small kernel, and a pass must not differ from the one before."""
    free, total = free_and_total_bytes(torch.device("cuda", index))
    logits = logits_that_fit(free, total)
    logger.info(
        "linear_logprob: chunks of at most %d logits, %.1f of %.1f GB are free", logits, free / 1e9, total / 1e9
    )
    return logits
