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
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from cpo_fast.config import TrainConfig, validate_config
from cpo_fast.errors import CpoFastError
from cpo_fast.models import load_model
from cpo_fast.train import dev_questions
from cpo_fast.train.deepspeed_engine import adamw
from cpo_fast.train.dev_questions import MIN_SAMPLED
from cpo_fast.train.loop import train
from cpo_fast.train.policy import load_policy
from tests.train.runs import memory_bytes, sgd


@dataclass(frozen=True)
class Run:
    """A configuration, and what happens to it: `sgd` instead of AdamW, and a signal to one rank in its n-th update.

    The adapter of `off_rank` adds a little to what it computes, so that the policy there is not its reference. With
    `gathers` the last step's gathers of every weight, the weights that were whole after each pass without a gradient, and
    the elements that were whole before the update, are written to `<run>/gathers.json`. With `memory` every rank's private
    memory after the imports and at its peak, in bytes, to `<run>/memory-<rank>.json`. With `samples` chains are sampled
    before training of any number of questions.
    """

    config: dict[str, Any]
    sgd: bool = False
    gathers: bool = False
    memory: bool = False
    samples: bool = False
    signal_at: int = 0
    signal_rank: int = 0
    off_rank: int | None = None


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

    config = validate_config(run.config)
    dev_questions.MIN_SAMPLED = 1 if run.samples else MIN_SAMPLED
    model, tokenizer = load_model(config.model) if run.gathers else (None, None)
    if run.off_rank == int(rank):
        # not in the weights, which DeepSpeed takes from rank 0
        policy = load_policy(config)
        model, tokenizer = policy.model, policy.tokenizer
        for name, module in model.named_modules():
            if ".lora_B." in name:
                module.register_forward_hook(lambda module, inputs, output: output + 1e-3)

    def optimizer(train_config: TrainConfig, parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
        made = (sgd if run.sgd else adamw)(train_config, parameters)
        made.register_step_post_hook(interrupt)
        if run.gathers:
            made.register_step_pre_hook(count_gathers(model, Path(config.run)))
        return made

    try:
        with watch_memory(Path(config.run) / f"memory-{rank}.json") if run.memory else nullcontext():
            train(config, model, tokenizer, make_optimizer=optimizer)
    except CpoFastError as error:
        folder = Path(config.run)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"error-{rank}").write_text(f"{error.exit_code} {error}")


def count_gathers(model: torch.nn.Module, folder: Path) -> Callable[..., None]:
    """Count from now on how often ZeRO 3 gathers each weight. Returns a hook for the optimizer's step."""
    counts: Counter[str] = Counter()
    whole_after_pass: list[list[str]] = []
    frozen = {name: each for name, each in model.named_parameters() if not each.requires_grad}
    names = {id(each): name for name, each in frozen.items()}

    def counted(gather: Callable[..., Any]) -> Callable[..., Any]:
        def gathering(params: list[torch.nn.Parameter], *args: Any, **options: Any) -> Any:
            counts.update(names[id(each)] for each in params if id(each) in names)
            return gather(params, *args, **options)

        return gathering

    for each in frozen.values():
        each.all_gather_coalesced = counted(each.all_gather_coalesced)  # type: ignore[attr-defined]

    def after_backbone(*args: Any) -> None:
        if not torch.is_grad_enabled():
            whole_after_pass.append([name for name, each in frozen.items() if each.numel()])

    model.model.register_forward_hook(after_backbone)  # type: ignore[union-attr]

    def before_update(*args: Any) -> None:
        whole = sum(each.numel() for each in frozen.values())
        found = {"counts": counts, "whole": whole, "whole_after_pass": whole_after_pass}
        if os.environ.get("RANK", "0") == "0":
            (folder / "gathers.json").write_text(json.dumps(found))
        counts.clear()

    return before_update


@contextmanager
def watch_memory(path: Path) -> Iterator[None]:
    """Write this process's private memory (RssAnon) after its imports and at its peak in the meantime, in bytes."""
    import deepspeed  # noqa: F401
    import peft  # noqa: F401

    ended, imported = threading.Event(), memory_bytes("RssAnon")
    peak = imported

    def look() -> None:
        nonlocal peak
        while not ended.wait(0.005):
            peak = max(peak, memory_bytes("RssAnon"))

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        path.write_text(json.dumps({"imported": imported, "peak": peak}))


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
