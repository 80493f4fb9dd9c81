"""The first minutes on a GPU, with stand-ins: bounded steps, results on disk, a page; on a machine that has little."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu_probes, gpu_quick
from benchmarks.attention_tiles import variants
from benchmarks.gpu_bundle import BUILT, CARRIED
from benchmarks.gpu_page import Outcome, figures, page
from benchmarks.gpu_predictions import PREDICTIONS
from benchmarks.gpu_quick import ROOT, STEPS, Run, Step
from benchmarks.gpu_tests import FILES
from cpo_kernels.self_check import OPS
from tests.benchmarks import bare_machine

pytestmark = pytest.mark.usefixtures("no_launcher")


def lines(results: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (results / f"{name}.jsonl").read_text().splitlines()]


def quick(python: Path, results: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [python, "-m", "benchmarks.gpu_quick", "--device", "cpu", *arguments]
    environment = bare_machine.environment(results) | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1200)


@pytest.mark.slow
def test_all_steps_measure_on_a_machine_that_has_what_the_bundle_carries(tmp_path: Path) -> None:
    python = bare_machine.make(tmp_path / "machine", (*CARRIED, *BUILT))
    # TRL's data library needs these, which are too large to be carried
    assert not bare_machine.is_present(python, "pyarrow")
    assert not bare_machine.is_present(python, "pandas")
    results = tmp_path / "results"
    done = quick(python, results)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith((results / "gpu_quick" / "page.txt").read_text())
    steps = [step.name for stage in STEPS["cpu", False]() for step in stage]
    assert {line["results"]["step"]: line["results"]["what"] for line in lines(results, "gpu_quick")} == dict.fromkeys(
        steps, "ok"
    )
    probes = {line["results"]["probe"] for line in lines(results, "gpu_probes")}
    assert probes == {"ceilings", "check", "tiles", "graph"}
    (train,) = lines(results, "gpu_train_step")
    assert [row["name"] for row in train["results"]["rows"]][:2] == ["packed", "TRL"]
    assert [line["results"]["name"] for line in lines(results, "gpu_train_step_contestants")][:2] == ["packed", "TRL"]
    for figure in ("step: TRL over ours", "collect: batched over ours", "copy TB/s", "decode step at 4 rows ms"):
        assert re.search(rf"^{re.escape(figure)} +[0-9]", done.stdout, re.M), done.stdout
    assert "gradient against TRL" in done.stdout


@pytest.mark.slow
def test_the_follow_up_needs_torch_triton_transformers_and_pytest_and_names_the_step_that_needs_more(
    tmp_path: Path,
) -> None:
    python = bare_machine.make(tmp_path / "machine")
    for module in ("peft", "trl", "datasets", "rich", "pydantic", "hypothesis", "pytest_timeout"):
        assert not bare_machine.is_present(python, module), module
    done = quick(python, tmp_path / "results", "--more")
    assert done.returncode == 1, done.stdout + done.stderr
    outcomes = {line["results"]["step"]: line["results"]["what"] for line in lines(tmp_path / "results", "gpu_quick")}
    ok = dict.fromkeys(("head", "flex", "tests"), "ok")
    assert outcomes == {**ok, "training": "failed with exit code 1"}, done.stdout
    assert "  ModuleNotFoundError: No module named 'pydantic'" in done.stdout
    log = (tmp_path / "results" / "gpu_quick" / "tests.log").read_text()
    assert "left out: tests/search/test_gpu_engine.py needs pydantic, peft" in log
    assert re.search(r"^\d+ skipped, \d+ deselected", log, re.M), log


def test_a_tiny_training_runs_from_files_to_files(results: Path) -> None:
    kept = signal.getsignal(signal.SIGTERM)
    try:
        assert gpu_probes.main(["training", "--device", "cpu"]) == 0
    finally:
        signal.signal(signal.SIGTERM, kept)
    (line,) = lines(results, "gpu_probes")
    assert line["results"]["figures"] == {"training failed": 0.0, "training: steps": 4.0}


def test_every_file_with_a_test_for_a_gpu_is_named() -> None:
    marked = re.compile(r"mark\.gpu|runs_kernels|gpu_alone_unless")
    files = {str(path.relative_to(ROOT)) for path in ROOT.glob("tests/**/test_*.py") if marked.search(path.read_text())}
    assert files - {str(Path(__file__).relative_to(ROOT))} == FILES.keys()


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CPO_FAST_RESULTS", str(tmp_path))
    monkeypatch.setattr(gpu_quick, "GRACE_SECONDS", 0.5)
    monkeypatch.setattr(gpu_quick, "LEAST_SECONDS", 1)
    return tmp_path


def python_step(name: str, code: str, seconds: float = 60) -> Step:
    return Step(name, seconds, ("-c", code))


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return not Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].startswith(" Z")


def test_a_step_that_hangs_crashes_or_fails_is_named_and_stops_no_other(
    results: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pids = results / "pids"
    hangs = (  # deaf, like a process that waits in a driver, and not alone
        f"import os, signal, subprocess, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
        f"child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']);"
        f"open({str(pids)!r}, 'w').write(f'{{os.getpid()}} {{child.pid}}'); time.sleep(600)"
    )
    left_behind = (
        f"import subprocess, sys; child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']);"
        f"open({str(pids)!r} + '2', 'w').write(str(child.pid))"
    )
    run = Run(60, None, False)
    run.stage(
        (
            python_step("hangs", hangs, 1.5),
            python_step("crashes", "import os; print('before', flush=True); os.abort()"),
            python_step("fails", "raise SystemExit(3)"),
            python_step("leaves", left_behind),
        )
    )
    run.stage((python_step("follows", "print('done')"),))
    monkeypatch.setattr(sys, "executable", str(results / "no such file"))
    run.stage((python_step("cannot start", ""),))
    found = {outcome.step: outcome.what for outcome in run.outcomes}
    assert found["hangs"].startswith("timed out after")
    assert found["crashes"] == "crashed with SIGABRT"
    assert found["fails"] == "failed with exit code 3"
    assert found["leaves"] == found["follows"] == "ok"
    assert found["cannot start"].startswith("could not be started")
    started = f"{pids.read_text()} {Path(f'{pids}2').read_text()}".split()
    assert [is_alive(int(pid)) for pid in started] == [False, False, False]
    assert {line["results"]["step"] for line in lines(results, "gpu_quick")} == found.keys()
    text = run.write_page()
    for name, what in found.items():
        assert re.search(rf"^{name} +{re.escape(what)}", text, re.M), text
    assert "  before" in text


def test_nothing_is_begun_when_the_time_is_up_and_no_step_outlasts_the_whole(results: Path) -> None:
    run = Run(2.5, None, False)
    started = time.monotonic()
    run.stage((python_step("longer than all", "import time; time.sleep(600)"),))
    run.stage((python_step("late", "print('late')"),))
    assert time.monotonic() - started < 20
    assert run.outcomes[0].what == "timed out after 2 s"
    assert run.outcomes[1].what == "not begun: no time was left"


def test_asked_to_end_it_ends_its_steps_and_writes_the_page(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kept = signal.getsignal(signal.SIGTERM)
    code = f"import os, signal, time; os.kill({os.getpid()}, signal.SIGTERM); time.sleep(600)"
    try:
        assert gpu_quick.main(["--device", "cpu"], extra=((python_step("asks", code),),)) == 1
    finally:
        signal.signal(signal.SIGTERM, kept)
    (line,) = lines(results, "gpu_quick")
    assert line["results"]["what"] == "ended with the whole run"
    assert "ended early: TimeUp" in capsys.readouterr().out
    assert "ended with the whole run" in (results / "gpu_quick" / "page.txt").read_text()


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu_nothing_is_begun(results: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert gpu_quick.main([]) == 1
    assert "torch sees no CUDA device" in capfd.readouterr().err
    assert list(results.iterdir()) == []


def probe(**figures: float) -> dict[str, Any]:
    return {"benchmark": "gpu_probes", "environment": {"device": "a card"}, "results": {"figures": figures}}


def row(text: str, figure: str) -> str:
    return next(line for line in text.splitlines() if line.startswith(figure))


def test_a_figure_stands_beside_its_prediction_and_its_bar() -> None:
    share = "decode step at 256 rows, share of the roofline"
    text = page([Outcome("graph", "ok")], [probe(**{share: 0.35, "copy TB/s": 4.2, "matmul TF/s": 90.0})], False)
    assert "Measured on: a card" in text
    assert row(text, share).split()[-7:] == ["0.35", "0.32", "-", "0.38", ">=", "0.5", "MISSED"]
    assert row(text, "copy TB/s").split()[-2:] == ["4.2", "4.3"]
    assert row(text, "matmul TF/s").endswith("a surprise")
    assert row(text, "decode step at 16 rows ms").endswith("not measured; its step: ok")
    text = page([], [probe(**{share: 0.7, "graph at 16 rows failed": 1.0, "graph at 64 rows failed": 0.0})], False)
    assert row(text, share).endswith("met, a surprise")
    assert row(text, "graph at 16 rows failed").endswith("MISSED")
    assert row(text, "graph at 64 rows failed").endswith("met")
    assert "12% likely" in row(text, "graph at 16 rows failed")


def test_a_ratio_above_its_bound_and_a_contestant_that_could_not_run_are_named() -> None:
    check = {
        "probe": "check",
        "op": "tree_decode",
        "shape": "7b",
        "ratios": {"out": 1.5},
        "above": {"out": 1.5},
        "figures": {},
    }
    failed = {"failures": {"TRL": "not installed: No module named 'trl'"}, "rows": []}
    head = {"hidden_size": 1, "vocab_size": 9, "num_rows": 8, "rows": [
        {"contestant": "CCE", "layout": "dense", "mode": "step", "set": "flat", "failure": "out of memory"}]}  # fmt: skip
    records = [("gpu_probes", check), ("gpu_train_step", failed), ("linear_logprob", head)]
    text = page([], [{"benchmark": name, "results": results} for name, results in records], False)
    assert "self-check tree_decode, 7b: out 1.50" in text
    assert "gpu_train_step, TRL: not installed: No module named 'trl'" in text
    assert "linear_logprob, CCE: out of memory" in text


def test_the_latest_record_of_a_figure_counts_and_a_part_stands_in_for_the_whole() -> None:
    part = {"benchmark": "gpu_train_step_contestants", "results": {"name": "packed", "seconds": 0.3}}
    odd = {"benchmark": "collect", "results": {"rows": []}}
    assert figures([probe(a=1.0), odd, probe(a=2.0), part]) == {"a": 2.0, "step: ours s": 0.3}


def test_every_prediction_is_of_a_step_that_exists_and_has_a_name_of_its_own() -> None:
    steps = {step.name for more in (False, True) for stage in STEPS["cuda", more]() for step in stage}
    assert {prediction.step for prediction in PREDICTIONS} <= steps
    assert len({prediction.figure for prediction in PREDICTIONS}) == len(PREDICTIONS)


def test_every_alternative_tile_is_compiled_before_it_is_timed() -> None:
    names = {variant.name for architecture in (80, 90) for variant in variants(architecture, 128)}
    assert names == set(gpu_quick.TILE_VARIANTS)


def test_every_op_that_has_a_check_is_checked() -> None:
    steps = {step.name for stage in STEPS["cuda", False]() for step in stage}
    assert {f"check {op}, {shape}" for op in OPS for shape in ("7b", "default")} <= steps


def test_the_limits_of_the_steps_are_within_the_command_s() -> None:
    for more in (False, True):
        stages = STEPS["cuda", more]()
        assert all(step.seconds <= gpu_quick.SECONDS[more] for stage in stages for step in stage)
        names = [step.name for stage in stages for step in stage]
        assert len(set(names)) == len(names)
