"""Before anything is loaded: do all hosts have the same code, configuration and data, and do they reach each other?

Every rank writes down what it finds, in the store that the ranks met at. Rank 0 compares, and where several hosts take part
its table is on the screen within a minute, before a base is read and before NCCL, whose own errors name neither.
"""

import hashlib
import io
import json
import logging
import os
import platform
import shutil
import socket
import time
import uuid
from collections.abc import Sequence
from datetime import timedelta
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from cpo_fast.config import Config, config_hash
from cpo_fast.errors import EnvironmentProblem, first_line
from cpo_fast.ranks import Ranks
from cpo_fast.rows import is_hub
from cpo_fast.train.communication import ARRIVAL_SECONDS, Communicator

logger = logging.getLogger(__name__)

TABLE_SECONDS = 60.0  # after which the hosts that are there are shown, and the ranks that are not
REACH_SECONDS = 20.0  # for a sum over the hosts
WHOLE_BYTES = 1 << 30  # up to which a data file is hashed whole, beyond it its ends
MIB = 1 << 20
MISSING = "missing"
LOW_DISK = 1 << 30
# libraries whose versions decide results, or whether ranks understand each other
EQUAL = ("cpo-fast", "torch", "transformers", "peft", "deepspeed", "triton")
Facts = dict[str, Any]


def check_hosts(communicator: Communicator, store: dist.Store | None, config: Config) -> None:
    """Compare the hosts of a training. Of one process alone there is nothing to compare.

    Raises:
        EnvironmentProblem: hosts differ or do not reach each other, or a rank has not come. Raised on every rank.
    """
    if store is None:
        return
    communicator.doing = "comparing the hosts"
    ranks = communicator.ranks
    store.set(f"facts/{ranks.rank}", json.dumps(find_facts(config, communicator.device, ranks)))
    if ranks.rank == 0:
        try:
            facts = arrived(store, ranks.world_size)
        except EnvironmentProblem as error:
            store.set("hosts", json.dumps({"firsts": [], "problems": [str(error)]}))
            store.set("verdict", json.dumps([str(error)]))
            raise
        problems = compare(facts)
        firsts = [rank for rank, each in enumerate(facts) if each["local_rank"] == 0]
        token = f".hosts-{uuid.uuid4().hex}"
        if len(firsts) > 1 and not problems:
            Path(config.run, token).touch()
        store.set("hosts", json.dumps({"firsts": firsts, "token": token, "problems": problems}))
        reached: dict[int, Facts] = {}
        try:
            if len(firsts) > 1 and not problems:
                _reach(store, ranks.rank, firsts, Path(config.run, token))
                reached = {rank: json.loads(_get(store, f"reached/{rank}", 3 * REACH_SECONDS)) for rank in firsts}
                problems = _unreached(facts, reached, communicator.device.type)
        finally:
            Path(config.run, token).unlink(missing_ok=True)
        if len(firsts) > 1 or problems:
            logger.info("%s", table(facts, firsts, reached))
        store.set("verdict", json.dumps(problems))
    else:
        hosts = json.loads(_get(store, "hosts", ARRIVAL_SECONDS + TABLE_SECONDS))
        if ranks.rank in hosts["firsts"] and len(hosts["firsts"]) > 1 and not hosts["problems"]:
            _reach(store, ranks.rank, hosts["firsts"], Path(config.run, hosts["token"]))
        problems = json.loads(_get(store, "verdict", ARRIVAL_SECONDS))
    if problems:
        raise EnvironmentProblem(f"the hosts do not fit together: {'; '.join(problems)}")


def find_facts(config: Config, device: torch.device, ranks: Ranks) -> Facts:
    """What has to be equal on all hosts, and what is worth a look."""
    folder = next(each for each in (Path(config.run), *Path(config.run).absolute().parents) if each.exists())
    cuda = device.type == "cuda"
    return {
        "host": socket.gethostname(),
        "local_rank": ranks.local_rank,
        "num_local": ranks.local_world_size,
        "device": torch.cuda.get_device_name(device) if cuda else f"CPU {platform.machine()}",
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in EQUAL}
        | ({"NCCL": str(torch.cuda.nccl.version())} if cuda else {}),
        "config": config_hash(config),
        "data": _data_hash(config) if ranks.local_rank == 0 else "",
        "free_bytes": shutil.disk_usage(folder).free,
    }


def compare(facts: Sequence[Facts]) -> list[str]:
    """A sentence for everything in which a rank differs from rank 0 and must not."""
    problems = []
    first = facts[0]
    for rank, each in enumerate(facts[1:], start=1):
        who = f"rank {rank} on {each['host']}"
        versions = [
            f"{name} {each['versions'].get(name)} ({wanted} on rank 0)"
            for name, wanted in first["versions"].items()
            if each["versions"].get(name) != wanted
        ]
        if versions:
            problems.append(f"{who} has {', '.join(versions)}; install the same versions everywhere")
        if each["config"] != first["config"]:
            problems.append(f"{who} has another configuration; give every host the same file and the same overrides")
        if each["data"] == MISSING != first["data"]:
            problems.append(f"{who} cannot read data.path; copy the files of rank 0's host there")
        elif each["data"] and each["data"] != first["data"]:
            problems.append(f"{who} has other data in data.path; copy the same files to every host")
    shown = problems[:8]
    return shown + ([f"and {len(problems) - len(shown)} more"] if len(problems) > len(shown) else [])


def table(facts: Sequence[Facts], firsts: Sequence[int], reached: dict[int, Facts]) -> str:
    """One line a host, as text: what it has, and whether it reaches the others."""
    columns = (
        "host",
        "ranks",
        "device",
        "versions",
        "configuration",
        "data",
        "free disk",
        "sum over hosts",
        "run folder",
    )
    shown = Table(*columns, title="hosts")
    first = facts[0]
    for rank in firsts:
        each, seen = facts[rank], reached.get(rank, {})
        other = [
            f"{name} {version}" for name, version in each["versions"].items() if version != first["versions"][name]
        ]
        own = (
            "as on rank 0" if rank else ", ".join(f"{name} {each['versions'][name]}" for name in ("cpo-fast", "torch"))
        )
        shown.add_row(
            each["host"],
            f"{rank}-{rank + each['num_local'] - 1}",
            each["device"],
            ", ".join(other) or own,
            each["config"][:8],
            each["data"][:8],
            f"{each['free_bytes'] / (1 << 30):.0f} GiB",
            seen.get("sum", "not tried"),
            seen.get("folder", "not tried"),
        )
    text = io.StringIO()
    Console(file=text, width=160).print(shown)
    return text.getvalue().rstrip()


def arrived(
    store: dist.Store, world_size: int, seconds: float = TABLE_SECONDS, more_seconds: float = ARRIVAL_SECONDS
) -> list[Facts]:
    """The facts of every rank, in order. Ranks that have not come after `seconds` are named, and waited for some more.

    Raises:
        EnvironmentProblem: a rank has not come then either.
    """
    keys = [f"facts/{rank}" for rank in range(world_size)]
    try:
        store.wait(keys, timedelta(seconds=seconds))
    except RuntimeError:
        missing = _missing(store, keys)
        logger.warning("after %.0f s ranks %s have not come; waiting %.0f s more", seconds, missing, more_seconds)
        try:
            store.wait(keys, timedelta(seconds=more_seconds))
        except RuntimeError:
            raise EnvironmentProblem(
                f"ranks {_missing(store, keys)} have not come; look at what their hosts say, and whether they reach "
                f"{os.environ.get('MASTER_ADDR', '?')}:{os.environ.get('MASTER_PORT', '?')}"
            ) from None
    return [json.loads(store.get(key)) for key in keys]


def _missing(store: dist.Store, keys: Sequence[str]) -> str:
    missing = [str(rank) for rank, key in enumerate(keys) if not store.check([key])]
    return ", ".join(missing[:16]) + (", ..." if len(missing) > 16 else "")


def _reach(store: dist.Store, rank: int, firsts: Sequence[int], token: Path) -> None:
    """Sum a number over all hosts, look for the file that rank 0 has made, and write down how both went."""
    try:
        number = torch.ones(1)
        group = dist.ProcessGroupGloo(
            dist.PrefixStore("sum", store), firsts.index(rank), len(firsts), timedelta(seconds=REACH_SECONDS)
        )
        group.allreduce([number]).wait()  # type: ignore[attr-defined]  # torch's stub lacks it
        found = "right" if number.item() == len(firsts) else f"wrong ({number.item():g})"
    except (RuntimeError, ValueError) as error:
        found = f"failed ({first_line(error)})"
    store.set(f"reached/{rank}", json.dumps({"sum": found, "folder": "shared" if _appears(token) else "not shared"}))


def _appears(path: Path) -> bool:
    """Whether a file is there, or comes to be: network disks show a new file late."""
    for _ in range(20):
        if path.name in (os.listdir(path.parent) if path.parent.is_dir() else ()):
            return True
        time.sleep(0.25)
    return False


def _unreached(facts: Sequence[Facts], reached: dict[int, Facts], device_type: str) -> list[str]:
    """A sentence for each host that does not reach the others. A run folder of its own is only warned of."""
    problems = []
    for rank, found in reached.items():
        who = f"rank {rank} on {facts[rank]['host']}"
        if found["sum"] != "right":
            sentence = (
                f"{who} takes no part in a sum over the hosts: {found['sum']}; name the network interface in "
                "GLOO_SOCKET_IFNAME (NCCL_SOCKET_IFNAME for GPUs), and open the hosts' ports to each other"
            )
            if device_type == "cuda":  # gloo may take another interface than NCCL, which is asked next
                logger.warning("%s", sentence)
            else:
                problems.append(sentence)
        if found["folder"] != "shared":
            logger.warning(
                "%s does not see the run folder of rank 0; a training that is started again with another first host would "
                "find no checkpoints",
                who,
            )
        if facts[rank]["free_bytes"] < LOW_DISK:
            logger.warning("%s has %.0f MiB free for the run folder", who, facts[rank]["free_bytes"] / MIB)
    return problems


def _get(store: dist.Store, key: str, seconds: float) -> str:
    try:
        store.wait([key], timedelta(seconds=seconds))
        return str(store.get(key).decode())
    except RuntimeError as error:
        raise EnvironmentProblem(
            f"no answer about '{key.partition('/')[0]}' for {seconds:.0f} s ({first_line(error)}); look at the error of "
            "the rank that ended first"
        ) from None


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "missing"


def _data_hash(config: Config) -> str:
    """Of the data files. A data set of a hub is named by the configuration."""
    digest = hashlib.sha256()
    for path in (config.data.path, *(item.path for item in config.data.mixture)):
        if not path or is_hub(path):
            continue
        try:
            size = os.path.getsize(path)
            digest.update(f"{size}\n".encode())
            with open(path, "rb") as file:
                for start in (0,) if size <= WHOLE_BYTES else (0, size - WHOLE_BYTES // 4):
                    file.seek(start)
                    left = WHOLE_BYTES if size <= WHOLE_BYTES else WHOLE_BYTES // 4
                    while left > 0 and (piece := file.read(min(left, 1 << 22))):
                        digest.update(piece)
                        left -= len(piece)
        except OSError:
            return MISSING
    return digest.hexdigest()
