"""Several hosts: the file that names them, what is compared before the start, and two network namespaces as two hosts."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import yaml
from click.testing import CliRunner

from cpo_fast.cli.train import train_command
from cpo_fast.errors import ConfigError, EnvironmentProblem
from cpo_fast.launchers import REMOTE_SHELL, Host, by_itself, launch, read_hosts, with_slurm, with_torchrun
from cpo_fast.ranks import Ranks
from cpo_fast.train.communication import Communicator
from cpo_fast.train.heartbeat import Heartbeat
from cpo_fast.train.preflight import Facts, arrived, compare, table
from tests.train.runs import MakeConfig

pytestmark = pytest.mark.usefixtures("no_launcher")


def facts(**changed: Any) -> Facts:
    """What a rank finds."""
    versions = {"cpo-fast": "0.1.0", "torch": "2.13.0"}
    same = {"host": "a", "local_rank": 0, "num_local": 1, "device": "CPU", "python": "3.11.2", "versions": versions}
    return same | {"config": "c" * 64, "data": "d" * 64, "free_bytes": 5 << 30} | changed


def test_hosts_are_read_as_others_read_them(tmp_path: Path) -> None:
    path = tmp_path / "hosts"
    path.write_text("# ours\nnode-1 slots=8\n\nroot@10.0.0.2 slots=4  # the small one\nnode-3\n")
    assert read_hosts(str(path), None) == [Host("node-1", 8), Host("root@10.0.0.2", 4), Host("node-3", 1)]
    assert read_hosts(str(path), 2)[:2] == [Host("node-1", 2), Host("root@10.0.0.2", 2)]
    assert Host("root@10.0.0.2", 2).address == "10.0.0.2"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "names no host"),
        ("node-1 slots=8\nnode-1 slots=8\n", ":2: node-1 is named twice"),
        ("node-1 slots=zero\n", ":1: 'node-1 slots=zero' is not like"),
        ("node-1 slots=0\n", ":1: node-1 has 0 slots"),
        ("-oProxyCommand=evil slots=1\n", ":1: '-oProxyCommand=evil slots=1' is not like"),
        ("a;b slots=1\n", ":1: 'a;b slots=1' is not like"),
        ("node-1 slots=2\n", ":1: node-1 has 2 slots"),  # of four that were asked for
    ],
)
def test_a_wrong_file_of_hosts_is_named_by_its_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "hosts"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message.replace("(", r"\(")):
        read_hosts(str(path), 4 if "slots=2" in text else None)
    with pytest.raises(ConfigError, match="nowhere: cannot read"):
        read_hosts("nowhere", None)


def test_ranks_of_several_hosts_are_numbered_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_PORT", "1234")
    commands = by_itself(["train", "c.yaml"], [Host("a", 2), Host("b", 1)], {}, "hosts")
    places = [
        tuple(command.environment[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"))
        for command in commands
    ]
    assert places == [("0", "0", "3", "2"), ("1", "1", "3", "2"), ("2", "0", "3", "1")]
    assert {command.environment["MASTER_ADDR"] for command in commands} == {"a"}
    second = with_torchrun(["train", "c.yaml"], [Host("a", 2), Host("b", 1)], {}, "hosts")[1].arguments
    assert " ".join(second[1:]) == (
        "-m torch.distributed.run --nnodes 2 --node-rank 1 --master-addr a --master-port 1234 --nproc-per-node 1 "
        "-m cpo_fast train c.yaml"
    )


def test_slurm_is_refused_where_it_is_not(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(EnvironmentProblem, match="there is no srun on this host"):
        with_slurm(["train"], [Host("", 8)], {}, None)
    (tmp_path / "srun").touch(mode=0o755)
    with pytest.raises(EnvironmentProblem, match="no Slurm allocation"):
        with_slurm(["train"], [Host("", 8)], {}, None)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "2")
    (command,) = with_slurm(["train", "c.yaml"], [Host("", 8)], {}, None)
    assert command.arguments[:6] == ["srun", "--kill-on-bad-exit=1", "--ntasks", "16", "--ntasks-per-node", "8"]


@pytest.mark.parametrize(
    ("number", "got", "code"), [("TERM", "USR1", 143), ("INT", "USR1", 130), ("QUIT", "TERM", 137)]
)
def test_srun_gets_the_signals_that_it_passes_on(tmp_path: Path, number: str, got: str, code: int) -> None:
    # like srun it ends with 128 + the signal that ended its ranks; at SIGQUIT `own` kills what it has started
    srun = (
        "trap '' QUIT; trap 'echo USR1 >> got; exit 138' USR1; trap 'echo INT >> got' INT\n"
        f"trap 'echo TERM >> got; exit 137' TERM\nkill -{number} $PPID; while :; do sleep 0.05; done"
    )
    program = (
        "import sys; from cpo_fast.launch import Command, own; from cpo_fast.launchers import SRUN_SIGNALS\n"
        "sys.exit(own([Command(['bash', '-c', sys.argv[1]], 'srun', signals=SRUN_SIGNALS)], 600.0))"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", program, srun], cwd=tmp_path, env=environment, check=False, timeout=600
    )
    assert done.returncode == code
    assert (tmp_path / "got").read_text() == f"{got}\n"


@pytest.mark.parametrize(
    ("noted", "text", "code"),
    [
        (5, "the other ranks are gone or silent", 143),
        (143, "SIGTERM between steps", 137),  # Slurm's, for the rank that is left
    ],
)
def test_a_killed_task_of_slurm_is_found_by_the_notes_of_the_others(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    noted: int,
    text: str,
    code: int,
) -> None:
    # without --gpus the launcher does not know how many tasks srun starts
    note = f"from cpo_fast.errors import note_failure; note_failure({noted}, '{text}')"
    variables = "SLURM_PROCID=0 SLURM_STEP_NUM_TASKS=2"
    (tmp_path / "srun").write_text(f'#!/bin/sh\n{variables} "{sys.executable}" -c "{note}"\nexit {code}\n')
    (tmp_path / "srun").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert launch(["train", "c.yaml"], "slurm", [Host("", 1)], tmp_path / "run", 1.0) == 137
    assert "rank 1 ended without a word" in capsys.readouterr().err


def test_the_job_of_sbatch_signals_its_ranks_and_queues_itself_again(make_config: MakeConfig, tmp_path: Path) -> None:
    config, job = tmp_path / "c.yaml", tmp_path / "job.sh"
    values = make_config().model_dump(mode="json")
    del values["train"]["grace"]
    config.write_text(yaml.safe_dump(values))
    options = ["--sbatch", str(job), "--nodes", "4", "--gpus", "8"]
    done = CliRunner().invoke(train_command, [str(config), *options], catch_exceptions=False)
    assert f"start it with: sbatch {job}" in done.output
    text = job.read_text()
    assert f"train {config} train.grace=270 &" in text  # of the 300 seconds that it is warned before
    assert "#SBATCH --nodes=4\n#SBATCH --ntasks-per-node=8\n#SBATCH --gpus-per-node=8\n" in text
    # a Slurm whose srun is a process that ends with 143 when it is told to, and whose scontrol writes down what it is asked
    bin_ = tmp_path / "bin"
    bin_.mkdir()
    (bin_ / "srun").write_text('#!/bin/sh\ntrap "exit 143" USR1\ntouch started\nwhile :; do sleep 0.1; done\n')
    (bin_ / "scontrol").write_text('#!/bin/sh\necho "$@" > asked\n')
    for file in bin_.iterdir():
        file.chmod(0o755)
    text = text.replace(f"cd {os.getcwd()} ", f"cd {tmp_path} ")
    path = {"PATH": f"{bin_}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"}
    process = subprocess.Popen(["bash", "-c", text], env=os.environ | path)
    while not (tmp_path / "started").exists():
        time.sleep(0.05)
    process.send_signal(10)  # SIGUSR1
    assert process.wait(timeout=600) == 143
    assert (tmp_path / "asked").read_text() == "requeue 7\n"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--sbatch", "/proc/none/job.sh"], "--sbatch: /proc/none cannot be written"),
        (["--nodes", "2"], "--nodes is for the job of --sbatch FILE"),
        (["--hosts", "nowhere"], "--hosts nowhere: cannot read"),
        (["--hosts", "nowhere", "--launch", "slurm"], "the allocation says which hosts"),
    ],
)
def test_options_that_cannot_be_followed_are_refused(
    make_config: MakeConfig, tmp_path: Path, options: list[str], message: str
) -> None:
    config = tmp_path / "c.yaml"
    config.write_text(yaml.safe_dump(make_config().model_dump(mode="json")))
    with pytest.raises(ConfigError, match=message):
        CliRunner().invoke(train_command, [str(config), *options], catch_exceptions=False)


def test_ranks_that_differ_are_named_with_how() -> None:
    versions = {"cpo-fast": "0.1.0", "torch": "2.12.0"}
    other = facts(host="b", versions=versions, config="x" * 64, data="y" * 64)
    problems = compare([facts(), facts(), other, facts(data="missing")])
    assert len(problems) == 4
    assert problems[0] == "rank 2 on b has torch 2.12.0 (2.13.0 on rank 0); install the same versions everywhere"
    assert "rank 2 on b has another configuration" in problems[1]
    assert "rank 2 on b has other data" in problems[2]
    assert "rank 3 on a cannot read data.path" in problems[3]
    shown = table([facts(), other], [0, 1], {0: {"sum": "right", "folder": "shared"}})
    assert all(word in shown for word in ("torch 2.12.0", "cccccccc", "right", "not tried", "5 GiB"))


def test_ranks_that_do_not_come_are_named(caplog: pytest.LogCaptureFixture) -> None:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    store.set("facts/0", "{}")
    store.set("facts/2", "{}")
    with pytest.raises(EnvironmentProblem, match="ranks 1, 3 have not come; look at what their hosts say"):
        arrived(store, 4, 0.1, 0.1)
    assert "ranks 1, 3 have not come; waiting" in caplog.text
    for rank in (1, 3):
        store.set(f"facts/{rank}", "{}")
    assert arrived(store, 4, 0.1, 0.1) == [{}] * 4


STUCK = """
import sys, time
import torch, torch.distributed as dist
from cpo_fast.ranks import Ranks
from cpo_fast.train.communication import Communicator
from cpo_fast.train.heartbeat import Heartbeat
communicator = Communicator(Ranks(0, 2, 0, 2, "torchrun"), torch.device("cpu"))
store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
store.set("beat/1", '[0, {"host": "b", "process": 7, "doing": "step 3, micro-batch 1"}]')
# it looks every second, and for what is older than three
with Heartbeat(communicator, store, 12.0, 3.0):
    for step in range(20 if sys.argv[1] == "moving" else 2000):
        communicator.doing = f"step {step}" if sys.argv[1] == "moving" else "step 4, the exchange"
        time.sleep(0.3)
"""


@pytest.mark.parametrize(("how", "code"), [("stuck", 5), ("moving", 0)])
def test_a_rank_that_waits_too_long_says_what_all_are_at(how: str, code: int) -> None:
    """Where NCCL would end the process without a word."""
    done = subprocess.run([sys.executable, "-c", STUCK, how], capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == code, done.stderr
    if code:
        assert "rank 0: error: this rank is at step 4, the exchange for" in done.stderr
        assert "Rank 1 (process 7 on b) was at: step 3, micro-batch 1. Look at the rank that is behind" in done.stderr


def test_a_rank_is_known_by_its_process_before_the_first_interval_has_passed() -> None:
    """A rank that falls silent in the first seconds was reported as process ? on ?."""
    communicator = Communicator(Ranks(0, 2, 0, 2, "torchrun"), torch.device("cpu"))
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    store.set("beat/1", '[0, {"host": "b", "process": 7, "doing": "comparing the hosts"}]')
    with Heartbeat(communicator, store, 6e4) as heartbeat:
        assert heartbeat.others() == "Rank 1 (process 7 on b) was at: comparing the hosts. "
    # none is left in torch's C++ when the interpreter ends, which would abort the process
    assert not [thread for thread in threading.enumerate() if thread.name == "heartbeat talk"]


def run(config: Path, *options: str, **variables: str) -> "subprocess.CompletedProcess[str]":
    """Train, and wait until it ends."""
    command = [sys.executable, "-m", "cpo_fast", "train", str(config), *options]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=900, env=os.environ | variables, cwd=config.parent
    )


def remote_shell(folder: Path, lines: str) -> str:
    """A program that is called like ssh: with a host, and a line for its shell."""
    path = folder / "remote-shell"
    path.write_text(f'#!/bin/sh\nhost=$1; shift\n{lines}\nexec sh -c "$*"\n')
    path.chmod(0o755)
    return str(path)


def test_hosts_with_other_data_are_refused_before_anything_is_loaded(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config(data={"path": "pairs.jsonl"})
    here, there = tmp_path / "here", tmp_path / "there"
    rows = Path(make_config().data.path or "").read_text()
    for folder, text in ((here, rows), (there, rows[: len(rows) // 2])):
        folder.mkdir()
        (folder / "pairs.jsonl").write_text(text)
        (folder / "c.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    (here / "hosts").write_text("127.0.0.1 slots=1\nlocalhost slots=1\n")
    # the agent of the second host finds another folder under the same name
    shell = remote_shell(here, f'[ $host = localhost ] && exec unshare -m sh -c "mount --bind {there} {here} && $*"')
    if subprocess.run(["unshare", "-m", "true"], check=False, capture_output=True).returncode:
        pytest.skip("mount namespaces are not permitted here")
    done = run(here / "c.yaml", "--hosts", "hosts", **{REMOTE_SHELL: shell})
    assert done.returncode == 5, done.stderr
    assert "rank 0: error: the hosts do not fit together: rank 1 on" in done.stderr
    assert "has other data in data.path; copy the same files to every host" in done.stderr
    assert "sum over hosts" in done.stdout  # the table
    assert not (Path(config.run) / "config.yaml").exists()


@pytest.fixture
def two_hosts(tmp_path: Path) -> Iterator[dict[str, str]]:
    """Two network namespaces with a cable between them. Only addresses that were made here are used."""
    names = [f"cpo{os.getpid()}{letter}" for letter in "ab"]
    made = []

    def ip(*arguments: str) -> None:
        subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)

    try:
        for name in names:
            ip("netns", "add", name)
            made.append(name)
        ip("link", "add", "cpo0", "netns", names[0], "type", "veth", "peer", "name", "cpo0", "netns", names[1])
        for number, name in enumerate(names, start=1):
            ip("-n", name, "addr", "add", f"10.77.0.{number}/24", "dev", "cpo0")
            for link in ("cpo0", "lo"):
                ip("-n", name, "link", "set", link, "up")
    except (OSError, subprocess.CalledProcessError) as error:
        for name in made:
            ip("netns", "del", name)
        pytest.skip(f"network namespaces are not permitted here ({getattr(error, 'stderr', error)})")
    chosen = f"[ $host = 10.77.0.1 ] && name={names[0]} || name={names[1]}"
    shell = remote_shell(tmp_path, f'{chosen}\nexec ip netns exec $name sh -c "$*"')
    (tmp_path / "hosts").write_text("10.77.0.1 slots=1\n10.77.0.2 slots=1\n")
    yield {REMOTE_SHELL: shell, "GLOO_SOCKET_IFNAME": "cpo0", "namespace": names[1]}
    for name in names:
        ip("netns", "del", name)


def test_two_hosts_whose_cable_is_cut_end_and_go_on_later(
    make_config: MakeConfig,
    tmp_path: Path,
    two_hosts: dict[str, str],
    record_property: Any,
) -> None:
    timeout = 40.0
    config = make_config(max_steps=6, save_every=1, collective_timeout=timeout, heartbeat=timeout / 2)
    path, folder = tmp_path / "c.yaml", Path(config.run)
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    namespace = two_hosts.pop("namespace")
    metrics = folder / "metrics.jsonl"
    command = [sys.executable, "-m", "cpo_fast", "train", str(path), "--hosts", str(tmp_path / "hosts")]
    endless = ["train.max_steps=100000", "train.num_epochs=100000", "train.schedule=constant"]
    process = subprocess.Popen(
        [*command, *endless], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | two_hosts
    )
    while process.poll() is None and (not metrics.exists() or metrics.read_text().count("\n") < 2):
        time.sleep(0.1)
    assert process.poll() is None, process.communicate()
    subprocess.run(["ip", "-n", namespace, "link", "set", "cpo0", "down"], check=True)
    started = time.monotonic()
    shown, errors = process.communicate(timeout=600)
    seconds = time.monotonic() - started
    record_property("seconds_until_down", seconds)
    assert process.returncode == 5, errors
    assert "sum over hosts" in shown  # the table, before the first step
    assert "no sign of life" in errors or "gone or silent" in errors
    assert seconds < timeout + 5 + 30  # 30 for a machine that is busy otherwise
    step = int((folder / "checkpoints" / "LATEST").read_text().removeprefix("step-"))
    assert step >= 2

    subprocess.run(["ip", "-n", namespace, "link", "set", "cpo0", "up"], check=True)
    options = ["--hosts", str(tmp_path / "hosts"), "--allow-mismatch", "train.max_steps"]
    done = run(path, *options, *endless[1:], f"train.max_steps={step + 2}", **two_hosts)
    assert done.returncode == 0, done.stderr
    assert f"going on after step {step}" in done.stdout
    assert metrics.read_text().count("\n") == step + 2
