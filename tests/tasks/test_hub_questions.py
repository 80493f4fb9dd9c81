"""Hub ids: how they are written, which rows come out, and what is said when the hub or the library is not there."""

import builtins

import pytest

from cpo_fast.errors import DataError, EnvironmentProblem
from cpo_fast.rows import parse_hub_path
from cpo_fast.tasks import get_task

datasets = pytest.importorskip("datasets")


@pytest.fixture
def hub(monkeypatch):
    """Replace the download by tables in memory; returns the calls that were made."""
    calls, tables = [], {}

    def load_dataset(name, config=None, *, split=None):
        calls.append((name, config, split))
        table = tables[name]
        return table if split is None else table[split]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return calls, tables


@pytest.mark.parametrize(
    ("path", "parts"),
    [
        ("hub:openai/gsm8k", ("openai/gsm8k", None, None)),
        ("hub:openai/gsm8k:main", ("openai/gsm8k", "main", None)),
        ("hub:openai/gsm8k:main:train", ("openai/gsm8k", "main", "train")),
        ("hub:tals/vitaminc:validation", ("tals/vitaminc", None, "validation")),
        ("hub:a/b:test[10:20]", ("a/b", None, "test[10:20]")),
        ("hub:a/b:fullwiki:train[:5%]", ("a/b", "fullwiki", "train[:5%]")),
    ],
)
def test_a_hub_id_has_a_configuration_and_a_split(path, parts):
    assert parse_hub_path(path) == parts


@pytest.mark.parametrize("path", ["hub:", "hub:a/b:", "hub:a:b:c:d", "a/b", "hub:a/b::test"])
def test_anything_else_is_refused(path):
    with pytest.raises(DataError, match="not a hub id"):
        parse_hub_path(path)


def test_the_usual_columns_are_found(hub):
    calls, tables = hub
    tables["openai/gsm8k"] = {"test": datasets.Dataset.from_list([{"question": "How?", "answer": "a\n#### 5"}])}
    question = get_task("gsm8k").load("hub:openai/gsm8k:main:test")[0]
    assert (question.text, question.gold) == ("How?", "5")
    assert calls == [("openai/gsm8k", "main", "test")]
    rows = [{"ID": "chal-1", "Body": "A box.", "Question": "How many?", "Answer": "145.0"}]
    tables["x/svamp"] = {"train": datasets.Dataset.from_list(rows)}
    assert get_task("svamp").load("hub:x/svamp")[0].gold == "145"
    tables["x/bamboogle"] = {"test": datasets.Dataset.from_list([{"Question": "Who?", "Answer": "J. R. R. Tolkien"}])}
    assert get_task("bamboogle").load("hub:x/bamboogle")[0].gold == "J. R. R. Tolkien"


def test_class_labels_become_names_and_repeated_claims_one_question(hub):
    features = datasets.Features(
        {
            "id": datasets.Value("int32"),
            "claim": datasets.Value("string"),
            "label": datasets.ClassLabel(names=["REFUTES", "SUPPORTS"]),
        }
    )
    rows = [
        {"id": 1, "claim": "Iron is a metal.", "label": 1},
        {"id": 1, "claim": "Iron is a metal.", "label": 1},
        {"id": 2, "claim": "Iron is a gas.", "label": 0},
        {"id": 3, "claim": "Iron is hidden.", "label": -1},
    ]
    hub[1]["fever/fever"] = {"train": datasets.Dataset.from_list(rows, features=features)}
    questions = get_task("fever").load("hub:fever/fever:v1.0:train")
    assert [question.gold for question in questions] == ["SUPPORTS", "REFUTES", None]


def test_a_bad_row_of_a_hub_set_is_named(hub):
    hub[1]["a/b"] = {
        "test": datasets.Dataset.from_list([{"question": "x", "answer": "1"}, {"question": "", "answer": "1"}])
    }
    with pytest.raises(DataError, match="hub:a/b: row 2: the question is empty"):
        get_task("svamp").load("hub:a/b")


def test_a_split_is_never_guessed(hub):
    table = datasets.Dataset.from_list([{"question": "x", "answer": "1"}])
    hub[1]["a/b"] = {"train": table, "test": table}
    with pytest.raises(DataError, match="choose a split, hub:a/b:main:train or hub:a/b:main:test"):
        get_task("svamp").load("hub:a/b:main")


def test_without_network_the_remedy_is_said():
    with pytest.raises(DataError, match="hub:no-such-org/no-such-set:test: cannot be read from the Hugging Face hub"):
        get_task("svamp").load("hub:no-such-org/no-such-set:test")


def test_without_the_library_the_pip_line_is_said(monkeypatch):
    real = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name.split(".")[0] == "datasets":
            raise ImportError("No module named 'datasets'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(EnvironmentProblem, match=r"pip install 'cpo-fast\[data\]'"):
        get_task("svamp").load("hub:a/b:test")
