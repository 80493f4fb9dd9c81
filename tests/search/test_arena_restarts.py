"""Arena trees are the same bytes for any decode batch, workers and restart point, several of them changed at once."""

import json
from pathlib import Path

import pytest

from cpo_fast.search.collect import collect
from cpo_fast.search.tree_store import Worker, worker_files

SMALL_BATCH = {"batch_size": 3, "questions_in_flight": 1}
SMALL_PREFILL = {"prefill_tokens": 64, "questions_in_flight": 2, "batch_size": 17}
SMALL_ARENA = {"arena_tokens": 3000}
SIZES = {"engine": "arena", "num_candidates": 4, "num_kept": 2, "max_steps": 2, "max_thought_tokens": 12}


@pytest.fixture
def start(make_config):
    """start(run, **search settings) -> a configuration over six questions."""
    rows = [{"id": f"q{number}", "question": f"how many {'abc'[: 1 + number % 3]}"} for number in range(6)]
    Path(make_config().task.path).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return lambda run, **search: make_config(run, **{**SIZES, **search})


@pytest.fixture
def reference(start, model, tokenizer):
    """Bytes of one worker with every question in one decode batch."""
    config = start("reference")
    collect(config, model, tokenizer)
    return written(config)


def written(config):
    return {name: (Path(config.run) / name).read_bytes() for name in ("trees.jsonl", "statistics.jsonl")}


def interrupted(config, model, tokenizer, worker, after):
    """Collect until so many questions of this worker are finished, or all of them."""

    def stop(number, *_):
        if number == after:
            raise KeyboardInterrupt

    try:
        collect(config, model, tokenizer, progress=stop, worker=worker)
    except KeyboardInterrupt:
        return


@pytest.mark.parametrize(
    "starts",
    [
        [(1, 1, SMALL_BATCH), (1, 0, {})],
        [(1, 4, {}), (1, 5, SMALL_PREFILL), (1, 0, SMALL_ARENA)],
        [(2, 0, SMALL_ARENA)],
        [(3, 1, {}), (2, 1, SMALL_PREFILL), (1, 0, SMALL_BATCH)],
        [(1, 2, SMALL_PREFILL), (3, 0, SMALL_BATCH)],
    ],
    ids=["killed at once", "killed twice", "two workers", "three, then two, then one", "one, then three"],
)
def test_trees_are_the_same_bytes_for_any_batch_workers_and_restart_point(start, model, tokenizer, reference, starts):
    """Each start is (number of workers, after how many questions each is interrupted, how its work is shared out)."""
    for count, after, shared in starts:
        config = start("disturbed", **shared)
        for index in range(count):
            interrupted(config, model, tokenizer, Worker(index, count), after)
    assert written(config) == reference
    assert worker_files(Path(config.run) / "trees.jsonl") == []
    statuses = [json.loads(line)["status"] for line in reference["trees.jsonl"].splitlines()]
    assert len(statuses) == 6
    assert "ok" in statuses
