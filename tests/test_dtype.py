"""`model.dtype`: what `auto` is on which device, that a name is obeyed, and what a slow name is told. No real timings."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cpo_fast import dtype as dtypes
from cpo_fast.config import ModelConfig, dump_config, validate_config
from cpo_fast.dtype import dtype_name, resolve_dtype
from cpo_fast.models import load_model
from tests.tiny import save_tiny_model, tiny_llama, with_lora

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def forgotten() -> None:
    """Nothing measured or said before the test."""
    dtypes._bfloat16_ratio.cache_clear()
    dtypes._warn_if_bfloat16_is_slow.cache_clear()


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """`measured(ratio)`: the measurement on a processor with bf16 instructions gives `ratio`."""

    def give(ratio: float) -> None:
        monkeypatch.setattr(dtypes, "_may_have_bfloat16_instructions", lambda: True)
        monkeypatch.setattr(dtypes, "_bfloat16_ratio", lambda: ratio)

    return give


@pytest.fixture
def unmeasured(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> float:
        raise AssertionError("a measurement that decides nothing")

    monkeypatch.setattr(dtypes, "_bfloat16_ratio", fail)


def test_auto_is_the_default_and_stays_in_a_dumped_configuration() -> None:
    config = validate_config({})
    assert config.model.dtype == "auto"
    assert "dtype: auto" in dump_config(config)


@pytest.mark.parametrize(
    ("ratio", "expected"),
    [(45.0, torch.float32), (1.01, torch.float32), (1.0, torch.bfloat16), (0.3, torch.bfloat16)],
)
def test_auto_on_a_cpu_is_bfloat16_only_where_that_is_as_fast(
    ratio: float, expected: torch.dtype, measured: Callable[[float], None], tmp_path: Path
) -> None:
    measured(ratio)
    assert resolve_dtype("auto", CPU) == expected
    folder = save_tiny_model(tmp_path / "model")
    assert load_model(ModelConfig(path=str(folder), device="cpu"))[0].dtype == expected


def test_auto_on_a_gpu_is_bfloat16_without_a_measurement(unmeasured: None) -> None:
    assert resolve_dtype("auto", torch.device("cuda")) == torch.bfloat16
    assert resolve_dtype("auto", torch.device("cuda:3")) == torch.bfloat16


X86 = {"architecture": "x86_64", "avx2": True, "avx512_bf16": False, "amx_bf16": False, "avx_ne_convert": False}
ARM = {"architecture": "aarch64", "neon": True, "bf16": False}


@pytest.mark.parametrize("told", [X86, ARM])
def test_a_cpu_without_bf16_instructions_is_float32_without_a_measurement(
    told: dict[str, Any], monkeypatch: pytest.MonkeyPatch, unmeasured: None
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: told)
    assert resolve_dtype("auto", CPU) == torch.float32


@pytest.mark.parametrize(
    "told", [X86 | {"avx512_bf16": True}, X86 | {"avx_ne_convert": True}, ARM | {"bf16": True}, {}]
)
def test_a_cpu_that_may_have_bf16_instructions_is_measured(
    told: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: told)
    monkeypatch.setattr(dtypes, "_bfloat16_ratio", lambda: 0.5)
    assert resolve_dtype("auto", CPU) == torch.bfloat16
    monkeypatch.delattr(torch.cpu, "get_capabilities")  # a torch that cannot tell
    assert resolve_dtype("auto", CPU) == torch.bfloat16


def test_a_name_is_obeyed_whatever_was_measured(measured: Callable[[float], None]) -> None:
    for ratio in (45.0, 0.3):
        measured(ratio)
        assert resolve_dtype("float32", CPU) == torch.float32
        assert resolve_dtype("bfloat16", CPU) == torch.bfloat16


def test_nothing_is_measured_for_float32_or_for_a_gpu(unmeasured: None) -> None:
    resolve_dtype("float32", CPU)
    for name in ("float32", "bfloat16"):
        assert dtype_name(resolve_dtype(name, torch.device("cuda"))) == name


def test_a_slow_name_is_told_so_in_one_line_a_process(
    measured: Callable[[float], None], caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    measured(44.6)
    folder = save_tiny_model(tmp_path / "model")
    with caplog.at_level(logging.INFO, logger="cpo_fast"):
        resolve_dtype("auto", CPU)
        assert caplog.messages == []
        for _ in range(3):
            load_model(ModelConfig(path=str(folder), device="cpu", dtype="bfloat16"))
    assert caplog.messages == [
        "model.dtype: products in bfloat16 take 45 times as long as in float32 on this CPU; set model.dtype=auto"
    ]
    assert caplog.records[0].levelno == logging.WARNING


def test_a_name_that_is_not_much_slower_is_told_nothing(
    measured: Callable[[float], None], caplog: pytest.LogCaptureFixture
) -> None:
    measured(1.9)
    resolve_dtype("bfloat16", CPU)
    assert caplog.messages == []


def test_the_large_product_decides_unless_the_small_one_is_hopeless(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = {
        (torch.bfloat16, *dtypes._SMALL_PRODUCT): 1.5,
        (torch.float32, *dtypes._SMALL_PRODUCT): 1.0,
        (torch.bfloat16, *dtypes._LARGE_PRODUCT): 4.0,
        (torch.float32, *dtypes._LARGE_PRODUCT): 10.0,
    }
    timed: list[Any] = []

    def product(*case: Any) -> float:
        timed.append(case)
        return seconds[case]

    monkeypatch.setattr(dtypes, "_seconds", product)
    assert dtypes._bfloat16_ratio() == 0.4
    assert dtypes._bfloat16_ratio() == 0.4
    assert len(timed) == 4, "measured once a process"
    dtypes._bfloat16_ratio.cache_clear()
    seconds[torch.bfloat16, *dtypes._SMALL_PRODUCT] = 40.0
    assert dtypes._bfloat16_ratio() == 40.0
    assert len(timed) == 6, "an emulated large product is never run"


@pytest.mark.parametrize(("run", "num_runs", "best"), [(0.5, 4, 0.5), (1e-6, 41, 1e-6), (0.0, 41, 1e-9)])
def test_a_slow_product_is_run_the_fewest_times_and_the_warm_up_does_not_count(
    run: float, num_runs: int, best: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths = [run / 4, run * 2, *[run] * 99]  # the warm-up would be the best
    taken: list[float] = [0.0]

    def clock() -> float:
        ends = len(taken) % 2 == 0
        taken.append(taken[-1] + (lengths[len(taken) // 2 - 1] if ends else 0.0))
        return taken[-1]

    monkeypatch.setattr("cpo_fast.dtype.time.thread_time", clock)
    assert dtypes._seconds(torch.float32, 2, 4) == pytest.approx(best)
    assert len(taken) == 1 + 2 * num_runs


def test_a_measurement_leaves_threads_and_random_numbers_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[int] = []

    def product(*case: Any) -> float:
        threads.append(torch.get_num_threads())
        if len(threads) > 2:
            raise RuntimeError("out of memory")
        return 1.0

    before = torch.get_num_threads()
    torch.manual_seed(5)
    state = torch.get_rng_state()
    torch.set_num_threads(2)
    try:
        assert dtypes._seconds(torch.bfloat16, 2, 4) > 0
        monkeypatch.setattr(dtypes, "_seconds", product)
        with pytest.raises(RuntimeError, match="out of memory"):
            dtypes._bfloat16_ratio()
        assert torch.get_num_threads() == 2
        assert set(threads) == {1}
    finally:
        torch.set_num_threads(before)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_model_s_dtype_is_that_of_its_base_whatever_its_adapter_has() -> None:
    model = with_lora(tiny_llama(dtype=torch.bfloat16))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
    assert dtype_name(model.dtype) == dtype_name(model.get_base_model().dtype) == "bfloat16"
