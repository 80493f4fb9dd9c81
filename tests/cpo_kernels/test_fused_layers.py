"""Claims about `rms_norm`, `rotary` and `swiglu`: eager is Transformers to the bit, kernels are within a stated bound."""

from collections.abc import Callable

import pytest
import torch
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm, apply_rotary_pos_emb

from cpo_kernels.fused_layers import rms_norm, rotary, swiglu
from tests.cpo_kernels.kernel_device import DEVICE, not_interpreted, runs_kernels

EPS = 1e-5
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def draw(*shape: int, dtype: torch.dtype, seed: int, scale: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(shape, generator=generator)).to(DEVICE, dtype)


def with_gradients(
    function: Callable[..., torch.Tensor], upstream: torch.Tensor, *inputs: torch.Tensor
) -> list[torch.Tensor]:
    """The output and the gradient of every input, of leaves that are copies."""
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream.to(out.dtype))]


def assert_within_rounding(actual: torch.Tensor, expected: torch.Tensor, steps: float = 1.0) -> None:
    """Within `steps` roundings of each element, and of 2^-22 of the largest where terms cancel."""
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    relative = 1e-6 if actual.dtype == torch.float32 else steps * torch.finfo(actual.dtype).eps
    tiny = 2.0**-22 * float(expected.double().abs().max())
    error = (actual.double() - expected.double()).abs()
    worst = (error / (relative * expected.double().abs() + tiny)).max()
    assert float(worst) <= 1, float(worst)


@not_interpreted
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weight_dtype", [None, torch.float32], ids=["same", "float32"])
def test_eager_is_the_module_of_transformers_to_the_bit(dtype: torch.dtype, weight_dtype: torch.dtype | None) -> None:
    norm = LlamaRMSNorm(40, EPS).to(weight_dtype or dtype)
    mlp = LlamaMLP(LlamaConfig(hidden_size=40, intermediate_size=56, num_attention_heads=4)).to(dtype)
    with torch.no_grad():
        norm.weight.copy_(draw(40, dtype=torch.float32, seed=1))
    x, upstream = draw(2, 5, 40, dtype=dtype, seed=2), draw(2, 5, 40, dtype=dtype, seed=3)

    def stock(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(norm, {"weight": weight}, (x,))

    for impl in (None, "eager", "reference"):
        ours = with_gradients(lambda x, w, impl=impl: rms_norm(x, w, EPS, impl=impl), upstream, x, norm.weight)
        theirs = with_gradients(stock, upstream, x, norm.weight)
        assert all(torch.equal(*pair) for pair in zip(ours, theirs, strict=True))
        assert torch.equal(mlp.down_proj(swiglu(mlp.gate_proj(x), mlp.up_proj(x), impl=impl)), mlp(x))


@runs_kernels
@pytest.mark.parametrize("columns", [24, 128, 1000])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kernel_of_rms_norm_is_eager_within_one_rounding(dtype: torch.dtype, columns: int) -> None:
    """The rounded row may be its neighbour, and the product with the weight then another."""
    scales = torch.logspace(-6, 3, 9, device=DEVICE)[:, None]  # eps matters in the first, not in the last
    x = (draw(9, columns, dtype=torch.float32, seed=4) * scales).to(dtype)
    weight, upstream = draw(columns, dtype=dtype, seed=5), draw(9, columns, dtype=dtype, seed=6)
    found, expected = (
        with_gradients(lambda x, w, impl=impl: rms_norm(x, w, EPS, impl=impl), upstream, x, weight)
        for impl in ("triton", "eager")
    )
    assert_within_rounding(found[0], expected[0], steps=2)
    if dtype == torch.float32:
        equal = (found[0] - expected[0]).abs() <= 1e-6 * expected[0].abs()
    else:
        equal = found[0] == expected[0]
    assert equal.double().mean() > 0.98  # a neighbour is the exception
    for row in range(9):  # gradients of rows differ by their scale
        assert_within_rounding(found[1][row], expected[1][row], steps=2)
    # eager rounds each term of the weight's gradient before it adds them, the kernel their sum
    normalised = rms_norm(x, torch.ones_like(weight), EPS, impl="eager")
    terms = upstream.double() * normalised.double()
    eps = torch.finfo(dtype).eps
    bound = eps * terms.sum(0).abs() + max(2**-4 * eps, 2**-21) * terms.abs().sum(0)
    assert bool(((found[2].double() - terms.sum(0)).abs() <= bound).all())


@runs_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kernel_of_swiglu_is_eager_within_one_rounding(dtype: torch.dtype) -> None:
    gate, up = draw(3, 1100, dtype=dtype, seed=7, scale=4.0), draw(3, 1100, dtype=dtype, seed=8)
    gate[0, :6] = torch.tensor([0.0, -0.0, 60.0, -60.0, 300.0, -300.0], device=DEVICE)
    upstream = draw(3, 1100, dtype=dtype, seed=9)
    results = [
        with_gradients(lambda g, u, impl=impl: swiglu(g, u, impl=impl), upstream, gate, up)
        for impl in ("triton", "eager")
    ]
    for found, expected in zip(*results, strict=True):
        assert bool(torch.isfinite(found).all())
        assert_within_rounding(found, expected, steps=2)
        if dtype != torch.float32:
            assert (found == expected).double().mean() > 0.98  # a neighbour is the exception


def rotary_inputs(dtype: torch.dtype, batch: int, head_dim: int) -> list[torch.Tensor]:
    """q of 5 heads, k of 2, as projections leave them, tables, and gradients of both outputs."""
    q, k, grad_q, grad_k = (
        draw(batch, 7, heads, head_dim, dtype=dtype, seed=20 + place).transpose(1, 2)
        for place, heads in enumerate((5, 2, 5, 2))
    )
    angles = draw(1, 7, head_dim // 2, dtype=torch.float32, seed=24)
    tables = [function(torch.cat((angles, angles), -1)).to(dtype) for function in (torch.cos, torch.sin)]
    return [q, k, *tables, grad_q, grad_k]


def rotated(impl: str, q: torch.Tensor, k: torch.Tensor, *rest: torch.Tensor) -> list[torch.Tensor]:
    """Both outputs and both gradients."""
    cos, sin, *upstream = rest
    leaves = [x.detach().requires_grad_() for x in (q, k)]
    outputs = rotary(leaves[0], leaves[1], cos, sin, impl=impl)
    return [*(out.detach() for out in outputs), *torch.autograd.grad(outputs, leaves, upstream)]


@not_interpreted
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_eager_rotation_is_that_of_transformers_to_the_bit(dtype: torch.dtype) -> None:
    q, k, cos, sin, *_ = rotary_inputs(dtype, 2, 16)
    expected = apply_rotary_pos_emb(q, k, cos, sin)
    for impl in (None, "eager", "reference"):
        assert all(torch.equal(*pair) for pair in zip(rotary(q, k, cos, sin, impl=impl), expected, strict=True))


@runs_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("batch", "head_dim", "tables"), [(1, 16, 1), (2, 24, 1), (2, 64, 2)])
def test_kernel_of_rotation_has_the_bits_of_eager(dtype: torch.dtype, batch: int, head_dim: int, tables: int) -> None:
    q, k, cos, sin, *upstream = rotary_inputs(dtype, batch, head_dim)
    if tables == 2:  # another of each, and halves that differ
        cos, sin = (
            torch.cat((x, x.flip(1))) * torch.linspace(1, 2, head_dim, device=DEVICE).to(dtype) for x in (cos, sin)
        )
    results = [rotated(impl, q, k, cos, sin, *upstream) for impl in ("triton", "eager")]
    for found, expected in zip(*results, strict=True):
        if dtype == torch.float32:  # a GPU may add to an unrounded product
            assert float((found - expected).abs().max()) <= 1e-6 * float(expected.abs().max())
        else:
            assert torch.equal(found, expected)
    contiguous = rotated("triton", *(x.contiguous() for x in (q, k, cos, sin, *upstream)))
    assert all(torch.equal(*pair) for pair in zip(contiguous, results[0], strict=True))


@runs_kernels
def test_halves_of_one_product_and_other_strides_give_the_bits_of_copies() -> None:
    both = draw(2, 3, 80, dtype=torch.bfloat16, seed=10)
    gate, up = both.chunk(2, dim=-1)
    upstream = draw(2, 40, 3, dtype=torch.bfloat16, seed=11).transpose(1, 2)
    weight = draw(40, dtype=torch.bfloat16, seed=12)

    def gated(g: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        return swiglu(g, u, impl="triton")

    def norm(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, w, EPS, impl="triton")

    copies = with_gradients(gated, upstream.contiguous(), gate.contiguous(), up.contiguous())
    assert all(torch.equal(*pair) for pair in zip(with_gradients(gated, upstream, gate, up), copies, strict=True))
    transposed = draw(2, 40, 3, dtype=torch.bfloat16, seed=13).transpose(1, 2)
    for x in (gate, transposed):
        copies = with_gradients(norm, upstream.contiguous(), x.contiguous(), weight)
        assert all(torch.equal(*pair) for pair in zip(with_gradients(norm, upstream, x, weight), copies, strict=True))


@runs_kernels
def test_float32_weight_of_a_16_bit_row_widens_the_result_as_eager_does() -> None:
    x, weight = draw(5, 24, dtype=torch.bfloat16, seed=14), draw(24, dtype=torch.float32, seed=15)
    upstream = draw(5, 24, dtype=torch.float32, seed=16)
    results = [
        with_gradients(lambda x, w, impl=impl: rms_norm(x, w, EPS, impl=impl), upstream, x, weight)
        for impl in ("triton", "eager")
    ]
    (out, grad_x, grad_weight), expected = results
    assert (out.dtype, grad_x.dtype, grad_weight.dtype) == (torch.float32, torch.bfloat16, torch.float32)
    assert float((out - expected[0]).abs().max()) <= 2**-8 * float(expected[0].abs().max())
    assert_within_rounding(grad_x, expected[1], steps=2)
    torch.testing.assert_close(grad_weight, expected[2], rtol=2**-8, atol=2**-8)


@runs_kernels
def test_weight_gradient_is_repeatable_and_left_out_where_it_is_frozen(monkeypatch: pytest.MonkeyPatch) -> None:
    from cpo_kernels.fused_layers import triton_rms_norm as module

    launches: list[dict[str, object]] = []
    kernel = module._norm_backward

    class Recorded:
        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            def launch(*args: object, **options: object) -> None:
                launches.append({"programs": grid[0]} | options)
                kernel[grid](*args, **options)

            return launch

    monkeypatch.setattr(module, "_norm_backward", Recorded())
    monkeypatch.setattr(module, "WEIGHT_PROGRAMS", 4)
    x, weight = draw(11, 24, dtype=torch.float32, seed=17), draw(24, dtype=torch.float32, seed=18)
    upstream = draw(11, 24, dtype=torch.float32, seed=19)
    runs = [with_gradients(lambda x, w: rms_norm(x, w, EPS, impl="triton"), upstream, x, weight) for _ in range(2)]
    assert all(torch.equal(*pair) for pair in zip(*runs, strict=True))
    assert_within_rounding(
        runs[0][2], with_gradients(lambda x, w: rms_norm(x, w, EPS, impl="eager"), upstream, x, weight)[2]
    )
    frozen = with_gradients(lambda x: rms_norm(x, weight, EPS, impl="triton"), upstream, x)
    assert torch.equal(frozen[1], runs[0][1])
    assert [(launch["programs"], launch["NEEDS_WEIGHT"]) for launch in launches] == [(4, True), (4, True), (11, False)]


@runs_kernels
def test_no_rows_and_no_gradient() -> None:
    x, weight = torch.zeros(0, 24, device=DEVICE), torch.ones(24, device=DEVICE)
    assert with_gradients(lambda x: rms_norm(x, weight, EPS, impl="triton"), x, x)[1].shape == (0, 24)
    assert with_gradients(lambda x: swiglu(x, x, impl="triton"), x, x)[1].shape == (0, 24)
    with torch.no_grad():
        assert not rms_norm(torch.ones(2, 24, device=DEVICE), weight.requires_grad_(), EPS, impl="triton").requires_grad


@runs_kernels
def test_what_no_kernel_is_made_for_is_refused() -> None:
    double = torch.ones(2, 24, dtype=torch.float64, device=DEVICE)
    with pytest.raises(ValueError, match=r"rms_norm: impl='triton' expects bfloat16"):
        rms_norm(double, double[0], EPS, impl="triton")
    with pytest.raises(ValueError, match=r"swiglu: impl='triton' expects bfloat16"):
        swiglu(double, double, impl="triton")
    heads = torch.ones(1, 2, 3, 4, device=DEVICE)
    with pytest.raises(ValueError, match=r"rotary: impl='triton' expects .* the same for q, k, cos and sin"):
        rotary(heads, heads, heads[0, :1].double(), heads[0, :1].double(), impl="triton")


@not_interpreted
def test_shapes_that_do_not_fit_are_refused() -> None:
    x = torch.ones(2, 24)
    with pytest.raises(ValueError, match=r"rms_norm: expected x \[..., E\] and weight \[E\]"):
        rms_norm(x, torch.ones(1), EPS)
    with pytest.raises(ValueError, match=r"swiglu: expected gate and up"):
        swiglu(x, x[:, :1])
    with pytest.raises(ValueError, match=r"swiglu: expected gate and up"):
        swiglu(x, x.double())
    heads = torch.ones(1, 2, 3, 4)
    for wrong in ((heads, heads[0], heads[0, :1]), (heads, heads, heads[0]), (heads, heads[:, :, 1:], heads[0, :1])):
        with pytest.raises(ValueError, match=r"rotary: expected q \[B, H, T, D\]"):
            rotary(*wrong, wrong[2])
    with pytest.raises(ValueError, match="fused_layers: impl='triton' cannot run on cpu"):
        swiglu(x, x, impl="triton")
