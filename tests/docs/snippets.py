"""What README, documents and help texts show: commands, settings, Python and YAML, and whether the program knows them.

A command in a block is a line that a reader types; one in the middle of a sentence is a mention. Both are parsed by click
and by the configuration's models, as the program itself would parse them.
"""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import click
import yaml

from cpo_fast.cli import COMMANDS, cli
from cpo_fast.config import Config, load_config
from cpo_fast.tasks.task_file import TaskFile

ROOT = Path(__file__).resolve().parents[2]
# the log tells of keys and options that are gone
PAGES = [ROOT / "README.md", *sorted(path for path in (ROOT / "docs").rglob("*.md") if path.name != "log.md")]

_FENCE = re.compile(r"^( *)```(\w*)[^\n]*\n(.*?)^\1```$", re.DOTALL | re.MULTILINE)
_GENERATED = re.compile(r"<!-- generated: (\w+) -->.*?<!-- end of \1 -->", re.DOTALL)
_COMMAND = re.compile(r"(?:^|\s)((?:cpo-fast|(?:torchrun|srun|deepspeed|python3?)\b.*? cpo_fast)(?: .*|$))")
_SECTIONS = "|".join(name for name, field in Config.model_fields.items() if hasattr(field.annotation, "model_fields"))
_SETTING = re.compile(rf"(?:{_SECTIONS})\.[a-z_][\w.]*")
_FILE_KINDS = {"json", "jsonl", "md", "csv", "yaml", "yml", "safetensors"}


@dataclass(frozen=True)
class Snippet:
    """A piece of `page` that a reader may copy."""

    page: str  # relative to the repository
    text: str

    def __str__(self) -> str:
        return f"{self.page}: {self.text}"


def name_of(path: Path) -> str:
    """A page's path in the repository."""
    return path.relative_to(ROOT).as_posix()


def text_of(path: Path) -> str:
    """A page without what is generated from the program's own help."""
    return _GENERATED.sub("", path.read_text("utf-8"))


def fences(text: str) -> Iterator[tuple[str, str]]:
    """(language, content) of every fenced block, dedented."""
    for indent, language, content in _FENCE.findall(text):
        yield language, re.sub(rf"^{indent}", "", content, flags=re.MULTILINE)


def blocks(path: Path, language: str) -> list[Snippet]:
    """The fenced blocks of a language."""
    return [Snippet(name_of(path), content) for kind, content in fences(text_of(path)) if kind == language]


def typed_commands(path: Path) -> list[Snippet]:
    """The command lines in blocks, fenced and indented, without comments."""
    text = text_of(path)
    kept = [content for language, content in fences(text) if language not in ("python", "yaml", "json")]
    kept += re.findall(r"(?:^ {4}.*\n)+", _FENCE.sub("", text), re.MULTILINE)
    return [Snippet(name_of(path), line) for block in kept for line in command_lines(block)]


def command_lines(block: str) -> Iterator[str]:
    """Lines that start the program, by its name or through a launcher. What stands far to the right is a remark."""
    for line in re.sub(r" *\\\n *", " ", block).splitlines():
        if found := _COMMAND.search(line.partition(" #")[0].replace("$ ", "")):
            yield re.sub(r" +", " ", re.split(r" {6,}", found[1].strip())[0])


def mentions(path: Path) -> list[Snippet]:
    """The pieces of code inside sentences."""
    prose = re.sub(r"^ {4}.*$", "", _FENCE.sub("", text_of(path)), flags=re.MULTILINE)
    return [Snippet(name_of(path), text) for text in re.findall(r"(?<!`)`([^`\n]+)`(?!`)", prose)]


def parsed(line: str) -> tuple[str, click.Context]:
    """The command's name and its arguments, parsed as the program parses them, or what click raises."""
    words = shlex.split(line)
    arguments = [word for word in words[words.index(_program(words)) + 1 :] if word != "..."]
    arguments = ["1" if word == "N" else word for word in arguments]  # as sentences write a number
    group = cli.make_context("cpo-fast", list(arguments))
    name, command, rest = cli.resolve_command(group, [*group._protected_args, *group.args])
    assert name is not None
    assert command is not None
    return name, command.make_context(name, rest, parent=group)


def _program(words: list[str]) -> str:
    return next(word for word in words if word in ("cpo-fast", "cpo_fast"))


def check_command(line: str) -> str:
    """Raise what the program would raise for this line, its files aside; the command's name."""
    words = shlex.split(line)
    rest = words[words.index(_program(words)) + 1 :]
    if len(rest) == 1 and not rest[0].startswith("-"):  # the command's name, as a sentence has it
        if rest[0] not in COMMANDS:
            raise click.UsageError(f"there is no command '{rest[0]}'")
        return rest[0]
    if not rest or rest[-1] in ("--help", "-h", "--version"):
        return rest[0] if rest else ""
    if len(rest) == 1:  # an option of every command, as a sentence has it
        if rest[0] not in {flag for option in cli.params for flag in option.opts}:
            raise click.NoSuchOption(rest[0])
        return ""
    name, context = parsed(line)
    check_settings([word for word in context.params.get("overrides") or () if "=" in word])
    return name


def check_settings(settings: list[str]) -> None:
    """Raise ConfigError for a key or a value that the configuration does not take."""
    open_ended = [text for text in settings if text.partition("=")[2] in ("...", "")]
    for text in open_ended:
        check_key(text.partition("=")[0])
    # what some keys need beside them stands in the page's file
    load_config(None, ["data.held_out=0.1", *(text for text in settings if text not in open_ended)])


def check_key(key: str) -> None:
    """Raise KeyError for a key that is none."""
    model = Config
    for part in key.split("."):
        fields = getattr(model, "model_fields", None)
        if fields is None:  # below a key that maps names
            return
        model = fields[part].annotation


def check_mention(text: str) -> bool:
    """Check code inside a sentence if it is a command, settings or a key. Whether it was."""
    if text.split()[0] == "cpo-fast" or " cpo_fast " in text:
        try:
            check_command(text)
        except click.MissingParameter as missing:  # a sentence leaves the files out, and no option
            if not isinstance(missing.param, click.Argument):
                raise
    elif all(_SETTING.fullmatch(word.partition("=")[0]) and "=" in word for word in _words(text)):
        check_settings(_words(text))
    elif (found := re.fullmatch(rf"({_SETTING.pattern}): (\S+)", text)) is not None:
        check_settings([f"{found[1]}={found[2]}"])
    elif _SETTING.fullmatch(text) and text.rpartition(".")[2] not in _FILE_KINDS:
        check_key(text)
    else:
        return False
    return True


def _words(text: str) -> list[str]:
    """Words of a sentence's code, a value in brackets kept whole."""
    return re.findall(r"(?:[^\s\[]|\[[^\]]*\])+", text)


def check_yaml(text: str, folder: Path) -> str:
    """Raise for YAML that is neither a configuration nor (a part of) a task file; which of them it is."""
    keys = set(yaml.safe_load(text))
    if keys <= {*Config.model_fields, "preset"}:
        path = folder / "shown.yaml"
        path.write_text(text, encoding="utf-8")
        load_config(path)
        return "configuration"
    unknown = keys - set(TaskFile.model_fields)
    if unknown:
        raise ValueError(f"neither a configuration nor a task file has the keys {sorted(unknown)}")
    return "task file"
