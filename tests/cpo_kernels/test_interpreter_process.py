"""Claims about the process that interprets kernels: no test that it runs can fail, or be lost, without being noticed."""

import io
import json
import sys
from typing import Any

import pytest

from tests.cpo_kernels.interpreter_process import InterpreterProcess, Outcome, OutcomeWriter

ECHO = """
import json, sys
for nodeid in json.load(sys.stdin):
    print(json.dumps({"nodeid": nodeid, "outcome": "passed", "text": ""}), flush=True)
sys.exit("Fatal Python error: bus error")
"""


def written(*reports: pytest.TestReport) -> Outcome:
    """The line that is written for a test with these reports."""
    stream = io.StringIO()
    writer = OutcomeWriter(stream)
    for report in reports:
        writer.pytest_runtest_logreport(report)
    writer.pytest_runtest_logfinish("a.py::test_a")
    return Outcome(**json.loads(stream.getvalue()))


def report(when: Any, outcome: Any, longrepr: Any = None, sections: Any = ()) -> pytest.TestReport:
    """What pytest says of one phase of a test."""
    return pytest.TestReport("a.py::test_a", ("a.py", 0, "test_a"), {}, outcome, longrepr, when, sections)


def test_outcomes_are_those_of_the_tests_in_whatever_order_they_are_asked_for() -> None:
    process = InterpreterProcess(["b", "a"], [sys.executable, "-c", ECHO])
    try:
        assert [process.outcome(name) for name in ("a", "b")] == [Outcome(name, "passed", "") for name in ("a", "b")]
    finally:
        process.close()


def test_a_process_that_ends_before_it_has_answered_is_an_error_that_shows_what_it_printed() -> None:
    process = InterpreterProcess(["a"], [sys.executable, "-c", ECHO])
    try:
        with pytest.raises(RuntimeError, match="ended with 1:\nFatal Python error: bus error"):
            process.outcome("b")
    finally:
        process.close()


def test_any_phase_that_fails_fails_the_test_with_its_text_and_output() -> None:
    passed = report("call", "passed")
    assert written(report("setup", "passed"), passed, report("teardown", "passed")).outcome == "passed"
    for when in ("setup", "call", "teardown"):
        failed = report(when, "failed", "assert 1 == 2", [("Captured stdout call", "printed")])
        answer = written(report("setup", "passed"), failed, report("teardown", "passed"))
        assert answer == Outcome("a.py::test_a", "failed", "assert 1 == 2\nCaptured stdout call\nprinted")
    skipped = report("setup", "skipped", ("a.py", 3, "Skipped: no reason"))
    assert written(skipped, report("teardown", "passed")) == Outcome("a.py::test_a", "skipped", "Skipped: no reason")
    assert written(skipped, report("teardown", "failed", "broken")).text == "broken"


def test_one_test_does_not_answer_for_the_next() -> None:
    stream = io.StringIO()
    writer = OutcomeWriter(stream)
    for nodeid, phase in (("a.py::test_a", report("call", "failed", "broken")), ("b", report("call", "passed"))):
        writer.pytest_runtest_logreport(phase)
        writer.pytest_runtest_logfinish(nodeid)
    assert [json.loads(line)["outcome"] for line in stream.getvalue().splitlines()] == ["failed", "passed"]
