"""Fixtures: a file of two trees, one of which has a winner."""

from pathlib import Path

import pytest

from tests.data.hand_made import node, tree, write_trees


@pytest.fixture
def trees_path(tmp_path: Path) -> Path:
    """Tree `a` with one loser at each of its two steps, and tree `b` without an answer."""
    nodes = [node(0, -1, 1), node(1, -1, 1), node(2, 0, 2, "4"), node(3, 0, 2, "5")]
    return write_trees(tmp_path / "trees.jsonl", [tree(nodes, (2,), "a"), tree(nodes, (), "b")])
