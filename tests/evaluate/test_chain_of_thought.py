"""Greedy chains end where they should, batches change nothing, and the files say what happened."""

import json
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from cpo_fast.config import validate_config
from cpo_fast.errors import CpoFastError
from cpo_fast.evaluate import evaluate
from cpo_fast.evaluate.greedy import Chain, greedy_chains
from cpo_fast.models import adapter_hash, load_model, model_hash
from cpo_fast.tasks import get_task
from tests.tiny import save_tiny_model, tiny_tokenizer, with_lora

TASK = get_task("svamp")


class Scripted:
    """Stands for a model whose greedy continuation is known: row b is given the ids of `scripts[b]`, one at a time.

    `generate` follows the contract that matters: it appends a column, asks every stopping criterion, fills finished
    rows with padding and ends when all are done or the cap is reached.
    """

    device = torch.device("cpu")
    generation_config = types.SimpleNamespace(eos_token_id=[2])

    def __init__(self, scripts: list[list[int]]) -> None:
        self.scripts = scripts

    def generate(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, generation_config: Any, stopping_criteria: Any
    ) -> torch.Tensor:
        done = torch.zeros(len(input_ids), dtype=torch.bool)
        for step in range(generation_config.max_new_tokens):
            column = [[script[step] if step < len(script) else 5] for script in self.scripts[: len(input_ids)]]
            column = torch.tensor(column).masked_fill(done[:, None], generation_config.pad_token_id)
            input_ids = torch.cat([input_ids, column], dim=1)
            done |= stopping_criteria(input_ids, None)
            if done.all():
                break
        return input_ids


def chains_of(texts: list[str], eos_after: bool = False, **caps: int) -> list[Chain]:
    tokenizer = tiny_tokenizer()
    scripts = [tokenizer(text).input_ids + ([2] if eos_after else []) for text in texts]
    caps = {"max_new_tokens": 200, "max_steps": 4} | caps
    return list(greedy_chains(Scripted(scripts), tokenizer, [[7]] * len(texts), TASK, batch_size=len(texts), **caps))


def test_chain_stops_when_its_answer_line_is_complete() -> None:
    text = "Step 1: 3 + 2 = 5.\nAnswer: 5\n"
    (chain,) = chains_of([text + "\nQuestion: another 12"])
    assert (chain.text, chain.stop, chain.answer(TASK)) == (text, "answer", "5")
    assert len(chain.token_ids) == len(text)  # one token a byte, the newline included, nothing after it


def test_every_stop_reason_is_told_and_only_whole_answers_count() -> None:
    (chain,) = chains_of(["Step 1: a\nAnswer: 7"], eos_after=True)
    assert (chain.stop, chain.answer(TASK), chain.text) == ("eos", "7", "Step 1: a\nAnswer: 7")
    (chain,) = chains_of(["Step 1: a\nAnswer: 71\n"], max_new_tokens=len("Step 1: a\nAnswer: 7"))
    assert (chain.stop, chain.answer(TASK)) == ("max_new_tokens", None)  # 7 is half of 71
    (chain,) = chains_of(["Step 1: a\nStep 2: b\nAnswer: 5\n"], max_steps=2)
    assert (chain.stop, chain.answer(TASK), chain.text) == ("max_steps", None, "Step 1: a\nStep 2: b\n")
    (chain,) = chains_of(["Step 1: a\nQuestion: b?\nAnswer: 5\n"])
    assert (chain.stop, chain.answer(TASK)) == ("question", None)


def test_blank_lines_are_no_steps_and_an_answer_inside_a_step_is_no_answer() -> None:
    (chain,) = chains_of(["\n\nStep 1: the Answer: 3 is wrong\n\nAnswer: 4\n"], max_steps=2)
    assert (chain.stop, chain.answer(TASK)) == ("answer", "4")


def test_rows_of_one_batch_stop_apart() -> None:
    short, long = "Answer: 1\n", "Step 1: " + "x" * 40 + "\nAnswer: 2\n"
    chains = chains_of([short, long])
    assert [len(chain.token_ids) for chain in chains] == [len(short), len(long)]
    assert [chain.answer(TASK) for chain in chains] == ["1", "2"]


def test_seconds_are_the_batchs_divided_and_the_first_call_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 100.0, 200.0, 207.0])  # the call that is thrown away takes 100 s, the batch 7 s
    monkeypatch.setattr("cpo_fast.evaluate.greedy.time", types.SimpleNamespace(perf_counter=lambda: next(clock)))
    assert [chain.seconds for chain in chains_of(["Answer: 1\n", "Answer: 2\n"])] == [3.5, 3.5]


def test_newline_inside_a_merged_token_ends_the_line() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["5\n\nQuestion"])
    scripts = [tokenizer("Answer: 5\n\nQuestion").input_ids]
    (chain,) = greedy_chains(Scripted(scripts), tokenizer, [[7]], TASK, max_new_tokens=50, max_steps=4)
    assert chain.token_ids[-1] == len(tokenizer) - 1, "the tokenizer did not merge; the test would prove nothing"
    assert (chain.stop, chain.answer(TASK), chain.text) == ("answer", "5", "Answer: 5\n\n")


def test_answer_that_shares_a_token_with_the_newline_before_it_is_read_whole() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["\nAnswer: 1"])
    scripts = [tokenizer("Step 1: a\nAnswer: 12\n").input_ids]
    assert len(tokenizer) - 1 in scripts[0], "the tokenizer did not merge; the test would prove nothing"
    (chain,) = greedy_chains(Scripted(scripts), tokenizer, [[7]], TASK, max_new_tokens=50, max_steps=4)
    assert (chain.answer(TASK), chain.text) == ("12", "Step 1: a\nAnswer: 12\n")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"), seed=3, max_position_embeddings=4096)


@pytest.fixture(scope="module")
def loaded(folder: Path) -> tuple[Any, Any]:
    return load_model(config_for(folder, folder).model)


def config_for(folder: Path, run: Path, questions: Path | None = None, **eval_section: Any) -> Any:
    return validate_config(
        {
            "run": str(run),
            "model": {"path": str(folder), "dtype": "float32", "device": "cpu"},
            "task": {"path": str(questions or "")},
            "eval": {"max_new_tokens": 24} | eval_section,
        }
    )


PROMPTS = ["Q: a\n", "Q: a much longer question than the first one\n", "Q: 12\n", "Q: middle sized one\n", "Q\n"]


def test_batched_chains_equal_batch_size_one_and_plain_generate(loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    prompts = [tokenizer(text).input_ids for text in PROMPTS]
    assert len({len(prompt) for prompt in prompts}) == len(prompts), "equal lengths would need no padding"
    caps = {"max_new_tokens": 40, "max_steps": 9}
    single = [c.token_ids for c in greedy_chains(model, tokenizer, prompts, TASK, batch_size=1, **caps)]
    for size in (2, 3, 5, 8):
        assert [c.token_ids for c in greedy_chains(model, tokenizer, prompts, TASK, batch_size=size, **caps)] == single
    for prompt, ids in zip(prompts, single, strict=True):
        plain = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=40, pad_token_id=0)
        assert tuple(plain[0, len(prompt) : len(prompt) + len(ids)].tolist()) == ids
    assert len(set(single)) == len(prompts), "the model says the same to every prompt; the test would prove nothing"


def write_questions(path: Path, golds: list[str | None]) -> Path:
    rows = [{"question": f"What is number {i}?"} | ({"answer": g} if g else {}) for i, g in enumerate(golds)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_evaluation_counts_grades_and_writes_both_files(tmp_path: Path, folder: Path) -> None:
    questions = write_questions(tmp_path / "q.jsonl", ["1", "2", None, "-4.5"])
    texts = ["Step 1: x\nAnswer: 1\n", "Answer: 3\n", "Answer: 9\n", "Step 1: no end"]
    tokenizer = tiny_tokenizer()
    model = Scripted([tokenizer(text).input_ids for text in texts])
    config = config_for(folder, tmp_path / "run", questions, batch_size=4)
    ticks: list[tuple[int, int]] = []
    evaluation = evaluate(config, model, tokenizer, on_question=lambda done, total: ticks.append((done, total)))

    assert ticks == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert [result.correct for result in evaluation.results] == [True, False, None, False]
    assert (evaluation.num_graded, evaluation.num_correct, evaluation.num_unanswered) == (3, 1, 1)
    assert evaluation.accuracy == 1 / 3
    assert evaluation.interval == pytest.approx((0.0615, 0.7923), abs=5e-5)  # 1 of 3, z = 1.96
    assert evaluation.stops == {"answer": 3, "max_new_tokens": 1}

    lines = [json.loads(line) for line in (tmp_path / "run/eval-base.jsonl").read_text().splitlines()]
    assert [line["answer"] for line in lines] == ["1", "3", "9", None]
    assert [line["num_tokens"] for line in lines] == [20, 10, 10, 24]
    assert [line["stop"] for line in lines] == ["answer", "answer", "answer", "max_new_tokens"]
    assert len({line["id"] for line in lines}) == 4
    summary = json.loads((tmp_path / "run/eval-base.json").read_text())
    assert summary == json.loads(json.dumps(evaluation.summary()))
    assert (summary["model_hash"], summary["adapter_hash"]) == (model_hash(folder), "")
    assert summary["tokens"]["mean"] == 16.0
    assert summary["seconds"]["mean"] > 0


def test_evaluation_without_reference_answers_has_no_accuracy(tmp_path: Path, folder: Path) -> None:
    questions = write_questions(tmp_path / "q.jsonl", [None, None])
    evaluation = evaluate(config_for(folder, tmp_path / "run", questions, max_new_tokens=2))
    assert (evaluation.accuracy, evaluation.interval, evaluation.num_questions) == (None, None, 2)


def test_adapter_is_evaluated_under_its_own_label(tmp_path: Path, folder: Path, loaded: tuple[Any, Any]) -> None:
    questions = write_questions(tmp_path / "q.jsonl", ["1"])
    base, _ = load_model(config_for(folder, folder).model)
    with_lora(base, seed=5).save_pretrained(tmp_path / "adapter")
    config = config_for(folder, tmp_path / "run", questions)
    adapted = config.model_copy(
        update={"model": config.model.model_copy(update={"adapter": str(tmp_path / "adapter")})}
    )
    chains = [evaluate(settings).results[0].chain for settings in (config, adapted)]
    assert chains[0] != chains[1], "the adapter changed nothing"
    summary = json.loads((tmp_path / "run/eval-adapter.json").read_text())
    assert (summary["label"], summary["adapter_hash"]) == ("adapter", adapter_hash(tmp_path / "adapter"))


def test_prompt_ids_are_those_the_search_uses(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    questions = write_questions(tmp_path / "q.jsonl", ["1"])
    tokenizer = tiny_tokenizer()
    seen: list[list[int]] = []

    def record(model: Any, tokenizer: Any, prompts: list[list[int]], *args: Any, **kwargs: Any) -> list[Chain]:
        seen.extend(prompts)
        return [Chain("Answer: 1\n", (5,), "answer", 0.1)]

    monkeypatch.setattr("cpo_fast.evaluate.greedy.greedy_chains", record)
    evaluate(config_for(folder, tmp_path / "run", questions), Scripted([]), tokenizer)
    assert seen == [tokenizer(TASK.few_shot + "Question: What is number 0?\n").input_ids]


def test_no_question_left_is_an_error_before_any_model_is_loaded(tmp_path: Path) -> None:
    questions = write_questions(tmp_path / "q.jsonl", ["1"])
    config = config_for(tmp_path / "nowhere", tmp_path / "run", questions)
    skipped = config.model_copy(update={"task": config.task.model_copy(update={"skip_questions": 1})})
    with pytest.raises(CpoFastError, match="leaves no question"):
        evaluate(skipped)


def test_eval_command_prints_table_or_json(tmp_path: Path, folder: Path) -> None:
    from cpo_fast.cli.eval import eval_command

    questions = write_questions(tmp_path / "q.jsonl", ["1", "2"])
    settings = {
        "run": str(tmp_path / "run"),
        "model": {"path": str(folder), "dtype": "float32", "device": "cpu"},
        "task": {"path": str(questions)},
    }
    (tmp_path / "c.yaml").write_text(json.dumps(settings))  # JSON is YAML
    arguments = [str(tmp_path / "c.yaml"), "eval.max_new_tokens=3", "task.num_questions=1"]
    table = CliRunner().invoke(eval_command, arguments, catch_exceptions=False)
    assert "0 of 1" in table.stdout
    assert "seconds per question" in table.stdout
    assert "batch size" in table.stdout
    summary = json.loads(CliRunner().invoke(eval_command, [*arguments, "--json"], catch_exceptions=False).stdout)
    assert (summary["num_questions"], summary["tokens"]["mean"]) == (1, 3.0)
