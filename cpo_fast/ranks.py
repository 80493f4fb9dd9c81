"""Which of several processes this one is: the variables of torchrun, deepspeed and srun, read in one place.

Training, collection and the choice of a device ask here, so that they can never disagree about who is rank 0.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from cpo_fast.errors import ConfigError


@dataclass(frozen=True)
class Ranks:
    """One process among those that a launcher started together.

    Attributes:
        rank: its number, from 0. world_size: how many there are.
        local_rank: its number on this host. local_world_size: how many are on this host.
        launcher: `torchrun` (deepspeed sets the same variables), `slurm`, or the empty string without one.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    launcher: str = ""


SINGLE = Ranks()


def find_ranks(environment: Mapping[str, str] = os.environ) -> Ranks:
    """This process's place, by the variables of its launcher.

    Of Slurm only the variables of a step count (`srun`). SLURM_PROCID and SLURM_NTASKS stand in a batch script too, where
    one process does all the work.

    Raises:
        ConfigError: a variable is missing or is no whole number in its range.
    """
    if "RANK" in environment or "WORLD_SIZE" in environment:
        # torchrun counts the processes of a host in LOCAL_WORLD_SIZE, deepspeed in LOCAL_SIZE
        local_size = next((name for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE") if name in environment), "")
        return _ranks(environment, "RANK", "WORLD_SIZE", "LOCAL_RANK", local_size, "torchrun")
    if "SLURM_STEP_NUM_TASKS" in environment:
        return _ranks(environment, "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "", "slurm")
    return SINGLE


def _ranks(
    environment: Mapping[str, str], rank: str, world_size: str, local_rank: str, local_size: str, launcher: str
) -> Ranks:
    index, count = _number(environment, rank), _number(environment, world_size)
    if not index < count:
        raise ConfigError(
            f"{rank}={index} and {world_size}={count} of the environment: a rank is smaller than the number of ranks"
        )
    local = _number(environment, local_rank) if local_rank in environment else 0
    if local_size:
        local_count = _number(environment, local_size)
    elif launcher == "slurm":
        local_count = _slurm_tasks_here(environment)
    else:
        local_count = 1
    return Ranks(index, count, local, max(local_count, local + 1), launcher)


def _number(environment: Mapping[str, str], name: str) -> int:
    text = environment.get(name)
    if text is None:
        raise ConfigError(
            f"{name} is not set in the environment, though other variables of a launcher are; start all ranks "
            "with torchrun, deepspeed or srun, or unset RANK and WORLD_SIZE"
        )
    if re.fullmatch(r"[0-9]{1,9}", text) is None:
        raise ConfigError(f"{name}={text} of the environment is no whole number; a launcher sets it")
    return int(text)


def _slurm_tasks_here(environment: Mapping[str, str]) -> int:
    """Tasks on this host, from SLURM_STEP_TASKS_PER_NODE, which reads like `4(x2),3`: two hosts with 4 and one with 3."""
    counts: list[int] = []
    for part in environment.get("SLURM_STEP_TASKS_PER_NODE", "").split(","):
        match = re.fullmatch(r"([0-9]+)(?:\(x([0-9]+)\))?", part)
        if match:
            counts += [int(match[1])] * int(match[2] or 1)
    node = environment.get("SLURM_NODEID", "0")
    return counts[int(node)] if node.isdigit() and int(node) < len(counts) else 1
