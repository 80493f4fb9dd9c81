"""Kill saves of checkpoints: `python -m tests.train.kill_saves FOLDER NUM_RANDOM_KILLS`, without torch.

Every save happens in a fork of this process, which kills itself before the n-th operation on files, for every n that there
is, and is then killed at random times. After each death the folder is read. Prints one JSON object with what was seen.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import numpy as np

from cpo_fast.train.checkpoint import Checkpoint, CheckpointStore

EVENTS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.listdir", "os.scandir"}


def checkpoint(step: int) -> Checkpoint:
    """Tensors that say which step they are of, large enough that a write takes a while."""
    tensors = {f"layer.{index}": np.full((64, 64), step + index, np.float32) for index in range(8)}
    moments = {f"exp_avg.{name}": value / 2 for name, value in tensors.items()}
    return Checkpoint(step, tensors, moments, {"step": step})


def is_whole(found: Checkpoint | None) -> bool:
    """Whether every part is of one step."""
    if found is None:
        return False
    wanted = checkpoint(found.step)
    return all(
        wanted.adapter[name].tobytes() == found.adapter[name].tobytes() for name in wanted.adapter
    ) and found.state == {"step": found.step}


def save_and_die_before(store: CheckpointStore, step: int, operation: int) -> bool:
    """Save in a fork that kills itself before an operation on files. Whether it was killed."""
    child = os.fork()
    if child == 0:
        count = 0

        def hook(event: str, arguments: tuple[object, ...]) -> None:
            nonlocal count
            if event in EVENTS:
                count += 1
                if count == operation:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        store.save(checkpoint(step))
        os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status)


def save_and_be_killed(store: CheckpointStore, first: int, seconds: float) -> None:
    """Save one step after the other in a fork, and kill it after some time."""
    child = os.fork()
    if child == 0:
        step = first
        while True:
            store.save(checkpoint(step))
            step += 1
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def main() -> None:
    """Kill, look, and report."""
    folder, num_random = Path(sys.argv[1]), int(sys.argv[2])
    store = CheckpointStore(folder)
    store.save(checkpoint(1))
    problems: list[str] = []
    operation, step = 0, 1
    killed = True
    while killed:
        operation += 1
        step += 1
        before = store.newest()
        assert before is not None
        killed = save_and_die_before(store, step, operation)
        found = store.newest()
        if not is_whole(found) or found is None or found.step not in (before.step, step):
            problems.append(f"killed before operation {operation}")
    generator = random.Random(0)
    for kill in range(num_random):
        before = store.newest()
        assert before is not None
        save_and_be_killed(store, before.step + 1, generator.random() * 0.05)
        found = store.newest()
        if not is_whole(found) or found is None or found.step < before.step:
            problems.append(f"random kill {kill}")
        store.clean()
    # the same step again, as before and after a validation, with nothing else to fall back on
    alone, again, killed = CheckpointStore(folder / "alone", keep_last=1), 0, True
    alone.save(checkpoint(1))
    while killed:
        again += 1
        killed = save_and_die_before(alone, 1, again)
        alone.clean()
        if not is_whole(alone.newest()):
            problems.append(f"killed before operation {again} of a save of the same step")
    newest = store.newest()
    assert newest is not None
    leftovers = [each.name for each in folder.iterdir() if each.name.startswith(".step")]
    report = {"operations": operation - 1, "problems": problems, "steps": newest.step, "leftovers": leftovers}
    print(json.dumps(report | {"torch": "torch" in sys.modules}))


if __name__ == "__main__":
    main()
