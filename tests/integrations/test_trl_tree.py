"""Claims about TRL's tree-packed rows: each sample as if it were alone, anything else is refused, one schedule a row."""

import gc
import inspect
from collections.abc import Iterator
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import AttentionInterface, AttentionMaskInterface, MistralConfig
from trl.experimental.async_grpo import packing

from cpo_kernels.integrations import trl_tree
from cpo_kernels.integrations.trl_tree import register_tree_attention, subtree_end_of_row, tree_row_attention
from cpo_kernels.tolerances import kernel_bound
from cpo_kernels.tree_attention.reference import visible
from tests.cpo_kernels.device_waits import DeviceWaits
from tests.flash_stand_in import flash_attn_3_varlen_func
from tests.integrations.trl_rows import (
    deep_samples,
    log_probs_alone,
    pack,
    packed_log_probs,
    random_samples,
    results,
    sample,
    tree_arguments,
)
from tests.tiny import tiny_llama, tiny_model

THEIRS = packing.tree_attention
BOUND = 1e-5


def attention_layer(dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """What an attention function looks at of its layer: configuration and the dtype of a linear layer inside."""
    linear = torch.nn.Linear(1, 1, dtype=dtype)
    linear.config = SimpleNamespace()
    return linear


LAYER = attention_layer()


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    """Ours is registered; TRL's own afterwards."""
    register_tree_attention()
    yield
    packing.tree_attention = THEIRS
    packing.register_tree_attention()


ROWS = {
    "trees": random_samples(0),
    "one tree": random_samples(1, num_trees=1),
    "unshared": random_samples(2, num_samples=5, num_trees=5),
    "prefixes of each other": random_samples(3, num_samples=14, num_trees=1, branching=0.3),
    "deep": deep_samples(30),
    "one sample": random_samples(4, num_samples=1, num_trees=1),
    "equal samples": [sample([5, 6, 7, 8], 2, 1.0), sample([5, 6, 7, 8], 1, -0.5)],
    "single tokens": [sample([5], 1, 1.0), sample([6], 1, 1.0), sample([5, 9, 10], 1, 2.0)],
    "many": random_samples(5, num_samples=60, num_trees=4, longest=40),
}


def close(got: torch.Tensor, want: torch.Tensor) -> None:
    assert float((got - want).norm() / want.norm()) < BOUND


@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["kept", "recomputed", "recomputed reentrant"])
@pytest.mark.parametrize("name", ROWS)
def test_a_row_equals_its_samples_alone(name: str, checkpointing: bool | None) -> None:
    samples, packed = ROWS[name], pack(ROWS[name])
    tree, alone = tiny_llama(attention=packing.TREE_ATTENTION), tiny_llama()
    if checkpointing is not None:
        tree.gradient_checkpointing_enable({"use_reentrant": checkpointing})
        tree.enable_input_require_grads()
        tree.train()
    got = results(tree, packed_log_probs(tree, packed, samples), packed)
    want = results(alone, log_probs_alone(alone, samples), packed)
    assert float((got[0] - want[0]).abs().max()) < BOUND
    close(got[1], want[1])


@pytest.mark.parametrize("num_kv_heads", [1, 4])
def test_other_groups_of_heads_and_a_window_that_hides_nothing_are_exact(num_kv_heads: int) -> None:
    samples, packed = ROWS["trees"], pack(ROWS["trees"])
    longest = int(packed["tree_max_seqlens"][1])
    models = [
        tiny_model(MistralConfig, attention=name, num_key_value_heads=num_kv_heads, sliding_window=longest)
        for name in (packing.TREE_ATTENTION, "sdpa")
    ]
    got = results(models[0], packed_log_probs(models[0], packed, samples), packed)
    want = results(models[1], log_probs_alone(models[1], samples), packed)
    assert float((got[0] - want[0]).abs().max()) < BOUND
    close(got[1], want[1])
    short = tiny_model(MistralConfig, attention=packing.TREE_ATTENTION, sliding_window=longest - 1)
    with pytest.raises(ValueError, match=rf"path of {longest} tokens is longer than .* window of {longest - 1}"):
        packed_log_probs(short, packed, samples)


def seen_by_gathering(index: np.ndarray, cu_q: np.ndarray, cu_k: np.ndarray, num_rows: int) -> np.ndarray:
    """How often row i sees row j by TRL's definition: gathered paths under a causal mask aligned to the last key."""
    counts = np.zeros((num_rows, num_rows), dtype=int)
    for s in range(len(cu_q) - 1):
        path, own = index[cu_k[s] : cu_k[s + 1]], cu_q[s + 1] - cu_q[s]
        for i in range(own):
            np.add.at(counts[cu_q[s] + i], path[: len(path) - own + i + 1], 1)
    return counts


@pytest.mark.parametrize("name", ROWS)
def test_subtree_end_shows_what_gathering_shows(name: str) -> None:
    arrays = index_arrays(ROWS[name])
    end = torch.from_numpy(subtree_end_of_row(*arrays))
    assert end.dtype == torch.int32
    assert (visible(end).int().numpy() == seen_by_gathering(*arrays)).all()


def index_arrays(samples: list[Any]) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    packed = pack(samples)
    names = ("tree_kv_index", "tree_cu_seqlens_q", "tree_cu_seqlens_k")
    return *(packed[key].numpy().astype(np.int64) for key in names), len(packed["input_ids"])


def test_a_row_that_was_tampered_with_is_refused_or_shows_the_same() -> None:
    """Small changes of every kind, so that each check meets what only it sees."""
    accepted = refused = 0
    for seed in range(1500):
        generator = np.random.default_rng(seed)
        samples = random_samples(seed % 25, num_samples=6, longest=6)
        *arrays, num_rows = index_arrays(samples)
        for _ in range(generator.integers(1, 3)):
            array = arrays[generator.integers(3)]
            place = generator.integers(len(array))
            kind = generator.integers(3)
            if kind == 0:
                array[place] += generator.choice([-2, -1, 1, 2])
            elif kind == 1:
                array[place] = array[generator.integers(len(array))]
            else:
                other = generator.integers(len(array))
                array[[place, other]] = array[[other, place]]
        try:
            end = subtree_end_of_row(*arrays, num_rows)
        except ValueError:  # no other error may escape
            refused += 1
            continue
        accepted += 1
        assert (visible(torch.from_numpy(end)).int().numpy() == seen_by_gathering(*arrays, num_rows)).all()
    assert refused > 500
    assert accepted > 50


def chain(*paths: list[int], starts: list[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    cu_k = np.cumsum([0, *map(len, paths)])
    return np.array([row for path in paths for row in path]), np.array(starts), cu_k, starts[-1]


@pytest.mark.parametrize(
    ("arrays", "sentence"),
    [
        (chain([0, 1], [0, 1, 2], [0, 1, 3], starts=[0, 2, 3, 5]), r"path of segment 2 does not begin with the whole"),
        (chain([0, 1], [0, 1, 2], [0, 3], starts=[0, 2, 3, 4]), r"path of segment 2 does not begin with the whole"),
        (chain([0], [0, 1], [2], [0, 1, 3], starts=[0, 1, 2, 3, 4]), r"segment 3 .* parent 1 is closed"),
        (chain([0], [1], [0, 2], starts=[0, 1, 2, 3]), r"segment 2 .* parent 0 is closed"),
        (chain([0, 1], [1, 0, 2], starts=[0, 2, 3]), r"segment 1 (does not begin|is not the path)"),
        (chain([0, 1], [0, 1, 2, 2], starts=[0, 2, 3]), r"segment 1 does not continue an earlier"),
        (chain([1], [0, 1], starts=[0, 1, 2]), r"segment 0 is not the path"),
        (chain([0], [0, 1], starts=[0, 1, 3]), r"segment 1 is not the path"),
        ((*chain([0], [0, 1], starts=[0, 1, 2])[:3], 3), r"tree_cu_seqlens_q does not cut its 3 tokens"),
        (chain([1], [1, 2], starts=[1, 2, 3]), r"tree_cu_seqlens_q does not cut its 3 tokens"),
        (chain([0], [-1, 1], starts=[0, 1, 2]), r"segment 1 is not the path"),
        ((np.array([9, 0]), np.array([0, 1]), np.array([1, 2]), 1), r"tree_cu_seqlens_k does not cut the 2 entries"),
        (chain([0, 1], [0, 1], starts=[0, 2, 2]), r"tree_cu_seqlens_q does not cut"),
        (chain([0, 1, 2], [3], starts=[0, 2, 4]), r"tree_cu_seqlens_k does not cut"),
    ],
)
def test_what_is_no_trie_in_preorder_is_named(arrays: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        subtree_end_of_row(*arrays)


def heads(num_rows: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """q, k and v of one layer as Transformers has them, and an upstream gradient."""
    generator = torch.Generator().manual_seed(num_rows)
    shapes = [(1, count, num_rows, 16) for count in (4, 2, 2)]
    tensors = [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]
    return [*tensors, torch.randn((1, num_rows, 4, 16), generator=generator).to(dtype)]


def layer(packed: dict[str, Any], arguments: dict[str, Any] | None = None, **changes: Any) -> torch.Tensor:
    q, k, v, _ = heads(len(packed["input_ids"]), changes.pop("dtype", torch.float64))
    arguments = arguments or tree_arguments(packed)
    return tree_row_attention(LAYER, q, k, v, changes.pop("mask", None), **(arguments | changes))[0]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_layers_share_one_schedule_a_row(checkpointing: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    build = trl_tree.tree_schedule
    monkeypatch.setattr(trl_tree, "tree_schedule", lambda *args, **named: made.append(1) or build(*args, **named))
    monkeypatch.setattr(trl_tree, "_rows", WeakTensorKeyDictionary())  # others' rows may still be alive
    model = tiny_llama(attention=packing.TREE_ATTENTION, num_hidden_layers=4).train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    samples = ROWS["trees"]
    for number in (1, 2):
        packed = pack(samples)
        results(model, packed_log_probs(model, packed, samples), packed)
        assert len(made) == number
    assert len(trl_tree._rows) == 1  # that of the row at hand
    del packed
    gc.collect()
    assert len(trl_tree._rows) == 0


def test_a_row_that_is_known_is_not_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CPO_KERNELS_IMPL", "eager")  # native attention is for tensors that are on the host already
    packed = pack(ROWS["trees"])
    arguments = tree_arguments(packed)
    q, k, v, upstream = heads(len(packed["input_ids"]))
    with DeviceWaits() as first:
        tree_row_attention(LAYER, q, k, v, None, dropout=0.0, **arguments)
    with DeviceWaits() as second:
        out, _ = tree_row_attention(LAYER, q, k, v, None, dropout=0.0, **arguments)
        out.backward(upstream)
    assert "cat" in first.seen  # the index tensors go to the host as one
    assert second.found == []
    assert "bmm" in second.seen


def test_index_tensors_that_changed_are_read_again() -> None:
    packed, other = pack(ROWS["equal samples"]), pack([sample([5, 6], 1, 1.0), sample([7, 8], 1, 1.0)])
    assert len(packed["input_ids"]) == len(other["input_ids"])
    arguments, changed = tree_arguments(packed), tree_arguments(other)
    before, want = layer(packed, arguments), layer(other, changed)
    assert not torch.equal(before, want)
    index = arguments["tree_kv_index"]
    index.add_(1)  # in place: the same tensor
    with pytest.raises(ValueError, match="segment 0 is not the path"):
        layer(packed, arguments)
    index.sub_(1)
    assert torch.equal(layer(packed, arguments), before)
    for name in ("tree_cu_seqlens_q", "tree_cu_seqlens_k"):  # one alone is another tensor
        assert torch.equal(layer(packed, arguments), before)
        with pytest.raises(ValueError, match=f"{name} does not cut"):
            layer(packed, arguments | {name: arguments[name] * 3})
        assert torch.equal(layer(packed, arguments | {name: arguments[name].clone()}), before)
    with torch.inference_mode():
        inside = {key: value.clone() if isinstance(value, torch.Tensor) else value for key, value in changed.items()}
        assert torch.equal(layer(other, inside), want)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"sliding_window": 3}, "longer than the layer's sliding window of 3"),
        ({"mask": torch.ones(1, 1, 1, 1)}, "comes with an attention mask"),
        ({"dropout": 0.1}, "attention dropout 0.1"),
        ({"is_causal": False}, "bidirectional"),
        ({"tree_max_seqlen_q": 1}, "longest segment has"),
        ({"tree_max_seqlen_k": 2}, "tree_max_seqlen_k=2"),
        ({"tree_kv_index": torch.ones(3)}, "expected integers"),
        ({"tree_cu_seqlens_k": torch.tensor([0, 3])}, "expected integers"),
    ],
)
def test_what_the_op_does_not_compute_is_refused_in_a_sentence(changes: dict[str, Any], sentence: str) -> None:
    packed = pack(ROWS["trees"])
    with pytest.raises(ValueError, match=sentence):
        layer(packed, **changes)
    off = {"softcap": 0.0, "sliding_window": None, "dropout": 0.0}
    assert torch.equal(layer(packed, **off), layer(packed))


@pytest.mark.parametrize("name", ["softcap", "s_aux"])
def test_soft_caps_and_sinks_are_computed(name: str) -> None:
    """A path of the row is a causal row of its own."""
    packed = pack(ROWS["trees"])
    q, k, v, _ = heads(len(packed["input_ids"]), torch.float64)
    options = {"softcap": 0.5, "s_aux": torch.linspace(-1, 2, q.shape[1], dtype=torch.float64)}
    found = layer(packed, **{name: options[name]})[0]
    assert (found - layer(packed)[0]).abs().max() > 1e-2, "the option changed nothing; the test would prove nothing"
    arguments = tree_arguments(packed)
    bounds = arguments["tree_cu_seqlens_k"].tolist()
    for first, last in pairwise(bounds):
        path = arguments["tree_kv_index"][first:last].long()
        scores = q[0, :, path] @ k[0, :, path].repeat_interleave(q.shape[1] // k.shape[1], 0).mT * q.shape[-1] ** -0.5
        if name == "softcap":
            scores = options["softcap"] * torch.tanh(scores / options["softcap"])
        scores = scores + torch.full(scores.shape[-2:], float("-inf"), dtype=torch.float64).triu(1)
        if name == "s_aux":
            scores = torch.cat([scores, options["s_aux"][:, None, None].expand(-1, len(path), 1)], dim=-1)
        weights = scores.softmax(-1)[..., : len(path)]
        want = weights @ v[0, :, path].repeat_interleave(q.shape[1] // k.shape[1], 0)
        torch.testing.assert_close(found[path].transpose(0, 1), want, rtol=1e-12, atol=1e-12)


def test_a_batch_of_two_and_another_number_of_tokens_are_refused() -> None:
    packed = pack(ROWS["trees"])
    arguments, num_rows = tree_arguments(packed), len(packed["input_ids"])
    layer(packed, arguments)
    q, k, v, _ = (torch.cat([x, x]) for x in heads(num_rows))
    with pytest.raises(ValueError, match="batch 1"):
        tree_row_attention(LAYER, q, k, v, None, **arguments)
    for more in (-1, 1):
        with pytest.raises(ValueError, match=rf"expected subtree_end \[{num_rows + more}\]"):
            tree_row_attention(LAYER, *heads(num_rows + more)[:3], None, **arguments)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["trees", "deep", "many"])
def test_trls_own_function_on_a_stand_in_of_its_kernel_agrees(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both by the same call. The stand-in takes what FlashAttention 3 takes, and rounds its weights to the dtype."""
    monkeypatch.setattr(
        packing, "_flash_attn", lambda: SimpleNamespace(flash_attn_varlen_func=flash_attn_3_varlen_func)
    )
    packed = pack(ROWS[name])
    *leaves, upstream = heads(len(packed["input_ids"]), dtype)
    found = []
    for attention in (tree_row_attention, THEIRS):
        out, weights = attention(LAYER, *leaves, None, scaling=0.3, dropout=0.0, **tree_arguments(packed))
        assert weights is None
        found.append([out.detach(), *torch.autograd.grad(out, leaves, upstream)])
    for ours, theirs in zip(*found, strict=True):
        assert ours.dtype == theirs.dtype == dtype
        assert ours.shape == theirs.shape
        size = float(theirs.double().abs().max())
        assert float((ours.double() - theirs.double()).abs().max()) <= kernel_bound(0.0, dtype, 8 * size)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_on_a_gpu_a_row_is_exact_and_only_its_first_layer_waits(dtype: torch.dtype) -> None:
    packed = pack(ROWS["many"])
    on_device = {key: value.cuda() for key, value in packed.items()}
    arguments = tree_arguments(on_device)
    found = []
    for device, precision in (("cuda", dtype), ("cpu", dtype), ("cpu", torch.float64)):
        *leaves, upstream = (x.detach().to(device, precision) for x in heads(len(packed["input_ids"]), dtype))
        leaves = [leaf.requires_grad_() for leaf in leaves]
        given = arguments if device == "cuda" else tree_arguments(packed)
        out, _ = tree_row_attention(attention_layer(precision), *leaves, None, **given)
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("error")
        try:
            out, _ = tree_row_attention(attention_layer(precision), *leaves, None, **given)
            found.append([out.detach(), *torch.autograd.grad(out, leaves, upstream)])
        finally:
            torch.cuda.set_sync_debug_mode("default")
    for ours, eager, exact in zip(*found, strict=True):
        own = float((eager.double() - exact).abs().max())
        bound = kernel_bound(own, dtype, float(exact.abs().max()))
        assert float((ours.double().cpu() - exact).abs().max()) <= bound + 1e-6


def test_autocast_and_float32_queries_of_a_16_bit_layer_are_as_in_trl() -> None:
    packed = pack(ROWS["trees"])
    q, k, v, _ = heads(len(packed["input_ids"]))
    plain, _ = tree_row_attention(
        LAYER, q.bfloat16(), k.bfloat16(), v.bfloat16(), None, **tree_arguments(packed)
    )  # fmt: skip
    cast, _ = tree_row_attention(attention_layer(torch.bfloat16), q, k, v.bfloat16(), None, **tree_arguments(packed))
    assert cast.dtype == torch.bfloat16
    assert torch.equal(cast, plain)
    with torch.autocast("cpu", torch.bfloat16):
        auto, _ = tree_row_attention(LAYER, q, k, v, None, **tree_arguments(packed))
    assert torch.equal(auto, plain)


def test_one_call_lasts_and_reaches_models_that_are_there_already() -> None:
    packing.tree_attention = THEIRS
    packing.register_tree_attention()
    model = tiny_llama(attention=packing.TREE_ATTENTION)
    samples = ROWS["one tree"]
    with pytest.raises(ImportError):  # TRL's needs the package kernels, which no shipped environment here has
        packed_log_probs(model, pack(samples), samples)
    register_tree_attention()
    found = packed_log_probs(model, pack(samples), samples)
    register_tree_attention()
    packing.register_tree_attention()  # what the constructor of a trainer calls
    assert AttentionInterface()[packing.TREE_ATTENTION] is tree_row_attention
    assert AttentionMaskInterface()[packing.TREE_ATTENTION](mask=1) is None
    assert torch.equal(packed_log_probs(model, pack(samples), samples), found)


def test_ours_has_exactly_trls_arguments() -> None:
    ours, theirs = (inspect.signature(each).parameters for each in (tree_row_attention, THEIRS))
    assert [(p.name, p.kind, p.default) for p in ours.values()] == [
        (p.name, p.kind, p.default) for p in theirs.values()
    ]


def test_a_trl_without_such_rows_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    version = (
        rf"^register_tree_attention is for the tree-packed rows of TRL 1.16: TRL {trl_tree.metadata.version('trl')} "
    )

    def other(module: Any, query: Any, *, tree_kv_index: Any, block_mask: Any) -> None:
        """The tree attention of some other version."""

    with monkeypatch.context() as patch:
        patch.setattr(packing, "tree_attention", other)
        with pytest.raises(ImportError, match=version + r"calls its tree attention with tree_kv_index, block_mask$"):
            register_tree_attention()
    with monkeypatch.context() as patch:
        patch.setattr(packing, "register_tree_attention", lambda: AttentionInterface.register("tree_fa3", THEIRS))
        with pytest.raises(ImportError, match=version + r"registers its tree attention in another way$"):
            register_tree_attention()
    with monkeypatch.context() as patch:
        patch.delattr(packing, "tree_attention")
        with pytest.raises(ImportError, match=version + rf"has no tree attention in {trl_tree.MODULE}$"):
            register_tree_attention()
    with monkeypatch.context() as patch:
        patch.setattr(trl_tree, "MODULE", "trl.experimental.async_grpo.nothing")
        with pytest.raises(ImportError, match=version + r"has no trl.experimental.async_grpo.nothing$"):
            register_tree_attention()

    def missing(name: str) -> str:
        raise trl_tree.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(trl_tree, "MODULE", "trl.experimental.async_grpo.nothing")
    monkeypatch.setattr(trl_tree.metadata, "version", missing)
    with pytest.raises(ImportError, match=r"of TRL 1.16: TRL, which is not installed, has no trl\.[a-z_.]*nothing$"):
        register_tree_attention()
