"""The rule `all` on hand-made trees, and the files it writes as other libraries read them."""

import json
import random
from pathlib import Path

import pytest

from cpo_fast.data.pairs import tree_pairs, write_pairs
from cpo_fast.files import write_jsonl
from cpo_fast.tasks import get_task
from cpo_fast.tree import Node, Prompt, SearchTree


def node(node_id: int, parent: int, depth: int, answer: str | None = None, **changes: object) -> Node:
    """A thought; with `answer` a complete answer line."""
    text = f"Answer: {answer}\n" if answer is not None else f"Step {depth}: thought {node_id}.\n"
    values = {
        "id": node_id,
        "parent": parent,
        "depth": depth,
        "text": text,
        "token_ids": (100 + node_id, 10),
        "value": 5.0,
        "evaluations": (),
        "kept": True,
        "terminal": answer is not None,
        "complete": answer is not None,
        "count": 1,
        "answer": answer,
        "stop": "newline",
    }
    return Node(**(values | changes))  # type: ignore[arg-type]


def tree(nodes: list[Node], winning: tuple[int, ...], tree_id: str = "t", prompt_hash: str = "h") -> SearchTree:
    return SearchTree(
        id=tree_id,
        task="svamp",
        question="How many?",
        gold=None,
        prompt_hash=prompt_hash,
        num_shared_tokens=2,
        question_token_ids=(50, 51),
        nodes=tuple(nodes),
        winning_nodes=winning,
        answer="4" if winning else None,
        num_empty=0,
        status="ok" if winning else "no_answer",
        detail="",
        model_hash="m",
        adapter_hash="",
        seed=0,
        config_hash="c",
    )


def ids(pairs: list) -> list[tuple[int, int, int]]:
    return [(pair.parent, pair.chosen.id, pair.rejected.id) for pair in pairs]


def test_pruned_siblings_are_rejected_ones() -> None:
    nodes = [node(0, -1, 1), node(1, -1, 1, kept=False), node(2, -1, 1, kept=False), node(3, 0, 2, "4")]
    assert ids(tree_pairs(tree(nodes, (3,)))) == [(-1, 0, 1), (-1, 0, 2)]


def test_children_of_losing_states_are_never_used() -> None:
    nodes = [
        node(0, -1, 1),
        node(1, -1, 1),
        node(2, 0, 2, "4"),
        node(3, 0, 2, "5"),
        node(4, 1, 2, "6"),
        node(5, 1, 2, "7"),
    ]
    assert ids(tree_pairs(tree(nodes, (2,)))) == [(-1, 0, 1), (0, 2, 3)]


def test_winning_paths_through_one_state_never_reject_each_other() -> None:
    nodes = [
        node(0, -1, 1),
        node(1, -1, 1),
        node(2, 0, 2, "4"),
        node(3, 0, 2, "4"),
        node(4, 0, 2, "9"),
        node(5, 1, 2, "4"),
    ]
    assert ids(tree_pairs(tree(nodes, (2, 3, 5)))) == [(0, 2, 4), (0, 3, 4)]


@pytest.mark.parametrize(
    "nodes",
    [
        [],
        [node(0, -1, 1), node(1, -1, 1)],  # no answer
    ],
)
def test_no_winning_path_gives_no_pair(nodes: list[Node]) -> None:
    assert tree_pairs(tree(nodes, ())) == []


def test_one_candidate_gives_no_pair() -> None:
    assert tree_pairs(tree([node(0, -1, 1), node(1, 0, 2, "4")], (1,))) == []


def test_chosen_is_on_a_winning_path_and_rejected_is_a_sibling_off_every_one() -> None:
    for seed in range(200):
        generator = random.Random(seed)
        nodes: list[Node] = []
        for node_id in range(generator.randint(1, 25)):
            open_nodes = [-1, *(n.id for n in nodes if not n.terminal)]
            parent = generator.choice(open_nodes)
            depth = 1 if parent == -1 else nodes[parent].depth + 1
            nodes.append(node(node_id, parent, depth, "4" if generator.random() < 0.3 else None))
        complete = [n.id for n in nodes if n.complete]
        winners = tuple(sorted(generator.sample(complete, generator.randint(0, len(complete)))))
        searched = tree(nodes, winners)
        on_winning_path = {n.id for winner in winners for n in searched.path(winner)}
        pairs = tree_pairs(searched)
        assert len({(p.chosen.id, p.rejected.id) for p in pairs}) == len(pairs)
        for pair in pairs:
            assert pair.chosen.id in on_winning_path
            assert pair.rejected.id not in on_winning_path
            assert pair.chosen.parent == pair.rejected.parent == pair.parent


@pytest.fixture
def trees_path(tmp_path: Path) -> Path:
    prompt = Prompt.build("few shot", [1, 2, 3])
    nodes = [node(0, -1, 1), node(1, -1, 1), node(2, 0, 2, "4"), node(3, 0, 2, "5")]
    prompt.save(tmp_path / "trees.jsonl")
    write_jsonl(
        tmp_path / "trees.jsonl",
        [tree(nodes, (2,), "a", prompt.hash).to_dict(), tree(nodes, (), "b", prompt.hash).to_dict()],
    )
    return tmp_path / "trees.jsonl"


def test_rows_carry_the_ids_of_the_search(trees_path: Path) -> None:
    counts = write_pairs(trees_path, trees_path.with_name("pairs.jsonl"))
    rows = [json.loads(line) for line in trees_path.with_name("pairs.jsonl").read_text().splitlines()]
    assert counts.num_pairs == len(rows) == 2
    assert counts.pairs_by_step == {1: 1, 2: 1}
    assert counts.trees_without_pairs == {"no_answer": 1}
    first, second = rows
    assert first["prompt_token_ids"] == [1, 2, 50, 51]
    assert (first["chosen_token_ids"], first["rejected_token_ids"]) == ([100, 10], [101, 10])
    assert second["prompt_token_ids"] == [1, 2, 50, 51, 100, 10]
    assert second["prompt"] == get_task("svamp").few_shot + "Question: How many?\nStep 1: thought 0.\n"
    assert (first["chosen_final"], second["chosen_final"], second["rejected_final"]) == (False, True, True)


def test_same_trees_give_the_same_bytes(trees_path: Path) -> None:
    write_pairs(trees_path, trees_path.with_name("one.jsonl"))
    write_pairs(trees_path, trees_path.with_name("two.jsonl"))
    assert trees_path.with_name("one.jsonl").read_bytes() == trees_path.with_name("two.jsonl").read_bytes()


def test_datasets_and_trl_read_the_file_unmodified(trees_path: Path, tmp_path: Path) -> None:
    from datasets import load_dataset
    from trl import DPOConfig, DPOTrainer

    from tests.tiny import tiny_llama, tiny_tokenizer, with_lora

    write_pairs(trees_path, trees_path.with_name("pairs.jsonl"))
    data = load_dataset(
        "json", data_files=str(trees_path.with_name("pairs.jsonl")), split="train", cache_dir=str(tmp_path)
    )
    options = DPOConfig(
        output_dir=str(tmp_path / "trl"), max_steps=1, per_device_train_batch_size=2, use_cpu=True, bf16=False,
        gradient_checkpointing=False, max_length=None, report_to=[], save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    tokenizer = tiny_tokenizer()
    model = with_lora(tiny_llama(vocab_size=len(tokenizer), max_position_embeddings=4096))
    trainer = DPOTrainer(model=model, args=options, train_dataset=data, processing_class=tokenizer)
    row = trainer.train_dataset[0]
    assert tokenizer.decode(row["prompt_ids"]) == data[0]["prompt"]
    assert tokenizer.decode(row["chosen_ids"]) == data[0]["chosen"] + "<eos>"
    trainer.train()
