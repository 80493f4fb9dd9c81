"""The search-tree browser: its numbers are those of training, and it works by mouse and by keyboard, whatever texts say."""

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

import pytest

from cpo_fast.config import PairsConfig
from cpo_fast.data.pair_files import NO_LOSER, REPEATED, TreeFileReader
from cpo_fast.data.pair_rules import OUTSIDE_FRACTION, SAME_TOKENS
from cpo_fast.errors import ConfigError
from cpo_fast.report.page import write_report
from cpo_fast.report.trees import COLUMNS, KEPT, embedded_bytes, take_pairs, trees_payload
from tests.data.hand_made import node, random_tree, tree, write_trees
from tests.report.chromium import Chromium, Page
from tests.report.hostile import TEXTS, write_hostile

RULES = get_args(PairsConfig.model_fields["rule"].annotation)
PLENTY = 4_000_000
NUM_TREES = 200

# ---- the payload


def payload_of(folder: Path, budget_bytes: int = PLENTY) -> dict[str, Any]:
    payload = trees_payload(folder, budget_bytes)
    assert payload is not None
    return payload


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("settings", [{}, {"rejected_fraction": 0.6, "num_questions": 12, "max_fpo_pairs": 3}])
def test_pairs_are_those_that_training_takes(tmp_path: Path, rule: str, settings: dict[str, Any]) -> None:
    # question_token_ids repeat after 40 trees, so that some pairs stand under two questions
    trees = [random_tree(seed, f"q{seed}") for seed in range(60)]
    trees += [replace(one, id=f"again {one.id}") for one in trees[:9]]
    reader = TreeFileReader(write_trees(tmp_path / "trees.jsonl", trees))
    config = PairsConfig(rule=rule, **settings)  # type: ignore[arg-type]
    made = reader.rows(config, 5, reader.draw_questions(config.num_questions, 5), "preference")
    taken = take_pairs(reader.trees, config, 5)
    ours = [(name, pair.step, *pair.node_ids) for name, pairs in taken.pairs.items() for pair in pairs]
    assert ours == [(row["tree"], row["step"], row["chosen_node"], row["rejected_node"]) for row in made.rows]
    assert dict(taken.unused) == made.unused_by_reason
    assert taken.without == made.trees_without
    assert len(ours) > 5
    if not settings:
        assert made.unused_by_reason[REPEATED] > 0


def test_page_takes_rule_and_seed_of_the_run(tmp_path: Path) -> None:
    write_trees(tmp_path / "trees.jsonl", [random_tree(seed, f"q{seed}") for seed in range(30)])
    by_default = payload_of(tmp_path)
    assert (by_default["settings"]["rule"], by_default["settings"]["source"]) == ("all", "")
    (tmp_path / "config.yaml").write_text("seed: 3\npairs: {rule: lower, rejected_fraction: 0.5}\n")
    payload = payload_of(tmp_path)
    assert payload["settings"] == {
        "rule": "lower",
        "rejected_fraction": 0.5,
        "num_questions": None,
        "seed": 3,
        "method": "preference",
        "source": "config.yaml",
    }
    assert 0 < payload["audit"]["num_pairs"] < by_default["audit"]["rules"]["lower"]["steps"].get(1, 0) + 10_000
    assert payload["audit"]["num_pairs"] == sum(len(one["pairs"]) for one in payload["trees"])
    assert payload["audit"]["num_pairs"] == sum(payload["audit"]["rules"]["lower"]["steps"].values())
    assert payload["audit"]["unused"][OUTSIDE_FRACTION] > 0
    assert payload["audit"]["rules"].keys() == set(RULES)


def test_audit_counts_odd_pairs_duplicates_and_trees_without_any(tmp_path: Path) -> None:
    nodes = [
        node(0, -1, 1, value=4.0, token_ids=(100, 101, 10), logps=(-1.0, -0.5, -0.5), count=3),
        node(1, -1, 1, value=4.0, logps=(-3.0, -1.0)),
        node(2, -1, 1, value=None, kept=False),
        node(3, -1, 1, value=9.0, kept=False, count=2),
        node(4, 0, 2, "4", value=8.0),
        node(5, 0, 2, "5", value=2.0),
        node(6, 0, 2, "5", token_ids=(104, 10)),  # the very tokens of the winner
    ]
    trees = [
        tree(nodes, (4,), "a", num_empty=2),
        tree(nodes, (4,), "b"),  # the same question under another id
        tree([node(0, -1, 1, "4")], (0,), "c"),
        tree(nodes, (), "d"),
    ]
    write_trees(tmp_path / "trees.jsonl", trees)
    audit = payload_of(tmp_path)["audit"]
    assert audit["steps"][0] == {
        "step": 1,
        "pairs": 3,
        "chosen_value": 4.0,
        "rejected_value": 6.5,
        "without_value": 1,
        "odd": 2,
        "chosen_logp": round(-2 / 3, 4),
        "rejected_logp": -2.0,
    }
    assert (audit["num_pairs"], audit["num_odd"]) == (4, 2)
    assert audit["odd"] == [(1, 0, 1, 4.0, 4.0), (1, 2, 1, 4.0, 9.0)]
    assert audit["rules"]["lower"]["steps"] == {1: 1, 2: 1}
    assert audit["rules"]["fpo"] == {"steps": {0: 1}, "trees": 1}
    assert audit["without"] == {
        REPEATED: {"count": 1, "trees": [2]},
        NO_LOSER: {"count": 1, "trees": [3]},
        "no_answer": {"count": 1, "trees": [4]},
    }
    assert audit["unused"] == {REPEATED: 4, SAME_TOKENS: 2}
    assert (audit["num_samples"], audit["num_merged"], audit["num_empty"]) == (3 * 10 + 1 + 2, 9, 2)
    assert audit["repeated"][:2] == [(1, 0, 3), (2, 0, 3)]


def test_a_run_without_trees_has_no_payload(tmp_path: Path) -> None:
    assert trees_payload(tmp_path, PLENTY) is None
    (tmp_path / "trees.jsonl").write_text("")
    assert payload_of(tmp_path)["total"] == 0


def test_gold_gives_a_mark_and_is_not_in_the_page(tmp_path: Path) -> None:
    nodes = [node(0, -1, 1, "4")]
    golds = {"same": "4", "equal": "4.0", "other": "73515", "unknown": None}
    trees = [tree(nodes, (0,), name, gold=gold) for name, gold in golds.items()]
    trees += [tree(nodes, (0,), "own task", gold="4", task="mine@0123"), tree(nodes, (), "lost", gold="73515")]
    write_trees(tmp_path / "trees.jsonl", trees)
    payload = payload_of(tmp_path)
    assert [one["outcome"] for one in payload["trees"]] == ["right", "right", "wrong", "ungraded", "right", "none"]
    assert "73515" not in json.dumps(payload)


def test_a_task_file_of_the_run_grades_as_it_did(tmp_path: Path) -> None:
    from cpo_fast.config import load_config
    from cpo_fast.tasks import task_name

    task_file = Path("examples/reasoner/plain.yaml").resolve()
    (tmp_path / "config.yaml").write_text(f"task: {{file: {task_file}, path: questions.jsonl}}\n")
    name = task_name(load_config(tmp_path / "config.yaml").task)
    # the task's reader takes two digits alone, where any other would take 4.0 for 4
    trees = [tree([node(0, -1, 1, "4")], (0,), task, task=task, gold="4.0") for task in (name, "other@1")]
    write_trees(tmp_path / "trees.jsonl", trees)
    assert [one["outcome"] for one in payload_of(tmp_path)["trees"]] == ["wrong", "right"]


def test_trees_that_do_not_fit_are_sampled_evenly_within_the_budget(tmp_path: Path) -> None:
    write_trees(tmp_path / "trees.jsonl", [random_tree(seed, f"q{seed}") for seed in range(300)])
    whole = payload_of(tmp_path)
    assert (whole["shown"], whole["total"]) == (300, 300)
    for share in (0.9, 0.5, 0.2):
        budget = int(share * embedded_bytes(whole))
        payload = payload_of(tmp_path, budget)
        assert embedded_bytes(payload) <= budget
        numbers = [one["number"] for one in payload["trees"]]
        assert payload["shown"] == len(numbers) > 0.5 * share * 300
        gaps = {after - before for before, after in pairwise(numbers)}
        assert max(gaps) - min(gaps) <= 1
        assert numbers[0] == 1
        assert payload["audit"] == whole["audit"]
    assert payload_of(tmp_path, 1)["shown"] == 0


def test_embedded_bytes_bounds_the_escaped_text() -> None:
    value = {"text": "</script>&<é\u2028\ud800\x00🙂" * 7}
    escaped = json.dumps(value, separators=(",", ":"))
    for character in "<>&":
        escaped = escaped.replace(character, f"\\u{ord(character):04x}")
    assert embedded_bytes(value) == len(escaped.encode())


def test_texts_of_a_tree_that_would_fill_the_page_are_cut_and_say_so(tmp_path: Path) -> None:
    big = tree([node(place, -1, 1, text="y" * 50_000 + "\n") for place in range(40)], (), "big")
    small = random_tree(1, "small")
    write_trees(tmp_path / "trees.jsonl", [big, small])
    payload = payload_of(tmp_path, 400_000)
    assert payload["shown"] == 2
    row = dict(zip(COLUMNS, payload["trees"][0]["nodes"][0], strict=True))
    assert (len(row["text"]), row["length"], row["flags"] & KEPT) == (200, 50_001, 1)
    rows = [dict(zip(COLUMNS, row, strict=True)) for row in payload["trees"][1]["nodes"]]
    assert [(row["text"], row["length"]) for row in rows] == [(one.text, None) for one in small.nodes]


def test_a_half_written_last_line_is_left_out_and_said(tmp_path: Path) -> None:
    path = write_trees(tmp_path / "trees.jsonl", [random_tree(seed, f"q{seed}") for seed in range(3)])
    assert payload_of(tmp_path)["damaged"] == []
    path.write_bytes(path.read_bytes()[:-40])
    payload = payload_of(tmp_path)
    assert payload["damaged"] == ["line 3: half-written, as by a search that is running or was stopped"]
    assert payload["total"] == 2


def test_a_damaged_line_hides_no_other_tree_and_is_said(tmp_path: Path) -> None:
    whole = [random_tree(seed, f"q{seed}") for seed in range(4)]
    path = write_trees(tmp_path / "trees.jsonl", whole)
    lines = path.read_bytes().splitlines(keepends=True)
    bad = [b'{"id": 3}\n', lines[0], b"\xff\n", lines[1][:50] + b"\n", b"[]\n"]
    path.write_bytes(b"".join([lines[0], bad[0], lines[1], *bad[1:], b"\n", *lines[2:]]))
    payload = payload_of(tmp_path)
    assert [one["id"] for one in payload["trees"]] == [one.id for one in whole]
    assert payload["num_damaged"] == 5
    numbers_and_reasons = [
        (2, "not a search tree (schema_version is None"),
        (4, "tree 'q0' is already on line 1"),
        (5, "the line is not UTF-8"),
        (6, "the line is not valid JSON"),
        (7, "expected a JSON object, got list"),
    ]
    for said, (number, reason) in zip(payload["damaged"], numbers_and_reasons, strict=True):
        assert said.startswith(f"line {number}: {reason}"), said


def test_page_takes_the_rule_of_the_search_where_nothing_was_trained(tmp_path: Path) -> None:
    write_trees(tmp_path / "trees.jsonl", [random_tree(1, "q1")])
    (tmp_path / "collect.yaml").write_text("pairs: {rule: lower}\n")
    assert payload_of(tmp_path)["settings"]["rule"] == "lower"
    (tmp_path / "config.yaml").write_text("pairs: {rule: lowest}\n")
    settings = payload_of(tmp_path)["settings"]
    assert (settings["rule"], settings["source"]) == ("lowest", "config.yaml")


def test_damage_is_one_sentence(tmp_path: Path) -> None:
    path = write_trees(tmp_path / "trees.jsonl", [])
    (tmp_path / "config.yaml").write_text("pairs: {rule: best}\n")
    path.write_text("")
    with pytest.raises(ConfigError, match=r"config\.yaml: pairs\.rule"):
        trees_payload(tmp_path, PLENTY)


def test_payload_loads_no_torch() -> None:
    program = "import sys, cpo_fast.report.trees; assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=300)


# ---- the browser


def known_tree() -> Any:
    """Two winning paths' worth of shape: a kept loser with a child, two pruned thoughts, and visits."""
    visits = {"visits": 4}
    nodes = [
        node(0, -1, 1, value=7.5, logps=(-0.5, -0.25), count=3, visits=9),
        node(1, -1, 1, value=8.5, **visits),
        node(2, -1, 1, value=1.0, kept=False, visits=0),
        node(3, -1, 1, value=2.0, kept=False, visits=0),
        node(4, 0, 2, "4", value=6.0, **visits),
        node(5, 0, 2, "5", value=3.0, **visits),
        node(6, 1, 2, "7", value=3.0, **visits),
    ]
    return tree(nodes, (4,), "known", question="What is known?", gold="4")


@pytest.fixture(scope="module")
def page_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of a run of 200 trees, among which `known_tree`, and of one of hostile texts."""
    folder = tmp_path_factory.mktemp("runs")
    trees = [replace(random_tree(seed, f"q{seed}"), gold=str(4 + seed % 2)) for seed in range(NUM_TREES - 2)]
    # what has no pairs is not shown first
    write_trees(folder / "many" / "trees.jsonl", [tree([], (), "lost", question="Lost?"), known_tree(), *trees])
    hostile = write_hostile(folder / "hostile <b>\u202e")
    file, notes = write_report([folder / "many", hostile], folder / "page.html")
    assert notes == []
    assert file.stat().st_size < 5_000_000
    return file


@pytest.fixture
def page(chromium: Chromium, page_file: Path) -> Iterator[Page]:
    """The page at 1440 by 900 pixels. Whatever a test did, the console holds no error, and nothing was requested."""
    page = chromium.open(page_file)
    yield page
    assert page.errors() == []
    assert [url for url in page.requests() if not url.endswith("/page.html")] == []
    page.close()


def focused(page: Page) -> str:
    return page.evaluate("document.activeElement.id")


def texts(page: Page, selector: str) -> list[str]:
    """What people read in every element that is shown."""
    return page.evaluate(
        f"[...document.querySelectorAll({json.dumps(selector)})].filter(e => e.offsetParent).map(e => e.innerText)"
    )


def items(page: Page) -> list[str]:
    """The keys of the tree's items from top to bottom, folds included."""
    return page.evaluate("[...document.querySelectorAll('[role=treeitem]')].map(e => e.id.replace('trees-item-', ''))")


def press(page: Page, *keys: str) -> None:
    for key in keys:
        page.press(key)


def choose(page: Page, key: str, value: str) -> None:
    page.click(f"#trees-{key}-{value}")
    page.settle()


def show_hostile(page: Page) -> None:
    page.evaluate("(s => { s.value = 1; s.dispatchEvent(new Event('change')); })(document.getElementById('trees-run'))")
    page.settle()


def test_first_sight_is_the_winning_path_with_pruned_thoughts_folded(page: Page) -> None:
    assert items(page) == ["-1", "0", "4", "5", "1", "f-1"]
    row = texts(page, "#trees-item-0")[0].split()
    assert " ".join(row) == (
        "Step 1: thought 0. winning chosen kept value 7.500 log-prob -0.750 -0.375 a token 9 visits 3 samples alike"
    )
    assert texts(page, "#trees-item-f-1") == ["2 pruned, all rejected in pairs"]
    assert len(texts(page, "[role=option]")) == NUM_TREES
    assert page.evaluate("document.querySelectorAll('.t-edge-winning').length") == 2
    assert page.evaluate("document.querySelectorAll('.t-mark').length") == 1 + 7 + 4  # question, thoughts, legend


def test_by_mouse_from_a_folded_thought_to_its_pair_and_back(page: Page) -> None:
    page.click("#trees-item-f-1")
    assert items(page) == ["-1", "0", "4", "5", "1", "f-1", "2", "3"]
    page.click("#trees-item-3")
    assert focused(page) == "trees-item-3"
    assert texts(page, "#trees-thought-heading") == ["Thought, step 1"]
    page.click("#trees-to-pairs")
    assert focused(page) == "trees-pair-2"
    assert texts(page, ".t-pair strong") == ["Pair 3"]
    said = " ".join(texts(page, "#trees-pair-2")[0].split())
    assert "step 1 after the question chosen show in tree Step 1: thought 0." in said
    assert "chosen less rejected: value 5.500, log-prob –" in said
    page.click("#trees-item-f-1 .t-caret")
    assert "3" not in items(page)
    page.click("#trees-scope-tree")
    page.click("#trees-pair-2 .t-is-rejected button")
    assert focused(page) == "trees-item-3"
    page.click("#trees-to-pairs")
    page.click("#trees-pair-2 .t-is-chosen button")
    assert focused(page) == "trees-item-0"
    assert texts(page, ".t-pair strong") == ["Pair 1", "Pair 2", "Pair 3"]
    assert texts(page, ".t-badge.t-odd") == ["odd: chosen is not valued higher"]


def test_by_keyboard_from_the_search_to_a_pair_and_back(page: Page) -> None:
    page.evaluate("document.getElementById('trees-search').focus()")
    press(page, "Tab", "Tab")  # the outcomes, the list
    assert focused(page) == "trees-question-1"
    press(page, "ArrowDown", "ArrowUp", "Enter")
    assert focused(page) == "trees-item--1"
    press(page, "ArrowDown")
    assert focused(page) == "trees-item-0"
    press(page, "ArrowLeft")
    assert items(page) == ["-1", "0", "1", "f-1"]
    press(page, "ArrowRight", "ArrowRight")
    assert focused(page) == "trees-item-4"
    press(page, "ArrowLeft", "Enter")
    assert (focused(page), items(page)) == ("trees-item-0", ["-1", "0", "1", "f-1"])
    press(page, " ", "End")
    assert (focused(page), items(page)) == ("trees-item-f-1", ["-1", "0", "4", "5", "1", "f-1"])
    press(page, "Enter", "ArrowDown", "p")
    assert focused(page) == "trees-pair-1"
    press(page, "Tab", "Tab", "Tab", "Enter")  # the prefix, the chosen one's button, the rejected one's
    assert focused(page) == "trees-item-2"
    press(page, "Home", "ArrowUp")
    assert focused(page) == "trees-item--1"
    # one stop of the keyboard in the tree
    assert page.evaluate("document.querySelectorAll('.t-tree [tabindex=\"0\"]').length") == 1
    assert page.evaluate("document.querySelectorAll('.t-tree [aria-selected=true]').length") == 1


def test_filters_show_what_they_say(page: Page, page_file: Path) -> None:
    choose(page, "status", "pruned")
    assert items(page) == ["-1", "2", "3"]
    choose(page, "status", "all")
    assert items(page) == ["-1", "0", "4", "5", "1", "f-1"]
    choose(page, "status", "chosen")
    assert items(page) == ["-1", "0", "4"]
    choose(page, "status", "rejected")
    assert items(page) == ["-1", "0", "5", "1", "2", "3"]
    assert "t-dim" in page.evaluate("document.getElementById('trees-item-0').parentElement.className")
    # what the filter hides is shown again when a pair leads to it
    page.click("#trees-scope-tree")
    page.click("#trees-pair-3 .t-is-chosen button")
    assert (focused(page), page.evaluate("document.getElementById('trees-status-all').checked")) == (
        "trees-item-4",
        True,
    )
    outcomes = [one["outcome"] for one in trees_payload(page_file.parent / "many", PLENTY)["trees"]]  # type: ignore[index]
    assert {"right", "wrong", "none"} == set(outcomes)
    for outcome in ("right", "wrong", "none", "all"):
        choose(page, "outcome", outcome)
        count = NUM_TREES if outcome == "all" else outcomes.count(outcome)
        assert len(texts(page, "[role=option]")) == count
    page.evaluate("document.getElementById('trees-search').focus()")
    page.call("Input.insertText", text="ARE Q17")
    assert len(texts(page, "[role=option]")) == 11  # 17, and 170 to 179
    assert texts(page, ".t-questions [role=status]") == [f"11 of {NUM_TREES} questions"]


def test_a_click_in_the_drawing_selects_the_thought(page: Page) -> None:
    mark = "document.querySelectorAll('.t-node')[4].getBoundingClientRect()"  # of thought 3: the question is the first
    page.evaluate("document.querySelector('.t-drawing').scrollIntoView({block: 'center'})")
    x, y = page.evaluate(f"(r => [r.x + r.width / 2, r.y + r.height / 2])({mark})")
    for kind in ("mousePressed", "mouseReleased"):
        page.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)
    assert focused(page) == "trees-item-3"


def test_from_the_audit_to_an_odd_pair(page: Page) -> None:
    page.evaluate("document.querySelectorAll('.t-more').forEach(e => { e.open = true; })")
    first = texts(page, ".t-more .t-button")[0]
    assert first == "tree 2, pair 1"
    page.click(".t-option:nth-child(5)")
    page.click(".t-more .t-button")
    assert focused(page) == "trees-pair-0"
    assert texts(page, "#trees-question") == ["What is known?"]


def test_only_the_chosen_tree_is_drawn(page: Page) -> None:
    most = 0
    for place in range(0, NUM_TREES, 20):
        page.click(f"#trees-question-{place}")
        most = max(most, page.evaluate("document.querySelectorAll('[role=treeitem]').length"))
    assert 1 < most <= 61  # a tree has 40 thoughts, and as many folds as half of them, and a question


def test_hostile_texts_are_texts(page: Page) -> None:
    show_hostile(page)
    page.click("#trees-item-f-1")
    assert page.evaluate("typeof window.hacked") == "undefined"
    assert page.evaluate("document.querySelectorAll('#trees-app script, #trees-app img, #trees-app b').length") == 0
    shown = page.evaluate("[...document.querySelectorAll('.t-row .t-text')].map(e => e.textContent)")
    for name in ("element", "end of script", "comment", "template", "entity", "marks"):
        assert TEXTS[name] in shown
    assert "ESC[31mredESC[0mBEL" in shown
    assert "שלום U+202EevilU+202C U+2066isolateU+2069 U+200Fmark" in shown
    assert "aU+200B ×3bU+FEFFcU+00ADdU+2060eU+3164f" in shown
    assert "oneNULtwo" in shown
    assert "high U+D83D low U+DC00 end" in shown
    assert "oneCRtwoU+2028threeU+2029fourU+0085fiveTABsix" in shown
    assert (
        page.evaluate(r"document.getElementById('trees').innerText.search(/[\u202a-\u202e\u2066-\u2069\u0000\u001b]/)")
        == -1
    )
    isolated = "[...document.querySelectorAll('.t-row .t-text')].every(e => e.tagName === 'BDI' && e.dir === 'auto')"
    assert page.evaluate(isolated)
    assert "SECRET GOLD" not in page.evaluate("document.documentElement.innerHTML")


def test_long_texts_are_cut_until_all_is_asked_for(page: Page) -> None:
    show_hostile(page)
    page.click("#trees-item-f-1")
    place = list(TEXTS).index("long")
    page.click(f"#trees-item-{place}")
    assert len(texts(page, f"#trees-item-{place}")[0]) < 500
    assert "… of 100,006 characters" in texts(page, f"#trees-item-{place}")[0]
    button = ".t-long button"
    assert texts(page, button) == ["show all 100,005 characters"]
    page.click(button)
    assert page.evaluate("document.querySelector('.t-long .t-text').textContent") == TEXTS["long"]
    assert page.evaluate("document.activeElement.className") == "t-text"
    assert page.evaluate("document.documentElement.scrollWidth") <= 1440


def test_axe_finds_nothing_serious(chromium: Chromium, axe: str, tmp_path: Path) -> None:
    # few trees: axe takes minutes over lists of hundreds
    write_trees(tmp_path / "trees.jsonl", [known_tree(), *(random_tree(seed, f"q{seed}") for seed in range(8))])
    page = chromium.open(write_report([tmp_path], tmp_path / "page.html")[0])
    page.evaluate("document.querySelectorAll('#trees details').forEach(e => { e.open = true; })")
    page.click("#trees-item-f-1")
    page.click("#trees-item-3")
    page.evaluate(axe + "; 0")
    for width in (1440, 390):
        for dark in (False, True):
            page.show(width, 900, dark)
            page.settle()
            violations = page.evaluate(
                "axe.run('#trees', {resultTypes: ['violations']}).then(r => r.violations.map(v => "
                "[v.impact, v.id, v.nodes.map(n => n.target.join(' ')).slice(0, 3)]))"
            )
            assert [one for one in violations if one[0] in ("serious", "critical")] == []
            assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.close()


def test_columns_stand_beside_each_other_or_below(page: Page) -> None:
    def lefts() -> list[float]:
        return page.evaluate(
            "['.t-questions', '.t-main', '.t-side'].map(s => document.querySelector(s).getBoundingClientRect().x)"
        )

    assert lefts() == sorted(set(lefts()))
    page.show(390)
    page.settle()
    assert len(set(lefts())) == 1
    assert page.evaluate("document.querySelector('.t-drawing').getBoundingClientRect().right") <= 390
