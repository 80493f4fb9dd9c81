"""Our `ChunkedLogProbFunction` against the installed TRL's: same call, same five outputs, same gradients."""

import inspect
from typing import Any

import pytest
import torch
from trl.kernels import ChunkedLogProbFunction as Installed
from trl.kernels import chunked_logprob as trl_chunked_logprob

from cpo_kernels.integrations.chunked_logprob import OPTIONAL_OUTPUTS, ChunkedLogProbFunction

N, H, V = 23, 16, 101  # V is no multiple of the chunk below
CHUNK = 32
ROUNDING = 4e-5  # logits reach 28: eight roundings of float32 at that size
TRANSFORMS = {
    "plain": (1.0, None, 1.0),
    "temperature": (0.7, None, 1.0),
    "soft-cap and scale": (1.3, 5.0, 0.6),
}


def inputs(dtype: torch.dtype = torch.float32, head_grad: bool = True, bias: bool = True) -> list[Any]:
    generator = torch.Generator().manual_seed(0)
    hidden, weight, offset = (torch.randn(shape, generator=generator) for shape in ((N, H), (V, H), (V,)))
    targets = torch.randint(V, (N,), generator=generator)
    targets[:2] = torch.tensor([0, V - 1])
    return [
        hidden.to(dtype).requires_grad_(),
        weight.to(dtype).requires_grad_(head_grad),
        offset.to(dtype).requires_grad_(head_grad) if bias else None,
        targets,
    ]


def call(function: Any, tensors: list[Any], transform: str, outputs: tuple[str, ...] = OPTIONAL_OUTPUTS) -> tuple:
    temperature, softcap, scale = TRANSFORMS[transform]
    return function.apply(*tensors, temperature, CHUNK, softcap, scale, outputs)


def gradients(results: tuple, tensors: list[Any], with_entropy: bool) -> list[torch.Tensor]:
    weights = torch.randn(2, N, generator=torch.Generator().manual_seed(1))
    loss = (results[0] * weights[0]).sum() + ((results[1] * weights[1]).sum() if with_entropy else 0)
    return list(torch.autograd.grad(loss, [t for t in tensors[:3] if t is not None and t.requires_grad]))


def test_signature_is_that_of_the_installed_trl() -> None:
    ours, theirs = (inspect.signature(function.forward).parameters for function in (ChunkedLogProbFunction, Installed))
    assert [(p.name, p.default) for p in ours.values()] == [(p.name, p.default) for p in theirs.values()]
    assert tuple(trl_chunked_logprob.OPTIONAL_OUTPUTS) == OPTIONAL_OUTPUTS


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize(("head_grad", "bias"), [(True, True), (False, False), (False, True)])
@pytest.mark.parametrize("with_entropy", [False, True])
def test_outputs_and_gradients_equal_those_of_trl(
    transform: str, head_grad: bool, bias: bool, with_entropy: bool
) -> None:
    tensors = inputs(head_grad=head_grad, bias=bias)
    theirs, ours = call(Installed, tensors, transform), call(ChunkedLogProbFunction, tensors, transform)
    for name, one, other in zip(("log_probs", *OPTIONAL_OUTPUTS), theirs, ours, strict=True):
        assert (one.dtype, one.shape, one.requires_grad) == (other.dtype, other.shape, other.requires_grad), name
        assert torch.allclose(one.float(), other.float(), rtol=1e-5, atol=ROUNDING), name
    for one, other in zip(
        gradients(theirs, tensors, with_entropy), gradients(ours, tensors, with_entropy), strict=True
    ):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-5)


def test_only_what_was_asked_is_returned() -> None:
    tensors = inputs()
    results = call(ChunkedLogProbFunction, tensors, "plain", ("mean_logits",))
    assert [value is None for value in results] == [False, True, True, False, True]
    defaults = ChunkedLogProbFunction.apply(*tensors, 1.0, CHUNK)
    assert all(value is not None for value in defaults)


def test_sixteen_bit_inputs_are_at_least_as_exact_as_trl() -> None:
    """Error against float64 of the same rounded inputs; TRL rounds the logits to bf16."""
    tensors = inputs(torch.bfloat16)
    doubled = [t.double() if t.is_floating_point() else t for t in tensors]
    exact = call(ChunkedLogProbFunction, doubled, "plain")
    errors = [float((call(f, tensors, "plain")[0] - exact[0]).abs().max()) for f in (Installed, ChunkedLogProbFunction)]
    assert errors[1] < 1e-4 < errors[0]
    with torch.autocast("cpu", torch.bfloat16):
        mixed = call(ChunkedLogProbFunction, inputs(torch.float32), "plain")[0]
    assert mixed.dtype == torch.float32
    assert torch.equal(mixed, call(ChunkedLogProbFunction, inputs(torch.bfloat16), "plain")[0])


def test_a_graph_can_be_used_twice() -> None:
    tensors = inputs()
    results = call(ChunkedLogProbFunction, tensors, "plain")
    first, second = (
        torch.autograd.grad(results[0].sum() + results[1].sum(), tensors[:3], retain_graph=True) for _ in range(2)
    )
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_float64_gradients_are_those_of_numerical_differentiation() -> None:
    tensors = inputs(torch.float64)

    def differentiable(*leaves: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        results = ChunkedLogProbFunction.apply(*leaves, tensors[3], 0.8, CHUNK, 4.0, 0.9, ("entropy",))
        return results[0], results[1]

    small = [tensor.detach().clone().requires_grad_() for tensor in tensors[:3]]
    assert torch.autograd.gradcheck(differentiable, small, fast_mode=True)
