"""Training and held-out data parted by question: a question (group) never stands on both sides.

Pairs of one question share its prompt and most of its thoughts, so a split by pair would validate on what was trained.
"""

from collections.abc import Sequence
from typing import Protocol, TypeVar

from cpo_fast.data.draw import draw
from cpo_fast.errors import DataError


class Grouped(Protocol):
    """Anything that belongs to a question."""

    @property
    def group(self) -> str:
        """The question."""


Item = TypeVar("Item", bound=Grouped)


def split_by_question(items: Sequence[Item], fraction: float, seed: int) -> tuple[list[Item], list[Item]]:
    """(training items, held-out items), each in the order given.

    Which questions are held out depends on their names and the seed, not on the order of the items; a larger fraction
    holds out a superset.

    Args:
        items: pairs or examples.
        fraction: share of the questions to hold out; 0 holds out none, anything above at least one, and one question
            always stays to train on.
        seed: the run's seed.

    Raises:
        ValueError: the fraction is not in [0, 1). DataError: there are not two questions to part.
    """
    if not 0 <= fraction < 1:
        raise ValueError(f"expected a fraction in [0, 1), got {fraction}")
    if fraction == 0:
        return list(items), []
    groups = {item.group for item in items}
    if len(groups) < 2:
        raise DataError(
            f"data.held_out={fraction} needs at least two questions, the data has {len(groups)}; set data.held_out=0"
        )
    count = min(max(1, round(fraction * len(groups))), len(groups) - 1)
    held_out = draw(groups, count, seed, "held_out")
    return [item for item in items if item.group not in held_out], [item for item in items if item.group in held_out]
