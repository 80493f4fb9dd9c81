"""The picture of the README says what the results files say."""

import json

import pytest

from benchmarks import overview


def test_the_picture_is_that_of_the_results():
    assert overview.PICTURE.read_text(encoding="utf-8") == overview.draw()


def test_bars_are_the_records_own_ratios(tmp_path, monkeypatch):
    baselines = {
        "padded": {"total_seconds": 30.0, "ratio_to_packed": 15.0},
        "TRL": {"total_seconds": 40.0, "ratio_to_packed": 20.0},
    }
    packed = {"packed_median_seconds": 2.0, "baselines": baselines}
    records = [{"clock": "cpu"}, {"clock": "wall", **packed}, {"clock": "cpu"}]
    lines = "".join(json.dumps({"results": results}) + "\n" for results in records)
    (tmp_path / "train_step.jsonl").write_text(lines)
    monkeypatch.setattr(overview, "results_folder", lambda: tmp_path)
    bars = overview.step_bars(overview.newest("train_step"))
    assert bars == [("packed", 2.0, ""), ("padded rows", 30.0, "15.0 times"), ("TRL DPOTrainer", 40.0, "20.0 times")]
    with pytest.raises(ValueError, match="no record by the gpu clock"):
        overview.newest("train_step", "gpu")
