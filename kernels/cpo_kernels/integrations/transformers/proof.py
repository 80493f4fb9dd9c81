"""What a proof of `prepare` holds for, compared at every call: modules, forwards, hooks, windows, training flags.

A proof is of the model as it was. Afterwards people wrap it by PEFT, add an adapter, put it in training mode or give a
module dropout. Two snapshots of plain Python values tell, without a word to the device:

    structure   children, replaced forwards and hooks of every module, windows,
                soft-caps, lists and tables of the configuration               changed: everything is proved again
    mode        training flags, dropout and noise, which adapters are active   new: does this forward draw numbers?

Whether a forward is random is not read from names: a small one runs, and the state of the random number generators before
and after it is compared. Branches of a forest share the activations of their prefix, padded rows would draw their own.
"""

import copy
import logging
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import chain
from typing import Any

import torch

from cpo_kernels.integrations.transformers.layer_windows import (
    KVShape,
    LayerAttention,
    LayerWindow,
    limiting_windows,
)
from cpo_kernels.integrations.transformers.model import (
    ModelParts,
    check_adapters,
    comes_from,
    moves_weights_only,
    rope_limit,
)
from cpo_kernels.tree_attention import WINDOWED

logger = logging.getLogger(__name__)

_POSITIONS = re.compile(r"(wpe|embed_positions|positions?_embed\w*)$")  # names of tables of learned positions
# attributes of modules and of the configuration, by name
_STRUCTURE = re.compile(r"window|sliding|chunk|softcap|is_causal|topk|^scaling$|^logits?_scal")
_MODE = re.compile(r"drop|jitter|noise|^p$")
_SCALARS = (type(None), bool, int, float, str)
_TABLES = (dict, list, tuple)
_MAX_MODES = 16  # training and evaluation by the adapters that a run switches between
_ATTRIBUTE = "_cpo_proof"  # of the causal language model


class Proof:
    """One proof of `prepare`, kept by the model itself.

    Args:
        prove: proves a model again, in place: what to call when the structure has changed.
        causal_lm: the model as it was proved. None: nothing is proved, and the first call does it.
        attention: of the decoder layers.
    """

    def __init__(
        self,
        prove: Callable[[Any], Any],
        causal_lm: torch.nn.Module | None = None,
        attention: LayerAttention | None = None,
    ) -> None:
        self._prove = prove
        self._modes: list[tuple[list[Any], str | None]] = []  # what was seen, and what is random in it
        self.attention = attention or LayerAttention()
        self.warned = False  # of a path beyond the model's positions
        self._states: list[dict[str, Any]] = []
        if causal_lm is not None:
            self._take(causal_lm)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Proof":
        return Proof(self._prove)  # a copy of the model is another model

    def __reduce__(self) -> Any:
        return Proof, (self._prove,)

    def _take(self, causal_lm: torch.nn.Module) -> None:
        modules = list(causal_lm.modules())
        self._states = [vars(module) for module in modules]
        self._children = [state["_modules"] for state in self._states]
        self._configs = [(state, state["config"]) for state in self._states if "config" in state]
        self._hooks = [state[kind] for state in self._states for kind in ("_forward_hooks", "_forward_pre_hooks")]
        self._adapters = [state for module, state in zip(modules, self._states, strict=True) if _is_adapted(module)]
        text: Any = causal_lm.config.get_text_config(decoder=True)  # type: ignore[operator, union-attr]
        configs = [vars(each) for each in {id(each): each for _, each in [*self._configs, ({}, text)]}.values()]
        self._watched = [
            [
                (state, name)
                for state in [*self._states, *configs]
                for name in state
                if isinstance(state[name], _SCALARS) and pattern.search(name) is not None
            ]
            for pattern in (_STRUCTURE, _MODE)
        ]
        self._tables = [
            (state, name)
            for state in configs
            for name in state
            if isinstance(state[name], _TABLES) and _is_plain(state[name])
        ]
        self._structure = self._read_structure()
        self._structure[-1] = copy.deepcopy(self._structure[-1])  # they are changed in place
        self._seen = [self._read_hooks(), self._read_forwards()]

    def _read_structure(self) -> list[Any]:
        return [
            list(chain.from_iterable(map(dict.values, filter(None, self._children)))),
            [state.get("config") is config for state, config in self._configs],
            [state.get(name) for state, name in self._watched[0]],
            [state.get(name) for state, name in self._tables],
        ]

    def _read_hooks(self) -> list[Any]:
        return list(chain.from_iterable(map(dict.values, filter(None, self._hooks))))

    def _read_forwards(self) -> list[Any]:
        return [state["forward"] for state in self._states if "forward" in state]

    def _read_mode(self) -> list[Any]:
        return [
            [state["training"] for state in self._states],
            [state.get(name) for state, name in self._watched[1]],
            [(state.get("_active_adapter"), state.get("_disable_adapters", False)) for state in self._adapters],
        ]

    def holds(self, causal_lm: torch.nn.Module) -> bool:
        """Whether the model is made of the same modules, forwards, hooks, windows and so on as when it was proved."""
        if not self._states or self._states[0] is not vars(causal_lm) or self._structure != self._read_structure():
            return False
        now = [self._read_hooks(), self._read_forwards()]
        if now != self._seen:
            if list(map(_relevant, now)) != list(map(_relevant, self._seen)):
                return False
            self._seen = now
        return True

    def prove_again(self, model: Any) -> None:
        """Run `prepare` on the model once more, which keeps a new proof or raises ValueError."""
        self._prove(model)

    def randomness(self, model: torch.nn.Module, parts: ModelParts) -> str | None:
        """The sentence that names the module that draws random numbers in a forward as things stand, or None."""
        mode = self._read_mode()
        if True not in mode[0]:
            return None  # in evaluation mode the probe has seen it
        for known, reason in self._modes:
            if known == mode:
                return reason
        reason = _random_module(model, parts)
        self._modes = [(mode, reason), *self._modes][:_MAX_MODES]
        return reason


def keep_proof(parts: ModelParts, prove: Callable[[Any], Any], attention: LayerAttention) -> None:
    """Let the model keep the proof that `prepare` just made."""
    setattr(parts.causal_lm, _ATTRIBUTE, Proof(prove, parts.causal_lm, attention))


def drop_proof(parts: ModelParts) -> None:
    """Forget the model's proof, if it has one."""
    vars(parts.causal_lm).pop(_ATTRIBUTE, None)


def check_call(model: torch.nn.Module, parts: ModelParts) -> None:
    """Raise ValueError, naming the reason, unless the model's proof holds for a forward as things stand now.

    Where the structure has changed the proof is made again. Where nothing changed this reads Python values only.
    """
    check_adapters(model)
    proof = _proof(parts)
    if not proof.holds(parts.causal_lm):
        proof.prove_again(model)
        proof = _proof(parts)
    reason = proof.randomness(model, parts)
    if reason is not None:
        raise ValueError(reason)


def check_training(model: torch.nn.Module, parts: ModelParts) -> None:
    """Raise ValueError, naming the module, if the model would draw random numbers once it is in training mode.

    The answer is remembered, so that the first step in training mode runs no forward for it.
    """
    with _all_training(parts.causal_lm):
        check_call(model, parts)


def proved_windows(parts: ModelParts) -> dict[int, LayerWindow]:
    """The windows of the decoder layers as they were when the model was proved."""
    return _proof(parts).attention.windows


def proved_shapes(parts: ModelParts) -> Sequence[KVShape]:
    """Keys and values of each decoder layer as its attention function got them when the model was proved."""
    return _proof(parts).attention.shapes


def proved_attention(parts: ModelParts) -> LayerAttention:
    """What attention the decoder layers asked for when the model was proved."""
    return _proof(parts).attention


def proved_heads(parts: ModelParts) -> tuple[int, int]:
    """Query heads and key heads of the first decoder layer when the model was proved."""
    return _proof(parts).attention.heads


def check_path(parts: ModelParts, longest_path: int, impl: str | None = None) -> None:
    """Raise ValueError for a path of so many tokens: longer than a layer's window, or than the rotary table stays.

    Args:
        impl: what computes the attention of a forest, of `resolve_tree_attention`. None: a search.
    """
    for layer, window in limiting_windows(proved_windows(parts), impl).items():
        if longest_path > window.size and window.slides:
            raise ValueError(
                f"a path of {longest_path} tokens is longer than the sliding window of {window.size} of decoder layer "
                f"{layer}, which impl={impl!r} does not compute; choose one of {list(WINDOWED)} or shorten the rows"
            )
        if longest_path > window.size:
            raise ValueError(
                f"a path of {longest_path} tokens is longer than {window.size}, up to which decoder layer {layer} sees "
                "whole rows: its mask beyond is not known to be a sliding window and is not computed; shorten the rows"
            )
    _check_positions(parts, longest_path)
    rope = rope_limit(parts.config)
    if rope is not None and longest_path > rope[0]:
        raise ValueError(
            f"a path of {longest_path} tokens is longer than {rope[0]}, up to which RoPE of type {rope[1]} is the same for "
            "rows of any length; shorten the rows"
        )


def _check_positions(parts: ModelParts, longest_path: int) -> None:
    """Raise ValueError for a path longer than a table of learned positions. Warn once of one beyond those of RoPE."""
    limit = getattr(parts.config, "max_position_embeddings", None)
    if not isinstance(limit, int) or longest_path <= limit:
        return
    for name, module in parts.causal_lm.named_modules():
        if isinstance(module, torch.nn.Embedding) and _POSITIONS.search(name):
            raise ValueError(
                f"a path of {longest_path} tokens is longer than the {limit} positions that {name} has learned; shorten "
                "the rows or use a model with more positions"
            )
    proof = _proof(parts)
    if not proof.warned:
        proof.warned = True
        logger.warning(
            "a path of %d tokens is longer than the %d positions that the model was made for (max_position_embeddings); "
            "it is computed as the model does, but a search refuses such rows",
            longest_path,
            limit,
        )


def path_limit(parts: ModelParts) -> tuple[int, str] | None:
    """The longest path in tokens that a search computes exactly, and what of the model sets it. None: any length."""
    return shortest(limiting_windows(proved_windows(parts), None), parts.config)


def shortest(windows: dict[int, LayerWindow], config: Any) -> tuple[int, str] | None:
    """The shortest limit of these windows and of the rotary table, as `path_limit`."""
    limits = [
        (size, f"a sliding window of {size}" if slides else f"an attention window of {size}")
        for size, slides in windows.values()
    ]
    if (rope := rope_limit(config)) is not None:
        limits.append((rope[0], f"RoPE of type {rope[1]}, the same up to {rope[0]}"))
    return min(limits, default=None)


def _proof(parts: ModelParts) -> Proof:
    proof: Proof | None = vars(parts.causal_lm).get(_ATTRIBUTE)
    if proof is None:
        raise ValueError(
            f"{type(parts.causal_lm).__name__} was not proved exact on a forest: call prepare(model) and do what it says"
        )
    return proof


def _is_adapted(module: torch.nn.Module) -> bool:
    return hasattr(module, "_disable_adapters")  # PEFT's layers, and its wrappers of modules to save


def _is_plain(value: Any) -> bool:
    if isinstance(value, _TABLES):
        return all(map(_is_plain, value.values() if isinstance(value, dict) else value))
    return isinstance(value, _SCALARS)


def _relevant(functions: list[Any]) -> list[Any]:
    """Hooks or replaced forwards without those that change no number, as those of `fuse_layers`."""
    return [each for each in functions if not (moves_weights_only(each) or comes_from(each, ("cpo_kernels",)))]


@contextmanager
def _all_training(model: torch.nn.Module) -> Iterator[None]:
    flags = [(module, module.training) for module in model.modules()]
    for module, _ in flags:
        module.training = True
    try:
        yield
    finally:
        for module, flag in flags:
            module.training = flag


def _random_module(model: torch.nn.Module, parts: ModelParts) -> str | None:
    """Run a forward as the model stands and name the first module that draws from a random number generator."""
    device = next(parts.causal_lm.parameters()).device
    ids = torch.arange(4, device=device).remainder(parts.config.vocab_size).unsqueeze(0)
    devices = [device] if device.type == "cuda" else []

    def state() -> list[torch.Tensor]:
        return [torch.get_rng_state(), *(torch.cuda.get_rng_state(each) for each in devices)]

    with torch.no_grad(), torch.random.fork_rng(devices), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # checkpointed layers warn that nothing needs a gradient
        before = state()
        model(input_ids=ids, use_cache=False)
        if _equal(before, state()):
            return None
        name, module = _first_drawer(model, lambda: model(input_ids=ids, use_cache=False), state)
    found = ", ".join(
        f"{key}={value}"
        for key, value in vars(module).items()
        if _MODE.search(key) and isinstance(value, int | float) and value
    )
    return (
        f"dropout or noise is on: {name or 'the model'} ({type(module).__name__}{', ' if found else ''}{found}) draws "
        "random numbers in a forward; branches share their prefix's activations, so it would not match padded training; "
        + ("set it to 0 in that module or call model.eval()" if found else "call model.eval(), which is to stop it")
    )


def _first_drawer(
    model: torch.nn.Module, run: Callable[[], Any], state: Callable[[], list[torch.Tensor]]
) -> tuple[str, torch.nn.Module]:
    """Name of the module that was running when the state changed first, and the module."""
    inside: list[tuple[str, torch.nn.Module]] = [("", model)]
    found: list[tuple[str, torch.nn.Module]] = []
    before = state()

    def look() -> None:
        if not found and not _equal(before, state()):
            found.append(inside[-1])

    def enter(name: str, module: torch.nn.Module, _: Any) -> None:
        look()
        inside.append((name, module))

    def leave(_module: torch.nn.Module, _inputs: Any, _output: Any) -> None:
        look()
        inside.pop()

    hooks = []
    for name, module in model.named_modules():
        hooks.append(module.register_forward_pre_hook(partial(enter, name)))
        hooks.append(module.register_forward_hook(leave))
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return found[0] if found else inside[0]


def _equal(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(map(torch.equal, one, other))
