"""Claims about the tiles of tree_attention: every one that is shipped is exact, whichever card it is shipped for."""

import pytest
import torch

from cpo_kernels import tree_schedule
from cpo_kernels.tree_attention.check import in_parts
from tests.cpo_kernels.attention_oracle import excess, random_heads, triton_results
from tests.cpo_kernels.kernel_device import DEVICE, runs_kernels

# A trunk that fills blocks, two branches of which one leaves a block where another starts, padding, and a ragged end.
ENDS = [190] * 134 + [171] * 37 + [190] * 19 + [191, 192, 193]


@runs_kernels
@pytest.mark.parametrize("head_dim", [48, 80, 144])  # padded to 64, 128 and 256
@pytest.mark.parametrize("arch", [80, 90])
def test_every_tile_is_within_twice_the_same_dtype_error(
    arch: int, head_dim: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under the default blocks, which no tile exceeds. Query ranges whole and in parts; past the last row lies NaN."""
    from cpo_kernels.tree_attention import triton_backward, triton_forward
    from cpo_kernels.triton_tiles import padded_head_dim, tile_architecture

    if DEVICE == "cuda" and arch > tile_architecture(torch.device(DEVICE)):
        pytest.skip("the tiles of a card with more shared memory")
    chosen: list[torch.device] = []

    def architecture(device: torch.device) -> int:
        chosen.append(device)
        return arch

    for module in (triton_forward, triton_backward):
        monkeypatch.setattr(module, "tile_architecture", architecture)
    subtree_end = torch.tensor(ENDS, dtype=torch.int32)
    schedule = in_parts(tree_schedule(subtree_end))
    for table in (triton_forward.TILES, triton_backward.QUERY_TILES, triton_backward.KEY_TILES):
        tile = table[arch][padded_head_dim(head_dim)]
        assert tile.block_q <= schedule.block_q
        assert tile.block_kv <= schedule.block_kv
    longer = random_heads(len(ENDS) + 128, 2, 1, head_dim, torch.bfloat16)
    longer[0] *= (16 / head_dim) ** 0.5  # scores keep the size for which `excess` allows
    for tensor in longer:
        tensor[len(ENDS) :] = float("nan")
    inputs = [tensor[: len(ENDS)] for tensor in longer]
    ratios = excess(triton_results(inputs, subtree_end, schedule), inputs, subtree_end)
    assert max(ratios.values()) <= 1.0, ratios
    assert len(chosen) == 3, "forward, dq, dk and dv"


@pytest.mark.parametrize(
    ("capability", "arch"),
    [((7, 5), 80), ((8, 0), 80), ((8, 9), 80), ((9, 0), 90), ((10, 0), 90), ((10, 3), 90), ((12, 0), 80)],
)
def test_a_card_takes_the_tiles_of_the_nearest_lower_one(
    capability: tuple[int, int], arch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """12.x goes further down: it has the matrix instructions of 8.0 and less shared memory than 9.0."""
    from cpo_kernels.triton_tiles import tile_architecture

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert tile_architecture(torch.device("cuda", 0)) == arch
    assert tile_architecture(torch.device("cpu")) == 80


def test_rows_too_far_apart_for_32_bit_addresses_of_a_tile_are_copied() -> None:
    from cpo_kernels.tree_attention import triton_backward, triton_forward
    from cpo_kernels.triton_tiles import MAX_ROW_STRIDE, by_rows

    tables = (triton_forward.TILES, triton_backward.QUERY_TILES, triton_backward.KEY_TILES)
    tiles = [tile for table in tables for rows in table.values() for tile in rows.values()]
    assert max(max(tile.block_q, tile.block_kv) for tile in tiles) * MAX_ROW_STRIDE <= 2**31
    near, far = (
        torch.empty_strided((3, 1, 16), (stride, 16, 1), device="meta")
        for stride in (MAX_ROW_STRIDE, MAX_ROW_STRIDE + 1)
    )
    assert by_rows(near) is near
    assert by_rows(far).is_contiguous()
