"""The trees of a run on disk, and the processes that write them: `trees.jsonl` grows by one append a question.

A run may be killed at any moment and have any number of workers. A worker alone appends to `trees.jsonl`. Each of
several to `trees.worker-I-of-N.jsonl` beside it, and its seconds to `timings.worker-I-of-N.jsonl`. Whoever finishes and
finds every question somewhere writes all trees to `trees.jsonl`, in question order and in one step, and removes the
parts: the same bytes for any number of workers. A restart, with the same N or another, finds what is finished in
whatever parts there are. A killed writer leaves at most a last line without its newline: readers leave it out, and the
next writer cuts it off. Trees that another model, configuration, seed or prompt made are refused.
"""

import hashlib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from cpo_fast.config import Config
from cpo_fast.dtype import dtype_name
from cpo_fast.errors import ConfigError, DataError, EnvironmentProblem
from cpo_fast.files import append_line, read_jsonl, sync_folder, write_jsonl
from cpo_fast.ranks import find_ranks
from cpo_fast.search.search_settings import (
    Settings,
    differing_settings,
    kept_settings,
    search_settings,
    settings_hash,
)
from cpo_fast.tasks import Prompts, Question
from cpo_fast.tree import SearchTree, read_trees


@dataclass(frozen=True)
class Provenance:
    """What decides the trees of a run besides the questions. Fields as in `tree.SearchTree`."""

    task: str
    prompt_hash: str
    model_hash: str
    adapter_hash: str
    seed: int
    config_hash: str
    equal_for: str = ""  # decides nothing, and is not compared


# classes of modules whose matrix products have as many rows as were routed to them
_EXPERTS = re.compile(r"Experts?$|M[oO]E$|Moe$|SparseMoe")
# how a refusal names the field that differs
_FIELD_NAMES = {
    "task": "task",
    "prompt_hash": "few-shot prompt or tokenizer",
    "model_hash": "model",
    "adapter_hash": "adapter",
    "seed": "seed",
    "config_hash": "search configuration or dtype",
}
# what a refusal adds: the dtype may differ although no setting does
_HINTS = {"config_hash": "set it as it was (model.dtype=auto follows the device), "}


def provenance_of(config: Config, prompts: Prompts, model: Any) -> Provenance:
    """What the trees of a run follow from. A model without a path is named by its weights."""
    if config.model.path:
        from cpo_fast.adapters import adapter_hash
        from cpo_fast.models import model_hash

        named, adapter = model_hash(config.model.path), adapter_hash(config.model.adapter)
    else:
        from cpo_fast.models import weights_hash

        named, adapter = weights_hash(model.state_dict()), ""
    task = prompts.task
    hashed = settings_hash(search_settings(config, task, dtype_name(model.dtype)))
    equal_for = "" if config.search.engine == "hf" or _keeps_bits(model) else "settings"
    return Provenance(task.name, prompts.shared.hash, named, adapter, config.seed, hashed, equal_for)


def _keeps_bits(model: Any) -> bool:
    """Whether the arena engine's answers do not depend on what runs beside them, to the last bit."""
    parameter = next(iter(model.parameters()))
    plain = parameter.device.type == "cpu" and dtype_name(model.dtype) == "float32"
    return plain and not any(_EXPERTS.search(type(module).__name__) for module in model.modules())


@dataclass(frozen=True)
class Worker:
    """Number `index`, from 0, of `count` workers."""

    index: int = 0
    count: int = 1

    def owns(self, question_id: str) -> bool:
        """Whether this worker searches a question: first 8 bytes of SHA-256(id), little-endian, mod `count`."""
        # by the id alone, never by other questions or their order: workers exchange nothing while they search
        digest = hashlib.sha256(question_id.encode("utf-8", "surrogatepass")).digest()
        return int.from_bytes(digest[:8], "little") % self.count == self.index

    @property
    def name(self) -> str:
        return f"worker-{self.index}-of-{self.count}"

    def file(self, path: Path) -> Path:
        """Its own part of a file that all workers write: the file itself for one worker alone."""
        return path if self.count == 1 else path.with_name(f"{path.stem}.{self.name}{path.suffix}")


ALONE = Worker()


def worker_files(path: Path) -> list[Path]:
    """The parts of `path` that workers left beside it, of any N, in an order that depends on the names alone."""
    found = (each for each in path.parent.glob(f"{path.stem}.worker-*-of-*{path.suffix}") if _place(each))
    return sorted(found, key=_place)


def find_worker(option: str | None, environment: Mapping[str, str]) -> Worker:
    """This process's worker: by the option `I/N`, else by a launcher's variables (see `find_ranks`), else the only one.

    Raises:
        ConfigError: what names it is not a pair of whole numbers 0 <= I < N.
    """
    if option is not None:
        index, _, count = option.partition("/")
        return _worker(index, count, f"--worker {option}")
    ranks = find_ranks(environment)
    return Worker(ranks.rank, ranks.world_size)


def _worker(index: str, count: str, source: str) -> Worker:
    plain = re.fullmatch(r"[0-9]{1,9}", index) and re.fullmatch(r"[0-9]{1,9}", count)
    if not plain or not int(index) < int(count):
        raise ConfigError(f"{source}: expected I/N with 0 <= I < N, such as 0/4 for the first of four workers")
    return Worker(int(index), int(count))


def _place(path: Path) -> tuple[int, ...]:
    """(N, I) of a worker's file, or () for another."""
    match = re.search(r"\.worker-([0-9]+)-of-([0-9]+)$", path.stem)
    return (int(match[2]), int(match[1])) if match else ()


class TreeStore:
    """`trees.jsonl` of a run and its parts, as one worker sees them. Made by `open_trees`.

    Attributes:
        path: the whole file. It need not exist.
        own_path: where this worker appends.
        trees: what is finished, by question id.
    """

    def __init__(
        self,
        path: Path,
        provenance: Provenance,
        questions: Sequence[Question],
        worker: Worker,
        settings: Settings | None = None,
    ) -> None:
        self.path = path
        self.own_path = worker.file(path)
        self.trees: dict[str, SearchTree] = {}
        self._provenance = provenance
        self._questions, self._settings = questions, settings
        self._timings_path = path.with_name("timings.jsonl")
        self._own_timings_path = worker.file(self._timings_path)
        self._lock = FileLock(path.with_name(".collect.lock"))  # held for moments, by any worker
        self._ids: dict[Path, list[str]] = {}  # of the lines in each file, in order
        self._versions: dict[Path, tuple[int, ...]] = {}  # of each file when it was read or written here
        with self._lock:
            for own in (self.own_path, self._own_timings_path):
                _cut_torn_line(own)
            self._read()

    def append(self, tree: SearchTree, seconds: float) -> None:
        """Add one finished question. After return it survives a crash."""
        with self._lock:
            self._read_file(self.own_path)  # to a worker alone, others may have joined all their trees meanwhile
            if tree.id not in self.trees:
                append_line(self.own_path, tree.to_dict())
                self._ids.setdefault(self.own_path, []).append(tree.id)
                self._versions[self.own_path] = _version(self.own_path)
                # a crash of the machine may cost a timing, and no tree follows from one
                append_line(self._own_timings_path, {"id": tree.id, "seconds": round(seconds, 3)}, durable=False)
                self.trees[tree.id] = tree

    def finish(self) -> bool:
        """Write every tree to `path` in question order, if none is missing. Trees of other questions follow.

        Returns:
            Whether `path` holds every question now. If not, other workers are not finished yet.
        """
        with self._lock:
            self._read()  # what other workers have finished
            ids = [question.id for question in self._questions]
            if not all(identity in self.trees for identity in ids):
                return False
            asked = set(ids)
            ids += [identity for identity in self.trees if identity not in asked]
            parts = [*worker_files(self.path), *worker_files(self._timings_path)]
            if parts or self._ids.get(self.path) != ids:  # else a worker alone wrote them in this order
                write_jsonl(self.path, (self.trees[identity].to_dict() for identity in ids))
                self._merge_timings(ids)
                sync_folder(self.path.parent)  # before a part is removed, its trees must be on disk in the whole
                for part in parts:
                    self._remove(part)
        return True

    def _read(self) -> None:
        for path in (self.path, *worker_files(self.path)):
            self._read_file(path)

    def _read_file(self, path: Path) -> None:
        version = _version(path)
        if version == self._versions.get(path, _NO_FILE):
            return  # it holds what was read or appended here and nothing else
        texts = {question.id: question.text for question in self._questions}
        trees = [] if version == _NO_FILE else read_trees(path, drop_torn_tail=True)
        for tree in trees:
            self._check(path, tree, texts)
            self.trees.setdefault(tree.id, tree)  # a kill while parts were joined leaves a tree in two files
        self._ids[path], self._versions[path] = [tree.id for tree in trees], version

    def _merge_timings(self, ids: Sequence[str]) -> None:
        parts = worker_files(self._timings_path)
        if not parts:
            return  # a worker alone has written them where they belong
        rows = {}
        for path in (self._timings_path, *parts):
            for _, row in read_jsonl(path, drop_torn_tail=True) if path.exists() else ():
                rows[row.get("id")] = row
        write_jsonl(self._timings_path, (rows[identity] for identity in ids if identity in rows))

    def _remove(self, part: Path) -> None:
        """Remove a part whose trees are in the whole, unless its worker still writes to it."""
        if part in (self.own_path, self._own_timings_path):
            part.unlink()
            return
        try:
            with _worker_lock(part):
                part.unlink()
        except Timeout:
            pass  # its worker is searching what another N has finished meanwhile, and will find that out at its end

    def _check(self, path: Path, tree: SearchTree, texts: dict[str, str]) -> None:
        for field, name in _FIELD_NAMES.items():
            found, expected = getattr(tree, field), getattr(self._provenance, field)
            if found != expected:
                values, hint = f"{found or 'none'}, this run has {expected or 'none'}", _HINTS.get(field, "")
                if field == "config_hash" and self._settings is not None:
                    kept = kept_settings(path.parent, tree.config_hash, self._settings)
                    values = values if kept is None else differing_settings(kept, self._settings)
                raise DataError(
                    f"{path}: tree '{tree.id}' was searched with another {name} ({values}); {hint}set another folder in "
                    "'run', or delete the file to search again"
                )
        if texts.get(tree.id, tree.question) != tree.question:
            raise DataError(
                f"{path}: tree '{tree.id}' is about another question than '{tree.id}' in task.path; set another "
                "folder in 'run', or delete the file to search again"
            )


@contextmanager
def open_trees(
    path: Path,
    provenance: Provenance,
    questions: Sequence[Question],
    worker: Worker = ALONE,
    settings: Settings | None = None,
) -> Iterator[TreeStore]:
    """The trees of a run, for one worker and no other process of its number.

    Args:
        path: `trees.jsonl`. Neither it nor its folder need exist.
        provenance: what the trees in it must have been made with.
        questions: the questions of this run, of all workers. A tree with the id of one must be about the same text.
        settings: what `provenance.config_hash` stands for; a refusal then names the settings that differ.

    Raises:
        EnvironmentProblem: another process is at work as the same worker.
        DataError: a line is not a tree, or a tree is of another search.
    """
    try:
        lock = _worker_lock(worker.file(path)).acquire()
    except Timeout:
        raise EnvironmentProblem(
            f"{path.parent}: another process collects here as worker {worker.index}/{worker.count}; wait for it, or give "
            "this one another number with --worker I/N"
        ) from None
    with lock:
        yield TreeStore(path, provenance, questions, worker, settings)


def _worker_lock(own_path: Path) -> FileLock:
    """The lock of the worker that appends to `own_path`, be it trees or timings. Raises Timeout where it is held."""
    _, _, name = own_path.stem.partition(".")
    return FileLock(own_path.with_name(f".collect.{name or ALONE.name}.lock"), blocking=False)


_NO_FILE: tuple[int, ...] = ()


def _version(path: Path) -> tuple[int, ...]:
    """What changes when anybody writes to a file."""
    status = path.stat() if path.exists() else None
    return (status.st_ino, status.st_size, status.st_mtime_ns) if status else _NO_FILE


def _cut_torn_line(path: Path) -> None:
    # what follows the last newline is the line of a transaction that did not finish
    if not path.exists():
        return
    content = path.read_bytes()
    end = content.rfind(b"\n") + 1
    if end < len(content):
        os.truncate(path, end)
