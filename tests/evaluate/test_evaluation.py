"""Evaluations ask every question, grade those with a reference answer, and the files say what happened."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from cpo_fast.adapters import adapter_hash
from cpo_fast.config import Config, load_config, validate_config
from cpo_fast.errors import ConfigError, CpoFastError, DataError
from cpo_fast.evaluate import Evaluation, evaluate, evaluate_methods, read_evaluation
from cpo_fast.models import load_model, model_hash
from cpo_fast.search.engine.huggingface import HuggingFaceEngine
from cpo_fast.tasks import get_task
from tests.evaluate.scripted import ScriptedEngine, silent_model
from tests.tiny import save_tiny_model, with_lora

ROOT = Path(__file__).resolve().parents[2]
TASK = get_task("svamp")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"), seed=3, max_position_embeddings=4096)


def config_for(folder: Path, run: Path, questions: Path | None = None, **eval_section: Any) -> Config:
    return validate_config(
        {
            "run": str(run),
            "model": {"path": str(folder), "dtype": "float32", "device": "cpu"},
            "task": {"path": str(questions or "")},
            "search": {"num_candidates": 2, "num_kept": 1, "max_steps": 2},
            "eval": {"max_new_tokens": 24} | eval_section,
        }
    )


def write_questions(path: Path, texts: list[str], golds: list[str | None]) -> Path:
    rows = [{"question": text} | ({"answer": gold} if gold else {}) for text, gold in zip(texts, golds, strict=True)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def numbered(path: Path, golds: list[str | None]) -> Path:
    return write_questions(path, [f"What is number {number}?" for number in range(len(golds))], golds)


@pytest.mark.parametrize("asked", ["auto", "float32", "bfloat16"])
def test_the_recorded_dtype_is_the_model_s_not_the_word_that_asked_for_it(
    asked: str, tmp_path: Path, folder: Path
) -> None:
    config = config_for(folder, tmp_path / "run", numbered(tmp_path / "q.jsonl", ["1"]))
    config = config.model_copy(update={"model": config.model.model_copy(update={"dtype": asked})})
    engine = ScriptedEngine({"number": "Answer: 1\n"})
    for dtype in (torch.float32, torch.bfloat16):
        evaluation = evaluate(config, silent_model(dtype), engine.tokenizer, make_engine=lambda *_: engine)
        assert evaluation.dtype == str(dtype).removeprefix("torch.")


def test_evaluation_counts_grades_and_writes_both_files(tmp_path: Path, folder: Path) -> None:
    questions = numbered(tmp_path / "q.jsonl", ["1", "2", None, "-4.5"])
    texts = ["Step 1: x\nAnswer: 1\n", "Answer: 3\n", "Answer: 9\n", "Step 1: no end of it, and no end\n"]
    engine = ScriptedEngine({f"number {number}": text for number, text in enumerate(texts)})
    config = config_for(folder, tmp_path / "run", questions, latency_questions=3)
    ticks: list[tuple[int, int]] = []
    evaluation = evaluate(
        config,
        silent_model(),
        engine.tokenizer,
        on_question=lambda done, total: ticks.append((done, total)),
        make_engine=lambda *_: engine,
    )

    assert ticks == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert [result.correct for result in evaluation.results] == [True, False, None, False]
    assert [bool(result.scores) for result in evaluation.results] == [True, True, False, True]
    assert (evaluation.num_graded, evaluation.num_correct, evaluation.num_unanswered) == (3, 1, 1)
    assert (evaluation.accuracy, evaluation.num_failed) == (1 / 3, 0)
    assert evaluation.interval == pytest.approx((0.0615, 0.7923), abs=5e-5)  # 1 of 3, z = 1.96
    assert set(evaluation.metrics) == set(TASK.score_answer("1", "2"))
    assert evaluation.metrics[TASK.main_metric] == 1 / 3  # over the graded questions alone
    assert evaluation.stops == {"answer": 3, "max_new_tokens": 1}
    assert (evaluation.engine, evaluation.batch_size, evaluation.method) == ("arena", 64, "cot")
    # seconds are of questions that were asked alone
    assert [result.seconds is None for result in evaluation.results] == [False, False, False, True]
    assert evaluation.num_timed == 3
    assert evaluation.total_seconds >= 3 * evaluation.seconds.mean

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
    assert read_evaluation(tmp_path / "run/eval-base.jsonl") == evaluation


def test_questions_of_eval_path_are_asked_and_recorded_in_place_of_the_task_s(tmp_path: Path, folder: Path) -> None:
    searched = write_questions(tmp_path / "train.jsonl", ["What is number 7?"], ["7"])
    asked = numbered(tmp_path / "test.jsonl", ["1", "2"])
    engine = ScriptedEngine({"number": "Answer: 1\n"})

    def evaluation(run: str, questions: Path, **section: Any) -> Evaluation:
        config = config_for(folder, tmp_path / run, questions, **section)
        task = config.task.model_copy(update={"num_questions": 1} if section else {})
        config = config.model_copy(update={"task": task})
        return evaluate(config, silent_model(), engine.tokenizer, make_engine=lambda *_: engine)

    own, other = evaluation("own", asked), evaluation("other", searched, path=str(asked))
    # all of them: task.num_questions counts those of task.path
    assert [result.question for result in other.results] == ["What is number 0?", "What is number 1?"]
    assert (own.num_correct, other.num_correct, other.num_graded) == (1, 1, 2)
    assert own.task_hash == other.task_hash != evaluation("searched", searched).task_hash
    with pytest.raises(DataError, match=r"none\.jsonl: cannot read .*; check the path"):
        evaluation("none", asked, path=str(tmp_path / "none.jsonl"))


def test_a_reference_answer_that_cannot_be_read_is_said(
    tmp_path: Path, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    questions = numbered(tmp_path / "q.jsonl", ["57", "seven"])
    config = config_for(folder, tmp_path / "run", questions)
    task = config.task.model_copy(update={"file": str(ROOT / "examples/reasoner/plain.yaml")})
    config = config.model_copy(update={"task": task})
    engine = ScriptedEngine({"number": "Answer: 57\n"})
    evaluation = evaluate(config, silent_model(), engine.tokenizer, make_engine=lambda *_: engine)
    assert evaluation.num_correct == 1
    assert "1 of 2 reference answers cannot be read by answer.kind=regex" in caplog.text
    assert f"the first is {questions}:2, 'seven'" in caplog.text


def test_evaluation_without_reference_answers_has_no_accuracy(tmp_path: Path, folder: Path) -> None:
    questions = numbered(tmp_path / "q.jsonl", [None, None])
    evaluation = evaluate(config_for(folder, tmp_path / "run", questions, max_new_tokens=2))
    assert (evaluation.accuracy, evaluation.interval, evaluation.num_questions) == (None, None, 2)
    assert (evaluation.metrics, evaluation.num_graded) == ({}, 0)


def test_chains_alone_equal_those_side_by_side_and_of_the_other_engine(tmp_path: Path, folder: Path) -> None:
    texts = ["zzzzzzzzzzzzzzzzzzzzzzzzzzzzzz 7?", "QQ", "12 12 12 12 12 12 12 12 12 12 12 12 12 12 12"]
    questions = write_questions(tmp_path / "q.jsonl", texts, ["1", "2", "3"])
    found = []
    for engine, num_alone in (("arena", 3), ("arena", 1), ("hf", 3)):
        config = config_for(folder, tmp_path / engine, questions, latency_questions=num_alone)
        search = config.search.model_copy(update={"engine": engine, "arena_tokens": 8000})
        found.append(evaluate(config.model_copy(update={"search": search})))
        assert (found[-1].engine, found[-1].num_timed) == (engine, num_alone)
        assert found[-1].setup_seconds > 0
    assert [each.batch_size for each in found] == [64, 64, 1]
    for other in found[1:]:
        assert [result.chain for result in found[0].results] == [result.chain for result in other.results]
    assert len({result.chain for result in found[0].results}) > 1, "the same to every question would prove nothing"


def test_adapter_is_evaluated_under_its_own_label(tmp_path: Path, folder: Path) -> None:
    questions = numbered(tmp_path / "q.jsonl", ["1"])
    base, _ = load_model(config_for(folder, folder).model)
    with_lora(base, seed=5).save_pretrained(tmp_path / "adapter")
    config = config_for(folder, tmp_path / "run", questions)
    adapted = config.model_copy(
        update={"model": config.model.model_copy(update={"adapter": str(tmp_path / "adapter")})}
    )
    chains = [evaluate(settings).results[0].chain for settings in (config, adapted)]
    assert chains[0] != chains[1], "the adapter changed nothing"
    label = f"{tmp_path.name}-adapter"  # it lies outside the run's folder
    summary = json.loads((tmp_path / f"run/eval-{label}.json").read_text())
    assert (summary["label"], summary["adapter_hash"]) == (label, adapter_hash(tmp_path / "adapter"))
    assert summary["adapter"] == str(tmp_path / "adapter")


def test_a_merged_adapter_gives_the_same_answers_and_says_that_it_was_merged(tmp_path: Path, folder: Path) -> None:
    questions = numbered(tmp_path / "q.jsonl", ["1", "2"])
    base, _ = load_model(config_for(folder, folder).model)
    with_lora(base, seed=5).save_pretrained(tmp_path / "adapter")
    config = config_for(folder, tmp_path / "run", questions, method="both", latency_questions=1)
    changes = {"model": config.model.model_copy(update={"adapter": str(tmp_path / "adapter")})}
    found = []
    for merge in (False, True):
        search = config.search.model_copy(update={"merge_adapter": merge, "arena_tokens": 8000})
        found.append(evaluate_methods(config.model_copy(update={**changes, "search": search})))
    for live, merged in zip(*found, strict=True):
        assert [result.chain for result in live.results] == [result.chain for result in merged.results]
        assert [result.num_tokens for result in live.results] == [result.num_tokens for result in merged.results]
        assert live.settings_hash != merged.settings_hash
        assert live.adapter_hash == merged.adapter_hash != ""
    with pytest.raises(ConfigError, match=r"search\.merge_adapter: there is no adapter to merge; set model\.adapter"):
        evaluate_methods(config.model_copy(update={"search": search}))


@pytest.fixture
def scripted() -> ScriptedEngine:
    """An engine that knows three questions, of which the tree gets two right and the chain one."""
    return ScriptedEngine(
        {"apples": "Step 1: x\nAnswer: 5\n", "pears": "Answer: 7\n", "plums": "Answer: 9\n"},
        {
            ("apples", 0): ["Answer: 5\n", "Answer: 5 \n"],
            ("pears", 0): ["Answer: 6 is good\n", "Answer: 7\n"],
            ("plums", 0): ["Answer: 9\n"],
        },
    )


TEXTS = ["How many apples?", "How many pears?", "How many plums?"]


def test_both_methods_ask_the_same_questions_of_one_engine(
    tmp_path: Path, folder: Path, scripted: ScriptedEngine
) -> None:
    questions = write_questions(tmp_path / "q.jsonl", TEXTS, ["5", "6", None])
    config = config_for(folder, tmp_path / "run", questions, method="both")
    ticks: list[tuple[int, int]] = []
    chain, tree = evaluate_methods(
        config,
        silent_model(),
        scripted.tokenizer,
        on_question=lambda done, total: ticks.append((done, total)),
        make_engine=lambda *_: scripted,
    )
    assert ticks == [(number, 6) for number in range(1, 7)]
    assert ([chain.label, chain.method], [tree.label, tree.method]) == (["base", "cot"], ["base-tot", "tot"])
    assert [result.answer for result in chain.results] == ["5", "7", "9"]
    assert [result.answer for result in tree.results] == ["5", "6", "9"]
    assert (chain.num_correct, tree.num_correct, tree.num_graded) == (1, 2, 2)
    assert [result.stop for result in tree.results] == ["ok", "ok", "ok"]
    # two answers a question, and nothing to expand after them
    assert tree.results[1].num_tokens == len("Answer: 6 is good\n") + len("Answer: 7\n")
    assert tree.results[1].chain == "Answer: 6 is good\n"
    assert chain.settings_hash != tree.settings_hash
    assert chain.prompt_hash != tree.prompt_hash  # the evaluator's prompts are the tree's alone
    # few-shot prompt and both evaluator prompts, once for both methods
    assert [prefix.startswith(TASK.few_shot) for prefix in scripted.prefixes] == [True, False, False]
    assert read_evaluation(tmp_path / "run/eval-base-tot.jsonl") == tree
    with pytest.raises(ValueError, match="evaluate_methods"):
        evaluate(config, silent_model(), scripted.tokenizer, make_engine=lambda *_: scripted)


def test_reference_answers_change_no_answer(tmp_path: Path, folder: Path, scripted: ScriptedEngine) -> None:
    answers = []
    for number, golds in enumerate((["5", "6", "9"], ["1", None, "2"])):
        questions = write_questions(tmp_path / f"{number}.jsonl", TEXTS, golds)
        config = config_for(folder, tmp_path / str(number), questions, method="both")
        evaluations = evaluate_methods(config, silent_model(), scripted.tokenizer, make_engine=lambda *_: scripted)
        answers.append([(each.answer, each.num_tokens) for one in evaluations for each in one.results])
    assert answers[0] == answers[1]


def test_failed_question_is_recorded_and_the_others_go_on(
    tmp_path: Path, folder: Path, scripted: ScriptedEngine
) -> None:
    questions = write_questions(tmp_path / "q.jsonl", ["How many apples?", "Please raise?"], ["5", "5"])
    config = config_for(folder, tmp_path / "run", questions, method="both", latency_questions=1)
    for evaluation in evaluate_methods(config, silent_model(), scripted.tokenizer, make_engine=lambda *_: scripted):
        fine, failed = evaluation.results
        assert (fine.correct, fine.stop != "failed", fine.detail) == (True, True, "")
        assert (failed.correct, failed.answer, failed.stop) == (False, None, "failed")
        assert failed.detail == "ValueError: the question does not fit"
        assert (evaluation.num_failed, evaluation.num_unanswered, evaluation.accuracy) == (1, 1, 0.5)
    only_bad = write_questions(tmp_path / "bad.jsonl", ["Please raise?"], ["5"])
    with pytest.raises(CpoFastError, match=r"every question failed.*does not fit"):
        evaluate(
            config_for(folder, tmp_path / "bad", only_bad),
            silent_model(),
            scripted.tokenizer,
            make_engine=lambda *_: scripted,
        )
    assert not (tmp_path / "bad/eval-base.json").exists()


def test_equal_failures_are_three_lines_and_a_count_and_the_configuration_is_kept(
    tmp_path: Path, folder: Path, scripted: ScriptedEngine, caplog: pytest.LogCaptureFixture
) -> None:
    bad = [f"Please raise {number}?" for number in range(7)]
    questions = write_questions(tmp_path / "q.jsonl", ["How many apples?", *bad], ["5"] * 8)
    config = config_for(folder, tmp_path / "run", questions, method="cot", latency_questions=3)
    evaluation = evaluate(config, silent_model(), scripted.tokenizer, make_engine=lambda *_: scripted)
    assert evaluation.num_failed == 7
    said = [record.getMessage() for record in caplog.records if "failed" in record.getMessage()]
    assert len(said) == 4
    assert said[-1] == "4 more questions failed for the same reason: ValueError: the question does not fit"
    assert load_config(tmp_path / "run" / "eval.yaml") == config


def test_question_too_long_for_the_model_fails_alone(tmp_path: Path, folder: Path) -> None:
    questions = write_questions(tmp_path / "q.jsonl", ["How many apples?", "very " * 900 + "long?"], ["5", "5"])
    evaluation = evaluate(config_for(folder, tmp_path / "run", questions, max_new_tokens=3))
    assert [result.stop for result in evaluation.results] == ["max_new_tokens", "failed"]
    assert "exceed the model's 4096 positions" in evaluation.results[1].detail


class RecordingEngine(HuggingFaceEngine):
    """Remembers the prompts that it is asked to go on from."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.seen: list[tuple[int, ...]] = []

    def sample(self, requests: Any) -> Any:
        self.seen.extend(request.token_ids for request in requests if request.uid != "warm-up")
        return super().sample(requests)


@pytest.mark.parametrize("chat", [False, True])
def test_prompt_ids_are_those_the_search_uses(tmp_path: Path, folder: Path, chat: bool) -> None:
    config = config_for(folder, tmp_path / "run", numbered(tmp_path / "q.jsonl", ["1"]), max_new_tokens=2)
    task, search = (
        config.task.model_copy(update={"chat": chat}),
        config.search.model_copy(update={"engine": "hf"}),  # whose `sample` tells its prompts
    )
    config = config.model_copy(update={"task": task, "search": search})
    model, tokenizer = load_model(config.model)
    tokenizer.chat_template = "{% for m in messages %}<u>{{ m.content }}</u>{% endfor %}<a>"
    first = []
    for method in ("cot", "tot"):
        asked = config.model_copy(update={"eval": config.eval.model_copy(update={"method": method})})
        engine = RecordingEngine(model, tokenizer, 1)
        evaluate(asked, model, tokenizer, make_engine=lambda *_, engine=engine: engine)
        first.append(engine.seen[0])
    prompt = TASK.few_shot + "Question: What is number 0?\n"
    expected = f"<u>{prompt.rstrip()}</u><a>" if chat else prompt
    assert first == [tuple(tokenizer(expected).input_ids)] * 2


def test_a_model_without_its_tokenizer_is_refused(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(ValueError, match="model and tokenizer together"):
        evaluate(config_for(folder, tmp_path / "run"), silent_model())


def test_no_question_left_is_an_error_before_any_model_is_loaded(tmp_path: Path) -> None:
    questions = numbered(tmp_path / "q.jsonl", ["1"])
    config = config_for(tmp_path / "nowhere", tmp_path / "run", questions)
    skipped = config.model_copy(update={"task": config.task.model_copy(update={"skip_questions": 1})})
    with pytest.raises(CpoFastError, match="leaves no question"):
        evaluate(skipped)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda row, summary: row.pop("stop"), r"eval-base\.jsonl:1: not a line of an evaluation \(see stop\)"),
        (lambda row, summary: row.update(num_tokens="3"), r"eval-base\.jsonl:1: a field has a wrong type"),
        (lambda row, summary: summary.update(num_questions=2), r"1 questions, its summary eval-base\.json counts 2"),
        (lambda row, summary: summary.pop("dtype"), r"eval-base\.json: fields missing or unknown: dtype"),
        (lambda row, summary: summary.update(schema_version=1), "schema_version is 1, this version reads 3"),
    ],
)
def test_damaged_result_is_named(tmp_path: Path, folder: Path, change: Any, message: str) -> None:
    questions = numbered(tmp_path / "q.jsonl", ["1"])
    evaluate(config_for(folder, tmp_path, questions, max_new_tokens=1))
    row = json.loads((tmp_path / "eval-base.jsonl").read_text())
    summary = json.loads((tmp_path / "eval-base.json").read_text())
    change(row, summary)
    (tmp_path / "eval-base.jsonl").write_text(json.dumps(row) + "\n")
    (tmp_path / "eval-base.json").write_text(json.dumps(summary))
    with pytest.raises(DataError, match=message):
        read_evaluation(tmp_path / "eval-base.jsonl")
