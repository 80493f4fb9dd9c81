"""What a run folder holds, read for people: whatever is whole is shown, and whatever is not is said and left out.

A folder may be half done, of several commands or of rounds (`cpo_fast.iterate`), whose folders are read as runs of their
own. Nothing here loads a model, and no file is changed.
"""

import json
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from cpo_fast.config import Config, load_config
from cpo_fast.errors import ConfigError, CpoFastError, DataError, first_line
from cpo_fast.evaluate.overview import folder_evaluations
from cpo_fast.evaluate.result import Evaluation
from cpo_fast.files import file_digest
from cpo_fast.report.grading import grader

CONFIG_FILES = ("config.yaml", "demo.yaml", "train.yaml", "collect.yaml", "eval.yaml")  # the first that is there
RESULTS = ("trees.jsonl", "trees.worker-*.jsonl", "metrics.jsonl", "eval-*.json*", "iterate.json")
SIGNS = (*RESULTS, *CONFIG_FILES)
HASHED = ("config.yaml", "trees.jsonl", "pairs.jsonl", "metrics.jsonl", "adapter/adapter_model.safetensors")
MAX_LISTED, MAX_LEVELS, MAX_LOOKED_INTO = 5, 3, 200  # runs that a refusal names, and how far and wide it looks for them
MAX_HASHED_BYTES = 1 << 30  # a second or two of reading


@dataclass(frozen=True)
class Votes:
    """What `trees.jsonl` says of its searches.

    Attributes:
        num_trees: lines. statuses: how many of each status. task: the name of their task.
        num_gold: with a reference answer, num_right of them with a vote that equals it, by `grading`.
        hashes: what made the trees, from the first of them.
    """

    num_trees: int
    statuses: dict[str, int]
    task: str
    num_gold: int
    num_right: int
    grading: str
    hashes: dict[str, Any]


@dataclass(frozen=True)
class Run:
    """One run folder.

    Attributes:
        name: what the page calls it. path: where it is.
        config: settings by `section.key`, from the file `config_file` ("" where there is none).
        metrics: lines of `metrics.jsonl`. statistics: of `statistics.jsonl`. timings: seconds of each search.
        votes: None without trees. num_pairs: lines of `pairs.jsonl`, None without the file. has_adapter: it is trained.
        evaluations: chains before trees and the base before adapters. agreements: from `eval.json`.
        rounds: what `iterate.json` holds, None in other runs. parts: the folders of its rounds.
        identity: what decides a training, from its newest checkpoint. alarms: sentences of those that rang.
        remarks: what its training said at its end.
        environment: by command, what it ran with.
        files: (name, bytes, SHA-256 or a reason without one). notes: sentences on what was left out, and why.
    """

    name: str
    path: Path
    config: dict[str, Any]
    config_file: str
    metrics: tuple[dict[str, Any], ...]
    statistics: tuple[dict[str, Any], ...]
    timings: tuple[float, ...]
    votes: Votes | None
    num_pairs: int | None
    has_adapter: bool
    evaluations: tuple[Evaluation, ...]
    agreements: tuple[dict[str, Any], ...]
    rounds: dict[str, Any] | None
    identity: dict[str, Any]
    alarms: tuple[str, ...]
    remarks: tuple[str, ...]
    environment: dict[str, Any]
    files: tuple[tuple[str, int, str], ...]
    notes: tuple[str, ...]
    parts: tuple["Run", ...] = field(default=())

    @property
    def all(self) -> tuple["Run", ...]:
        """Itself and the rounds in it."""
        return (self, *self.parts)


def read_runs(paths: Sequence[str | Path]) -> list[Run]:
    """The runs of these folders, each once, under names that tell them apart.

    Raises:
        ConfigError: a path is no folder. DataError: a folder holds nothing that a command of cpo-fast writes.
    """
    folders = list({Path(path).resolve(): Path(path) for path in paths}.values())
    for folder in folders:
        _check(folder)
    ends = Counter(folder.resolve().name for folder in folders)
    names = [folder.resolve().name if ends[folder.resolve().name] == 1 else str(folder) for folder in folders]
    return [
        read_run(folder, name, f"{name}, " if len(folders) > 1 else "")
        for folder, name in zip(folders, names, strict=True)
    ]


def _check(folder: Path) -> None:
    if not folder.exists():
        raise ConfigError(f"{folder} does not exist; {_HOLDS}")
    if not folder.is_dir():
        around = f"; {folder.parent} is one" if _is_run(folder.parent) else ""
        raise ConfigError(f"{folder} is a file, and {_HOLDS}{around}")
    if not _is_run(folder):
        found = _runs_below(folder)
        more = f" and {len(found) - MAX_LISTED} more" if len(found) > MAX_LISTED else ""
        below = f"; below it are {', '.join(map(str, found[:MAX_LISTED]))}{more}" if found else ""
        raise DataError(f"{folder} is no run: {_HOLDS}{below}")


_HOLDS = (
    "a run is a folder that collect, train, eval or iterate wrote, with trees.jsonl, metrics.jsonl, eval-*.jsonl, "
    "iterate.json or config.yaml in it"
)


def _runs_below(folder: Path) -> list[Path]:
    """The folders with results nearest below, as far as three levels. One that holds a configuration alone is none."""
    found, level = [], [folder]
    for _ in range(MAX_LEVELS):
        inner = [each for above in level for each in _folders(above)]
        found += [each for each in inner if _has(each, RESULTS)]
        level = [each for each in inner if each not in found][:MAX_LOOKED_INTO]
    return sorted(found)


def _folders(folder: Path) -> list[Path]:
    try:
        return [each for each in folder.iterdir() if each.is_dir() and not each.name.startswith(".")]
    except OSError:
        return []


def _is_run(folder: Path) -> bool:
    return _has(folder, SIGNS)


def _has(folder: Path, signs: Sequence[str]) -> bool:
    return any(path.is_file() for sign in signs for path in folder.glob(sign))


def read_run(path: Path, name: str, before: str = "") -> Run:
    """One folder, whatever of it is there. `before` stands before the names of its rounds."""
    notes: list[str] = []
    config, config_file = _config(path, notes)
    rounds = _json(path / "iterate.json", notes)
    if rounds is not None and not isinstance(rounds.get("rounds"), list):
        notes.append("iterate.json has no list of rounds and is left out")
        rounds = None
    parts = [read_run(folder, f"{before}{folder.name.replace('-', ' ')}") for folder in _round_folders(path)]
    # of a training where there is one: what asks a first question of the rounds says least about them
    known = [part for part in parts if part.config]
    first = min(known, key=lambda part: CONFIG_FILES.index(Path(part.config_file).name)) if known else None
    if not config and first is not None:
        config, config_file = first.config, f"{first.path.name}/{first.config_file}"
    evaluations, of_evaluations = folder_evaluations(path, skip_damaged=True)
    overview = _json(path / "eval.json", notes) or {}
    agreements = overview.get("agreements")
    state = _newest_state(path)
    identity, validator = state.get("identity"), state.get("validator")
    alarms = [state.get("alarm"), validator.get("alarm") if isinstance(validator, dict) else None]
    remarks = (_json(path / "remarks.json", notes) or {}).get("remarks")
    return Run(
        name=name,
        path=path,
        config=config,
        config_file=config_file,
        metrics=tuple(_lines(path / "metrics.jsonl", notes)),
        statistics=tuple(_lines(path / "statistics.jsonl", notes)),
        timings=tuple(
            filter(math.isfinite, (number(row.get("seconds")) for row in _lines(path / "timings.jsonl", notes)))
        ),
        votes=_votes(path, config_file, notes),
        num_pairs=_num_lines(path / "pairs.jsonl"),
        has_adapter=(path / "adapter" / "adapter_model.safetensors").is_file(),
        evaluations=tuple(evaluations),
        agreements=tuple(row for row in agreements if isinstance(row, dict)) if isinstance(agreements, list) else (),
        rounds=rounds,
        identity=identity if isinstance(identity, dict) else {},
        alarms=tuple(str(each["text"]) for each in alarms if isinstance(each, dict) and each.get("text")),
        remarks=tuple(map(str, remarks)) if isinstance(remarks, list) else (),
        environment=_json(path / "environment.json", notes) or {},
        files=tuple(_files(path)),
        notes=tuple(f"{name}: {note}" for note in [*notes, *of_evaluations]),
        parts=tuple(parts),
    )


def number(value: Any) -> float:
    """A number as a float, NaN for whatever is none: text, truth values, what a float cannot hold."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return math.nan
    try:
        return float(value)
    except OverflowError:
        return math.nan


def _round_folders(path: Path) -> list[Path]:
    found = [each for each in path.glob("round-*") if each.name[6:].isdecimal() and each.is_dir() and _is_run(each)]
    return sorted(found, key=lambda each: int(each.name[6:]))


def _lines(path: Path, notes: list[str]) -> Iterator[dict[str, Any]]:
    """Every line that is a JSON object. What is none is counted in `notes`, and so is a file that cannot be read."""
    bad: list[int] = []
    raw, number_of_line = b"\n", 0
    try:
        with open(path, "rb") as file:
            for number_of_line, raw in enumerate(file, start=1):
                if not raw.strip():
                    continue
                try:
                    value = json.loads(raw.decode("utf-8-sig" if number_of_line == 1 else "utf-8"))
                except (ValueError, RecursionError):
                    value = None
                if isinstance(value, dict):
                    yield value
                else:
                    bad.append(number_of_line)
    except FileNotFoundError:
        return
    except OSError as error:
        notes.append(f"{path.name} cannot be read ({error.strerror})")
    if bad and bad[-1] == number_of_line and not raw.endswith(b"\n"):
        bad.pop()
        notes.append(f"{path.name}: its last line is cut off, as a run that was killed leaves it, and is left out")
    if bad:
        some = ", ".join(map(str, bad[:5])) + (", …" if len(bad) > 5 else "")
        notes.append(f"{path.name}: {len(bad)} of its lines are no JSON objects and are left out (line {some})")


def _json(path: Path, notes: list[str]) -> dict[str, Any] | None:
    """A JSON object, None where there is no such file or it is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        notes.append(f"{path.name} cannot be read and is left out ({first_line(error)})")
        return None
    if not isinstance(value, dict):
        notes.append(f"{path.name} is no JSON object and is left out")
        return None
    return value


def _config(path: Path, notes: list[str]) -> tuple[dict[str, Any], str]:
    for name in CONFIG_FILES:
        try:
            value = yaml.safe_load((path / name).read_text(encoding="utf-8"))
        except FileNotFoundError:
            continue
        except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
            notes.append(f"{name} cannot be read and is left out ({first_line(error)})")
            continue
        if isinstance(value, dict):
            return flat(value), name
        notes.append(f"{name} holds no sections and is left out")
    return {}, ""


def flat(values: dict[str, Any]) -> dict[str, Any]:
    """`{"train": {"lr": 1}}` as `{"train.lr": 1}`. What is below a key of a section stays as it is."""
    found: dict[str, Any] = {}
    for section, inner in values.items():
        if isinstance(inner, dict):
            found |= {f"{section}.{key}": value for key, value in inner.items()}
        else:
            found[str(section)] = inner
    return found


def default_config() -> dict[str, Any]:
    """Every key and its default."""
    return flat(Config().model_dump(mode="json"))


def _newest_state(path: Path) -> dict[str, Any]:
    """`state.json` of the newest checkpoint that has one, {} without any."""
    for folder in sorted(path.glob("checkpoints/step-*"), reverse=True):
        state = _json(folder / "state.json", [])
        if state is not None:
            return state
    return {}


def _votes(path: Path, config_file: str, notes: list[str]) -> Votes | None:
    paths = [path / "trees.jsonl", *sorted(path.glob("trees.worker-*.jsonl"))]
    if not any(each.is_file() for each in paths):
        return None
    statuses: Counter[str] = Counter()
    num_gold = num_right = 0
    first: dict[str, Any] = {}
    is_right, grading = grader("", None)
    for file in paths:
        for row in _lines(file, notes):
            if not first:
                first = row
                is_right, grading = grader(str(row.get("task")), _settings(path / config_file))
            statuses[str(row.get("status"))] += 1
            gold, answer = row.get("gold"), row.get("answer")
            if isinstance(gold, str):
                num_gold += 1
                num_right += is_right(answer if isinstance(answer, str) else None, gold)
    names = ("model_hash", "adapter_hash", "prompt_hash", "config_hash", "seed")
    hashes = {name: first[name] for name in names if name in first}
    total = sum(statuses.values())
    return Votes(total, dict(statuses), str(first.get("task", "")), num_gold, num_right, grading, hashes)


def _settings(file: Path) -> Config | None:
    """A configuration as commands read it, None where they would refuse it."""
    try:
        return load_config(file) if file.is_file() else None
    except CpoFastError:
        return None


def _num_lines(path: Path) -> int | None:
    try:
        with open(path, "rb") as file:
            return sum(block.count(b"\n") for block in iter(lambda: file.read(1 << 20), b""))
    except OSError:
        return None


def _files(path: Path) -> Iterator[tuple[str, int, str]]:
    names = [*HASHED, *(each.name for each in sorted(path.glob("eval-*.jsonl")))]
    for name in names:
        file = path / name
        try:
            size = file.stat().st_size
            yield name, size, file_digest(file) if size <= MAX_HASHED_BYTES else "not computed: the file is large"
        except OSError:
            continue
