"""Which sliding window each layer of a forest's forward has, as the model itself says it.

A stock model makes one mask for each kind of its layers, by functions of Transformers that hand (query index, key index)
-> visible, beside the padding mask of the call, to the mask function of the attention implementation. Where that padding
mask is `asking_mask`, ours answers with the window alone, as a mask of one element, and the layers hand that to the
attention hook. So no configuration key has to be trusted, and no T x T mask is made.
"""

from collections.abc import Callable
from typing import Any

import torch
from transformers.masking_utils import sdpa_mask

_ASKS = "asks_for_windows"  # attribute of a tensor; Transformers hands a bool mask on its device through as it is


def asking_mask(num_rows: int, device: torch.device) -> torch.Tensor:
    """A padding mask [1, T] without padding, for which `tree_mask` answers with windows."""
    mask = torch.ones(1, num_rows, dtype=torch.bool, device=device)
    setattr(mask, _ASKS, True)
    return mask


def tree_mask(
    *args: Any,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: torch.Tensor | None = None,
    local_size: int | None = None,
    **kwargs: Any,
) -> Any:
    """The mask function of the attention hook: that of `sdpa`, or [1, 1, 1, 1] int64, a layer's window, 0 for none.

    Raises:
        ValueError: behind `asking_mask`, a mask that is neither causal nor a sliding window (in chunks, bidirectional).
    """
    if attention_mask is None or not hasattr(attention_mask, _ASKS):
        given = {} if mask_function is None else {"mask_function": mask_function}
        return sdpa_mask(*args, attention_mask=attention_mask, local_size=local_size, **given, **kwargs)
    assert mask_function is not None
    device, window, last = kwargs["device"], local_size or 0, kwargs["q_length"] - 1
    places = sorted(
        {place for place in (0, 1, window - 1, window, last // 2, last - window, last) if 0 <= place <= last}
    )
    index = torch.tensor(places, device=device)
    query, key = index[:, None], index[None]
    expected = (key <= query) & (key > query - window if window else key >= 0)
    first = torch.zeros((), dtype=torch.int64, device=device)
    if not torch.equal(mask_function(first, first, query, key), expected):
        raise ValueError(
            "a layer's attention mask is neither causal nor a sliding window, which a forest does not compute"
        )
    return torch.full((1, 1, 1, 1), window, dtype=torch.int64, device=device)
