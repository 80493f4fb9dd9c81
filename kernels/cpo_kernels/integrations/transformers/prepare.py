"""`prepare`: switch a model to `cpo_tree` once, and prove on the spot that its forest forward is exact.

A 32-token forest with two branches runs through the hook and our head. Its two paths run through the stock model with
`sdpa`. Every layer of the forest starts from the stock model's own hidden states, so the rounding of one layer is not
taken for an error of the next: a deep 16-bit model is right however much it amplifies them, and the bound holds for one
layer. The layers of a 16-bit model are compared in float32 too, one copy at a time. The first layer that differs by more is
named and the model refused, which catches attention variants, logit transforms and architectures that nobody has listed.
The head reads larger hidden states than the model gives it, so that a soft-cap shows far above today's logits. Where the
Triton kernels are the device's default, they are checked there first in the model's own shapes (`cpo_kernels.self_check`).
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from traceback import walk_tb
from typing import Any

import torch
from torch.utils._pytree import tree_map

from cpo_kernels.forest import Forest, build_forest
from cpo_kernels.implementation import Implementations, default_implementation
from cpo_kernels.integrations.transformers.hook import IMPLEMENTATION, register
from cpo_kernels.integrations.transformers.layer_windows import (
    LayerAttention,
    forest_windows,
    layer_attention,
    limiting_windows,
)
from cpo_kernels.integrations.transformers.logits import logit_transform
from cpo_kernels.integrations.transformers.model import (
    ModelParts,
    check_supported,
    decoder_layers,
    fetches_weights,
    kv_shape,
    model_parts,
)
from cpo_kernels.integrations.transformers.packed import forest_forward
from cpo_kernels.integrations.transformers.proof import drop_proof, keep_proof, shortest
from cpo_kernels.kernel_check import KERNELS, KernelCheckError
from cpo_kernels.linear_logprob import linear_logprob
from cpo_kernels.self_check import TRAINING_OPS, ModelShape, self_check
from cpo_kernels.tolerances import end_to_end_bound
from cpo_kernels.tree_attention import resolve_tree_attention

TRUNK_TOKENS, BRANCH_TOKENS = 12, 10  # 12 + 2 * 10 = 32 tokens, two paths of 22
MAX_FLOAT32_PARAMETERS = 2**30  # of a layer that is copied in float32: 4 GiB
HEAD_FACTOR = 16.0  # on the hidden states that the head reads. A power of two, which is exact in every dtype
LAYER_SHARE = 0.4  # of the bound for a whole model. Measured: 0.13 of that bound in bfloat16, 0.005 in float32


def prepare(model: Any, impl: str | Implementations | None = None) -> Any:
    """Make a `PreTrainedModel` or `PeftModel` ready for `packed_logps`, in place, and return it.

    Call it once, before any wrapper (DDP, FSDP, DeepSpeed) and before training. Calls without `subtree_end` behave as
    with `sdpa` afterwards.

    Args:
        model: the model, in place.
        impl: implementation that the probe runs, as for `packed_logps`.

    Raises:
        TypeError: not a transformers model (a wrapper, say).
        ValueError: the model cannot be computed exactly on a forest. The sentence names why, or the first layer that
            differs.
        KernelCheckError: nobody chose an implementation, and the kernels are not right on the model's device.
    """
    parts, impl = model_parts(model), Implementations.of(impl)
    with _stage(parts, "a look at its modules"):
        check_supported(model)
    drop_proof(parts)
    register()
    with _stage(parts, "a forward of two tokens"), _evaluating(parts):
        attention = layer_attention(parts)
    if impl == Implementations():
        check_kernels(parts, attention=attention)
    with _stage(parts, "the comparison of a forest with the stock model"), _evaluating(parts):
        _probe(model, parts, impl, attention)
    keep_proof(parts, partial(prepare, impl=impl), attention)
    return model


@contextmanager
def _stage(parts: ModelParts, name: str) -> Iterator[None]:
    """Turn what a model's own code raises, or ours on what it gives, into a ValueError that names the model and a stage.

    What says nothing of the model passes: no memory, a device or a library that fails, a kernel that is not right.
    """
    passing = (MemoryError, torch.OutOfMemoryError, torch.AcceleratorError, ImportError, KernelCheckError)
    try:
        yield
    except passing:
        raise
    except Exception as error:
        *_, (frame, _) = walk_tb(error.__traceback__)
        if isinstance(error, ValueError) and str(frame.f_globals.get("__name__")).startswith("cpo_kernels."):
            raise
        first = next(iter(str(error).splitlines()), "")
        raise ValueError(
            f"{type(parts.causal_lm).__name__} was not proved exact on a forest: {name} ended in {type(error).__name__}: "
            f"{first}"
        ) from error


@contextmanager
def _evaluating(parts: ModelParts) -> Iterator[None]:
    was_training = [module for module in parts.causal_lm.modules() if module.training]
    parts.causal_lm.eval()
    try:
        with torch.no_grad(), torch.autocast(next(parts.causal_lm.parameters()).device.type, enabled=False):
            yield
    finally:
        for module in was_training:
            module.training = True


def check_kernels(
    parts: ModelParts, ops: Sequence[str] = TRAINING_OPS, attention: LayerAttention | None = None
) -> None:
    """Run the self-check of some ops in a model's own shapes, of the kernels that are its device's default.

    Args:
        parts: of the model.
        ops: of `self_check`.
        attention: of its decoder layers. None: as the configuration says.

    Raises:
        KernelCheckError: a kernel does not run or is wrong there.
    """
    device, config = next(parts.causal_lm.parameters()).device, parts.config
    impl = default_implementation(device.type)
    if impl not in KERNELS:
        return
    if attention is None:
        heads, options = {(config.num_attention_heads, *kv_shape(config))}, {}
    else:
        heads = {(attention.heads[0], shape.num_heads, shape.head_dim) for shape in attention.shapes}
        windowed = any(window.slides for window in attention.windows.values())
        options = {"windowed": windowed, "capped": attention.capped, "has_sinks": attention.has_sinks}
    for num_heads, num_kv_heads, head_dim in sorted(heads):
        shape = ModelShape(
            dtype=parts.causal_lm.dtype,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            hidden_size=config.hidden_size,
            **options,
        )
        self_check(device, shape, ops, impl)


def _probe(model: Any, parts: ModelParts, impl: Implementations, attention: LayerAttention) -> None:
    """Compare forest and stock model."""
    previous = parts.config._attn_implementation
    device = next(parts.causal_lm.parameters()).device
    try:
        # some families (Gemma 2) are loaded with their own attention only
        parts.causal_lm.set_attn_implementation("sdpa" if parts.causal_lm._supports_sdpa else "eager")
        limiting = limiting_windows(attention.windows, resolve_tree_attention(impl.tree_attention, device.type))
        forest, paths = _two_branches(parts.config.vocab_size, shortest(limiting, parts.config))
        forest = forest.to(device)
        layers = decoder_layers(parts)
        # accelerate keeps the forward here when it puts autocast around it
        forward = vars(model).get("_original_forward", model)
        stock, logits = [], []
        for path in paths:
            with _recorded(layers) as recorded, _louder(parts.head):
                ids = torch.tensor([path], device=device)
                logits.append(forward(input_ids=ids, use_cache=False).logits)
            stock.append(recorded)
        parts.causal_lm.set_attn_implementation(IMPLEMENTATION)
        packed = [_packed(forest, states) for states in zip(*(each.states for each in stock), strict=True)]
        with _recorded(layers, packed) as ours:
            shorter = forest_windows(attention.windows, forest.position_ids, len(paths[0]))
            schedule = forest.schedule(heads=attention.heads)
            output = forest_forward(parts, forest, schedule, impl.tree_attention, tree_windows=shorter)
        _compare_embeddings(parts, forest, layers, ours.states[0], [each.states[0] for each in stock], paths[0])
        _compare_layers(parts, forest, ours.states, [each.states for each in stock])
        _compare_layers_in_float32(parts, forest, layers, ours, stock)
        _compare_head(parts, forest, output.last_hidden_state[0], logits, paths, impl.linear_logprob)
    except Exception:
        parts.causal_lm.set_attn_implementation(previous)
        raise


@dataclass(frozen=True)
class _Record:
    """Of one forward: the embeddings and the output of every layer, and the arguments of every layer."""

    states: list[torch.Tensor]
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]]


@contextmanager
def _recorded(layers: list[torch.nn.Module], inputs: Sequence[torch.Tensor] | None = None) -> Iterator[_Record]:
    """Fills a record, while layers may be given other inputs than they had.

    Args:
        inputs: hidden states [1, T, E] that layer i starts from, and behind them what the last one gives.
    """
    record = _Record([], [])
    states = record.states

    def before(index: int, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        hidden = args[0] if args else kwargs["hidden_states"]
        if index == 0:
            states.append(hidden)
        record.calls.append((args, kwargs))
        return (args, kwargs) if inputs is None else _with_hidden(args, kwargs, inputs[index])

    def after(output: Any) -> None:
        states.append(_first(output))

    hooks = []
    for index, layer in enumerate(layers):
        hooks.append(layer.register_forward_pre_hook(partial(before, index), with_kwargs=True))
        hooks.append(layer.register_forward_hook(lambda _module, _args, output: after(output)))
    try:
        yield record
    finally:
        for hook in hooks:
            hook.remove()


def _with_hidden(
    args: tuple[Any, ...], kwargs: dict[str, Any], hidden: torch.Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return ((hidden, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": hidden})


def _first(output: Any) -> torch.Tensor:
    hidden: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return hidden


@contextmanager
def _louder(head: torch.nn.Module) -> Iterator[None]:
    """The head reads its input times `HEAD_FACTOR`."""
    hook = head.register_forward_pre_hook(lambda _module, args: (HEAD_FACTOR * args[0],))
    try:
        yield
    finally:
        hook.remove()


def _packed(forest: Forest, states: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Hidden states of the paths, [.., 1, path, ..] each, as those of the forest [.., 1, T, ..]."""
    first, rows = states[0], _rows(forest, 0)
    tokens = _token_dimension(first, len(rows))
    packed = first.new_empty(*first.shape[:tokens], forest.num_tokens, *first.shape[tokens + 1 :])
    for path, hidden in enumerate(states):
        packed.index_copy_(tokens, _rows(forest, path), hidden)
    return packed


def _of_path(forest: Forest, packed: torch.Tensor, path: int) -> torch.Tensor:
    """What `_packed` packed of one path."""
    return packed.index_select(_token_dimension(packed, forest.num_tokens), _rows(forest, path))


def _token_dimension(hidden: torch.Tensor, num_tokens: int) -> int:
    """The dimension behind that of the batch, which is 1: models with several streams have it before them or behind."""
    return next(each for each in (1, 2) if hidden.shape[each - 1 : each + 1] == (1, num_tokens))


def _two_branches(vocab_size: int, limit: tuple[int, str] | None) -> tuple[Forest, list[list[int]]]:
    trunk, branch = TRUNK_TOKENS, BRANCH_TOKENS
    if limit is not None and limit[0] < trunk + branch:
        trunk, branch = max(1, limit[0] // 2), max(1, limit[0] - limit[0] // 2)
    # 7919 is prime: the ids spread over the vocabulary without repeating in a path
    ids = [(7919 * i + 11) % vocab_size for i in range(trunk + 2 * branch)]
    paths = [ids[: trunk + branch], ids[:trunk] + ids[trunk + branch :]]
    return build_forest(paths), paths


def _compare_embeddings(
    parts: ModelParts,
    forest: Forest,
    layers: list[torch.nn.Module],
    ours: torch.Tensor,
    stock: list[torch.Tensor],
    path: list[int],
) -> None:
    """Compare what the first layer is given, and say why it differs where positions are the cause."""
    bound = LAYER_SHARE * end_to_end_bound(parts.causal_lm.dtype)
    difference = max(_relative(_of_path(forest, ours, index), want) for index, want in enumerate(stock))
    if difference <= bound:
        return
    told = []
    count = torch.arange(len(path), device=ours.device).unsqueeze(0)
    for position_ids in (count, count // 2):
        with _recorded(layers) as recorded:
            parts.backbone(
                input_ids=torch.tensor([path], device=ours.device), position_ids=position_ids, use_cache=False
            )
        told.append(_relative(recorded.states[0], stock[0]) <= bound)
    causes = {
        (True, True): ": it takes positions from the place in the row and does not read position_ids",
        (False, False): ": told no position_ids, it counts otherwise than 0, 1, 2, .. (from its padding id, say)",
    }
    raise ValueError(
        f"{type(parts.causal_lm).__name__} cannot run on a forest: its embeddings differ from sdpa's by {difference:.1e} "
        f"(bound {bound:.0e} for {parts.causal_lm.dtype}){causes.get((told[0], told[1]), '')}; use another model"
    )


def _compare_layers(
    parts: ModelParts, forest: Forest, ours: list[torch.Tensor], stock: list[list[torch.Tensor]]
) -> None:
    bound = LAYER_SHARE * end_to_end_bound(parts.causal_lm.dtype)
    for layer, hidden in enumerate(ours[1:]):
        for path, expected in enumerate(stock):
            difference = _relative(_of_path(forest, hidden, path), expected[layer + 1])
            if not difference <= bound:
                raise ValueError(
                    f"{type(parts.causal_lm).__name__} cannot run on a forest: decoder layer {layer} differs from sdpa by "
                    f"{difference:.1e} (bound {bound:.0e} for {parts.causal_lm.dtype})"
                )


def _compare_layers_in_float32(
    parts: ModelParts, forest: Forest, layers: list[torch.nn.Module], ours: _Record, stock: list[_Record]
) -> None:
    """Compare the layers of a 16-bit model once more as float32 copies, where rounding hides nothing of their structure.

    One copy lives at a time. Left out are layers that cannot be copied so: quantised ones, those too large, those whose
    weights are fetched as they run (ZeRO 3), and those that insist on their dtype.
    """
    if parts.causal_lm.dtype not in (torch.float16, torch.bfloat16):
        return
    bound = LAYER_SHARE * end_to_end_bound(torch.float32)
    for index, layer in enumerate(layers):
        parameters = list(layer.parameters())
        small = sum(parameter.numel() for parameter in parameters) <= MAX_FLOAT32_PARAMETERS
        whole = not any(map(fetches_weights, layer.modules()))
        if not (small and whole and all(parameter.is_floating_point() for parameter in parameters)):
            continue
        try:
            # under one configuration, whose attention implementation is the one that the forest needs
            twin = copy.deepcopy(layer, {id(parts.config): parts.config}).float()
            inputs = [record.states[index].float() for record in stock]
            hidden, *expected = (
                _first(twin(*args, **kwargs))
                for args, kwargs in (
                    _in_float32(record.calls[index], each)
                    for record, each in zip([ours, *stock], [_packed(forest, tuple(inputs)), *inputs], strict=True)
                )
            )
        except (RuntimeError, TypeError, ValueError):  # another dtype, or no memory for it
            continue
        for path, want in enumerate(expected):
            difference = _relative(_of_path(forest, hidden, path), want)
            if not difference <= bound:
                raise ValueError(
                    f"{type(parts.causal_lm).__name__} cannot run on a forest: decoder layer {index} in float32 differs "
                    f"from sdpa by {difference:.1e} (bound {bound:.0e}), which rounding to 16 bits had hidden"
                )


def _in_float32(
    call: tuple[tuple[Any, ...], dict[str, Any]], hidden: torch.Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of a layer with other hidden states, every tensor of floats in float32, tree attention by plain torch."""

    def cast(value: Any) -> Any:
        return value.float() if isinstance(value, torch.Tensor) and value.is_floating_point() else value

    args, kwargs = tree_map(cast, _with_hidden(*call, hidden))
    return args, kwargs | ({"tree_impl": "eager"} if "tree_impl" in kwargs else {})


def _compare_head(
    parts: ModelParts,
    forest: Forest,
    hidden: torch.Tensor,
    logits: list[torch.Tensor],
    paths: list[list[int]],
    impl: str | None,
) -> None:
    bound = end_to_end_bound(parts.causal_lm.dtype)
    plan = forest.logprob_plan([1] * len(paths))
    head: Any = parts.head
    weight, bias = head.weight, head.bias
    if logits[0].shape[-1] != weight.shape[0]:
        raise ValueError(
            f"{type(parts.causal_lm).__name__} cannot run on a forest: its output head has {weight.shape[0]} rows, and "
            f"the model gives {logits[0].shape[-1]} logits"
        )
    louder, transform = HEAD_FACTOR * hidden, logit_transform(parts)
    ours = linear_logprob(louder, weight, plan, bias=bias, impl=impl, **transform).token_logps
    expected = torch.cat(
        [
            torch.log_softmax(row[0, :-1].to(ours.dtype), dim=-1)
            .gather(1, torch.tensor(path[1:], device=row.device).unsqueeze(1))
            .squeeze(1)
            for row, path in zip(logits, paths, strict=True)
        ]
    )
    difference = _relative(ours, expected)
    if not difference <= bound:
        raise ValueError(
            f"{type(parts.causal_lm).__name__} cannot run on a forest: its output head changes the logits in a way that "
            f"this library does not compute (log-probs differ by {difference:.1e}, bound {bound:.0e})"
        )


def _rows(forest: Forest, path: int) -> torch.Tensor:
    first, last = int(forest.path_offsets[path]), int(forest.path_offsets[path + 1])
    return forest.path_rows[first:last].long()


def _relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    expected = expected.to(torch.promote_types(expected.dtype, torch.float32))
    return float((actual.to(expected.dtype) - expected).norm() / expected.norm().clamp_min(1e-30))
