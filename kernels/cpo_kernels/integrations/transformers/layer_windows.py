"""The attention window of every decoder layer, as the layers themselves get it: not what a configuration key says.

Two tokens run through the stock model. Its mask functions are told a window, and an attention layer is handed one of the
masks. Both are recorded, so a key that the model ignores (`use_sliding_window`, `layer_types`) cannot mislead.
"""

from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from cpo_kernels.integrations.transformers.model import ModelParts, decoder_layers

_RECORDING = "cpo_windows"  # attention implementation


def layer_windows(parts: ModelParts) -> dict[int, int]:
    """Tokens that a decoder layer sees at most, its own included, by layer. Layers that see everything are left out.

    Chunked attention counts with its chunk, and sparse attention with the number of keys that it keeps (`index_topk`):
    up to so many tokens both see everything. The model's attention is put back as it was.

    Raises:
        ValueError: a layer does not ask Transformers' attention interface, or hands it no keyword arguments.
    """
    windows: dict[int, int] = {}
    made: dict[int, tuple[torch.Tensor, int | None]] = {}  # masks by id, kept so that no id is used twice
    layer_now: list[int] = []
    reached: set[int] = set()  # layers that ask the attention interface
    handed: set[int] = set()  # those that also hand on what the caller says, as `subtree_end` will be

    def mask(*args: Any, local_size: int | None = None, **kwargs: Any) -> torch.Tensor | None:
        skips = {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}  # else a short row has no mask
        result = sdpa_mask(*args, local_size=local_size, **(kwargs | skips))
        if result is not None:
            made[id(result)] = (result, local_size)
        return result

    def attention(
        module: torch.nn.Module, q: Any, k: Any, v: Any, attention_mask: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, None]:
        if id(attention_mask) in made:
            candidates = [made[id(attention_mask)][1]]
            attention_mask = None  # two tokens see each other under any window, as sdpa finds without one
        else:  # a mask of the model's own making: the shortest that it may be
            candidates = [kwargs.get("sliding_window"), *(size for _, size in made.values())]
        candidates += [getattr(each, "index_topk", None) for each in module.modules()]
        found = [window for window in candidates if window]
        reached.update(layer_now[-1:])
        if kwargs.get("layers_seen") is reached:
            handed.update(layer_now[-1:])
        if found and layer_now:
            windows[layer_now[-1]] = min(found)
        return sdpa_attention_forward(module, q, k, v, attention_mask, **kwargs)[0], None

    AttentionInterface.register(_RECORDING, attention)
    AttentionMaskInterface.register(_RECORDING, mask)
    previous = parts.config._attn_implementation
    layers, hooks = decoder_layers(parts), []
    for index, layer in enumerate(layers):
        hooks.append(layer.register_forward_pre_hook(lambda *_, index=index: layer_now.append(index)))
    try:
        parts.causal_lm.set_attn_implementation(_RECORDING)
        ids = torch.tensor([[0, 1]], device=next(parts.causal_lm.parameters()).device)
        with torch.no_grad():
            parts.backbone(input_ids=ids, use_cache=False, layers_seen=reached)
    finally:
        parts.causal_lm.set_attn_implementation(previous)
        for hook in hooks:
            hook.remove()
    for index, layer in enumerate(layers):
        if index not in handed:
            own = [type(each).__name__ for each in layer.modules() if "ttention" in type(each).__name__]
            name = f"{type(parts.causal_lm).__name__} ({own[0] if own else type(layer).__name__})"
            how = "keeps the caller's keyword arguments from" if index in reached else "does not ask"
            raise ValueError(
                f"decoder layer {index} of {name} {how} "
                "Transformers' attention interface, so tree attention cannot take its place; use another model"
            )
    return windows
