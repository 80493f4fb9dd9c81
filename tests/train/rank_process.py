"""One rank of trainings that a test launches: `python -m tests.train.rank_process RUNS.json`.

The file holds a list of runs (see `Run`). All are trained one after the other in one process group, because starting ranks
takes longer than training. An error that a user can mend is written to `<run>/error-<rank>` and the next run follows.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from cpo_fast.config import TrainConfig, validate_config
from cpo_fast.errors import CpoFastError
from cpo_fast.train.deepspeed_engine import adamw
from cpo_fast.train.loop import train
from tests.train.runs import sgd


@dataclass(frozen=True)
class Run:
    """A configuration, and what happens to it: `sgd` instead of AdamW, and a signal to one rank in its n-th update."""

    config: dict[str, Any]
    sgd: bool = False
    signal_at: int = 0
    signal_rank: int = 0


def take(run: Run) -> None:
    """Train one run in this process, as the rank that the environment says."""
    rank = os.environ.get("RANK", "0")
    updates = 0

    def interrupt(*args: Any) -> None:
        nonlocal updates
        updates += 1
        if updates == run.signal_at and int(rank) == run.signal_rank:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.2)  # the thread that reads signals comes to run; if it does not, a later step obeys

    def optimizer(config: TrainConfig, parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
        made = (sgd if run.sgd else adamw)(config, parameters)
        made.register_step_post_hook(interrupt)
        return made

    config = validate_config(run.config)
    try:
        train(config, make_optimizer=optimizer)
    except CpoFastError as error:
        folder = Path(config.run)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"error-{rank}").write_text(f"{error.exit_code} {error}")


def launch(runs: list[Run], num_ranks: int, folder: Path, limit: float = 3000) -> None:
    """Train runs on so many ranks of this host, and fail with the output of a rank that fails."""
    folder.mkdir(parents=True, exist_ok=True)
    listed = folder / "runs.json"
    listed.write_text(json.dumps([asdict(run) for run in runs]))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in range(num_ranks):
        variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": num_ranks, "LOCAL_WORLD_SIZE": num_ranks}
        variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1}
        with open(folder / f"rank-{rank}.log", "wb") as log:
            processes.append(
                subprocess.Popen(
                    [sys.executable, "-m", "tests.train.rank_process", str(listed)],
                    env=os.environ | {name: str(value) for name, value in variables.items()},
                    stdout=log,
                    stderr=subprocess.STDOUT,
                )
            )
    end = time.monotonic() + limit
    try:
        codes = [process.wait(max(1, end - time.monotonic())) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for rank, code in enumerate(codes):
        assert code == 0, f"rank {rank} ended with {code}:\n" + (folder / f"rank-{rank}.log").read_text()[-4000:]


if __name__ == "__main__":
    for each in json.loads(Path(sys.argv[1]).read_text()):
        take(Run(**each))
