"""Claims about the forest: its arrays are those of the definition, for any trie, and bad input is named."""

import gc
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cpo_kernels.forest import Forest, build_forest
from tests.cpo_kernels.forest_oracle import oracle_forest, random_sequences
from tests.fixtures.make_forest_golden import golden_text

GOLDEN = json.loads((Path(__file__).parent.parent / "fixtures" / "forest_golden.json").read_text())
INT32_ARRAYS = ("tokens", "position_ids", "subtree_end", "parent_row", "path_rows")


def as_lists(forest: Forest) -> dict[str, Any]:
    arrays = {name: getattr(forest, name).tolist() for name in (*INT32_ARRAYS, "path_offsets")}
    return arrays | {"num_tokens": forest.num_tokens}


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda case: case["name"])
def test_golden_case_is_reproduced(case: dict[str, Any]) -> None:
    forest = build_forest(case["sequences"], case["pad_to_multiple_of"])
    assert as_lists(forest) == case["forest"]
    plan = forest.logprob_plan(case["starts"])
    got = {name: getattr(plan, name).tolist() for name in ("rows", "targets", "segments")}
    assert got == case["logprob_plan"]


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda case: case["name"])
def test_golden_file_follows_from_the_definition(case: dict[str, Any]) -> None:
    """Guards the file itself, which other projects read, against a regeneration from wrong code."""
    assert oracle_forest(case["sequences"], case["pad_to_multiple_of"]) == case["forest"]
    offsets, rows = case["forest"]["path_offsets"], case["forest"]["path_rows"]
    scored = [
        (rows[offsets[s] + t - 1], sequence[t], s)  # the parent row of a token is the row before it on its path
        for s, (sequence, start) in enumerate(zip(case["sequences"], case["starts"], strict=True))
        for t in range(start, len(sequence))
    ]
    plan = case["logprob_plan"]
    assert scored == list(zip(plan["rows"], plan["targets"], plan["segments"], strict=True))


@pytest.mark.parametrize("seed", range(300))
def test_random_forest_equals_the_definition(seed: int) -> None:
    rng = np.random.default_rng(seed)
    sequences = random_sequences(rng)
    multiple = int(rng.integers(1, 9))
    assert as_lists(build_forest(sequences, multiple)) == oracle_forest(sequences, multiple)


def test_arrays_are_contiguous_and_of_the_stated_types() -> None:
    forest = build_forest([[5, 6], [5, 7]])
    for name in INT32_ARRAYS:
        assert getattr(forest, name).dtype == torch.int32, name
        assert getattr(forest, name).is_contiguous(), name
    assert forest.path_offsets.dtype == torch.int64


def test_equal_sequences_share_rows() -> None:
    forest = build_forest([[1, 2, 3], [1, 2, 3]])
    assert forest.num_tokens == 3
    assert forest.path_rows.tolist() == [0, 1, 2, 0, 1, 2]


def test_lists_arrays_and_tensors_give_the_same_forest() -> None:
    sequences = [[1, 2, 3], [1, 2], [4]]
    mixed = [tuple(sequences[0]), np.array(sequences[1], np.int32), torch.tensor(sequences[2], dtype=torch.int16)]
    strided = [torch.tensor(s).repeat_interleave(2)[::2] for s in sequences]
    assert as_lists(build_forest(mixed)) == as_lists(build_forest(sequences)) == as_lists(build_forest(strided))


def test_no_sequences_give_no_rows() -> None:
    forest = build_forest([], pad_to_multiple_of=64)
    assert forest.num_tokens == 0
    assert all(getattr(forest, name).numel() == 0 for name in INT32_ARRAYS)
    assert forest.path_offsets.tolist() == [0]
    assert forest.logprob_plan([]).rows.numel() == 0


def test_largest_int32_id_survives() -> None:
    assert build_forest([[2**31 - 1, 0]]).tokens.tolist() == [2**31 - 1, 0]


def test_hundred_thousand_tokens_deep_does_not_recurse() -> None:
    length = 100_000
    trunk = list(range(length))
    forest = build_forest([trunk, [*trunk[:-1], 7], trunk[: length // 2]])
    assert forest.num_tokens == length + 1
    assert forest.position_ids[-1].item() == length - 1
    assert forest.parent_row[-1].item() == length - 2
    assert torch.equal(forest.subtree_end[: length - 1], torch.full((length - 1,), length + 1, dtype=torch.int32))


def test_every_prefix_of_one_chain_is_a_path_on_it() -> None:
    """A branch-free trie with a sequence ending at every depth: as many runs as sequences on one path."""
    forest = build_forest([[9] * length for length in range(300, 0, -1)])
    assert forest.num_tokens == 300
    for s, length in enumerate(range(300, 0, -1)):
        path = forest.path_rows[forest.path_offsets[s] : forest.path_offsets[s + 1]]
        assert path.tolist() == list(range(length))


def test_thousands_of_children_keep_their_order() -> None:
    children = np.random.default_rng(0).permutation(20_000).tolist()
    forest = build_forest([[3, child] for child in children])
    assert forest.tokens.tolist() == [3, *children]
    assert set(forest.parent_row[1:].tolist()) == {0}


def test_a_tensor_outlives_its_forest() -> None:
    tokens = build_forest([list(range(5000))]).tokens
    gc.collect()
    for _ in range(20):  # memory freed too early would be handed out again here
        build_forest([[1] * 5000])
    assert torch.equal(tokens, torch.arange(5000, dtype=torch.int32))


def test_to_moves_every_tensor() -> None:
    moved = build_forest([[1, 2], [1, 3]], 4).to("meta")
    assert all(getattr(moved, name).device.type == "meta" for name in (*INT32_ARRAYS, "path_offsets"))
    assert moved.num_tokens == 3


@pytest.mark.parametrize(
    ("sequences", "message"),
    [
        ([[1], []], "sequence 1 is empty"),
        ([[], [1]], "sequence 0 is empty"),
        ([[1], [2, -1]], "sequence 1: expected token ids in .*got -1 at token 1"),
        ([[1], [2], [2**31]], "sequence 2: expected token ids in .*got 2147483648 at token 0"),
        ([[2**70]], "sequence 0: expected integer token ids"),
        ([[1], [1.5]], "sequence 1: expected integer token ids"),
        ([np.zeros(3)], "sequence 0: expected 1-D integers, got .*float64"),
        ([[1], torch.zeros(1, 3, dtype=torch.int64)], r"sequence 1: expected 1-D integers, got shape \(1, 3\)"),
        ([torch.zeros(0, dtype=torch.int64)], "sequence 0 is empty"),
    ],
)
def test_a_bad_sequence_is_named(sequences: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_forest(sequences)


@pytest.mark.parametrize("multiple", [0, -4, 2**31])
def test_a_bad_multiple_is_refused(multiple: int) -> None:
    with pytest.raises(ValueError, match="pad_to_multiple_of"):
        build_forest([[1]], multiple)


def test_golden_file_is_what_its_script_writes() -> None:
    assert (Path(__file__).parent.parent / "fixtures" / "forest_golden.json").read_text() == golden_text()
