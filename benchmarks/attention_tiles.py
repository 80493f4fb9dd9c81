"""Tiles that the attention kernels could be compiled for, and a way to put one of them in the shipped one's place.

The alternatives are those whose machine code was read and priced before anything had run on a GPU, and the tiles that
were shipped until then (`BEFORE`), with which each warp group computed scores that another had computed already.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from cpo_kernels.tree_attention import triton_backward, triton_forward
from cpo_kernels.triton_tiles import INTERPRETED, Tile, padded_head_dim

SHIPPED, BEFORE = "shipped", "before"
BLOCK_KV = 64  # keys of a schedule's block where no tile wants more


@dataclass(frozen=True)
class Variant:
    """One set of tiles. None leaves the shipped one."""

    name: str
    forward: Tile | None = None
    grad_q: Tile | None = None
    grad_kv: Tile | None = None

    @property
    def block_kv(self) -> int:
        """Keys of a block of the schedule: at least those of the tile."""
        return max(BLOCK_KV, self.grad_kv.block_kv if self.grad_kv else 0)


def variants(architecture: int, head_dim: int) -> list[Variant]:
    """The shipped tiles, then the alternatives.

    Args:
        architecture: as `cpo_kernels.triton_tiles.tile_architecture` has it, 80 or 90.
        head_dim: D. Alternatives are known for 128; the interpreter has one, which shows that all of this runs.
    """
    if INTERPRETED:
        return [Variant(SHIPPED), Variant("dkv 16x32", grad_kv=Tile(16, 32, 4, 1))]
    if padded_head_dim(head_dim) != 128:
        return [Variant(SHIPPED)]
    found = [
        Variant(SHIPPED),
        Variant(BEFORE, forward=Tile(128, 64, 8, 2), grad_q=Tile(64, 64, 8, 2), grad_kv=Tile(32, 64, 8, 2)),
    ]
    if architecture >= 90:
        return [
            *found,
            # a block waits for its copies, which of three stages are on their way while it computes
            Variant("two stages", Tile(128, 64, 8, 2), Tile(128, 64, 8, 2), Tile(32, 64, 4, 2)),
            Variant("dq 64x64, 4 warps", grad_q=Tile(64, 64, 4, 2)),
            Variant("dkv 32x128, 8 warps", grad_kv=Tile(32, 128, 8, 3)),
            Variant("dkv 64x128, 8 warps", grad_kv=Tile(64, 128, 8, 3)),
            Variant("forward 64x64, 4 warps", forward=Tile(64, 64, 4, 3)),
        ]
    return [
        *found,
        Variant("two stages", forward=Tile(128, 32, 4, 2)),
        Variant("dq 128x64, 8 warps", grad_q=Tile(128, 64, 8, 2)),
        Variant("dkv 64x64, 8 warps", grad_kv=Tile(64, 64, 8, 2)),
    ]


@contextmanager
def installed(variant: Variant, architecture: int, head_dim: int) -> Iterator[None]:
    """The variant's tiles in the tables of 16-bit inputs, for the calls made within, backward calls too."""
    places = (
        (triton_forward.TILES, variant.forward),
        (triton_backward.QUERY_TILES, variant.grad_q),
        (triton_backward.KEY_TILES, variant.grad_kv),
    )
    kept = []
    for tables, tile in places:
        table = tables[architecture]
        key = max(padded_head_dim(head_dim), min(table))
        kept.append((table, key, table[key]))
        table[key] = tile or table[key]
    try:
        yield
    finally:
        for table, key, tile in kept:
            table[key] = tile
