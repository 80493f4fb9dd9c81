"""Search trees written by hand and drawn at random, and files that hold them."""

import random
from collections.abc import Sequence
from pathlib import Path

from cpo_fast.files import write_jsonl
from cpo_fast.tree import Node, Prompt, SearchTree

PROMPT = Prompt.build("few shot\n\n", [1, 2, 3])


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


def tree(nodes: Sequence[Node], winning: tuple[int, ...], tree_id: str = "t", **changes: object) -> SearchTree:
    """A tree of these nodes."""
    values = {
        "id": tree_id,
        "task": "svamp",
        "question": "How many?",
        "gold": None,
        "prompt_hash": PROMPT.hash,
        "num_shared_tokens": 2,
        "question_token_ids": (50, 51),
        "nodes": tuple(nodes),
        "winning_nodes": winning,
        "answer": "4" if winning else None,
        "num_empty": 0,
        "status": "ok" if winning else "no_answer",
        "detail": "",
        "model_hash": "m",
        "adapter_hash": "",
        "seed": 0,
        "config_hash": "c",
    }
    return SearchTree(**(values | changes))  # type: ignore[arg-type]


def random_tree(seed: int, tree_id: str = "t") -> SearchTree:
    """Up to 40 thoughts of random shape; values are few, so that ties and missing ones abound; random winners."""
    generator = random.Random(f"{tree_id} {seed}")
    nodes: list[Node] = []
    for node_id in range(generator.randint(1, 40)):
        parent = generator.choice([-1, *(one.id for one in nodes if not one.terminal)])
        depth = 1 if parent == -1 else nodes[parent].depth + 1
        answer = generator.choice("456") if generator.random() < 0.4 else None
        # a chain may break off: terminal, but not complete
        broken = answer is not None and generator.random() < 0.2
        nodes.append(
            node(
                node_id,
                parent,
                depth,
                answer,
                value=generator.choice([None, 1.0, 2.0, 2.0, 5.5]),
                complete=answer is not None and not broken,
                stop="length" if broken else "newline",
                token_ids=(100 + generator.randint(0, 200), node_id + 3),
            )
        )
    complete = [one.id for one in nodes if one.complete]
    winners = tuple(sorted(generator.sample(complete, generator.randint(0, len(complete)))))
    return tree(nodes, winners, tree_id, question=f"How many are {tree_id}?", question_token_ids=(50, seed % 40, 51))


def write_trees(path: Path, trees: Sequence[SearchTree]) -> Path:
    """Write `trees.jsonl` and the prompt beside it; returns the path."""
    PROMPT.save(path)
    write_jsonl(path, [one.to_dict() for one in trees])
    return path
