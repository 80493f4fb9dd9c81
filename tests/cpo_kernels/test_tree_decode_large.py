"""An arena of more than 2^31 elements: a 32-bit address anywhere would read or write another row.

The frontier lies at the end of a large arena; its results must be, bit for bit, those of an arena of its own.
"""

import pytest
import torch

from cpo_kernels.tree_decode import DecodePlan, tree_decode

HEADS, KV_HEADS, HEAD_DIM, NUM_KEYS = 4, 2, 64, 200
NUM_ELEMENTS = KV_HEADS * HEAD_DIM  # of an arena row


def outcome(first: int, device: str, impl: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and stored keys of three decoding rows and five prefilled ones, in an arena whose rows start at `first`."""
    root, node = (first, 150, 150), (first + 150, 5, 1)
    suffixes = [(first + 160, 7), (first + 170, 1), (first + 180, 20)]
    slots = [start + length - 1 for start, length in suffixes] + list(range(first + 150, first + 155))
    starts, lengths = zip(*suffixes, *[(0, 0)] * 5, strict=True)
    plan = DecodePlan.build(slots, [(0, 3, *root), (3, 5, *root), (3, 5, *node)], starts, lengths).to(device)
    generator = torch.Generator().manual_seed(3)
    used = torch.randn(2, NUM_KEYS, KV_HEADS, HEAD_DIM, generator=generator).to(device, torch.bfloat16)
    arena = torch.empty(2, first + NUM_KEYS, KV_HEADS, HEAD_DIM, device=device, dtype=torch.bfloat16)
    arena[:, first:] = used
    q, k_new, v_new = (
        torch.randn(8, count, HEAD_DIM, generator=generator).to(device, torch.bfloat16)
        for count in (HEADS, KV_HEADS, KV_HEADS)
    )
    out = tree_decode(q, k_new, v_new, arena[0], arena[1], plan, impl=impl)
    assert torch.equal(arena[1, plan.slots], v_new)
    return out, arena[0, first:].clone()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU with 20 GB free")
def test_rows_beyond_2_31_elements_give_the_bits_of_a_small_arena() -> None:
    first = 2**31 // NUM_ELEMENTS + 1
    for got, want in zip(outcome(first, "cuda", "triton"), outcome(0, "cuda", "triton"), strict=True):
        assert torch.equal(got, want)


def test_place_in_the_arena_changes_no_bit() -> None:
    """The same on a CPU, where the arena is small, so that the comparison itself is tested."""
    for got, want in zip(outcome(1000, "cpu", "eager"), outcome(0, "cpu", "eager"), strict=True):
        assert torch.equal(got, want)
