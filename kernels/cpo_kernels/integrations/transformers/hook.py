"""The attention function `cpo_tree` that stock Hugging Face modules call: tree attention on a forest, SDPA otherwise.

It is registered once under one name and stays for the model's life. A forward with `subtree_end` among its keyword
arguments is a forest, one with `decode_plan` a search tree's frontier over its arena. Without either the call goes to
Transformers' own `sdpa` with its own mask, or to the model's own `eager` where the layer has a soft-cap or sinks, so
`generate`, padded batches and caches behave as before. No function here switches back: while a graph is alive,
checkpointed layers would silently recompute with another attention.
"""

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.functional import pad
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from cpo_kernels.device import autocast_inputs
from cpo_kernels.integrations.transformers.model import ModelParts, model_parts
from cpo_kernels.integrations.transformers.rotary import DeferredRotation
from cpo_kernels.tree_attention import TreeSchedule, Window, attention_layer, resolve_tree_attention
from cpo_kernels.tree_decode import DecodePlan, decode_layer, resolve_tree_decode

IMPLEMENTATION = "cpo_tree"
# keyword arguments of an attention call that change its result and that tree attention does not compute
_UNSUPPORTED = ("position_bias", "cache")


def cpo_tree_attention(
    module: torch.nn.Module,
    query: torch.Tensor,  # [B, H, T, D]
    key: torch.Tensor,  # [B, Hkv, T, D]
    value: torch.Tensor,  # [B, Hkv, T, Dv]
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    subtree_end: torch.Tensor | None = None,  # [T] int32
    tree_schedule: TreeSchedule | None = None,
    tree_impl: str | None = None,  # resolved; None where somebody calls the model itself
    tree_windows: dict[int, Window] | None = None,  # by layer, those that are shorter than a path
    layers_seen: set[int] | None = None,
    decode_plan: DecodePlan | None = None,
    decode_arena: Sequence[tuple[torch.Tensor, torch.Tensor]] = (),  # per layer k and v [C, Hkv, D]
    decode_rotation: DeferredRotation | None = None,
    decode_windows: dict[int, int] | None = None,  # by layer, those that slide
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,  # [H] attention sinks
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of one layer, [B, T, H, Dv], where B is 1 for a forest. Adds the layer's index to `layers_seen`.

    Where values have another head size than keys, as in latent attention, zeros fill the smaller up. That is exact: they
    add nothing to a score, and their columns of the output are cut off.

    With `decode_plan` the rows are those of a search tree's frontier, which read and write `decode_arena`. With
    `decode_rotation` their queries and keys may come without position encoding, which is then applied here.

    Raises:
        ValueError: a forest call with attention dropout, a batch above 1, a KV cache, or an option that changes the
            result (position bias, bidirectional attention).
    """
    if subtree_end is None and decode_plan is None:
        options = kwargs if softcap is None and s_aux is None else kwargs | {"softcap": softcap, "s_aux": s_aux}
        stock = sdpa_attention_forward if options is kwargs else eager_attention
        return stock(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **options)[0], None
    unsupported = [name for name in _UNSUPPORTED if kwargs.get(name) is not None]
    if unsupported or kwargs.get("is_causal") is False:
        raise ValueError(f"cpo_tree: {module.__class__.__name__} asks for {unsupported or ['bidirectional attention']}")
    if dropout:
        raise ValueError(f"cpo_tree: attention dropout {dropout} is not defined on shared prefixes; set it to 0")
    if query.shape[0] != 1 or key.shape[2] != query.shape[2]:
        raise ValueError("cpo_tree: a forest is one row without a KV cache; pass batch 1 and use_cache=False")
    layer: Any = getattr(module, "layer_idx", None)
    if decode_plan is not None:
        _check_arena_layer(module, layer, layers_seen, len(decode_arena))
    if layers_seen is not None:
        layers_seen.add(id(module) if layer is None else layer)
    # not heads[0]: its gradient would be written into zeros first
    q, k, v = (heads.squeeze(0).transpose(0, 1) for heads in (query, key, value))
    value_dim, head_dim = v.shape[-1], max(k.shape[-1], v.shape[-1])
    if k.shape[-1] != v.shape[-1]:
        scaling = k.shape[-1] ** -0.5 if scaling is None else scaling
        q, k, v = (pad(heads, (0, head_dim - heads.shape[-1])) for heads in (q, k, v))
    if decode_plan is not None:
        k_arena, v_arena = decode_arena[layer]
        window = decode_windows.get(layer) if decode_windows else None
        impl = tree_impl or resolve_tree_decode(None, q.device.type)
        rotary = None if decode_rotation is None else decode_rotation.take(query, key)
        output = decode_layer(q, k, v, k_arena, v_arena, decode_plan, scaling, impl, rotary, window, softcap, s_aux)
    else:
        assert subtree_end is not None
        impl = tree_impl or resolve_tree_attention(None, q.device.type)
        window = tree_windows.get(module.layer_idx) if tree_windows else None  # type: ignore[call-overload]
        with autocast_inputs(q, k, v) as (q, k, v):
            output = attention_layer(q, k, v, subtree_end, tree_schedule, scaling, impl, window, softcap, s_aux)
    return output[..., :value_dim].unsqueeze(0).contiguous(), None  # some models take a view of it, as of sdpa's


def _check_arena_layer(module: torch.nn.Module, layer: Any, layers_seen: set[int] | None, num_layers: int) -> None:
    """Raise ValueError for a layer whose keys and values a search would not find again, or would overwrite."""
    name = type(module).__name__
    if not isinstance(layer, int) or not 0 <= layer < num_layers:
        raise ValueError(
            f"{name} says that it is decoder layer {layer} of {num_layers}: a search would not find its keys and values"
        )
    if layers_seen is not None and layer in layers_seen:
        raise ValueError(
            f"decoder layer {layer} ({name}) asks for attention twice: a search keeps one set of keys and values for it"
        )


def eager_attention(
    module: torch.nn.Module,
    query: torch.Tensor,  # [B, H, T, D]
    key: torch.Tensor,  # [B, Hkv, C, D]
    value: torch.Tensor,  # [B, Hkv, C, Dv]
    attention_mask: torch.Tensor | None,  # [B, 1, T, C] bool or added to the scores. None: causal
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """A model's own `eager` attention under a mask that was made for `sdpa`: [B, T, H, Dv], and what else it gives."""
    if attention_mask is None:  # as `sdpa` reads it: a single row sees all
        attention_mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device)
        attention_mask = attention_mask.tril() if query.shape[2] > 1 else attention_mask
    if attention_mask.dtype == torch.bool:
        hidden = torch.finfo(query.dtype).min
        attention_mask = torch.zeros_like(attention_mask, dtype=query.dtype).masked_fill(~attention_mask, hidden)
    own = sys.modules[type(module).__module__].eager_attention_forward
    result: tuple[torch.Tensor, torch.Tensor | None] = own(module, query, key, value, attention_mask, **kwargs)
    return result


def register() -> None:
    """Make `cpo_tree` known to Transformers, with the mask function of `sdpa` for calls that are no forest."""
    AttentionInterface.register(IMPLEMENTATION, cpo_tree_attention)
    AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)


def prepared_parts(model: torch.nn.Module | ModelParts, caller: str) -> ModelParts:
    """The parts of a model whose attention is `cpo_tree`. ValueError, naming the caller, for another."""
    parts = model if isinstance(model, ModelParts) else model_parts(model)
    if parts.config._attn_implementation != IMPLEMENTATION:
        raise ValueError(
            f"the model's attention is '{parts.config._attn_implementation}', not '{IMPLEMENTATION}': "
            f"call prepare(model) once before {caller}"
        )
    return parts


def check_layers_seen(op: str, layers_seen: set[int], parts: ModelParts) -> None:
    """Raise RuntimeError unless every layer ran an op: `sdpa` would swallow the keyword arguments without a word."""
    if len(layers_seen) != parts.config.num_hidden_layers:
        raise RuntimeError(
            f"{op} ran in {len(layers_seen)} of {parts.config.num_hidden_layers} layers of "
            f"{type(parts.causal_lm).__name__}: its attention was changed after prepare(), or is not a standard one"
        )
