from typing import Any

from numpy import int32, int64
from numpy.typing import NDArray

def build_forest(
    tokens: NDArray[int64], offsets: NDArray[int64], pad_to_multiple_of: int
) -> tuple[NDArray[int32], NDArray[int32], NDArray[int32], NDArray[int32], NDArray[int32], NDArray[int64], int]: ...
def split_pairs(
    tokens: NDArray[int64], offsets: NDArray[int64], prompt_lengths: NDArray[int64], max_tokens: int
) -> tuple[NDArray[int64], NDArray[int64], NDArray[int64]]: ...
def tree_schedule(
    subtree_end: NDArray[Any], block_q: int, block_kv: int, num_heads: int, num_kv_heads: int, window: int = 0
) -> dict[str, NDArray[int32]]: ...
def validate_subtree_end(subtree_end: NDArray[Any]) -> None: ...
