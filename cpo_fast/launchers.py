"""How `cpo-fast train --launch` starts its ranks: by itself, with torchrun, deepspeed or Slurm, here or on several hosts.

Whatever starts them, `cpo_fast.launch` owns the processes. Ranks leave a note when they fail, because torchrun and srun do
not hand on which of them was first. Other hosts are reached by ssh, or by what CPO_FAST_REMOTE_SHELL names: a command that
takes a host and a line for its shell.
"""

import json
import os
import re
import shlex
import shutil
import signal
import socket
import sys
import tempfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import click

from cpo_fast.errors import FAILURES, ConfigError, EnvironmentProblem
from cpo_fast.files import write_atomic
from cpo_fast.launch import Command, order, own
from cpo_fast.ranks import find_ranks

LAUNCHERS = ("auto", "torchrun", "deepspeed", "slurm")
REMOTE_SHELL = "CPO_FAST_REMOTE_SHELL"
# a connection that says nothing for half a minute is closed on both sides
SSH = "ssh -o BatchMode=yes -o ConnectTimeout=20 -o ServerAliveInterval=10 -o ServerAliveCountMax=3"
# variables that other hosts get: of libraries that talk over networks or choose kernels, and where Python finds its code
EXPORTED = re.compile(
    r"(NCCL|GLOO|TORCH|PYTORCH|TRITON|CPO|HF|DS|UCX|FI|OMP|MKL|TOKENIZERS|PYTHON)[A-Z]*_.*|PYTHONPATH|LD_LIBRARY_PATH"
)
SECRET = re.compile("TOKEN|KEY|SECRET|PASSWORD")
NEEDED_TO_START = ("PYTHONPATH", "LD_LIBRARY_PATH")
KILLED, STOPPED, INTERRUPTED = 128 + 9, 128 + 15, 128 + 2
# srun passes SIGUSR1 on. At SIGTERM it kills its ranks at once, at one SIGINT it tells how they are, and at SIGKILL they
# outlive it, because they are no children of it.
SRUN_SIGNALS: dict[int, int] = {
    signal.SIGTERM: signal.SIGUSR1,
    signal.SIGINT: signal.SIGUSR1,
    signal.SIGKILL: signal.SIGTERM,
}
SBATCH_GRACE = 270  # of the 300 seconds by which the job is warned
SBATCH = """#!/bin/bash
#SBATCH --job-name=cpo-fast
#SBATCH --nodes={nodes}
#SBATCH --ntasks-per-node={ranks}
#SBATCH --gpus-per-node={ranks}
#SBATCH --output={output}/slurm-%j.out
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@300
# add your --partition, --account, --time and --cpus-per-task

cd {folder} || exit 1
# srun does not take --cpus-per-task from the job by itself
if [ -n "$SLURM_CPUS_PER_TASK" ]; then export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"; fi
# five minutes before its time is over the job saves its state, and is then queued again to go on from there
soon=""
trap 'soon=1; kill -USR1 "$ranks"' USR1
srun --kill-on-bad-exit=1 {command} &
ranks=$!
wait "$ranks"
code=$?
while kill -0 "$ranks" 2>/dev/null; do  # a signal ends `wait`, and not what it waits for
    wait "$ranks"
    code=$?
done
if [ -n "$soon" ] && [ "$code" -ne 0 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
"""


@dataclass(frozen=True)
class Host:
    """Where ranks are started. The empty name is this host."""

    name: str
    num_ranks: int

    @property
    def address(self) -> str:
        """Without the user that ssh logs in as."""
        return self.name.rpartition("@")[2]


def read_hosts(path: str, num_ranks: int | None) -> list[Host]:
    """The hosts of a file with lines like `name slots=8`, as DeepSpeed and Open MPI read them.

    Args:
        num_ranks: on each host, or None for its slots.

    Raises:
        ConfigError: the file cannot be read or a line is not like that.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"--hosts {path}: cannot read ({getattr(error, 'strerror', error)}); check the path"
        ) from None
    hosts: list[Host] = []
    for number, line in enumerate(lines, start=1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        match = re.fullmatch(r"([A-Za-z0-9][A-Za-z0-9._:@-]*)(?:\s+slots=([0-9]+))?", text)
        if match is None:
            raise ConfigError(f"--hosts {path}:{number}: '{text}' is not like 'name slots=8'; mend the line")
        slots = int(match[2]) if match[2] else None
        if slots == 0 or (slots is not None and num_ranks is not None and num_ranks > slots):
            raise ConfigError(f"--hosts {path}:{number}: {match[1]} has {slots} slots; mend the file, or lower --gpus")
        if match[1] in {host.name for host in hosts}:
            raise ConfigError(f"--hosts {path}:{number}: {match[1]} is named twice; keep one line with all its slots")
        hosts.append(Host(match[1], num_ranks or slots or 1))
    if not hosts:
        raise ConfigError(f"--hosts {path}: the file names no host; write lines like 'name slots=8'")
    return hosts


def launch(
    arguments: Sequence[str],
    launcher: str,
    hosts: Sequence[Host],
    run: Path,
    grace: float,
    hosts_path: str | None = None,
) -> int:
    """Run `cpo-fast ARGUMENTS` on all ranks, and return the exit code of the one that failed first, or 0.

    Args:
        arguments: of the command, without what asks for ranks.
        launcher: one of LAUNCHERS.
        hosts: at least one; for Slurm the allocation says which, and only `num_ranks` counts.
        run: the run folder, which all hosts see.
        grace: seconds that ranks may take to end after a signal, before they are killed.
        hosts_path: the file of `hosts`.

    Raises:
        ConfigError: this process is a rank already. EnvironmentProblem: the launcher is not installed, or the run folder
            cannot be written.
    """
    if find_ranks().world_size > 1:
        raise ConfigError("--gpus starts ranks, and this process is one already; leave it out under a launcher")
    make = {"auto": by_itself, "torchrun": with_torchrun, "deepspeed": with_deepspeed, "slurm": with_slurm}[launcher]
    try:
        run.mkdir(parents=True, exist_ok=True)
        # hosts share the run folder; our own ranks need no notes, because nothing stands between
        notes = Path(tempfile.mkdtemp(prefix=".launch-", dir=run)).absolute() if launcher != "auto" else None
    except OSError as error:
        raise EnvironmentProblem(f"{run}: cannot be written ({error.strerror}); choose another run folder") from None
    try:
        commands = make(arguments, hosts, {} if notes is None else {FAILURES: str(notes)}, hosts_path)
        others = f", and {len(commands) - 1} more like it" if len(commands) > 1 else ""
        click.echo(f"started as: {raw(commands[0])}{others}", err=True)
        if any(host.name for host in hosts) and launcher != "deepspeed":
            commands = _on_hosts(commands, hosts, grace)
        code = own(commands, grace)
        if notes is None or code == 0:
            return code
        return _first_failure(notes, code)
    finally:
        if notes is not None:
            shutil.rmtree(notes, ignore_errors=True)


def by_itself(
    arguments: Sequence[str], hosts: Sequence[Host], environment: dict[str, str], hosts_path: str | None
) -> list[Command]:
    """A command for each rank of all hosts, in order."""
    world_size = sum(host.num_ranks for host in hosts)
    address = {"MASTER_ADDR": hosts[0].address or "127.0.0.1", "MASTER_PORT": master_port(hosts)}
    commands: list[Command] = []
    for host in hosts:
        threads = {} if "OMP_NUM_THREADS" in os.environ or host.name else {"OMP_NUM_THREADS": _threads(host.num_ranks)}
        for local_rank in range(host.num_ranks):
            rank = len(commands)
            place = {
                "RANK": rank,
                "LOCAL_RANK": local_rank,
                "WORLD_SIZE": world_size,
                "LOCAL_WORLD_SIZE": host.num_ranks,
            }
            variables = {name: str(value) for name, value in place.items()} | address | threads | environment
            commands.append(
                Command([sys.executable, "-m", "cpo_fast", *arguments], f"rank {rank}", variables, is_shown=rank == 0)
            )
    return commands


def with_torchrun(
    arguments: Sequence[str], hosts: Sequence[Host], environment: dict[str, str], hosts_path: str | None
) -> list[Command]:
    """A torchrun for each host."""
    commands = []
    for index, host in enumerate(hosts):
        where = ["--standalone"]
        if host.name:
            where = ["--nnodes", str(len(hosts)), "--node-rank", str(index)]
            where += ["--master-addr", hosts[0].address, "--master-port", master_port(hosts)]
        run = [sys.executable, "-m", "torch.distributed.run", *where, "--nproc-per-node", str(host.num_ranks)]
        label = f"torchrun on {host.name}" if host.name else "torchrun"
        threads = {} if "OMP_NUM_THREADS" in os.environ else {"OMP_NUM_THREADS": _threads(host.num_ranks)}
        commands.append(
            Command([*run, "-m", "cpo_fast", *arguments], label, threads | environment, is_shown=index == 0)
        )
    return commands


def with_deepspeed(
    arguments: Sequence[str], hosts: Sequence[Host], environment: dict[str, str], hosts_path: str | None
) -> list[Command]:
    """One `deepspeed`, which reaches other hosts by pdsh."""
    program = Path(sys.executable).with_name("deepspeed")
    if not program.exists():
        raise EnvironmentProblem("--launch deepspeed: deepspeed is not installed; pip install deepspeed")
    if hosts_path is None:
        where = ["--num_gpus", str(hosts[0].num_ranks)]
    else:
        where = ["--hostfile", hosts_path, "--num_gpus", str(max(host.num_ranks for host in hosts))]
        where += ["--master_addr", hosts[0].address, "--master_port", master_port(hosts)]
        # pdsh hands on no variables; DeepSpeed writes those of this file into its commands
        exported = Path(environment[FAILURES], "environment")
        shown = {name: value for name, value in _exported().items() if not SECRET.search(name)}  # to all who ask `ps`
        write_atomic(exported, "".join(f"{name}={value}\n" for name, value in (shown | environment).items()))
        environment = environment | {"DS_ENV_FILE": str(exported)}
    command = [sys.executable, str(program), "--no_local_rank", *where, "--module", "cpo_fast", *arguments]
    return [Command(command, "deepspeed", environment)]


def with_slurm(
    arguments: Sequence[str], hosts: Sequence[Host], environment: dict[str, str], hosts_path: str | None
) -> list[Command]:
    """One `srun` in the allocation of this job."""
    if shutil.which("srun") is None:
        raise EnvironmentProblem(
            "--launch slurm: there is no srun on this host; start it on a login node of the cluster"
        )
    if "SLURM_JOB_ID" not in os.environ:
        raise EnvironmentProblem(
            "--launch slurm: this shell has no Slurm allocation; ask for one (salloc), or write a job with --sbatch FILE"
        )
    ranks, num_ranks = [], hosts[0].num_ranks
    if num_ranks > 1:
        # without --ntasks, an allocation of so many tasks (salloc -n) overrules --ntasks-per-node
        num_tasks = num_ranks * int(os.environ.get("SLURM_JOB_NUM_NODES", "1"))
        ranks = ["--ntasks", str(num_tasks), "--ntasks-per-node", str(num_ranks)]
    command = ["srun", "--kill-on-bad-exit=1", *ranks, sys.executable, "-m", "cpo_fast", *arguments]
    return [Command(command, "srun", environment, signals=SRUN_SIGNALS)]


def sbatch_script(arguments: Sequence[str], num_nodes: int, num_ranks: int, run: str) -> str:
    """A Slurm job that trains on so many ranks of each node, and queues itself again when its time is over."""
    return SBATCH.format(
        nodes=num_nodes,
        ranks=num_ranks,
        output=run,
        folder=shlex.quote(os.getcwd()),
        command=shlex.join([sys.executable, "-m", "cpo_fast", *arguments]),
    )


def raw(command: Command) -> str:
    """A command as one would type it."""
    own_variables = {
        name: value for name, value in command.environment.items() if name not in (FAILURES, "DS_ENV_FILE")
    }
    return " ".join([*(f"{name}={value}" for name, value in own_variables.items()), shlex.join(command.arguments)])


def master_port(hosts: Sequence[Host]) -> str:
    """MASTER_PORT, or a free port of this host, or, where rank 0 is on another, one that follows from this process."""
    if "MASTER_PORT" in os.environ:
        return os.environ["MASTER_PORT"]
    if hosts[0].name:
        return str(20000 + zlib.crc32(f"{socket.gethostname()} {os.getpid()}".encode()) % 10000)
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return str(found.getsockname()[1])


def _threads(num_ranks: int) -> str:
    return str(max(1, (os.cpu_count() or 1) // num_ranks))


def _exported() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if EXPORTED.fullmatch(name)}


def _on_hosts(commands: Sequence[Command], hosts: Sequence[Host], grace: float) -> list[Command]:
    """An agent for each host, that starts those of `commands` that belong there."""
    shell = shlex.split(os.environ.get(REMOTE_SHELL, SSH))
    if shutil.which(shell[0]) is None:
        raise EnvironmentProblem(f"--hosts: there is no {shell[0]} on this host; install it, or set {REMOTE_SHELL}")
    variables = [f"{name}={os.environ[name]}" for name in NEEDED_TO_START if name in os.environ]
    line = f"cd {shlex.quote(os.getcwd())} && exec " + shlex.join(
        ["env", *variables, sys.executable, "-m", "cpo_fast.cli.agent"]
    )
    agents, left, exported = [], list(commands), _exported()
    for index, host in enumerate(hosts):
        num_own = 1 if len(commands) == len(hosts) else host.num_ranks  # launchers, or ranks
        own_commands, left = left[:num_own], left[num_own:]
        own_commands = [
            Command(each.arguments, each.label, exported | each.environment, each.is_shown) for each in own_commands
        ]
        agents.append(
            Command(
                [*shell, host.name, line],
                f"host {host.name}",
                is_shown=index == 0,
                order=order(own_commands, os.getcwd(), grace),
            )
        )
    return agents


def _first_failure(notes: Path, code: int) -> int:
    """The exit code of the rank that failed first, by the notes that ranks have left, and its error once more.

    A rank that left none, where others say that somebody is gone, was killed.
    """
    found = {int(file.stem): json.loads(file.read_text(encoding="utf-8")) for file in notes.glob("[0-9]*.json")}
    if not found:
        return code
    followers = {EnvironmentProblem.exit_code}
    if code == KILLED:
        followers.add(STOPPED)  # srun says that a rank was killed, and has then sent SIGTERM to the others
    leading = {rank: note for rank, note in found.items() if note["exit_code"] not in followers}
    world_size = max(int(note["world_size"]) for note in found.values())  # how many tasks srun starts, Slurm decides
    silent = [rank for rank in range(world_size) if rank not in found]
    if not leading and silent and (code == KILLED or "gone" in "".join(note["text"] for note in found.values())):
        click.echo(f"rank {silent[0]} ended without a word, as one that is killed does", err=True)
        return KILLED
    rank, note = min((leading or found).items(), key=lambda item: float(item[1]["at"]))
    click.echo(f"rank {rank} failed first: {note['text']}", err=True)
    # srun has passed an interrupt on as another signal
    return INTERRUPTED if code == INTERRUPTED and note["exit_code"] == STOPPED else int(note["exit_code"])
