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
def instruction_sets() -> list[str]: ...
def use_instruction_set(name: str) -> None: ...
def tree_attention_forward(
    q: NDArray[Any],
    k: NDArray[Any],
    v: NDArray[Any],
    start: NDArray[int32],
    stop: NDArray[int32],
    end: NDArray[int32],
    scale: float,
    window: int,
    softcap: float,
    sinks: NDArray[Any] | None,
    out: NDArray[Any],
    log_sum_exp: NDArray[Any],
    num_threads: int,
) -> None: ...
def tree_attention_backward(
    q: NDArray[Any],
    k: NDArray[Any],
    v: NDArray[Any],
    start: NDArray[int32],
    stop: NDArray[int32],
    end: NDArray[int32],
    scale: float,
    window: int,
    softcap: float,
    sinks: NDArray[Any] | None,
    log_sum_exp: NDArray[Any],
    delta: NDArray[Any],
    grad_out: NDArray[Any],
    grad_q: NDArray[Any] | None,
    grad_k: NDArray[Any] | None,
    grad_v: NDArray[Any] | None,
    num_threads: int,
) -> None: ...
def tree_decode(
    q: NDArray[Any],
    k_new: NDArray[Any],
    v_new: NDArray[Any],
    k_arena: NDArray[Any],
    v_arena: NDArray[Any],
    dtype: str,
    slots: NDArray[int64],
    start: NDArray[int64],
    count: NDArray[int64],
    node: NDArray[int64],
    offsets: NDArray[int64],
    own_start: NDArray[int64],
    own_count: NDArray[int64],
    scale: float,
    window: int,
    softcap: float,
    sinks: NDArray[Any] | None,
    out: NDArray[Any],
    num_threads: int,
) -> None: ...
