"""The preference pair as training sees it: three sequences of token ids, its weight, and where it came from."""

from dataclasses import dataclass


@dataclass(frozen=True)
class PreferencePair:
    """One prompt, the response that won and one that lost, as token ids.

    Attributes:
        prompt_ids: the tokens both responses continue; at least one.
        chosen_ids, rejected_ids: the responses, at least one token each; end-of-sequence included where it is trained.
        group: the question the pair belongs to; order `questions` keeps equal groups together, and a split never parts
            them.
        step: depth of the thought in its chain from 1, or 0 for data that has no steps.
        source: file:line, for messages.
        weight: factor of its loss; the mean over all loaded pairs is 1 (see `pairs.weight`).
    """

    prompt_ids: tuple[int, ...]
    chosen_ids: tuple[int, ...]
    rejected_ids: tuple[int, ...]
    group: str
    step: int
    source: str
    weight: float = 1.0

    @property
    def chosen_sequence(self) -> tuple[int, ...]:
        """Prompt and chosen response."""
        return self.prompt_ids + self.chosen_ids

    @property
    def rejected_sequence(self) -> tuple[int, ...]:
        """Prompt and rejected response."""
        return self.prompt_ids + self.rejected_ids

    @property
    def num_tokens(self) -> int:
        """Tokens of the two rows that a pairwise trainer would compute."""
        return 2 * len(self.prompt_ids) + len(self.chosen_ids) + len(self.rejected_ids)
