"""What the engine has answered for questions that are not finished: a killed collection asks none of it again.

`run/answers/<hash of the question's id>.jsonl`, one file for each question in flight: what decides the trees on its first
line, then an answer a line, in the order they came. The file is removed when the question's tree is on disk. An answer
follows from its item alone, so a search that is given it again grows the same tree. What cannot be read is computed again:
half a line, or answers of another search.
"""

import hashlib
import os
import struct
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cpo_fast.errors import DataError
from cpo_fast.files import canonical_json, read_jsonl
from cpo_fast.search.engine import Answer, Sample, SampleRequest, ScoreRequest
from cpo_fast.search.tree_store import Provenance


class AnswerFiles:
    """`AnswerCache` in a folder.

    Args:
        folder: need not exist. provenance: of the trees. Answers of another one are forgotten.
    """

    def __init__(self, folder: Path, provenance: Provenance) -> None:
        self._folder = folder
        self._first_line = {"provenance": asdict(provenance)}
        self._known: dict[str, dict[str, Answer]] = {}
        self._open: dict[str, int] = {}  # file descriptors, by question

    def get(self, name: str, item: SampleRequest | ScoreRequest) -> Answer | None:
        """The answer that an earlier run noted for an item of a question, or None."""
        if name not in self._known:
            self._known[name] = self._read(name)
        known = self._known[name]
        return known.get(item_digest(item)) if known else None

    def put(self, name: str, item: SampleRequest | ScoreRequest, answer: Answer) -> None:
        # numbers by their bytes: JSON's are three times the work, and have no -inf
        row = {"item": item_digest(item), "logps": _packed("d", answer if isinstance(answer, list) else answer.logps)}
        if isinstance(answer, Sample):
            row |= {"ids": _packed("q", answer.token_ids), "text": answer.text, "stop": answer.stop}
        if name not in self._open:
            self._open[name] = self._start(name)
        # one `write` and no `fsync`: it survives the process, and a crash of the machine costs only the work
        os.write(self._open[name], f"{canonical_json(row)}\n".encode())

    def discard(self, names: Iterable[str]) -> None:
        for name in names:
            self._known.pop(name, None)
            if name in self._open:
                os.close(self._open.pop(name))
            self._path(name).unlink(missing_ok=True)
        if self._folder.is_dir() and not any(self._folder.iterdir()):
            self._folder.rmdir()

    def close(self) -> None:
        while self._open:
            os.close(self._open.popitem()[1])

    def _path(self, name: str) -> Path:
        return self._folder / f"{hashlib.sha256(name.encode('utf-8', 'surrogatepass')).hexdigest()[:32]}.jsonl"

    def _start(self, name: str) -> int:
        """Open a question's file for appending, emptied unless its answers were read from it."""
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._path(name)
        is_new = not self._known.get(name)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | (os.O_TRUNC if is_new else 0), 0o644)
        if is_new:
            os.write(descriptor, f"{canonical_json(self._first_line)}\n".encode())
        else:
            content = path.read_bytes()  # a killed run may have left half a line, which the next must not join
            os.ftruncate(descriptor, content.rfind(b"\n") + 1)
        return descriptor

    def _read(self, name: str) -> dict[str, Answer]:
        path = self._path(name)
        if not path.exists():
            return {}
        try:
            rows = [row for _, row in read_jsonl(path, drop_torn_tail=True)]
            if not rows or rows[0] != self._first_line:
                return {}
            return {row["item"]: _answer(row) for row in rows[1:]}
        except (DataError, KeyError, TypeError, ValueError, struct.error):
            return {}  # damaged: computed again


def item_digest(item: SampleRequest | ScoreRequest) -> str:
    """32 hex digits that name everything an answer follows from."""
    digest = hashlib.sha256(array("q", item.token_ids).tobytes())
    if isinstance(item, SampleRequest):
        assert item.goes_on is None, "when it ends depends on more than the request says"
        sampling = (item.temperature, item.top_p, item.max_new_tokens, item.top_k, item.repetition_penalty)
        # ids come from files, which may hold half a surrogate pair
        digest.update(repr(("request", item.uid, *sampling)).encode("utf-8", "backslashreplace"))
    else:
        digest.update(repr(("scoring", item.continuations)).encode())
    return digest.hexdigest()[:32]


def _answer(row: dict[str, Any]) -> Answer:
    logps = _unpacked("d", row["logps"])
    if "ids" not in row:
        return list(logps)
    return Sample(_unpacked("q", row["ids"]), row["text"], row["stop"], logps)


def _packed(kind: str, numbers: Sequence[float]) -> str:
    return struct.pack(f"<{len(numbers)}{kind}", *numbers).hex()


def _unpacked(kind: str, text: str) -> tuple[Any, ...]:
    content = bytes.fromhex(text)
    return struct.unpack(f"<{len(content) // 8}{kind}", content)
