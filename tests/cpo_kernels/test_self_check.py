"""The check that stands between a device's default and Triton: it passes right kernels and refuses each broken one.

Without a GPU the kernels run in Triton's interpreter, which must be chosen before Triton is imported: the tests run once
more in a process with TRITON_INTERPRET=1.
"""

import importlib
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cpo_kernels import implementation, self_check, self_check_cases, tree_attention
from cpo_kernels.implementation import (
    Implementations,
    available_implementations,
    resolve_implementation,
    resolve_implementations,
)
from cpo_kernels.integrations.transformers import prepare
from cpo_kernels.self_check import OPS, TRAINING_OPS, KernelCheckError, ModelShape, check_once
from cpo_kernels.tree_decode import DecodePlan, tree_decode
from tests.tiny import tiny_llama

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
SHAPE = ModelShape(torch.float32, num_heads=2, num_kv_heads=1, head_dim=16, hidden_size=48)

# argument whose gradient it is
GRADIENT_OF: dict[str, int | str] = {
    "dq": 0,
    "dk": 1,
    "dv": 2,
    "gradient": 0,
    "weight gradient": 1,
    "bias gradient": "bias",
}

IN_THE_INTERPRETER = "kernels_pass or by_default or does_nothing or by_both_paths"
runs_kernels = pytest.mark.skipif(not INTERPRETED, reason="run by test_check_holds_in_the_interpreter")


@pytest.mark.skipif(INTERPRETED, reason="is this process")
@pytest.mark.slow
def test_check_holds_in_the_interpreter() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", IN_THE_INTERPRETER, __file__],
        cwd=Path(__file__).parents[2],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]
    assert f"{4 + 2 + len(FAULTS)} passed" in result.stdout


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few rows and keys, nothing checked yet, and Triton as the default of the CPU."""
    sizes = {"LINE_ROWS": 83, "MANY_ROWS": 23, "MEDIUM_ROWS": 11, "FEW_ROWS": 6, "VOCAB_SIZE": 131}
    sizes |= {"ROOT_KEYS": 21, "PREFILLED_ROWS": 6}
    for name, size in sizes.items():
        monkeypatch.setattr(self_check_cases, name, size)
    monkeypatch.setattr(self_check, "_passed", set())
    monkeypatch.setitem(implementation.DEFAULT_BY_DEVICE, "cpu", "triton")


@runs_kernels
def test_right_kernels_pass() -> None:
    shape = ModelShape(torch.bfloat16, num_heads=4, num_kv_heads=2, head_dim=64, hidden_size=96)
    self_check.self_check("cpu", shape, OPS)


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
    real = getattr(self_check_cases, op)

    def posing(*args: Any, impl: str, **options: Any) -> Any:
        inputs, wrong = list(args), impl == "triton"
        if wrong and part in GRADIENT_OF:
            place = GRADIENT_OF[part]
            if isinstance(place, int):
                inputs[place] = ScaledGradient.apply(inputs[place], factor)
            elif options[place] is not None:
                options[place] = ScaledGradient.apply(options[place], factor)
        result = real(*inputs, impl="eager", **options)
        if wrong and part == "out":
            return result * factor
        if wrong and part in ("keys", "values"):
            inputs[3 if part == "keys" else 4].mul_(factor)
        if wrong and part == "is_top1" and result.is_top1 is not None:
            return replace(result, is_top1=result.is_top1 & (factor == 1.0))
        if wrong and op == "linear_logprob" and getattr(result, part, None) is not None:
            return replace(result, **{part: getattr(result, part) * factor})
        return result

    return posing


def pose(monkeypatch: pytest.MonkeyPatch, op: str = "", part: str = "nothing", factor: float = 1.0) -> None:
    """Every op answers to `triton` by its eager self; one of them wrongly."""
    for name in OPS:
        monkeypatch.setattr(self_check_cases, name, broken(name, part if name == op else "nothing", factor))


def test_right_results_pass(small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    pose(monkeypatch)
    self_check.self_check("cpu", SHAPE, OPS)
    assert self_check._passed == {(op, "cpu", SHAPE) for op in OPS}


@pytest.mark.parametrize("factor", [1 + 1e-4, float("nan")])
@pytest.mark.parametrize(
    ("op", "part"),
    [
        *(("tree_attention", part) for part in ("out", "dq", "dk", "dv")),
        *(("linear_logprob", part) for part in ("token_logps", "ref_token_logps", "segment_logps", "gradient")),
        *(
            ("linear_logprob", part)
            for part in ("entropy", "mean_logit", "is_top1", "weight gradient", "bias gradient")
        ),
        *(("tree_decode", part) for part in ("out", "keys", "values")),
    ],
)
def test_each_wrong_result_is_refused_by_the_name_of_its_op(
    small: None, monkeypatch: pytest.MonkeyPatch, op: str, part: str, factor: float
) -> None:
    pose(monkeypatch, op, part, factor)
    with pytest.raises(KernelCheckError, match=rf"^{op}: its Triton kernels are wrong on cpu .*CPO_KERNELS_IMPL=eager"):
        self_check.self_check("cpu", SHAPE, (op,))
    assert self_check._passed == set()


@pytest.mark.parametrize("op", OPS)
def test_kernel_that_does_not_launch_is_refused_with_its_reason(
    small: None, monkeypatch: pytest.MonkeyPatch, op: str
) -> None:
    def fails(*args: Any, impl: str, **options: Any) -> Any:
        raise RuntimeError("out of resource: shared memory\nRequired: 300000")

    pose(monkeypatch)
    monkeypatch.setattr(self_check_cases, op, fails)
    with pytest.raises(KernelCheckError, match=rf"^{op}: .*do not run on cpu .*out of resource.*IMPL=eager") as raised:
        self_check.self_check("cpu", SHAPE, (op,))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("op", OPS)
def test_a_fault_of_one_op_is_in_nobody_elses_way(small: None, monkeypatch: pytest.MonkeyPatch, op: str) -> None:
    pose(monkeypatch, op, "token_logps" if op == "linear_logprob" else "out", 1.5)
    others = tuple(name for name in OPS if name != op)
    self_check.self_check("cpu", SHAPE, others)
    for name in others:
        check_once("cpu", name)
    assert self_check._passed == {(name, "cpu", SHAPE) for name in others}
    with pytest.raises(KernelCheckError, match=op):
        check_once("cpu", op)
    if op in TRAINING_OPS:
        with pytest.raises(KernelCheckError, match=op):
            self_check.self_check("cpu", SHAPE)
    else:
        self_check.self_check("cpu", SHAPE)


def test_an_op_of_another_name_is_refused() -> None:
    with pytest.raises(ValueError, match=r"expected ops out of tree_attention, .*, got tree_attend"):
        self_check.self_check("cpu", SHAPE, ("tree_attention", "tree_attend"))


# op, module, kernel, and the constants that the variant which does nothing has, if not all do nothing
FAULTS: list[tuple[str, str, str, dict[str, Any]]] = [
    ("tree_attention", "forward", "_forward_kernel", {}),
    ("tree_attention", "backward", "_delta_kernel", {}),
    ("tree_attention", "backward_q", "_grad_q_kernel", {}),
    ("tree_attention", "backward_kv", "_grad_kv_kernel", {}),
    ("tree_attention", "backward_kv", "_sum_parts_kernel", {}),
    *(("linear_logprob", "chunk", "_take_targets", {"CAPPED": capped}) for capped in (False, True)),
    *(("linear_logprob", "chunk", "_logit_partials", {"WITH_OUTPUTS": asked}) for asked in (False, True)),
    ("linear_logprob", "chunk", "_logit_partials", {"HAS_BIAS": True}),
    *(("linear_logprob", "chunk", "_conditional", {"CAPPED": capped}) for capped in (False, True)),
    ("linear_logprob", "partials", "_merge", {"TARGETS_APART": False, "WITH_OUTPUTS": False}),
    ("linear_logprob", "partials", "_merge", {"TARGETS_APART": False, "WITH_OUTPUTS": True}),
    ("linear_logprob", "partials", "_merge", {"TARGETS_APART": True, "WITH_OUTPUTS": False}),
    ("linear_logprob", "partials", "_merge", {"TARGETS_APART": True, "WITH_OUTPUTS": True}),
    *(("linear_logprob", "fused", "_product_partials", {"BLOCK_R": n, "CAPPED": False}) for n in (16, 64, 128)),
    *(("linear_logprob", "fused", "_product_partials", {"CAPPED": capped}) for capped in (False, True)),
    *(("linear_logprob", "fused", "_product_partials", {"WITH_OUTPUTS": asked}) for asked in (False, True)),
    ("linear_logprob", "fused", "_target_logits", {"ONE_A_ROW": False}),
    ("linear_logprob", "fused", "_target_logits", {"ONE_A_ROW": True}),
    ("linear_logprob", "backward", "_row_gradients", {}),
    *(("linear_logprob", "backward", "_product_gradients", {"CAPPED": capped}) for capped in (False, True)),
    ("linear_logprob", "backward", "_put_targets", {}),
    ("tree_decode", "forward", "_store_kernel", {}),
    ("tree_decode", "forward", "_partial_kernel", {}),
    ("tree_decode", "forward", "_merge_kernel", {}),
]
KERNELS_FOLDER = Path(self_check.__file__).parent


def test_every_kernel_that_is_launched_is_among_the_faults() -> None:
    launched = {
        (op, path.stem, kernel)
        for op in OPS
        for path in (KERNELS_FOLDER / op).glob("*.py")
        for kernel in re.findall(r"^\s+(_\w+)\[\(", path.read_text(encoding="utf-8"), re.MULTILINE)
    }
    assert launched == {fault[:3] for fault in FAULTS}


class DoesNothing:
    """A kernel whose launches with these constants do nothing but spoil what they would have written first."""

    def __init__(self, kernel: Any, constants: dict[str, Any]) -> None:
        self.kernel, self.constants, self.num_skipped = kernel, constants, 0

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *args, **options: self.launch(grid, *args, **options)

    def launch(self, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
        """Launch it, or not."""
        if not self.constants.items() <= options.items():
            self.kernel[grid](*args, **options)
            return
        self.num_skipped += 1
        if self.constants == {"ONE_A_ROW": True}:  # the largest logits: NaN there would only lose ties
            args[5].fill_(float("-inf"))


@pytest.fixture
def tiny(small: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fewer rows yet, the tiles of the fused product to match, and NaN in memory that is allocated and not written."""
    from cpo_kernels.linear_logprob import triton_fused as fused

    for name, size in {"MANY_ROWS": 9, "MEDIUM_ROWS": 6, "FEW_ROWS": 3, "VOCAB_SIZE": 67}.items():
        monkeypatch.setattr(self_check_cases, name, size)
    tiles = fused.TILES_16_BIT
    monkeypatch.setattr(
        fused, "TILES_16_BIT", tuple((n, *tile[1:]) for n, tile in zip((3, 4, None), tiles, strict=True))
    )
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


TINY_SHAPE = ModelShape(torch.bfloat16, num_heads=2, num_kv_heads=1, head_dim=16, hidden_size=24)


def plant(monkeypatch: pytest.MonkeyPatch, op: str, module: str, kernel: str, constants: dict[str, Any]) -> DoesNothing:
    """Put a kernel that does nothing in the place of one."""
    place = importlib.import_module(f"cpo_kernels.{op}.{module}")
    fault = DoesNothing(getattr(place, kernel), constants)
    monkeypatch.setattr(place, kernel, fault)
    return fault


@runs_kernels
@pytest.mark.parametrize(("op", "module", "kernel", "constants"), FAULTS)
def test_a_kernel_that_does_nothing_is_refused_by_the_name_of_its_op(
    tiny: None, monkeypatch: pytest.MonkeyPatch, op: str, module: str, kernel: str, constants: dict[str, Any]
) -> None:
    if op == "tree_attention":
        monkeypatch.setattr(self_check_cases, "LINE_ROWS", 150)  # two query blocks, into which ranges are cut
    fault = plant(monkeypatch, op, module, kernel, constants)
    with pytest.raises(KernelCheckError, match=f"^{op}: its Triton kernels are wrong"):
        self_check.self_check("cpu", TINY_SHAPE, (op,))
    assert fault.num_skipped > 0


@runs_kernels
@pytest.mark.parametrize(
    ("path", "module", "kernel"), [("chunk", "fused", "_target_logits"), ("fused", "chunk", "_take_targets")]
)
def test_rows_without_a_gradient_go_by_both_paths_whatever_the_environment_says(
    tiny: None, monkeypatch: pytest.MonkeyPatch, path: str, module: str, kernel: str
) -> None:
    monkeypatch.setenv("CPO_KERNELS_LOGPROB_PATH", path)
    plant(monkeypatch, "linear_logprob", module, kernel, {})
    found = self_check_cases.check_linear_logprob(torch.device("cpu"), TINY_SHAPE)
    for name, ratio in found.items():
        if name.startswith("log-probs, path"):
            assert (ratio <= 1) == (f"path {path}" in name), name


@runs_kernels
def test_kernels_by_default_are_checked_once_and_named_ones_never(small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[torch.device, str]] = []
    real = self_check.self_check

    def counted(device: torch.device, ops: tuple[str, ...]) -> None:
        calls.extend((device, op) for op in ops)
        real("cpu", SHAPE, ops)

    monkeypatch.setattr(self_check, "self_check", counted)
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
    assert calls == [(torch.device("cpu"), op) for op in TRAINING_OPS]


@runs_kernels
def test_search_by_default_is_checked_for_tree_decode_and_nothing_else(
    small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    pose(monkeypatch, "tree_attention", "out", 1.5)  # a fault that search does not use
    plan = DecodePlan.build([0, 1], [], [0, 1], [1, 1])
    q, arena = torch.randn(2, 2, 16), torch.zeros(2, 4, 1, 16)
    tree_decode(q, q[:, :1], q[:, :1], arena[0], arena[1], plan)
    assert {op for op, _, _ in self_check._passed} == {"tree_decode"}
    monkeypatch.setattr(self_check, "_passed", set())
    monkeypatch.setattr(self_check_cases, "tree_decode", broken("tree_decode", "out", 1.5))
    with pytest.raises(KernelCheckError, match=r"^tree_decode: "):
        tree_decode(q, q[:, :1], q[:, :1], arena[0], arena[1], plan)
    tree_decode(q, q[:, :1], q[:, :1], arena[0], arena[1], plan, impl="triton")


@runs_kernels
def test_prepare_checks_kernels_by_default_in_the_shapes_of_the_model(
    small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_llama(hidden_size=64)
    prepare(model)
    expected = ModelShape(torch.float32, num_heads=4, num_kv_heads=2, head_dim=16, hidden_size=64)
    assert self_check._passed == {(op, "cpu", expected) for op in TRAINING_OPS}
    monkeypatch.setattr(self_check, "_passed", set())
    prepare(tiny_llama(hidden_size=64), impl="eager")
    assert self_check._passed == set()


def test_prepare_refuses_a_device_on_which_a_kernel_is_wrong(small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    pose(monkeypatch, "tree_attention", "out", 1.01)
    model = tiny_llama(hidden_size=64)
    with pytest.raises(KernelCheckError, match="tree_attention"):
        prepare(model)
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_check_needs_no_gradients_around_it(
    small: None, monkeypatch: pytest.MonkeyPatch, context: Callable[..., Any]
) -> None:
    pose(monkeypatch)
    with context():
        self_check.self_check("cpu", SHAPE, OPS)


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
