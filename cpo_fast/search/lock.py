"""A lock between processes: held by an open file, so a killed process holds none.

The file stays behind, empty; removing it would let two processes lock two files of one name.
"""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class LockHeld(Exception):
    """Another process, or another part of this one, holds the lock."""


@contextmanager
def locked(path: Path, wait: bool) -> Iterator[None]:
    """Hold the lock of `path`, which is made if it is missing, for the length of a `with` block.

    Raises:
        LockHeld: it is held and `wait` is false.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab") as file:  # closing it gives the lock back
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise LockHeld(str(path)) from None
        yield
