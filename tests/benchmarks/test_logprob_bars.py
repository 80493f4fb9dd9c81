"""The verdicts on the log-prob op: met, missed, and what cannot be judged."""

from typing import Any

from benchmarks.logprob_bars import HEAD, STEP_MS, judge

H200 = "NVIDIA H200"


def row(name: str, seconds: float, peak_bytes: int = 100, mode: str = "step", **errors: float) -> dict[str, Any]:
    place = {"contestant": name, "layout": "gathered", "mode": mode, "set": "flat"}
    return place | {"seconds": seconds, "peak_bytes": peak_bytes} | errors


def verdicts(rows: list[dict[str, Any]], num_rows: int = 8192, device: str = H200) -> dict[str, str]:
    return {v.bar: v.status for v in judge(rows, HEAD, num_rows, device)}


def test_a_time_on_the_bar_meets_it_and_one_above_misses() -> None:
    limit = STEP_MS["H200"][8192] / 1e3
    assert verdicts([row("ours triton", limit)])["step, ms on H200"] == "met"
    assert verdicts([row("ours triton", 1.001 * limit)])["step, ms on H200"] == "missed"


def test_naive_is_the_measure_of_time_and_memory() -> None:
    got = verdicts([row("ours triton", 1.2, 10), row("torch naive", 1.0, 100)])
    assert got["step time over torch naive"] == "missed"
    assert got["peak memory over torch naive"] == "met"


def test_a_peer_must_be_slower_by_the_stated_factor() -> None:
    rows = [row("ours triton", 1.0), row("CCE exact", 1.6), row("Liger DPO", 2.9)]
    got = verdicts(rows, num_rows=2048)
    assert got["step, CCE exact over ours"] == "met"
    assert got["step, Liger DPO over ours"] == "missed"
    assert "step, Liger DPO over ours" not in verdicts(rows, num_rows=8192)


def test_what_is_missing_is_not_judged_and_says_why() -> None:
    failed = row("ours triton", 0.0) | {"seconds": None, "failure": "out of memory"}
    (first, *_) = judge([failed], HEAD, 8192, H200)
    assert (first.status, first.why) == ("not judged", "ours triton: out of memory")
    assert verdicts([row("ours triton", 1.0)])["step, QuACK over ours"] == "not judged"
    assert verdicts([row("ours triton", 1.0)], device="a card")["step, ms on a card"] == "not judged"


def test_errors_are_judged_on_the_policy_pass() -> None:
    exact = row("ours triton", 1.0, mode="policy", logp_error=9e-6, grad_error=2.6e-3, confident_grad_error=2e-3)
    got = verdicts([row("ours triton", 1.0), exact])
    assert got["largest error of a log-prob"] == "met"
    assert got["relative error of the gradient"] == "missed"
    assert got["the same on confident tokens"] == "met"
