"""Trackers of a training (`train.trackers`), each in a process of its own that reads <run>/metrics.jsonl.

The training does nothing for them after their start: it neither waits for one nor hands it a value, so that none can
slow a step or end the run (see `cpo_fast.train.tracker_process`). A thread waits for each process and says when it failed.
"""

import logging
import os
import shutil
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from cpo_fast.errors import EnvironmentProblem
from cpo_fast.files import write_atomic

logger = logging.getLogger(__name__)

CLOSE_SECONDS = 5.0  # that a training waits at its end for all trackers together


def check_trackers(names: Sequence[str]) -> None:
    """Refuse trackers whose library is not installed. Raises EnvironmentProblem with the line that installs it."""
    for name in names:
        if find_spec(name) is None:
            raise EnvironmentProblem(
                f"train.trackers names {name}, which is not installed; install it: pip install 'cpo-fast[{name}]', or take "
                "it out of train.trackers"
            )


@contextmanager
def tracking(names: Sequence[str], run: Path, resumes: bool) -> Iterator[None]:
    """Let trackers follow the metrics of `run`, whose config.yaml is written, while the block writes them.

    Args:
        names: of section train.
        resumes: the training goes on from a checkpoint, so that the run of each tracker keeps its id.
    """
    folder, started, closing = run / "trackers", [], threading.Event()
    try:
        if not resumes:
            shutil.rmtree(folder, ignore_errors=True)
        if names and not (folder / "run_id").is_file():
            write_atomic(folder / "run_id", uuid.uuid4().hex[:16])
        for name in dict.fromkeys(names):
            started.append(_Started(name, run, closing))
    except OSError as error:
        logger.warning("trackers are left out (%s); training goes on without them", error.strerror or error)
    try:
        yield
    finally:
        closing.set()
        end = time.monotonic() + CLOSE_SECONDS
        for each in started:
            each.close()
        for each in started:
            each.thread.join(max(0.0, end - time.monotonic()))
            if each.thread.is_alive():
                logger.warning("%s is still writing into %s; its process ends by itself", each.name, folder)


class _Started:
    """The process of a tracker, and the thread that waits for its end."""

    def __init__(self, name: str, run: Path, closing: threading.Event) -> None:
        self.name, self.log_path, self.closing = name, run / "trackers" / f"{name}.log", closing
        with open(self.log_path, "wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "cpo_fast.train.tracker_process", name, str(run.resolve())],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | {"PYTHONPATH": os.pathsep.join(each for each in sys.path if each)},
                start_new_session=True,  # signals to a terminal's or a launcher's group are for the training
            )
        self.thread = threading.Thread(target=self._watch, name=f"tracker-{name}", daemon=True)
        self.thread.start()

    def close(self) -> None:
        """Tell the process that there is nothing more to come."""
        assert self.process.stdin is not None
        self.process.stdin.close()

    def _watch(self) -> None:
        code = self.process.wait()
        if code == 0 and self.closing.is_set():
            return
        said = self.log_path.read_text(encoding="utf-8", errors="replace").split("\n")
        reason = next((line.strip() for line in reversed(said) if line.strip()), f"exit code {code}")
        logger.warning(
            "tracker %s failed and is left out (%s); metrics.jsonl has everything, and %s says more",
            self.name,
            reason[:240].rstrip("."),
            self.log_path,
        )
