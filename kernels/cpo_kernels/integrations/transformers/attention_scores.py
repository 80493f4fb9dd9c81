"""Whether a layer's stock attention and tree attention do the same to scores far larger than today's.

A soft-cap far above the scores of a random forest, or a sink far below them, would show in no comparison of layers. So
each layer's attention function is called as the layer calls it, with keys that lie close together: all scores of a row are
about +256, then about -256, and differ by a few units. What is done to the scores must come out the same.
"""

from typing import Any

import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from cpo_kernels.integrations.transformers.hook import cpo_tree_attention, eager_attention
from cpo_kernels.integrations.transformers.model import ModelParts

SCORE = 256.0  # a soft-cap of 100 leaves 98.8 of it, one of 5000 changes its differences by 0.3 %
SPREAD = 2.0
TOKENS = 8
BOUND = 1e-3  # of the values. float32 rounds scores of 256 by 3e-5, the worst measured is below 1e-4


def check_scores(
    parts: ModelParts,
    layer: int,
    module: torch.nn.Module,
    query: torch.Tensor,  # [B, H, T, D]
    key: torch.Tensor,  # [B, Hkv, T, D]
    value: torch.Tensor,  # [B, Hkv, T, Dv]
    options: dict[str, Any],
) -> None:
    """Compare stock attention and tree attention on large scores, in float32.

    Args:
        parts: of the model.
        layer: index of the decoder layer.
        module: the attention module that calls.
        query, key, value: what it hands its attention function. Their shapes are read.
        options: the keyword arguments of that call.

    Raises:
        ValueError: the two differ.
    """
    device = query.device
    generator = torch.Generator().manual_seed(layer)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(device)

    scaling = options.get("scaling") or query.shape[-1] ** -0.5
    direction = torch.nn.functional.normalize(noise(query.shape[-1]), dim=0)
    k = direction + SPREAD / SCORE * noise(1, key.shape[1], TOKENS, key.shape[3])
    v = noise(1, value.shape[1], TOKENS, value.shape[3])
    options = {name: option for name, option in options.items() if name != "layers_seen"}
    tree: dict[str, Any] = {
        "subtree_end": torch.full((TOKENS,), TOKENS, dtype=torch.int32, device=device),
        "tree_impl": "reference",
    }
    stock = sdpa_attention_forward if parts.causal_lm._supports_sdpa else eager_attention
    for score in (SCORE, -SCORE):
        q = (score / scaling * direction).expand(1, query.shape[1], TOKENS, query.shape[3])
        want = stock(module, q, k, v, None, **options)[0]
        ours = cpo_tree_attention(module, q, k, v, None, **options, **tree)[0]
        difference = float((ours - want).norm() / v.norm())
        if not difference <= BOUND:
            raise ValueError(
                f"decoder layer {layer} of {type(parts.causal_lm).__name__} ({type(module).__name__}) does to attention "
                f"scores of {score:.0f} what tree attention does not (values differ by {difference:.1e}): a soft-cap or a "
                "sink that the layer does not hand to its attention function; use another model"
            )
