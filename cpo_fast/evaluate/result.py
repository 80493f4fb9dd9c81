"""What an evaluation says: one record a question, one summary, and the two files that keep them.

`eval-<label>.jsonl` holds a question a line, in the order they were asked, and `eval-<label>.json` the summary. A label is
`base` or the adapter's folder, with `-tot` for tree of thought (see `free_label`).
"""

import itertools
import json
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from pydantic import StrictBool, StrictFloat, StrictInt, StrictStr, TypeAdapter, ValidationError

from cpo_fast.errors import DataError
from cpo_fast.evaluate.statistics import Spread, spread, wilson_interval
from cpo_fast.files import canonical_json, read_jsonl, replacing

SCHEMA_VERSION = 3  # of both files; another one is refused
GIVE = "give eval-*.jsonl files or run folders"  # to whoever named something else

Method = Literal["cot", "tot"]


@dataclass(frozen=True)
class QuestionResult:
    """What became of one question: a line of `eval-<label>.jsonl`.

    Attributes:
        id: the question's id. question: its text.
        gold: reference answer, None when the file has none.
        answer: normalised answer, None when none could be read.
        correct: the task's own verdict on it, or None without a reference answer.
        scores: every metric of the task, by name. Empty without a reference answer.
        num_tokens: generated tokens, ends of sequences included. Of a tree all of them, losers and verdicts too.
        num_verdict_tokens: of these, the sampled verdicts of a tree. 0 with `evaluator: logits`, which generates none.
        seconds: wall time of a question that was asked alone, None of one that was asked beside others.
        stop: why the chain ended (see `chain`), the status of the tree (see `tree.Status`), or `failed`.
        chain: the generated text or, of a tree, its best winning path.
        detail: the reason of a failure, else "".
    """

    id: StrictStr
    question: StrictStr
    gold: StrictStr | None
    answer: StrictStr | None
    correct: StrictBool | None
    scores: dict[StrictStr, StrictInt | StrictFloat]
    num_tokens: StrictInt
    num_verdict_tokens: StrictInt
    seconds: StrictInt | StrictFloat | None
    stop: StrictStr
    chain: StrictStr
    detail: StrictStr = ""


@dataclass(frozen=True)
class RunIdentity:
    """What decides the answers, and what the seconds depend on.

    Attributes:
        model: what model.path says. model_hash: names its files. adapter_hash: the adapter's, "" without one.
        dtype: precision of the base weights. device: where it ran.
        task_hash: hash of the task section. prompt_hash: of the prompt's ids around a fixed question.
        settings_hash: of the caps of a chain or, for a tree, of the search section and the seed.
        engine: the search engine that chains and trees went through (`arena` or `hf`).
        batch_size: questions that were asked side by side, but for those whose seconds were measured.
        adapter: what model.adapter says, "" (and not written) without one.
    """

    model: str
    model_hash: str
    adapter_hash: str
    dtype: str
    device: str
    task_hash: str
    prompt_hash: str
    settings_hash: str
    engine: str
    batch_size: int
    adapter: str


@dataclass(frozen=True)
class Evaluation(RunIdentity):
    """The summary: `eval-<label>.json` holds these fields and those of `RunIdentity`, without `results`.

    Attributes:
        label: `base` or the adapter's, with `-tot` for tree of thought. method: cot or tot.
        task: name of the task. num_questions: questions asked.
        num_graded: those with a reference answer, over which accuracy and metrics are means.
        num_correct: graded and right.
        num_unanswered: questions without a readable answer, which are wrong when graded.
        num_failed: those of them that could not be asked. `detail` in their lines says why.
        accuracy: num_correct / num_graded, None when nothing is graded. interval: its Wilson 95 % interval.
        metrics: mean of each of the task's metrics over the graded questions that it is for. `numeric` is for those whose
            reference answer is a number.
        seconds: wall time of a question that is asked alone, over the num_timed ones that were, the first of the file.
        tokens: generated tokens per question.
        setup_seconds: paid once, no question's: filling the cache of the shared prompts and a first forward.
        total_seconds: wall time of all questions together, setup aside.
        stops: how many questions ended for which reason.
        results: one per question, in order.
    """

    label: str
    method: Method
    task: str
    num_questions: int
    num_graded: int
    num_correct: int
    num_unanswered: int
    num_failed: int
    accuracy: float | None
    interval: tuple[float, float] | None
    metrics: dict[str, float]
    seconds: Spread
    num_timed: int
    tokens: Spread
    setup_seconds: float
    total_seconds: float
    stops: dict[str, int]
    results: tuple[QuestionResult, ...]

    def summary(self) -> dict[str, Any]:
        """Everything but the single questions, ready for JSON."""
        values = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "results"}
        values |= {"seconds": asdict(self.seconds), "tokens": asdict(self.tokens)}
        if not self.adapter:
            del values["adapter"]
        return {"schema_version": SCHEMA_VERSION, **values}

    def write(self, run: Path) -> None:
        """Both files or neither. A kill between their renames leaves no summary, which readers say."""
        rows, summary = run / f"eval-{self.label}.jsonl", run / f"eval-{self.label}.json"
        with replacing(summary) as file:
            file.write((json.dumps(self.summary(), indent=2) + "\n").encode())
            file.flush()
            os.fsync(file.fileno())
            with replacing(rows) as lines:
                lines.writelines((canonical_json(asdict(result)) + "\n").encode() for result in self.results)
                lines.flush()
                os.fsync(lines.fileno())
                summary.unlink(missing_ok=True)  # from here on nothing is left to write


def free_label(run: Path, adapter: str | None, method: Method) -> str:
    """What the folder `run` calls an evaluation: `base`, or the adapter's folder.

    That is its path below `run` (`adapter`, `adapter-last`), or, where it lies elsewhere, the last two folders of its path
    (`cpo-adapter` of `runs/cpo/adapter`). A number follows where another adapter's evaluation has that name already.
    """
    ending = "-tot" if method == "tot" else ""
    if adapter is None:
        return f"base{ending}"
    path, home = Path(adapter).resolve(), run.resolve()
    parts = path.relative_to(home).parts if path.is_relative_to(home) else path.parts[-2:]
    name = re.sub(r"[^\w.-]", "_", "-".join(parts)).lstrip(".") or "adapter"
    for number in itertools.count(1):
        label = f"{name}{'' if number == 1 else f'-{number}'}"
        if label != "base" and _is_free(run / f"eval-{label}{ending}.json", path, method):
            return f"{label}{ending}"
    raise AssertionError("unreachable: some number is free")


def _is_free(summary: Path, adapter: Path, method: Method) -> bool:
    """Whether a summary is not there, cannot be read, or is that of this very adapter by this method."""
    try:
        values = json.loads(summary.read_text(encoding="utf-8"))
        # older versions wrote no path, and had one adapter a folder
        return values.get("method") == method and Path(values.get("adapter", adapter)).resolve() == adapter
    except (OSError, ValueError, AttributeError, TypeError):
        return True


def summarise(
    label: str,
    method: Method,
    task: str,
    identity: RunIdentity,
    results: Sequence[QuestionResult],
    setup_seconds: float,
    total_seconds: float,
) -> Evaluation:
    """Counts, means and intervals of `results`, which holds at least one question that was asked alone."""
    timed = [result.seconds for result in results if result.seconds is not None]
    graded = [result for result in results if result.correct is not None]
    num_correct = sum(result.correct is True for result in graded)
    names = sorted({name for result in graded for name in result.scores})
    return Evaluation(
        **asdict(identity),
        label=label,
        method=method,
        task=task,
        num_questions=len(results),
        num_graded=len(graded),
        num_correct=num_correct,
        num_unanswered=sum(result.answer is None for result in results),
        num_failed=sum(result.stop == "failed" for result in results),
        accuracy=num_correct / len(graded) if graded else None,
        interval=wilson_interval(num_correct, len(graded)) if graded else None,
        metrics={name: _mean([result.scores[name] for result in graded if name in result.scores]) for name in names},
        seconds=spread(timed),
        num_timed=len(timed),
        tokens=spread([result.num_tokens for result in results]),
        setup_seconds=setup_seconds,
        total_seconds=total_seconds,
        stops=dict(sorted(Counter(result.stop for result in results).items())),
        results=tuple(results),
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def read_evaluation(path: str | Path) -> Evaluation:
    """The evaluation whose questions stand in `path`, an `eval-<label>.jsonl` with its summary beside it.

    Either of the two names both.

    Raises:
        DataError: a file is missing, of another schema version, or the two do not belong together.
    """
    path = Path(path)
    path = path.with_suffix(".jsonl") if path.suffix == ".json" else path
    if not path.is_file():
        raise DataError(f"{path}: there is no such file; {GIVE}")
    summary = _read_summary(path.with_suffix(".json"))
    results: dict[str, QuestionResult] = {}
    for number, row in read_jsonl(path):
        result = _read_result(row, f"{path}:{number}")
        if result.id in results:
            raise DataError(f"{path}:{number}: question '{result.id}' appears twice; evaluate again")
        results[result.id] = result
    if len(results) != summary["num_questions"]:  # the two are written one after the other
        raise DataError(
            f"{path}: {len(results)} questions, its summary {path.with_suffix('.json').name} counts "
            f"{summary['num_questions']}; the two are of different runs, evaluate again"
        )
    try:
        return _EVALUATION.validate_python({**summary, "results": tuple(results.values())})
    except ValidationError:
        raise DataError(f"{path.with_suffix('.json')}: a field has a wrong type; evaluate again") from None


def _read_summary(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(
            f"{path}: cannot read the summary ({error.strerror}), which stands beside an evaluation; {GIVE}"
        ) from None
    except ValueError as error:
        raise DataError(f"{path}: not a summary of an evaluation ({error}); evaluate again") from None
    expected = {field.name for field in fields(Evaluation)} - {"results"} | {"schema_version"}
    version = values.get("schema_version") if isinstance(values, dict) else None
    if version != SCHEMA_VERSION:
        raise DataError(f"{path}: schema_version is {version!r}, this version reads {SCHEMA_VERSION}; evaluate again")
    values.setdefault("adapter", "")
    if set(values) != expected:
        wrong = sorted(set(values) ^ expected)
        raise DataError(f"{path}: fields missing or unknown: {', '.join(wrong)}; evaluate again")
    del values["schema_version"]
    return dict(values)


_QUESTION_RESULT = TypeAdapter(QuestionResult)
_EVALUATION = TypeAdapter(Evaluation)


def _read_result(row: dict[str, Any], where: str) -> QuestionResult:
    wrong = sorted(set(row) ^ {field.name for field in fields(QuestionResult)})
    if wrong:
        raise DataError(f"{where}: not a line of an evaluation (see {', '.join(wrong)}); evaluate again")
    try:
        return _QUESTION_RESULT.validate_python(row)
    except ValidationError:
        raise DataError(f"{where}: a field has a wrong type; evaluate again") from None
