"""The two files of an evaluation: both are of one run, or the summary is missing, which readers say."""

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cpo_fast.errors import DataError
from cpo_fast.evaluate.result import Evaluation, read_evaluation


class Written(Evaluation):
    """An evaluation of which only its files matter."""

    def __init__(self, version: int) -> None:
        self.__dict__.update(label="base", results=(), version=version)

    def summary(self) -> dict[str, Any]:
        return {"version": self.__dict__["version"]}


def refusing(call: int, error: BaseException) -> Callable[[Any, Any], None]:
    real, calls = os.replace, []

    def replace(source: Any, target: Any) -> None:
        calls.append(target)
        if len(calls) == call:
            raise error
        real(source, target)

    return replace


@pytest.mark.parametrize("call", [1, 2])
def test_a_write_that_ends_between_the_files_leaves_no_summary(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    Written(1).write(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", refusing(call, KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            Written(2).write(tmp_path)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["eval-base.jsonl"]
    with pytest.raises(DataError, match="cannot read the summary"):
        read_evaluation(tmp_path / "eval-base.jsonl")


def test_a_full_disk_leaves_both_files_of_the_run_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Written(1).write(tmp_path)

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            Written(2).write(tmp_path)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["eval-base.json", "eval-base.jsonl"]
    assert json.loads((tmp_path / "eval-base.json").read_text())["version"] == 1
