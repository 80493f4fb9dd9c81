"""The first minutes on a GPU: decisive figures first, every step bounded, every result on disk as it comes, one page last.

Each step is a process of its own, with a limit of its own and never more than what is left of the whole. A step that
fails, crashes or hangs is written down and stops nothing. The steps of one stage run side by side: they compile or
check, while what is timed runs alone. What a step measures goes to <results>/*.jsonl line by line, its outcome to
gpu_quick.jsonl, its output and the page to <results>/gpu_quick/. The page stands each figure beside what was predicted
and beside its bar, and is written anew after every stage.

This file needs the standard library alone. With --bundle it first installs what `gpu_bundle` made, without a network.

    python -m benchmarks.gpu_quick [--bundle build/gpu-bundle]           at most eight minutes
    python -m benchmarks.gpu_quick --more [--bundle build/gpu-bundle]    at most four, after the first
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.gpu_page import Outcome, page
from benchmarks.harness import TimeUp, end_in_time, results_folder

ROOT = Path(__file__).resolve().parent.parent
SECONDS = {False: 480, True: 240}  # of the whole; True: the follow-up
LEAST_SECONDS = 10  # with less left a step is not begun
GRACE_SECONDS = 8  # between asking a process to end, upon which it records what it has, and ending it
POLL_SECONDS = 0.05
TAIL_LINES = 12  # of a step's output in its record
NUM_TEST_PROCESSES = 8
TILE_VARIANTS = (  # names of `attention_tiles.variants`, compiled side by side before they are timed
    "shipped", "before", "two stages", "dq 64x64, 4 warps", "dq 128x64, 8 warps", "dkv 32x128, 8 warps",
    "dkv 64x128, 8 warps", "dkv 64x64, 8 warps", "forward 64x64, 4 warps",
)  # fmt: skip
OPS = ("linear_logprob", "tree_attention", "tree_decode", "sample_tokens", "fused_layers")  # of the self-check
BY_NAME = {
    "CPO_KERNELS_IMPL": "triton"
}  # not checked before use: the check's ratios stand on the page, and stop nothing
INTERPRETED = {"TRITON_INTERPRET": "1"}


@dataclass(frozen=True)
class Step:
    """A command with a limit. `arguments` follow the interpreter's name."""

    name: str
    seconds: float
    arguments: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)


Stage = tuple[Step, ...]  # side by side


def module(name: str, seconds: float, command: str, environment: Mapping[str, str] = BY_NAME) -> Step:
    """A step that runs `python -m benchmarks.<command>`; two spaces part its words, which hold single ones."""
    return Step(name, seconds, ("-m", *f"benchmarks.{command}".split("  ")), environment)


def gpu_steps() -> list[Stage]:
    """Self-check and ceilings, attention tiles, graphs, collect, the training step, the head."""
    checks = [
        module(f"check {op}, {shape}", 110, f"gpu_probes  check  --op  {op}  --shape  {shape}")
        for shape in ("7b", "default")
        for op in OPS
    ]
    compiles = [module(f"compile {name}", 110, f"gpu_probes  tiles  --compile  {name}") for name in TILE_VARIANTS]
    collect = "collect  --set  gpu  --contestants  roofline,batched  --num-questions  4  --repeats  1"
    train = "gpu_train_step  --order  questions  --baselines  TRL  --repeats  2  --max-seconds  90"
    head = "linear_logprob  --set  gpu  --heads  4096x128256  --rows  512,2048  --only  torch,floor  --runs  10"
    return [
        (*checks, *compiles),
        (module("ceilings", 40, "gpu_probes  ceilings"),),
        (module("tiles", 60, "gpu_probes  tiles"),),
        (module("graph", 75, "gpu_probes  graph"),),
        (module("collect", 105, f"{collect}  --sample-calls  12  --max-seconds  50"),),
        (module("train", 150, train),),
        (module("logprob", 60, f"{head}  --seconds-each  0.2  --max-seconds  40"),),
    ]


def more_gpu_steps() -> list[Stage]:
    """Chunk sizes of the head, DeepSpeed with one rank, FlexAttention, the tests."""
    flex = "tree_attention  --set  gpu  --heads  32x32x128  --forests  trees,chain  --only  FlexAttention  --runs  10"
    tests = [
        module(f"tests {shard + 1} of {NUM_TEST_PROCESSES}", 110, f"gpu_tests  {shard}  {NUM_TEST_PROCESSES}", {})
        for shard in range(NUM_TEST_PROCESSES)
    ]
    return [
        (module("head", 60, "gpu_probes  head"),),
        (module("training", 60, "gpu_probes  training"),),
        (module("flex", 75, f"{flex}  --seconds-each  0.2  --max-seconds  50"),),
        tuple(tests),
    ]


def cpu_steps() -> list[Stage]:
    """The same on a CPU with stand-ins: tiny shapes, kernels in Triton's interpreter where kernels are meant."""
    check = "gpu_probes  check  --device  cpu  --shape  tiny  --op  tree_decode"
    tiny = "--device  cpu  --set  tiny"
    collect = f"collect  {tiny}  --contestants  roofline,batched  --repeats  1  --sample-calls  8"
    train = "gpu_train_step  --device  cpu  --shape  tiny  --order  questions  --baselines  TRL  --repeats  1"
    return [
        (module("ceilings", 600, "gpu_probes  ceilings  --device  cpu", {}), module("check", 600, check, INTERPRETED)),
        (module("tiles", 600, "gpu_probes  tiles  --device  cpu", INTERPRETED),),
        (module("graph", 600, "gpu_probes  graph  --device  cpu", {}), module("collect", 600, collect, {})),
        (module("train", 600, train, {}),),
        (module("logprob", 600, f"linear_logprob  {tiny}  --only  torch naive  --runs  1", {}),),
    ]


def more_cpu_steps() -> list[Stage]:
    """The follow-up on a CPU with stand-ins."""
    flex = "tree_attention  --device  cpu  --set  tiny  --forests  chain  --only  FlexAttention  --runs  1"
    return [
        (module("head", 600, "gpu_probes  head  --device  cpu", {}), module("flex", 600, flex, {})),
        (
            module("tests", 600, "gpu_tests  0  8", {}),
            module("training", 600, "gpu_probes  training  --device  cpu", {}),
        ),
    ]


STEPS = {("cuda", False): gpu_steps, ("cuda", True): more_gpu_steps, ("cpu", False): cpu_steps,
         ("cpu", True): more_cpu_steps}  # fmt: skip


class Run:
    """Runs stages one after another and writes down what became of them.

    Args:
        seconds: of the whole.
        installed: a folder of packages that the steps find behind the checkout's own, or None.
        more: whether this is the follow-up.
    """

    def __init__(self, seconds: float, installed: Path | None, more: bool) -> None:
        self._end = time.monotonic() + seconds
        self._folder = results_folder() / "gpu_quick"
        self._folder.mkdir(parents=True, exist_ok=True)
        self._installed, self._more = installed, more
        self._offsets = {path: path.stat().st_size for path in results_folder().glob("*.jsonl")}
        self.outcomes: list[Outcome] = []

    def stage(self, steps: Stage) -> None:
        """Run the steps of a stage side by side until each has ended or its time is up."""
        left = self._end - time.monotonic() - GRACE_SECONDS
        if left < LEAST_SECONDS:
            for step in steps:
                self._note(Outcome(step.name, "not begun: no time was left"))
            return
        running = [_Process(step, min(step.seconds, left), self._folder, self._environment(step)) for step in steps]
        try:
            while running:
                for process in [process for process in running if process.ended()]:
                    running.remove(process)
                    self._note(process.outcome())
                time.sleep(POLL_SECONDS)
        finally:
            for process in running:
                process.kill()
                self._note(Outcome(process.step.name, "ended with the whole run", process.seconds))

    def write_page(self) -> str:
        """The page as it stands, also on disk."""
        lines: list[dict[str, Any]] = []
        for path in sorted(results_folder().glob("*.jsonl")):
            with open(path, "rb") as file:
                file.seek(self._offsets.get(path, 0))
                for line in file.read().decode(errors="replace").splitlines():
                    with contextlib.suppress(ValueError):  # a process that was killed may leave half a line
                        lines.append(json.loads(line))
        try:
            text = page(self.outcomes, lines, self._more)
        except Exception:  # what is measured is on disk, and the next step is worth more than this page
            text = f"the page could not be made:\n{traceback.format_exc()}"
        (self._folder / f"{'more' if self._more else 'page'}.txt").write_text(text, encoding="utf-8")
        return text

    def _environment(self, step: Step) -> dict[str, str]:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("CPO_KERNELS_")}
        paths = [str(ROOT), str(ROOT / "kernels"), *([str(self._installed)] if self._installed else [])]
        environment["PYTHONPATH"] = os.pathsep.join([*paths, *filter(None, [os.environ.get("PYTHONPATH")])])
        environment |= {"PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        # one folder for all: a kernel that the check compiled is not compiled again
        environment.setdefault("TRITON_CACHE_DIR", str(Path(tempfile.gettempdir()) / "cpo_fast_triton"))
        environment.setdefault("OMP_NUM_THREADS", "4")
        environment.setdefault(
            "OMP_WAIT_POLICY", "PASSIVE"
        )  # beside other processes a thread that spins takes their time
        return environment | dict(step.environment)

    def _note(self, outcome: Outcome) -> None:
        self.outcomes.append(outcome)
        with open(results_folder() / "gpu_quick.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps({"benchmark": "gpu_quick", "results": asdict(outcome)}, sort_keys=True) + "\n")
        sys.stdout.write(f"## {outcome.step}: {outcome.what}, {outcome.seconds:.0f} s\n")
        sys.stdout.flush()


class _Process:
    """A step that runs, in a process group of its own, so that its end takes all with it that it started."""

    def __init__(self, step: Step, seconds: float, folder: Path, environment: dict[str, str]) -> None:
        self.step, self._limit = step, seconds
        self._log = folder / f"{step.name.replace(' ', '_')}.log"
        self._started, self._asked = time.monotonic(), 0.0
        self._failure = ""
        try:
            with open(self._log, "wb") as log:
                self._process = subprocess.Popen(
                    [sys.executable, *step.arguments], cwd=ROOT, env=environment, start_new_session=True,
                    stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                )  # fmt: skip
        except OSError as error:
            self._process, self._failure = None, str(error)

    @property
    def seconds(self) -> float:
        """Since its start."""
        return time.monotonic() - self._started

    def ended(self) -> bool:
        """Whether it has ended; asks it to when its time is up, and ends it when it does not."""
        if self._process is None or self._process.poll() is not None:
            self.kill()  # what it started and left
            return True
        if not self._asked and self.seconds > self._limit:
            self._asked = self.seconds
            self._signal(signal.SIGTERM)
        elif self._asked and self.seconds > self._asked + GRACE_SECONDS:
            self.kill()
        return False

    def kill(self) -> None:
        """End the whole group at once."""
        self._signal(signal.SIGKILL)
        if self._process is not None:
            self._process.wait()

    def outcome(self) -> Outcome:
        """What became of it, with the end of its output."""
        if self._process is None:
            return Outcome(self.step.name, f"could not be started: {self._failure}")
        status = self._process.returncode
        if self._asked:
            what = f"timed out after {self._limit:.0f} s"
        elif status < 0:
            what = f"crashed with {signal.Signals(-status).name}"
        else:
            what = "ok" if status == 0 else f"failed with exit code {status}"
        lines = self._log.read_text(encoding="utf-8", errors="replace").splitlines()
        return Outcome(self.step.name, what, self.seconds, tuple(lines[-TAIL_LINES:]))

    def _signal(self, number: int) -> None:
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, number)


def sees_gpu() -> bool:
    """Whether torch, in a process of its own, finds a CUDA device."""
    code = "import sys, torch; sys.exit(not torch.cuda.is_available())"
    return subprocess.run([sys.executable, "-c", code]).returncode == 0


def main(argv: Sequence[str] | None = None, extra: Sequence[Stage] = ()) -> int:
    """Run all steps and print the page. `extra` stages run before the others.

    Returns:
        0 when every step ended well, else 1: what was measured is on the page either way. 1 too without a GPU, at once.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--more", action="store_true", help="the follow-up")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: everything tiny, for a test")
    parser.add_argument("--seconds", type=float, help=f"of the whole; default {SECONDS[False]}, --more {SECONDS[True]}")
    parser.add_argument("--bundle", type=Path, help="a folder made by benchmarks.gpu_bundle, installed first")
    arguments = parser.parse_args(argv)
    installed = Path(tempfile.gettempdir()) / "cpo_fast_gpu" if arguments.bundle else None
    if arguments.device == "cuda" and not sees_gpu():
        sys.stderr.write("torch sees no CUDA device, or is not installed; --device cpu runs everything tiny\n")
        return 1
    run = Run(arguments.seconds or SECONDS[arguments.more], installed, arguments.more)
    stages = [*extra, *STEPS[arguments.device, arguments.more]()]
    if installed is not None:
        install = ("-m", "benchmarks.gpu_bundle", "install", str(arguments.bundle.resolve()), str(installed))
        stages.insert(0, (Step("install", 90, install),))
    end_in_time()
    try:
        for steps in stages:
            run.stage(steps)
            run.write_page()
    except (TimeUp, KeyboardInterrupt) as error:
        sys.stdout.write(f"ended early: {type(error).__name__} {error}\n")
    sys.stdout.write(run.write_page())
    return int(any(outcome.what != "ok" for outcome in run.outcomes))


if __name__ == "__main__":
    sys.exit(main())
