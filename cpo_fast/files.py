"""Reading and writing JSON lines: every bad line is named by file:line, every file is whole or absent.

`write_atomic` writes beside the target and renames. `append_line` is one `write` of one line, followed by `fsync` unless it
may be lost, so a killed process leaves at most a last line without a newline, which `read_jsonl(drop_torn_tail=True)`
recognises.
"""

import hashlib
import json
import os
import shutil
import socket
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from cpo_fast.errors import DataError

# made once: `json.dumps` makes one for every value
_READABLE, _ESCAPED = (
    json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=ascii_only, allow_nan=False)
    for ascii_only in (False, True)
)


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and no spaces: equal values give equal bytes. Raises ValueError on NaN or infinity.

    Text stays readable in any script. A value with a lone surrogate, which UTF-8 cannot hold, is escaped to ASCII.
    """
    text = _READABLE.encode(value)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        text = _ESCAPED.encode(value)
    return text


def unreadable(path: str | Path, error: OSError) -> DataError:
    """What a reader raises for a file that the system does not give."""
    is_due = isinstance(error, FileNotFoundError) and Path(path).name == "trees.jsonl"
    remedy = "run cpo-fast collect first, or check the path" if is_due else "check the path"
    return DataError(f"{path}: cannot read ({error.strerror or error}); {remedy}")


def read_jsonl(
    path: str | Path,
    drop_torn_tail: bool = False,
    members: Callable[[list[tuple[str, Any]]], Any] | None = None,
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number from 1, object) for every line that is not blank.

    Args:
        path: UTF-8 text, one JSON object a line.
        drop_torn_tail: ignore a last line without a newline, as a killed writer leaves it.
        members: an object of its members, as `json.loads` takes it; it may raise ValueError.

    Raises:
        DataError: the file cannot be read, is not UTF-8, or a line is not a JSON object. Names file:line.
    """
    try:
        lines = Path(path).read_bytes().split(b"\n")
    except OSError as error:
        raise unreadable(path, error) from None
    if drop_torn_tail:
        lines = lines[:-1]
    for number, raw in enumerate(lines, start=1):
        if not raw.strip():
            continue
        yield number, parsed_line(path, number, raw, members)


def parsed_line(
    path: str | Path, number: int, raw: bytes, members: Callable[[list[tuple[str, Any]]], Any] | None = None
) -> dict[str, Any]:
    """The object of one line. Arguments and errors as of `read_jsonl`."""
    try:
        value = json.loads(raw.decode("utf-8-sig" if number == 1 else "utf-8"), object_pairs_hook=members)
    except UnicodeDecodeError:
        raise DataError(f"{path}:{number}: the line is not UTF-8; save the file as UTF-8") from None
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits too
        raise DataError(f"{path}:{number}: the line is not valid JSON ({error}); mend or delete it") from None
    if not isinstance(value, dict):
        raise DataError(f"{path}:{number}: expected a JSON object, got {type(value).__name__}")
    return value


@contextmanager
def replacing(path: str | Path) -> Iterator[BinaryIO]:
    """A file to write beside `path`, which it replaces in one step at the end of the `with`: fsynced, then renamed.

    The folder is made. Where the block raises, `path` stays as it was and nothing is left beside it.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = aside_of(path)
    try:
        with open(aside, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def aside_of(path: Path) -> Path:
    """Where this process writes what is to be renamed to `path`: hidden, in the same folder.

    Two hosts that share the folder may have equal process numbers.
    """
    return path.with_name(f".{path.name}.{socket.gethostname()}-{os.getpid()}.tmp")


@contextmanager
def removed_on_error(folder: Path) -> Iterator[None]:
    """Leave nothing of a folder that the block writes beside its place, where that fails or is interrupted."""
    try:
        yield
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def sync_folder(path: Path) -> None:
    """Make renames inside a folder last through a power cut: they do once the folder itself is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def short_hash(content: str | bytes) -> str:
    """First 16 hex digits of the SHA-256 of `content`. Text is encoded as UTF-8, half a surrogate pair included."""
    raw = content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content
    return hashlib.sha256(raw).hexdigest()[:16]


_READ_BYTES = 1 << 22  # a weight file is hashed in pieces: it need not fit into memory
_file_digests: dict[tuple[str, int, int], str] = {}


def file_digest(file: Path) -> str:
    """SHA-256 of a file's content, 64 hex digits. Kept in memory by path, size and modification time."""
    status = file.stat()
    key = (str(file.resolve()), status.st_mtime_ns, status.st_size)
    if key not in _file_digests:
        digest = hashlib.sha256()
        with open(file, "rb") as stream:
            for piece in iter(lambda: stream.read(_READ_BYTES), b""):
                digest.update(piece)
        _file_digests[key] = digest.hexdigest()
    return _file_digests[key]


def files_hash(digests: dict[str, str]) -> str:
    """16 hex digits that name a set of files by their names and `file_digest`."""
    return short_hash(json.dumps(digests, sort_keys=True))


def write_atomic(path: str | Path, text: str) -> None:
    """Replace `path` by `text` in one step. What is no file, such as a pipe or a terminal, is written to."""
    if Path(path).exists() and not Path(path).is_file():
        with open(path, "w", encoding="utf-8") as stream:
            stream.write(text)
        return
    with replacing(path) as file:
        file.write(text.encode("utf-8"))


def write_jsonl(path: str | Path, rows: Iterable[Any]) -> None:
    """Write canonical JSON lines atomically."""
    write_atomic(path, "".join(canonical_json(row) + "\n" for row in rows))


def append_line(path: str | Path, value: Any, durable: bool = True) -> None:
    """Append one canonical JSON line by one write, and fsync: after return it survives a crash of the machine.

    Args:
        durable: False leaves the fsync out: it survives the end of the process alone.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab") as file:
        file.write((canonical_json(value) + "\n").encode("utf-8"))
        file.flush()
        if durable:
            os.fsync(file.fileno())
