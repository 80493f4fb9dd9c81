"""The check that stands between a device's default and Triton: it passes right kernels and refuses each broken one.

Without a GPU the kernels run in Triton's interpreter, which must be chosen before Triton is imported: the tests run once
more in a process with TRITON_INTERPRET=1.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cpo_kernels import implementation, self_check, tree_attention
from cpo_kernels.implementation import (
    Implementations,
    available_implementations,
    resolve_implementation,
    resolve_implementations,
)
from cpo_kernels.integrations.transformers import prepare
from cpo_kernels.self_check import KernelCheckError, ModelShape
from tests.tiny import tiny_llama

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
SHAPE = ModelShape(torch.float32, num_heads=2, num_kv_heads=1, head_dim=16, hidden_size=48)

GRADIENT_OF = {"dq": 0, "dk": 1, "dv": 2, "gradient": 0}  # argument

runs_kernels = pytest.mark.skipif(not INTERPRETED, reason="run by test_check_holds_in_the_interpreter")


@pytest.mark.skipif(INTERPRETED, reason="is this process")
@pytest.mark.slow
def test_check_holds_in_the_interpreter() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "kernels_pass or by_default", __file__],
        cwd=Path(__file__).parents[2],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]
    assert "3 passed" in result.stdout


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A line of 83 rows, nothing checked yet, and Triton as the default of the CPU."""
    monkeypatch.setattr(self_check, "NUM_ROWS", 83)
    monkeypatch.setattr(self_check, "NUM_TARGETS", 90)
    monkeypatch.setattr(self_check, "VOCAB_SIZE", 131)
    monkeypatch.setattr(self_check, "_passed", set())
    monkeypatch.setitem(implementation.DEFAULT_BY_DEVICE, "cpu", "triton")


@runs_kernels
def test_right_kernels_pass() -> None:
    self_check.self_check("cpu", ModelShape(torch.bfloat16, num_heads=4, num_kv_heads=2, head_dim=64, hidden_size=96))


class ScaledGradient(torch.autograd.Function):
    """The identity with a gradient that is off by a factor."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, factor: float) -> torch.Tensor:
        ctx.factor = factor
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradients[0] * ctx.factor, None


def broken(op: str, part: str, factor: float) -> Callable[..., Any]:
    """The eager op that answers to `triton`, with one of its results or gradients off by `factor`."""
    real = getattr(self_check, op)

    def posing(*args: Any, impl: str, **options: Any) -> Any:
        inputs = list(args)
        if impl == "triton" and part in GRADIENT_OF:
            place = GRADIENT_OF[part]
            inputs[place] = ScaledGradient.apply(inputs[place], factor)
        result = real(*inputs, impl="eager", **options)
        if impl == "triton" and part == "out":
            return result * factor
        if impl == "triton" and part.endswith("logps"):
            return replace(result, **{part: getattr(result, part) * factor})
        return result

    return posing


@pytest.mark.parametrize("factor", [1.0, 1 + 1e-4, float("nan")])
@pytest.mark.parametrize(
    ("op", "part"),
    [
        *(("tree_attention", part) for part in ("out", "dq", "dk", "dv")),
        *(("linear_logprob", part) for part in ("token_logps", "ref_token_logps", "segment_logps", "gradient")),
    ],
)
def test_each_wrong_result_is_refused_by_the_name_of_its_op(
    small: None, monkeypatch: pytest.MonkeyPatch, op: str, part: str, factor: float
) -> None:
    for name in ("tree_attention", "linear_logprob"):
        monkeypatch.setattr(self_check, name, broken(name, part if name == op else "nothing", factor))
    if factor == 1.0:
        self_check.self_check("cpu", SHAPE)
        return
    with pytest.raises(KernelCheckError, match=rf"^{op}: its Triton kernels are wrong on cpu .*CPO_KERNELS_IMPL=eager"):
        self_check.self_check("cpu", SHAPE)
    assert self_check._passed == set()


@pytest.mark.parametrize("op", ["tree_attention", "linear_logprob"])
def test_kernel_that_does_not_launch_is_refused_with_its_reason(
    small: None, monkeypatch: pytest.MonkeyPatch, op: str
) -> None:
    def fails(*args: Any, impl: str, **options: Any) -> Any:
        raise RuntimeError("out of resource: shared memory\nRequired: 300000")

    monkeypatch.setattr(self_check, "tree_attention", broken("tree_attention", "nothing", 1.0))
    monkeypatch.setattr(self_check, op, fails)
    with pytest.raises(KernelCheckError, match=rf"^{op}: .*do not run on cpu .*out of resource.*IMPL=eager") as raised:
        self_check.self_check("cpu", SHAPE)
    assert "\n" not in str(raised.value)


@runs_kernels
def test_kernels_by_default_are_checked_once_and_named_ones_never(small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    real = self_check.self_check
    monkeypatch.setattr(self_check, "self_check", lambda *args: calls.append(args) or real("cpu", SHAPE))
    q = torch.randn(5, 2, 16)
    ends = torch.full((5,), 5, dtype=torch.int32)
    for impl in ("triton", "eager"):
        tree_attention(q, q, q, ends, impl=impl)
    monkeypatch.setenv("CPO_KERNELS_IMPL", "triton")
    tree_attention(q, q, q, ends)
    assert calls == []
    monkeypatch.delenv("CPO_KERNELS_IMPL")
    for _ in range(2):
        tree_attention(q, q, q, ends)
    assert resolve_implementations(None, "cpu") == Implementations("triton", "triton")
    assert calls == [(torch.device("cpu"),)]


@runs_kernels
def test_prepare_checks_kernels_by_default_in_the_shapes_of_the_model(
    small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_llama(hidden_size=64)
    prepare(model)
    expected = ModelShape(torch.float32, num_heads=4, num_kv_heads=2, head_dim=16, hidden_size=64)
    assert self_check._passed == {("cpu", expected)}
    monkeypatch.setattr(self_check, "_passed", set())
    prepare(tiny_llama(hidden_size=64), impl="eager")
    assert self_check._passed == set()


def test_prepare_refuses_a_device_on_which_a_kernel_is_wrong(small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(self_check, "tree_attention", broken("tree_attention", "out", 1.01))
    model = tiny_llama(hidden_size=64)
    with pytest.raises(KernelCheckError, match="tree_attention"):
        prepare(model)
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_check_needs_no_gradients_around_it(
    small: None, monkeypatch: pytest.MonkeyPatch, context: Callable[..., Any]
) -> None:
    for op in ("tree_attention", "linear_logprob"):
        monkeypatch.setattr(self_check, op, broken(op, "nothing", 1.0))
    with context():
        self_check.self_check("cpu", SHAPE)


def test_cuda_defaults_to_triton_and_the_cpu_to_eager() -> None:
    assert implementation.DEFAULT_BY_DEVICE == {"cpu": "eager", "cuda": "triton"}
    assert "triton" in available_implementations("cuda")


@pytest.mark.skipif(INTERPRETED, reason="the interpreter has triton on the CPU")
def test_each_op_is_resolved_by_itself_and_what_cannot_run_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_implementations(None, "cpu") == Implementations("eager", "eager")
    assert resolve_implementations(Implementations("reference"), "cpu") == Implementations("reference", "eager")
    with pytest.raises(ValueError, match=r"tree_attention: impl='triton' cannot run on cpu"):
        resolve_implementations("triton", "cpu")
    monkeypatch.setenv("CPO_KERNELS_IMPL", "reference")
    assert resolve_implementations(Implementations(None, "eager"), "cpu") == Implementations("reference", "eager")
    with pytest.raises(ValueError, match="nothing"):
        resolve_implementation("linear_logprob", "nothing", "cpu", ("eager",))


def test_a_choice_inside_a_compiled_function_breaks_no_graph() -> None:
    def double(x: torch.Tensor) -> torch.Tensor:
        name = resolve_implementation("some_op", None, x.device.type, ("reference", "eager"))
        return 2 * x if name == "eager" else x

    compiled = torch.compile(double, backend="eager", fullgraph=True)
    assert torch.equal(compiled(torch.ones(3)), torch.full((3,), 2.0))
