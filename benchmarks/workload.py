"""The preference data that the attention and training benchmarks run on: search trees under one few-shot prompt.

A tree has a question, NUM_LEVELS steps, and at every step one winning thought and some that lost: one pair for every
thought that lost, whose prompt is all that leads to it. Thoughts of one step differ from their first token on.
"""

import random
from dataclasses import dataclass

Pair = tuple[list[int], list[int], list[int]]  # prompt, chosen, rejected token ids


@dataclass(frozen=True)
class TreeShape:
    """Sizes in tokens. The default is the method's usual shape: 27 pairs a tree."""

    few_shot: int = 450
    question: int = 50
    num_levels: int = 3
    num_rejected: int = 9
    thought: int = 40  # give or take a tenth
    vocab_size: int = 32000


TINY = TreeShape(few_shot=24, question=8, num_levels=2, num_rejected=2, thought=6, vocab_size=97)


def tree_pairs(num_trees: int, shape: TreeShape, seed: int = 0) -> list[list[Pair]]:
    """The pairs of every tree, level by level."""
    generator = random.Random(seed)

    def ids(count: int) -> list[int]:
        return [generator.randrange(10, shape.vocab_size) for _ in range(count)]

    few_shot, trees = ids(shape.few_shot), []
    for _ in range(num_trees):
        path, pairs = few_shot + ids(shape.question), []
        for _ in range(shape.num_levels):
            firsts = generator.sample(range(10, shape.vocab_size), shape.num_rejected + 1)
            spread = max(1, shape.thought // 10)
            lengths = [shape.thought + generator.randint(-spread, spread) for _ in firsts]
            thoughts = [[first, *ids(length - 1)] for first, length in zip(firsts, lengths, strict=True)]
            pairs += [(list(path), thoughts[0], rejected) for rejected in thoughts[1:]]
            path = path + thoughts[0]
        trees.append(pairs)
    return trees


def step_pairs(order: str, num_pairs: int, shape: TreeShape, seed: int = 0) -> list[Pair]:
    """The pairs of one optimizer step.

    Args:
        order: "pairs", each from another tree, as independent shuffling of a large set gives; or "questions", whole
            trees, one after another.
        num_pairs: how many.
        shape: of every tree.
        seed: of the tokens and of the choice.

    Raises:
        ValueError: an unknown order.
    """
    if order == "questions":
        num_trees = -(-num_pairs // (shape.num_levels * shape.num_rejected))
        return [pair for tree in tree_pairs(num_trees, shape, seed) for pair in tree][:num_pairs]
    if order != "pairs":
        raise ValueError(f"order: expected 'pairs' or 'questions', got {order!r}")
    generator = random.Random(seed + 1)
    return [generator.choice(tree) for tree in tree_pairs(num_pairs, shape, seed)]


def sequences_of(pairs: list[Pair]) -> tuple[list[list[int]], list[int]]:
    """Prompt + chosen, prompt + rejected of every pair in turn, and where each response starts."""
    sequences = [prompt + response for prompt, chosen, rejected in pairs for response in (chosen, rejected)]
    return sequences, [len(prompt) for prompt, _, _ in pairs for _ in range(2)]
