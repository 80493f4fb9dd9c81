"""Which rank computes which examples of a step: questions stay together, and every rank gets about as many tokens.

    cost of a question = tokens of the forest of its examples in this step
    a question that costs more than total / ranks is cut, in depth-first order, into parts that do not
    the parts go, largest first, each to the rank with the fewest tokens so far (longest processing time, Graham 1969)

Every rank deals for all and finds the same, so nothing is sent. Depth-first order cuts between subtrees: what shares a
long path stays together.
"""

from collections.abc import Sequence

from cpo_fast.data.examples import Example, Ids
from cpo_kernels import build_forest
from cpo_kernels.integrations.transformers import PairTooLarge, split_pairs


def deal(examples: Sequence[Example], num_ranks: int) -> list[list[int]]:
    """Places of `examples` for each rank, ascending. A rank gets none where there are fewer parts than ranks."""
    if num_ranks == 1:
        return [list(range(len(examples)))]
    questions: dict[str, list[int]] = {}
    for place, example in enumerate(examples):
        questions.setdefault(example.group, []).append(place)
    costs = [num_tokens(examples, places) for places in questions.values()]
    share = sum(costs) // num_ranks
    parts: list[tuple[int, list[int]]] = []
    for places, cost in zip(questions.values(), costs, strict=True):
        if cost <= share or len(places) == 1:
            parts.append((cost, places))
        else:
            parts += [(num_tokens(examples, piece), piece) for piece in _cut(examples, places, share)]
    loads, dealt = [0] * num_ranks, [list[int]() for _ in range(num_ranks)]
    for cost, piece in sorted(parts, key=lambda part: (-part[0], part[1])):
        rank = loads.index(min(loads))
        loads[rank] += cost
        dealt[rank] += piece
    return [sorted(places) for places in dealt]


def num_tokens(examples: Sequence[Example], places: Sequence[int]) -> int:
    """Tokens of the forest of the examples at `places`."""
    return build_forest([ids for place in places for ids in examples[place].sequences]).num_tokens


def token_rows(examples: Sequence[Example]) -> list[tuple[Ids, ...]]:
    """(prompt ids, ids of each response) for `split_pairs`."""
    # a completion is a pair whose two responses are one: equal sequences share every row
    pairs = [each.responses if len(each.responses) > 1 else each.responses * 2 for each in examples]
    return [(each.prompt_ids, *responses) for each, responses in zip(examples, pairs, strict=True)]


def _cut(examples: Sequence[Example], places: Sequence[int], share: int) -> list[list[int]]:
    """Parts of one question of at most `share` tokens, or of the largest example where that alone has more."""
    chosen = [examples[place] for place in places]
    rows = token_rows(chosen)
    try:
        pieces = split_pairs(rows, share)
    except PairTooLarge as error:
        pieces = split_pairs(rows, max(error.num_tokens.values()))
    return [[places[index] for index in piece] for piece in pieces]
