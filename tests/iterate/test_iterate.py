"""Rounds are the single commands, one after the other, on the adapter of the round before."""

import gc
import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from transformers import PreTrainedModel

from cpo_fast.adapters import adapter_hash
from cpo_fast.cli import cli
from cpo_fast.config import Config, validate_config
from cpo_fast.errors import CheckpointError, ConfigError, CpoFastError, DataError
from cpo_fast.iterate import Rounds, Watch, iterate, num_without_help, run_here
from cpo_fast.tree import read_trees
from tests.iterate.rounds import DEV, QUESTIONS, results, values, write_config, write_questions

WEIGHTS = "adapter/adapter_model.safetensors"


def command(*arguments: object) -> Result:
    result = CliRunner().invoke(cli, [str(each) for each in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result


def summary_of(config: Config) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(Path(config.run, "iterate.json").read_text())
    return found


def stage(summary: dict[str, Any], number: int, name: str) -> dict[str, Any]:
    found: dict[str, Any] = summary["rounds"][number]["stages"][name]
    return found


def weights(run: Path, number: int) -> bytes:
    return (run / f"round-{number}" / WEIGHTS).read_bytes()


def test_rounds_leave_the_bytes_of_the_single_commands(whole: Config, inputs: Path, tmp_path: Path) -> None:
    path = write_config(tmp_path / "c.yaml", values(inputs, tmp_path))
    adapter: list[str] = []
    for number in (1, 2):
        run = tmp_path / f"round-{number}"
        data = f"data.path={run / 'trees.jsonl'}"
        command("collect", path, f"run={run}", *adapter)
        command("pairs", path, f"run={run}")
        if whole.iterate.method == "sft_cpo":
            command("train", path, f"run={run / 'sft'}", data, "train.method=sft", *adapter)
            adapter = [f"model.adapter={run / 'sft' / 'adapter'}"]
        command("train", path, f"run={run}", data, *adapter)
        adapter = [f"model.adapter={run / 'adapter'}"]
        command("eval", path, f"run={run}", f"eval.path={inputs / 'dev.jsonl'}", *adapter)
    single, rounds = results(tmp_path), results(Path(whole.run))
    names = [name for name in rounds if name.startswith(("round-1/", "round-2/")) and "adapter_config" not in name]
    assert {"round-2/trees.jsonl", "round-2/pairs.jsonl", "round-2/" + WEIGHTS, "round-2/metrics.jsonl"} <= set(names)
    assert ("round-2/sft/" + WEIGHTS in names) == (whole.iterate.method == "sft_cpo")
    for name in names:
        assert rounds[name] == single[name], name


def test_a_round_searches_with_the_adapter_of_the_round_before_and_trains_it_on(whole: Config) -> None:
    run = Path(whole.run)
    before = {1: None, 2: run / "round-1" / "adapter"}
    for number, adapter in before.items():
        trees = read_trees(run / f"round-{number}" / "trees.jsonl")
        assert {tree.adapter_hash for tree in trees} == {adapter_hash(adapter)}
        start = run / f"round-{number}" / "sft" / "adapter" if whole.iterate.method == "sft_cpo" else adapter
        state = json.loads(next((run / f"round-{number}/checkpoints").glob("step-*/state.json")).read_text())
        assert state["identity"]["model.adapter"] == adapter_hash(start)
        first = json.loads((run / f"round-{number}/metrics.jsonl").read_text().splitlines()[0])
        assert first["rewards/chosen"] == first["rewards/rejected"] == 0.0  # the reference is what it starts from
    assert weights(run, 1) != weights(run, 2)


def test_the_summary_says_what_the_files_hold(whole: Config) -> None:
    run, summary = Path(whole.run), summary_of(whole)
    for number in (1, 2):
        folder = run / f"round-{number}"
        trees = read_trees(folder / "trees.jsonl")
        search = stage(summary, number, "collect")
        assert search["num_questions"] == len(trees) == 2
        assert search["num_generated_tokens"] == sum(tree.num_thought_tokens for tree in trees)
        states = {(tree.id, node.parent) for tree in trees for node in tree.nodes}
        assert search["thoughts_per_state"] == sum(len(tree.nodes) for tree in trees) / len(states)
        assert search["paths_per_question"] == sum(node.complete for tree in trees for node in tree.nodes) / 2
        assert stage(summary, number, "pairs")["num_pairs"] == len((folder / "pairs.jsonl").read_text().splitlines())
        steps = (folder / "metrics.jsonl").read_text().splitlines()
        assert stage(summary, number, "train")["num_steps"] == len(steps)
        evaluation = json.loads((folder / "eval.json").read_text())["evaluations"][0]
        assert stage(summary, number, "eval")["accuracy"] == evaluation["accuracy"]
        assert stage(summary, number, "eval")["interval"] == evaluation["interval"]
        assert evaluation["num_questions"] == len(DEV)
    assert summary["stopped"] == "iterate.num_rounds=2"
    scores = [stage(summary, number, "eval")["accuracy"] for number in (0, 1, 2)]
    assert summary["best_round"] == scores.index(max(scores))


def test_the_best_round_by_dev_is_the_adapter_that_other_commands_read(
    rounds_of_cpo: Config, inputs: Path, tmp_path: Path
) -> None:
    summary = summary_of(rounds_of_cpo)
    scores = [stage(summary, number, "eval")["accuracy"] for number in (0, 1, 2)]
    assert scores[2] > max(scores[:2])  # else nothing is chosen
    adapter = Path(rounds_of_cpo.run, "adapter")
    assert summary["adapter"] == str(adapter)
    assert (adapter / "adapter_model.safetensors").read_bytes() == weights(Path(rounds_of_cpo.run), 2)
    path = write_config(tmp_path / "c.yaml", values(inputs, tmp_path / "run"))
    dev = f"eval.path={inputs / 'dev.jsonl'}"
    found = json.loads(command("eval", path, f"model.adapter={adapter}", dev, "--json").stdout)
    assert found["evaluations"][0]["accuracy"] == scores[2]
    command("merge", path, f"model.adapter={adapter}", "-o", tmp_path / "merged")
    found = json.loads(command("eval", path, f"model.path={tmp_path / 'merged'}", dev, "--json").stdout)
    assert found["evaluations"][0]["label"].startswith("base")


def test_run_again_nothing_is_made_again(rounds_of_cpo: Config) -> None:
    run = Path(rounds_of_cpo.run)
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*.jsonl")}
    lines: list[str] = []

    def refuse(name: str, config: Config) -> None:
        raise AssertionError(name)

    summary = iterate(rounds_of_cpo, Watch(on_stage=lines.append), refuse)
    assert summary == summary_of(rounds_of_cpo)
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*.jsonl")} == before
    assert [line for line in lines if line.startswith("round")] == []


def test_more_rounds_go_on_after_the_last_and_no_stage_holds_the_model_of_another(
    rounds_of_cpo: Config, inputs: Path, tmp_path: Path
) -> None:
    def models() -> set[int]:
        return {id(each) for each in gc.get_objects() if isinstance(each, PreTrainedModel)}

    def look(line: str) -> None:
        held.append((line, len(models() - before)))

    before, held = models(), list[tuple[str, int]]()
    one = validate_config(values(inputs, tmp_path / "run", iterate={"num_rounds": 1}))
    assert iterate(one, Watch(on_stage=look))["stopped"] == "iterate.num_rounds=1"
    iterate(validate_config(values(inputs, tmp_path / "run")), Watch(on_stage=look))
    assert results(tmp_path / "run") == results(Path(rounds_of_cpo.run))
    stages = [(line, number) for line, number in held if line.startswith("round")]
    assert len(stages) == 9
    assert {number for _, number in stages} == {0}, stages


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"train": {"lr": 0.01}}, "train.lr was 0.02, is 0.01"),
        ({"search": {"num_kept": 3}}, "search.num_kept was 2, is 3"),
        ({"iterate": {"patience": 1}}, "iterate.patience was 2, is 1"),
        ({"iterate": {"method": "sft_cpo"}}, "iterate.method was 'cpo', is 'sft_cpo'"),
        ({"task": {"num_questions": 3}}, "task.num_questions was 2, is 3"),
        ({"eval": {"max_new_tokens": 9}}, "eval.max_new_tokens was 20, is 9"),
        ({"pairs": {"rule": "lower"}, "seed": 2}, "pairs.rule was 'all', is 'lower'; seed was 1, is 2"),
        ({"train": {"reference_model": "base"}}, "train.reference_model was None, is 'base'"),
    ],
)
def test_another_configuration_is_refused_by_what_differs(
    rounds_of_cpo: Config, inputs: Path, changes: dict[str, Any], words: str
) -> None:
    before = results(Path(rounds_of_cpo.run))
    with pytest.raises(CheckpointError) as caught:
        iterate(validate_config(values(inputs, Path(rounds_of_cpo.run), **changes)))
    assert f"holds rounds of another configuration ({words}); set it back" in str(caught.value)
    assert results(Path(rounds_of_cpo.run)) == before


def test_other_questions_are_refused_and_another_path_or_speed_is_not(
    rounds_of_cpo: Config, inputs: Path, tmp_path: Path
) -> None:
    run = Path(rounds_of_cpo.run)
    for name, rows in {"asked": QUESTIONS, "dev": DEV}.items():
        write_questions(tmp_path / f"{name}.jsonl", list(rows))
    moved = values(inputs, run, task={"path": str(tmp_path / "asked.jsonl")}, search={"batch_size": 3})
    iterate(validate_config(moved), run_command=None)
    write_questions(tmp_path / "asked.jsonl", [*QUESTIONS[:3], ("Another one?", "1")])
    with pytest.raises(CheckpointError, match=r"\(questions was '[0-9a-f]+', is '[0-9a-f]+'\)"):
        iterate(validate_config(moved))
    dev = write_questions(inputs / "changed.jsonl", [(question, "5") for question, _ in DEV])
    with pytest.raises(CheckpointError, match="dev questions was"):
        iterate(validate_config(values(inputs, run, train={"dev_path": str(dev)})))


def test_rounds_that_do_not_help_end_and_the_first_model_stays_the_best(inputs: Path, tmp_path: Path) -> None:
    config = validate_config(values(inputs, tmp_path / "run", iterate={"num_rounds": 5, "patience": 1}))
    summary = iterate(config)
    assert [one["round"] for one in summary["rounds"]] == [0, 1]
    assert summary["stopped"] == "round 1 does not help: dev accuracy 0.000, not better than 0.000"
    assert (summary["best_round"], summary["adapter"]) == (0, None)
    assert not (tmp_path / "run" / "adapter").exists()


@pytest.mark.parametrize(
    ("scores", "min_gain", "expected"),
    [
        ([0.5], 0.0, 0),
        ([0.5, 0.6], 0.0, 0),
        ([0.5, 0.5], 0.0, 1),
        ([0.5, 0.6, 0.55], 0.0, 1),
        ([0.5, 0.4, 0.45], 0.0, 2),  # better than the round before, and not than the best
        ([0.5, 0.4, 0.6], 0.0, 0),
        ([0.5, 0.53, 0.56], 0.05, 2),
        ([0.5, 0.53, 0.6], 0.05, 0),
    ],
)
def test_a_round_helps_when_it_beats_all_before_it(scores: list[float], min_gain: float, expected: int) -> None:
    settings = validate_config({"iterate": {"min_gain": min_gain}}).iterate
    assert num_without_help(scores, settings) == expected


def test_new_questions_are_the_next_ones(inputs: Path, tmp_path: Path) -> None:
    asking = {"num_rounds": 2, "new_questions": True, "stop_on": "never"}
    config = validate_config(values(inputs, tmp_path / "run", iterate=asking, train={"dev_path": None}))
    summary = iterate(config)
    asked = [[tree.id for tree in read_trees(tmp_path / f"run/round-{number}/trees.jsonl")] for number in (1, 2)]
    assert asked == [["asked-0", "asked-1"], ["asked-2", "asked-3"]]
    # without dev questions nothing is evaluated, and the last round is taken
    assert set(summary["rounds"][1]["stages"]) == {"collect", "pairs", "train"}
    assert summary["best_round"] == 2
    assert (tmp_path / "run" / WEIGHTS).read_bytes() == weights(tmp_path / "run", 2)
    assert not (tmp_path / "run" / "round-0").exists()
    three = validate_config(values(inputs, tmp_path / "run", iterate={**asking, "num_rounds": 3}))
    with pytest.raises(ConfigError, match=r"3 rounds of task.num_questions=2 ask 6 questions, and .* has 4"):
        iterate(three)


def test_no_gold_answer_reaches_search_pairs_or_weights(inputs: Path, tmp_path: Path, rounds_of_cpo: Config) -> None:
    asked = write_questions(tmp_path / "asked.jsonl", [(question, None) for question, _ in QUESTIONS])
    dev = write_questions(tmp_path / "dev.jsonl", [(question, "3") for question, _ in DEV])
    lines: list[str] = []
    config = validate_config(values(inputs, tmp_path / "run", task={"path": str(asked)}, train={"dev_path": str(dev)}))
    summary = iterate(config, Watch(on_stage=lines.append))
    for number in (1, 2):
        assert weights(tmp_path / "run", number) == weights(Path(rounds_of_cpo.run), number)
        name = f"round-{number}/pairs.jsonl"
        assert (tmp_path / "run" / name).read_bytes() == Path(rounds_of_cpo.run, name).read_bytes()
    assert summary["best_round"] == 0  # what dev's answers alone have changed
    assert f"gold answers: those of {dev} choose the best round and end the rounds (iterate.stop_on)" in lines


def test_without_a_stop_no_gold_decides_anything_and_that_is_said(inputs: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    settings = values(inputs, tmp_path / "run", iterate={"stop_on": "never", "num_rounds": 1})
    summary = iterate(validate_config(settings), Watch(on_stage=lines.append))
    assert "gold answers: none decides anything" in lines
    assert summary["best_round"] == 1
    assert stage(summary, 1, "eval")["num_graded"] == len(DEV)  # shown, and no more


def test_dev_questions_that_are_searched_too_are_named(inputs: Path, tmp_path: Path) -> None:
    dev = write_questions(tmp_path / "dev.jsonl", [*DEV, QUESTIONS[0]])
    lines: list[str] = []

    def stop(name: str, config: Config) -> None:
        raise CpoFastError("enough")

    config = validate_config(values(inputs, tmp_path / "run", train={"dev_path": str(dev)}))
    with pytest.raises(CpoFastError, match="round 0, eval: enough"):
        iterate(config, Watch(on_stage=lines.append), stop)
    assert "warning: 1 of the 5 questions of train.dev_path are searched and trained on too" in lines


def test_the_reference_stays_the_first_model_if_asked(inputs: Path, tmp_path: Path, rounds_of_cpo: Config) -> None:
    run = tmp_path / "run"
    iterate(validate_config(values(inputs, run, train={"reference_model": "base"})))
    assert weights(run, 1) == weights(Path(rounds_of_cpo.run), 1)
    assert weights(run, 2) != weights(Path(rounds_of_cpo.run), 2)
    first = json.loads((run / "round-2/metrics.jsonl").read_text().splitlines()[0])
    assert first["rewards/chosen"] > 0


def test_every_stage_is_given_its_folder_adapter_rate_and_questions(inputs: Path, tmp_path: Path) -> None:
    changes = {"method": "sft_cpo", "sft_lr": 0.5, "new_questions": True}
    settings = values(inputs, tmp_path, iterate=changes, model={"adapter": "first"}, eval={"path": "test"})
    rounds = Rounds(validate_config(settings), {}, Watch(), lambda name, config: None)
    assert rounds.stages(0) == ["eval"]
    assert rounds.stages(1) == ["collect", "pairs", "sft", "train", "eval"]

    def given(stage: str, number: int) -> tuple[Any, ...]:
        config = rounds.config_of(stage, number)
        where = (config.run, config.model.adapter, config.data.path)
        names = [str(each or "").replace(f"{tmp_path}/", "") for each in where]
        return *names, config.train.method, config.train.lr, config.task.skip_questions, config.eval.path

    trees = ["round-1/trees.jsonl", "round-2/trees.jsonl"]
    assert given("collect", 1) == ("round-1", "first", trees[0], "preference", 0.02, 0, "test")
    assert given("sft", 1) == ("round-1/sft", "first", trees[0], "sft", 0.5, 0, "test")
    assert given("train", 1) == ("round-1", "round-1/sft/adapter", trees[0], "preference", 0.02, 0, "test")
    assert given("sft", 2) == ("round-2/sft", "round-1/adapter", trees[1], "sft", 0.5, 2, "test")
    dev = str(inputs / "dev.jsonl")
    assert given("eval", 0) == ("round-0", "first", "", "preference", 0.02, 0, dev)
    assert given("eval", 2) == ("round-2", "round-2/adapter", "", "preference", 0.02, 0, dev)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"train": {"dev_path": None}}, "train.dev_path names none; set it"),
    ({"train": {"method": "sft"}}, "iterate.method says what a round trains"),
    ({"data": {"mixture": [{"path": "x"}]}}, "data.mixture: each round trains on"),
    ({"model": {"path": ""}}, "model.path is empty"),
    ({"model": {"adapter": "x"}, "train": {"reference_model": "base"}}, "merge the adapter first"),
    ({"task": {"num_questions": None}, "iterate": {"new_questions": True}}, "task.num_questions says how many"),
    ({"lora": {"target_modules": ["query"]}}, "lora.target_modules: 'query' matches no module"),
]


@pytest.mark.parametrize(("changes", "words"), REFUSED)
def test_what_would_fail_later_is_refused_before_the_first_search(
    inputs: Path, tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        iterate(validate_config(values(inputs, tmp_path / "run", **changes)))
    assert words in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_dev_without_answers_another_adapter_and_a_launcher_are_refused(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dev = write_questions(tmp_path / "dev.jsonl", [("And now?", None)])
    with pytest.raises(ConfigError, match="has a reference answer"):
        iterate(validate_config(values(inputs, tmp_path / "run", train={"dev_path": str(dev)})))
    (tmp_path / "run" / "adapter").mkdir(parents=True)
    config = validate_config(values(inputs, tmp_path / "run"))
    with pytest.raises(ConfigError, match="holds the adapter of another run"):
        iterate(config)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="leave the launcher out and give --gpus N"):
        iterate(config)


def test_an_error_names_its_round_and_stage_and_mended_it_goes_on(
    inputs: Path, tmp_path: Path, rounds_of_cpo: Config
) -> None:
    few = validate_config(values(inputs, tmp_path / "run", train={"max_tokens": 100}))
    with pytest.raises(DataError, match=r"^round 1, train: .* more than train\.max_tokens=100"):
        iterate(few)
    trees = tmp_path / "run/round-1/trees.jsonl"
    before = trees.stat().st_mtime_ns
    iterate(validate_config(values(inputs, tmp_path / "run")))
    assert trees.stat().st_mtime_ns == before
    assert results(tmp_path / "run") == results(Path(rounds_of_cpo.run))


def test_a_search_without_pairs_ends_the_rounds(inputs: Path, tmp_path: Path) -> None:
    def one_candidate(name: str, config: Config, after: int) -> None:
        if int(Path(config.run).name.removeprefix("round-")) > after:
            config = config.model_copy(update={"search": config.search.model_copy(update={"num_candidates": 1})})
        run_here(name, config, Watch())

    config = validate_config(values(inputs, tmp_path / "run"))
    summary = iterate(config, run_command=lambda name, its: one_candidate(name, its, after=1))
    assert summary["stopped"].startswith("round 2: the search leaves no pair to train on (")
    assert summary["best_round"] in (0, 1)
    assert iterate(config)["stopped"] == summary["stopped"]
    first = config.model_copy(update={"run": str(tmp_path / "first")})
    for _ in range(2):
        with pytest.raises(DataError, match="round 1, pairs: the search leaves no pair to train on"):
            iterate(first, run_command=lambda name, its: one_candidate(name, its, after=0))


def test_table_and_json_say_the_same(rounds_of_cpo: Config, inputs: Path, tmp_path: Path) -> None:
    path = write_config(tmp_path / "c.yaml", values(inputs, Path(rounds_of_cpo.run)))
    result = command("iterate", path, "--json")
    summary = json.loads(result.stdout)
    assert summary == summary_of(rounds_of_cpo)
    shown = command("iterate", path).stdout
    report = Path(rounds_of_cpo.run, "report.html")
    for said in (result.stderr, shown):
        assert f"report: {report}" in said
    assert "Ended: iterate.num_rounds=2." in report.read_text(encoding="utf-8")
    for words in (
        "round 2, best",
        "dev accuracy",
        "95 % interval",
        "thoughts per state",
        "ended: iterate.num_rounds=2",
    ):
        assert words in shown, words
    accuracy, interval = (stage(summary, 2, "eval")[name] for name in ("accuracy", "interval"))
    assert f"{accuracy:.1%}" in shown
    assert f"{interval[0]:.1%} - {interval[1]:.1%}" in shown
    assert f"adapter: {summary['adapter']}, of round 2" in shown.replace("\n", "")
