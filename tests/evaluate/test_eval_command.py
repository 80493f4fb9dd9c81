"""`cpo-fast eval` prints and writes the same tables, compares the runs of a folder, and agreement is with the vote."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from cpo_fast.cli.eval import eval_command
from cpo_fast.errors import DataError
from cpo_fast.evaluate import mcnemar_exact, read_evaluation, run_overview, wilson_interval
from cpo_fast.evaluate.result import free_label
from tests.evaluate.scripted import made_evaluation
from tests.tiny import save_tiny_model

FIRST = [True, True, False, False, None, True]
SECOND = [True, False, True, True, None, True]


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(eval_command, [str(each) for each in arguments], catch_exceptions=False)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """One question with a reference answer and one without, a random model, chains and trees of a few tokens."""
    rows = [{"id": "a", "question": "How many?", "answer": 1}, {"id": "b", "question": "And how many?"}]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder = save_tiny_model(tmp_path / "model", seed=3, max_position_embeddings=4096)
    settings = {
        "run": str(tmp_path / "run"),
        "model": {"path": str(folder), "dtype": "float32", "device": "cpu"},
        "task": {"path": str(tmp_path / "q.jsonl")},
        "search": {"num_candidates": 2, "max_steps": 1, "max_thought_tokens": 3},
        "eval": {"max_new_tokens": 3},
    }
    path = tmp_path / "c.yaml"
    path.write_text(json.dumps(settings))  # JSON is YAML
    return path


def test_both_methods_in_terminal_json_markdown_and_csv(tmp_path: Path, config: Path) -> None:
    shown = invoke(config, "eval.method=both")
    for words in (
        "greedy chain",
        "tree of thought",
        "0 of 1, 1 ungraded",
        "seconds per question",
        "timed, each alone",
    ):
        assert words in shown.stdout, words
    assert "base → base-tot: the method differs: cot in base, tot in base-tot" in shown.stdout
    assert "base: without a reference answer and not graded: 1" in shown.stdout
    run = tmp_path / "run"
    written = json.loads((run / "eval.json").read_text())
    assert [each["label"] for each in written["evaluations"]] == ["base", "base-tot"]
    assert [each["tokens"]["mean"] for each in written["evaluations"]] == [3.0, 6.0]  # one chain; two thoughts
    (comparison,) = written["comparisons"]
    assert (comparison["num_graded"], comparison["mcnemar_p"], comparison["tokens_ratio"]) == (1, 1.0, 2.0)
    assert written["agreements"] == []  # a random model's trees have no answer
    printed = json.loads(invoke(config, "eval.method=tot", "--json").stdout)
    assert [each["label"] for each in printed["evaluations"]] == ["base", "base-tot"]
    rows = list(csv.DictReader((run / "eval.csv").open(encoding="utf-8")))
    assert [(row["label"], row["accuracy"], row["tokens_p95"]) for row in rows] == [
        ("base", "0.0", "3.0"),
        ("base-tot", "0.0", "6.0"),
    ]
    assert rows[0]["interval_high"] == str(written["evaluations"][0]["interval"][1])
    markdown = (run / "eval.md").read_text()
    assert "| accuracy | 0.0% | 0.0% |" in markdown
    assert "| exact McNemar p | 1 |" in markdown
    cells = [line.count("|") for line in markdown.splitlines() if line.startswith("|")]
    assert set(cells) == {4, 3}


def test_run_overview_pairs_what_is_comparable_and_names_what_is_not(tmp_path: Path) -> None:
    made_evaluation("base", FIRST).write(tmp_path)
    made_evaluation("adapter", SECOND).write(tmp_path)
    made_evaluation("adapter-tot", SECOND[:2]).write(tmp_path)
    overview = run_overview(tmp_path, seed=0)
    assert [(each.first, each.second) for each in overview.comparisons] == [("base", "adapter")]
    assert len([note for note in overview.notes if note.startswith("not compared") and "'q2'" in note]) == 2
    assert run_overview(tmp_path / "none", seed=0).evaluations == ()


def test_agreement_is_with_the_vote_on_the_same_question(tmp_path: Path) -> None:
    chain = made_evaluation("adapter", FIRST)  # answers 1 where right, 2 elsewhere
    chain.write(tmp_path)
    made_evaluation("base-tot", SECOND).write(tmp_path)
    trees = [
        {"id": "q0", "question": "text 0", "answer": "1"},
        {"id": "q1", "question": "text 1", "answer": "7"},
        {"id": "q2", "question": "text 2", "answer": None},  # nothing was voted for
        {"id": "q3", "question": "another text under that id", "answer": "2"},
        {"id": "other", "question": "text 5", "answer": "1"},
    ]
    (tmp_path / "trees.jsonl").write_text("".join(json.dumps(tree) + "\n" for tree in trees) + '{"id": "torn')
    overview = run_overview(tmp_path, seed=0)
    found = [(each.label, each.source, each.num_agree, each.num_voted, each.share) for each in overview.agreements]
    # against the vote of base-tot: q0, q5 agree, and q4 that nobody can grade
    assert found == [("adapter", "trees.jsonl", 1, 2, 0.5), ("adapter", "base-tot", 3, 6, 0.5)]
    overview.write(tmp_path)
    assert "adapter gives the voted answer of trees.jsonl for 1 of 2 questions (50.0%)" in (
        tmp_path / "eval.md"
    ).read_text(encoding="utf-8")


def two_files(tmp_path: Path, **changes: Any) -> list[str]:
    made_evaluation("base", FIRST).write(tmp_path / "a")
    made_evaluation("adapter", SECOND, **changes).write(tmp_path / "b")
    return [str(tmp_path / "a/eval-base.jsonl"), str(tmp_path / "b/eval-adapter.jsonl")]


def test_compare_two_files(tmp_path: Path) -> None:
    paths = two_files(tmp_path, prompt_hash="other")
    shown = invoke("--compare", *paths).stdout
    assert "only the second right" in shown
    assert "+20.0 points [" in shown
    assert "the prompt differs: ph in" in shown
    assert "10000 resamples, seed 0" in shown
    values = json.loads(invoke("--compare", *paths, "--json").stdout)
    assert (values["first"], values["num_only_first"], values["num_only_second"]) == (paths[0], 1, 2)
    assert {each.name for each in tmp_path.rglob("*") if each.is_file()} == {
        "eval-base.jsonl",
        "eval-base.json",
        "eval-adapter.jsonl",
        "eval-adapter.json",
    }


def test_compare_many_runs_against_the_first(tmp_path: Path) -> None:
    """Files and folders; one table with Wilson intervals, exact p-values and Holm's correction of them."""
    worse, better = [False] * 12, [True] * 12
    made_evaluation("base", [*worse, True, True]).write(tmp_path / "base")
    made_evaluation("cpo-adapter", [*better, True, False], adapter_hash="1").write(tmp_path / "all")
    made_evaluation("sft-adapter", [*worse[1:], True, True, True], adapter_hash="2").write(tmp_path / "all")
    paths = [tmp_path / "base" / "eval-base.jsonl", tmp_path / "all"]
    values = json.loads(invoke("--compare", *paths, "--json").stdout)
    names = [str(paths[0]), str(paths[1] / "cpo-adapter"), str(paths[1] / "sft-adapter")]
    assert [each["name"] for each in values["evaluations"]] == names
    assert [each["interval"] for each in values["evaluations"]] == [list(wilson_interval(n, 14)) for n in (2, 13, 3)]
    assert [(each["num_only_second"], each["num_only_first"]) for each in values["comparisons"]] == [(12, 1), (1, 0)]
    p = mcnemar_exact(1, 12)
    assert [each["mcnemar_p"] for each in values["comparisons"]] == [p, 1.0]
    shown = CliRunner().invoke(eval_command, ["--compare", *map(str, paths)], env={"COLUMNS": "400"}).stdout
    (row,) = [line for line in shown.splitlines() if names[1] in line and "13 of 14" in line]
    cells = [cell.strip() for cell in row.replace("│", "|").split("|")]
    low, high = wilson_interval(13, 14)
    assert cells[5:] == [f"{low:.1%} to {high:.1%}", "10.0", "12", "1", f"{p:.3g}", f"{2 * p:.3g}", ""]
    assert "the adapter differs: none in" in shown
    made_evaluation("cpo-adapter", better[:3], adapter_hash="1").write(tmp_path / "all")
    with pytest.raises(DataError, match=r"not about the same questions: 'q3' is in .*eval-base\.jsonl only"):
        invoke("--compare", *paths)
    (tmp_path / "all" / "eval-sft-adapter.json").unlink()
    result = CliRunner().invoke(eval_command, ["--compare", str(tmp_path / "all")])
    assert (result.exit_code, "two evaluations or more, and there are 1" in result.output) == (2, True)
    assert "eval-sft-adapter.jsonl has no summary beside it" in result.output


def test_an_adapter_is_called_by_its_folder_and_never_by_another_s_name(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "x"

    def label(adapter: Path, method: str = "cot") -> str:
        """That of an evaluation, which is written."""
        found = free_label(run, str(adapter), method)  # type: ignore[arg-type]
        made_evaluation(found, FIRST, adapter=str(adapter)).write(run)
        return found

    assert free_label(run, None, "tot") == "base-tot"
    assert label(run / "adapter") == "adapter"
    assert label(run / "sft" / "adapter-best") == "sft-adapter-best"
    assert label(tmp_path / "runs" / "cpo" / "adapter") == "cpo-adapter"
    assert label(tmp_path / "other" / "cpo" / "adapter") == "cpo-adapter-2"
    assert label(run / ".." / "cpo" / "adapter") == "cpo-adapter"  # the same folder, evaluated again
    assert label(run / "adapter", "tot") == "adapter-tot"
    assert label(run / "base") == "base-2"
    assert label(run / "a|b c") == "a_b_c"
    made_evaluation("base", FIRST).write(run)
    overview = run_overview(run, seed=0)
    assert [each.label for each in overview.evaluations][:3] == ["base", "a_b_c", "adapter"]
    assert [each.first for each in overview.comparisons] == ["base"] * 7  # each with the first, of so many
    assert label(run / "adapter-tot") == "adapter-tot-2"  # that name is a tree's
    older = run / "eval-adapter.json"
    values = json.loads(older.read_text())
    del values["adapter"]  # as older versions wrote it
    older.write_text(json.dumps(values))
    assert free_label(run, str(run / "adapter"), "cot") == "adapter"
    assert read_evaluation(older.with_suffix(".jsonl")).adapter == ""


def test_compare_refuses_other_questions_and_missing_files(tmp_path: Path) -> None:
    paths = two_files(tmp_path)
    made_evaluation("adapter", SECOND[:5]).write(tmp_path / "b")
    with pytest.raises(DataError, match="not about the same questions: 'q5' is in"):
        invoke("--compare", *paths)
    for other in (tmp_path / "base", tmp_path / "none.json"):
        with pytest.raises(DataError, match=r"there is no such file; give eval-\*\.jsonl files or run folders"):
            invoke("--compare", paths[0], other)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"empty: the folder holds no evaluation; give eval-"):
        invoke("--compare", paths[0], tmp_path / "empty")
    (tmp_path / "q.jsonl").touch()
    with pytest.raises(DataError, match=r"q\.json: cannot read the summary .*; give eval-"):
        invoke("--compare", paths[0], tmp_path / "q.jsonl")


def test_compare_takes_the_summary_for_the_questions_beside_it(tmp_path: Path) -> None:
    paths = two_files(tmp_path)
    summaries = [str(Path(path).with_suffix(".json")) for path in paths]
    printed = [json.loads(invoke("--compare", *each, "--json").stdout) for each in (paths, summaries)]
    assert printed[0]["metrics"] == printed[1]["metrics"]
    assert printed[1]["first"] == summaries[0]


def test_says_what_eval_path_takes_the_effect_from(config: Path) -> None:
    path = json.loads(config.read_text())["task"]["path"]
    said = f"all questions of eval.path ({path}) are asked: no effect of task.num_questions=1 without eval.path=null\n"
    assert said in invoke(config, f"eval.path={path}", "task.num_questions=1").stderr
    assert "no effect" not in invoke(config, "task.num_questions=1").stderr
    assert "no effect" not in invoke(config, f"eval.path={path}").stderr


@pytest.mark.parametrize(
    "arguments", [[], ["c.yaml", "--compare", "a", "b"], ["--compare", "a", "run=b"], ["--compare"]]
)
def test_config_or_compare_and_not_both(arguments: list[str]) -> None:
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert "--compare" in result.output


def test_hostile_text_breaks_neither_markdown_nor_terminal(tmp_path: Path) -> None:
    made_evaluation("base", FIRST, model="a|b<script>\n# c").write(tmp_path)
    results = made_evaluation("adapter", FIRST).results
    failed = type(results[0])(**{**results[0].__dict__, "stop": "failed", "detail": "\x1b[31mred | <b>"})
    bad = made_evaluation("adapter", FIRST)
    type(bad)(**{**bad.__dict__, "results": (failed, *results[1:]), "num_failed": 1}).write(tmp_path)
    overview = run_overview(tmp_path, seed=0)
    overview.write(tmp_path)
    markdown = (tmp_path / "eval.md").read_text(encoding="utf-8")
    assert "model a\\|b&lt;script> # c." in markdown
    assert "red \\| &lt;b>" in markdown
    from cpo_fast.cli.eval import _printable

    assert _printable(overview.notes[-1]).isprintable()
