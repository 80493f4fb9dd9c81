"""Collects, kills and restarts: `python -m tests.search.kill_runs FOLDER ENGINE NUM_KILLS SEED`.

One process imports and builds the tiny model once and forks a child for every worker, so that a restart costs no
import. Each restart draws the number of workers anew, and the moment at which each is killed. Lines are written in two
halves with a pause between, so that a kill meets half a line now and then. Prints a line for each kill; exit code 0
says that after every kill no file held a damaged line, no worker lost more than what it had in flight, no answer that was
noted was ever computed again, and whenever all questions were finished the bytes were those of an undisturbed run. A wave
holds no more lines than the smallest question asks for, so a kill costs no more than one question.
"""

import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from cpo_fast.config import Config, SearchConfig, validate_config
from cpo_fast.files import canonical_json
from cpo_fast.search import tree_store
from cpo_fast.search.answer_cache import item_digest
from cpo_fast.search.collect import collect, configured_engine
from cpo_fast.search.engine import SampleRequest, ScoreRequest
from cpo_fast.search.tree_store import Worker, worker_files
from cpo_fast.tasks import Prompts
from cpo_fast.tree import SearchTree, read_trees
from tests.search.listening_engine import ListeningEngine
from tests.search.tiny_llama import build_model, build_tokenizer

NUM_QUESTIONS = 6
IN_FLIGHT = {"hf": 1, "arena": 3}
MAX_ROWS = 4  # of a wave
HALF_LINE_SECONDS = 0.03
MAX_WORKERS = 3
MAX_RESTARTS_PER_KILL = 20  # a worker may be done before its turn to be killed comes


class KillRuns:
    """One engine's kills."""

    def __init__(self, folder: Path, engine: str, seed: int) -> None:
        self.random = random.Random(seed)
        self.folder, self.engine = folder, engine
        self.tokenizer = build_tokenizer()
        ids = self.tokenizer.convert_tokens_to_ids
        bias = {ids("\n"): 6.0, ids("Answer:"): 5.0, ids("</s>"): 2.0, ids("1"): 4.0, ids("2"): 4.0}
        self.model = build_model(len(self.tokenizer), bias)
        folder.mkdir(parents=True, exist_ok=True)
        rows = [{"id": f"q{number}", "question": f"how many {'a b ' * number}"} for number in range(NUM_QUESTIONS)]
        (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        self.num_kills = self.num_torn = self.num_cycles = self.num_kept = 0

        reference = self.config("reference")
        started = time.perf_counter()
        _wait(self.fork(reference, Worker(), None))
        self.seconds = time.perf_counter() - started
        self.expected = _files(reference)
        self.lines = {tree.id: canonical_json(tree.to_dict()) for tree in _trees(reference)[0]}
        assert len(self.lines) == NUM_QUESTIONS
        fewest = min(sum(node.count for node in tree.nodes) + tree.num_empty for tree in _trees(reference)[0])
        assert fewest >= MAX_ROWS, f"a kill may cost {MAX_ROWS} lines, and a question asks for {fewest}"

    def config(self, run: str) -> Config:
        settings = {"num_candidates": 4, "num_kept": 2, "max_steps": 3, "max_thought_tokens": 12, "arena_tokens": 6000,
                    "batch_size": MAX_ROWS}  # fmt: skip
        return validate_config(
            {
                "run": str(self.folder / run),
                "task": {"path": str(self.folder / "questions.jsonl")},
                "search": {"engine": self.engine, "questions_in_flight": IN_FLIGHT["arena"], **settings},
            }
        )

    def fork(self, config: Config, worker: Worker, audit: Path | None) -> int:
        """A child that collects as `worker` and writes the ids that it starts to `audit`; its process id."""
        child = os.fork()
        if child:
            return child
        code = 1
        try:
            make_engine = configured_engine
            if audit is not None:
                make_engine = _listening(audit, Path(config.run) / "noted")
                tree_store.append_line = _append_slowly  # type: ignore[assignment]
            collect(config, self.model, self.tokenizer, worker=worker, make_engine=make_engine)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)

    def run(self, num_kills: int) -> None:
        """Kill until there were `num_kills`, then let the last run end."""
        num_restarts = 0
        while self.num_kills < num_kills:
            self.restart(self.random.randint(1, MAX_WORKERS), num_kills)
            num_restarts += 1
            assert num_restarts < MAX_RESTARTS_PER_KILL * num_kills, "workers end before they can be killed"
        num_cycles = self.num_cycles
        self.restart(1, 0)
        assert self.num_cycles == num_cycles + 1, "one worker that nobody kills finishes the run"

    def restart(self, count: int, num_kills: int) -> None:
        """One child for each worker; each is killed at a random moment while fewer than `num_kills` were."""
        config = self.config("killed")
        children = {}
        for index in range(count):
            audit = self.folder / f"audit-{index}"
            audit.unlink(missing_ok=True)
            children[Worker(index, count)] = (self.fork(config, Worker(index, count), audit), audit)
        moments = sorted((self.random.uniform(0, self.seconds), worker.index, worker) for worker in children)
        started = time.perf_counter()
        for moment, _, worker in moments:
            child, audit = children[worker]
            if self.num_kills >= num_kills:
                _wait(child)
                continue
            time.sleep(max(0.0, started + moment - time.perf_counter()))
            os.kill(child, signal.SIGKILL)
            if _wait(child) != -signal.SIGKILL:
                continue
            self.num_kills += 1
            num_finished, num_lost = self.check(config, audit)
            _say(
                f"kill {self.num_kills}: {self.engine}, worker {worker.index}/{worker.count} after {moment:.2f} s; "
                f"{num_finished} of {NUM_QUESTIONS} finished, {num_lost} in flight, {self.num_kept} of their answers kept"
            )
        self.compare()

    def check(self, config: Config, audit: Path) -> tuple[int, int]:
        """No damaged line, and no more lost than was in flight: (questions finished, questions of this child lost)."""
        trees, num_torn = _trees(config)
        self.num_torn += num_torn
        for tree in trees:
            assert canonical_json(tree.to_dict()) == self.lines[tree.id], f"{tree.id} differs"
        finished = {tree.id for tree in trees}
        started = audit.read_text().split() if audit.exists() else []
        assert len(started) == len(set(started)), started
        lost = set(started) - finished
        assert len(lost) <= IN_FLIGHT[self.engine], f"lost {sorted(lost)}"
        noted = Counter(_noted(config))
        twice = [name for name, count in noted.items() if count > 1]
        assert not twice, f"computed again: {twice[:3]}"
        self.num_kept = sum(name.split()[0] in lost for name in noted)
        return len(finished), len(lost)

    def compare(self) -> None:
        """Where every question is finished: compare, and start over."""
        config = self.config("killed")
        missing = NUM_QUESTIONS - len({tree.id for tree in _trees(config)[0]})
        path = Path(config.run) / "trees.jsonl"
        # a worker that was killed between its last question and the joining leaves that to the next
        if missing == 0 and path.exists() and not worker_files(path) and _files(config).keys() == self.expected.keys():
            assert _files(config) == self.expected, "the bytes are not those of an undisturbed run"
            assert not (Path(config.run) / "answers").exists(), "answers of finished questions were left behind"
            shutil.rmtree(config.run)
            self.num_cycles += 1


def _listening(audit: Path, noted: Path) -> Callable[[SearchConfig, Prompts, Any], ListeningEngine]:
    """Engines that write the questions which a child starts to `audit`, and every answer that it has kept to `noted`."""

    def write(path: Path, line: str) -> None:
        with open(path, "ab", buffering=0) as file:
            file.write(f"{line}\n".encode())

    def note(name: str, item: SampleRequest | ScoreRequest) -> None:
        write(noted, f"{name} {item_digest(item)}")

    def make_engine(config: SearchConfig, prompts: Prompts, model: Any) -> ListeningEngine:
        engine = configured_engine(config, prompts, model)
        return ListeningEngine(engine, on_start=lambda name: write(audit, name), on_note=note)

    return make_engine


def _append_slowly(path: Path, value: object, durable: bool = True) -> None:
    line = (canonical_json(value) + "\n").encode()
    with open(path, "ab", buffering=0) as file:
        file.write(line[: len(line) // 2])
        time.sleep(HALF_LINE_SECONDS)
        file.write(line[len(line) // 2 :])


def _trees(config: Config) -> tuple[list[SearchTree], int]:
    """The whole trees in all files, and how many files end in half a line."""
    path = Path(config.run) / "trees.jsonl"
    with FileLock(path.with_name(".collect.lock")):  # a worker that is alive may be joining them
        paths = [each for each in (path, *worker_files(path)) if each.exists()]
        num_torn = sum(each.read_bytes()[-1:] not in (b"\n", b"") for each in paths)
        return [tree for each in paths for tree in read_trees(each, drop_torn_tail=True)], num_torn


def _noted(config: Config) -> list[str]:
    """Question and digest of every answer that was noted, whole lines only."""
    path = Path(config.run) / "noted"
    return path.read_text().split("\n")[:-1] if path.exists() else []


def _files(config: Config) -> dict[str, bytes]:
    names = ("trees.jsonl", "statistics.jsonl")
    return {name: (Path(config.run) / name).read_bytes() for name in names if (Path(config.run) / name).exists()}


def _wait(child: int) -> int:
    """Wait for a child: 0, or minus the signal that ended it."""
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, -signal.SIGKILL), f"a worker ended with {code}"
    return code


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def main() -> None:
    """See the module."""
    folder, engine, num_kills, seed = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    torch.set_num_threads(1)
    runs = KillRuns(folder, engine, seed)
    runs.run(num_kills)
    _say(f"done: {runs.num_kills} kills, {runs.num_torn} of them in the middle of a line, {runs.num_cycles} whole runs")


if __name__ == "__main__":
    main()
