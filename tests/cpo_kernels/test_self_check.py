"""The check that stands between a device's default and Triton: it passes right kernels and refuses each broken one.

Here the eager implementation of an op poses as its kernels, right or with one result off. `test_self_check_triton` checks
the kernels themselves.
"""

import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from cpo_kernels import implementation
from cpo_kernels.implementation import Implementations, available_implementations, resolve_implementation
from cpo_kernels.integrations.transformers import prepare
from cpo_kernels.kernel_check import KernelCheckError, check_once, run_check
from cpo_kernels.linear_logprob import resolve_linear_logprob
from cpo_kernels.self_check import CHECKS, OPS, TRAINING_OPS, self_check
from cpo_kernels.tree_attention import resolve_tree_attention
from cpo_kernels.tree_attention.check import check_cases
from tests.cpo_kernels.kernel_device import not_interpreted
from tests.cpo_kernels.posed_checks import CPU, SHAPE, checked_ops, nothing_checked, posed_check
from tests.tiny import tiny_llama

ALL = ("reference", "eager", "triton")
PART_OF = {"tree_attention": "out", "linear_logprob": "logps", "tree_decode": "out", "fused_layers": "rms_norm"}
PART_OF["sample_tokens"] = "logps"


@pytest.fixture
def unchecked() -> Iterator[None]:
    """Nothing checked yet, and Triton as the default of the CPU."""
    with nothing_checked():
        yield


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("context", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_right_results_pass_and_need_no_gradients_around_the_check(
    unchecked: None, op: str, context: Callable[..., Any]
) -> None:
    with context():
        run_check(op, posed_check(op), CPU, SHAPE)
    assert checked_ops() == {op}


@pytest.mark.parametrize("factor", [1 + 1e-4, float("nan")])
@pytest.mark.parametrize(
    ("op", "part"),
    [
        *(("tree_attention", part) for part in ("out", "dq", "dk", "dv")),
        *(("linear_logprob", part) for part in ("logps", "ref_logps", "entropy", "mean_logit", "is_top1")),
        *(("linear_logprob", part) for part in ("rows", "weight", "bias")),
        *(("tree_decode", part) for part in ("out", "keys", "values")),
        *(("sample_tokens", part) for part in ("tokens", "logps", "seen")),
        *(("fused_layers", part) for part in ("rms_norm", "x", "weight", "swiglu", "gate", "up", "rotary", "q", "k")),
    ],
)
def test_each_wrong_result_is_refused_by_the_name_of_its_op(unchecked: None, op: str, part: str, factor: float) -> None:
    with pytest.raises(KernelCheckError, match=rf"^{op}: its Triton kernels are wrong on cpu .*CPO_KERNELS_IMPL=eager"):
        run_check(op, posed_check(op, part, factor), CPU, SHAPE)
    assert checked_ops() == set()


OPTIONS = {"window": "windowed", "softcap": "capped", "sinks": "has_sinks"}  # what a model has, by what ignores it


@pytest.mark.parametrize("part", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_that_ignores_what_a_model_has_is_refused_and_another_model_not(
    part: str, dtype: torch.dtype
) -> None:
    others = dict.fromkeys((flag for name, flag in OPTIONS.items() if name != part), True)
    shape = replace(SHAPE, dtype=dtype, **others)
    with torch.enable_grad():
        assert max(posed_check("tree_attention", part)(CPU, shape).values()) <= 1
        shape = replace(shape, **{OPTIONS[part]: True})
        assert max(posed_check("tree_attention")(CPU, shape).values()) <= 1
        ratios = posed_check("tree_attention", part)(CPU, shape)
    wrong = {name for name, ratio in ratios.items() if ratio > 2}
    cases = ["windowed "] if part == "window" else ["windowed ", "changed scores "]
    assert {f"{case}{name}" for case in cases for name in ("out", "dq", "dk", "dv")} <= wrong
    assert not {"out", "dq", "dk", "dv"} & wrong


def test_wrong_gradient_of_sinks_is_refused(unchecked: None) -> None:
    with pytest.raises(KernelCheckError, match="dsinks"):
        run_check("tree_attention", posed_check("tree_attention", "dsinks", 1.01), CPU, replace(SHAPE, has_sinks=True))


def test_attention_is_checked_on_full_blocks_and_on_those_that_a_window_leaves() -> None:
    """And a model without a window, a soft-cap and sinks runs nothing of what those are checked with."""
    assert list(check_cases(SHAPE, CPU)) == [""]
    cases = check_cases(replace(SHAPE, windowed=True, capped=True), CPU)
    for schedule, _ in cases.values():
        assert min(len(schedule.full_blocks), len(schedule.partial_blocks), schedule.num_parts) > 0
    whole, windowed = cases[""][0], cases["windowed "][0]
    assert len(windowed.full_blocks) < len(whole.full_blocks)


@pytest.mark.parametrize("op", OPS)
def test_kernel_that_does_not_launch_is_refused_with_its_reason(unchecked: None, op: str) -> None:
    def fails(*args: Any) -> Any:
        raise RuntimeError("out of resource: shared memory\nRequired: 300000")

    with pytest.raises(KernelCheckError, match=rf"^{op}: .*do not run on cpu .*out of resource.*IMPL=eager") as raised:
        run_check(op, fails, CPU, SHAPE)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("op", OPS)
def test_a_fault_of_one_op_is_in_nobody_elses_way(unchecked: None, monkeypatch: pytest.MonkeyPatch, op: str) -> None:
    for name in OPS:
        monkeypatch.setitem(CHECKS, name, posed_check(name, "nothing" if name != op else PART_OF[op], 1.5))
    others = tuple(name for name in OPS if name != op)
    self_check("cpu", SHAPE, others)
    for name in others:
        check_once(name, CHECKS[name], "cpu")
    assert checked_ops() == set(others)
    with pytest.raises(KernelCheckError, match=op):
        check_once(op, CHECKS[op], "cpu")
    if op in TRAINING_OPS:
        with pytest.raises(KernelCheckError, match=op):
            self_check("cpu", SHAPE)
    else:
        self_check("cpu", SHAPE)


def test_an_op_of_another_name_is_refused() -> None:
    with pytest.raises(ValueError, match=r"expected ops out of tree_attention, .*, got tree_attend"):
        self_check("cpu", SHAPE, ("tree_attention", "tree_attend"))


def test_kernels_by_default_are_checked_once_and_named_ones_never(
    unchecked: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[torch.device, str]] = []

    def resolved(op: str, impl: str | None = None) -> str:
        def check(device: torch.device, shape: Any) -> dict[str, float]:
            calls.append((device, op))
            return {}

        return resolve_implementation(op, impl, "cpu", ALL, check)

    assert [resolved("tree_attention", impl) for impl in ("triton", "eager")] == ["triton", "eager"]
    monkeypatch.setenv("CPO_KERNELS_IMPL", "triton")
    assert resolved("tree_attention") == "triton"
    assert calls == []
    monkeypatch.delenv("CPO_KERNELS_IMPL")
    for op in (*TRAINING_OPS, *TRAINING_OPS):
        assert resolved(op) == "triton"
    assert calls == [(CPU, op) for op in TRAINING_OPS]


def test_each_choice_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger=implementation.logger.name):
        for impl in ("eager", "reference", "eager", "reference"):
            resolve_implementation("an op of this test", impl, "cpu", ALL)
    assert [record.getMessage() for record in caplog.records] == [
        "an op of this test uses impl=eager on cpu",
        "an op of this test uses impl=reference on cpu",
    ]


def test_prepare_refuses_a_device_on_which_a_kernel_is_wrong(unchecked: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CHECKS, "tree_attention", posed_check("tree_attention", "out", 1.01))
    model = tiny_llama(hidden_size=64)
    with pytest.raises(KernelCheckError, match="tree_attention"):
        prepare(model)
    assert model.config._attn_implementation == "sdpa"


def test_cuda_defaults_to_triton_and_the_cpu_to_native() -> None:
    assert implementation.DEFAULT_BY_DEVICE == {"cpu": "native", "cuda": "triton"}
    assert "triton" in available_implementations("cuda")


@not_interpreted
def test_each_op_is_resolved_by_itself_and_what_cannot_run_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Implementations.of("eager") == Implementations("eager", "eager")
    assert Implementations.of(Implementations(None, "eager")) == Implementations(None, "eager")
    ops = {"tree_attention": (resolve_tree_attention, "native"), "linear_logprob": (resolve_linear_logprob, "eager")}
    for op, (resolve, default) in ops.items():
        assert resolve(None, "cpu") == resolve("native", "cpu") == default
        with pytest.raises(ValueError, match=rf"{op}: impl='native' cannot run on meta"):
            resolve("native", "meta")
        assert resolve("reference", "cpu") == "reference"
        with pytest.raises(ValueError, match=rf"{op}: impl='triton' cannot run on cpu"):
            resolve("triton", "cpu")
        with monkeypatch.context() as inside:
            inside.setenv("CPO_KERNELS_IMPL", "reference")
            assert resolve(None, "cpu") == "reference"
            assert resolve("eager", "cpu") == "eager"
    with pytest.raises(ValueError, match="nothing"):
        resolve_implementation("linear_logprob", "nothing", "cpu", ("eager",))


def test_a_choice_inside_a_compiled_function_breaks_no_graph() -> None:
    def double(x: torch.Tensor) -> torch.Tensor:
        name = resolve_implementation("some_op", None, x.device.type, ("reference", "eager"))
        return 2 * x if name == "eager" else x

    compiled = torch.compile(double, backend="eager", fullgraph=True)
    assert torch.equal(compiled(torch.ones(3)), torch.full((3,), 2.0))
