"""Claims about impl="flash": chains become cumulative lengths, the call is flash-attn's, all else is refused.

Where flash-attn and a GPU are there, its signature is compared with the stand-in's and its result with the reference;
elsewhere the stand-in takes the calls (tests/flash_stand_in.py).
"""

import copy
import importlib.util
import inspect
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cpo_kernels import build_forest, tree_attention, tree_schedule
from cpo_kernels.implementation import Implementations
from cpo_kernels.integrations.transformers import packed, packed_logps, prepare
from cpo_kernels.tolerances import kernel_bound, random_subtree_end
from cpo_kernels.tree_attention.flash import chain_lengths, flash_tree_attention, load_varlen
from tests import flash_stand_in
from tests.tiny import tiny_llama

CPU = torch.device("cpu")
CHAINS = [[1, 2, 3, 4, 5], [6], [7, 8, 9], list(range(10, 40))]


def random_heads(num_rows: int, dtype: torch.dtype, head_dim: int = 32, device: str = "cpu") -> list[torch.Tensor]:
    """q with 4 heads, k and v with 2, and an upstream gradient."""
    generator = torch.Generator().manual_seed(num_rows)
    shapes = [(num_rows, heads, head_dim) for heads in (4, 2, 2, 4)]
    return [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]


def test_every_chain_and_padding_row_is_one_sequence() -> None:
    schedule = build_forest(CHAINS, pad_to_multiple_of=16).schedule()
    chains = chain_lengths(schedule, CPU)
    assert chains.cumulative.tolist() == [0, 5, 6, 9, 39, *range(40, 49)]
    assert chains.cumulative.dtype == torch.int32
    assert chains.longest == 30
    assert chain_lengths(schedule, CPU) is chains  # made once for all layers


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_call_is_flash_attns_and_its_result_the_references(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def varlen(*args: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        asked.append(kwargs)
        return flash_stand_in.flash_attn_varlen_func(*args, **kwargs)

    monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace(flash_attn_varlen_func=varlen))
    forest = build_forest(CHAINS, pad_to_multiple_of=16)
    inputs = random_heads(len(forest.tokens), dtype)
    results = []
    for impl in ("flash", "reference", "exact"):
        leaves = [tensor.to(torch.float64 if impl == "exact" else dtype).requires_grad_() for tensor in inputs[:3]]
        if impl == "flash":
            out = flash_tree_attention(load_varlen(), *leaves, forest.schedule(), 0.3)
        else:
            out = tree_attention(*leaves, forest.subtree_end, scale=0.3, impl="reference")
        results.append([out.detach(), *torch.autograd.grad(out, leaves, inputs[3].to(out.dtype))])
    for flash, reference, exact in zip(*results, strict=True):
        assert flash.dtype == dtype
        eager_error = float((reference.double() - exact).abs().max())
        # SDPA rounds its weights to the dtype, the reference does not
        allowed = kernel_bound(eager_error, dtype, 4 * float(exact.abs().max()))
        assert float((flash.double() - exact).abs().max()) <= allowed
    # not the package's defaults: what makes it our op, and its backward the same twice
    assert {key: asked[0][key] for key in ("causal", "deterministic", "softmax_scale")} == {
        "causal": True, "deterministic": True, "softmax_scale": 0.3,
    }  # fmt: skip


def prefill_errors(model: Any, impl: Implementations) -> tuple[float, float]:
    """Largest error of log-probs of chains in one forward, and of each chain alone by SDPA, both against float64."""
    exact = copy.deepcopy(model).double()
    found = [packed_logps(model, CHAINS, [1] * len(CHAINS), impl=impl).result.token_logps]
    for single in (model, exact):
        parts = []
        for chain in CHAINS:
            ids = torch.tensor([chain], device=single.device)
            logits = single(ids).logits[0, :-1].double()
            parts.append(logits.log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0])
        found.append(torch.cat(parts))
    return tuple(float((got.double() - found[2]).abs().max()) for got in found[:2])


def test_a_model_prefills_chains_by_the_stand_in_as_each_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU the name is refused, so the choice is put past the check of devices."""
    calls = []

    def varlen(*args: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        calls.append(kwargs["max_seqlen_q"])
        return flash_stand_in.flash_attn_varlen_func(*args, **kwargs)

    monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace(flash_attn_varlen_func=varlen))
    model = prepare(tiny_llama(dtype=torch.bfloat16))
    monkeypatch.setattr(packed, "resolve_tree_attention", lambda impl, device: impl or "eager")
    with torch.no_grad():
        ours, eager = prefill_errors(model, Implementations(tree_attention="flash"))
    assert calls == [30] * model.config.num_hidden_layers
    assert ours <= kernel_bound(eager, torch.bfloat16, 4.0)
    with pytest.raises(ValueError, match="expects chains, but the tree with row 0 branches"):
        packed_logps(model, [[1, 2], [1, 3]], [1, 1], impl=Implementations(tree_attention="flash"))


def test_a_branching_forest_is_refused_and_the_row_named() -> None:
    schedule = build_forest([[1, 2], [3, 4, 5], [3, 4, 6]]).schedule()
    with pytest.raises(ValueError, match=r"impl='flash' expects chains, but the tree with row 3 branches below"):
        chain_lengths(schedule, CPU)
    for seed in range(20):
        ends = random_subtree_end(seed, 40)
        if any(tree_schedule(ends).host_segment_stop != tree_schedule(ends).host_segment_end):
            with pytest.raises(ValueError, match="expects chains"):
                chain_lengths(tree_schedule(ends), CPU)


def test_other_dtypes_a_cpu_and_a_missing_package_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    forest = build_forest(CHAINS)
    q, k, v, _ = random_heads(len(forest.tokens), torch.float32)
    varlen = flash_stand_in.flash_attn_varlen_func
    with pytest.raises(ValueError, match=r"impl='flash' expects q, k and v all float16 or all bfloat16, got .*float32"):
        flash_tree_attention(varlen, q, k, v, forest.schedule(), 0.3)
    with pytest.raises(ValueError, match=r"all float16 or all bfloat16"):
        flash_tree_attention(varlen, q.half(), k.half(), v.bfloat16(), forest.schedule(), 0.3)
    with pytest.raises(ValueError, match="impl='flash' cannot run on cpu"):
        tree_attention(q.half(), k.half(), v.half(), forest.subtree_end, impl="flash")
    # what import sees where a package is missing, and where flash-attn-4 is there alone
    for module in (None, SimpleNamespace(cute=None)):
        monkeypatch.setitem(sys.modules, "flash_attn", module)
        with pytest.raises(ValueError, match=r"^tree_attention: impl='flash' needs flash-attn 2, .*cpo-fast\[flash\]$"):
            load_varlen()


def test_the_extra_that_the_refusal_names_installs_flash_attn() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (requirement,) = project["optional-dependencies"]["flash"]
    assert requirement.startswith("flash-attn>=2.")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.skipif(importlib.util.find_spec("flash_attn") is None, reason="needs flash-attn")
def test_a_model_prefills_chains_by_flash_attn_as_each_alone() -> None:
    with torch.no_grad():
        model = prepare(tiny_llama(dtype=torch.bfloat16).to("cuda"))
        ours, eager = prefill_errors(model, Implementations(tree_attention="flash"))
    assert ours <= kernel_bound(eager, torch.bfloat16, 4.0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.skipif(importlib.util.find_spec("flash_attn") is None, reason="needs flash-attn")
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_flash_attn_equals_the_reference(dtype: torch.dtype, head_dim: int) -> None:
    shown, published = (
        [(p.name, p.default) for p in inspect.signature(function).parameters.values()]
        for function in (load_varlen(), flash_stand_in.flash_attn_varlen_func)
    )
    assert shown == published
    forest = build_forest(CHAINS, pad_to_multiple_of=16).to("cuda")
    inputs = random_heads(len(forest.tokens), dtype, head_dim, "cuda")
    results = []
    for impl, precision in (("flash", dtype), ("reference", dtype), ("reference", torch.float64)):
        leaves = [tensor.to(precision).requires_grad_() for tensor in inputs[:3]]
        out = tree_attention(*leaves, forest.subtree_end, schedule=forest.schedule(), impl=impl)
        results.append([out.detach(), *torch.autograd.grad(out, leaves, inputs[3].to(out.dtype))])
    for flash, reference, exact in zip(*results, strict=True):
        eager_error = float((reference.double() - exact).abs().max())
        allowed = kernel_bound(eager_error, dtype, 4 * float(exact.abs().max()))
        assert float((flash.double() - exact).abs().max()) <= allowed
