"""The supervised example as training sees it: a prompt that is read and a completion that is learnt, as token ids."""

from dataclasses import dataclass


@dataclass(frozen=True)
class SftExample:
    """One prompt and the completion whose tokens the loss is over.

    Attributes:
        prompt_ids: the tokens that are only read; at least one.
        completion_ids: the tokens that are learnt, at least one; end-of-sequence included where it is trained.
        group: the question the example belongs to.
        source: file:line, for messages.
    """

    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]
    group: str
    source: str

    @property
    def sequence(self) -> tuple[int, ...]:
        """Prompt and completion."""
        return self.prompt_ids + self.completion_ids
