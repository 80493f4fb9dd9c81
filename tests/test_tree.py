"""The search tree's file format: exact round trip, canonical bytes, and bad lines by file:line."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from cpo_fast.errors import DataError
from cpo_fast.files import canonical_json
from cpo_fast.tree import Node, Prompt, SearchTree, read_prompt, read_trees, rounded_logps

PROMPT = Prompt.build("few shots\n\n", [1, 10, 11, 12])


def _node(identity, parent, depth, token_ids, answer=None):
    evaluations = ({"impossible": -2.5, "likely": -0.1},)
    complete = answer is not None
    return Node(
        identity,
        parent,
        depth,
        f"thought {identity}\n",
        token_ids,
        9.25,
        evaluations,
        True,
        complete,
        complete,
        1,
        answer,
        "newline",
        (-0.5,) * len(token_ids),
    )


def _tree(**changes):
    nodes = (_node(0, -1, 1, (20, 21)), _node(1, -1, 1, (22,)), _node(2, 0, 2, (23, 24), "7"), _node(3, 0, 2, (25,)))
    tree = SearchTree(
        id="q1",
        task="svamp",
        question="How many é?",
        gold="7",
        prompt_hash=PROMPT.hash,
        num_shared_tokens=3,
        question_token_ids=(13, 14),
        nodes=nodes,
        winning_nodes=(2,),
        answer="7",
        num_empty=1,
        status="ok",
        detail="",
        model_hash="a" * 16,
        adapter_hash="",
        seed=0,
        config_hash="b" * 16,
        num_thought_tokens=31,
        num_verdict_tokens=7,
        question_prompt="Question: How many é?\n",
    )
    return replace(tree, **changes)


def _write(path, *trees):
    path.write_text("".join(canonical_json(tree.to_dict()) + "\n" for tree in trees), encoding="utf-8")
    return path


def test_a_tree_survives_the_file_unchanged_and_its_bytes_are_canonical(tmp_path):
    path = _write(
        tmp_path / "trees.jsonl", _tree(), _tree(id="q2", status="failed", nodes=(), winning_nodes=(), detail="x")
    )
    trees = read_trees(path)
    assert trees[0] == _tree()
    assert [tree.id for tree in trees] == ["q1", "q2"]
    assert path.read_text("utf-8").splitlines()[0] == canonical_json(trees[0].to_dict())


def test_an_imported_tree_may_tell_no_log_probs():
    row = _edit_node(2, logps=[])
    assert SearchTree.from_dict(row).nodes[2].logps == ()


def test_log_probs_are_rounded_once_and_zero_has_no_sign():
    assert rounded_logps([-1.23456789, -1e-9, 0.0]) == (-1.234568, 0.0, 0.0)
    assert canonical_json(rounded_logps([-1e-9, -0.1000004])) == "[0.0,-0.1]"


def test_children_paths_and_ids():
    tree = _tree()
    assert [node.id for node in tree.children(-1)] == [0, 1]
    assert [node.id for node in tree.children(0)] == [2, 3]
    assert [node.id for node in tree.path(3)] == [0, 3]
    assert tree.path(-1) == []
    assert tree.path_ids(2) == [20, 21, 23, 24]
    assert tree.root_ids(PROMPT) == [1, 10, 11, 13, 14]
    with pytest.raises(ValueError, match="was searched with prompt"):
        tree.root_ids(Prompt.build("another", [1]))


def test_the_prompt_is_stored_once_and_a_changed_one_is_noticed(tmp_path):
    trees_path = tmp_path / "trees.jsonl"
    file = PROMPT.save(trees_path)
    assert file == tmp_path / "prompts" / f"{PROMPT.hash}.json"
    assert read_prompt(trees_path, PROMPT.hash) == PROMPT
    file.write_text(file.read_text().replace("few", "new"))
    with pytest.raises(DataError, match="changed after the search"):
        read_prompt(trees_path, PROMPT.hash)
    with pytest.raises(DataError, match="cannot read"):
        read_prompt(trees_path, "0" * 16)


def _edit(**changes):
    return {**_tree().to_dict(), **changes}


def _edit_node(position, **changes):
    row = json.loads(canonical_json(_tree().to_dict()))
    row["nodes"][position].update(changes)
    return row


def _edit_visits(parent, child):
    row = _edit_node(0, visits=parent)
    row["nodes"][2]["visits"] = child
    return row


def test_visits_are_written_where_a_search_counted_them_and_nowhere_else():
    row = _edit_visits(3, 0)
    assert json.loads(canonical_json(SearchTree.from_dict(row).to_dict())) == row
    assert "visits" not in canonical_json(_tree().to_dict())
    assert SearchTree.from_dict(_edit_node(0)).nodes[0].visits is None


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (_edit(schema_version=1), "schema_version is 1, this version reads 2: another version"),
        ({"question": "How many?"}, "schema_version is None, this version reads 2: no search wrote it"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "but a row to train on.* train takes this file as data.path"),
        ({"prompt": "a", "completion": "b"}, "but a row to train on"),
        ({"schema_version": 2}, "missing"),
        (_edit(extra=1), r"unknown \['extra'\]"),
        (_edit(question=3), "'question' has type int"),
        (_edit(num_shared_tokens=True), "'num_shared_tokens' has type bool"),
        (_edit(num_thought_tokens=1.5), "'num_thought_tokens' has type float"),
        ({key: value for key, value in _edit().items() if key != "num_verdict_tokens"}, r"missing \['num_verdict"),
        (_edit(status="fine"), "status 'fine'"),
        (_edit(winning_nodes=[3]), "winning node 3 is not a complete node"),
        (_edit(winning_nodes=[9]), "winning node 9"),
        (_edit(question_token_ids=[1, -2]), "'question_token_ids' is not a list of non-negative integers"),
        (_edit_node(1, id=5), "has id 5"),
        (_edit_node(1, parent=1), "parents come before children"),
        (_edit_node(2, depth=1), "node 2 has depth 1"),
        (_edit_node(2, token_ids=[]), "has no tokens"),
        (_edit_node(2, token_ids=[1.5]), "'token_ids' is not a list"),
        (_edit_node(2, value="high"), "'value' has type str"),
        (_edit_node(2, evaluations=[3]), "'evaluations' is not a list of objects"),
        (_edit_node(2, stop="tired"), "stop 'tired'"),
        (_edit_node(2, logps=None), "'logps' has type NoneType"),
        (_edit_node(2, logps=[-0.5, 0.1]), "'logps' is not a list of finite log-probs"),
        (_edit_node(2, logps=[-0.5, "low"]), "'logps' is not a list of finite log-probs"),
        (_edit_node(2, logps=[-0.5]), "has 1 logps for 2 generated tokens"),
        (_edit_node(2, stop="eos"), "has 2 logps for 3 generated tokens"),
        (_edit_node(2, visits=-1), "node 2 has -1 visits"),
        (_edit_node(2, visits=1.0), "'visits' has type float"),
        (_edit_visits(3, 4), "node 2 has 4 visits and its parent 3"),
    ],
)
def test_a_line_that_is_no_tree_is_named_with_its_place(tmp_path, row, message):
    path = _write(tmp_path / "trees.jsonl", _tree())
    with open(path, "a", encoding="utf-8") as file:
        file.write(canonical_json({**row, "id": "q2"} if "id" in row else row) + "\n")
    with pytest.raises(DataError, match=rf"trees\.jsonl:2: not a search tree .*{message}"):
        read_trees(path)


@pytest.mark.parametrize("value", ["NaN", "-Infinity", "1e400", "1e308", "1" + "0" * 400, "1" * 5000])
@pytest.mark.parametrize("name", ["value", "evaluations"])
def test_a_verdict_that_is_no_usable_number_is_named(tmp_path, name, value):
    row = _edit_node(2, **{name: "@" if name == "value" else [{"imported": "@"}]})
    (tmp_path / "trees.jsonl").write_text(json.dumps(row).replace('"@"', value) + "\n")
    with pytest.raises(DataError, match=r"trees\.jsonl:1: .*(is not a number up to 1e\+100|4300 digits)"):
        read_trees(tmp_path / "trees.jsonl")


def test_broken_json_doubled_ids_and_torn_tails(tmp_path):
    path = _write(tmp_path / "trees.jsonl", _tree(), _tree())
    with pytest.raises(DataError, match=r":2: tree 'q1' is already on line 1"):
        read_trees(path)
    _write(path, _tree())
    with open(path, "a", encoding="utf-8") as file:
        file.write('{"schema_version": 1, "id"')
    with pytest.raises(DataError, match=r":2: the line is not valid JSON"):
        read_trees(path)
    assert [tree.id for tree in read_trees(path, drop_torn_tail=True)] == ["q1"]


@pytest.mark.parametrize(
    "name", ["../../etc/passwd", "/etc/passwd", "..", "a/b", "", "C:evil", "0" * 15, "0" * 15 + "\n", "con\x00"]
)
def test_hostile_prompt_hash_never_becomes_a_path(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match="not 16 hexadecimal digits"):
        read_prompt(tmp_path / "trees.jsonl", name)
