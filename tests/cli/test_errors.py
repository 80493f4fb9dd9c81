"""What a user sees after a mistake: one sentence on standard error, the right exit code, no traceback."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from cpo_fast.config import Config, dump_config, load_config
from cpo_fast.errors import ConfigError
from tests.cli.commands import run


@pytest.fixture
def config_path(tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text("run: runs/x\ntrain:\n  lr: 5e-6\n")
    return path


def test_unknown_key_exits_2_and_suggests_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("train:\n  learning_rte: 1.0\n  beta: 0.1\n  max_token: 5\n")
    result = run("train", str(tmp_path / "c.yaml"))
    assert result.returncode == 2
    assert "unknown key 'train.max_token'; did you mean 'train.max_tokens'?" in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: [1\n", r"c\.yaml:\d+: not valid YAML"),
        ("seed: 1\nseed: 2\n", r"c\.yaml:2: key 'seed' appears twice"),
        ("- a\n", r"expected sections such as 'train:', got list"),
        ("train:\n  lr: fast\n", r"train\.lr: Input should be a valid number.*got 'fast'"),
        ("train:\n  beta: -1\n", r"train\.beta: Input should be greater than 0, got -1"),
        ("search:\n  value_likely: 0\n", r"value_impossible must be smaller than search\.value_likely"),
        ("model:\n  dtype: float16\n", r"model\.dtype: Input should be 'auto', 'float32' or 'bfloat16', got 'float16'"),
    ],
)
def test_bad_configuration_is_one_sentence(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_config(tmp_path / "c.yaml")


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("--train.beta=0.2", "no dashes and come after the file: CONFIG.yaml train.beta=VALUE\n"),
        ("--learning_rate", "CONFIG.yaml learning_rate=VALUE; it is 'train.lr' here"),
        ("--jsn", "No such option '--jsn'"),
    ],
)
def test_a_setting_with_dashes_is_told_how_it_is_written(config_path: Path, option: str, said: str) -> None:
    result = run("train", str(config_path), option)
    assert (result.returncode, said in result.stderr) == (2, True), result.stderr
    assert ("CONFIG.yaml" in result.stderr.splitlines()[-1]) == (option != "--jsn")


def test_missing_configuration_names_the_path(tmp_path: Path) -> None:
    result = run("train", str(tmp_path / "none.yaml"))
    assert result.returncode == 2
    assert "none.yaml: cannot read the configuration (No such file or directory)" in result.stderr


def test_overrides_win_in_order_and_scientific_numbers_are_numbers(config_path: Path) -> None:
    config = load_config(config_path, ["train.lr=1e-4", "train.lr=2e-4", "lora.target_modules=[q_proj]", "seed=3"])
    assert config.train.lr == 2e-4
    assert load_config(config_path).train.lr == 5e-6
    assert config.lora.target_modules == ("q_proj",)
    assert config.seed == 3


@pytest.mark.parametrize("override", ["train.lr", "=1", "seed.x=1", "train.lr=[1"])
def test_malformed_override_is_named(config_path: Path, override: str) -> None:
    with pytest.raises(ConfigError, match="override"):
        load_config(config_path, ["seed=1", override])


def test_written_configuration_reads_back_equal(tmp_path: Path) -> None:
    config = Config.model_validate({"train": {"lr": 3e-7, "zero_stage": 2}, "task": {"path": "é.json"}})
    (tmp_path / "c.yaml").write_text(dump_config(config), encoding="utf-8")
    assert load_config(tmp_path / "c.yaml") == config


def test_broken_line_exits_3_with_file_and_line(tmp_path: Path, tiny_model_folder: Path) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text(json.dumps({"prompt": "p", "chosen": "a", "rejected": "b"}) + '\n{"prompt": \n')
    (tmp_path / "c.yaml").write_text(f"run: {tmp_path}/run\n")
    result = run("train", str(tmp_path / "c.yaml"), f"data.path={data}", f"model.path={tiny_model_folder}")
    assert result.returncode == 3
    assert "rows.jsonl:2: the line is not valid JSON" in result.stderr
    assert "Traceback" not in result.stderr


def test_unknown_command_is_refused_and_pairs_name_a_missing_file(tmp_path: Path) -> None:
    mistyped = run("trian")
    assert mistyped.returncode == 2
    assert "there is no command 'trian'; did you mean 'train'?" in mistyped.stderr
    result = run("pairs", str(tmp_path / "trees.jsonl"))
    assert result.returncode == 3
    assert "trees.jsonl: cannot read" in result.stderr


def test_train_prints_json_alone_and_writes_the_adapter(
    tmp_path: Path, tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"Q{i}\n", "chosen": "yes\n", "rejected": "no\n"} for i in range(4)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "c.yaml").write_text(f"run: {tmp_path}/run\ntrain: {{num_epochs: 1, batch_pairs: 2}}\n")
    arguments = [
        str(tmp_path / "c.yaml"),
        f"data.path={data}",
        f"model.path={tiny_model_folder}",
        "model.dtype=float32",
    ]
    lock = tmp_path / "extensions" / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()  # as a run leaves it that was killed while compiling: it must not make the next one wait
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    result = run("train", *arguments, "--json")
    assert result.returncode == 0, result.stderr
    values = json.loads(result.stdout)
    assert values["num_steps"] == 2
    assert (Path(values["adapter"]) / "adapter_model.safetensors").is_file()
    assert load_config(tmp_path / "run" / "config.yaml").train.batch_pairs == 2


@pytest.mark.parametrize("library", ["torch", "peft", "deepspeed"])
def test_missing_library_exits_5_with_the_line_that_installs_it(
    config_path: Path, tiny_model_folder: Path, library: str
) -> None:
    rows = config_path.with_name("rows.jsonl")
    rows.write_text(json.dumps({"prompt": "p", "chosen": "a", "rejected": "b"}) + "\n")
    code = f"import sys; sys.modules['{library}'] = None; from cpo_fast.cli import main; main()"
    arguments = [f"model.path={tiny_model_folder}", f"data.path={rows}", f"run={config_path.parent}/run"]
    result = subprocess.run(
        [sys.executable, "-c", code, "train", str(config_path), *arguments],
        capture_output=True,
        text=True,
        timeout=3000,
    )
    assert result.returncode == 5, result.stderr
    assert f"pip install {library}" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_model_folder_that_is_not_there_is_named_before_libraries_load(config_path: Path) -> None:
    """By every command that loads one: here importing torch fails, which would be said first otherwise."""
    rows, questions = config_path.with_name("rows.jsonl"), config_path.with_name("questions.jsonl")
    rows.write_text(json.dumps({"prompt": "p", "chosen": "a", "rejected": "b"}) + "\n")
    questions.write_text(json.dumps({"id": "a", "question": "1+1?", "answer": "2"}) + "\n")
    arguments = ["model.path=./no/such/model", f"data.path={rows}", f"run={config_path.parent}/run"]
    arguments += [f"task.path={questions}", f"train.dev_path={questions}"]
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from click.testing import CliRunner\nfrom cpo_fast.cli import cli\nfrom cpo_fast.errors import ConfigError\n"
        "for name in ('collect', 'train', 'plan', 'eval', 'iterate'):\n"
        "    found = CliRunner().invoke(cli, [name, *sys.argv[1:]]).exception\n"
        "    print(name, isinstance(found, ConfigError), found)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, str(config_path), *arguments], capture_output=True, text=True, timeout=3000
    )
    said = "True model.path: there is no folder ./no/such/model; check the path"
    names = ("collect", "train", "plan", "eval", "iterate")
    assert result.stdout.splitlines() == [f"{name} {said}" for name in names], result.stderr
