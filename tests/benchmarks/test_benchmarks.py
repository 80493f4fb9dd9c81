"""Every benchmark at its smallest on the CPU: it runs, refuses an inexact op of ours, and names a peer that is missing."""

import json
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import (
    attention_peers,
    collect,
    collect_cost,
    gpu_train_step,
    harness,
    kernel_profile,
    linear_logprob,
    logprob_peers,
    step_contestants,
    tree_attention,
)
from cpo_kernels.integrations.transformers import hook

QUICK = ["--device", "cpu", "--set", "tiny", "--runs", "1"]
LOGPROB, ATTENTION = [*QUICK, "--skip", "linear_cross"], [*QUICK, "--forests", "trees,chain"]
STEP = ["--device", "cpu", "--shape", "tiny", "--repeats", "1"]
SEARCH = ["--device", "cpu", "--set", "tiny", "--repeats", "1"]


@pytest.fixture(autouse=True)
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CPO_FAST_RESULTS", str(tmp_path))
    return tmp_path


def records(results: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (results / f"{name}.jsonl").read_text().splitlines()]


def test_linear_logprob_checks_times_and_records_every_layout(
    results: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert linear_logprob.main(LOGPROB) == 0
    (line,) = records(results, "linear_logprob")
    rows = line["results"]["rows"]
    timed = {(r["contestant"], r["layout"], r["mode"], r["set"]) for r in rows if "seconds" in r}
    for mode in ("forward", "policy", "step"):
        for layout in ("gathered", "dense"):
            assert {("ours eager", layout, mode, "flat"), ("TRL chunked", layout, mode, "flat")} <= timed
    assert ("torch naive", "gathered", "step", "many") in timed
    assert any(check["name"].endswith("confident_grad_error") for check in line["checks"])
    assert line["environment"]["command"].startswith("python -m benchmarks.linear_logprob")
    assert all(row["peak_bytes"] > 0 for row in rows if "seconds" in row)
    assert "ours eager" in capsys.readouterr().out


def test_tree_attention_agrees_with_every_peer(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tree_attention.main(ATTENTION) == 0
    lines = records(results, "tree_attention")
    assert [line["results"]["forest"] for line in lines] == ["trees", "chain"]
    for line in lines:
        both = {row["contestant"]: row for row in line["results"]["rows"] if row.get("mode") == "both"}
        assert {"ours eager", "SDPA, dense mask", "SDPA, padded sequences"} <= both.keys()
        for row in both.values():  # a peer put together wrongly would be measured on another problem
            assert max(row[f"{part}_error"] for part in tree_attention.RESULT_NAMES) < 1e-4, row
    assert "FlexAttention, backward: NotImplementedError" in capsys.readouterr().out


def test_train_step_equals_the_trainer_and_counts_both_token_ratios(
    results: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for order in ("pairs", "questions"):
        assert gpu_train_step.main([*STEP, "--order", order]) == 0
    lines = records(results, "gpu_train_step")
    assert len(lines) == 2
    for line in lines:
        assert {check["name"] for check in line["checks"]} >= {"loss against TRL", "gradient against TRL"}
        rows = {row["name"]: row for row in line["results"]["rows"]}
        ours, theirs = rows["packed"], rows["TRL"]
        assert theirs["token_ratio"] == theirs["num_tokens"] / ours["num_tokens"] > 2
        assert theirs["share_of_token_ratio"] == pytest.approx(theirs["speedup"] / theirs["token_ratio"])
        assert set(theirs["searched"]) == {"1", "2", "4"}
        assert max(row["gradient_difference"] for row in rows.values()) < 1e-4
        assert rows["packed, cached reference, no checkpointing"]["passes"] == 2
    assert "Bars not judged" in capsys.readouterr().out


def test_collect_plays_one_script_for_all_and_estimates_with_an_interval(
    results: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert collect.main([*SEARCH, "--contestants", "features,sequential,batched,roofline"]) == 0
    (line,) = records(results, "collect")
    rows = {row["name"]: row for row in line["results"]["rows"]}
    assert {row["num_tokens"] for row in rows.values()} == {line["results"]["num_tokens"]}
    assert [check["error"] for check in line["checks"][:2]] == [0.0, 0.0]
    for name, calls in (("sequential", 54), ("batched", 24)):
        assert rows[name]["low"] < rows[name]["seconds"] < rows[name]["high"]
        assert rows[name]["note"] == f"sampled, 8 of {calls} calls"
    ours, unshared = rows["ours"]["played"], rows["ours without shared reads"]["played"]
    assert ours["kv_bytes"] < unshared["kv_bytes"]
    assert rows["ours without cached prompts"]["played"]["num_prefilled"] > ours["num_prefilled"]
    assert rows["ours with one question at a time"]["played"]["num_steps"] > ours["num_steps"]
    assert line["results"]["roofline"]["num_rows"] == 12
    assert "sampled, 8 of 54 calls" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("module", [collect, collect_cost])
def test_a_benchmark_that_is_asked_to_end_records_what_it_has(
    module: Any, results: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, calls, play = signal.getsignal(signal.SIGTERM), [], module.play

    def stopped(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return play(*args)

    monkeypatch.setattr(module, "play", stopped)
    try:
        arguments = ["--contestants", "features"] if module is collect else []
        assert module.main([*SEARCH, *arguments]) == 0
    finally:
        signal.signal(signal.SIGTERM, kept)
    (line,) = records(results, module.__name__.split(".")[1])
    found = line["results"]
    if module is collect:
        assert len(found["rows"]) == 3, found["rows"]
        assert set(found["failures"].values()) == {"the time was up", "left out: the time was up"}
    else:
        assert len(found["points"]) == 1
        assert len(found["left_out"]) == 7


def test_a_step_that_is_asked_to_end_keeps_the_contestants_that_have_ended(
    results: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    kept, fastest = signal.getsignal(signal.SIGTERM), gpu_train_step.fastest

    def stopped(*args: Any) -> Any:  # while the first baseline, behind ours, looks for its batch size
        os.kill(os.getpid(), signal.SIGTERM)
        return fastest(*args)

    monkeypatch.setattr(gpu_train_step, "fastest", stopped)
    try:
        assert gpu_train_step.main(STEP) == 0
    finally:
        signal.signal(signal.SIGTERM, kept)
    (line,) = records(results, "gpu_train_step")
    assert [row["name"] for row in line["results"]["rows"]] == ["packed"]
    left_out = "left out: the time was up"
    further = "packed, cached reference, no checkpointing"
    assert line["results"]["failures"] == {"TRL": "the time was up", "padded": left_out, further: left_out}
    assert [part["results"]["name"] for part in records(results, "gpu_train_step_contestants")] == ["packed"]
    assert "TRL: the time was up" in capsys.readouterr().out


def test_a_step_of_ours_that_fails_is_named_and_the_baselines_are_measured(
    results: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure_step = gpu_train_step.measure_step

    def broken(name: str, *args: Any, **facts: Any) -> Any:
        if name == "packed":
            raise torch.OutOfMemoryError("no room")
        return measure_step(name, *args, **facts)

    monkeypatch.setattr(gpu_train_step, "measure_step", broken)
    assert gpu_train_step.main([*STEP, "--baselines", "padded"]) == 1
    (line,) = records(results, "gpu_train_step")
    assert "padded" in [row["name"] for row in line["results"]["rows"]]
    assert line["results"]["failures"]["packed"] == "out of memory"


def test_continuous_batching_generates_the_lengths_of_the_script(results: Path) -> None:
    assert collect.main([*SEARCH, "--contestants", "continuous batching"]) == 0
    (line,) = records(results, "collect")
    assert [row["name"] for row in line["results"]["rows"]] == ["ours", "continuous batching"], line["results"]


def test_the_cost_table_moves_one_factor_at_a_time(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert collect_cost.main(SEARCH[:4]) == 0
    (line,) = records(results, "collect_cost")
    found = line["results"]["points"]
    assert len(found) == 8
    for factor in collect_cost.FACTORS:
        small, large = (point for point in found if point["factor"] == factor)
        name = factor.replace(" ", "_")
        assert (small[name], large[name]) == collect_cost.VALUES["tiny"][factor]
        if factor != "in flight":
            assert small["kv_bytes"] < large["kv_bytes"] < large["unshared_kv_bytes"]
    assert "in flight" in capsys.readouterr().out


def spoiled_logprob(*args: Any, **kwargs: Any) -> Any:
    result = logprob_op(*args, **kwargs)
    return replace(result, token_logps=result.token_logps + 1e-3)


def spoiled_without_gradient(*args: Any, **kwargs: Any) -> Any:
    return (logprob_op if torch.is_grad_enabled() else spoiled_logprob)(*args, **kwargs)


def spoiled_reference(*args: Any, **kwargs: Any) -> Any:
    result = logprob_op(*args, **kwargs)
    wrong = None if result.ref_token_logps is None else result.ref_token_logps + 1e-3
    return replace(result, ref_token_logps=wrong)


def spoiled_attention(q: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    return attention_op(q * 1.001, *args, **kwargs)


def spoiled_packed(*args: Any, **kwargs: Any) -> Any:
    out = packed_op(*args, **kwargs)
    return replace(out, segment_logps=1.01 * out.segment_logps)


def spoiled_decode(q: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    return decode_op(q * 1.01, *args, **kwargs)


logprob_op, attention_op, packed_op, decode_op = (
    logprob_peers.linear_logprob,
    attention_peers.tree_attention,
    step_contestants.packed_logps,
    hook.decode_layer,
)


@pytest.mark.parametrize(
    ("module", "name", "spoiled", "main", "arguments"),
    [
        (logprob_peers, "linear_logprob", spoiled_logprob, linear_logprob.main, [*LOGPROB, "--only", "ours"]),
        (logprob_peers, "linear_logprob", spoiled_without_gradient, linear_logprob.main, [*LOGPROB, "--only", "ours"]),
        (logprob_peers, "linear_logprob", spoiled_reference, linear_logprob.main, [*LOGPROB, "--only", "ours"]),
        (attention_peers, "tree_attention", spoiled_attention, tree_attention.main, [*ATTENTION, "--only", "ours"]),
        (step_contestants, "packed_logps", spoiled_packed, gpu_train_step.main, STEP),
        (hook, "decode_layer", spoiled_decode, collect.main, SEARCH),
        (hook, "decode_layer", spoiled_decode, collect_cost.main, SEARCH[:4]),
    ],
    ids=["linear_logprob", "its forward", "its reference", "tree_attention", "gpu_train_step", "collect", "its cost"],
)
def test_nothing_is_printed_or_recorded_when_ours_is_inexact(
    module: Any,
    name: str,
    spoiled: Callable[..., Any],
    main: Callable[[list[str]], int],
    arguments: list[str],
    results: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(module, name, spoiled)
    capsys.readouterr()
    assert main(arguments) == 1
    written = capsys.readouterr()
    assert written.out == ""
    assert "exactness check failed" in written.err
    assert list(results.iterdir()) == []


def test_a_gradient_error_on_confident_tokens_alone_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The naive gradient is good enough on ordinary tokens, so only the confident set can refuse it."""
    monkeypatch.setattr(logprob_peers, "_ours", lambda impl, case, layout: logprob_peers._peer(
        logprob_peers.naive, case, layout))  # fmt: skip
    case, sure = (linear_logprob.make_case(kind, 64, 64, 1000, torch.float32, torch.device("cpu"))
                  for kind in ("flat", "confident"))  # fmt: skip
    found = linear_logprob.check_shape(case, sure, ["ours eager"])
    checks = linear_logprob.our_checks(case, (64, 1000, 64), "flat", found, False)
    failed = [check.name for check in checks if not check.error <= check.bound]
    assert failed == ["ours eager, gathered, flat, E 64 V 1000 T 64: confident_grad_error"]


def test_peers_that_are_not_installed_are_named(
    results: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = ("liger_kernel", "cut_cross_entropy", "trl", "flash_attn")
    for package in [*sys.modules, *missing]:
        if package.split(".")[0] in missing:
            monkeypatch.setitem(sys.modules, package, None)
    assert linear_logprob.main(LOGPROB) == 0
    assert gpu_train_step.main(STEP) == 0
    shown = " ".join(capsys.readouterr().out.split())
    for name in ("TRL chunked", "Liger FLCE", "CCE exact", "Liger DPO", "TRL"):
        assert f"{name}: not installed" in shown
    (line,) = records(results, "gpu_train_step")
    assert [row["name"] for row in line["results"]["rows"]][:2] == ["packed", "padded"]


def test_a_profile_follows_the_latest_verdicts(results: Path) -> None:
    def note(num_rows: int, status: str) -> None:
        body = {"hidden_size": 64, "vocab_size": 1000, "num_rows": num_rows, "bars": [{"status": status}]}
        harness.record("linear_logprob", "test", [], body)

    note(64, "missed")
    note(128, "missed")
    note(64, "met")
    assert kernel_profile.missed() == [["--op", "linear_logprob", "--head", "64x1000", "--rows", "128"]]
    assert kernel_profile.main(["--device", "cpu"]) == 0
    (line,) = records(results, "kernel_profile")
    assert "aten::mm" in [row["kernel"] for row in line["results"]["kernels"]]
