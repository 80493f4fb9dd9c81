"""What the benchmarks measure with: clocks, quantiles, interleaving, memory, and the stamp of a record."""

import json
import time
from pathlib import Path

import pytest
import torch

from benchmarks.clock import MIN_RUNS, NUM_WARMUPS, measure, peak_bytes
from benchmarks.harness import Check, InexactError, Timing, gate, plot, record

CPU = torch.device("cpu")


def test_quantiles_lie_between_neighbouring_runs() -> None:
    timing = Timing((5.0, 1.0, 3.0, 2.0, 4.0))
    assert [timing.quantile(q) for q in (0.0, 0.1, 0.5, 0.9, 1.0)] == pytest.approx([1.0, 1.4, 3.0, 4.6, 5.0])
    assert Timing((2.0,)).quantile(0.9) == 2.0


def test_variants_run_in_turn_and_warm_up_unmeasured() -> None:
    order: list[str] = []
    timings = measure({name: lambda name=name: order.append(name) for name in "ab"}, CPU, max_runs=3)
    assert order == ["a"] * NUM_WARMUPS + ["b"] * NUM_WARMUPS + ["a", "b"] * 3
    assert [len(timing.seconds) for timing in timings.values() if isinstance(timing, Timing)] == [3, 3]


def test_a_slow_variant_gets_fewer_runs_and_never_too_few() -> None:
    timings = measure({"slow": lambda: time.sleep(0.01), "fast": lambda: None}, CPU, max_runs=9, seconds_each=0.001)
    assert isinstance(timings["slow"], Timing)
    assert isinstance(timings["fast"], Timing)
    assert len(timings["slow"].seconds) == MIN_RUNS
    assert len(timings["fast"].seconds) == 9


def test_a_variant_that_breaks_is_a_sentence_and_stops_no_other() -> None:
    def breaks() -> None:
        raise RuntimeError("no such kernel\nsecond line")

    timings = measure({"broken": breaks, "sound": lambda: None}, CPU, max_runs=1)
    assert timings["broken"] == "RuntimeError: no such kernel"
    assert isinstance(timings["sound"], Timing)


def test_nothing_is_begun_after_the_deadline() -> None:
    assert measure({"late": lambda: None}, CPU, deadline=0.0) == {"late": "left out: the time was up"}


def test_peak_memory_counts_what_lives_at_once_and_no_input() -> None:
    source = torch.ones(1000, 1000)  # 4 MB

    def run() -> torch.Tensor:
        first = source * 2
        second = first + 1  # two of 4 MB at once
        del first
        return second.sum()

    assert 8_000_000 <= peak_bytes(run, CPU) < 8_100_000


def test_a_gate_refuses_nan_and_names_every_failure() -> None:
    with pytest.raises(InexactError, match=r"a: nan > 1; b: 2 > 1"):
        gate([Check("a", float("nan"), 1.0), Check("b", 2.0, 1.0), Check("c", 0.5, 1.0)])


def test_a_record_carries_its_stamp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CPO_FAST_RESULTS", str(tmp_path))
    line = json.loads(record("one", "python -m one", [Check("a", 0.5, 1.0)], {"seconds": 1.0}).read_text())
    stamp = line["environment"]
    assert stamp["command"] == "python -m one"
    assert stamp["versions"]["torch"] == torch.__version__.split("+")[0] or stamp["versions"]["torch"]
    assert {"commit", "cuda", "date", "device", "gpu", "load_average", "num_threads", "processor"} <= stamp.keys()
    assert line["checks"] == [{"name": "a", "error": 0.5, "bound": 1.0}]


def test_an_inexact_record_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CPO_FAST_RESULTS", str(tmp_path))
    with pytest.raises(InexactError):
        record("one", "python -m one", [Check("a", 2.0, 1.0)], {})
    assert list(tmp_path.iterdir()) == []


def test_a_plot_is_drawn_where_matplotlib_is_installed(tmp_path: Path) -> None:
    path = plot(tmp_path / "p.png", "title", {"panel": {"ours": [(2, 1.0), (1, 0.5)], "peer": [(1, 2.0)]}}, "rows")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        assert path is None
    else:
        assert path is not None
        assert path.read_bytes()[:4] == b"\x89PNG"
