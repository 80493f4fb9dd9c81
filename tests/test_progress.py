"""Long work shows what it is at: on a terminal one line, elsewhere plain lines when nothing was said for a while."""

import os
import pty
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cpo_fast import progress
from cpo_fast.errors import AT


def test_a_stage_says_how_far_it_is_and_how_long_it_will_take(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with progress.stage("search") as stage:
        assert progress.current_line() == "search, 0:00"
        stage.at(2, 8, "questions")
        progress.counted_by(lambda: (30, 900))
        stage.max_thoughts = 20
        progress.doing("reading")
        now[0] += 10
        # 30 thoughts of the 6 x 20 that can come: a quarter of the way
        assert progress.current_line() == (
            "search 2/8 questions, reading, 30 thoughts, 90 tokens/s, 0:10, about 0:30 left"
        )
        stage.at(5, 8)
        assert progress.current_line().endswith("0:10, about 0:10 left")
        with progress.stage("loading"):
            assert progress.current_line() == "loading, 0:00"
        stage.at(8, 8)
        assert "left" not in progress.current_line()
    assert progress.current_line() == ""


def test_an_error_is_told_where_it_happened_once() -> None:
    def fail() -> None:
        progress.at(2, 5, "forests")
        raise KeyError("x")

    with pytest.raises(KeyError) as caught, progress.stage("train"), progress.stage("reference"):
        fail()
    assert caught.value.__notes__ == [f"{AT}reference 2/5 forests"]


@pytest.mark.parametrize("err", [True, False])
def test_elsewhere_a_line_comes_when_nothing_else_was_said(capfd: pytest.CaptureFixture[str], err: bool) -> None:
    with progress.shown(0.2, err), progress.stage("search"):
        deadline = time.monotonic() + 60
        seen = ""
        while seen.count("search, 0:0") < 2 and time.monotonic() < deadline:
            time.sleep(0.05)
            seen += "".join(capfd.readouterr()[err : err + 1])
    assert re.fullmatch(r"(  search, 0:\d\d\n){2,}", seen)


def test_what_ends_soon_says_nothing_where_nobody_watches(capfd: pytest.CaptureFixture[str]) -> None:
    with progress.shown(), progress.stage("search"):
        progress.say("a line")
    assert capfd.readouterr() == ("a line\n", "")


WORK = """
import sys, time
from cpo_fast import progress
with progress.shown(), progress.stage("search") as stage:
    stage.at(1, 4, "questions")
    time.sleep(0.6)
    progress.say("a line that stays")
    time.sleep(0.6)
print("end")
"""


def test_on_a_terminal_one_line_moves_and_is_gone_at_the_end(tmp_path: Path) -> None:
    master, slave = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", WORK], stdout=slave, stderr=slave, env={**os.environ, "TERM": "xterm"}
    )
    os.close(slave)
    seen = b""
    while True:
        try:
            piece = os.read(master, 4096)
        except OSError:  # the other side is closed
            break
        if not piece:
            break
        seen += piece
    process.wait()
    os.close(master)
    text = seen.decode()
    assert text.count("search 1/4 questions, 0:0") >= 2
    assert re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|\r", "", text).rstrip().endswith("end")
    assert "a line that stays" in text
