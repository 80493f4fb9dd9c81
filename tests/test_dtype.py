"""`model.dtype`: what `auto` is on which device, that a name is obeyed, and what a slow name is told. No real timings."""

import logging
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from cpo_fast import dtype as dtypes
from cpo_fast.config import ModelConfig, dump_config, validate_config
from cpo_fast.dtype import dtype_name, resolve_dtype
from cpo_fast.models import load_model
from tests.processor import X86, Processor
from tests.tiny import save_tiny_model, tiny_llama, with_lora

CPU = torch.device("cpu")


def test_auto_is_the_default_and_stays_in_a_dumped_configuration() -> None:
    config = validate_config({})
    assert config.model.dtype == "auto"
    assert "dtype: auto" in dump_config(config)


@pytest.mark.parametrize(
    ("ratio", "expected"),
    [(45.0, torch.float32), (1.01, torch.float32), (1.0, torch.bfloat16), (0.3, torch.bfloat16)],
)
def test_auto_on_a_cpu_is_bfloat16_only_where_that_is_as_fast(
    ratio: float, expected: torch.dtype, processor: Processor, tmp_path: Path
) -> None:
    processor(bf16_ratio=ratio)
    assert resolve_dtype("auto", CPU) == expected
    folder = save_tiny_model(tmp_path / "model")
    assert load_model(ModelConfig(path=str(folder), device="cpu"))[0].dtype == expected


def test_auto_on_a_gpu_is_bfloat16_without_a_measurement(processor: Processor) -> None:
    processor(bf16_ratio=45.0)
    assert resolve_dtype("auto", torch.device("cuda")) == torch.bfloat16
    assert resolve_dtype("auto", torch.device("cuda:3")) == torch.bfloat16
    assert processor.products == []


ARM = {"architecture": "aarch64", "neon": True, "bf16": False}


@pytest.mark.parametrize("told", [X86, ARM])
def test_a_cpu_without_bf16_instructions_is_float32_without_a_measurement(
    told: dict[str, Any], processor: Processor
) -> None:
    processor(bf16_ratio=0.5, told=told)
    assert resolve_dtype("auto", CPU) == torch.float32
    assert processor.products == []


@pytest.mark.parametrize(
    "told", [X86 | {"avx512_bf16": True}, X86 | {"avx_ne_convert": True}, ARM | {"bf16": True}, {}]
)
def test_a_cpu_that_may_have_bf16_instructions_is_measured(
    told: dict[str, Any], processor: Processor, monkeypatch: pytest.MonkeyPatch
) -> None:
    processor(bf16_ratio=0.5, told=told)
    assert resolve_dtype("auto", CPU) == torch.bfloat16
    processor.forget()
    monkeypatch.delattr(torch.cpu, "get_capabilities")  # a torch that cannot tell
    assert resolve_dtype("auto", CPU) == torch.bfloat16
    assert processor.products != []


def test_a_name_is_obeyed_whatever_is_measured(processor: Processor) -> None:
    for ratio in (45.0, 0.3):
        processor(bf16_ratio=ratio)
        assert resolve_dtype("float32", CPU) == torch.float32
        assert resolve_dtype("bfloat16", CPU) == torch.bfloat16


def test_nothing_is_measured_for_float32_or_for_a_gpu(processor: Processor) -> None:
    processor(bf16_ratio=45.0)
    resolve_dtype("float32", CPU)
    for name in ("float32", "bfloat16"):
        assert dtype_name(resolve_dtype(name, torch.device("cuda"))) == name
    assert processor.products == []


def test_a_slow_name_is_told_so_in_one_line_a_process(
    processor: Processor, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    processor(bf16_ratio=44.6)
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


def test_a_name_that_is_not_much_slower_is_told_nothing(processor: Processor, caplog: pytest.LogCaptureFixture) -> None:
    processor(bf16_ratio=1.9)
    resolve_dtype("bfloat16", CPU)
    assert caplog.messages == []


LARGE = 10_000_000  # multiplications, more than the small product has and fewer than the large one


def test_the_large_product_decides_unless_the_small_one_is_hopeless(processor: Processor) -> None:
    def seconds(dtype: torch.dtype, size: int) -> float:
        return small[dtype] if size < LARGE else large[dtype]

    small, large = {torch.bfloat16: 1.5, torch.float32: 1.0}, {torch.bfloat16: 4.0, torch.float32: 10.0}
    processor(bf16_ratio=1.0)
    processor.runs(seconds)
    assert resolve_dtype("auto", CPU) == torch.bfloat16
    measured = list(processor.products)
    assert {(dtype, size < LARGE) for dtype, size in measured} == {(d, is_small) for d in small for is_small in (0, 1)}
    assert resolve_dtype("auto", CPU) == torch.bfloat16
    assert processor.products == measured, "measured once a process"
    processor.forget()
    small[torch.bfloat16] = 40.0
    assert resolve_dtype("auto", CPU) == torch.float32
    assert {dtype for dtype, _ in processor.products} == {torch.bfloat16, torch.float32}
    assert all(size < LARGE for _, size in processor.products), "an emulated large product is never run"


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

    monkeypatch.setattr(time, "thread_time", clock)
    assert dtypes._seconds(torch.float32, 2, 4) == pytest.approx(best)
    assert len(taken) == 1 + 2 * num_runs


def test_a_measurement_leaves_threads_and_random_numbers_as_they_were(processor: Processor) -> None:
    threads: list[int] = []

    def product(dtype: torch.dtype, size: int) -> float:
        threads.append(torch.get_num_threads())
        if size > LARGE:
            raise RuntimeError("out of memory")
        return 1.0

    before = torch.get_num_threads()
    torch.manual_seed(5)
    state = torch.get_rng_state()
    torch.set_num_threads(2)
    try:
        processor(bf16_ratio=1.0)
        resolve_dtype("auto", CPU)
        assert torch.get_num_threads() == 2
        processor.runs(product)
        with pytest.raises(RuntimeError, match="out of memory"):
            resolve_dtype("auto", CPU)
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
