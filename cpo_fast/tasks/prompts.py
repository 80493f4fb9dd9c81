"""Every prompt of a task, as text and as token ids: made here alone, so search, training and evaluation read the same ids.

Without chat the text is the task's own prompt, and the first thought follows its last newline. With chat,
demonstrations and question are one user turn under the tokenizer's own template, and the first thought follows the
tokens that open the assistant's turn. Whatever continues a prompt is appended to the ids of its whole text, and nothing
is tokenised again. The same question gives the same prompt on every day and machine.
"""

from collections.abc import Sequence
from datetime import datetime
from functools import cached_property
from typing import Any

from cpo_fast.config import DataConfig
from cpo_fast.errors import ConfigError, EnvironmentProblem, first_line
from cpo_fast.tasks.task import Question, Task
from cpo_fast.tree import Prompt

# what the prompts of these two have in common is what the prompts of all questions have in common: it depends on no
# question of a run, so a restart splits its forwards in the same places and rounds the same
ANY_QUESTION, _ANOTHER = Question("", "A"), Question("", "7")

# put before a template that asks for today's date: a run repeated tomorrow must read the same ids. A macro, as what is
# given beside the messages may be made text; of the codes none gives a percent sign but the last
_DAY = datetime.fromisoformat(DataConfig().template_date)
_CODES = [f"%{code}" for code in ("-d", "-m", "-H", "-I", "-j", "-M", "-S", *"aAbBcdDeFHIjmMpRSTuUVwWxXyYZz", "%")]
_CLOCK = (
    "{%- macro strftime_now(format) -%}{{ format"
    + "".join(f" | replace({code!r}, {_DAY.strftime(code)!r})" for code in _CODES)
    + " }}{%- endmacro -%}"
)


class Prompts:
    """Prompts of one task for one tokenizer.

    Args:
        task: gives the text. tokenizer: turns it into ids.
        chat: ask through the tokenizer's chat template.

    Every method that makes text raises ConfigError where `chat` is asked for and the tokenizer has no chat template, or
    one that cannot show a user's turn, and EnvironmentProblem where jinja2 is missing.
    """

    def __init__(self, task: Task, tokenizer: Any, chat: bool = False) -> None:
        self.task = task
        self.tokenizer = tokenizer
        self.chat = chat

    @cached_property
    def shared(self) -> Prompt:
        """The beginning that the prompts of all questions share, as it is stored once beside the trees.

        The few-shot part, in a chat also the template before and around it. Its ids are those of its text alone.
        """
        text = self.task.few_shot
        if self.chat:  # no template says where its shared part ends, so two questions are compared
            one, other = self.text(ANY_QUESTION), self.text(_ANOTHER)
            text = one[: common_prefix_length(one, other)]
        return Prompt.build(text, self.encode_text(text))

    @cached_property
    def prefixes(self) -> list[list[int]]:
        """Leading ids that all prompts of a kind share, in the order of `one_of_each`: an engine reads them once."""
        pairs = zip(self.one_of_each(ANY_QUESTION), self.one_of_each(_ANOTHER), strict=True)
        return [one[: common_prefix_length(one, other)] for one, other in pairs]

    def text(self, question: Question) -> str:
        """A question's whole prompt, which the first thought follows."""
        prompt = self.task.prompt(question)
        return self._user_turn(prompt) if self.chat else prompt

    def question_part(self, question: Question) -> str:
        """What follows the shared text in a question's prompt."""
        return self.text(question)[len(self.shared.text) :]

    def encode(self, question: Question, lines: str = "") -> list[int]:
        """Ids of a question's prompt, followed by `lines` of thoughts."""
        return self.encode_text(self.text(question) + lines)

    def verdict_text(self, question: Question, lines: Sequence[str]) -> str:
        """The prompt that a verdict follows. Ends in the task's `verdict_opening`. `lines` are the state's thoughts."""
        prompt = self.task.evaluator_prompt(question, lines)
        # in a chat it opens the assistant's turn, so that the label or the working is the next thing the model says
        opening = self.task.verdict_opening
        return self._user_turn(prompt.removesuffix(opening)) + opening if self.chat else prompt

    def labels(self, verdict_texts: Sequence[str]) -> list[tuple[list[int], list[list[int]]]]:
        """Ids of each evaluator prompt and of its two labels (likely, impossible, with the leading space)."""
        # together with the prompt: a tokenizer that joins or splits at the boundary is scored on the ids it would produce
        endings = ("", *(f" {label}" for label in self.task.labels))
        encoded = iter(self.encode_texts([text + ending for text in verdict_texts for ending in endings]))
        found: list[tuple[list[int], list[list[int]]]] = []
        for plain, *whole in zip(*[encoded] * len(endings), strict=True):
            length = min(common_prefix_length(plain, ids) for ids in whole)
            found.append((plain[:length], [ids[length:] for ids in whole]))
        return found

    def one_of_each(self, question: Question) -> list[list[int]]:
        """Ids of three prompts of a question: for a thought, for a verdict on a step, and for one on an answer."""
        verdicts = [self.verdict_text(question, lines) for lines in ((), (f"{self.task.answer_mark} 0\n",))]
        return [self.encode(question), *map(self.encode_text, verdicts)]

    def encode_text(self, text: str) -> list[int]:
        """Ids of a whole prompt, which those of its pieces need not add up to."""
        if self.chat:  # a template writes its own special tokens
            return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        return encode_prompt(self.tokenizer, text)

    def encode_texts(self, texts: Sequence[str]) -> list[list[int]]:
        """As `encode_text`, for many prompts and at least one, by one call of the tokenizer."""
        if self.chat:
            return [list(ids) for ids in self.tokenizer(list(texts), add_special_tokens=False)["input_ids"]]
        encoded = self.tokenizer(list(texts), return_attention_mask=False)["input_ids"]
        end = self.tokenizer.eos_token_id, self.tokenizer.eos_token
        return [_without_end(list(ids), text, *end) for ids, text in zip(encoded, texts, strict=True)]

    def _user_turn(self, content: str) -> str:
        if not getattr(self.tokenizer, "chat_template", None):
            raise ConfigError(
                "task.chat: the tokenizer has no chat template, as base models have none; set task.chat=false, or choose "
                "an instruct model"
            )
        try:
            import jinja2
        except ImportError:
            raise EnvironmentProblem(
                "task.chat: chat templates need jinja2; install it with: pip install jinja2"
            ) from None
        content = content.rstrip()  # a template may or may not strip it; the turn must not depend on that
        try:
            text: str = self.tokenizer.apply_chat_template(
                [{"role": "user", "content": content}],
                tokenize=False,
                add_generation_prompt=True,
                enable_thinking=False,  # the chain of steps is the thinking
                chat_template=with_clock(self.tokenizer.get_chat_template()),
            )
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            raise ConfigError(
                f"task.chat: the tokenizer's chat template refuses a user's turn ({first_line(error)}); set "
                "task.chat=false"
            ) from error
        if content not in text:
            raise ConfigError("task.chat: the tokenizer's chat template changes the user's text; set task.chat=false")
        return text


def with_clock(template: str) -> str:
    """The template, told that today is `data.template_date` where it asks."""
    return _CLOCK + template if "strftime_now" in template else template


def encode_prompt(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a plain text that something will continue, with the special tokens that its tokenizer puts in front."""
    return _without_end(list(tokenizer(text)["input_ids"]), text, tokenizer.eos_token_id, tokenizer.eos_token)


def _without_end(ids: list[int], text: str, eos_token_id: int | None, eos_token: str) -> list[int]:
    # some tokenizers append an end-of-sequence, but the text goes on
    if ids and ids[-1] == eos_token_id and not text.endswith(eos_token):
        ids.pop()
    return ids


def common_prefix_length(first: Sequence[object], second: Sequence[object]) -> int:
    """How many leading ids (or characters) two sequences share."""
    length = 0
    for left, right in zip(first, second, strict=False):
        if left != right:
            break
        length += 1
    return length
