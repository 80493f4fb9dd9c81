"""Which worker a process is, and which questions are its own."""

from pathlib import Path

import pytest

from cpo_fast.errors import ConfigError
from cpo_fast.search.tree_store import Worker, find_worker, worker_files

TORCHRUN = {"RANK": "1", "WORLD_SIZE": "4"}
SLURM = {"SLURM_PROCID": "2", "SLURM_STEP_NUM_TASKS": "3"}
# a batch script without srun: one process, though Slurm counts the tasks that it could start
BATCH_SCRIPT = {"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_LOCALID": "0", "SLURM_JOB_ID": "7"}


@pytest.mark.parametrize(
    ("option", "environment", "expected"),
    [
        (None, {}, Worker(0, 1)),
        (None, TORCHRUN, Worker(1, 4)),
        (None, SLURM, Worker(2, 3)),
        (None, TORCHRUN | SLURM, Worker(1, 4)),
        ("0/2", TORCHRUN | SLURM, Worker(0, 2)),
        ("0/1", SLURM, Worker(0, 1)),
        (None, {"SLURM_NTASKS": "8"}, Worker(0, 1)),  # a shell inside an allocation, not one of its tasks
        (None, BATCH_SCRIPT, Worker(0, 1)),
    ],
)
def test_the_option_wins_over_torchrun_and_that_over_slurm(option, environment, expected):
    assert find_worker(option, environment) == expected


@pytest.mark.parametrize(
    "option", ["4/4", "-1/2", "a/b", "1", "/", "", "1/0", "0/0", "1/2/3", "1.0/2", "\u0661/2", " 0/2"]
)
def test_a_wrong_option_is_a_configuration_error_in_one_sentence(option):
    with pytest.raises(ConfigError) as caught:
        find_worker(option, TORCHRUN)
    assert str(caught.value) == (
        f"--worker {option}: expected I/N with 0 <= I < N, such as 0/4 for the first of four workers"
    )
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"RANK": "4", "WORLD_SIZE": "4"}, "RANK=4 and WORLD_SIZE=4 .* smaller"),
        ({"RANK": "x", "WORLD_SIZE": "4"}, "RANK=x .* no whole number"),
        ({"RANK": "0"}, "WORLD_SIZE is not set"),
        ({"WORLD_SIZE": "2"}, "RANK is not set"),
        ({"SLURM_STEP_NUM_TASKS": "2"}, "SLURM_PROCID is not set"),
        ({"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "\u0661"}, "no whole number"),
    ],
)
def test_a_wrong_environment_is_named(environment, message):
    with pytest.raises(ConfigError, match=message):
        find_worker(None, environment)


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_every_question_has_exactly_one_worker_and_each_worker_some(count):
    ids = [f"question-{number}" for number in range(200)]
    owned = [[identity for identity in ids if Worker(index, count).owns(identity)] for index in range(count)]
    assert sorted(identity for part in owned for identity in part) == sorted(ids)
    assert min(map(len, owned)) > 200 / count / 2


def test_the_shares_never_change_from_one_version_to_the_next():
    names = ("chal-1", "chal-2", "qa-01", "fact-7", "", "\ud800")
    assert [next(i for i in range(7) if Worker(i, 7).owns(name)) for name in names] == [5, 3, 0, 5, 5, 3]


def test_parts_are_found_by_their_names_in_the_order_of_their_numbers(tmp_path: Path):
    path = tmp_path / "trees.jsonl"
    names = ["10-of-12", "2-of-12", "0-of-3", "1-of-12"]
    for name in [f"trees.worker-{name}.jsonl" for name in names] + [
        "trees.worker-x-of-3.jsonl",
        "trees.worker-1-of-3-old.jsonl",
        "timings.worker-0-of-2.jsonl",
        "trees.jsonl",
    ]:
        (tmp_path / name).touch()
    expected = [f"trees.worker-{name}.jsonl" for name in ("0-of-3", "1-of-12", "2-of-12", "10-of-12")]
    assert [found.name for found in worker_files(path)] == expected
    assert Worker(10, 12).file(path) == tmp_path / "trees.worker-10-of-12.jsonl"
    assert Worker().file(path) == path
