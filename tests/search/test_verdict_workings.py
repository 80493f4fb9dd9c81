"""Verdicts with a working: written line by line, read off the line with the cue alone, the same bytes however computed."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner

from cpo_fast.cli.collect import collect_command
from cpo_fast.config import Config, SearchConfig
from cpo_fast.errors import ConfigError
from cpo_fast.evaluate import evaluate
from cpo_fast.search.collect import collect
from cpo_fast.search.engine import Answer, Requests, Sample, SampleRequest, run_search
from cpo_fast.search.engine.sampler import choose_token, uniforms
from cpo_fast.search.state_evaluator import Evaluator, state_digest
from cpo_fast.search.tree_store import Worker
from cpo_fast.tasks import Prompts, Question, Task, load_task
from cpo_fast.tasks.task_file import TaskFile
from cpo_fast.tree import Stop, read_trees
from tests.search.tiny_llama import build_byte_tokenizer, build_model, build_tokenizer

QUESTION = Question("q", "What is 53 - 7 + 4?")
CUE = "Is the last line likely or impossible? It is"


def words(verdict: dict[str, str] | None = None, step: str = "Step {n}:") -> dict[str, Any]:
    """A task file whose worked verdicts have workings of two lines and of one."""
    chain = {"question": "What is 53 - 7 + 4?", "steps": ["53 - 7 = 46", "46 + 4 = 51"]}
    working = ["46 + 4 = 50, and the line says 51.", "51 is not 50."]
    answered = {"question": "What is 1 + 1?", "steps": ["1 + 1 = 2"], "answer": "2"}
    return {
        "instruction": "Calculate.",
        "answer": {"kind": "number"},
        "marks": {"step": step},
        "verdict": verdict or {},
        "demonstrations": [answered],
        "step_verdicts": {
            "instruction": "Judge.",
            "demonstrations": [{**chain, "working": working, "verdict": "impossible"}],
        },
        "conclusion_verdicts": {
            "instruction": "Judge.",
            "demonstrations": [{**answered, "working": ["1 + 1 is 2."], "verdict": "likely"}],
        },
    }


def made_task(**changes: Any) -> Task:
    return Task("made", TaskFile.model_validate(words(**changes)))


def test_prompts_show_the_working_and_end_where_the_model_begins_its_own():
    task = made_task()
    prompt = task.evaluator_prompt(QUESTION, ["Step 1: 53 - 7 = 46\n"])
    assert prompt == (
        "Judge.\n\n"
        "Question: What is 53 - 7 + 4?\nStep 1: 53 - 7 = 46\nStep 2: 46 + 4 = 51\n"
        "Check: 46 + 4 = 50, and the line says 51.\n51 is not 50.\n"
        f"{CUE} impossible\n\n"
        "Question: What is 53 - 7 + 4?\nStep 1: 53 - 7 = 46\nCheck:"
    )
    concluded = task.evaluator_prompt(QUESTION, ["Answer: 50\n"])
    assert f"Answer: 2\nCheck: 1 + 1 is 2.\n{CUE} likely\n\n" in concluded
    tokenizer = build_byte_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}<|assistant|>"
    assert (
        Prompts(task, tokenizer, chat=True)
        .verdict_text(QUESTION, ["Step 1: a\n"])
        .endswith("Step 1: a<|assistant|>Check:")
    )


class WritingEngine:
    """Writes the same lines for every verdict, one token each, and keeps what it was asked."""

    def __init__(self, lines: list[tuple[str, Stop]]) -> None:
        self.lines = lines
        self.asks: list[Requests] = []

    def cache_prefix(self, token_ids: Any) -> None:
        raise AssertionError("not part of a verdict")

    def answer(self, ask: Requests) -> list[Answer]:
        text, stop = self.lines[len(self.asks)]
        self.asks.append(ask)
        return [Sample((900 + len(self.asks),), text, stop, (-1.0,) * (1 + (stop == "eos"))) for _ in ask.items]


def newline(*texts: str) -> list[tuple[str, Stop]]:
    return [(f"{text}\n", "newline") for text in texts]


WRITTEN: list[tuple[list[tuple[str, Stop]], str | None]] = [
    (newline(" 46 + 4 = 50", "51 is not 50.", f"{CUE} impossible"), "impossible"),
    # the working's own words are no verdict, whatever they say
    (newline(" it is not impossible", "impossible", "likely", f"{CUE} likely."), "likely"),
    (newline(" likely", "impossible", ""), None),
    (newline(f" so {CUE} likely", f"and {CUE} likely", " "), None),
    (newline(f" is {CUE} likely wrong?", f"{CUE} impossible"), "impossible"),
    (newline(" 50", f"{CUE} not impossible"), None),
    (newline(" 50", f"{CUE} likely or impossible"), None),
    (newline(" 50", CUE), None),
    ([*newline(" 50"), (f"{CUE} likely", "eos")], "likely"),
    ([*newline(" 50"), (f"{CUE} likely", "length")], None),  # "likely or" may have been cut
    ([(" likely", "eos")], None),
    ([("", "eos")], None),
    ([(" 50\n\n", "newline")], None),
    (newline(" 50", "Question: another"), None),
    # a token may hold a newline and what follows it
    ([(f" 50\n{CUE[:20]}", "newline"), (f"{CUE[20:]} likely\n", "newline")], "likely"),
]  # fmt: skip


@pytest.mark.parametrize(("lines", "label"), WRITTEN)
def test_the_label_is_what_follows_the_cue_on_the_first_line_that_begins_with_it(lines, label):
    tokenizer = build_byte_tokenizer()
    engine = WritingEngine(lines)
    config = SearchConfig(evaluator="sample", num_verdicts=2, max_verdict_tokens=9)
    evaluator = Evaluator(config, Prompts(made_task(), tokenizer), QUESTION, "0/q")
    (verdict,) = run_search(engine, evaluator.evaluate([("Step 1: a\n",)]))
    text = "".join(text for text, _ in lines)
    assert verdict.evaluations == ({"label": label, "text": text},) * 2
    assert verdict.value == {"likely": 10.0, "impossible": 1.0, None: None}[label]
    assert len(engine.asks) == len(lines)  # no line is asked for after the last
    assert evaluator.num_tokens == 2 * sum(1 + (stop == "eos") for _, stop in lines)


def test_a_line_is_asked_for_under_its_own_name_after_the_ids_before_it_until_the_cap():
    tokenizer = build_byte_tokenizer()
    engine = WritingEngine(newline(*" abcd"))
    prompts = Prompts(made_task(), tokenizer)
    config = SearchConfig(evaluator="sample", num_verdicts=2, max_verdict_tokens=3)
    (verdict,) = run_search(engine, Evaluator(config, prompts, QUESTION, "0/q").evaluate([("Step 1: a\n",)]))
    assert verdict.value is None
    prompt = tuple(prompts.encode_text(prompts.verdict_text(QUESTION, ("Step 1: a\n",))))
    items = [[item for item in ask.items if isinstance(item, SampleRequest)] for ask in engine.asks]
    assert [[item.token_ids for item in group] for group in items] == [
        [prompt] * 2, [(*prompt, 901)] * 2, [(*prompt, 901, 902)] * 2
    ]  # fmt: skip
    name = f"0/q/verdict/{state_digest(prompt)}"
    assert [[item.uid for item in group] for group in items] == [
        [f"{name}/0", f"{name}/1"], [f"{name}/0/1", f"{name}/1/1"], [f"{name}/0/2", f"{name}/1/2"]
    ]  # fmt: skip
    assert [[item.max_new_tokens for item in group] for group in items] == [[3, 3], [2, 2], [1, 1]]


@pytest.fixture
def judging(make_config, tmp_path) -> Any:
    """judging(run, **search settings) -> a configuration whose task's cue and labels a tiny model writes often."""
    path = tmp_path / "task.yaml"
    path.write_text(yaml.safe_dump(words(verdict={"cue": "=", "working": "?"})), encoding="utf-8")

    def make(run: str, **search: Any) -> Config:
        verdicts = {"evaluator": "sample", "num_verdicts": 3, "max_verdict_tokens": 12, "verdict_temperature": 1.0}
        config = make_config(run, num_candidates=3, **(verdicts | search))
        return config.model_copy(update={"task": config.task.model_copy(update={"file": str(path)})})

    return make


# what a token is mostly followed by
FOLLOWED_BY = {
    "?": ["a", "1", " likely"],
    "a": ["\n", "b", " impossible"],
    "b": ["\n", "="],
    "\n": ["=", "a", "Answer:"],
    "=": [" likely", " impossible"],
    " likely": ["\n", "\n", "a"],
    " impossible": ["\n", " likely"],
    "Answer:": ["1"],
    "1": ["\n", "\n", "1"],
}


@pytest.fixture(scope="module")
def talkative() -> Any:
    """A random model whose embeddings and head make the successors of `FOLLOWED_BY` likely."""
    tokenizer = build_tokenizer()
    model = build_model(len(tokenizer))
    with torch.no_grad():
        for place, (word, successors) in enumerate(FOLLOWED_BY.items()):
            model.model.embed_tokens.weight[tokenizer.convert_tokens_to_ids(word)] = 30.0 * torch.eye(32)[place]
            for successor in successors:
                model.lm_head.weight[tokenizer.convert_tokens_to_ids(successor), place] += 2.0
    return model


def test_a_real_model_s_verdicts_are_the_same_bytes_however_they_are_computed(judging, talkative, tokenizer, engine):
    found = set()
    for run, sharing in (("all", {}), ("few", {"batch_size": 3, "questions_in_flight": 2}), ("workers", {})):
        config = judging(run, engine=engine, strategy="mcts", num_simulations=4, **sharing)
        workers = [Worker(number, 2) for number in (1, 0)] if run == "workers" else [Worker()]
        results = [collect(config, talkative, tokenizer, worker=worker) for worker in workers]
        assert 0 < results[-1].num_unparseable < results[-1].num_verdicts
        found.add(Path(results[-1].trees_path).read_bytes())
    (content,) = found
    records = [
        each for row in content.splitlines() for node in json.loads(row)["nodes"] for each in node["evaluations"]
    ]
    read = [record for record in records if record["label"] is not None]
    assert read
    assert all("\n" in record["text"] for record in read)  # lines, each sampled by itself
    for record in read:
        (verdict,) = [line for line in record["text"].split("\n")[1:] if line.startswith("=")]
        assert verdict in (f"= {record['label']}", f"={record['label']}")


def test_a_verdict_is_what_the_model_samples_line_after_line(judging, talkative, tokenizer):
    """Written again from the file alone, without cache or batch."""
    config = judging("again")
    trees = read_trees(collect(config, talkative, tokenizer).trees_path)
    prompts = Prompts(load_task(config), tokenizer)
    tree = trees[0]
    node = next(node for node in tree.nodes if max(each["text"].count("\n") for each in node.evaluations) > 1)
    lines = [each.text for each in tree.path(node.id)]
    prompt = prompts.encode_text(prompts.verdict_text(Question(tree.id, tree.question), lines))
    for index, record in enumerate(node.evaluations):
        ids, text, num_tokens, number = list(prompt), "", 0, 0
        while text != record["text"]:
            assert record["text"].startswith(text)
            uid = f"0/{tree.id}/verdict/{state_digest(prompt)}/{index}" + (f"/{number}" if number else "")
            table, start = uniforms(uid, 12 - num_tokens), num_tokens
            while True:
                with torch.no_grad():
                    logits = talkative(torch.tensor([ids])).logits[0, -1].double().numpy()
                token = choose_token(logits, float(table[num_tokens - start]), 1.0, 1.0)
                num_tokens += 1
                if token == tokenizer.eos_token_id:
                    break
                ids.append(token)
                piece = tokenizer.decode([token])
                text += piece
                if "\n" in piece or num_tokens == 12:
                    break
            number += 1
            assert number < 13


def test_labels_are_not_scored_where_the_model_is_to_work_them_out(judging, talkative, tokenizer, tmp_path):
    config = judging("logits", evaluator="logits")
    sentence = r"search\.evaluator: logits reads the label at once, .* set search\.evaluator=sample"
    with pytest.raises(ConfigError, match=sentence):
        collect(config, talkative, tokenizer)
    with pytest.raises(ConfigError, match=sentence):
        Evaluator(config.search, Prompts(load_task(config), tokenizer), QUESTION, "0/q")
    tot = config.model_copy(update={"eval": config.eval.model_copy(update={"method": "tot"})})
    with pytest.raises(ConfigError, match=sentence):
        evaluate(tot, talkative, tokenizer)
    path = tmp_path / "c.yaml"
    path.write_text(json.dumps(config.model_dump(mode="json")), encoding="utf-8")
    with pytest.raises(ConfigError, match=sentence):  # before it looks for the model
        CliRunner().invoke(collect_command, [str(path), "model.path=none"], catch_exceptions=False)
