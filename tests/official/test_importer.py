"""The import as a user runs it: trees with ids of the model's tokenizer, every loss counted, nothing overwritten."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from cpo_fast.cli.collect import collect_command
from cpo_fast.config import load_config, validate_config
from cpo_fast.errors import ConfigError, DataError
from cpo_fast.official.importer import import_official
from cpo_fast.search.collect import collect
from cpo_fast.tasks import get_task
from cpo_fast.tasks.task import Question
from cpo_fast.tree import read_prompt, read_trees
from tests.official.official_sample import LAST, MATH, MATH_QUESTION, QUESTION, SEARCH, written
from tests.search.tiny_llama import build_byte_tokenizer, build_model

TEMPLATE = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}\n{% endfor %}<|assistant|>\n"


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tokenizer = build_byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    build_model(len(tokenizer)).save_pretrained(folder)
    return folder


@pytest.fixture
def setup(tmp_path, model_folder):
    """setup(text of the raw file, task settings, max_drop) -> (configuration, path of the raw file)."""

    def make(text, max_drop=0.05, **task):
        raw = tmp_path / "raw.json"
        raw.write_text(text)
        values = {
            "run": str(tmp_path / "run"),
            "model": {"path": str(model_folder), "dtype": "float32", "device": "cpu"},
            "task": {"name": "bamboogle", **task},
            "data": {"max_drop": max_drop},
        }
        return validate_config(values), raw

    return make


def _dropped(result):
    return [json.loads(row) for row in Path(result.dropped_path).read_text().splitlines()]


@pytest.mark.parametrize("chat", [False, True])
def test_an_imported_tree_reads_back_as_the_prompt_and_its_lines(setup, chat):
    config, raw = setup(written({QUESTION: SEARCH}), chat=chat)
    result = import_official(config, raw)
    (tree,) = read_trees(result.trees_path)
    prompt = read_prompt(result.trees_path, tree.prompt_hash)
    tokenizer = build_byte_tokenizer()
    asked = get_task("bamboogle").prompt(Question(tree.id, QUESTION))
    for node in tree.nodes:
        text = tokenizer.decode([*tree.root_ids(prompt), *tree.path_ids(node.id)])
        lines = "".join(each.text for each in tree.path(node.id))
        assert text == prompt.text + tree.question_prompt + lines
        assert text.endswith(f"<|assistant|>{lines}" if chat else asked + lines)
    assert ("<|user|>" in prompt.text) == chat
    assert tree.num_shared_tokens > 500
    answer = get_task("bamboogle").parse_answer("Answer: J. R. R. Tolkien")
    assert (tree.status, tree.answer, len(tree.winning_nodes)) == ("ok", answer, 2)
    assert tree.gold is None
    assert tree.detail == "imported from line 1"
    assert (result.num_trees, result.num_thoughts, result.num_winning_paths, result.num_lost_winners) == (1, 9, 2, 0)


def test_the_same_import_twice_gives_the_same_bytes_and_another_file_is_refused(setup):
    config, raw = setup(written({QUESTION: SEARCH}, {"another?": SEARCH}))
    first = Path(import_official(config, raw).trees_path).read_bytes()
    assert Path(import_official(config, raw).trees_path).read_bytes() == first
    raw.write_text(written({"a third?": SEARCH}))
    with pytest.raises(DataError, match="another search configuration"):
        import_official(config, raw)
    assert (Path(config.run) / "trees.jsonl").read_bytes() == first


def test_the_settings_of_an_import_stay_with_its_trees(setup):
    config, raw = setup(written({QUESTION: SEARCH}))
    import_official(config, raw)
    assert load_config(Path(config.run) / "collect.yaml") == config
    raw.write_text(written({"another?": SEARCH}))
    with pytest.raises(DataError):
        import_official(setup(written({"another?": SEARCH}), shuffle_demonstrations=True)[0], raw)
    assert load_config(Path(config.run) / "collect.yaml") == config  # of what was refused nothing is kept


def test_a_search_does_not_continue_an_imported_file(setup, tmp_path):
    config, raw = setup(written({QUESTION: SEARCH}))
    import_official(config, raw)
    (tmp_path / "questions.jsonl").write_text(json.dumps({"question": QUESTION}) + "\n")
    config, _ = setup("", path=str(tmp_path / "questions.jsonl"))
    with pytest.raises(DataError, match="another search configuration"):
        collect(config)


def test_questions_of_the_data_set_give_ids_and_reference_answers(setup, tmp_path):
    body, asked = "Leah had 32 chocolates and ate 35 less 10. ", "How many are left?"
    questions = tmp_path / "svamp.json"
    questions.write_text(json.dumps([{"ID": "chal-1", "Body": body, "Question": asked, "Answer": 7.0}]))
    entries = written({MATH_QUESTION: MATH}, {"Who?": SEARCH}, {MATH_QUESTION: MATH})
    config, raw = setup(entries, max_drop=0.7, name="svamp", path=str(questions))
    result = import_official(config, raw)
    (tree,) = read_trees(result.trees_path)
    assert (tree.id, tree.gold, tree.answer) == ("chal-1", "7", "7")
    assert tree.question == f"{body.strip()} {asked}"  # as the data set's loader joins the fields
    assert result.dropped_entries == {"question is not in task.path": 1, "question was searched before": 1}
    second = entries.index('{\n "Who?"')
    assert _dropped(result)[0]["place"] == f"{raw}:{entries.count(chr(10), 0, second) + 1}"


def test_every_loss_is_counted_by_reason_and_written_with_its_place(setup):
    broken = {**SEARCH, "1": {"candiate": [*SEARCH["1"]["candiate"], LAST + "no mark"], "values": [1, 2, 3, 4]}}
    text = written({QUESTION: broken}, {"naive?": {}}) + '{"torn": '
    config, raw = setup(text, max_drop=0.7)
    result = import_official(config, raw)
    assert (result.num_entries, result.num_trees) == (3, 1)
    assert result.dropped_entries == {"no search under the question": 1, "not complete JSON": 1}
    assert result.dropped_candidates == {"no mark of its step": 1}
    assert result.num_candidates == 10
    rows = _dropped(result)
    assert len(rows) == 3
    assert {(row["level"], row["index"]) for row in rows if row["what"] == "candidate"} == {(1, 3)}


def test_too_many_bad_entries_end_the_import_before_a_tree_is_written(setup):
    config, raw = setup(written({QUESTION: SEARCH}, {"naive?": {}}))
    with pytest.raises(DataError, match=r"1 of 2 entries cannot be imported, more than data.max_drop = 0.05"):
        import_official(config, raw)
    assert not (Path(config.run) / "trees.jsonl").exists()
    assert (Path(config.run) / "import-dropped.jsonl").exists()
    config, raw = setup("[\n")
    with pytest.raises(DataError, match="holds no search"):
        import_official(config, raw)
    config, raw = setup(written({"naive?": {}}), max_drop=1.0)
    with pytest.raises(DataError, match="1 of 1 entries"):
        import_official(config, raw)


def test_a_folder_without_a_tokenizer_is_a_configuration_error(setup, tmp_path, model_folder):
    config, raw = setup(written({QUESTION: SEARCH}))
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_text("{}")
    (bare / "model.safetensors").write_bytes((model_folder / "model.safetensors").read_bytes())
    config = config.model_copy(update={"model": config.model.model_copy(update={"path": str(bare)})})
    with pytest.raises(ConfigError, match=r"the tokenizer in .* cannot be loaded"):
        import_official(config, raw)


def test_the_command_imports_and_says_what_was_left_out(setup, tmp_path):
    config, raw = setup(written({QUESTION: SEARCH}, {"naive?": {}}), max_drop=0.7)
    (tmp_path / "config.yaml").write_text(
        f"run: {config.run}\nmodel: {{path: {config.model.path}}}\ntask: {{name: bamboogle}}\ndata: {{max_drop: 0.7}}\n"
    )
    arguments = [str(tmp_path / "config.yaml"), "--import-official", str(raw)]
    done = CliRunner().invoke(collect_command, arguments, catch_exceptions=False)
    assert done.exit_code == 0
    for said in ("2, 1 of them trees", "no search under the question", "1 x entry", "import-dropped.jsonl"):
        assert said in done.output
    done = CliRunner().invoke(collect_command, [*arguments, "--json"], catch_exceptions=False)
    assert json.loads(done.output)["num_thoughts"] == 9
