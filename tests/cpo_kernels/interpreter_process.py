"""The one process in which Triton's interpreter runs kernels: it runs the tests it is given and reports each as JSON.

Interpreting is chosen by TRITON_INTERPRET=1 before Triton is imported, so it takes a process; that process imports and
rewrites every kernel once, and works while its parent compiles. Node ids come in as a JSON list on stdin; each test is
answered by one line on stdout, {"nodeid", "outcome", "text"}; all that pytest prints goes to stderr.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

import pytest

ROOT = Path(__file__).resolve().parents[2]
LOG_CHARACTERS = 4000  # of what the process printed, in the message that it died
COMMAND = (sys.executable, "-m", "tests.cpo_kernels.interpreter_process")


@dataclass(frozen=True)
class Outcome:
    """What became of one test."""

    nodeid: str
    outcome: str  # "passed", "skipped" or "failed"
    text: str  # why it failed, or the reason of a skip


class InterpreterProcess:
    """Tests on their way in a process that interprets kernels.

    Args:
        nodeids: the tests, in the order in which their outcomes will be asked for.
        command: what reads them and answers.
    """

    def __init__(self, nodeids: Sequence[str], command: Sequence[str] = COMMAND) -> None:
        self._outcomes: dict[str, Outcome] = {}
        self._log = tempfile.TemporaryFile(mode="w+", encoding="utf-8", errors="replace")  # noqa: SIM115 (until close)
        self._process = subprocess.Popen(
            command,
            cwd=ROOT,
            # one thread: the arrays are tiny, and the parent has the other core
            env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )
        assert self._process.stdin is not None
        with self._process.stdin as stream:
            json.dump(list(nodeids), stream)

    def outcome(self, nodeid: str) -> Outcome:
        """Wait for one test.

        Raises:
            RuntimeError: the process ended without an answer; with the end of what it printed.
        """
        assert self._process.stdout is not None
        while nodeid not in self._outcomes:
            line = self._process.stdout.readline()
            if not line:
                self._log.seek(0)
                printed = self._log.read()[-LOG_CHARACTERS:]
                raise RuntimeError(f"the interpreter's process ended with {self._process.wait()}:\n{printed}")
            answer = Outcome(**json.loads(line))
            self._outcomes[answer.nodeid] = answer
        return self._outcomes.pop(nodeid)

    def close(self) -> None:
        """End the process, whatever it is at."""
        self._process.kill()
        self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()
        self._log.close()


class OutcomeWriter:
    """A plugin of the child's pytest that writes one line a test: the first phase that did not pass decides."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._decided: Outcome | None = None

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Remember what did not pass."""
        if report.passed or (self._decided is not None and self._decided.outcome == "failed"):
            return
        text = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longreprtext
        for title, content in report.sections:
            text += f"\n{title}\n{content}"
        self._decided = Outcome(report.nodeid, report.outcome, text)

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        """Answer for a test that is over."""
        answer = self._decided or Outcome(nodeid, "passed", "")
        self._decided = None
        self._stream.write(json.dumps(asdict(answer)) + "\n")
        self._stream.flush()


def patch_language_once_a_launch() -> None:
    """Spare most of the interpreter's time, which goes into patching what is patched.

    A launch replaces the functions of `triton.language` and puts them back at its end. Every call of a device function
    in between replaces them again, some hundred lookups that change nothing: it is let through once a launch and module.
    """
    from triton.runtime import interpreter

    patch = interpreter._patch_lang
    launches: list[Any] = []  # the scope of the launch that is running, or of the last
    seen: set[int] = set()

    def patch_once(function: Any) -> Any:
        module = id(function.__globals__)
        if not launches or not launches[0]._changes:
            seen.clear()
            launches[:] = [patch(function)]
        elif module not in seen:
            patch(function)
        seen.add(module)
        return launches[0]

    interpreter._patch_lang = patch_once


def main() -> int:
    """Run the tests whose ids stand on stdin."""
    stream = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return int(pytest.main(["-q", "-p", "no:cacheprovider", *json.load(sys.stdin)], plugins=[OutcomeWriter(stream)]))


if __name__ == "__main__":
    sys.exit(main())
