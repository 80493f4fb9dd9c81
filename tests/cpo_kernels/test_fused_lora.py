"""Claims about `add_lora` and `fuse_lora`: how far they are from PEFT, and when a layer goes PEFT's way."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from cpo_kernels.fused_layers import add_lora
from cpo_kernels.integrations.lora import fuse_lora, keep_input_dtype
from tests.cpo_kernels.kernel_device import DEVICE, not_interpreted, runs_kernels
from tests.tiny import ALL_LINEAR, randomize_lora, tiny_llama

BOUND = 2.0**-16  # of the sum of the terms' magnitudes
PEFT_BOUND = 1e-5  # relative L2, of a layer's gradients
SCALING = 2.5


def draw(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def inputs(num_rows: int, columns: int, outputs: int, rank: int) -> tuple[torch.Tensor, ...]:
    """base, x, a, b and the gradient of the output."""
    base = draw(1, num_rows, outputs, seed=1, dtype=torch.bfloat16)
    x = draw(1, num_rows, columns, seed=2, dtype=torch.bfloat16)
    a, b = draw(rank, columns, seed=3) / columns**0.5, draw(outputs, rank, seed=4)
    return base, x, a, b, draw(1, num_rows, outputs, seed=5, dtype=torch.bfloat16)


def with_gradients(impl: str, upstream: torch.Tensor, *tensors: torch.Tensor) -> list[torch.Tensor]:
    base, x, a, b = leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    out = add_lora(base, x, a, b, SCALING, impl=impl)
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream.to(out.dtype))]


# one tile and less; several, with splits of the columns; a rank that is no power of two, one equal to the columns
@runs_kernels
@pytest.mark.parametrize("sizes", [(5, 64, 40, 3), (130, 600, 150, 20), (70, 1100, 33, 8), (9, 16, 16, 16)], ids=str)
def test_every_result_is_within_its_bound_of_the_exact_one(sizes: tuple[int, int, int, int]) -> None:
    base, x, a, b, upstream = inputs(*sizes)
    found = with_gradients("triton", upstream, base, x, a, b)
    assert [tensor.dtype for tensor in found] == [torch.bfloat16] * 3 + [torch.float32] * 2
    x64, a64, b64, g64 = (tensor.double().flatten(0, -2) for tensor in (x, a, b, upstream))
    u, d = x64 @ a64.t(), g64 @ b64
    assert torch.equal(found[1], upstream)
    # (result, exact, sum of the terms' magnitudes, what rounding to its dtype may add)
    u_sizes, d_sizes = x64.abs() @ a64.abs().t(), g64.abs() @ b64.abs()
    cases = [
        (found[0], base[0].double() + SCALING * u @ b64.t(), SCALING * u_sizes @ b64.abs().t()),
        (found[2], SCALING * d @ a64, SCALING * d_sizes @ a64.abs()),
        (found[3], SCALING * d.t() @ x64, SCALING * d_sizes.t() @ x64.abs()),
        (found[4], SCALING * g64.t() @ u, SCALING * g64.t().abs() @ u_sizes),
    ]
    for result, exact, magnitude in cases:
        rounding = torch.finfo(result.dtype).eps / 2 * exact.abs()
        error = (result.double().reshape(exact.shape) - exact).abs()
        assert bool((error <= rounding + BOUND * magnitude).all()), float(
            (error / (rounding + BOUND * magnitude)).max()
        )


@runs_kernels
def test_eager_is_within_rounding_of_the_kernels_and_mostly_the_same() -> None:
    base, x, a, b, upstream = inputs(130, 600, 150, 8)
    found, expected = (with_gradients(impl, upstream, base, x, a, b) for impl in ("triton", "eager"))
    for place in (0, 1, 2):
        assert (found[place] == expected[place]).double().mean() > 0.98
    for place in (3, 4):
        assert float((found[place] - expected[place]).norm() / expected[place].norm()) <= PEFT_BOUND


@runs_kernels
def test_results_are_repeatable_and_do_not_depend_on_strides() -> None:
    base, x, a, b, upstream = inputs(70, 64, 40, 8)
    first = with_gradients("triton", upstream, base, x, a, b)
    apart = [torch.stack([t, t], -1)[..., 0] for t in (upstream, base, x, a, b)]
    assert not any(tensor.is_contiguous() for tensor in apart)
    for tensors in ([upstream, base, x, a, b], apart):
        assert all(torch.equal(*pair) for pair in zip(with_gradients("triton", *tensors), first, strict=True))


@runs_kernels
def test_no_rows_give_no_gradient() -> None:
    base, x, a, b, upstream = inputs(0, 64, 40, 8)
    out, _, grad_x, grad_a, grad_b = with_gradients("triton", upstream, base, x, a, b)
    assert (out.shape, grad_x.shape) == (base.shape, x.shape)
    assert not grad_a.any()
    assert not grad_b.any()


@runs_kernels
def test_what_no_kernel_is_made_for_is_refused() -> None:
    base, x, a, b, _ = inputs(2, 80, 40, 65)
    with pytest.raises(ValueError, match=r"add_lora: impl='triton' expects bfloat16 base and x, .* rank <= 64"):
        add_lora(base, x, a, b, 1.0, impl="triton")
    with pytest.raises(ValueError, match=r"add_lora: impl='triton' expects bfloat16"):
        add_lora(base.float(), x.float(), a[:8], b[:, :8], 1.0, impl="triton")


@not_interpreted
def test_shapes_that_do_not_fit_are_refused() -> None:
    base, x, a, b, _ = inputs(2, 64, 40, 8)
    for wrong in ((base, x[:, :1], a, b), (base, x, a[:, :3], b), (base, x, a, b.t()), (base, x.float(), a, b)):
        with pytest.raises(ValueError, match=r"add_lora: expected base \[..., N\]"):
            add_lora(*wrong, 1.0)


def layer(dtype: torch.dtype = torch.bfloat16, r: int = 4, adapters: int = 1, **options: Any) -> Any:
    """One adapted linear layer, 48 columns wide and 40 high, inside its `PeftModel`."""
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(48, 40, bias=False)).to(dtype)
    config = LoraConfig(r=r, lora_alpha=2 * r, target_modules=["0"], **options)
    model = get_peft_model(module, config, autocast_adapter_dtype=True)
    for number in range(1, adapters):
        model.add_adapter(str(number), config)
    randomize_lora(model)
    return model.to(DEVICE).train()


def run(model: Any, dtype: torch.dtype = torch.bfloat16) -> list[torch.Tensor]:
    """Output, and gradients of the input and of the weights that have one, seeded alike."""
    model.zero_grad()
    x = draw(2, 7, 48, seed=6, dtype=dtype).requires_grad_()
    torch.manual_seed(1)
    out = model(x)
    out.backward(draw(2, 7, 40, seed=7, dtype=out.dtype))
    assert x.grad is not None
    return [out.detach(), x.grad, *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def bitwise(found: list[torch.Tensor], expected: list[torch.Tensor]) -> bool:
    return all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


@runs_kernels
def test_a_layers_gradients_are_pefts_within_the_bound() -> None:
    model = layer()
    expected = run(model)
    assert fuse_lora(model, "triton") == 1
    found = run(model)
    assert len(found) == 4
    assert not bitwise(found, expected)
    for place in (0, 1):
        assert (found[place] == expected[place]).double().mean() > 0.9
        assert float((found[place] - expected[place]).abs().max()) <= 2**-7 * float(expected[place].abs().max())
    for place in (2, 3):
        assert float((found[place] - expected[place]).norm() / expected[place].norm()) <= PEFT_BOUND


def two_active(model: Any) -> None:
    model.base_model.set_adapter(["default", "1"])


def hooked(model: Any) -> None:
    model.base_model.model[0].lora_A["default"].register_forward_pre_hook(lambda module, args: None)


def turned_off(model: Any) -> None:
    model.base_model.disable_adapter_layers()


PEFTS_WAY: dict[str, tuple[dict[str, Any], Callable[[Any], Any]]] = {
    "float32": ({"dtype": torch.float32}, lambda model: None),
    "float16": ({"dtype": torch.float16}, lambda model: None),
    "rank above 64": ({"r": 65}, lambda model: None),
    "dropout": ({"lora_dropout": 0.5}, lambda model: None),
    "bias": ({"lora_bias": True}, lambda model: None),
    "dora": ({"use_dora": True}, lambda model: None),
    "two active adapters": ({"adapters": 2}, two_active),
    "hooks on A": ({}, hooked),
    "adapters off": ({}, turned_off),
    "merged": ({}, lambda model: model.merge_adapter()),
}


@runs_kernels
@pytest.mark.parametrize("case", PEFTS_WAY)
def test_what_is_not_one_plain_adapter_keeps_pefts_bits(case: str) -> None:
    options, change = PEFTS_WAY[case]
    model = layer(**options)
    change(model)
    dtype = options.get("dtype", torch.bfloat16)
    expected = run(model, dtype)
    assert fuse_lora(model, "triton") == 1
    assert bitwise(run(model, dtype), expected)


@runs_kernels
def test_autocast_keeps_pefts_bits() -> None:
    model = layer()
    with torch.autocast(DEVICE, torch.bfloat16):
        expected = run(model)
        fuse_lora(model, "triton")
        assert bitwise(run(model), expected)


@runs_kernels
def test_switched_changed_and_zero_adapters_are_followed() -> None:
    """There is no copy of A or B that could be left behind, however they are written."""
    model, stock = layer(adapters=2), layer(adapters=2)
    fuse_lora(model, "triton")
    first = run(model)
    for change in (
        lambda each: each.set_adapter("1"),
        lambda each: [p.data.mul_(2) for name, p in each.named_parameters() if "lora_A" in name],
        lambda each: [p.data.copy_(3 * p.data) for name, p in each.named_parameters() if "lora_B" in name],
    ):
        change(model)
        change(stock)
        found, expected = run(model), run(stock)
        assert not torch.equal(found[0], first[0])
        assert float((found[2] - expected[2]).norm() / expected[2].norm()) <= PEFT_BOUND
        first = found
    for each in (model, stock):
        for name, parameter in each.named_parameters():
            if "lora_B" in name:
                torch.nn.init.zeros_(parameter)
        each.base_model.disable_adapter_layers()
    off = model(draw(2, 7, 48, seed=6, dtype=torch.bfloat16))
    model.base_model.enable_adapter_layers()
    assert torch.equal(model(draw(2, 7, 48, seed=6, dtype=torch.bfloat16)), off)  # rewards before step 1 are 0


def adapted_llama() -> PeftModel:
    config = LoraConfig(r=4, lora_alpha=8, target_modules=list(ALL_LINEAR), task_type="CAUSAL_LM")
    model = get_peft_model(tiny_llama(dtype=torch.bfloat16), config, autocast_adapter_dtype=True)
    randomize_lora(model)
    keep_input_dtype(model)
    return model.to(DEVICE).train()


@runs_kernels
@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputed_layers_give_the_same_bits(reentrant: bool) -> None:
    results = []
    for checkpointing in (False, True):
        model = adapted_llama()
        assert fuse_lora(model, "triton") == 2 * len(ALL_LINEAR)
        assert fuse_lora(model, "triton") == 2 * len(ALL_LINEAR)  # again changes nothing
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        model(torch.tensor([[5, 6, 7, 8, 9]], device=DEVICE)).logits.float().square().sum().backward()
        results.append([p.grad for p in model.parameters() if p.grad is not None])
    assert len(results[0]) == 2 * 2 * len(ALL_LINEAR)
    assert bitwise(*results)


@not_interpreted
def test_layers_on_a_cpu_are_not_touched() -> None:
    model = adapted_llama()
    assert [fuse_lora(model, impl) for impl in (None, "eager", "reference")] == [0, 0, 0]
    assert not any("forward" in vars(module) for module in model.modules())
    assert fuse_lora(torch.nn.Linear(2, 2)) == 0
    with pytest.raises(ValueError, match="fused_layers: impl='triton' cannot run on cpu"):
        fuse_lora(model, "triton")
