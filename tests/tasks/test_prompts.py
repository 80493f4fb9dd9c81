"""Prompts, plain and through a chat template: one user turn, ids that a thought follows directly, the same on every day."""

import pytest
from transformers import PreTrainedTokenizerFast

from cpo_fast.errors import ConfigError
from cpo_fast.tasks import Prompts, Question, Task, common_prefix_length, encode_prompt, get_task
from cpo_fast.tasks.task_file import VERDICT_CUE
from tests.tiny import tiny_tokenizer

TASK = get_task("bamboogle")
QUESTION = Question("q", "Who met malcolm x - twice?")
THOUGHT = "Step 1: Her stepmother did.\n"

CHATML = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
INST = "{{ bos_token }}{% for m in messages %}[INST] {{ m['content'] }} [/INST]{% endfor %}"
DATED = "Today is {{ strftime_now('%d %b %Y') }}.\n" + CHATML
THINKING = CHATML + "{% if enable_thinking is not defined or enable_thinking %}<think>\n{% endif %}"


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    """A fresh one: tests set its template."""
    return tiny_tokenizer()


def _chat(tokenizer: PreTrainedTokenizerFast, template: str | None, task: Task = TASK) -> Prompts:
    """Prompts through this template."""
    tokenizer.chat_template = template
    return Prompts(task, tokenizer, chat=True)


def test_without_chat_the_prompt_is_the_tasks_own(tokenizer):
    prompts = Prompts(TASK, tokenizer)
    assert prompts.text(QUESTION) == TASK.prompt(QUESTION)
    assert prompts.encode(QUESTION) == encode_prompt(tokenizer, TASK.prompt(QUESTION))
    assert prompts.encode(QUESTION, THOUGHT) == encode_prompt(tokenizer, TASK.prompt(QUESTION) + THOUGHT)
    assert prompts.shared.text == TASK.few_shot
    assert prompts.shared.text + prompts.question_part(QUESTION) == TASK.prompt(QUESTION)
    assert prompts.verdict_text(QUESTION, [THOUGHT]) == TASK.evaluator_prompt(QUESTION, [THOUGHT])


@pytest.mark.parametrize("template", [None, CHATML])
def test_prefixes_begin_every_prompt_of_their_kind_and_hold_its_demonstrations(tokenizer, template):
    prompts = _chat(tokenizer, template) if template else Prompts(TASK, tokenizer)
    demonstrations = (TASK.few_shot, TASK.few_shot_evaluator, TASK.few_shot_conclusion_evaluator)
    for text in ("A", "Another?", "\u6771\u4eac?"):
        whole = prompts.one_of_each(Question("x", text))
        for prefix, ids, shown in zip(prompts.prefixes, whole, demonstrations, strict=True):
            assert ids[: len(prefix)] == prefix
            assert shown in tokenizer.decode(prefix)


@pytest.mark.parametrize("template", [CHATML, INST, DATED, THINKING])
def test_the_whole_prompt_is_one_user_turn_before_the_assistants(tokenizer, template):
    text = _chat(tokenizer, template).text(QUESTION)
    turn = TASK.prompt(QUESTION).rstrip()
    before, after = text.split(turn)
    assert text.count(QUESTION.text) == 1
    assert before.count("user" if template != INST else "[INST]") == 1
    assert after == (" [/INST]" if template == INST else "<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.parametrize("template", [CHATML, INST])
def test_a_thought_is_appended_to_exactly_these_ids(tokenizer, template):
    prompts = _chat(tokenizer, template)
    ids, text = prompts.encode(QUESTION), prompts.text(QUESTION)
    assert tokenizer.decode(ids) == text
    # the template wrote the beginning-of-sequence: once, and no end-of-sequence
    assert ids.count(tokenizer.bos_token_id) == 1
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.eos_token_id not in ids
    assert prompts.encode(QUESTION, THOUGHT)[: len(ids)] == ids


def test_a_tokenizer_that_adds_a_beginning_does_not_add_it_to_a_template():
    class AddsBos:
        chat_template, eos_token_id, eos_token = CHATML, 2, "</s>"

        def __call__(self, text, add_special_tokens=True):
            return {"input_ids": [*([1] if add_special_tokens else []), *text.encode()]}

    assert Prompts(TASK, AddsBos()).encode_text("a") == [1, 97]
    assert Prompts(TASK, AddsBos(), chat=True).encode_text("a") == [97]


def test_an_appended_end_of_sequence_is_not_part_of_a_prompt():
    class AppendsEos:
        eos_token_id, eos_token = 2, "</s>"

        def __call__(self, text):
            return {"input_ids": [1, *text.encode(), 2]}

    assert encode_prompt(AppendsEos(), "ab") == [1, 97, 98]
    assert common_prefix_length([1, 2, 3], [1, 2, 4, 5]) == 2
    assert common_prefix_length([], [1]) == 0


def test_a_template_with_todays_date_gives_the_same_prompt_on_every_day(tokenizer):
    assert _chat(tokenizer, DATED).text(QUESTION).startswith("Today is 26 Jul 2024.\n")
    assert "strftime_now" in tokenizer.chat_template  # the tokenizer itself is left as it was
    as_llama = "{% if not day is defined %}{% if strftime_now is defined %}{% set day = strftime_now('%Y-%m-%d') %}"
    dated = _chat(tokenizer, as_llama + "{% endif %}{% endif %}{{ day }} " + CHATML)
    assert dated.text(QUESTION).startswith("2024-07-26 ")


@pytest.mark.parametrize("template", [CHATML, INST])
def test_what_all_questions_share_ends_where_the_question_begins(tokenizer, template):
    prompts = _chat(tokenizer, template)
    shared = prompts.shared.text
    assert shared.endswith(f"{TASK.few_shot}Question: ")
    for text in ("A", "Another?", "\u6771\u4eac?"):
        assert prompts.text(Question("x", text)).startswith(shared + text)


def test_the_verdict_opens_the_assistants_turn(tokenizer):
    task = get_task("bamboogle", evaluator_seed=4)
    text = _chat(tokenizer, CHATML, task).verdict_text(QUESTION, [THOUGHT])
    before, after = text.split("<|im_end|>\n<|im_start|>assistant\n")
    assert after == VERDICT_CUE
    assert before.endswith(task.evaluator_prompt(QUESTION, [THOUGHT]).removesuffix(VERDICT_CUE).rstrip())
    assert before.count(VERDICT_CUE) == 4


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "task.chat: the tokenizer has no chat template"),
        ("{{ raise_exception('Conversations must start with a system turn') }}", "refuses a user's turn .*system turn"),
        ("{{ messages[0]['content'][0]['text'] }}", "refuses a user's turn|changes the user's text"),
        ("{% for m in messages", "refuses a user's turn"),
        ("{{ messages[0]['content'] | upper }}", "changes the user's text"),
    ],
)
def test_a_template_that_cannot_show_the_question_is_a_sentence(tokenizer, template, message):
    with pytest.raises(ConfigError, match=message):
        _chat(tokenizer, template).text(QUESTION)
