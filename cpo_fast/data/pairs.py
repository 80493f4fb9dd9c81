"""`trees.jsonl` to files that can be trained on: preference pairs by a rule, and supervised examples.

Rows go to JSON lines, or to parquet where the name ends so. What was left out goes beside them, to
`<name>.dropped.jsonl`, with the reason. Same trees, settings and seed: same bytes.
"""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from cpo_fast.config import PairsConfig
from cpo_fast.data.audit import StepAudit, audit_pairs
from cpo_fast.data.parquet import write_parquet
from cpo_fast.data.tree_rows import REPEATED, Row, TreeFileReader, TreeRows
from cpo_fast.files import write_jsonl


@dataclass(frozen=True)
class PairCounts:
    """What `write_pairs` did.

    Attributes:
        num_pairs, pairs_by_step: pairs written, in all and by step (from 1; 0: whole paths).
        num_trees: trees that gave pairs.
        trees_without_pairs: how many gave none, by reason.
        dropped: couples of winner and loser that became no pair, by reason.
        num_repeated: of these, couples whose tokens stand under another question already.
        steps: values and lengths by step.
        dropped_path: the file with one line a dropped couple, or None when there is none.
    """

    num_pairs: int
    pairs_by_step: dict[int, int]
    num_trees: int
    trees_without_pairs: dict[str, int]
    dropped: dict[str, int]
    num_repeated: int
    steps: dict[int, StepAudit]
    dropped_path: str | None


@dataclass(frozen=True)
class SftCounts:
    """What `write_sft` did: examples, trees that gave some, trees that gave none by reason, learnt tokens."""

    num_examples: int
    num_trees: int
    trees_without_examples: dict[str, int]
    num_completion_tokens: int


def write_pairs(
    trees_path: str | Path, pairs_path: str | Path, settings: PairsConfig | None = None, seed: int = 0
) -> PairCounts:
    """Write the pairs of `trees_path` by the rule of `settings` (default: rule `all`, everything), atomically.

    Raises:
        DataError: the trees are not readable; names file:line. EnvironmentProblem: parquet without pyarrow.
    """
    settings = settings or PairsConfig()
    reader = TreeFileReader(trees_path)
    made = reader.pair_rows(settings, seed, reader.draw_questions(settings.num_questions, seed))
    _write(pairs_path, made.rows)
    dropped_path = write_dropped(_dropped_path(pairs_path), made.unused)
    steps = audit_pairs(made.rows)
    dropped = dict(Counter(record["reason"] for record in made.unused).most_common())
    return PairCounts(
        num_pairs=len(made.rows),
        pairs_by_step={step: audit.num_pairs for step, audit in steps.items()},
        num_trees=made.num_trees,
        trees_without_pairs=_reasons(made),
        dropped=dropped,
        num_repeated=dropped.get(REPEATED, 0),
        steps=steps,
        dropped_path=dropped_path,
    )


def write_sft(
    trees_path: str | Path, sft_path: str | Path, settings: PairsConfig | None = None, seed: int = 0
) -> SftCounts:
    """Write prompt and completion of every winning path, each once; of `settings` num_questions is used.

    Raises:
        DataError: the trees are not readable; names file:line. EnvironmentProblem: parquet without pyarrow.
    """
    reader = TreeFileReader(trees_path)
    made = reader.sft_rows(reader.draw_questions(settings.num_questions if settings else None, seed))
    _write(sft_path, made.rows)
    write_dropped(_dropped_path(sft_path), made.unused)
    num_tokens = sum(len(row["completion_token_ids"]) for row in made.rows)
    return SftCounts(len(made.rows), made.num_trees, _reasons(made), num_tokens)


def write_dropped(path: str | Path, records: list[Row]) -> str | None:
    """Write what was dropped and return the path; with nothing dropped, remove what an earlier run left there."""
    if not records:
        Path(path).unlink(missing_ok=True)
        return None
    write_jsonl(path, records)
    return str(path)


def _write(path: str | Path, rows: list[Row]) -> None:
    if Path(path).suffix == ".parquet":
        write_parquet(path, rows)
    else:
        write_jsonl(path, rows)


def _dropped_path(path: str | Path) -> Path:
    return Path(path).with_name(f"{Path(path).stem}.dropped.jsonl")


def _reasons(made: TreeRows) -> dict[str, int]:
    return dict(Counter(made.trees_without.values()).most_common())
