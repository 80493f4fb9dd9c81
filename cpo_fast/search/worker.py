"""One of N processes that collect together: which questions are its own, and which files.

    worker of a question = first 8 bytes of SHA-256(id), little-endian, mod N

A question's worker depends on its id and on N, never on the other questions or on their order. Workers exchange
nothing while they search; each appends to files of its own (see `tree_file`).
"""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from cpo_fast.errors import ConfigError

# a launcher's rank and number of processes: torchrun and deepspeed, then Slurm
_LAUNCHERS = (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_NTASKS"))


@dataclass(frozen=True)
class Worker:
    """Number `index`, from 0, of `count` workers."""

    index: int = 0
    count: int = 1

    def owns(self, question_id: str) -> bool:
        """Whether this worker searches the question with this id."""
        digest = hashlib.sha256(question_id.encode("utf-8", "surrogatepass")).digest()
        return int.from_bytes(digest[:8], "little") % self.count == self.index

    @property
    def name(self) -> str:
        """What its files are called by."""
        return f"worker-{self.index}-of-{self.count}"

    def file(self, path: Path) -> Path:
        """Its own part of a file that all workers write: the file itself for one worker alone."""
        return path if self.count == 1 else path.with_name(f"{path.stem}.{self.name}{path.suffix}")


def worker_files(path: Path) -> list[Path]:
    """The parts of `path` that workers left beside it, of any N, in an order that depends on the names alone."""
    found = (each for each in path.parent.glob(f"{path.stem}.worker-*-of-*{path.suffix}") if _place(each))
    return sorted(found, key=_place)


def find_worker(option: str | None, environment: Mapping[str, str]) -> Worker:
    """This process's worker: by the option `I/N`, else by a launcher's variables, else the only one.

    Raises:
        ConfigError: what names it is not a pair of whole numbers 0 <= I < N.
    """
    if option is not None:
        index, _, count = option.partition("/")
        return _worker(index, count, f"--worker {option}")
    for rank, size in _LAUNCHERS:
        if rank in environment:
            index, count = environment[rank], environment.get(size, "1")
            return _worker(index, count, f"{rank}={index} and {size}={count} of the environment")
    return Worker()


def _worker(index: str, count: str, source: str) -> Worker:
    plain = re.fullmatch(r"[0-9]{1,9}", index) and re.fullmatch(r"[0-9]{1,9}", count)
    if not plain or not int(index) < int(count):
        raise ConfigError(f"{source}: expected I/N with 0 <= I < N, such as 0/4 for the first of four workers")
    return Worker(int(index), int(count))


def _place(path: Path) -> tuple[int, ...]:
    """(N, I) of a worker's file; empty for another."""
    match = re.search(r"\.worker-([0-9]+)-of-([0-9]+)$", path.stem)
    return (int(match[2]), int(match[1])) if match else ()
