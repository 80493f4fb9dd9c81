"""What of a golden run's files is compared byte by byte: everything but times, and which file of two folders differs where.

Left out: files that hold nothing but times (`timings.jsonl`), profiles, checkpoints (their hashes
cover times; the adapter stands beside them), and hidden files (locks). In all others a number of
seconds is replaced by a word; what else they hold stays as it is, byte for byte. What a command said on the screen is kept
in `said/`, with the width of its tables taken out, because the width of a column follows from the times in it.
"""

import hashlib
import re
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path

from safetensors.torch import load_file

LEFT_OUT_NAMES = {"environment.json", "report.html", "timings.jsonl", "manifest.txt"}
LEFT_OUT_FOLDERS = {"profile", "checkpoints"}
BINARY = {".safetensors", ".parquet"}
MAX_SHOWN = 400  # characters of a differing line

# "setup_seconds": 0.3, "seconds": {"mean": ..., ...}, "seconds_ratio": null
_JSON_SECONDS = re.compile(rb'("[^"]*seconds[^"]*":\s*)(?:\{[^{}]*\}|\[[^\[\]]*\]|[-+.\deE]+|null)')
_SHORT_SECONDS = re.compile(rb"(?<![\w.])\d+(?:\.\d+)? s\b")
_MEMORY = re.compile(rb"\d+\.\d+ GiB free")
_TABLE_RULE = re.compile("[─━┬┴┼╇┳╋]+")


def files_of(folder: Path) -> list[str]:
    """The compared files of an output folder, relative and sorted."""
    paths = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return sorted(path.as_posix() for path in paths if not _left_out(path))


def normalised(path: Path) -> bytes:
    """The compared content of a file."""
    content = path.read_bytes()
    if path.suffix in (".json", ".jsonl"):
        return _JSON_SECONDS.sub(rb'\1"time"', content)
    if path.suffix == ".csv":
        return _without_time_columns(content.decode()).encode()
    if path.suffix in (".md", ".txt"):
        content = _SHORT_SECONDS.sub(b"TIME s", _MEMORY.sub(b"SOME GiB free", content))
        lines = _JSON_SECONDS.sub(rb'\1"time"', content).decode().splitlines(keepends=True)
        return "".join(map(_plain_line, lines)).encode()
    return content


def manifest(folder: Path) -> dict[str, str]:
    """SHA-256 of the compared content of every file of an output folder."""
    return {name: hashlib.sha256(normalised(folder / name)).hexdigest() for name in files_of(folder)}


def differences(first: Path, second: Path) -> Iterator[str]:
    """One message for each file that one of two output folders lacks, or that differs."""
    ours, theirs = manifest(first), manifest(second)
    for name in sorted({*ours, *theirs}):
        if name not in theirs:
            yield f"{name}: only in {first}"
        elif name not in ours:
            yield f"{name}: only in {second}"
        elif ours[name] != theirs[name]:
            yield f"{name}: {_first_difference(first / name, second / name)}"


def _left_out(path: Path) -> bool:
    hidden = any(part.startswith(".") for part in path.parts)
    return hidden or path.name in LEFT_OUT_NAMES or bool(LEFT_OUT_FOLDERS & set(path.parts))


def _without_time_columns(text: str) -> str:
    """A table of plain cells without its columns of seconds."""
    rows = [line.split(",") for line in text.splitlines()]
    kept = [place for place, name in enumerate(rows[0]) if "seconds" not in name]
    return "".join(",".join(row[place] for place in kept) + "\n" for row in rows)


def _plain_line(line: str) -> str:
    """A line of text or of a table, "" where it is about seconds or only a rule."""
    if "seconds" in line and '"time"' not in line:
        return ""
    bare = _TABLE_RULE.sub("", line)
    if bare != line:
        return ""
    return re.sub(" +", " ", line)


def _first_difference(first: Path, second: Path) -> str:
    if first.suffix == ".safetensors":
        return _first_tensor(first, second)
    if first.suffix in BINARY:
        return "the bytes differ"
    lines = (normalised(path).decode("utf-8", "replace").splitlines() for path in (first, second))
    for number, (ours, theirs) in enumerate(zip_longest(*lines), start=1):
        if ours != theirs:
            return f"line {number}\n  < {_around(ours, theirs)}\n  > {_around(theirs, ours)}"
    return "only the ends of lines differ"


def _first_tensor(first: Path, second: Path) -> str:
    ours, theirs = load_file(first), load_file(second)
    if ours.keys() != theirs.keys():
        return f"tensors {sorted(ours.keys() ^ theirs.keys())[:3]} are in one file alone"
    for name in sorted(ours):
        left, right = ours[name], theirs[name]
        if left.shape != right.shape or left.dtype != right.dtype:
            return f"{name} is {left.dtype} {tuple(left.shape)} and {right.dtype} {tuple(right.shape)}"
        if not left.equal(right):
            return f"{name} differs by up to {float((left.double() - right.double()).abs().max()):.1e}"
    return "the order of tensors or the metadata differ"


def _around(line: str | None, other: str | None) -> str:
    """The part of a line about the first character that another line does not share."""
    if line is None:
        return "(no such line)"
    other = other or ""
    pairs = enumerate(zip(line, other, strict=False))
    place = next((index for index, (one, two) in pairs if one != two), min(len(line), len(other)))
    start = max(0, place - MAX_SHOWN // 4)
    return f"{'...' * bool(start)}{line[start : start + MAX_SHOWN]}{'...' * (start + MAX_SHOWN < len(line))} (from {place})"
