"""What mkdocs does beside rendering: pages that are written from code, files from outside docs/, pictures in the page.

    <!-- generated: configuration -->   every key, from the pydantic models in cpo_fast/config
    <!-- generated: commands -->        every command and option, from click
    <!-- generated: exit_codes -->      what a command returns, from cpo_fast/errors.py
    <!-- generated: train_step -->      figures of the newest record in benchmarks/results

    python docs/site_hooks.py           write anew what stands between such a mark and its end in the pages

A page that is read in a checkout too holds the text, up to <!-- end of configuration -->; the tests compare it.
Nothing here imports torch.
"""

import json
import posixpath
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

import click
from mkdocs.structure.files import File
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from cpo_fast import errors
from cpo_fast.cli import COMMANDS, cli
from cpo_fast.config import Config

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"

MARK = re.compile(r"<!-- generated: (\w+) -->(?:.*?<!-- end of \1 -->)?", re.DOTALL)

# files of the repository that are pages or pictures of the site, by their place there
OUTSIDE = {
    "benchmarks/results/scaling.png": "pictures/scaling.png",
    "examples/reasoner/README.md": "reasoner.md",
    "CHANGELOG.md": "changelog.md",
}


def on_files(files: Any, config: Any) -> Any:
    """Add the files of OUTSIDE."""
    for source, target in OUTSIDE.items():
        files.append(File.generated(config, target, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Fill in what is generated, and lead links that leave docs/ to where the file is in the site."""
    markdown = MARK.sub(lambda found: GENERATED[found[1]](), markdown)
    folder = posixpath.dirname(page.file.src_uri)
    for source, target in OUTSIDE.items():
        written = posixpath.relpath(posixpath.join("..", source), folder or ".")
        markdown = markdown.replace(f"]({written}", f"]({posixpath.relpath(target, folder or '.')}")
    return markdown


def on_page_content(html: str, page: Any, config: Any, files: Any) -> str:
    """Put the text of SVG of class `picture` in place of its <img>, so that its colours follow the page's palette."""

    def inlined(found: re.Match[str]) -> str:
        name = re.search(r'src="[^"]*pictures/([\w-]+\.svg)"', found[0])
        text = "" if name is None else (ROOT / "docs" / "pictures" / name[1]).read_text(encoding="utf-8")
        return text if text.startswith('<svg class="picture"') else found[0]

    return re.sub(r"<img\b[^>]*>", inlined, html)


# Configuration


def keys(model: type[BaseModel] = Config, prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """(dotted key, field) of every key that holds a value; fields of a list's items follow the list, as `key[].field`."""
    for name, field in model.model_fields.items():
        section = _section(field.annotation)
        if section is not None and section is field.annotation:
            yield from keys(section, f"{prefix}{name}.")
            continue
        yield prefix + name, field
        if section is not None:
            yield from keys(section, f"{prefix}{name}[].")


def _section(kind: Any) -> type[BaseModel] | None:
    """The model that an annotation is, or that the items of its list are."""
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return kind
    return next((_section(item) for item in get_args(kind) if _section(item)), None) if get_args(kind) else None


def type_text(kind: Any, metadata: list[Any] | None = None) -> str:
    """An annotation in a reader's words, with the bounds that its field sets."""
    options = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    parts = [_one_type(option) for option in options if option is not NoneType]
    text = " or ".join(parts) + (" or null" if NoneType in options else "")
    signs = {"ge": "at least {}", "gt": "above {}", "le": "at most {}", "lt": "below {}"}
    bounds = [
        sign.format(f"{getattr(each, name):g}")
        for each in metadata or []
        for name, sign in signs.items()
        if hasattr(each, name)
    ]
    return ", ".join([text, *bounds])


def _one_type(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return ", ".join(f"`{option}`" for option in get_args(kind))
    if get_origin(kind) is tuple:
        items = get_args(kind)[0]
        return "list of sections" if _section(items) else f"list of {_one_type(items)}s"
    if get_origin(kind) is dict:
        return "names of columns by ours (" + _one_type(get_args(kind)[0]) + ")"
    return {str: "text", bool: "true or false", int: "integer", float: "number"}[kind]


def default_text(field: FieldInfo) -> str:
    """The default as YAML says it, or `needed`."""
    value = field.get_default(call_default_factory=True, validated_data={})
    if value is PydanticUndefined:
        return "needed"
    if isinstance(value, float):
        return f"`{value:g}`"
    return f"`{json.dumps(value, default=list)}`" if not isinstance(value, str) else f"`{value}`" if value else "empty"


def configuration() -> str:
    """A heading a section, with what the section is, and a table of its keys."""
    groups: dict[str, list[str]] = {}
    for key, field in keys():
        section, _, name = key.rpartition(".") if "[]." not in key else key.partition(".")
        about = f"{type_text(field.annotation, field.metadata)}; default {default_text(field)}".replace(
            "default needed", "needed"
        )
        meaning = f'{_cell(field.description or "")}<br><span class="kind">{about}</span>'
        groups.setdefault(section, []).append(f'| <span id="{key}"></span>`{name}` | {meaning} |')
    text = []
    for section, rows in groups.items():
        model = Config if not section else Config.model_fields[section].annotation
        about = (model.__doc__ or "").strip() if model is not None else ""
        title = f"## {section}" if section else "## Top level"
        text.append("\n".join([title, "", about, "", "| key | meaning |", "|---|---|", *rows]))
    return "\n\n".join(text)


def _cell(text: str) -> str:
    """Text as it stands in a table, nothing of it markup."""
    text = re.sub(r"\s+", " ", text)
    for mark in "&<>|*_[]`":
        text = text.replace(mark, f"&#{ord(mark)};")
    return text


# Commands


def commands() -> str:
    """A heading a command with its help, usage and options, as `--help` has them."""
    parts = []
    context = click.Context(cli, info_name="cpo-fast")
    for name in COMMANDS:
        command = cli.get_command(context, name)
        assert command is not None
        own = click.Context(command, info_name=name, parent=context)
        found = [option for each in command.get_params(own) if (option := each.get_help_record(own))]
        rows = [row for row in found if "--help" not in row[0]]  # its names depend on earlier uses
        parts += [f"## {name}", "", _help(command), "", f"    {_usage(own, command)}", ""]
        parts += ["| option | |", "|---|---|", *(f"| `{flags}` | {_cell(words)} |" for flags, words in rows), ""]
    return "\n".join(parts)


def _usage(context: click.Context, command: click.Command) -> str:
    return " ".join([context.command_path, *command.collect_usage_pieces(context)])


def _help(command: click.Command) -> str:
    """The command's help, paragraphs kept, what click is told not to wrap as a block of code."""
    paragraphs = re.split(r"\n\s*\n", (command.help or "").strip())
    text = []
    for paragraph in paragraphs:
        lines = paragraph.replace("\b", "").strip("\n").split("\n")
        is_code = "\b" in paragraph or paragraph.lstrip().startswith(("torchrun ", "cpo-fast "))
        text.append("\n".join(("    " if is_code else "") + line for line in lines))
    return "\n\n".join(text)


def exit_codes() -> str:
    """A table of the codes that errors end a command with."""
    meanings = {0: "Done."}
    for error in (errors.CpoFastError, *errors.CpoFastError.__subclasses__()):
        about = re.sub(r" \(exit code \d\)", "", (error.__doc__ or "").split("\n")[0])
        if "exit_code" in vars(error):
            meanings[error.exit_code] = about if error.exit_code != 1 else "Something failed; the last line says what."
    meanings |= {130: "Ctrl-C, after everything was saved.", 143: "SIGTERM, after everything was saved."}
    rows = [f"| {code} | {_cell(about)} |" for code, about in sorted(meanings.items())]
    return "\n".join(["| exit code | |", "|---|---|", *rows])


# Figures


def newest(name: str, wanted: Callable[[Mapping[str, Any]], bool] = bool) -> dict[str, Any]:
    """The last record of benchmarks/results/NAME.jsonl that is wanted."""
    lines = (RESULTS / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    found: dict[str, Any] = next(record for record in map(json.loads, reversed(lines)) if wanted(record))
    return found


def where(record: Mapping[str, Any]) -> str:
    """The command, machine and day of a record."""
    made = record["environment"]
    machine = made.get("gpu") or f"{made['num_threads']} cores of an {made['processor']}"
    return f"`{made['command']}`, {machine}, {made['date'][:10]}."


def train_step() -> str:
    """One optimizer step, packed, padded and by TRL, in wall seconds."""
    record = newest("train_step", lambda each: each["results"]["clock"] == "wall")
    found = record["results"]
    rows = [("packed", found["packed_tokens"], f"{found['packed_median_seconds']:.1f}", "1")]
    for name, label in (("padded", "padded rows"), ("TRL", "TRL's `DPOTrainer`")):
        one = found["baselines"][name]
        low, high = one["ratio_interval"]
        seconds = f"{one['total_seconds']:.0f}"
        rows.append((label, found["padded_tokens"], seconds, f"{one['ratio_to_packed']:.1f} [{low:.1f}, {high:.1f}]"))
    table = ["| | tokens | seconds | times packed |", "|---|---|---|---|"]
    table += [f"| {label} | {tokens:,} | {seconds} | {ratio} |" for label, tokens, seconds, ratio in rows]
    return "\n".join([*table, "", where(record)])


def collect() -> str:
    """One search by each way of generating, in wall seconds."""
    record = newest(
        "collect", lambda each: each["results"]["clock"] == "wall" and each["results"]["num_questions"] == 3
    )
    rows = record["results"]["rows"]
    ours = next(row for row in rows if row["name"] == "ours")["seconds"]
    table = ["| | seconds | times ours |", "|---|---|---|"]
    for row in sorted(rows, key=lambda row: row["seconds"] or 0):
        if row["seconds"] is not None:
            table.append(f"| {row['name']} ({row['note']}) | {row['seconds']:.0f} | {row['seconds'] / ours:.1f} |")
    return "\n".join([*table, "", where(record)])


GENERATED: dict[str, Callable[[], str]] = {
    "configuration": configuration,
    "commands": commands,
    "exit_codes": exit_codes,
    "train_step": train_step,
    "collect": collect,
}


def written_anew(markdown: str) -> str:
    """A page of the checkout with what is generated between a mark and its end as it is now."""

    def block(found: re.Match[str]) -> str:
        name, is_kept = found[1], found[0].endswith(f"<!-- end of {found[1]} -->")
        text = f"<!-- generated: {name} -->"
        return f"{text}\n\n{GENERATED[name]()}\n\n<!-- end of {name} -->" if is_kept else text

    return MARK.sub(block, markdown)


if __name__ == "__main__":
    for path in (ROOT / "docs").rglob("*.md"):
        before = path.read_text(encoding="utf-8")
        if before != (after := written_anew(before)):
            path.write_text(after, encoding="utf-8")
