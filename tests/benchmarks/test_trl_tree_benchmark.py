"""benchmarks/trl_tree.py at its smallest: what it records, that an inexact op stops it, that its gathering is TRL's."""

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import trl_tree
from cpo_kernels.tolerances import kernel_bound
from cpo_kernels.tree_attention.flash import load_varlen
from tests.flash_stand_in import flash_attn_varlen_func

QUICK = ["--device", "cpu", "--set", "tiny", "--runs", "1", "--seconds-each", "0"]
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CPO_FAST_RESULTS", str(tmp_path))
    return tmp_path


def test_it_records_bytes_and_times_of_both_rows(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert trl_tree.main(QUICK) == 0
    lines = [json.loads(line) for line in (results / "trl_tree.jsonl").read_text().splitlines()]
    assert [line["results"]["row"] for line in lines] == ["search", "rollouts"]
    for line in lines:
        facts = line["results"]
        assert facts["num_tokens"] < facts["num_gathered"]
        found = {(row["contestant"], row["mode"]): row for row in facts["rows"] if "seconds" in row}
        for mode in ("forward", "both"):
            ours, gathered = found[trl_tree.OURS, mode], found[trl_tree.SDPA, mode]
            assert ours["kv_rows"] == facts["num_tokens"]
            assert gathered["kv_bytes"] / ours["kv_bytes"] == facts["num_gathered"] / facts["num_tokens"]
            assert 0 < ours["kept_bytes"] < gathered["kept_bytes"] - gathered["kv_bytes"] // 2
        assert {check["name"].split(": ")[1] for check in line["checks"]} == {"out", "dq", "dk", "dv"}
        assert facts["host_seconds"] > 0
    shown = " ".join(capsys.readouterr().out.split())
    assert f"{trl_tree.FLASH}: ValueError: runs on CUDA only" in shown
    assert f"{trl_tree.TRL}: ValueError: runs on CUDA only" in shown


def spoiled(call: Callable[..., Any]) -> Callable[..., Any]:
    """Attention that is a little off."""
    return lambda *args, **kwargs: (call(*args, **kwargs)[0] * (1 + 1e-4), None)


def test_nothing_is_printed_or_recorded_when_ours_is_inexact(
    results: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(trl_tree, "tree_row_attention", spoiled(trl_tree.tree_row_attention))
    assert trl_tree.main(QUICK) == 1
    written = capsys.readouterr()
    assert written.out == ""
    assert "exactness check failed" in written.err
    assert list(results.iterdir()) == []


def gathers_as_trl(name: str, varlen: Callable[..., torch.Tensor], device: torch.device) -> None:
    row = trl_tree.make_row(name, "tiny", (4, 2, 16), torch.bfloat16, device)
    double = trl_tree.Row(row.arguments, 0, *(x.double() for x in (row.q, row.k, row.v, row.upstream)))
    exact = trl_tree.both(trl_tree.by_paths(double, trl_tree.written_out), double)
    found = trl_tree.both(trl_tree.by_varlen(row, varlen), row)
    for got, want in zip(found, exact, strict=True):
        assert got.shape == want.shape
        assert got.dtype == torch.bfloat16
        # gradients of a row are sums over the paths that it lies on, each rounded
        size = float(want.abs().max())
        assert float((got.double() - want).abs().max()) <= kernel_bound(0.0, torch.bfloat16, 8 * size)


@pytest.mark.parametrize("name", trl_tree.ROWS)
def test_gathering_for_flash_attn_is_a_call_that_it_takes_and_trls_formula(name: str) -> None:
    gathers_as_trl(name, flash_attn_varlen_func, CPU)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.skipif(importlib.util.find_spec("flash_attn") is None, reason="needs flash-attn")
@pytest.mark.parametrize("name", trl_tree.ROWS)
def test_flash_attn_itself_gathers_by_trls_formula(name: str) -> None:
    gathers_as_trl(name, load_varlen(), torch.device("cuda"))
