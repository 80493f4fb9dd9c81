"""Claims about impl="flash": chains become cumulative lengths, the call is flash-attn's, all else is refused.

Where flash-attn and a GPU are there, its result is compared with the reference; elsewhere a function of its signature
stands in, which runs SDPA over one sequence at a time.
"""

import importlib.util
import sys
from itertools import pairwise

import pytest
import torch

from cpo_kernels import build_forest, tree_attention, tree_schedule
from cpo_kernels.tolerances import kernel_bound, random_subtree_end
from cpo_kernels.tree_attention.flash import chain_lengths, flash_tree_attention, load_varlen

CPU = torch.device("cpu")
CHAINS = [[1, 2, 3, 4, 5], [6], [7, 8, 9], list(range(10, 40))]


def varlen_by_sdpa(
    q: torch.Tensor,  # [T, H, D]
    k: torch.Tensor,  # [T, Hkv, D]
    v: torch.Tensor,  # [T, Hkv, D]
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: torch.Tensor | None = None,
) -> torch.Tensor:
    """The signature of flash_attn.flash_attn_varlen_func, one sequence after the other."""
    assert causal
    assert deterministic
    assert (dropout_p, window_size, softcap, return_attn_probs) == (0.0, (-1, -1), 0.0, False)
    assert alibi_slopes is block_table is None
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    assert cu_seqlens_q.is_contiguous()
    bounds = cu_seqlens_q.tolist()
    assert bounds == cu_seqlens_k.tolist()
    assert (bounds[0], bounds[-1]) == (0, q.shape[0])
    assert max_seqlen_q == max_seqlen_k == max(b - a for a, b in pairwise(bounds))
    assert type(max_seqlen_q) is int
    rows = []
    for start, stop in pairwise(bounds):
        heads = (x[start:stop].transpose(0, 1)[None] for x in (q, k, v))
        out = torch.nn.functional.scaled_dot_product_attention(
            *heads, is_causal=True, scale=softmax_scale, enable_gqa=True
        )
        rows.append(out[0].transpose(0, 1))
    return torch.cat(rows)


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
def test_the_call_is_flash_attns_and_its_result_the_references(dtype: torch.dtype) -> None:
    forest = build_forest(CHAINS, pad_to_multiple_of=16)
    inputs = random_heads(len(forest.tokens), dtype)
    results = []
    for impl in ("flash", "reference", "exact"):
        leaves = [tensor.to(torch.float64 if impl == "exact" else dtype).requires_grad_() for tensor in inputs[:3]]
        if impl == "flash":
            out = flash_tree_attention(varlen_by_sdpa, *leaves, forest.schedule(), 0.3)
        else:
            out = tree_attention(*leaves, forest.subtree_end, scale=0.3, impl="reference")
        results.append([out.detach(), *torch.autograd.grad(out, leaves, inputs[3].to(out.dtype))])
    for flash, reference, exact in zip(*results, strict=True):
        assert flash.dtype == dtype
        eager_error = float((reference.double() - exact).abs().max())
        # SDPA rounds its weights to the dtype, the reference does not
        allowed = kernel_bound(eager_error, dtype, 4 * float(exact.abs().max()))
        assert float((flash.double() - exact).abs().max()) <= allowed


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
    with pytest.raises(ValueError, match=r"impl='flash' expects q, k and v all float16 or all bfloat16, got .*float32"):
        flash_tree_attention(varlen_by_sdpa, q, k, v, forest.schedule(), 0.3)
    with pytest.raises(ValueError, match=r"all float16 or all bfloat16"):
        flash_tree_attention(varlen_by_sdpa, q.half(), k.half(), v.bfloat16(), forest.schedule(), 0.3)
    with pytest.raises(ValueError, match="impl='flash' cannot run on cpu"):
        tree_attention(q.half(), k.half(), v.half(), forest.subtree_end, impl="flash")
    monkeypatch.setitem(sys.modules, "flash_attn", None)  # what import sees where a package is missing
    with pytest.raises(ValueError, match="impl='flash' needs the package flash-attn"):
        load_varlen()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.skipif(importlib.util.find_spec("flash_attn") is None, reason="needs flash-attn")
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_flash_attn_equals_the_reference(dtype: torch.dtype, head_dim: int) -> None:
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
