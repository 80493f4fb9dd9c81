"""The root state of a question: its prompt as token ids, and the part of it that every question of the run shares.

The shared part (few-shot text, in a chat also the template before and around it) is stored once beside the trees and
prefilled once in the engine. It does not depend on the questions of a run, so a restart shares the same tokens.
"""

from typing import Any

from cpo_fast.tasks import Question, Task, common_prefix_length, encode_prompt, question_text, shared_text
from cpo_fast.tree import Prompt


class RootPrompts:
    """Question prompts of one task for one tokenizer.

    Args:
        task: gives the text. tokenizer: turns it into ids.
        chat: ask through the tokenizer's chat template. Raises ConfigError when it has none.

    Attributes:
        prompt: the shared part, as it is stored beside the trees.
    """

    def __init__(self, task: Task, tokenizer: Any, chat: bool) -> None:
        self._task = task
        self._tokenizer = tokenizer
        self._chat = chat
        shared = shared_text(tokenizer, task, chat)
        self.prompt = Prompt.build(shared, encode_prompt(tokenizer, shared, chat))

    def text(self, question: Question) -> str:
        """A question's whole prompt."""
        return question_text(self._tokenizer, self._task, question, self._chat)

    def encode(self, question: Question, lines: str = "") -> list[int]:
        """Token ids of a question's prompt, followed by `lines` of thoughts."""
        return encode_prompt(self._tokenizer, self.text(question) + lines, self._chat)

    def question_part(self, question: Question) -> str:
        """What follows the shared text in a question's prompt."""
        return self.text(question)[len(self.prompt.text) :]

    def num_shared_tokens(self, root_ids: list[int]) -> int:
        """How many leading ids of a question's prompt are those of `prompt`."""
        return common_prefix_length(self.prompt.token_ids, root_ids)
