"""The log-prob call of OpenRLHF's `Actor` on a token forest: `actor(sequences, action_mask, attention_mask)` -> [B, A].

    log_probs[b, i]        = log softmax(logits[b, i] / temperature)[sequences[b, i + 1]]        [B, L - 1]
    action_log_probs[b, j] = log_probs[b, L - 1 - A + j] * action_mask[b, j]                     [B, A]

Samples of one prompt share it, so their rows become a tree. `packed_actor()` is a subclass of `openrlhf.models.Actor`;
`prepare_actor` and `actor_log_probs` are its two halves for an actor that exists already. The computation runs inside
`actor.model`'s own forward, so an engine that wraps that model is called as before.

Limits: OpenRLHF was not installed where this was tested, only its definition above and its call shape (0.5 to 0.8) were;
nothing was run under its DeepSpeed strategy, and ZeRO-3's sharded weights cannot work. Positions that are padding read
0 here and a meaningless number there. Refused by name: a temperature other than 1, full logits, entropy that needs a
gradient, ring attention, `packing_samples`.
"""

import importlib
import inspect
from dataclasses import dataclass
from typing import Any

import torch

from cpo_kernels.integrations.padded import PaddedLogps, packed_token_logps, route_forward
from cpo_kernels.integrations.transformers import prepare
from cpo_kernels.integrations.transformers.model import unwrap_peft

KEYWORD = "packed_scored"  # the argument of the model's forward that asks for packed log-probs
# what any OpenRLHF with this call shape names its arguments; later ones have defaults here
_ARGUMENTS = ("sequences", "action_mask", "attention_mask", "return_output")


@dataclass(frozen=True)
class ActorOutput:
    """What callers read besides the log-probs."""

    entropy: torch.Tensor | None = None  # [B, L - 1] nats, without gradient
    aux_loss: torch.Tensor | None = None


def prepare_actor(actor: Any) -> Any:
    """Make `actor.model` answer packed log-prob calls, in place; once, before DeepSpeed wraps it. Returns the actor.

    Raises:
        ValueError: the model cannot be packed exactly, or the actor packs samples itself.
    """
    if getattr(actor, "packing_samples", False):
        raise ValueError("prepare_actor: packing_samples=True packs without sharing prefixes; set it to False")
    prepare(actor.model)
    route_forward(unwrap_peft(actor.model), KEYWORD, _packed_forward)
    return actor


def actor_log_probs(
    actor: Any,
    sequences: torch.Tensor,  # [B, L] int64
    action_mask: torch.Tensor | None = None,  # [B, A]
    attention_mask: torch.Tensor | None = None,  # [B, L]
    return_output: bool = False,
    allgather_logits: bool = False,
    return_logprobs: bool = False,
    ring_attn_group: Any = None,
    packed_seq_lens: list[int] | None = None,
    return_entropy: bool = False,
) -> Any:
    """`Actor.forward` of a prepared actor: action log-probs [B, A], or with `return_logprobs` all of them [B, L - 1].

    Rows may be padded on either side; a mask with gaps between actions is fine. With `return_output` the result is a
    pair of log-probs and `ActorOutput`.

    Raises:
        ValueError: something is asked that a forest does not give; the sentence names it.
    """
    temperature = getattr(actor, "temperature", 1.0)
    refused = {
        f"temperature={temperature}": temperature != 1.0,
        "a call without attention_mask": attention_mask is None,
        "full logits (no action_mask and return_logprobs=False)": action_mask is None and not return_logprobs,
        "allgather_logits": allgather_logits,
        "ring_attn_group": ring_attn_group is not None,
        "packed_seq_lens": packed_seq_lens is not None,
        "return_entropy under a gradient": return_entropy and torch.is_grad_enabled(),
        "return_entropy without return_output": return_entropy and not return_output,
    }
    for what, asked in refused.items():
        if asked:
            raise ValueError(f"actor_log_probs does not support {what}")
    scored = torch.zeros_like(sequences, dtype=torch.bool)
    if return_logprobs or action_mask is None:
        scored[:, 1:] = True
    else:
        scored[:, sequences.shape[1] - action_mask.shape[1] :] = action_mask.bool()
    outputs = ("entropy",) if return_entropy else ()
    packed: PaddedLogps = actor.model(
        input_ids=sequences, attention_mask=attention_mask, **{KEYWORD: (scored, outputs)}
    )
    log_probs = packed.logps
    if not return_logprobs and action_mask is not None:
        log_probs = log_probs[:, log_probs.shape[1] - action_mask.shape[1] :] * action_mask.to(log_probs.dtype)
    return (log_probs, ActorOutput(packed.outputs.get("entropy"))) if return_output else log_probs


def packed_actor(actor_class: type | None = None) -> type:
    """A subclass of `actor_class` (None: `openrlhf.models.Actor`) that prepares its model and packs every call.

    Raises:
        ImportError: no class was given and OpenRLHF is not installed.
        RuntimeError: the class's forward does not have the call shape that `actor_log_probs` answers.
    """
    base: Any = actor_class or importlib.import_module("openrlhf.models").Actor
    shape = tuple(inspect.signature(base.forward).parameters)[1:]
    known = tuple(inspect.signature(actor_log_probs).parameters)[1:]
    if shape[: len(_ARGUMENTS)] != _ARGUMENTS or set(shape) - set(known):
        raise RuntimeError(f"{base.__name__}.forward takes {shape}; expected {_ARGUMENTS}, then any of {known}")

    class PackedActor(base):
        """The actor with packed log-probs; construction and generation are inherited."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            prepare_actor(self)

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            """See `actor_log_probs`; positional arguments follow the base class."""
            bound = inspect.signature(base.forward).bind(self, *args, **kwargs).arguments
            bound.pop(next(iter(bound)))
            return actor_log_probs(self, **bound)

    return PackedActor


def _packed_forward(
    model: torch.nn.Module,
    input_ids: torch.Tensor,  # [B, L]
    attention_mask: torch.Tensor,  # [B, L]
    packed_scored: tuple[torch.Tensor, tuple[str, ...]],  # [B, L] bool, and the outputs asked
    **others: Any,
) -> PaddedLogps:
    scored, outputs = packed_scored
    return packed_token_logps(model, input_ids, attention_mask, scored, outputs)
