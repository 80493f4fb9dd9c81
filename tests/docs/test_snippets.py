"""What README, documents and help texts show works: every command, setting, YAML and Python block.

A command in a block is run, in its page's order, or is excused in NOT_RUN with the reason. Then it is parsed all the same.
A Python block is run by what RUN_BY names. What is new and has neither fails here.
"""

import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface

from cpo_fast.cli import COMMANDS, cli
from cpo_fast.errors import CpoFastError
from cpo_kernels import build_forest
from tests.cpo_kernels.padded_oracle import padded_step, worst_gradient_error
from tests.docs.snippets import (
    PAGES,
    ROOT,
    Snippet,
    blocks,
    check_command,
    check_mention,
    check_yaml,
    command_lines,
    mentions,
    name_of,
    typed_commands,
)
from tests.docs.walk import prepare, run
from tests.tiny import random_pairs, tiny_llama, tiny_tokenizer, with_exact_norms, with_lora

# (page, line) as regular expressions -> why the line is not run here
NOT_RUN = {
    (".*", r"cpo-fast demo"): "tests/test_demo_command.py runs it",
    (".*", r"cpo-fast train .*--(gpus|hosts|launch|sbatch|nodes)"): "several ranks: tests/train/test_launch.py",
    (".*", r"(torchrun|srun|deepspeed) "): "a launcher: tests/train/test_launch.py, tests/search/test_worker.py",
    (r"docs/scale\.md", ".*"): "one line a launcher; that of one GPU is run on other pages",
    (r"docs/tasks\.md", ".*--trust-task-code"): "tests/tasks/test_task_file.py runs code of a task",
}
READMES_OWN = "tests/integrations/test_readme.py"
BLOCKS = [block for page in PAGES for block in blocks(page, "python")]
TYPED = {name_of(page): lines for page in PAGES if (lines := typed_commands(page))}


def excuse(line: Snippet) -> str | None:
    """Why a line is not run, None if it is."""
    command = re.match(r"cpo-fast (\w+)", line.text)
    if command and command[1] not in COMMANDS:
        return f"there is no command {command[1]}"
    reasons = (
        why
        for (page, pattern), why in NOT_RUN.items()
        if re.fullmatch(page, line.page) and re.match(pattern, line.text)
    )
    return next(reasons, None)


# commands and settings


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_and_settings_are_known(page: Path) -> None:
    wrong = []
    for line in typed_commands(page):
        try:
            check_command(line.text)
        except (click.ClickException, CpoFastError, KeyError) as error:
            wrong.append(f"{line}: {error!r}")
    for mention in mentions(page):
        try:
            check_mention(mention.text)
        except (click.ClickException, CpoFastError, KeyError) as error:
            wrong.append(f"{mention}: {error!r}")
    assert wrong == []


@pytest.mark.parametrize("name", ["", *COMMANDS])
def test_commands_in_help_texts_are_known(name: str) -> None:
    command = cli.get_command(click.Context(cli), name) if name else cli
    assert command is not None
    for line in command_lines(command.help or ""):
        check_command(line)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_yaml_is_a_configuration_or_a_task_file(page: Path, tmp_path: Path) -> None:
    for block in blocks(page, "yaml"):
        check_yaml(block.text, tmp_path)


def test_pages_have_what_is_checked_here() -> None:
    """Without any found, every test above would hold."""
    assert len(TYPED["docs/index.md"]) >= 6
    assert len(TYPED["README.md"]) >= 4
    assert len([block for page in PAGES for block in blocks(page, "yaml")]) >= 5
    found = [each for name in ("index", "how-to/iterate") for each in mentions(ROOT / "docs" / f"{name}.md")]
    assert sum(check_mention(each.text) for each in found) > 5


@pytest.mark.parametrize(
    "line",
    [
        "cpo-fast trian config.yaml",
        "cpo-fast train config.yaml --gpu 8",
        "cpo-fast train config.yaml --gpus none",
        "cpo-fast train config.yaml train.betas=0.2",
        "cpo-fast train config.yaml train.method=dpo",
        "torchrun --nproc-per-node 8 -m cpo_fast collect config.yaml serach.num_kept=1",
        "cpo-fast fly",
        "cpo-fast --verbose",
        "cpo-fast merge config.yaml",
        "cpo-fast train --gpus 8",
    ],
)
def test_a_command_that_the_program_does_not_know_is_caught(line: str) -> None:
    with pytest.raises((click.ClickException, CpoFastError)):
        check_command(line)


@pytest.mark.parametrize(
    "text", ["train.betas=1", "train.beta: high", "search.kept", "train.lr=1 train.rl=2", "cpo-fast train --gpu 8"]
)
def test_a_setting_that_the_program_does_not_know_is_caught(text: str) -> None:
    with pytest.raises((KeyError, CpoFastError, click.ClickException)):
        check_mention(text)


def test_remarks_and_continued_lines_are_read_as_a_shell_reads_them(tmp_path: Path) -> None:
    block = (
        "$ cpo-fast train a.yaml \\\n      --gpus 2   # a remark\none   cpo-fast plan b.yaml        b.yaml: a file\n"
    )
    assert list(command_lines(block)) == ["cpo-fast train a.yaml --gpus 2", "cpo-fast plan b.yaml"]
    page = ROOT / "docs" / "index.md"
    assert all(isinstance(line, Snippet) for line in typed_commands(page))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the commands of the first page have run."""
    folder = tmp_path_factory.mktemp("finished")
    walk(ROOT / "docs" / "index.md", folder)
    return folder


def walk(page: Path, folder: Path) -> None:
    """Run a page's commands in `folder`, one after the other, those that are not excused."""
    prepare(folder, page)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for line in TYPED[name_of(page)]:
            if excuse(line) is None:
                assert run(line) == 0, line


@pytest.mark.usefixtures("no_launcher")
@pytest.mark.parametrize("page", [page for page in TYPED if page != "docs/index.md"])
def test_commands_run(page: str, finished: Path, tmp_path: Path) -> None:
    if all(excuse(line) for line in TYPED[page]):
        pytest.skip("; ".join(f"{line.text}: {excuse(line)}" for line in TYPED[page]))
    folder = tmp_path / "copy"
    shutil.copytree(finished, folder, symlinks=True)
    shutil.copytree(folder / "runs" / "sums", folder / "runs" / "other")  # a second run, for a comparison
    walk(ROOT / page, folder)


def test_the_first_page_leaves_the_files_that_it_names(finished: Path) -> None:
    text = (ROOT / "docs" / "index.md").read_text("utf-8")
    names = re.findall(r"^\| (`.*?) \|", text.partition("file in `runs/sums`")[2], re.MULTILINE)
    found = [name for cell in names for name in re.findall(r"`([^`]+)`", cell)]
    assert len(found) >= 6
    assert [name for name in found if not (finished / "runs" / "sums" / name).exists()] == []


# Python


def names_of_a_trainer() -> dict[str, Any]:
    datasets, peft = pytest.importorskip("datasets"), pytest.importorskip("peft")
    rows = [{"prompt": f"{number} + 1?\n", "chosen": f"{number + 1}\n", "rejected": "no\n"} for number in range(32)]
    tokenizer = tiny_tokenizer()
    return {
        "model": tiny_llama(vocab_size=len(tokenizer)),
        "tokenizer": tokenizer,
        "dataset": datasets.Dataset.from_list(rows),
        "lora": peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"),
    }


def executed(block: Snippet, **names: Any) -> dict[str, Any]:
    """The names that a block leaves."""
    exec(compile(block.text, block.page, "exec"), names)
    return names


def the_forest_is_that_of_the_pictures(block: Snippet, capsys: pytest.CaptureFixture[str]) -> None:
    names = executed(block)
    picture = (ROOT / "docs" / "pictures" / "forest.svg").read_text("utf-8")
    shown = [int(number) for number in re.findall(r'class="number">(-?\d+)<', picture)]
    forest = names["forest"]
    rows = (range(11), *(getattr(forest, name).tolist() for name in ("position_ids", "subtree_end", "parent_row")))
    assert [value for row in rows for value in row] == shown
    assert str(forest.subtree_end.tolist()) in capsys.readouterr().out


def a_step_is_that_of_padded_rows(block: Snippet, capsys: pytest.CaptureFixture[str]) -> None:
    pairs = random_pairs()
    model = with_lora(with_exact_norms(tiny_llama(dtype=torch.float64)))
    expected = padded_step(model, pairs, beta=0.1).gradients
    small = replace(block, text=block.text.replace("max_tokens=8192", "max_tokens=40"))  # several forests a step
    assert small != block
    moments = executed(small, model=model, steps=[pairs])["optimizer"].state
    parameters = dict(model.named_parameters())
    found = {name: moments[parameters[name]]["exp_avg"] / 0.1 for name in expected}  # 1 - beta1 of the gradient
    assert worst_gradient_error(found, expected) < 1e-10


def trl_trains(block: Snippet, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("trl")
    trained = executed(block, **names_of_a_trainer())["trainer"]
    assert trained.state.global_step == 2
    assert any("packing/tokens_saved" in entry for entry in trained.state.log_history)


def trl_has_our_attention(block: Snippet, capsys: pytest.CaptureFixture[str]) -> None:
    packing = pytest.importorskip("trl.experimental.async_grpo.packing")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "tree_attention", packing.tree_attention)  # put back afterwards
        for interface in (AttentionInterface, AttentionMaskInterface):
            patch.setattr(interface, "_global_mapping", dict(interface._global_mapping))
        executed(block)
        assert packing.TREE_ATTENTION in AttentionInterface()


def a_padded_batch_has_its_log_probs(block: Snippet, capsys: pytest.CaptureFixture[str]) -> None:
    from cpo_kernels.integrations.transformers import prepare

    stock, model = tiny_llama(), prepare(tiny_llama())
    input_ids = torch.tensor([[5, 6, 7, 8, 9], [5, 6, 7, 10, 0]])
    attention_mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 1, 0]])
    action_mask = torch.tensor([[0, 0, 0, 1, 1], [0, 0, 0, 1, 0]], dtype=torch.bool)
    found = executed(block, model=model, input_ids=input_ids, attention_mask=attention_mask, action_mask=action_mask)[
        "log_probs"
    ]
    logps = stock(input_ids, attention_mask=attention_mask).logits[:, :-1].log_softmax(-1)
    expected = logps.gather(2, input_ids[:, 1:, None])[..., 0] * action_mask[:, 1:]
    assert torch.allclose(found, expected, atol=1e-5)


def its_own_comparison_holds(block: Snippet, capsys: pytest.CaptureFixture[str]) -> None:
    names = executed(block, model=tiny_llama())
    assert abs(names["found"] - names["expected"]) < 1e-4 < abs(names["expected"])


def a_task_reads_answers_its_own_way(block: Snippet, capsys: pytest.CaptureFixture[str]) -> None:
    from cpo_fast.demo import REASONER
    from cpo_fast.tasks.task_file import read_task_file

    task = executed(block)["MyTask"]("mine", read_task_file(REASONER / "plain.yaml")[0])
    assert task.parse_answer("Answer: 42\n") == "42"


# (page, text of the block) as regular expressions -> what runs it
RUN_BY: dict[tuple[str, str], Callable[..., None] | str] = {
    ("README.md", r"packed_logps\(|PackedDPOTrainer\(|register_tree_attention\(\)"): READMES_OWN,
    (r"docs/concepts\.md", r"forest = build_forest"): the_forest_is_that_of_the_pictures,
    (r"docs/how-to/other-trainers\.md", r"for pairs in steps:"): a_step_is_that_of_padded_rows,
    (r"docs/how-to/other-trainers\.md", r"PackedDPOTrainer\("): trl_trains,
    (r"docs/how-to/other-trainers\.md", r"register_tree_attention\(\)"): trl_has_our_attention,
    (r"docs/how-to/other-trainers\.md", r"packed_token_logps\("): a_padded_batch_has_its_log_probs,
    (r"docs/exactness\.md", r"assert torch\.allclose"): its_own_comparison_holds,
    (r"docs/tasks\.md", r"class MyTask"): a_task_reads_answers_its_own_way,
}


def runner(block: Snippet) -> Callable[..., None] | str | None:
    """What runs a block, None if nothing does."""
    found = (
        run for (page, text), run in RUN_BY.items() if re.fullmatch(page, block.page) and re.search(text, block.text)
    )
    return next(found, None)


def test_every_python_block_has_something_that_runs_it() -> None:
    assert [str(block) for block in BLOCKS if runner(block) is None] == []
    assert runner(Snippet("docs/index.md", "import new")) is None
    assert {runner(block) for block in BLOCKS} == set(RUN_BY.values())


@pytest.mark.parametrize(
    "block", [block for block in BLOCKS if callable(runner(block))], ids=lambda block: runner(block).__name__
)
def test_python_runs(block: Snippet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    run_block = runner(block)
    assert callable(run_block)
    run_block(block, capsys)


def test_readmes_own_test_finds_its_blocks() -> None:
    """The blocks that are left to that test are among those that it runs."""
    asked = re.findall(r'block_with\("(\w+)"\)', (ROOT / READMES_OWN).read_text("utf-8"))
    left = [block.text for block in BLOCKS if runner(block) == READMES_OWN]
    assert left != []
    assert [text for text in left if not any(name in text for name in asked)] == []


def test_the_forest_of_the_readme_is_the_real_one() -> None:
    """The four lines of numbers under a small tree are what `build_forest` makes of it."""
    for page in (ROOT / "README.md", ROOT / "docs" / "design.md"):
        rows = dict(
            re.findall(r"^ *(subtree_end|position_ids|parent row) +((?:-?\d+ +){8}-?\d+)", page.read_text(), re.M)
        )
        if not rows:  # the README may have another picture
            continue
        forest = build_forest([[1, 1, 1, 2, 2, 3, 3], [1, 1, 1, 4, 4]])
        shown = {name.replace(" ", "_"): [int(number) for number in text.split()] for name, text in rows.items()}
        assert {name: getattr(forest, name).tolist() for name in shown} == shown
