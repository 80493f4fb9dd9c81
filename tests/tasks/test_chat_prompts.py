"""Prompts through a chat template: one user turn, ids that a thought follows directly, the same on every day."""

import pytest

from cpo_fast.errors import ConfigError
from cpo_fast.tasks import (
    Question,
    encode_prompt,
    encode_question,
    evaluator_text,
    get_task,
    question_text,
    shared_text,
)
from cpo_fast.tasks.task import VERDICT_CUE
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
def tokenizer():
    return tiny_tokenizer()


def _with(tokenizer, template):
    tokenizer.chat_template = template
    return tokenizer


def test_without_chat_the_prompt_is_the_tasks_own(tokenizer):
    assert question_text(tokenizer, TASK, QUESTION) == TASK.prompt(QUESTION)
    assert encode_question(tokenizer, TASK, QUESTION) == encode_prompt(tokenizer, TASK.prompt(QUESTION))
    assert shared_text(tokenizer, TASK) == TASK.few_shot
    assert evaluator_text(tokenizer, TASK, QUESTION, [THOUGHT]) == TASK.evaluator_prompt(QUESTION, [THOUGHT])


@pytest.mark.parametrize("template", [CHATML, INST, DATED, THINKING])
def test_the_whole_prompt_is_one_user_turn_before_the_assistants(tokenizer, template):
    _with(tokenizer, template)
    text = question_text(tokenizer, TASK, QUESTION, chat=True)
    turn = TASK.prompt(QUESTION).rstrip()
    before, after = text.split(turn)
    assert text.count(QUESTION.text) == 1
    assert before.count("user" if template != INST else "[INST]") == 1
    assert after == (" [/INST]" if template == INST else "<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.parametrize("template", [CHATML, INST])
def test_a_thought_is_appended_to_exactly_these_ids(tokenizer, template):
    _with(tokenizer, template)
    ids = encode_question(tokenizer, TASK, QUESTION, chat=True)
    text = question_text(tokenizer, TASK, QUESTION, chat=True)
    assert tokenizer.decode(ids) == text
    # the template wrote the beginning-of-sequence: once, and no end-of-sequence
    assert ids.count(tokenizer.bos_token_id) == 1
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.eos_token_id not in ids
    assert encode_prompt(tokenizer, text + THOUGHT, chat=True)[: len(ids)] == ids


def test_a_tokenizer_that_adds_a_beginning_does_not_add_it_to_a_template():
    class AddsBos:
        chat_template, eos_token_id, eos_token = CHATML, 2, "</s>"

        def __call__(self, text, add_special_tokens=True):
            return {"input_ids": [*([1] if add_special_tokens else []), *text.encode()]}

    assert encode_prompt(AddsBos(), "a") == [1, 97]
    assert encode_prompt(AddsBos(), "a", chat=True) == [97]


def test_a_template_with_todays_date_gives_the_same_prompt_on_every_day(tokenizer):
    assert question_text(_with(tokenizer, DATED), TASK, QUESTION, chat=True).startswith("Today is 26 Jul 2024.\n")
    assert "strftime_now" in tokenizer.chat_template  # the tokenizer itself is left as it was
    as_llama = "{% if not day is defined %}{% if strftime_now is defined %}{% set day = strftime_now('%Y-%m-%d') %}"
    _with(tokenizer, as_llama + "{% endif %}{% endif %}{{ day }} " + CHATML)
    assert question_text(tokenizer, TASK, QUESTION, chat=True).startswith("2024-07-26 ")


@pytest.mark.parametrize("template", [CHATML, INST])
def test_what_all_questions_share_ends_where_the_question_begins(tokenizer, template):
    _with(tokenizer, template)
    shared = shared_text(tokenizer, TASK, chat=True)
    assert shared.endswith(f"{TASK.few_shot}Question: ")
    for text in ("A", "Another?", "\u6771\u4eac?"):
        assert question_text(tokenizer, TASK, Question("x", text), chat=True).startswith(shared + text)


def test_the_verdict_opens_the_assistants_turn(tokenizer):
    _with(tokenizer, CHATML)
    text = evaluator_text(tokenizer, TASK, QUESTION, [THOUGHT], chat=True, seed=4)
    before, after = text.split("<|im_end|>\n<|im_start|>assistant\n")
    assert after == VERDICT_CUE
    assert before.endswith(TASK.evaluator_prompt(QUESTION, [THOUGHT], seed=4).removesuffix(VERDICT_CUE).rstrip())
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
        question_text(_with(tokenizer, template), TASK, QUESTION, chat=True)
