"""The report of runs that are whole, half done and hostile: its file, what it says, and the page in a browser."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from cpo_fast.cli.report import report_command, written_report
from cpo_fast.errors import ConfigError, CpoFastError, DataError
from cpo_fast.evaluate import mcnemar_exact, wilson_interval
from cpo_fast.report.curves import MAX_VALUES, curves, figures
from cpo_fast.report.page import json_text, write_report
from cpo_fast.report.runs import read_runs
from cpo_fast.report.summary import summary
from cpo_fast.report.text import visible
from tests.data.hand_made import random_tree
from tests.report.chromium import Chromium, Page
from tests.report.made_runs import (
    HOSTILE,
    metrics_lines,
    tree,
    write_evaluation,
    write_lines,
    write_run,
    write_trees,
)

WIDE, NARROW = 1440, 390


def report(*runs: Path, output: Path | None = None) -> Result:
    options = [] if output is None else ["-o", str(output)]
    return CliRunner().invoke(report_command, [*map(str, runs), *options], catch_exceptions=False)


def text_of(file: Path) -> str:
    """What the page says, without tags, scripts and styles."""
    text = re.sub(r"<(script|style)[^>]*>.*?</\1>", " ", file.read_text(encoding="utf-8"), flags=re.DOTALL)
    return " ".join(re.sub(r"<[^>]+>", " ", text.replace("<wbr>", "")).split())


def said_of(run: Path) -> str:
    """The sentences at the head of a run."""
    about = summary(read_runs([run])[0])
    return " ".join([*about.warnings, *about.sentences])


# the file


def test_a_run_becomes_one_file_that_names_everything_by_the_commands_own_numbers(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    shown = report(run)
    assert shown.stdout.splitlines()[-1] == f"report: {run / 'report.html'}"
    text = text_of(run / "report.html")
    low, high = wilson_interval(18, 20)
    assert f"18 of 20 right (90.0%, 95% interval {low:.1%} to {high:.1%}) with it" in text
    assert f"9 questions were gained and 1 lost (exact McNemar p = {mcnemar_exact(1, 9):.2g})" in text
    assert "The loss went from 0.656 to 0.254 in 20 steps" in text
    assert "4 questions were searched, 4 of them with a winning path; the vote is right for 4 of the 4" in text
    assert "60.0% 16,000 computed for 40,000" in text
    assert "train.lr 0.001" in text


def test_the_file_asks_for_nothing_and_runs_nothing_but_what_the_policy_names(tmp_path: Path) -> None:
    write_run(tmp_path / "run")
    file, _ = write_report([tmp_path / "run"])
    page = file.read_text(encoding="utf-8")
    (policy,) = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]*)"', page)
    assert policy.startswith("default-src &#39;none&#39;; script-src &#39;sha256-")
    assert "unsafe" not in policy
    assert re.findall(r"<[^>]+\s(?:src|style|on\w+)=", page) == []
    assert re.findall(r'<link[^>]*href="([^"]*)"', page) == ["data:,"]
    assert "Copyright (c) 2022 Leon Sorokin" in page  # the licence of what is inlined


def test_it_imports_no_heavy_library(tmp_path: Path) -> None:
    write_run(tmp_path / "run")
    program = (
        "import sys; from cpo_fast.report.page import write_report; write_report(sys.argv[1:]); "
        "print([name for name in ('torch', 'transformers', 'peft', 'pandas') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program, tmp_path / "run"], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_several_runs_stand_side_by_side_and_are_tested_against_each_other(tmp_path: Path) -> None:
    one, other = write_run(tmp_path / "one"), write_run(tmp_path / "other", rate=3e-3)
    write_evaluation(other, "adapter", [False] * 20)
    file, _ = write_report([one, other, tmp_path / "one" / ".." / "one"], tmp_path / "both.html")
    text = text_of(file)
    assert "2 runs" in text
    assert "train.lr (differs) 0.001 0.003 5e-06" in text
    assert "one: base" in text
    # the first run's base has 10 of 20 right, and all of them are lost
    assert re.search(rf"other: adapter 0 of 20 0\.0% \S+ to \S+ 9\.0 0 10 {mcnemar_exact(10, 0):.3g}", text)
    assert len(curves(read_runs([one, other]))) == 2


def configuration_below(path: Path) -> None:
    """A folder of examples, whose configurations nobody has run."""
    (path / "reasoner").mkdir(parents=True)
    (path / "reasoner" / "config.yaml").write_text("seed: 3\n")


@pytest.mark.parametrize(
    ("make", "error", "sentence"),
    [
        (lambda path: None, ConfigError, "{path} does not exist; {holds}"),
        (lambda path: path.write_text("a"), ConfigError, "{path} is a file, and {holds}"),
        (lambda path: path.mkdir(), DataError, "{path} is no run: {holds}"),
        (lambda path: write_run(path / "inner"), DataError, "{path} is no run: {holds}; below it are {path}/inner"),
        (
            lambda path: [write_run(path / "a" / name) for name in "654321"],
            DataError,
            "{path} is no run: {holds}; below it are {path}/a/1, {path}/a/2, {path}/a/3, {path}/a/4, {path}/a/5 and 1 more",
        ),
        (configuration_below, DataError, "{path} is no run: {holds}"),
    ],
)
def test_what_is_no_run_is_refused_in_one_sentence(
    tmp_path: Path, make: Any, error: type[CpoFastError], sentence: str
) -> None:
    path = tmp_path / "given"
    make(path)
    with pytest.raises(error) as caught:
        report(path)
    holds = (
        "a run is a folder that collect, train, eval or iterate wrote, with trees.jsonl, metrics.jsonl, eval-*.jsonl, "
        "iterate.json or config.yaml in it"
    )
    assert str(caught.value) == sentence.format(path=path, holds=holds)


def test_a_file_of_a_run_is_refused_by_the_name_of_its_run(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    with pytest.raises(ConfigError, match=re.escape(f"config.yaml in it; {run} is one")):
        report(run / "metrics.jsonl")


def test_a_folder_is_no_file_to_write(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    with pytest.raises(ConfigError, match="is a folder; give a file"):
        report(run, output=tmp_path)


def test_a_report_of_several_runs_leaves_that_of_the_first_alone(tmp_path: Path) -> None:
    one, other = write_run(tmp_path / "one"), write_run(tmp_path / "other")
    own = write_report([one])[0].read_bytes()
    compared, _ = write_report([one, other])
    assert (compared.parent, compared.name) == (one, "report-compared.html")
    assert (one / "report.html").read_bytes() == own != compared.read_bytes()


def test_other_commands_end_with_it_and_never_fail_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = write_run(tmp_path / "run")
    assert written_report(run) == f"report: {run / 'report.html'}"
    assert written_report(tmp_path / "none").startswith("no report: ")
    monkeypatch.delitem(sys.modules, "cpo_fast.report.page")
    monkeypatch.setitem(sys.modules, "jinja2", None)
    assert written_report(run) == "no report: jinja2 is missing; install it: pip install jinja2"


# runs that are not whole


def test_a_run_of_nothing_but_a_configuration_has_a_page(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("seed: 3\n")
    assert report(tmp_path).exit_code == 0
    assert "Nothing is measured in this folder yet." in text_of(tmp_path / "report.html")


def test_damage_is_said_and_the_rest_is_shown(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    with open(run / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write(
            '{"eval_accuracy": 1}\n[1]\nnot json\n{"step": 21, "loss": NaN, "new/measure": 1.5, "eval_loss": "text"}\n'
        )
        file.write('{"step": 21, "loss": Infinity, "new/measure": 2.5}\n{"loss": 1}\n{"step": 22, "lo')
    (run / "eval-adapter.json").write_text("{}")
    (run / "eval-lost.jsonl").write_text("")
    (run / "eval.json").write_text("[")
    (run / "statistics.jsonl").write_text(
        '\n{"depths": [{"depth": "x"}, {"depth": 1, "num_judged": 2, "mean_value": 3}, 4]}\n'
    )
    (run / "iterate.json").write_text(
        '{"rounds": [1, {"stages": []}, {"round": [], "stages": {"eval": {"accuracy": "a"}}}]}'
    )
    folder = run / "checkpoints" / "step-00000020"
    folder.mkdir(parents=True)
    (folder / "state.json").write_text('{"alarm": 1, "validator": "v", "identity": []}')
    shown = report(run)
    assert shown.exit_code == 0
    said = shown.stderr
    assert "metrics.jsonl: 2 of its lines are no JSON objects and are left out (line 22, 23)" in said
    assert "metrics.jsonl: its last line is cut off" in said
    assert "eval-lost.jsonl has no summary beside it" in said
    assert "eval-adapter.json: schema_version is None" in said
    assert "eval.json cannot be read" in said
    text = text_of(run / "report.html")
    assert "loss is no finite number at 1 of 21 steps" in text
    assert "new/measure: 2.5 at step 21" in text
    assert "3 lines of metrics.jsonl name no step of their own" in text


def test_a_damaged_tree_is_said_and_the_others_are_browsed(tmp_path: Path) -> None:
    run = tmp_path / "run"
    write_lines(run / "trees.jsonl", [random_tree(0, "t0").to_dict(), {"id": "t"}, random_tree(1, "t1").to_dict()])
    said = report(run).stderr
    assert "run: trees.jsonl has a line that is no whole tree and not shown; line 2: not a search tree" in said
    shown = json.loads(re.search('id="trees-data">(.*?)</script>', (run / "report.html").read_text())[1])
    assert [one["id"] for one in shown["runs"][0]["trees"]["trees"]] == ["t0", "t1"]


def test_a_run_of_collect_or_eval_alone_shows_its_configuration(tmp_path: Path) -> None:
    for name in ("collect.yaml", "eval.yaml"):
        run = tmp_path / name
        write_trees(run, [tree("t")])
        (run / name).write_text("seed: 3\n")
        assert report(run).exit_code == 0
        assert f"key {name}, {name} default seed 3 0" in text_of(run / "report.html")


def test_rounds_show_the_configuration_of_a_training_and_not_of_the_first_questions(tmp_path: Path) -> None:
    (tmp_path / "iterate.json").write_text('{"rounds": []}')
    for name, kept in (("round-0", "eval.yaml"), ("round-1", "collect.yaml"), ("round-2", "config.yaml")):
        (tmp_path / name).mkdir()
        (tmp_path / name / kept).write_text("seed: 3\n")
    assert read_runs([tmp_path])[0].config_file == "round-2/config.yaml"


def test_an_unfinished_training_and_one_without_evaluation_say_so(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", num_steps=20)
    write_lines(run / "metrics.jsonl", metrics_lines(5))
    for path in (*run.glob("eval-*"), run / "adapter" / "adapter_model.safetensors"):
        path.unlink()
    said = said_of(run)
    assert "The training has not ended: its last step here is 5 of 20, and there is no adapter yet." in said
    assert "No evaluation in this folder says whether answers got better." in said


def test_a_difference_that_chance_makes_is_called_none(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    write_evaluation(run, "adapter", [True, False] * 9 + [True, True])
    assert "chance alone does that often, so this shows no difference" in said_of(run)
    write_evaluation(run, "adapter", [False] * 20)
    assert "the adapter is worse than the base on these questions" in said_of(run)


def test_rounds_have_a_row_each_and_their_folders_are_read(tmp_path: Path) -> None:
    for place in (0, 1):
        write_evaluation(
            tmp_path / f"round-{place}", "base" if not place else "round-1-adapter", [True] * (5 + place) + [False]
        )
    write_lines(tmp_path / "round-1" / "metrics.jsonl", metrics_lines(3))
    made = {"accuracy": 5 / 6, "interval": [0.4, 0.9], "num_starts": 1, "seconds": 1.0}
    rounds = [
        {"round": 0, "stages": {"eval": made}},
        {"round": 1, "stages": {"eval": {**made, "accuracy": 6 / 7}}},
        {"round": 2},
    ]
    values = {"schema_version": 1, "config": {}, "rounds": rounds, "best_round": 1, "stopped": "iterate.num_rounds=1"}
    (tmp_path / "iterate.json").write_text(json.dumps(values))
    file, _ = write_report([tmp_path])
    text = text_of(file)
    assert "Of 2 rounds round 1 is the best: dev accuracy 85.7%, where the first model has 83.3%" in text
    assert "1, best - - - - 85.7% 40.0% - 90.0%" in text
    assert "a round is not as this version writes it" in text
    assert "Ended: iterate.num_rounds=1." in text
    assert [curve.name for curve in curves(read_runs([tmp_path]))] == ["round 1"]


def test_long_trainings_are_sampled_and_the_page_says_so(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", num_steps=30_000, every=10_000)
    (curve,) = curves(read_runs([run]))
    assert curve.num_steps == 30_001
    assert sum(len(column) for column in curve.values.values()) <= 1.1 * MAX_VALUES
    assert {0, 10_000, 20_000, 30_000} <= set(curve.steps)  # every validation
    file, _ = write_report([run])
    assert f"{len(curve.steps):,} of 30,001 steps are shown; the rest is in metrics.jsonl" in text_of(file)
    assert file.stat().st_size < 5_000_000


def test_the_alarm_is_said_first_and_drawn(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", alarm_from=12)
    state = {"alarm": {"text": "step 12: a tenth of <b>them</b> fell"}, "identity": {"data": "feed"}}
    folder = run / "checkpoints" / "step-00000020"
    folder.mkdir(parents=True)
    (folder / "state.json").write_text(json.dumps(state))
    (curve,) = curves(read_runs([run]))
    assert curve.alarm_step == 12
    assert curve.limit == pytest.approx(-0.3 / 20 - 0.1)  # the first value less train.alarm_nats
    assert said_of(run).startswith("Alarm. Step 12: a tenth of <b>them</b> fell.")
    file, _ = write_report([run])
    assert "Alarm. Step 12: a tenth of &lt;b&gt;them&lt;/b&gt; fell." in file.read_text(encoding="utf-8")


def test_pairs_that_are_ties_are_not_drawn_as_ranked_wrong(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    lines = metrics_lines(4)
    lines[0] |= {"rewards/margins": 0.0, "rewards/accuracies": 0.0, "rewards/accuracies/step_1": 0.0}
    lines[1] |= {"rewards/accuracies": 0.0}
    write_lines(run / "metrics.jsonl", lines)
    (curve,) = curves(read_runs([run]))
    assert curve.values["rewards/accuracies"][:3] == [None, 0.0, pytest.approx(0.8)]
    assert curve.values["rewards/accuracies/step_1"][0] is None
    assert curve.values["rewards/margins"][0] == 0.0


def test_a_figure_says_in_words_and_in_a_table_what_it_draws(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    shown, _ = figures(curves(read_runs([run])))
    margin = next(each for each in shown if each.chart.key == "margins")
    assert margin.words[0] == "margin: 0.05 at step 1, 1 at step 20; lowest 0.05 at step 1, highest 1 at step 20"
    assert margin.tables[0][1] == ("step", "margin", "chosen", "rejected")
    assert margin.tables[0][2][-1] == ("20", "1", "0.2", "-0.8")


# text of models and files


def test_hidden_characters_are_seen() -> None:
    assert visible("a\x00\x1b[31m\x7f\x85\r") == "a\u2400\u241b[31m\u2421\\x85\u240d"
    assert visible("\u202e\u2028\ufeff\u200b\ud800\U000e0041") == "\\u202e\\u2028\\ufeff\\u200b\\ud800\\U000e0041"
    assert visible("line\n\tmore مرحبا 🙂") == "line\n\tmore مرحبا 🙂"
    assert visible("x" * 30, 10) == "x" * 10 + " … (20 characters cut)"


def test_json_in_a_page_ends_no_script_and_reads_back() -> None:
    value = {"a": ["</script><!--", "\u2028", "\ud800", "&amp;", 'quote"']}
    text = json_text(value)
    assert not set("<>&\u2028\u2029") & set(text)
    assert json.loads(text) == value
    text.encode()
    with pytest.raises(ValueError, match="not JSON compliant"):
        json_text(float("nan"))


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    """The report of a run whose every text is hostile, its folder's name too."""
    run = write_run(tmp_path / '<b>run {{7*7}} "\x1b\u202e', alarm_from=3)
    chain = "\n".join(HOSTILE)
    write_evaluation(run, "base", [False] * 8, chain)
    write_evaluation(run, "adapter", [True] * 8, chain)
    write_trees(run, [tree(f"t{place}", HOSTILE, text) for place, text in enumerate(HOSTILE)])
    settings = {"seed": 0, "model": {"path": "<i>m</i>"}, "train": {text[:50]: text for text in HOSTILE[:5]}}
    (run / "config.yaml").write_text(json.dumps(settings))
    rows = [{**line, "<u>new</u>": line["step"]} for line in metrics_lines(8)]
    write_lines(run / "metrics.jsonl", rows)
    return write_report([run])[0]


def test_hostile_text_is_shown_as_text(hostile: Path, chromium: Chromium) -> None:
    page = chromium.open(hostile)
    assert page.errors() == []
    assert page.evaluate("window.hacked === undefined && document.images.length === 0")
    name = '<b>run {{7*7}} "␛\\u202e'
    assert page.evaluate("document.querySelector('h1').textContent") == name
    assert page.evaluate("document.title") == f"{name}: cpo-fast report"
    labels = page.evaluate("[...document.querySelectorAll('.scroll')].map(each => each.getAttribute('aria-label'))")
    assert f"Thoughts by depth: {name}" in labels
    shown = page.evaluate("document.querySelector('.chains pre').textContent")
    for text in (
        "<script>window.hacked = 1</script>",
        "</script><img",
        "{{7*7}} {% raw %}",
        "␛[31mred␛[0m␀\\u202egnirts",
    ):
        assert text in shown
    assert "characters cut)" in shown
    assert len(shown) < 2_000
    assert page.evaluate("document.querySelector('.chains pre bdi') !== null")
    page.close()


# the page in a browser


@pytest.fixture(scope="module")
def two_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of two runs, one of which lets the alarm ring."""
    folder = tmp_path_factory.mktemp("runs")
    runs = [write_run(folder / "calm", every=5), write_run(folder / "hot", rate=3e-3, every=5, alarm_from=12)]
    return write_report(runs)[0]


def serious(page: Page, axe: str) -> list[Any]:
    """Faults that axe calls serious or critical."""
    page.evaluate(f"{axe}; 0")
    found = page.evaluate(
        "axe.run(document, {resultTypes: ['violations']}).then(r => r.violations.map("
        "v => [v.id, v.impact, v.nodes.map(n => n.html.slice(0, 120))]))"
    )
    return [each for each in found if each[1] in ("serious", "critical")]


@pytest.mark.parametrize("width", [WIDE, NARROW])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_it_opens_without_errors_requests_or_faults(
    two_runs: Path, chromium: Chromium, axe: str, width: int, dark: bool
) -> None:
    page = chromium.open(two_runs, width, dark=dark)
    assert page.errors() == []
    assert page.requests() == [two_runs.as_uri()]
    assert page.evaluate("document.documentElement.scrollWidth") == width
    drawn = page.evaluate("[...document.querySelectorAll('.plot')].filter(p => p.querySelector('canvas')).length")
    assert drawn == page.evaluate("document.querySelectorAll('.plot').length") > 8
    page.evaluate("document.querySelectorAll('details').forEach(each => each.open = true)")
    page.settle()
    assert page.evaluate("document.documentElement.scrollWidth") == width
    assert serious(page, axe) == []
    page.close()


def test_axe_would_find_a_fault(two_runs: Path, chromium: Chromium, axe: str) -> None:
    page = chromium.open(two_runs)
    page.evaluate("document.querySelector('.kind').style.color = '#ccc'")
    assert [each[0] for each in serious(page, axe)] == ["color-contrast"]
    page.close()


def test_the_policy_refuses_what_is_not_inlined(two_runs: Path, chromium: Chromium) -> None:
    page = chromium.open(two_runs)
    page.evaluate("document.body.insertAdjacentHTML('beforeend', '<img src=\"https://example.org/a.png\">')")
    page.evaluate(
        "document.body.append(Object.assign(document.createElement('script'), {textContent: 'window.ran = 1'}))"
    )
    page.settle()
    assert page.evaluate("window.ran") is None
    assert len(page.errors()) == 2
    page.close()


def test_lines_are_drawn_read_and_hidden_by_keyboard(two_runs: Path, chromium: Chromium) -> None:
    page = chromium.open(two_runs)
    figure = "document.querySelector('#chart-loss')"
    page.evaluate(f"{figure}.querySelector('.plot').focus()")
    page.press("End")
    values = page.evaluate(f"[...{figure}.querySelectorAll('.value')].map(each => each.textContent)")
    assert values == ["0.2538", "0.2538"]  # 0.69 / e
    other = page.evaluate("[...document.querySelectorAll('#chart-margins .value')].map(each => each.textContent)")
    assert other[0] == "1"  # the same step in every chart
    page.press("ArrowLeft")
    assert page.evaluate(f"{figure}.querySelector('.value').textContent") == "0.2669"
    ink = (
        f"{figure}.querySelector('canvas').getContext('2d').getImageData(0, 0, 2000, 2000).data.reduce((a, b) => a + b)"
    )
    before = page.evaluate(ink)
    page.evaluate(f"{figure}.querySelector('.legend button').focus()")
    page.press("Enter")
    page.settle()
    assert page.evaluate(f"{figure}.querySelector('.legend button').getAttribute('aria-pressed')") == "false"
    assert page.evaluate(ink) != before
    assert "hot: alarm from step 12" in page.evaluate("document.querySelector('#chart-drift .marks').textContent")
    page.close()


def test_two_hundred_trees_stay_below_five_megabytes(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    write_trees(
        run, [tree(f"t{place}", [f"thought {place} {number} " * 8 for number in range(60)]) for place in range(200)]
    )
    file, _ = write_report([run])
    assert file.stat().st_size < 5_000_000
