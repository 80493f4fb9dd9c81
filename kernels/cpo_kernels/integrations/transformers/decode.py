"""One forward of a stock model over a search tree's frontier: rows of many states, keys and values in the arena.

    token ids, positions -> backbone, whose layers call `tree_decode` -> hidden -> the model's own head -> float32 logits

Prefill and decode are the same call under different plans. The model must be prepared. Its live adapters take part.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace

import torch

from cpo_kernels.integrations.lora import fuse_lora
from cpo_kernels.integrations.transformers.fused import fuse_layers
from cpo_kernels.integrations.transformers.hook import check_layers_seen, prepared_parts
from cpo_kernels.integrations.transformers.logits import final_logits
from cpo_kernels.integrations.transformers.model import ModelParts, model_parts, peft_configs
from cpo_kernels.integrations.transformers.projections import merge_projections
from cpo_kernels.integrations.transformers.proof import proved_attention, proved_shapes, proved_windows
from cpo_kernels.integrations.transformers.rotary import defer_rotation, deferred_rotation
from cpo_kernels.tree_decode import DecodePlan, resolve_tree_decode

# A CPU's matrix library deals rows out to threads by fours. What is left over is summed in another order.
ROWS_PER_THREAD = 4


def fewer_kernels(model: torch.nn.Module) -> ModelParts:
    """Change a prepared model, in place, so that a decode step launches fewer kernels, and return its parts.

    Where the model's layers allow it, the projections of one input become one product, rotary position encoding is left
    to `tree_decode`, and norms, MLPs and live adapters are fused as `fuse_layers` and `fuse_lora` do. Names, shapes and
    values of weights stay. Sums may be taken in another order, so hidden states agree to rounding.

    Raises:
        KernelCheckError: nobody chose an implementation, and the fused layers are not right on the model's device.
    """
    parts = model_parts(model)
    merge_projections(parts.backbone)
    fuse_layers(model)
    if peft_configs(model):
        fuse_lora(model)
    return replace(parts, defers_rotation=defer_rotation(parts.backbone))


def arena_shapes(parts: ModelParts) -> list[tuple[int, int]]:
    """Key heads and head size of the keys and values that each decoder layer of a prepared model stores.

    Raises:
        ValueError: a layer's keys and values alone are not what its attention needs in a search.
    """
    if layer := proved_attention(parts).chooses_blocks:
        raise ValueError(
            f"{layer} chooses among blocks of its row's keys by their place in the row: a search has rows of many states; "
            "use an engine that runs the stock model"
        )
    return [(shape.num_heads, shape.head_dim) for shape in proved_shapes(parts)]


@torch.no_grad()
def decode_forward(
    model: torch.nn.Module | ModelParts,
    token_ids: torch.Tensor,  # [N] int
    position_ids: torch.Tensor,  # [N] int
    plan: DecodePlan,
    arena: Sequence[tuple[torch.Tensor, torch.Tensor]],  # per layer k and v [C, Hkv, D]
    rows: torch.Tensor | None = None,  # [R] int64
    impl: str | None = None,
) -> torch.Tensor:
    """Final hidden states of N rows, whose keys and values are written to the arena.

    Args:
        model: a prepared model, or its parts as `model_parts` gives them.
        token_ids: [N], on the device of the model.
        position_ids: [N], each row's depth in tokens on its own path. Sliding windows go by the plan's depths.
        plan: of these N rows, on the same device.
        arena: for each layer k and v [C, Hkv, D] of `arena_shapes`, in the dtype of the model's keys, changed in place.
        rows: those whose hidden states are wanted. None: all.
        impl: implementation of tree_decode as `resolve_tree_decode` gives it. None resolves it here.

    Returns:
        [N, E], or [R, E], in the dtype of the model. On a CPU in float32 a row's bits are independent of the other
        rows if N is a multiple of `row_multiple()`.

    Raises:
        RuntimeError: a layer did not run tree_decode (its attention was swapped, or ignores keyword arguments).
        ValueError: the model was not prepared, a layer asks for attention twice or does not say which it is, or
            `tree_decode` cannot run on these inputs.
    """
    parts = prepared_parts(model, "decode_forward")
    layers_seen: set[int] = set()
    num_layers = len(proved_shapes(parts))  # 0 of a copy of a proved model
    if len(arena) != num_layers:
        raise ValueError(
            f"decode_forward: an arena of {len(arena)} layers for a model that was proved with {num_layers}; "
            "call prepare(model) on this very model and make the arena by arena_shapes"
        )
    windows = {layer: window.size for layer, window in proved_windows(parts).items() if window.slides}
    head_dims = {k.shape[-1] for k, _ in arena}
    with deferred_rotation(head_dims) if parts.defers_rotation else nullcontext() as rotation:
        hidden: torch.Tensor = parts.backbone(
            input_ids=token_ids.long().unsqueeze(0),
            position_ids=position_ids.long().unsqueeze(0),
            # a mask of four dimensions is handed through as it is: no N x N mask is made, and tree_decode reads none
            attention_mask=torch.empty(1, 1, 1, 1, dtype=torch.bool, device=token_ids.device),
            use_cache=False,
            decode_plan=plan,
            decode_arena=arena,
            decode_rotation=rotation,
            decode_windows=windows,
            tree_impl=impl or resolve_tree_decode(None, token_ids.device.type),
            layers_seen=layers_seen,
        ).last_hidden_state[0]
    check_layers_seen("tree_decode", layers_seen, parts)
    return hidden if rows is None else hidden.index_select(0, rows)


@torch.no_grad()
def next_logits(model: torch.nn.Module | ModelParts, hidden: torch.Tensor) -> torch.Tensor:
    """Logits of the next token, [R, V] float32: the model's own head on `hidden` [R, E], in the dtype of the model.

    What the model does to its head's products is done in float32.
    """
    parts, num_rows = prepared_parts(model, "decode_forward"), hidden.shape[0]
    missing = -num_rows % row_multiple()
    if hidden.device.type == "cpu" and missing:
        hidden = torch.cat([hidden, hidden.new_zeros(missing, hidden.shape[1])])
    return final_logits(parts, parts.head(hidden).float())[:num_rows]


def row_multiple() -> int:
    """Rows of a CPU forward come in multiples of it where each row's bits must not depend on how many there are.

    That is enough where the widths of layers are multiples of 8: in an activation function torch computes what is left
    over of a vector by other instructions.
    """
    return ROWS_PER_THREAD * torch.get_num_threads()
