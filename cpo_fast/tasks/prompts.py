"""Prompts to token ids: the one place where it happens, so search, training and evaluation read the same ids.

    ids(question)            encode_question(tokenizer, task, question, chat)
    its text                 question_text(tokenizer, task, question, chat)
    what all of them share   shared_text(tokenizer, task, chat)
    verdict prompts          encode_prompt(tokenizer, evaluator_text(tokenizer, task, question, lines, chat), chat)

Without chat the text is the task's prompt, and the first thought follows its last newline. With chat, demonstrations
and question are one user turn under the tokenizer's own template, and the first thought follows the tokens that open
the assistant's turn. Either way the ids are those of the whole text: whatever continues the prompt is appended to
exactly these ids, and nothing is tokenised again. A template writes its own special tokens, so none are added to them.

The same question gives the same prompt on every day and machine: a template that writes the date gets a fixed one, and
templates with a thinking mode are asked for none, because the chain of steps is the thinking.

The root state of a question: its prompt as token ids, and the part of it that every question of the run shares.

The shared part (few-shot text, in a chat also the template before and around it) is stored once beside the trees and
prefilled once in the engine. It does not depend on the questions of a run, so a restart shares the same tokens.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from cpo_fast.errors import ConfigError, EnvironmentProblem
from cpo_fast.tasks.task import VERDICT_CUE, Question
from cpo_fast.tree import Prompt

if TYPE_CHECKING:
    from cpo_fast.tasks.task import Task


# put before a template that asks for today's date: a run repeated tomorrow must ask the same
_FIXED_DATE = (
    "{%- macro strftime_now(format) -%}{{ format | replace('%d', '26') | replace('%b', 'Jul') | replace('%B', 'July') | "
    "replace('%m', '07') | replace('%y', '24') | replace('%Y', '2024') }}{%- endmacro -%}"
)


def encode_prompt(tokenizer: Any, text: str, chat: bool = False) -> list[int]:
    """Token ids of a prompt that something will continue.

    Plain text keeps the tokenizer's own special tokens at the front (a beginning-of-sequence), not an end-of-sequence
    that it appends, because the text goes on. Text from a chat template holds its special tokens already.

    Args:
        tokenizer: a Hugging Face tokenizer.
        text: the whole prompt. Pieces that are tokenised apart do not add up to the ids of the whole.
        chat: whether `text` comes from the chat template.
    """
    if chat:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])
    ids: list[int] = list(tokenizer(text)["input_ids"])
    if ids and ids[-1] == tokenizer.eos_token_id and not text.endswith(tokenizer.eos_token):
        ids.pop()
    return ids


def encode_question(tokenizer: Any, task: "Task", question: Question, chat: bool = False) -> list[int]:
    """Ids that the first thought follows. Raises as `question_text`."""
    return encode_prompt(tokenizer, question_text(tokenizer, task, question, chat), chat)


def question_text(tokenizer: Any, task: "Task", question: Question, chat: bool = False) -> str:
    """The prompt that the first thought follows: the task's own, or the same as a user turn.

    Raises:
        ConfigError: chat is asked for, and the tokenizer has no chat template or one that cannot show a user's turn.
        EnvironmentProblem: chat is asked for and jinja2 is missing.
    """
    prompt = task.prompt(question)
    return _user_turn(tokenizer, prompt) if chat else prompt


def shared_text(tokenizer: Any, task: "Task", chat: bool = False) -> str:
    """The beginning that the prompts of all questions share, as it is stored once beside the trees.

    `question_text(...)[len(shared_text(...)):]` is what is particular to a question. Raises as `question_text`.
    """
    if not chat:
        return task.few_shot
    # what two unlike questions have in common is what all have in common
    one, other = (question_text(tokenizer, task, Question("", text), chat=True) for text in ("A", "7"))
    return one[: common_prefix_length(one, other)]


def evaluator_text(
    tokenizer: Any,
    task: "Task",
    question: Question,
    lines: Sequence[str],
    chat: bool = False,
    seed: int | None = None,
) -> str:
    """The prompt that ` likely` or ` impossible` follows; ends in `VERDICT_CUE`.

    With chat the cue opens the assistant's turn, so that the label is the next thing the model says. `lines` and `seed`
    as in `Task.evaluator_prompt`; raises as `question_text`.
    """
    prompt = task.evaluator_prompt(question, lines, seed)
    return _user_turn(tokenizer, prompt.removesuffix(VERDICT_CUE)) + VERDICT_CUE if chat else prompt


def common_prefix_length(first: Sequence[object], second: Sequence[object]) -> int:
    """How many leading ids (or characters) two sequences share."""
    length = 0
    for left, right in zip(first, second, strict=False):
        if left != right:
            break
        length += 1
    return length


def _user_turn(tokenizer: Any, content: str) -> str:
    if not getattr(tokenizer, "chat_template", None):
        raise ConfigError(
            "task.chat: the tokenizer has no chat template, as base models have none; set task.chat=false, or choose an "
            "instruct model"
        )
    try:
        import jinja2
    except ImportError:
        raise EnvironmentProblem(
            "task.chat: chat templates need jinja2; install it with: pip install 'cpo-fast[train]'"
        ) from None
    content = content.rstrip()  # a template may or may not strip it; the turn must not depend on that
    try:
        template: str = tokenizer.get_chat_template()
        text: str = tokenizer.apply_chat_template(
            [{"role": "user", "content": content}],
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=False,
            chat_template=_FIXED_DATE + template if "strftime_now" in template else template,
        )
    except (jinja2.TemplateError, TypeError, ValueError) as error:
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0][:240].rstrip(".")
        raise ConfigError(
            f"task.chat: the tokenizer's chat template refuses a user's turn ({first_line}); set task.chat=false"
        ) from error
    if content not in text:
        raise ConfigError("task.chat: the tokenizer's chat template changes the user's text; set task.chat=false")
    return text


class RootPrompts:
    """Question prompts of one task for one tokenizer.

    Args:
        task: gives the text. tokenizer: turns it into ids.
        chat: ask through the tokenizer's chat template. Raises ConfigError when it has none.

    Attributes:
        prompt: the shared part, as it is stored beside the trees.
    """

    def __init__(self, task: "Task", tokenizer: Any, chat: bool) -> None:
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
