"""Which place on its host a process has, by the variables of each launcher."""

import pytest

from cpo_fast.ranks import Ranks, find_ranks

TORCHRUN = {"RANK": "9", "WORLD_SIZE": "16", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "8"}
DEEPSPEED = {
    "RANK": "9",
    "WORLD_SIZE": "16",
    "LOCAL_RANK": "1",
    "LOCAL_SIZE": "8",
    "CROSS_RANK": "1",
    "CROSS_SIZE": "2",
}
SRUN = {
    "SLURM_PROCID": "9",
    "SLURM_STEP_NUM_TASKS": "11",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2),3",
    "SLURM_NODEID": "2",
}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, Ranks()),
        (TORCHRUN, Ranks(9, 16, 1, 8, "torchrun")),
        (DEEPSPEED, Ranks(9, 16, 1, 8, "torchrun")),
        (SRUN, Ranks(9, 11, 1, 3, "slurm")),
        (SRUN | {"SLURM_NODEID": "0"}, Ranks(9, 11, 1, 4, "slurm")),
        (SRUN | {"SLURM_STEP_TASKS_PER_NODE": ""}, Ranks(9, 11, 1, 2, "slurm")),
        (SRUN | TORCHRUN, Ranks(9, 16, 1, 8, "torchrun")),  # torchrun inside a step of one task a host
    ],
)
def test_every_launcher_is_understood(environment: dict[str, str], expected: Ranks) -> None:
    assert find_ranks(environment) == expected
