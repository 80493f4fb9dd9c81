"""What the ranks of a training say to each other: one gather a step, and a few words before and after.

DeepSpeed moves weights and gradients. Everything that a rank decides goes through here, so that all decide from equal
numbers and none waits in a collective that another never enters.
"""

import atexit
import os
import re
import subprocess
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from cpo_fast import progress
from cpo_fast.errors import CpoFastError, EnvironmentProblem, first_line
from cpo_fast.ranks import Ranks

ARRIVAL_SECONDS = 300.0  # that ranks wait for the last to have started: Python may come from a slow disk
PREPARATION_SECONDS = 1800.0  # and for the last to have prepared its data
T = TypeVar("T")
# the new name since torch 2.13, where the old one warns
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class Communicator:
    """The ranks of a training. Of one process alone every call is a copy."""

    def __init__(self, ranks: Ranks, device: torch.device) -> None:
        self.ranks, self.device = ranks, device
        self.doing = "starting"

    @property
    def doing(self) -> str:
        """What this rank is at, for those that wait for it."""
        return self._doing

    @doing.setter
    def doing(self, text: str) -> None:
        self._doing = text
        progress.doing(text)

    @property
    def rank(self) -> int:
        return self.ranks.rank

    @property
    def world_size(self) -> int:
        return self.ranks.world_size

    @property
    def writes(self) -> bool:
        """Whether this rank writes the files and shows the screen."""
        return self.ranks.rank == 0

    def gather(self, values: torch.Tensor) -> torch.Tensor:
        """The equally long vectors [n] of all ranks, as [ranks, n], on their device."""
        if self.world_size == 1:
            return values[None]
        gathered = values.new_empty(self.world_size * values.numel())
        _all_gather(gathered, values)
        return gathered.view(self.world_size, -1)

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """The sum over ranks of equally large tensors, on their device. Overwrites `values`."""
        if self.world_size > 1:
            dist.all_reduce(values)
        return values

    def max(self, value: int) -> int:
        """The largest of the ranks' numbers. Waits for the device."""
        return int(self.gather(torch.tensor([value], device=self.device)).max())

    def broadcast(self, value: Any) -> Any:
        """The value of rank 0, which every rank gets. It travels pickled, so only between ranks of one training."""
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def from_first(self, function: Callable[[], T]) -> T:
        """What `function` returns on rank 0, on every rank. An error that a user can mend is raised on every rank too."""
        found: tuple[Any, CpoFastError | None] = (None, None)
        if self.writes:
            try:
                found = (function(), None)
            except CpoFastError as error:
                found = (None, error)
        value, problem = self.broadcast(found)
        if problem is not None:
            raise problem
        return value

    def gather_objects(self, value: T) -> list[T]:
        """The values of all ranks, in their order, on every rank. They travel pickled, as in `broadcast`."""
        if self.world_size == 1:
            return [value]
        gathered: list[Any] = [None] * self.world_size
        dist.all_gather_object(gathered, value)
        return gathered

    def barrier(self) -> None:
        """Wait until every rank is here."""
        if self.world_size > 1:
            dist.barrier()


def meet(ranks: Ranks) -> dist.Store | None:
    """The store through which the ranks find each other, as soon as rank 0 has made it. One process alone has none.

    Every training of a process gets its own names in it, so ranks have to train equally often.

    Raises:
        EnvironmentProblem: rank 0 cannot be reached.
    """
    if ranks.world_size == 1:
        return None
    if not _met and dist.is_initialized():  # by the caller of `train`, whose store holds the port
        _met.append(dist.distributed_c10d._get_default_store())
    if not _met:
        if ranks.launcher == "slurm":
            _find_slurm_master()
        patience = timedelta(seconds=ARRIVAL_SECONDS)
        try:
            if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
                store, _, _ = next(dist.rendezvous("env://", ranks.rank, ranks.world_size, timeout=patience))
            else:
                # torch's rendezvous would wait in here for all ranks, and could not say which have not come
                store = dist.TCPStore(
                    os.environ["MASTER_ADDR"],
                    int(os.environ["MASTER_PORT"]),
                    is_master=ranks.rank == 0,
                    timeout=patience,
                    wait_for_workers=False,
                    multi_tenant=True,
                )
        except (KeyError, ValueError, RuntimeError) as error:
            raise _unreachable(ranks, error) from error
        _met.append(store)
    # torchrun keeps its store when it starts the ranks again
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    _met.append(dist.PrefixStore(f"cpo_fast/{attempt}/{len(_met)}", _met[0]))
    return _met[-1]


_met: list[dist.Store] = []  # the store of this process, and after it one for every training


def connect(communicator: Communicator, timeout: float, store: dist.Store | None) -> None:
    """Join the process group of all ranks, or make one of this process alone. NCCL on CUDA, gloo on a CPU.

    Args:
        timeout: seconds that a collective may take.
        store: from `meet`.

    Raises:
        EnvironmentProblem: the other ranks cannot be reached.
    """
    ranks, device = communicator.ranks, communicator.device
    # DeepSpeed takes the device of this number. Slurm sets none, and may show each task one device only
    os.environ.setdefault("LOCAL_RANK", str(ranks.local_rank if device.index is None else device.index))
    backend = "nccl" if device.type == "cuda" else "gloo"
    if store is None:
        if not dist.is_initialized():
            # a store inside the process: no port that another run may take, no variables that children would inherit
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        return
    try:
        # rank 0 may still be hashing a large base, and the others wait for it longer than in a collective
        names = [f"prepared/{rank}" for rank in range(ranks.world_size)]
        store.set(names[ranks.rank], "1")
        communicator.doing = "waiting for the ranks that still prepare their data"
        store.wait(names, timedelta(seconds=max(timeout, PREPARATION_SECONDS)))
        communicator.doing = "connecting"
        if not dist.is_initialized():
            dist.init_process_group(
                backend,
                store=dist.PrefixStore("group", store),
                rank=ranks.rank,
                world_size=ranks.world_size,
                timeout=timedelta(seconds=timeout),
                device_id=device if device.type == "cuda" else None,
            )
    except (ValueError, RuntimeError) as error:
        raise _unreachable(ranks, error) from error


def disconnect_at_exit() -> None:
    """Leave the process group when this process ends: NCCL asks for it. Not before, because DeepSpeed keeps the group."""
    if dist.get_backend() == "nccl" and dist.destroy_process_group not in _at_exit:
        _at_exit.append(atexit.register(dist.destroy_process_group))


_at_exit: list[Callable[[], None]] = []


def _unreachable(ranks: Ranks, error: Exception) -> EnvironmentProblem:
    return EnvironmentProblem(
        f"rank {ranks.rank} of {ranks.world_size} cannot reach the others at "
        f"{os.environ.get('MASTER_ADDR', '?')}:{os.environ.get('MASTER_PORT', '?')} ({first_line(error)}); check "
        "MASTER_ADDR, that MASTER_PORT is free on that host and open to the others, and that every rank was started"
    )


def is_lost_connection(error: BaseException) -> bool:
    """Whether a collective failed because another rank is gone or silent: torch's own error of NCCL, or one of gloo."""
    return isinstance(error, dist.DistError) or "gloo" in str(error)


def _find_slurm_master() -> None:
    """MASTER_ADDR is the first host of the job, and MASTER_PORT follows from its number, so that jobs do not meet."""
    if "MASTER_ADDR" not in os.environ:
        nodes = os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_JOB_NODELIST", "")
        try:
            listed = subprocess.run(
                ["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True, timeout=60
            )
            os.environ["MASTER_ADDR"] = listed.stdout.split()[0]
        except (OSError, subprocess.SubprocessError, IndexError) as error:
            raise EnvironmentProblem(
                f"the first host of this Slurm job is unknown (scontrol: {first_line(error)}); set MASTER_ADDR to it"
            ) from None
    job = re.sub(r"[^0-9]", "", os.environ.get("SLURM_JOB_ID", "0")) or "0"
    os.environ.setdefault("MASTER_PORT", str(20000 + int(job) % 20000))
