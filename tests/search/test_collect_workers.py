"""Several workers, killed and restarted in any number: the bytes of one undisturbed process, nothing lost or doubled."""

import json
from pathlib import Path

import pytest

from cpo_fast.errors import DataError, EnvironmentProblem
from cpo_fast.search.collect import QuestionSearch, collect
from cpo_fast.search.tree_store import TreeFile, Worker, worker_files
from tests.search.hash_engine import HashEngine

NUM_QUESTIONS = 7
_references = {}


@pytest.fixture(params=["script", "model"])
def many(request, make_config, model, tokenizer, monkeypatch):
    """many(run) -> a configuration: seven questions for an engine of hashes, three for the real one."""
    if request.param == "script":
        monkeypatch.setattr("cpo_fast.search.collect.build_engine", lambda *_: HashEngine(tokenizer, width=3))
    if request.param == "script":
        rows = [{"id": f"q{number}", "question": f"how many {number}"} for number in range(NUM_QUESTIONS)]
        Path(make_config().task.path).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return make_config


@pytest.fixture
def searched(monkeypatch):
    """Ids of the questions whose search was started, in order."""
    ids = []
    grow = QuestionSearch.grow

    def listen(self):
        ids.append(self._question.id)
        return grow(self)

    monkeypatch.setattr(QuestionSearch, "grow", listen)
    return ids


def _files(config):
    folder = Path(config.run)
    return {name: (folder / name).read_bytes() for name in ("trees.jsonl", "statistics.jsonl")}


def _ids(path):
    return [json.loads(line)["id"] for line in path.read_text().splitlines()]


def _stop(*_):
    raise KeyboardInterrupt


@pytest.fixture
def reference(request, many, model, tokenizer):
    """Files of one worker that nobody disturbed."""
    kind = request.node.callspec.params["many"]
    if kind not in _references:
        config = many("reference")
        collect(config, model, tokenizer)
        _references[kind] = _files(config)
    return _references[kind]


@pytest.mark.parametrize("count", [2, 3])
def test_any_number_of_workers_gives_the_bytes_of_one(many, model, tokenizer, reference, count):
    config = many(f"workers{count}")
    folder = Path(config.run)
    results = [collect(config, model, tokenizer, worker=Worker(index, count)) for index in range(count)]
    assert _files(config) == reference
    statuses = {json.loads(line)["status"] for line in reference["trees.jsonl"].splitlines()}
    assert "ok" in statuses
    *early, last = results
    for index, result in enumerate(early):
        assert result.num_missing > 0
        assert result.trees_path == str(folder / f"trees.worker-{index}-of-{count}.jsonl")
    assert (last.num_missing, last.trees_path) == (0, str(folder / "trees.jsonl"))
    assert worker_files(folder / "trees.jsonl") == worker_files(folder / "timings.jsonl") == []
    assert _ids(folder / "timings.jsonl") == _ids(folder / "trees.jsonl")


def test_a_restart_with_another_number_searches_only_what_no_file_holds(many, model, tokenizer, reference, searched):
    config = many("restarted")
    folder = Path(config.run)
    collect(config, model, tokenizer, worker=Worker(0, 3))
    with pytest.raises(KeyboardInterrupt):
        collect(config, model, tokenizer, progress=_stop, worker=Worker(1, 2))
    part = folder / "trees.worker-1-of-2.jsonl"
    finished = [*_ids(folder / "trees.worker-0-of-3.jsonl"), *_ids(part)]
    assert len(_ids(part)) == 1
    with open(part, "ab") as file:
        file.write(reference["trees.jsonl"][:100])  # half a line, without its newline
    with open(folder / "timings.worker-1-of-2.jsonl", "ab") as file:
        file.write(b'{"id": "q')
    searched.clear()
    result = collect(config, model, tokenizer)
    assert result.num_resumed == len(finished)
    assert sorted(searched + finished) == sorted(_ids(folder / "trees.jsonl"))
    assert _files(config) == reference
    assert worker_files(folder / "trees.jsonl") == []
    assert sorted(_ids(folder / "timings.jsonl")) == sorted(_ids(folder / "trees.jsonl"))


def test_a_killed_worker_cuts_its_half_line_and_goes_on(many, model, tokenizer, reference, searched):
    config = many("killed")
    part = Path(config.run) / "trees.worker-0-of-2.jsonl"
    with pytest.raises(KeyboardInterrupt):
        collect(config, model, tokenizer, progress=_stop, worker=Worker(0, 2))
    (first,) = _ids(part)
    with open(part, "ab") as file:
        file.write(b'{"adapter_hash":"","answ')
    searched.clear()
    collect(config, model, tokenizer, worker=Worker(0, 2))
    assert first not in searched
    assert part.read_bytes().endswith(b"}\n")
    collect(config, model, tokenizer, worker=Worker(1, 2))
    assert _files(config) == reference


def test_a_crash_between_joining_and_removing_doubles_nothing(many, model, tokenizer, reference, searched, monkeypatch):
    config = many("joined")
    folder = Path(config.run)
    collect(config, model, tokenizer, worker=Worker(0, 2))
    with monkeypatch.context() as patch:
        patch.setattr(TreeFile, "_remove", _stop)
        with pytest.raises(KeyboardInterrupt):
            collect(config, model, tokenizer, worker=Worker(1, 2))
    assert len(worker_files(folder / "trees.jsonl")) == 2
    searched.clear()
    assert collect(config, model, tokenizer, worker=Worker(0, 2)).num_missing == 0
    assert searched == []
    assert _files(config) == reference
    assert worker_files(folder / "trees.jsonl") == worker_files(folder / "timings.jsonl") == []
    assert _ids(folder / "timings.jsonl") == _ids(folder / "trees.jsonl")


@pytest.mark.parametrize("worker", [Worker(), Worker(0, 2)])
def test_a_second_process_of_the_same_number_is_refused_and_another_is_not(many, model, tokenizer, worker):
    config = many("locked")
    refusals = []

    def start_again(*_):
        with pytest.raises(EnvironmentProblem) as caught:
            collect(config, model, tokenizer, worker=worker)
        refusals.append(str(caught.value))
        if worker.count == 2 and len(refusals) == 1:
            collect(config, model, tokenizer, worker=Worker(1, 2))

    collect(config, model, tokenizer, progress=start_again, worker=worker)
    sentence = f"another process collects here as worker {worker.index}/{worker.count}; wait for it, or give this one"
    assert set(refusals) == {f"{config.run}: {sentence} another number with --worker I/N"}
    assert collect(config, model, tokenizer, worker=worker).num_missing == 0  # the lock was given back


def test_a_part_whose_worker_is_at_work_stays_until_it_is_done(many, model, tokenizer, reference):
    config = many("overtaken")
    part = Path(config.run) / "trees.worker-0-of-2.jsonl"
    seen = []

    def overtake(*_):
        if not seen:
            seen.append(collect(config, model, tokenizer).num_missing)
            assert part.exists()
            assert _files(config) == reference

    collect(config, model, tokenizer, progress=overtake, worker=Worker(0, 2))
    assert seen == [0]
    assert not part.exists()
    assert _files(config) == reference


def test_trees_of_another_search_in_a_part_are_refused_by_its_name(many, model, tokenizer):
    config = many("mixed")
    collect(config, model, tokenizer, worker=Worker(0, 2))
    with pytest.raises(DataError, match=r"trees\.worker-0-of-2\.jsonl: tree .* another search configuration"):
        collect(many("mixed", temperature=0.5), model, tokenizer, worker=Worker(1, 3))


def test_settings_that_share_out_work_may_change_between_restarts(many, model, tokenizer, reference):
    shared = {"batch_size": 3, "questions_in_flight": 2, "arena_tokens": 5000, "prefill_tokens": 64}
    collect(many("shared"), model, tokenizer, worker=Worker(0, 2))
    config = many("shared", **shared)
    collect(config, model, tokenizer, worker=Worker(1, 2))
    assert _files(config) == reference
