"""The reduced set of golden runs gives what it gave when `expected.json` was written, on any machine.

`expected.json` holds only what does not depend on a machine (see `portable`): all trees, prompts, pairs, and texts and
counts of metrics and evaluations exactly, floats and adapters to a tolerance. Byte-equality of two checkouts on one machine
is what `python -m tests.golden.runs` shows. A wanted change of results is written down by

    python -m tests.golden.runs run OUT --small && python -m tests.golden.runs expect OUT
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.golden import normalised, portable
from tests.golden.run_list import small_runs
from tests.golden.runs import EXPECTED, SETTINGS, perform


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of the reduced set."""
    folder = tmp_path_factory.mktemp("golden") / "out"
    num_threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in SETTINGS.items():
            patch.setenv(name, value)
        patch.delenv("CPO_KERNELS_IMPL", raising=False)
        try:
            perform(folder, small=True, progress=lambda line: None)
        finally:
            torch.set_num_threads(num_threads)
    return folder


def test_the_reduced_set_gives_what_it_gave(out: Path) -> None:
    expected = json.loads(EXPECTED.read_text(encoding="utf-8"))
    assert portable.disagreements(expected, portable.summary(out)) == []


def test_the_reduced_set_has_winners_ties_duplicates_and_broken_chains(out: Path) -> None:
    """Without them half of the rules would go untested."""
    trees = [
        json.loads(line) for path in sorted(out.glob("runs/*/*/trees.jsonl")) for line in path.open(encoding="utf-8")
    ]
    nodes = [node for tree in trees for node in tree["nodes"]]
    assert len(trees) >= 3 * len(list(out.glob("runs/collect/*")))
    assert {node["stop"] for node in nodes} == {"newline", "eos", "length"}
    assert any(node["count"] > 1 for node in nodes)
    assert sum(tree["num_empty"] for tree in trees) > 0
    assert sum(len(tree["winning_nodes"]) > 1 for tree in trees) > 1
    assert sum(node["complete"] for node in nodes) > sum(len(tree["winning_nodes"]) for tree in trees)
    siblings = [[node["value"] for node in tree["nodes"] if node["parent"] == -1] for tree in trees]
    assert any(len(set(values)) < len(values) for values in siblings)
    for task in ("svamp", "hotpotqa", "fever"):
        sizes = [
            len((out / f"runs/pairs/{task}/{rule}.jsonl").read_text().splitlines()) for rule in ("all", "lower", "fpo")
        ]
        assert sizes[0] > sizes[1] > 0
        assert sizes[2] > 0


def test_both_summaries_of_a_folder_are_equal_and_leave_no_run_out(out: Path) -> None:
    found = portable.summary(out)
    assert portable.disagreements(found, json.loads(json.dumps(found))) == []
    names = normalised.files_of(out)
    for run in small_runs():
        assert any(name.startswith(f"{run.folder}/") for name in names), run.name


NODES = [{"text": "x", "value": 0.25}, {"text": "y", "value": None}]
ROWS: list[dict[str, Any]] = [{"id": "a", "nodes": NODES, "loss": 1.0, "seconds": 3.0}]


def changed(**values: object) -> list[dict[str, Any]]:
    return [{**ROWS[0], **values}]


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        (changed(seconds=9.0), ""),
        (changed(loss=1.0 + 1e-7), ""),
        (changed(loss=1.1), "loss: weighted sum"),
        (changed(nodes=NODES[::-1]), "nodes.text: other values, or in another order"),
        (changed(nodes=NODES[:1]), "nodes[]: other values"),
        (changed(more=1), "{}: other values"),
        (changed(id="b"), "id: other values"),
    ],
)
def test_a_change_is_named_and_a_last_bit_is_none(rows: list[dict[str, Any]], reason: str, tmp_path: Path) -> None:
    summaries = []
    for number, content in enumerate((ROWS, rows)):
        path = tmp_path / str(number) / "runs" / "rows.jsonl"
        path.parent.mkdir(parents=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in content), encoding="utf-8")
        summaries.append(portable.summary(tmp_path / str(number)))
    wrong = portable.disagreements(*summaries)
    assert any(reason in sentence for sentence in wrong) if reason else wrong == []


def test_times_alone_make_no_difference_of_two_folders_and_a_text_does(tmp_path: Path) -> None:
    for name, seconds, text in (("a", 1.5, "x"), ("b", 22.0, "x"), ("c", 1.5, "y")):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "rows.jsonl").write_text(json.dumps({"text": text, "seconds": seconds}) + "\n", encoding="utf-8")
        (folder / "table.csv").write_text(f"label,seconds_mean,text\nbase,{seconds},{text}\n", encoding="utf-8")
        (folder / "said.txt").write_text(f"│ seconds │ {seconds} │\nstep 1/2 {text} {seconds} s\n", encoding="utf-8")
        (folder / "timings.jsonl").write_text(f"{seconds}\n", encoding="utf-8")
    assert list(normalised.differences(tmp_path / "a", tmp_path / "b")) == []
    found = list(normalised.differences(tmp_path / "a", tmp_path / "c"))
    assert [each.partition(":")[0] for each in found] == ["rows.jsonl", "said.txt", "table.csv"]
