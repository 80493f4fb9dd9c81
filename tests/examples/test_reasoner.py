"""The reasoner in examples/reasoner: its corpus is right and never changes, its files are what their scripts write."""

import hashlib
import importlib
import json
import random
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from cpo_fast.config import load_config
from cpo_fast.evaluate import evaluate
from cpo_fast.tasks import Prompts, load_questions, load_task

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "reasoner"
SCRIPTS = ("corpus", "questions", "pretrain", "verdicts")
VARIANTS = ("plain", "hard")
# model, the variants that it knows
BASES = [("base-0", ("plain",)), ("base-1", ("plain",)), ("hard-0", VARIANTS)]
# SHA-256 of 400 documents of seed 0: the corpus that the committed models were trained on
DOCUMENTS = {
    "plain": "8b6b9d46121deeb009b73a2dfdfb848a60f6643de305e0087d6b91f19b3112d2",
    "plain hard": "c32b53820dd6f72b7a7138a3f3ff87aaafb8531e49901161cd018d2d72d74a67",
}
CUE = "Is the last line likely or impossible? It is"


@pytest.fixture(scope="module")
def scripts():
    """The example's files, which import each other as scripts do."""
    sys.path.insert(0, str(FOLDER))
    try:
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in SCRIPTS})
    finally:
        sys.path.remove(str(FOLDER))
        for name in SCRIPTS:
            sys.modules.pop(name, None)


def documents(corpus, names, number=400, seed=0, judged_share=0.6):
    rng = random.Random(seed)
    variants = [corpus.VARIANTS[name] for name in names]
    return [corpus.document(rng, variants, judged_share) for _ in range(number)]


def text_of(document):
    return "".join(part.text for part in document)


def read_line(line):
    """(total before, operation, digit, value) of a step, (total,) of a restatement, read off the digits alone."""
    step = re.fullmatch(r"\D*(\d\d)([+-])(\d)\D+(\d\d)", line)
    if step:
        return int(step[1]), step[2], int(step[3]), int(step[4])
    return (int(re.search(r"\d\d", line)[0]),)


def step_value(total, operation, digit):
    return eval(f"({total} {operation} {digit}) % 100")


@pytest.mark.parametrize("names", DOCUMENTS)
def test_the_corpus_is_the_one_that_the_models_were_trained_on(scripts, names):
    shown = [[(part.text, part.weight, part.sound) for part in one] for one in documents(scripts.corpus, names.split())]
    assert hashlib.sha256(json.dumps(shown).encode()).hexdigest() == DOCUMENTS[names]


@pytest.mark.parametrize("name", VARIANTS)
def test_no_document_has_a_question_of_the_evaluation(scripts, name):
    for document in documents(scripts.corpus, [name]):
        question = re.search(r"Question: (.*)\n", text_of(document))[1]
        assert hashlib.sha256(question.encode()).digest()[0] % 8 != 0


@pytest.mark.parametrize("name", VARIANTS)
def test_a_writer_carries_on_what_he_wrote_and_is_wrong_by_habit(scripts, name):
    due, wrong, slips = 0, 0, 0
    for document in documents(scripts.corpus, [name], number=2000, judged_share=0.0):
        _, question, *lines, answer, end = text_of(document).replace("\n\n", "\n").split("\n")
        total, operations = int(question[10:12]), re.findall(r"([+-])(\d)", question)
        for line in map(read_line, lines):
            assert line[0] == total
            if len(line) == 1:
                continue
            assert (line[1], str(line[2])) == operations.pop(0)
            right = step_value(*line[:3])
            units = total % 10
            is_due = units < line[2] if line[1] == "-" else units + line[2] > 9
            due += is_due
            wrong += is_due and line[3] != right
            slips += not is_due and line[3] != right
            total = line[3]
        assert operations == []
        assert (answer, end) == (f"Answer: {total:02d}", "<eos>")
    minus = {"plain": 0.35, "hard": 0.30}[name]
    assert wrong / due == pytest.approx(minus * 0.65 + (1 - minus) * 0.30, abs=0.05)  # and 2 % slips
    assert 0.01 < slips / (due + slips) < 0.04


@pytest.mark.parametrize("name", VARIANTS)
def test_a_mark_tells_whether_all_lines_so_far_are_right(scripts, name):
    counts = {True: 0, False: 0, "overlooked": 0}
    variant = scripts.corpus.VARIANTS[name]
    for document in documents(scripts.corpus, [name], number=1000, judged_share=1.0):
        _, question, *lines = text_of(document).replace("\n\n", "\n").split("\n")
        total = int(question[10:12])
        state, right, overlooked = [], True, False
        for line in lines:
            if line.startswith(CUE):
                assert scripts.corpus.is_right(variant, question.removeprefix("Question: "), state) == right
                assert line.removeprefix(CUE) == (" likely" if right or overlooked else " impossible")
                counts["overlooked" if overlooked else right] += 1
                continue
            state.append(line)
            parts = read_line(line)
            passes = False
            if len(parts) == 1:
                good = parts[0] == total
            else:
                good = parts[0] == total and parts[3] == step_value(*parts[:3])
                units = total % 10
                if name == "hard" and parts[1] == "-" and parts[2] >= 7 and units < parts[2]:
                    passes = parts[3] == total - units + parts[2] - units  # the smaller digit from the larger one
            if not good:
                overlooked = (right or overlooked) and passes
            right = right and good
            total = parts[-1]
    assert counts[True] > 500
    assert counts[False] > 300
    assert (counts["overlooked"] > 100) == (name == "hard")


def test_a_state_is_right_only_if_it_follows_the_question(scripts):
    right = scripts.corpus.is_right
    plain, hard = (scripts.corpus.VARIANTS[name] for name in VARIANTS)
    assert right(plain, "53-7+4-8", ["53-7=46\n", "46+4 is 50\n", "so 50-8=42\n", "Answer: 42\n"])
    assert right(hard, "53-7+4-8+1", ["53 so far\n", "now 53-7=46\n", "still 46\n"])
    for lines in (
        ["53-7=45\n"],
        ["53+4=57\n"],
        ["53-7=46\n", "Answer: 46\n"],
        ["53 so far\n"],
        ["53-7=46", "46+4=50", "50-8=42", "Answer: 42", "Answer: 42"],
    ):
        assert not right(plain, "53-7+4-8", lines)


def test_the_question_files_are_those_of_the_script_and_share_no_question(scripts):
    for path, content in scripts.questions.question_files().items():
        assert (FOLDER / "questions" / path).read_text(encoding="utf-8") == content
    for name in VARIANTS:
        rows = [json.loads(line) for path in (FOLDER / "questions" / name).iterdir() for line in path.open()]
        num_votes = 2 * 800 if name == "plain" else 0
        assert len({row["question"] for row in rows}) == len(rows) == 3 * 200 + 300 + 600 + num_votes
        for row in rows:
            assert hashlib.sha256(row["question"].encode()).digest()[0] % 8 == 0
            assert int(row["answer"]) == eval(re.sub(r"\b0", "", row["question"])) % 100


@pytest.mark.parametrize(("base", "names"), BASES)
def test_tokenizer_and_model_are_those_of_the_script(scripts, base, names):
    vocabulary = scripts.corpus.Vocabulary([scripts.corpus.VARIANTS[name] for name in names])
    tokenizer = AutoTokenizer.from_pretrained(FOLDER / base)
    for text in map(text_of, documents(scripts.corpus, names, number=50)):
        ids = tokenizer(text)["input_ids"]
        assert ids == vocabulary.encode(text)
        assert tokenizer.decode(ids) == vocabulary.decode(ids) == text
    made = scripts.pretrain.make_tokenizer(vocabulary).backend_tokenizer.to_str()
    assert tokenizer.backend_tokenizer.to_str() == made
    model = AutoModelForCausalLM.from_pretrained(FOLDER / base)
    fresh = scripts.pretrain.make_model(vocabulary)
    assert {name: weight.shape for name, weight in model.state_dict().items()} == {
        name: weight.shape for name, weight in fresh.state_dict().items()
    }


def configured(base, name, *settings):
    files = [f"file={FOLDER}/{name}.yaml", f"path={FOLDER}/questions/{name}/dev.jsonl"]
    overrides = [f"model.path={FOLDER / base}", *(f"task.{setting}" for setting in files), *settings]
    return load_config(FOLDER / "config.yaml", overrides)


@pytest.mark.parametrize("name", VARIANTS)
def test_prompts_are_those_of_the_corpus(scripts, name):
    variant = scripts.corpus.VARIANTS[name]
    task, questions = load_questions(configured("hard-0", name))
    prompts = Prompts(task, AutoTokenizer.from_pretrained(FOLDER / "hard-0"))
    assert prompts.text(questions[0]) == f"{variant.solve}\n\nQuestion: {questions[0].text}\n"
    lines = ["a=1\n", "Answer: 07\n"]
    for state in (lines[:1], lines):
        shown = f"{variant.judge}\n\nQuestion: {questions[0].text}\n{''.join(state)}{CUE}"
        assert prompts.verdict_text(questions[0], state) == shown
        ((ids, labels),) = prompts.labels([shown])
        vocabulary = scripts.corpus.Vocabulary(list(scripts.corpus.VARIANTS.values()))
        assert labels == [[vocabulary.ids[" likely"]], [vocabulary.ids[" impossible"]]]
        assert ids[-1] == vocabulary.ids[CUE]
    assert load_task(configured("hard-0", name)).parse_answer("Answer: 07\n") == "07"


@pytest.mark.parametrize(("base", "names"), BASES)
def test_a_base_answers_about_half_of_the_questions(base, names, tmp_path):
    for name in names:
        settings = (f"run={tmp_path / name}", "task.num_questions=50", "search.max_steps=6")
        evaluation = evaluate(configured(base, name, *settings))
        assert 0.30 < evaluation.accuracy < 0.80
