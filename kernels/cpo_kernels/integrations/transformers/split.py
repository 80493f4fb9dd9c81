"""Cut a step's pairs into micro-batches whose forests fit a token budget, keeping what shares a prefix together."""

from collections.abc import Sequence

Pair = tuple[Sequence[int], Sequence[int], Sequence[int]]  # prompt ids, chosen ids, rejected ids


def split_pairs(pairs: Sequence[Pair], max_tokens: int) -> list[list[int]]:
    """Micro-batches of pair indices; the forest of each has at most `max_tokens` tokens.

    Pairs are visited in the lexicographic order of their prompts, so pairs of one prompt, then of one question, are
    neighbours; a micro-batch is closed when the next pair's new tokens would exceed the budget. The token count is
    exact: a pair costs the nodes that it adds to the micro-batch's token trie.

    Args:
        pairs: (prompt ids, chosen ids, rejected ids) of each pair.
        max_tokens: budget of one micro-batch in forest tokens.

    Returns:
        Lists of indices into `pairs`; every index appears exactly once.

    Raises:
        ValueError: a single pair has more tokens than the budget.
    """
    order = sorted(range(len(pairs)), key=lambda index: (tuple(pairs[index][0]), index))
    batches: list[list[int]] = []
    trie: dict[int, dict] = {}
    used = 0
    for index in order:
        prompt, chosen, rejected = pairs[index]
        rows = ([*prompt, *chosen], [*prompt, *rejected])
        added = sum(_insert(trie, row) for row in rows)
        if used + added > max_tokens or not batches:
            trie = {}
            used, added = 0, sum(_insert(trie, row) for row in rows)
            if added > max_tokens:
                raise ValueError(
                    f"pair {index} alone has {added} tokens, more than the budget of {max_tokens}; raise the budget or "
                    "drop the pair"
                )
            batches.append([])
        batches[-1].append(index)
        used += added
    return batches


def _insert(trie: dict[int, dict], row: Sequence[int]) -> int:
    """Add a row to a nested-dictionary trie; returns how many nodes it added."""
    node, added = trie, 0
    for token in row:
        child = node.get(token)
        if child is None:
            child = node[token] = {}
            added += 1
        node = child
    return added
