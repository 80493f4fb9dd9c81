"""Task files: shipped prompts never change, a file of one's own is a task, and every mistake is one sentence."""

import hashlib
import importlib.resources
import json
import re
from pathlib import Path

import pytest
import yaml

from cpo_fast import tasks
from cpo_fast.config import load_config
from cpo_fast.errors import ConfigError, DataError
from cpo_fast.search.tree_store import Provenance, open_trees
from cpo_fast.tasks import Question, Task, get_task, load_questions, load_task, task_name
from cpo_fast.tasks.task_file import Part, TaskFile, read_task_file
from cpo_fast.tree import SCHEMA_VERSION

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "tasks" / "unit_conversion.yaml"
DOCS = ROOT / "docs" / "tasks.md"

# SHA-256 of what the model was shown before these tasks were files
PROMPTS = {
    ("svamp", None): "3b0fdc148ae40d535e3747c5dead5b5cd31832f047a5e48004f98d21e93fb32f",
    ("svamp", 3): "7373397f374dbd612425cea40250de59204966cec02bcbe0f669241d12ec3a5b",
    ("bamboogle", None): "1dab0139d18b3d0c517bbddc12b5b729784ce6e08c87416921515090ac778a1b",
    ("bamboogle", 3): "6a537b794d6d6bdacec0b65038fccc2a7567c3bc8910a9d54fe9e5c275299a6d",
    ("fever", None): "e82fa38ddf7bd6f1608fe3dfed15ce254ed3262f9db8c6e6949c498b79c2e730",
    ("fever", 3): "befc90ba015f389037e3c7621485f1c317b2b47f5de1b0e855a74e745bc35bdf",
}


@pytest.mark.parametrize(("name", "seed"), PROMPTS)
def test_the_prompts_of_the_data_sets_never_change(name, seed):
    task, question = get_task(name, seed, seed), Question("q", "Why?")
    texts = [task.few_shot, task.few_shot_evaluator, task.few_shot_conclusion_evaluator, task.prompt(question)]
    texts.append(task.evaluator_prompt(question, ["Step 1: a\n"]))
    assert hashlib.sha256("\0".join(texts).encode()).hexdigest() == PROMPTS[name, seed]


def test_the_files_of_the_data_sets_come_with_the_package():
    inside = importlib.resources.files("cpo_fast.tasks")
    files = {each.name: each.read_text(encoding="utf-8") for each in inside.iterdir() if each.name.endswith(".yaml")}
    assert set(files) == {"arithmetic.yaml", "fact_verification.yaml", "multi_hop_qa.yaml"}
    assert all("instruction:" in text for text in files.values())
    assert importlib.resources.files("cpo_fast.demo").joinpath("questions.jsonl").is_file()


def values(**changes):
    return {**yaml.load(EXAMPLE.read_text(encoding="utf-8"), yaml.BaseLoader), **changes}


def written(folder, content, name="my_task.yaml"):
    path = folder / name
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return path


def configured(*settings):
    return load_config(None, [f"task.{setting}" for setting in settings])


def test_the_example_is_asked_like_any_task():
    config = configured(f"file={EXAMPLE}", f"path={EXAMPLE.with_suffix('.jsonl')}")
    task, questions = load_questions(config)
    digest = hashlib.sha256(EXAMPLE.read_bytes()).hexdigest()[:16]
    assert task.name == task_name(config.task) == f"unit_conversion@{digest}"
    assert len(questions) == 8
    for question in questions:
        assert task.is_correct(task.parse_answer(f"Answer: {question.gold}\n"), question.gold)
    assert task.few_shot.startswith("Convert each quantity one line at a time")
    assert "\n\nQuestion: How many hours are 150 minutes?\nStep 1: One hour is 60 minutes.\n" in task.few_shot


def test_marks_labels_and_kind_are_those_of_the_file(tmp_path):
    chain = {"question": "A or B?", "steps": ["It is B."], "answer": "B"}
    content = values(
        answer={"kind": "choice", "choices": {"A": ["first"], "B": ["second"]}},
        marks={"question": "Q:", "step": "({n})", "answer": "A:"},
        verdict={"cue": "Right or wrong?", "likely": "right", "impossible": "wrong"},
        vote="count",
        demonstrations=[chain],
        step_verdicts={"instruction": "Judge.", "demonstrations": [{**chain, "verdict": "likely"}]},
        conclusion_verdicts={"instruction": "Judge.", "demonstrations": [{**chain, "verdict": "impossible"}]},
    )
    del content["step_verdicts"]["demonstrations"][0]["answer"]
    task = load_task(configured(f"file={written(tmp_path, content)}"))
    assert task.few_shot.endswith("Q: A or B?\n(1) It is B.\nA: B\n\n")
    assert task.few_shot_evaluator.endswith("Q: A or B?\n(1) It is B.\nRight or wrong? right\n\n")
    prompt = task.evaluator_prompt(Question("q", "Why?"), ["(1) x\n", "A: B\n"])
    assert prompt == f"{task.few_shot_conclusion_evaluator}Q: Why?\n(1) x\nA: B\nRight or wrong?"
    assert (task.vote_by, task.main_metric, task.labels) == ("count", "exact", ("right", "wrong"))
    assert task.parse_answer("A: (B) the second") == "B"
    assert task.parse_answer("A: A or B") is None
    assert task.parse_answer("Answer: B") is None
    assert task.leaves_question("Q: another?")


def test_a_file_may_show_no_worked_examples(tmp_path):
    judge = {"instruction": "Judge.", "demonstrations": []}
    content = values(instruction="Solve.", demonstrations=[], step_verdicts=judge, conclusion_verdicts=judge)
    task = load_task(configured(f"file={written(tmp_path, content)}"))
    question = Question("q", "1+1")
    assert task.prompt(question) == "Solve.\n\nQuestion: 1+1\n"
    state = task.evaluator_prompt(question, ["1+1=2\n"])
    assert state == "Judge.\n\nQuestion: 1+1\n1+1=2\nIs the last line likely or impossible? It is"


ANSWERS = [
    ({"kind": "choice", "choices": {"yes": [], "no": []}}, "No, it is not", "no"),
    ({"kind": "choice", "choices": {"yes": [], "no": []}}, "no one", None),
    ({"kind": "choice", "choices": {"yes": [], "no": []}}, "No. 5", None),
    ({"kind": "choice", "choices": {"yes": [], "no": []}}, "No\u2014it is not", "no"),
    ({"kind": "choice", "choices": {"yes": [], "no": []}}, "**Yes**.", "yes"),
    ({"kind": "choice", "choices": {"C++": [], "C": []}}, "C++ it is", "C++"),
    ({"kind": "regex", "pattern": r"\(([A-E])\)"}, "(C) or so", "C"),
    ({"kind": "regex", "pattern": r"\(([A-E])\)"}, "(C) or (D)", None),
    ({"kind": "regex", "pattern": "[a-h][1-8]"}, "e4, and e4 again", "e4"),
    ({"kind": "exact"}, " O\u2019Brien  & Co ", "O'Brien & Co"),
    ({"kind": "exact"}, " ", None),
    ({"kind": "text", "correct": "exact"}, "The Rhine.", "rhine"),
    ({"kind": "number"}, "minus \u00bd", "-0.5"),
]


@pytest.mark.parametrize(("section", "text", "answer"), ANSWERS)
def test_an_answer_is_read_as_its_kind_says(section, text, answer):
    reader = TaskFile.model_fields["answer"].annotation.model_validate(section).reader()
    assert reader.read(text) == answer
    if answer is not None:
        assert reader.scores(answer, answer)[reader.main_metric] == 1.0
        assert reader.scores(reader.read(text), reader.gold(answer))[reader.main_metric] == 1.0
    assert reader.scores(None, "7" if section["kind"] == "number" else "no")[reader.main_metric] == 0.0


CHAIN = {"question": "a", "answer": "no number"}


def judged(*workings, **changes):
    """Changes of a task file: verdicts on steps with these workings, and none on answers."""
    states = [{"question": "a", "steps": ["x"], "verdict": "likely", "working": list(lines)} for lines in workings]
    return {"step_verdicts": {"instruction": "a", "demonstrations": states}, **changes}


MISTAKES = [
    ("instruction: [a", r":1: not valid YAML"),
    ("- a\n", "a task file holds keys"),
    ("", "a task file holds keys"),
    ("instruction: a\nrows: {}\ninstruction: b\n", ":3: key 'instruction' appears twice"),
    ({"intro": "x"}, r":\d+: intro: is no key of a task file"),
    ({"answer": {"kind": "colour"}}, r"my_task.yaml:\d+: answer.kind: .*'colour'"),
    ({"answer": {"kind": "regex"}}, "answer: pattern: needed with kind regex"),
    ({"answer": {"kind": "regex", "pattern": "("}}, "pattern: not a regular expression"),
    ({"answer": {"kind": "choice", "choices": {"A": ["x"], "B": ["X"]}}}, "'X' is empty or means two answers"),
    ({"answer": {"kind": "number", "pattern": "x"}}, "pattern: used with kind regex alone"),
    ({"demonstrations": [CHAIN]}, "demonstrations: number 1 has no answer that is read as number"),
    (
        {"demonstrations": [{"question": "a\n\nb", "answer": "1"}]},
        r"demonstrations.1: question: empty, or a blank line",
    ),
    ({"marks": {"step": "Step:"}}, "marks: step: expected {n}"),
    ({"marks": {"answer": "Ques"}}, "a line of another kind would start with this mark"),
    ({"verdict": {"likely": "right", "impossible": "right not"}}, "neither label may begin with the other"),
    (judged(["b"]), "conclusion_verdicts.demonstrations: number 1 has no working, unlike the first of step_verdicts"),
    (judged(["b"], []), "step_verdicts.demonstrations: number 2 has no working"),
    (judged(["b", " "]), "working: a list of lines, none of them blank"),
    (judged(["b\nc"]), "working: a list of lines"),
    (
        judged(["b", "Is  it? It is so"], verdict={"cue": "Is it? It is"}),
        "number 1 has a line of working that begins with",
    ),
    (judged(["Question: c"]), "begins with verdict.cue or marks.question"),
    (judged(["b"], verdict={"cue": "Check: it is"}), "neither of cue and working may begin with the other"),
    ({"conclusion_verdicts": {"instruction": "a"}}, "conclusion_verdicts.demonstrations: is missing"),
]


@pytest.mark.parametrize(("change", "sentence"), MISTAKES)
def test_a_mistake_is_one_sentence_with_its_place(tmp_path, change, sentence):
    path = written(tmp_path, change if isinstance(change, str) else values(**change))
    with pytest.raises(ConfigError, match=sentence) as caught:
        read_task_file(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_a_missing_key_is_named_and_a_missing_file_too(tmp_path):
    content = values()
    del content["answer"]
    with pytest.raises(ConfigError, match=r"my_task.yaml:1: answer: is missing"):
        read_task_file(written(tmp_path, content))
    with pytest.raises(ConfigError, match=r"absent.yaml: cannot read the task file|task.file: cannot read"):
        load_task(configured(f"file={tmp_path}/absent.yaml"))
    with pytest.raises(ConfigError, match="name and file exclude each other"):
        configured(f"file={EXAMPLE}", "name=fever")


def test_the_section_of_a_data_set_is_hashed_as_before():
    """Else every comparison with an older evaluation would say that the task section differs."""
    assert set(load_config(None).task.model_dump()) == {
        "name", "path", "num_questions", "skip_questions", "chat", "shuffle_demonstrations"
    }  # fmt: skip


def test_trees_of_another_task_file_are_refused(tmp_path):
    config = configured(f"file={written(tmp_path, values())}")
    first = task_name(config.task)
    written(tmp_path, values(instruction="Convert."))
    second = task_name(config.task)
    assert first != second
    tree = {
        "id": "q", "task": first, "question": "a", "gold": None, "prompt_hash": "0" * 16, "num_shared_tokens": 0,
        "question_token_ids": [1], "nodes": [], "winning_nodes": [], "answer": None, "num_empty": 0,
        "status": "no_candidates", "detail": "", "model_hash": "m", "adapter_hash": "", "seed": 0, "config_hash": "c",
        "num_thought_tokens": 0, "num_verdict_tokens": 0, "question_prompt": "", "schema_version": SCHEMA_VERSION,
    }  # fmt: skip
    path = tmp_path / "trees.jsonl"
    path.write_text(json.dumps(tree) + "\n", encoding="utf-8")

    def trees_of(task):
        with open_trees(path, Provenance(task, "0" * 16, "m", "", 0, "c"), [Question("q", "a")]) as store:
            return list(store.trees)

    assert trees_of(first) == ["q"]
    with pytest.raises(DataError, match=f"searched with another task .{first}, this run has {second}"):
        trees_of(second)


CODE = """
from pathlib import Path
from cpo_fast.tasks import Task
Path({marker!r}).write_text("ran")
class MyTask(Task):
    def parse_answer(self, line):
        return "7" if self.is_answer_line(line) else None
class Other:
    pass
"""


@pytest.fixture
def module(tmp_path):
    path = tmp_path / "my_task.py"
    path.write_text(CODE.format(marker=str(tmp_path / "ran")), encoding="utf-8")
    return path


def test_code_does_not_run_unless_it_is_allowed(module, monkeypatch):
    config = configured(f"file={EXAMPLE}", f"module={module}:MyTask")
    with pytest.raises(ConfigError, match="--trust-task-code"):
        load_task(config)
    assert not (module.parent / "ran").exists()
    monkeypatch.setattr(tasks, "_code_allowed", False)
    tasks.allow_task_code()
    task = load_task(config)
    assert isinstance(task, Task)
    assert task.parse_answer("Answer: anything") == "7"
    assert task.few_shot.startswith("Convert")
    before = task.name
    module.write_text(module.read_text(encoding="utf-8") + "# changed\n", encoding="utf-8")
    assert task_name(config.task) != before
    assert load_task(configured(f"module={module}:MyTask")).few_shot == get_task("svamp").few_shot


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ("{}:Other", "has no class Other that derives from"),
        ("{}:Absent", "has no class Absent"),
        ("{}", "expected a file and a class"),
        ("absent.py:MyTask", "there is no file absent.py"),
    ],
)
def test_a_module_that_cannot_be_used_is_one_sentence(module, monkeypatch, setting, sentence):
    monkeypatch.setattr(tasks, "_code_allowed", True)
    with pytest.raises(ConfigError, match=f"task.module: .*{re.escape(sentence)}"):
        load_task(configured(f"module={setting.format(module)}"))


def test_an_error_in_the_code_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(tasks, "_code_allowed", True)
    path = written(tmp_path, "import no_such_library\n", "my_task.py")
    with pytest.raises(ConfigError, match=r"my_task.py cannot be loaded \(ModuleNotFoundError: .*no_such_library"):
        load_task(configured(f"module={path}:MyTask"))


def rows(part=TaskFile, prefix=""):
    """One row of the table for every key of a task file."""
    for name, field in part.model_fields.items():
        inner = next(
            (kind for kind in (field.annotation, *getattr(field.annotation, "__args__", ())) if is_part(kind)), None
        )
        default = (
            "needed" if field.is_required() else "" if inner or field.default in ("", (), {}, None) else shown(field)
        )
        yield f"| `{prefix}{name}` | {field.description} | {default} |"
        if inner is not None:
            yield from rows(inner, f"{prefix}{name}.")


def is_part(kind):
    return isinstance(kind, type) and issubclass(kind, Part)


def shown(field):
    default = field.default
    return f"`{', '.join(default) if isinstance(default, tuple) else default}`"


def test_the_documentation_has_every_key_with_its_meaning():
    table = re.search(
        r"\| key \| meaning \| default \|\n\|---\|---\|---\|\n((?:\|.*\n)*)", DOCS.read_text(encoding="utf-8")
    )
    assert table[1].splitlines() == list(rows())


@pytest.mark.parametrize(
    ("answer", "golds", "said"),
    [
        ({"kind": "regex", "pattern": r"^\d\d$"}, ["57", "7", None, "forty-two"], "2 of 3 .*kind=regex.*:2, '7'; mend"),
        (
            {"kind": "regex", "pattern": r"^\d\d$"},
            ["forty-two"],
            "1 of 1 .*:1, 'forty-two'; mend them, or answer.pattern",
        ),
        ({"kind": "regex", "pattern": r"\((\w)\)"}, ["B", "C"], None),  # answers are written (B)
        ({"kind": "regex", "pattern": r"(\d\d)"}, ["57", "7"], "1 of 2 .*:2, '7'"),
        ({"kind": "number"}, ["7", "1,200"], None),
        ({"kind": "choice", "choices": {"yes": [], "no": []}}, ["yes", "NO"], None),
        ({"kind": "text"}, ["Mount Everest", "!!!"], None),
        ({"kind": "exact"}, ["f(x)"], None),
    ],
)
def test_reference_answers_that_no_chain_can_give_are_named(tmp_path, answer, golds, said):
    demonstrations = {"demonstrations": [], "step_verdicts": {"instruction": "Judge.", "demonstrations": []}}
    content = values(answer=answer, conclusion_verdicts=demonstrations["step_verdicts"], **demonstrations)
    task = load_task(load_config(None, [f"task.file={written(tmp_path, content)}"]))
    rows = [{"question": f"{n}?"} | ({} if gold is None else {"answer": gold}) for n, gold in enumerate(golds)]
    path = written(tmp_path, "".join(json.dumps(row) + "\n" for row in rows), "q.jsonl")
    found = task.unreadable_gold(task.load(path))
    assert found == "" if said is None else re.match(said.replace(":", rf".*{re.escape(path.name)}:", 1), found), found
