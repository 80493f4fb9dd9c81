"""Kill rounds before a write: `python -m tests.iterate.kill_rounds FOLDER METHOD SEED`, until they end.

Every start is a fork of this process, which kills itself before its n-th operation on files that changes the run folder.
Of so many starts some are killed in every stage, and between a stage and its record. Then all files are compared with those
of rounds that nobody disturbed. Prints one JSON object: the deaths by stage, and the files that differ.
"""

import json
import os
import random
import signal
import sys
import traceback
from collections import Counter
from pathlib import Path

import torch

from cpo_fast.config import Config, validate_config
from cpo_fast.iterate import iterate
from tests.iterate.rounds import results, values, write_inputs

CHANGES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "shutil.rmtree"}
MAX_STARTS = 200


def start(config: Config, operation: int) -> tuple[bool, int]:
    """Make rounds in a fork that is killed before an operation (0: never): whether it ended, after how many operations."""
    counted = Path(config.run).with_suffix(".count")
    child = os.fork()
    if child == 0:
        code, count = 1, 0

        def hook(event: str, arguments: tuple[object, ...]) -> None:
            nonlocal count
            writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
            if (writes or event in CHANGES) and config.run in str(arguments[0]):
                count += 1
                if count == operation:
                    os.kill(os.getpid(), signal.SIGKILL)

        try:
            sys.addaudithook(hook)
            iterate(config)
            counted.write_text(str(count))
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) or os.waitstatus_to_exitcode(status) == 0, "rounds ended with an error"
    return not os.WIFSIGNALED(status), int(counted.read_text()) if counted.exists() else 0


def place(config: Config) -> str:
    """The stage that was begun and has not ended, by the summary."""
    path = Path(config.run) / "iterate.json"
    rounds = json.loads(path.read_text())["rounds"] if path.exists() else []
    begun = [name for one in rounds for name, record in one["stages"].items() if "seconds" not in record]
    return begun[0] if begun else "between"


def main() -> None:
    """See the module."""
    folder, method, seed = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    torch.set_num_threads(1)
    import cpo_fast.train.loop  # once, and not in every fork

    assert cpo_fast.train.loop is not None
    inputs, generator = write_inputs(folder), random.Random(seed)

    def config(name: str) -> Config:
        changes = {"iterate": {"method": method}, "train": {"save_every": 2}}
        return validate_config(values(inputs, folder / name, **changes))

    ended, num_operations = start(config("whole"), 0)
    assert ended, "nobody kills it"
    killed, deaths, ended = config("killed"), Counter[str](), False
    for _ in range(MAX_STARTS):
        ended, _ = start(killed, generator.randint(1, num_operations // 4))
        if ended:
            break
        deaths[place(killed)] += 1
    assert ended, "it does not get on"
    one, other = results(folder / "whole"), results(folder / "killed")
    differing = sorted(name for name in {*one, *other} if one.get(name) != other.get(name))
    print(json.dumps({"operations": num_operations, "deaths": deaths, "files": len(one), "differing": differing}))


if __name__ == "__main__":
    main()
