"""What the Triton kernels of all ops share: sizes of tiles, rows in and out of memory, and one step of online softmax.

Triton's interpreter runs the kernels on a CPU, for tests. It keeps bfloat16 as 16-bit integers: a product or a sum of
them is wrong without an error, and a cast to them cuts the low bits off instead of rounding. Under the constexpr UPCAST
operands are therefore float32 numbers that bfloat16 can hold, rounded as the GPU rounds. Products and sums are then
float32 in both.
"""

import os
from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # what triton.jit looks at when a kernel is defined
MIN_BLOCK = 16  # the least extent of a matrix instruction's operands
MAX_HEAD_DIM = 256  # above it one tile of queries and keys does not fit in shared memory
MAX_ROW_STRIDE = 2**24  # elements: the rows of a tile, 128 at most, then lie within 2^31 of each other
LOG2_E = 1.4426950408889634


@dataclass(frozen=True)
class Tile:
    """Extent of one program's tile and the resources it is compiled for."""

    block_q: int
    block_kv: int
    num_warps: int
    num_stages: int  # of software pipelining: tiles in flight
    num_passes: int = 1  # 2 where the results of a kernel, dk and dv, are made one after the other


# Of tree_attention by padded head size: float32 products run outside the matrix units and hold their operands in registers.
EXACT_TILES = {
    64: Tile(block_q=32, block_kv=32, num_warps=8, num_stages=1),
    128: Tile(block_q=16, block_kv=16, num_warps=4, num_stages=1),
    256: Tile(block_q=16, block_kv=16, num_warps=4, num_stages=1),
}


def tile_architecture(device: torch.device) -> int:
    """The compute capability, times ten, whose tiles a device takes: 80 or 90.

    One that has no tiles of its own takes those of the nearest lower one that has, and what is below 8.0 those of 8.0. So
    does 12.x, which has the matrix instructions of 8.0 and less shared memory than 9.0, and so does a CPU, for tests.
    """
    if device.type != "cuda":
        return 80
    return 90 if 9 <= torch.cuda.get_device_capability(device)[0] < 12 else 80


def choose_tile(
    op: str,
    head_dim: int,
    dtype: torch.dtype,
    table: dict[int, Tile],
    exact_table: dict[int, Tile],
    blocks: tuple[int, int] | None = None,
) -> Tile:
    """The tile for a head size and dtype.

    Args:
        op: name of the op, for messages.
        head_dim: D, at most 256.
        dtype: bfloat16, float16 or float32.
        table: tile by padded head size, for 16-bit inputs, of the device's architecture.
        exact_table: the same for float32.
        blocks: `block_q` and `block_kv` of a schedule. A tile may be smaller than its block, since every part of a full
            block is full and a mask is exact on every part of a partial one. It is never larger. Both are powers of two,
            so the smaller divides the larger.

    Raises:
        ValueError: head size, dtype or block sizes that no kernel is made for.
    """
    if head_dim > MAX_HEAD_DIM:
        raise ValueError(f"{op}: impl='triton' expects head_dim <= {MAX_HEAD_DIM}, got {head_dim}")
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(f"{op}: impl='triton' expects bfloat16, float16 or float32, got {dtype}")
    table = exact_table if dtype == torch.float32 else table
    tile = table[max(padded_head_dim(head_dim), min(table))]
    if blocks is None:
        return tile
    for name, block in zip(("block_q", "block_kv"), blocks, strict=True):
        if block < MIN_BLOCK or block & (block - 1):
            raise ValueError(
                f"{op}: impl='triton' expects a schedule whose {name} is a power of two >= {MIN_BLOCK}, got {block}"
            )
    return replace(tile, block_q=min(tile.block_q, blocks[0]), block_kv=min(tile.block_kv, blocks[1]))


def padded_head_dim(head_dim: int) -> int:
    """Columns of a tile: a power of two. Those past D are loaded as zero and not stored."""
    return max(MIN_BLOCK, triton.next_power_of_2(head_dim))


def by_rows(x: torch.Tensor) -> torch.Tensor:
    """[T, H, D] with adjacent elements in a row, and rows no further apart than MAX_ROW_STRIDE; copied only if not so."""
    return x if x.stride(2) == 1 and x.stride(0) <= MAX_ROW_STRIDE else x.contiguous()


@triton.jit
def as_operand(
    x: tl.tensor,  # [...] fp32
    dtype: tl.constexpr,
    UPCAST: tl.constexpr,
) -> tl.tensor:
    """`x` rounded to dtype, to nearest even, for a product or a store. Still float32 under UPCAST."""
    if not UPCAST:
        return x.to(dtype)
    elif dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        return (bits & -0x10000).to(tl.float32, bitcast=True)
    else:
        return x.to(dtype).to(tl.float32)


@triton.jit
def cast(
    x: tl.tensor,  # [...] fp32
    dtype: tl.constexpr,
    UPCAST: tl.constexpr,
) -> tl.tensor:
    """`x` as dtype, rounded to nearest even."""
    return as_operand(x, dtype, UPCAST).to(dtype)


@triton.jit
def listed_tile(
    blocks_ptr: tl.tensor,  # int32, key blocks of a schedule
    step: tl.tensor,  # counts tiles along the list
    last: tl.tensor,  # one past the last step
    TILES_PER_KV: tl.constexpr,
) -> tl.tensor:
    """int32, the tile of keys at one step of a list of key blocks, 0 past its end."""
    block = tl.load(blocks_ptr + step // TILES_PER_KV, mask=step < last, other=0)
    return block * TILES_PER_KV + step % TILES_PER_KV


@triton.jit
def apply_tree_mask(
    scores: tl.tensor,  # [queries, keys] or [keys, queries]
    rows: tl.tensor,  # int32, a row or a column
    keys: tl.tensor,  # int32, the other
    ends: tl.tensor,  # int32, subtree_end of the keys, shaped as they are
) -> tl.tensor:
    """The scores where the row sees the key, elsewhere -inf."""
    return tl.where((keys <= rows) & (rows < ends), scores, float("-inf"))


@triton.jit
def apply_window(
    scores: tl.tensor,  # [queries, keys] or [keys, queries]
    row_depths: tl.tensor,  # int32, a row or a column
    key_depths: tl.tensor,  # int32, the other
    window: tl.tensor,
) -> tl.tensor:
    """The scores where the key stands less than `window` above the row on its path, elsewhere -inf."""
    return tl.where(row_depths - key_depths < window, scores, float("-inf"))


@triton.jit
def accurate_tanh(x: tl.tensor) -> tl.tensor:
    """tanh in float32 to about two units in the last place, near zero too, where exponentials would cancel.

    Below 0.625 the polynomial of Cephes' tanhf (Moshier, 1989), above it 1 - 2 / (exp(2 x) + 1), which saturates.
    """
    square = x * x
    series = -5.70498872745e-3 * square + 2.06390887954e-2
    series = series * square - 5.37397155531e-2
    series = series * square + 1.33314422036e-1
    series = series * square - 3.33332819422e-1
    far = 1.0 - 2.0 / (tl.exp2(x * 2.8853900817779268) + 1.0)  # 2 log2(e)
    return tl.where(tl.abs(x) < 0.625, x + x * square * series, far)


@triton.jit
def online_softmax_step(
    maximum: tl.tensor,  # [Q] fp32, of the scores so far, -inf before the first
    total: tl.tensor,  # [Q] fp32, sum of 2^(score - maximum)
    acc: tl.tensor,  # [Q, D] fp32, sum of 2^(score - maximum) v
    scores: tl.tensor,  # [Q, K] fp32 in base 2, -inf where hidden
    v: tl.tensor,  # [K, D]
    dtype: tl.constexpr,  # of v in memory
    MASKED: tl.constexpr,  # a row may have seen nothing yet
    UPCAST: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Maximum, sum and weighted values after one more tile of keys."""
    new_maximum = tl.maximum(maximum, tl.max(scores, 1))
    offset = new_maximum
    if MASKED:  # a row that has seen nothing yet has maximum -inf, and -inf - -inf is NaN
        offset = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
    weights = tl.exp2(scores - offset[:, None])
    decay = tl.exp2(maximum - offset)
    total = total * decay + tl.sum(weights, 1)
    acc *= decay[:, None]
    acc = tl.dot(as_operand(weights, dtype, UPCAST), v, acc, input_precision="ieee")
    return new_maximum, total, acc


@triton.jit
def load_rows(
    pointer: tl.tensor,  # [T, .., D], at row 0 of one head
    rows: tl.tensor,  # [N] int32
    row_stride: tl.tensor,
    num_rows: tl.tensor,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CHECKED: tl.constexpr,
    UPCAST: tl.constexpr,
    NEAR: tl.constexpr = False,  # rows count from the first of one tile: half the registers for their addresses
) -> tl.tensor:
    """[N, BLOCK_D] of one head. Columns past HEAD_DIM are zero, and with CHECKED rows past `num_rows` too."""
    columns = tl.arange(0, BLOCK_D)
    if NEAR:
        addresses = pointer + (rows[:, None] * row_stride + columns[None, :])
    else:
        addresses = pointer + rows.to(tl.int64)[:, None] * row_stride + columns[None, :]
    if CHECKED:
        tile = tl.load(addresses, mask=(rows[:, None] < num_rows) & (columns[None, :] < HEAD_DIM), other=0.0)
    elif HEAD_DIM == BLOCK_D:
        tile = tl.load(addresses)
    else:
        tile = tl.load(addresses, mask=columns[None, :] < HEAD_DIM, other=0.0)
    if UPCAST:
        tile = tile.to(tl.float32)
    return tile


@triton.jit
def store_rows(
    pointer: tl.tensor,  # [T, num_heads, HEAD_DIM], contiguous
    tile: tl.tensor,  # [N, BLOCK_D] fp32
    rows: tl.tensor,  # [N] int32
    head: tl.tensor,
    num_heads: tl.tensor,
    num_rows: tl.tensor,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    UPCAST: tl.constexpr,
) -> None:
    """Round a tile and write its rows and columns that exist."""
    columns = tl.arange(0, BLOCK_D)
    addresses = pointer + (rows.to(tl.int64) * num_heads + head)[:, None] * HEAD_DIM + columns[None, :]
    values = cast(tile, pointer.dtype.element_ty, UPCAST)
    tl.store(addresses, values, mask=(rows[:, None] < num_rows) & (columns[None, :] < HEAD_DIM))
