"""Several workers, killed and restarted in any number: the bytes of one undisturbed process, nothing lost or doubled."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from cpo_fast.config import Config, SearchConfig
from cpo_fast.errors import DataError, EnvironmentProblem
from cpo_fast.search.collect import collect, configured_engine
from cpo_fast.search.statistics import CollectResult
from cpo_fast.search.tree_store import Worker, worker_files
from cpo_fast.tasks import Prompts
from cpo_fast.tree import SearchTree
from tests.search.hash_engine import HashEngine
from tests.search.listening_engine import ListeningEngine

NUM_QUESTIONS = 7
Files = dict[str, bytes]
Collect = Callable[..., CollectResult]
MakeConfig = Callable[..., Config]
_references: dict[str, Files] = {}


@pytest.fixture(params=["script", "model"])
def many(request, make_config) -> MakeConfig:
    """many(run) -> a configuration: seven questions for an engine of hashes, three for the real one."""
    if request.param == "script":
        rows = [{"id": f"q{number}", "question": f"how many {number}"} for number in range(NUM_QUESTIONS)]
        Path(make_config().task.path).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return make_config


@pytest.fixture
def searched() -> list[str]:
    """Ids of the questions whose search was started, in order."""
    return []


@pytest.fixture
def gather(request, model, tokenizer, searched) -> Collect:
    """`collect` with the engine that `many` says, which writes down whose search it starts."""

    def make_engine(config: SearchConfig, prompts: Prompts, model: Any) -> ListeningEngine:
        script = request.node.callspec.params["many"] == "script"
        engine = HashEngine(tokenizer, width=3) if script else configured_engine(config, prompts, model)
        return ListeningEngine(engine, on_start=searched.append)

    return partial(collect, model=model, tokenizer=tokenizer, make_engine=make_engine)


def _files(config):
    folder = Path(config.run)
    return {name: (folder / name).read_bytes() for name in ("trees.jsonl", "statistics.jsonl")}


def _ids(path):
    return [json.loads(line)["id"] for line in path.read_text().splitlines()]


def _stop(*_):
    raise KeyboardInterrupt


@pytest.fixture
def undisturbed(request, many, gather, searched) -> Files:
    """Files of one worker that nobody disturbed."""
    kind = request.node.callspec.params["many"]
    if kind not in _references:
        config = many("undisturbed")
        gather(config)
        _references[kind] = _files(config)
        searched.clear()
    return _references[kind]


@pytest.mark.parametrize("count", [2, 3])
def test_any_number_of_workers_gives_the_bytes_of_one(many, gather, undisturbed, count):
    config = many(f"workers{count}")
    folder = Path(config.run)
    results = [gather(config, worker=Worker(index, count)) for index in range(count)]
    assert _files(config) == undisturbed
    statuses = {json.loads(line)["status"] for line in undisturbed["trees.jsonl"].splitlines()}
    assert "ok" in statuses
    *early, last = results
    for index, result in enumerate(early):
        assert result.num_missing > 0
        assert result.trees_path == str(folder / f"trees.worker-{index}-of-{count}.jsonl")
    assert (last.num_missing, last.trees_path) == (0, str(folder / "trees.jsonl"))
    assert worker_files(folder / "trees.jsonl") == worker_files(folder / "timings.jsonl") == []
    assert _ids(folder / "timings.jsonl") == _ids(folder / "trees.jsonl")


def test_a_restart_with_another_number_searches_only_what_no_file_holds(many, gather, undisturbed, searched):
    config = many("restarted")
    folder = Path(config.run)
    gather(config, worker=Worker(0, 3))
    with pytest.raises(KeyboardInterrupt):
        gather(config, progress=_stop, worker=Worker(1, 2))
    part = folder / "trees.worker-1-of-2.jsonl"
    finished = [*_ids(folder / "trees.worker-0-of-3.jsonl"), *_ids(part)]
    assert len(_ids(part)) == 1
    with open(part, "ab") as file:
        file.write(undisturbed["trees.jsonl"][:100])  # half a line, without its newline
    with open(folder / "timings.worker-1-of-2.jsonl", "ab") as file:
        file.write(b'{"id": "q')
    searched.clear()
    result = gather(config)
    assert result.num_resumed == len(finished)
    assert sorted(searched + finished) == sorted(_ids(folder / "trees.jsonl"))
    assert _files(config) == undisturbed
    assert worker_files(folder / "trees.jsonl") == []
    assert sorted(_ids(folder / "timings.jsonl")) == sorted(_ids(folder / "trees.jsonl"))


def test_a_killed_worker_cuts_its_half_line_and_goes_on(many, gather, undisturbed, searched):
    config = many("killed")
    part = Path(config.run) / "trees.worker-0-of-2.jsonl"
    with pytest.raises(KeyboardInterrupt):
        gather(config, progress=_stop, worker=Worker(0, 2))
    (first,) = _ids(part)
    with open(part, "ab") as file:
        file.write(b'{"adapter_hash":"","answ')
    searched.clear()
    gather(config, worker=Worker(0, 2))
    assert first not in searched
    assert part.read_bytes().endswith(b"}\n")
    gather(config, worker=Worker(1, 2))
    assert _files(config) == undisturbed


def test_a_crash_between_joining_and_removing_doubles_nothing(many, gather, undisturbed, searched, monkeypatch):
    config = many("joined")
    folder = Path(config.run)
    gather(config, worker=Worker(0, 2))
    unlink = Path.unlink

    def crash(path: Path, missing_ok: bool = False) -> None:
        if path.name.startswith("trees.worker"):
            raise KeyboardInterrupt
        unlink(path, missing_ok)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", crash)
        with pytest.raises(KeyboardInterrupt):
            gather(config, worker=Worker(1, 2))
    assert len(worker_files(folder / "trees.jsonl")) == 2
    searched.clear()
    assert gather(config, worker=Worker(0, 2)).num_missing == 0
    assert searched == []
    assert _files(config) == undisturbed
    assert worker_files(folder / "trees.jsonl") == worker_files(folder / "timings.jsonl") == []
    assert _ids(folder / "timings.jsonl") == _ids(folder / "trees.jsonl")


@pytest.mark.parametrize("worker", [Worker(), Worker(0, 2)])
def test_a_second_process_of_the_same_number_is_refused_and_another_is_not(many, gather, worker):
    config = many("locked")
    refusals = []

    def start_again(*_):
        with pytest.raises(EnvironmentProblem) as caught:
            gather(config, worker=worker)
        refusals.append(str(caught.value))
        if worker.count == 2 and len(refusals) == 1:
            gather(config, worker=Worker(1, 2))

    gather(config, progress=start_again, worker=worker)
    sentence = f"another process collects here as worker {worker.index}/{worker.count}; wait for it, or give this one"
    assert set(refusals) == {f"{config.run}: {sentence} another number with --worker I/N"}
    assert gather(config, worker=worker).num_missing == 0  # the lock was given back


def test_a_worker_alone_reads_nothing_back_and_writes_again_only_to_change_the_order(
    many, gather, undisturbed, monkeypatch, request
):
    config = many("alone")
    path = Path(config.run) / "trees.jsonl"
    finished, inodes, reads = [], [], []
    read = Path.read_bytes

    def listen(file: Path) -> bytes:
        reads.append(file)
        return read(file)

    def note(number: int, total: int, tree: SearchTree, seconds: float) -> None:
        finished.append(tree.id)
        inodes.append(path.stat().st_ino)
        reads.clear()

    monkeypatch.setattr(Path, "read_bytes", listen)
    gather(config, progress=note)
    assert path not in reads
    in_order = request.node.callspec.params["many"] == "model"  # the engine of hashes ends every third search first
    assert (finished == _ids(path)) is in_order
    assert (path.stat().st_ino == inodes[-1]) is in_order
    assert _files(config) == undisturbed


def test_a_worker_alone_doubles_nothing_that_others_finished_meanwhile(many, gather, undisturbed):
    config = many("joined meanwhile")
    seen = []

    def overtake(*_: Any) -> None:
        if not seen:
            seen.extend(gather(config, worker=Worker(index, 2)).num_missing for index in range(2))

    assert gather(config, progress=overtake).num_missing == 0
    assert seen[1] == 0
    assert _files(config) == undisturbed
    assert sorted(_ids(Path(config.run) / "timings.jsonl")) == sorted(_ids(Path(config.run) / "trees.jsonl"))


def test_a_part_whose_worker_is_at_work_stays_until_it_is_done(many, gather, undisturbed):
    config = many("overtaken")
    part = Path(config.run) / "trees.worker-0-of-2.jsonl"
    seen = []

    def overtake(*_):
        if not seen:
            seen.append(gather(config).num_missing)
            assert part.exists()
            assert _files(config) == undisturbed

    gather(config, progress=overtake, worker=Worker(0, 2))
    assert seen == [0]
    assert not part.exists()
    assert _files(config) == undisturbed


def test_trees_of_another_search_in_a_part_are_refused_by_its_name(many, gather):
    config = many("mixed")
    gather(config, worker=Worker(0, 2))
    with pytest.raises(DataError, match=r"trees\.worker-0-of-2\.jsonl: tree .* another search configuration"):
        gather(many("mixed", temperature=0.5), worker=Worker(1, 3))


def test_settings_that_share_out_work_may_change_between_restarts(many, gather, undisturbed):
    shared = {"batch_size": 3, "questions_in_flight": 2, "arena_tokens": 5000, "prefill_tokens": 64}
    gather(many("shared"), worker=Worker(0, 2))
    config = many("shared", **shared)
    gather(config, worker=Worker(1, 2))
    assert _files(config) == undisturbed
