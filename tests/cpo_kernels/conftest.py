"""Sends the tests of kernels to a GPU, or to the one process that interprets them (see `kernel_device`)."""

from typing import Any

import pytest

from tests.cpo_kernels.interpreter_process import InterpreterProcess, Outcome, patch_language_once_a_launch
from tests.cpo_kernels.kernel_device import DEVICE, INTERPRETED

PROCESS = pytest.StashKey[InterpreterProcess]()

if INTERPRETED:
    patch_language_once_a_launch()


class InterpretedTest(pytest.Item):
    """Stands for a test that runs in the interpreter's process: waits there for its outcome and has the same one."""

    def __init__(self, *, test: pytest.Function, **options: Any) -> None:
        super().__init__(**options)
        self._test = test
        self.own_markers = test.own_markers

    def runtest(self) -> None:
        """Wait for it."""
        answer = self.config.stash[PROCESS].outcome(self.nodeid)
        if answer.outcome == "skipped":
            pytest.skip(answer.text)
        if answer.outcome != "passed":
            raise InterpretedTestFailed(answer)

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> Any:
        """What the other process showed of the failure."""
        if isinstance(excinfo.value, InterpretedTestFailed):
            return excinfo.value.answer.text
        return super().repr_failure(excinfo, style)

    def reportinfo(self) -> Any:
        """Where the test is written."""
        return self._test.reportinfo()


class InterpretedTestFailed(Exception):
    """Carries the outcome of a test that failed in the other process."""

    def __init__(self, answer: Outcome) -> None:
        super().__init__(answer.nodeid)
        self.answer = answer


def pytest_itemcollected(item: pytest.Item) -> None:
    """On a machine with a GPU, tests of kernels are GPU tests, unless `-m` leaves those out."""
    wanted = "not gpu" not in item.config.option.markexpr
    if DEVICE == "cuda" and wanted and item.get_closest_marker("kernels"):
        item.add_marker(pytest.mark.gpu)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put a stand-in in the place of every test that is for the interpreter."""
    if INTERPRETED:
        return
    for place, item in enumerate(items):
        kernels = item.get_closest_marker("kernels") and not item.get_closest_marker("gpu")
        if isinstance(item, pytest.Function) and (kernels or item.get_closest_marker("interpreted")):
            items[place] = InterpretedTest.from_parent(item.parent, name=item.name, test=item)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Start the process at the first test of this folder, so that it works while kernels are compiled here."""
    if PROCESS in item.config.stash:
        return
    nodeids = [test.nodeid for test in item.session.items if isinstance(test, InterpretedTest)]
    if nodeids:
        process = item.config.stash[PROCESS] = InterpreterProcess(nodeids)
        item.config.add_cleanup(process.close)
