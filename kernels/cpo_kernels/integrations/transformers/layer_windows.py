"""What attention every decoder layer asks for, as the layers themselves get it: not what a configuration key says.

Two tokens run through the stock model. Its mask functions are told a window, and an attention layer is handed one of the
masks. Both are recorded, so a key that the model ignores (`use_sliding_window`, `layer_types`) cannot mislead. The mask's
own function says whether the window slides: attention in chunks is told its size in the same place. The shapes of keys and
values are those of the tensors that the attention function really gets.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import CellType, FunctionType
from typing import Any, NamedTuple

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, sdpa_mask

from cpo_kernels.integrations.transformers.attention_scores import check_scores
from cpo_kernels.integrations.transformers.model import ModelParts, decoder_layers
from cpo_kernels.tree_attention import WINDOWED, Window

_RECORDING = "cpo_windows"  # attention implementation


class LayerWindow(NamedTuple):
    """A layer sees whole rows of up to `size` tokens, and of longer ones not everything."""

    size: int
    slides: bool  # a token of a longer row sees the last `size`, itself included. False: something else, or not known


@dataclass(frozen=True)
class LayerAttention:
    """The attention of a model's decoder layers.

    Attributes:
        windows: by layer, without those that see everything.
        shapes: of each layer.
        heads: query heads and key heads of the first layer.
        capped, has_sinks: whether some layer hands its attention function a soft-cap, or sinks.
        chooses_blocks: the first layer that chooses among blocks of its row's keys, by name. Empty: none does.
    """

    windows: dict[int, LayerWindow] = field(default_factory=dict)
    shapes: "Sequence[KVShape]" = ()
    heads: tuple[int, int] = (1, 1)
    capped: bool = False
    has_sinks: bool = False
    chooses_blocks: str = ""


class KVShape(NamedTuple):
    """Keys [B, num_heads, T, key_dim] and values [B, num_heads, T, value_dim] of a layer."""

    num_heads: int
    key_dim: int
    value_dim: int

    @property
    def head_dim(self) -> int:
        """That of tree attention, for which zeros fill the smaller of the two up."""
        return max(self.key_dim, self.value_dim)


def forest_windows(windows: dict[int, LayerWindow], depths: torch.Tensor, longest_path: int) -> dict[int, Window]:
    """What a forest's forward is told, by layer, from the sliding windows that some path outgrows.

    Args:
        windows: of `layer_attention`.
        depths: [T] integer, each row's place on its own path.
        longest_path: in tokens. `proof.check_path` has let it through.
    """
    return {layer: Window(depths, window.size) for layer, window in windows.items() if longest_path > window.size}


def limiting_windows(windows: dict[int, LayerWindow], impl: str | None) -> dict[int, LayerWindow]:
    """The windows that no path may outgrow: all but the sliding ones that are computed.

    Args:
        impl: of `resolve_tree_attention`, None where no forest is computed but a search, which computes all of them.
    """
    computed = impl is None or impl in WINDOWED
    return {layer: window for layer, window in windows.items() if not (window.slides and computed)}


def layer_attention(parts: ModelParts) -> LayerAttention:
    """What attention the decoder layers ask for.

    Chunked attention counts with its chunk, and sparse attention with the number of keys that it keeps: up to so many
    tokens both see everything. The model's attention is put back as it was.

    Raises:
        ValueError: a layer does not ask Transformers' attention interface, hands it no keyword arguments, chooses keys
            and does not say how many, adds a mask of its own to the scores, or asks for something that tree attention
            computes otherwise (`check_scores`).
    """
    asked: dict[int, list[LayerWindow]] = {}  # by layer, size 0 for none
    made: dict[int, tuple[torch.Tensor, LayerWindow]] = {}  # masks by id, kept so that no id is used twice
    shapes: dict[int, KVShape] = {}  # by layer
    heads: list[tuple[int, int]] = []  # query heads and key heads, call by call
    options: set[str] = set()  # that change scores
    kept_keys: list[int] = []  # of layers that choose, call by call
    in_blocks: list[str] = []  # layers that choose among blocks
    layer_now: list[int] = []
    reached: set[int] = set()  # layers that ask the attention interface
    handed: set[int] = set()  # those that also hand on what the caller says, as `subtree_end` will be

    def mask(
        *args: Any,
        mask_function: Callable[..., Any] = causal_mask_function,
        local_size: int | None = None,
        **kwargs: Any,
    ) -> torch.Tensor | None:
        skips = {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}  # else a short row has no mask
        result = sdpa_mask(*args, mask_function=mask_function, local_size=local_size, **(kwargs | skips))
        if result is not None:
            slides = local_size is not None and _slides(mask_function, local_size, result.device)
            made[id(result)] = (result, LayerWindow(local_size or 0, slides))
        return result

    def attention(
        module: torch.nn.Module, q: Any, k: Any, v: Any, attention_mask: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, None]:
        if id(attention_mask) in made:
            candidates = [made[id(attention_mask)][1]]
            attention_mask = None  # two tokens see each other under any window, as sdpa finds without one
        else:  # a mask of the model's own making: the shortest that it may be
            if layer_now:
                _check_mask(parts, layer_now[-1], module, attention_mask)
            sizes = [kwargs.get("sliding_window"), *(window.size for _, window in made.values())]
            candidates = [LayerWindow(size or 0, False) for size in sizes]
        kept_keys.extend(size for each in module.modules() if (size := _num_kept_keys(each)))
        if chosen := [name for name, value in kwargs.items() if name.endswith("indices") and value is not None]:
            name = f"decoder layer {layer_now[-1] if layer_now else '?'} ({type(module).__name__})"
            if not kept_keys:
                raise ValueError(
                    f"{name} of {type(parts.causal_lm).__name__} chooses the keys that a token sees ({chosen[0]}), and how "
                    "many it keeps is not known to this library; use another model"
                )
            # a layer without an index of its own takes the choice of one before it
            candidates.append(LayerWindow(min(kept_keys), False))
            in_blocks.extend([name] if "block_indices" in chosen else [])
        found = min((window for window in candidates if window.size), default=LayerWindow(0, False))
        reached.update(layer_now[-1:])
        if kwargs.get("layers_seen") is reached:
            handed.update(layer_now[-1:])
        if layer_now:
            shapes[layer_now[-1]] = KVShape(k.shape[1], k.shape[3], v.shape[3])
            heads.append((q.shape[1], k.shape[1]))
            options.update(name for name in ("softcap", "s_aux") if kwargs.get(name) is not None)
            check_scores(parts, layer_now[-1], module, q, k, v, kwargs)
            # a forest finds a layer's window by this index
            named = getattr(module, "layer_idx", None) == layer_now[-1]
            asked.setdefault(layer_now[-1], []).append(found._replace(slides=found.slides and named))
        kwargs.pop("softcap", None)  # what two tokens give is not read
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
        # the tables are the library's and stay: what records there would keep the model alive
        AttentionInterface.register(_RECORDING, sdpa_attention_forward)
        AttentionMaskInterface.register(_RECORDING, sdpa_mask)
    for index, layer in enumerate(layers):
        if index not in handed:
            own = [type(each).__name__ for each in layer.modules() if "ttention" in type(each).__name__]
            name = f"{type(parts.causal_lm).__name__} ({own[0] if own else type(layer).__name__})"
            how = "keeps the caller's keyword arguments from" if index in reached else "does not ask"
            raise ValueError(
                f"decoder layer {index} of {name} {how} "
                "Transformers' attention interface, so tree attention cannot take its place; use another model"
            )
    windows: dict[int, LayerWindow] = {}
    for index, found in asked.items():
        if sizes := [window.size for window in found if window.size]:
            # attention that is asked twice in a layer may mean two windows
            windows[index] = LayerWindow(min(sizes), len(found) == 1 and found[0].slides)
    all_shapes = [shapes[index] for index in range(len(layers))]
    blocks = in_blocks[0] if in_blocks else ""
    return LayerAttention(windows, all_shapes, heads[0], "softcap" in options, "s_aux" in options, blocks)


def _num_kept_keys(module: torch.nn.Module) -> int:
    """Up to how many tokens a module that chooses keys keeps all of them. 0: it does not choose, or does not say."""
    blocks = (getattr(module, "topk_blocks", None) or 0) * (getattr(module, "block_size", None) or 0)
    return getattr(module, "index_topk", None) or blocks


def _check_mask(parts: ModelParts, layer: int, module: torch.nn.Module, mask: torch.Tensor | None) -> None:
    """Raise ValueError for a mask [.., 2, 2] of a model's own making that does more than hide what comes later."""
    if mask is None:
        return
    hidden = torch.ones(2, 2, dtype=torch.bool, device=mask.device).triu(1)
    seen = ~mask if mask.dtype == torch.bool else mask
    if bool(seen.masked_fill(hidden, 0).any()):
        raise ValueError(
            f"decoder layer {layer} of {type(parts.causal_lm).__name__} ({type(module).__name__}) adds a mask of its own "
            "making to the scores of attention, which tree attention does not compute; use another model"
        )


def _slides(mask_function: Callable[..., Any], size: int, device: torch.device) -> bool:
    """Whether a mask function of Transformers, (batch, head, query, key) -> visible, is causal with a sliding window."""
    last = 3 * size + 1
    mask_function = _longer(mask_function, last + 1)
    places = sorted({place for place in (0, 1, size - 1, size, size + 1, last // 2, last - size, last) if place >= 0})
    index = torch.tensor(places, device=device)
    query, key = index[:, None], index[None]
    first = torch.zeros((), dtype=torch.int64, device=device)
    visible = mask_function(first, first, query, key)
    return torch.equal(visible.expand(len(places), len(places)), (key <= query) & (key > query - size))


def _longer(value: Any, length: int) -> Any:
    """A mask function whose tensors, made for a short row, go on to `length` tokens as they end."""
    if isinstance(value, tuple):
        return tuple(_longer(each, length) for each in value)
    if isinstance(value, torch.Tensor) and value.dim() > 1:  # [B, T]: a kind for each token
        return torch.cat([value, value[..., -1:].expand(*value.shape[:-1], length)], dim=-1)
    if not isinstance(value, FunctionType) or value.__closure__ is None:
        return value
    cells = tuple(CellType(_longer(cell.cell_contents, length)) for cell in value.__closure__)
    return FunctionType(value.__code__, value.__globals__, value.__name__, value.__defaults__, cells)
