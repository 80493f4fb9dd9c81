"""Presets and what wins over them, and that a value is what the file or the shell says, typed by its field."""

import re
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cpo_fast.config import Config, dump_config, load_config, validate_config
from cpo_fast.config.load import _known_keys
from cpo_fast.config.other_names import NAMES, NOTES
from cpo_fast.config.presets import PRESETS
from cpo_fast.errors import ConfigError
from tests.config_fields import fields, is_what_was_passed, value_of


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_every_preset_is_a_valid_configuration(name: str) -> None:
    config = load_config(None, [f"preset={name}"])
    assert config.lora.r == 8
    assert config.train.patience is None or config.data.held_out > 0


def test_paper_and_official_differ_where_the_code_leaves_the_paper() -> None:
    paper, official = (load_config(None, [f"preset={name}"]) for name in ("paper", "official"))
    assert (paper.train.beta, official.train.beta) == (0.1, 0.2)
    assert (paper.data.eos, official.data.eos) == ("final", "every")
    assert (paper.search.value_impossible, official.search.value_impossible) == (1.0, 0.001)
    assert (paper.train.batch_pairs, official.train.batch_pairs) == (32, 16)


def test_file_wins_over_the_preset_and_override_over_both(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("preset: paper\ntrain:\n  lr: 1.0e-5\nseed: 4\n")
    config = load_config(path, ["search.num_kept=3"])
    assert config.train.lr == 1e-5
    assert config.train.num_epochs == 4
    # steps decide alone where they alone are given, with a preset too, and a resolved file says the same again
    for overrides, epochs in (([], None), (["train.num_epochs=7"], 7), (["train.max_steps=", "train.num_epochs=7"], 7)):
        longer = load_config(path, ["train.max_steps=9", *overrides])
        assert longer.train.num_epochs == epochs
        (tmp_path / "again.yaml").write_text(dump_config(longer))
        assert load_config(tmp_path / "again.yaml") == longer
    with pytest.raises(ConfigError, match=r"train: num_epochs: null never ends; set max_steps, or num_epochs"):
        load_config(path, ["train.num_epochs=null"])
    assert config.search.num_kept == 3
    assert config.search.num_candidates == 10
    assert config.seed == 4
    assert load_config(path, ["train.lr=2e-5"]).train.lr == 2e-5


def test_unknown_preset_names_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="preset: expected one of paper, official, got 'papers'"):
        load_config(None, ["preset=papers"])


def test_misspelt_preset_key_is_suggested(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("presets: paper\n")
    with pytest.raises(ConfigError, match="unknown key 'presets'; did you mean 'preset'"):
        load_config(tmp_path / "c.yaml")


@pytest.mark.parametrize("least", ["0.9", "10.1"])
def test_a_smallest_value_that_no_verdict_can_miss_or_reach_is_refused(least: str) -> None:
    assert load_config(None, ["search.min_value=1"]).search.min_value == 1.0
    with pytest.raises(ConfigError, match=r"search\.min_value must be from .*value_impossible.*, 1 to 10"):
        load_config(None, [f"search.min_value={least}"])


def test_patience_without_held_out_questions_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"set data\.held_out=0\.1, say, or train\.patience=null"):
        load_config(None, ["train.patience=2"])
    load_config(None, ["train.patience=2", "train.patience=null"])


def test_the_names_of_other_trainers_are_answered_with_ours(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("train: {learning_rate: 1.0e-5, per_device_train_batch_size: 4}\n")
    with pytest.raises(ConfigError) as caught:
        load_config(tmp_path / "c.yaml", ["output_dir=runs/x", "lora.lora_alpha=3", "search.batch=3"])
    said = str(caught.value)
    for name, ours in (("train.learning_rate", "train.lr"), ("output_dir", "run"), ("lora.lora_alpha", "lora.alpha")):
        assert f"unknown key '{name}'; it is '{ours}' here" in said
    assert "unknown key 'train.per_device_train_batch_size'; train.batch_pairs says how many pairs" in said
    assert "unknown key 'search.batch'; did you mean 'search.batch_size'?" in said


def test_every_key_that_stands_for_another_trainers_name_exists() -> None:
    known = set(_known_keys(Config))
    assert {ours.format(name) for name, ours in NAMES.items()} <= known
    for note in NOTES.values():
        assert set(re.findall(r"(?:train|data|model|lora)\.[a-z_]+", note)) <= known
    assert NAMES.keys().isdisjoint(NOTES)


def test_an_override_in_the_place_of_the_file_is_told_where_it_belongs(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"the file comes first: CONFIG\.yaml train\.beta=0\.2$"):
        load_config("train.beta=0.2")
    with pytest.raises(ConfigError, match=r"; check the path$"):
        load_config(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    "text",
    [
        "my pairs #3.jsonl",
        "#3",
        "off",
        "no",
        "1e-5",
        " two  spaces ",
        "a=b=c",
        "'quoted'",
        '"quoted"',
        "~",
        "null",
        "a: b",
        "[a].jsonl",
        "{a}",
        "0123",
        "1:30",
        "2026-01-01",
        "@x",
        "%x",
        "*x",
        "&x",
        "!x",
        "- x",
        "? x",
        "<<",
        "é",
        "|",
        "",
    ],
)
def test_a_text_on_the_command_line_is_what_the_shell_passed(text: str) -> None:
    assert load_config(None, [f"data.path={text}"]).data.path == text
    if text and text != "null":
        assert load_config(None, [f"model.adapter={text}"]).model.adapter == text


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("train.gradient_checkpointing=off", "off"),
        ("train.zero_stage=0", 0),
        ("train.zero_stage=auto", "auto"),
        ("train.lr=1e-5", 1e-5),
        ("train.lr= 1E-5 ", 1e-5),
        ("train.lr=1", 1.0),
        ("train.deepspeed=off", "off"),
        ("train.patience=null", None),
        ("train.patience=~", None),
        ("train.max_steps=", None),
        ("train.impl=null", None),
        ("model.adapter=null", None),
        ("model.adapter=", None),
        ("search.batch_size=010", 10),
        ("task.chat=on", True),
        ("task.chat=no", False),
        ("lora.target_modules=[off, 'no', 1e-5, \"a #b\", c: d]", None),
        ("lora.target_modules=[q_proj,k_proj]", ("q_proj", "k_proj")),
        ("lora.target_modules=[]", ()),
        ("search.dfs_threshold=-1.5", -1.5),
        (f"seed={2**63 - 1}", 2**63 - 1),
    ],
)
def test_a_value_has_the_type_of_its_field(override: str, value: object) -> None:
    key = override.partition("=")[0]
    if "c: d" in override:  # a mapping is no text
        with pytest.raises(ConfigError, match=r"override .*target_modules\.4: Input should be a valid string"):
            load_config(None, [override])
        return
    found = value_of(load_config(None, [override]), key)
    assert (found, type(found)) == (value, type(value))


def test_names_of_columns_are_what_the_shell_passed() -> None:
    columns = {"prompt": "my #1 column", "chosen": "off", "rejected": "a=b: c", "system": "1e-5"}
    found = load_config(None, [f"data.columns.{key}={value}" for key, value in columns.items()]).data.columns
    assert {str(key): value for key, value in found.items()} == columns


def test_a_list_of_sections_is_typed_inside_and_keeps_its_quoted_marks() -> None:
    given = 'data.mixture=[{path: "my pairs #3.jsonl", weight: 1e-1}, {path: off}, {path: 007}]'
    mixture = load_config(None, [given]).data.mixture
    assert [(item.path, item.weight) for item in mixture] == [("my pairs #3.jsonl", 0.1), ("off", 1.0), ("007", 1.0)]


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("train.lr=inf", "finite number, got 'inf'"),
        ("train.lr=nan", "finite number"),
        ("train.lr=1e999", "finite number, got inf"),
        ("train.lr=1e-5 # as in the paper", "valid number"),
        ("train.lr=", "valid number.*got ''"),
        ("train.lr=1_2", "|"),
        ("search.dfs_threshold=-inf", "finite number"),
        ("seed=" + "9" * 30, "more than 63 bits"),
        ("seed=" + "9" * 5000, "seed"),
        (f"seed={2**63}", "more than 63 bits"),
        ("seed=0x1F", "valid integer"),
        ("seed=1:30", "valid integer"),
        ("run=", "run: String should have at least 1 character"),
        ("run=runs/\udcff", "unicode string"),
        ("lora.target_modules=q_proj", r"expected a list, such as \[a, b\], got 'q_proj'"),
        ("lora.target_modules=[a, b] # c", "begins a comment"),
        ("lora.target_modules=[a,\n #b\n c]", "begins a comment"),
        ("lora.target_modules=[a, #b]", "not valid YAML"),
        ("lora.target_modules=" + "[" * 3000, "nested too deeply"),
        ("data.path=\udcff", "not UTF-8"),
        ("data.mixture=[{path: my pairs #3.jsonl}]", "not valid YAML"),
        ("data.mixture=[{[a]: 1}]", "a key is a word"),
        ("data.mixture=[{path: a, weight: .inf}]", "finite number"),
        ("train.gradient_checkpointing=false", "got 'false'"),
        ("train.lr.x=1", "'lr' is a value, not a section"),
        ("data.mixture.0.path=a", "'mixture' is a value"),
        ("train=5", "train: Input should be a valid dictionary"),
        ("task.chat=maybe", "valid boolean"),
        ("train..lr=1", "unknown key 'train.'"),
        ("data.columns.promt=a", r"data\.columns\.promt.*'prompt'.* got 'promt'"),
        ("data.columns={1: a}", r"data\.columns\.1.* got '1'"),
        ("data.columns=prompt", "valid dictionary, got 'prompt'"),
        ("data.columns={prompt: [a]}", r"data\.columns\.prompt: Input should be a valid string"),
        ("data.template_date=yesterday", "got 'yesterday'"),
        ("lora.r=1e9", "valid integer"),
        ("search.temperature=.inf", "finite number"),
        ("train.warmup_ratio=1e-400000", "|0"),
    ],
)
def test_what_a_field_cannot_hold_is_one_short_sentence_with_exit_code_2(override: str, reason: str) -> None:
    if reason.startswith("|"):  # as Python writes numbers
        train = load_config(None, [override]).train
        assert (train.lr if reason == "|" else train.warmup_ratio) == (12 if reason == "|" else 0)
        return
    with pytest.raises(ConfigError, match=reason) as caught:
        load_config(None, [override])
    assert caught.value.exit_code == 2
    assert "override" in str(caught.value) or "unknown key" in str(caught.value)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("? [a, b]\n: 1\n", r"c\.yaml:1: a key is a word, such as 'train', and this one is a sequence"),
        ("train:\n  ? {a: b}\n  : 1\n", r"c\.yaml:2: a key is a word.* a mapping"),
        ("~: 1\n", "a key is a word.* nothing"),
        ("train: &a\n  lr: *a\n", "not valid YAML"),
        ("train: {lr: .inf}\n", "finite number"),
        ("train: {lr: .nan}\n", "finite number"),
        ("seed: 99999999999999999999999999\n", "more than 63 bits"),
        ("run: null\n", "run: Input should be a valid string, got None"),
        ("run:\n", "run: Input should be a valid string, got None"),
        ('run: "a\\0b"\n', "null character"),
        ('data: {path: "\\ud800"}\n', "not UTF-8"),
        ("a: \x01\n", "not valid YAML"),
        ("seed: !!python/object:os.system x\n", "not valid YAML"),
        ("[" * 3000, "nested too deeply"),
        ("seed: 2026-99-99\n", "valid integer.*got '2026-99-99'"),
        ("--- {seed: 1}\n--- {seed: 2}\n", "not valid YAML"),
    ],
)
def test_a_file_that_says_something_else_is_one_sentence(tmp_path: Path, text: str, reason: str) -> None:
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ConfigError, match=reason) as caught:
        load_config(tmp_path / "c.yaml")
    assert len(str(caught.value)) < 400


def test_a_file_is_typed_by_its_fields_too(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(
        "run: 007\ntrain:\n  gradient_checkpointing: off\n  zero_stage: 3\n  lr: 1e-5\n  patience: ~\n  impl:\n"
        "model: {path: no, adapter: 2026-01-01}\nlora: {target_modules: [on, 12]}\ntask:\n  chat: on\nsearch:\n"
    )
    config = load_config(tmp_path / "c.yaml")
    assert (config.run, config.model.path, config.model.adapter) == ("007", "no", "2026-01-01")
    assert (config.train.gradient_checkpointing, config.train.zero_stage, config.train.lr) == ("off", 3, 1e-5)
    assert (config.train.patience, config.train.impl, config.task.chat) == (None, None, True)
    assert config.lora.target_modules == ("on", "12")


@pytest.mark.parametrize("below", ["", "/inside", "/inside/deep"])
def test_a_run_folder_that_is_a_file_is_refused(tmp_path: Path, below: str) -> None:
    (tmp_path / "taken").touch()
    with pytest.raises(ConfigError, match=r"run: .*taken is a file, where a folder is due"):
        load_config(None, [f"run={tmp_path}/taken{below}"])
    with pytest.raises(ConfigError, match="cannot be a folder"):
        load_config(None, [f"run={tmp_path}/{'x' * 300}"])


WORDS = st.sampled_from(
    [
        *"#-.=:[]{},!&*|%_01~a'\"é\\ \n\t\r\x85\u2028\u2029\ufeff",
        "off",
        "no",
        "on",
        "null",
        "1e-5",
        "inf",
        "nan",
        ": ",
        "auto",
        "<<",
        "---",
    ]
)
SHELL = st.one_of(st.lists(WORDS, max_size=6).map("".join), st.text(max_size=12), st.integers().map(str))


@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.sampled_from(sorted(fields(), key=lambda field: field[0])), SHELL)
def test_any_text_for_any_field_is_its_value_or_one_sentence(field: tuple[str, object], text: str) -> None:
    key, kind = field
    try:
        config = load_config(None, [f"{key}={text}"])
    except ConfigError:
        return
    assert is_what_was_passed(kind, text, value_of(config, key))
    assert validate_config(yaml.safe_load(dump_config(config))) == config
