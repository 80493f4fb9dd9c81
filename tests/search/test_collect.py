"""`collect` on a tiny random model: equal bytes for any batch size and restart, recorded failures, refusals."""

import json
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from cpo_fast.config import Config, load_config
from cpo_fast.errors import ConfigError, DataError, Interrupted
from cpo_fast.files import canonical_json
from cpo_fast.search.collect import collect, configured_engine
from cpo_fast.search.engine import Requests, SampleRequest, ScoreRequest
from cpo_fast.search.statistics import tree_statistics
from cpo_fast.tasks import Prompts, encode_prompt, get_task
from cpo_fast.tasks.task import Question
from cpo_fast.tree import SearchTree, read_prompt, read_trees
from tests.search.listening_engine import ListeningEngine
from tests.search.tiny_llama import build_byte_tokenizer, build_model


def _bytes(config: Config) -> bytes:
    return (Path(config.run) / "trees.jsonl").read_bytes()


@pytest.fixture
def undisturbed(make_config, model, tokenizer) -> bytes:
    """The trees of a run that nobody disturbed."""
    config = make_config("reference")
    collect(config, model, tokenizer)
    return _bytes(config)


def test_the_arena_engine_finds_the_reference_engines_trees(make_config, model, tokenizer, undisturbed):
    """Same tokens, same choices; values and log-probs differ by the rounding of another order of sums."""
    config = make_config("arena", engine="arena")
    collect(config, model, tokenizer)
    found, expected = ([json.loads(line) for line in each.splitlines()] for each in (_bytes(config), undisturbed))
    for tree, other in zip(found, expected, strict=True):
        assert tree["config_hash"] != other["config_hash"]
        assert [tree[name] for name in ("id", "status", "answer", "winning_nodes", "num_thought_tokens")] == [
            other[name] for name in ("id", "status", "answer", "winning_nodes", "num_thought_tokens")
        ]
        for node, twin in zip(tree["nodes"], other["nodes"], strict=True):
            assert [node[name] for name in ("parent", "token_ids", "kept", "count", "stop")] == [
                twin[name] for name in ("parent", "token_ids", "kept", "count", "stop")
            ]
            assert node["value"] == pytest.approx(twin["value"], rel=1e-4)
            assert node["logps"] == pytest.approx(twin["logps"], rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("evaluator", ["logits", "sample"])
def test_arena_trees_are_the_same_bytes_however_the_work_is_shared_out(make_config, model, tokenizer, evaluator):
    found = set()
    verdicts = {"evaluator": evaluator, "num_verdicts": 2, "max_verdict_tokens": 4}
    less = {"batch_size": 3, "questions_in_flight": 1, "prefill_tokens": 50}
    for number, shared in enumerate(({}, less, {"arena_tokens": 4000})):
        config = make_config(f"{number}", **{"engine": "arena", **verdicts, **shared})
        collect(config, model, tokenizer)
        found.add(_bytes(config))
    assert len(found) == 1


def test_trees_are_the_same_bytes_for_any_batch_size(make_config, model, tokenizer, undisturbed):
    trees = [json.loads(line) for line in undisturbed.splitlines()]
    assert max(node["depth"] for tree in trees for node in tree["nodes"]) == 3  # the trees are not trivial
    assert any(tree["status"] == "ok" for tree in trees)
    for batch_size in (1, 3, 40):
        config = make_config(f"batch{batch_size}", batch_size=batch_size)
        collect(config, model, tokenizer)
        assert _bytes(config) == undisturbed


@pytest.mark.parametrize("settings", [{"evaluator": "sample", "num_verdicts": 3, "max_verdict_tokens": 4}])
def test_sampled_verdicts_are_the_same_bytes_for_any_batch_size(make_config, tokenizer, settings):
    ids = tokenizer.convert_tokens_to_ids
    bias = {ids("\n"): 5.0, ids("Answer:"): 4.0, ids("1"): 4.0, ids(" likely"): 4.0, ids(" impossible"): 4.0}
    talkative = build_model(len(tokenizer), bias)
    found = set()
    for batch_size in (2, 40):
        config = make_config(f"sampled{batch_size}", batch_size=batch_size, **settings)
        result = collect(config, talkative, tokenizer)
        found.add(_bytes(config))
        assert 0 < result.num_unparseable < result.num_verdicts
    assert len(found) == 1


def test_another_seed_gives_other_trees(make_config, model, tokenizer, undisturbed):
    config = make_config("seed", seed=1)
    collect(config, model, tokenizer)
    nodes = [json.loads(line)["nodes"] for line in _bytes(config).splitlines()]
    assert nodes != [json.loads(line)["nodes"] for line in undisturbed.splitlines()]


def test_a_run_killed_in_the_middle_continues_to_the_same_bytes(make_config, model, tokenizer, undisturbed):
    config = make_config("killed")

    def stop_after_first(number, total, tree, seconds):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        collect(config, model, tokenizer, progress=stop_after_first)
    assert len(_bytes(config).splitlines()) == 1
    with open(Path(config.run) / "trees.jsonl", "ab") as file:
        file.write(undisturbed.splitlines()[1][:100])  # the second transaction was torn
    searched = []
    result = collect(config, model, tokenizer, progress=lambda number, total, tree, seconds: searched.append(tree.id))
    assert searched == ["second", "third"]
    assert result.num_resumed == 1
    assert _bytes(config) == undisturbed


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_says_what_is_kept_and_records_no_failure(make_config, model, tokenizer, undisturbed, number):
    config = make_config("stopped")
    before = signal.getsignal(number)

    def stop_in_second(ask):
        if any(isinstance(item, SampleRequest) and "/second/" in item.uid for item in ask.items):
            os.kill(os.getpid(), number)

    with pytest.raises(Interrupted) as caught:
        collect(config, model, tokenizer, make_engine=_listening(stop_in_second))
    assert caught.value.exit_code == 143
    assert str(caught.value) == (
        f"{number.name}: 1 of 3 questions are finished and kept in {config.run}, with the answers to those under way; the "
        "same command goes on from there"
    )
    assert signal.getsignal(number) is before
    assert _bytes(config).splitlines() == undisturbed.splitlines()[:1]
    collect(config, model, tokenizer)
    assert _bytes(config) == undisturbed


def test_a_finished_run_searches_nothing_and_keeps_its_bytes(make_config, model, tokenizer):
    config = make_config()
    collect(config, model, tokenizer)
    before = _bytes(config)
    again = collect(config, model, tokenizer, make_engine=lambda *_: pytest.fail("searched again"))
    assert again.num_resumed == 3
    assert _bytes(config) == before


def test_every_tree_waits_for_the_disk_and_its_seconds_do_not(make_config, model, tokenizer, monkeypatch):
    synced, fsync = [], os.fsync

    def noted(descriptor):
        synced.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", noted)
    config = make_config("run")
    collect(config, model, tokenizer)
    num_trees = (Path(config.run) / "trees.jsonl").read_bytes().count(b"\n")
    assert num_trees == synced.count("trees.jsonl") > 1
    assert (Path(config.run) / "timings.jsonl").read_bytes().count(b"\n") == num_trees
    assert "timings.jsonl" not in synced


def test_trees_of_other_questions_in_the_file_are_counted(make_config, model, tokenizer, tmp_path):
    config = make_config("other")
    assert collect(config, model, tokenizer).num_other == 0
    (tmp_path / "more.jsonl").write_text('{"id": "fourth", "question": "and how many"}\n')
    more = config.model_copy(update={"task": config.task.model_copy(update={"path": str(tmp_path / "more.jsonl")})})
    result = collect(more, model, tokenizer)
    assert (result.num_questions, result.num_other, len(_bytes(config).splitlines())) == (1, 3, 4)
    assert result.to_dict()["num_other"] == 3


def test_the_file_ends_in_question_order(make_config, model, tokenizer, undisturbed):
    config = make_config("order")
    path = Path(config.run) / "trees.jsonl"
    path.parent.mkdir(parents=True)
    path.write_bytes(undisturbed.splitlines(keepends=True)[2])
    collect(config, model, tokenizer)
    assert _bytes(config) == undisturbed


def _listening(on_ask: Callable[[Requests], object]) -> Callable[..., ListeningEngine]:
    """The configured engine with somebody who hears what is asked."""
    return lambda *settings: ListeningEngine(configured_engine(*settings), on_ask=on_ask)


def test_a_question_that_raises_is_recorded_and_the_run_goes_on(make_config, model, tokenizer, undisturbed):
    def fail_on_second(ask):
        if any(isinstance(item, SampleRequest) and "/second/" in item.uid for item in ask.items):
            raise RuntimeError("the cache is on fire\nsecond line")

    config = make_config("failing")
    result = collect(config, model, tokenizer, make_engine=_listening(fail_on_second))
    trees = read_trees(Path(config.run) / "trees.jsonl")
    assert [tree.status == "failed" for tree in trees] == [False, True, False]
    assert trees[1].detail == "RuntimeError: the cache is on fire"
    assert trees[1].nodes == ()
    assert result.statuses["failed"] == 1
    assert result.first_failure == "second: RuntimeError: the cache is on fire"
    lines = _bytes(config).splitlines()
    assert [lines[0], lines[2]] == [undisturbed.splitlines()[0], undisturbed.splitlines()[2]]


@pytest.mark.parametrize(
    ("word", "status"),
    [("</s>", "no_candidates"), ("\n", "no_candidates"), ("a", "no_answer"), ("Answer:", "no_answer")],
)
def test_degenerate_models_give_a_recorded_status(make_config, tokenizer, engine, word, status):
    stuck = build_model(len(tokenizer), {tokenizer.convert_tokens_to_ids(word): 1000.0})
    for evaluator in ("logits", "sample"):
        config = make_config(f"stuck-{evaluator}", engine=engine, evaluator=evaluator, max_verdict_tokens=4)
        result = collect(config, stuck, tokenizer)
        assert result.statuses == {status: 3}
        if status == "no_answer":  # text without end is cut at the cap and never expanded
            nodes = read_trees(result.trees_path)[0].nodes
            assert [(node.stop, len(node.token_ids), node.count) for node in nodes] == [("length", 20, 5)]


def test_a_model_that_the_arena_engine_cannot_compute_is_a_configuration_error(make_config, tokenizer):
    broken = build_model(len(tokenizer), {0: float("nan")})
    with pytest.raises(
        ConfigError, match=r"search\.engine: arena: LlamaForCausalLM cannot run .*; set search\.engine=hf"
    ):
        collect(make_config("nan", engine="arena"), broken, tokenizer)


def test_a_model_of_nans_fails_every_question_and_says_why(make_config, tokenizer):
    broken = build_model(len(tokenizer), {0: float("nan")})
    result = collect(make_config("nan"), broken, tokenizer)
    assert result.statuses == {"failed": 3}
    assert "logits are not finite" in result.first_failure


def test_root_ids_are_what_the_tokenizer_makes_of_the_whole_prompt(make_config, model, tokenizer):
    result = collect(make_config("prompt"), model, tokenizer)
    task = get_task("svamp")
    for tree in read_trees(result.trees_path):
        prompt = read_prompt(result.trees_path, tree.prompt_hash)
        whole = encode_prompt(tokenizer, task.prompt(Question(tree.id, tree.question)))
        assert tree.root_ids(prompt) == whole
        assert prompt.text + tree.question_prompt == task.prompt(Question(tree.id, tree.question))
        assert tree.num_shared_tokens > 100


def test_node_ids_are_the_ids_the_model_samples_under_their_state(make_config, model, tokenizer):
    """Rebuild one level-2 thought from the file alone, without cache or batch."""
    from cpo_fast.search.engine.sampler import choose_token, uniforms
    from cpo_fast.search.state_evaluator import state_digest

    config = make_config("rebuild")
    trees = read_trees(collect(config, model, tokenizer).trees_path)
    tree, node = next((tree, node) for tree in trees for node in tree.nodes if node.depth == 2)
    prompt = read_prompt(Path(config.run) / "trees.jsonl", tree.prompt_hash)
    ids = [*tree.root_ids(prompt), *tree.path_ids(node.parent)]
    first = tree.children(node.parent)[0]
    table = uniforms(f"0/{tree.id}/thought/{state_digest(ids)}/0", 20)
    for position, expected in enumerate(first.token_ids):
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, -1].double().numpy()
        assert choose_token(logits, float(table[position]), 0.9, 1.0) == expected
        ids.append(expected)


@pytest.mark.parametrize("answers", [[12, None, 2], [5, 5, 5], [None, None, None]])
def test_shuffled_gold_labels_change_no_byte_but_their_own(
    make_config, model, tokenizer, undisturbed, tmp_path, answers
):
    questions = tmp_path / "questions.jsonl"
    rows = [json.loads(line) for line in questions.read_text().splitlines()]
    rows = [{**row, "answer": answer} for row, answer in zip(rows, answers, strict=True)]
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = make_config("gold")
    collect(config, model, tokenizer)
    golds = [None if answer is None else str(answer) for answer in answers]
    expected = [{**json.loads(line), "gold": gold} for line, gold in zip(undisturbed.splitlines(), golds, strict=True)]
    assert _bytes(config) == "".join(canonical_json(tree) + "\n" for tree in expected).encode()


@pytest.mark.parametrize(
    "settings",
    [{}, {"keep_ties": True}, {"strategy": "dfs", "dfs_threshold": 0.0, "max_nodes": 8}, {"strategy": "mcts"}],
)
def test_the_same_run_twice_and_another_batch_size_give_equal_bytes(make_config, model, tokenizer, settings):
    found = set()
    for run, batch_size in (("once", 40), ("twice", 40), ("thirds", 3)):
        config = make_config(run, batch_size=batch_size, **settings)
        collect(config, model, tokenizer)
        found.add((_bytes(config), (Path(config.run) / "statistics.jsonl").read_bytes()))
    ((trees, _),) = found
    assert len(trees.splitlines()) == 3


def test_questions_that_abstain_are_counted_and_name_another_search(make_config, model, tokenizer, undisturbed):
    before = [json.loads(row) for row in undisturbed.splitlines()]
    best = max(row["nodes"][winner]["value"] for row in before for winner in row["winning_nodes"])
    config = make_config("abstained", min_value=min(best + 1e-3, 10.0))
    result = collect(config, model, tokenizer)
    num_ok = sum(row["status"] == "ok" for row in before)
    assert result.statuses["abstained"] == num_ok > 0
    assert (result.num_correct, result.num_winning_paths) == (0, 0)
    trees = read_trees(result.trees_path)
    assert [list(tree.nodes) for tree in trees] == [list(SearchTree.from_dict(row).nodes) for row in before]
    statistics = (Path(config.run) / "statistics.jsonl").read_text().splitlines()
    assert [json.loads(row)["status"] for row in statistics] == [tree.status for tree in trees]
    with pytest.raises(DataError, match="another search configuration"):
        collect(make_config("abstained"), model, tokenizer)


def test_depth_first_trees_differ_from_breadth_first_ones_and_keep_their_budget(
    make_config, model, tokenizer, undisturbed
):
    config = make_config("dfs", strategy="dfs", dfs_threshold=0.0, max_nodes=6)
    trees = read_trees(collect(config, model, tokenizer).trees_path)
    assert all(len(tree.nodes) < 6 + 5 for tree in trees)
    assert any(len(tree.nodes) >= 6 for tree in trees)
    first = SearchTree.from_dict(json.loads(undisturbed.splitlines()[0]))
    # the first expansion is that of the root in both, and its samples have the same names
    assert [node.token_ids for node in trees[0].children(-1)] == [node.token_ids for node in first.children(-1)]
    assert trees[0].config_hash != first.config_hash


def test_statistics_stand_beside_the_trees_and_add_up(make_config, model, tokenizer):
    config = make_config("statistics", evaluator="sample", num_verdicts=2, max_verdict_tokens=3)
    result = collect(config, model, tokenizer)
    trees = read_trees(result.trees_path)
    rows = [json.loads(line) for line in (Path(config.run) / "statistics.jsonl").read_text().splitlines()]
    assert rows == [json.loads(canonical_json(tree_statistics(tree).to_dict())) for tree in trees]
    assert result.num_generated_tokens == sum(row["num_generated_tokens"] for row in rows)
    assert result.num_useful_tokens == sum(row["num_useful_tokens"] for row in rows) > 0
    assert 0 < sum(row["num_verdict_tokens"] for row in rows) < result.num_generated_tokens
    unique = sum(len(node.token_ids) for tree in trees for node in tree.nodes)
    thought_tokens = sum(row["num_generated_tokens"] - row["num_verdict_tokens"] for row in rows)
    assert thought_tokens > unique  # duplicates, empty samples and ends of sequence were generated too


def _seen_by_the_evaluator(config: Config, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """Texts of the evaluator prompts of a run."""
    seen = []

    def listen(ask: Requests) -> None:
        seen.extend(tokenizer.decode(item.token_ids) for item in ask.items if isinstance(item, ScoreRequest))

    collect(config, model, tokenizer, make_engine=_listening(listen))
    return seen


def test_the_seed_orders_the_evaluators_demonstrations_and_off_keeps_the_written_order(make_config, model):
    tokenizer = build_byte_tokenizer()
    model = build_model(len(tokenizer), {tokenizer.convert_tokens_to_ids("\u010a"): 4.0})
    small = {"num_candidates": 1, "num_kept": 1, "max_steps": 1}
    begins = {}
    for seed, shuffle in ((0, True), (2, True), (0, False)):
        config = make_config(f"{seed}{shuffle}", seed=seed, shuffle_evaluator=shuffle, **small)
        seen = _seen_by_the_evaluator(config, model, tokenizer)
        few_shot = get_task("svamp", evaluator_seed=seed if shuffle else None).few_shot_evaluator
        assert seen
        assert all(text.removeprefix("<s>").startswith(few_shot) for text in seen)
        begins[seed, shuffle] = few_shot
    assert len(set(begins.values())) == 3
    assert {"".join(sorted(text)) for text in begins.values()} == {"".join(sorted(begins[0, False]))}


def test_a_chat_is_asked_through_the_template_and_its_tree_tells_the_whole_prompt(make_config):
    tokenizer = build_byte_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}<|assistant|>"
    model = build_model(len(tokenizer), {tokenizer.convert_tokens_to_ids("\u010a"): 4.0})
    config = make_config("chat", num_candidates=2, num_kept=1, max_steps=2)
    chat = config.model_copy(update={"task": config.task.model_copy(update={"chat": True})})
    seen = _seen_by_the_evaluator(chat, model, tokenizer)
    assert all(text.startswith("<|user|>") and "<|assistant|>Is the last line" in text for text in seen)
    result = collect(chat, model, tokenizer)
    task = get_task("svamp")
    for tree in read_trees(result.trees_path):
        prompt = read_prompt(result.trees_path, tree.prompt_hash)
        question = Question(tree.id, tree.question)
        assert tree.root_ids(prompt) == Prompts(task, tokenizer, chat=True).encode(question)
        assert tokenizer.decode(tree.root_ids(prompt)) == prompt.text + tree.question_prompt
        assert tree.question_prompt.endswith("<|assistant|>")
        assert tree.num_shared_tokens > len(task.few_shot)
    with pytest.raises(DataError, match="another few-shot prompt"):
        collect(config.model_copy(update={"run": chat.run}), model, tokenizer)
    tokenizer.chat_template = None
    with pytest.raises(ConfigError, match="no chat template"):
        collect(chat.model_copy(update={"run": f"{chat.run}-none"}), model, tokenizer)


def test_trees_of_another_search_are_refused_by_name(make_config, model, tokenizer):
    collect(make_config("shared"), model, tokenizer)
    with pytest.raises(DataError, match=r"another search configuration.*another folder"):
        collect(make_config("shared", temperature=0.5), model, tokenizer)
    with pytest.raises(DataError, match="another seed"):
        collect(make_config("shared", seed=3), model, tokenizer)
    with pytest.raises(DataError, match="another model"):
        collect(make_config("shared"), build_model(len(tokenizer), {3: 1.0}), tokenizer)


def test_a_refusal_names_the_settings_that_differ_and_their_values(make_config, model, tokenizer):
    collect(make_config("kept", temperature=0.7), model, tokenizer)
    kept = Path(make_config("kept").run) / "collect.yaml"
    content = kept.read_bytes()
    with pytest.raises(DataError, match=r"\(search\.temperature was 0\.7, is 0\.5\); set it as it was"):
        collect(make_config("kept", temperature=0.5), model, tokenizer)
    others = {"temperature": 0.5, "num_kept": 1, "max_steps": 2, "num_candidates": 3, "max_thought_tokens": 8}
    with pytest.raises(DataError) as caught:
        collect(make_config("kept", **others), model, tokenizer)
    named = re.search(r"dtype \((.*)\); set it", str(caught.value))[1].split("; ")
    assert len(named) == 4
    assert named[3] == "and 2 more"
    assert all(re.fullmatch(r"search\.(\w+) was \S+, is \S+", one) for one in named[:3])
    assert kept.read_bytes() == content  # what is refused does not take its place


def test_a_refusal_takes_no_word_of_a_configuration_that_is_not_the_trees(make_config, model, tokenizer):
    collect(make_config("kept", temperature=0.7), model, tokenizer)
    folder = Path(make_config("kept").run)
    for content in ("search: {temperature: 0.9}\n", "search: [\n"):
        (folder / "collect.yaml").write_text(content)
        with pytest.raises(DataError, match=r"dtype \([0-9a-f]{16}, this run has [0-9a-f]{16}\)"):
            collect(make_config("kept", temperature=0.5), model, tokenizer)
    (folder / "collect.yaml").unlink()
    with pytest.raises(DataError, match=r"dtype \([0-9a-f]{16}, this run has"):
        collect(make_config("kept", temperature=0.5), model, tokenizer)


def test_the_configuration_is_kept_and_a_file_that_says_the_same_is_left_alone(make_config, model, tokenizer):
    config = make_config()
    collect(config, model, tokenizer)
    kept = Path(config.run) / "collect.yaml"
    assert load_config(kept) == config
    kept.write_text("# mine\n" + kept.read_text())
    before = kept.read_bytes()
    collect(config, model, tokenizer)
    assert kept.read_bytes() == before
    faster = make_config(batch_size=3)
    collect(faster, model, tokenizer)
    assert load_config(kept) == faster


def test_an_id_that_now_names_another_question_is_refused(make_config, model, tokenizer, tmp_path):
    collect(make_config("renamed"), model, tokenizer)
    questions = tmp_path / "questions.jsonl"
    questions.write_text(questions.read_text().replace("and why not", "something else"))
    with pytest.raises(DataError, match="'third' is about another question"):
        collect(make_config("renamed"), model, tokenizer)


def test_missing_questions_are_a_configuration_error(make_config, model, tokenizer):
    config = make_config()
    with pytest.raises(ConfigError, match=r"task\.path is empty"):
        collect(config.model_copy(update={"task": config.task.model_copy(update={"path": ""})}), model, tokenizer)
    with pytest.raises(ConfigError, match="leaves no question"):
        collect(
            config.model_copy(update={"task": config.task.model_copy(update={"skip_questions": 3})}), model, tokenizer
        )
