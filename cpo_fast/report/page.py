"""Puts the page together: templates, the scripts and styles that are inlined, and the policy that forbids all others.

    default-src 'none'; script-src and style-src 'sha256-...' of what is inlined; img-src data:

Whatever a template prints goes through `visible` and is escaped. Data for the scripts is JSON in elements that are not run.
"""

import base64
import hashlib
import json
import re
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from cpo_fast import __version__
from cpo_fast.errors import ConfigError, CpoFastError
from cpo_fast.evaluate.result import QuestionResult
from cpo_fast.files import write_atomic
from cpo_fast.report.curves import curves, drawing, figures
from cpo_fast.report.runs import Run, read_runs
from cpo_fast.report.summary import summary
from cpo_fast.report.tables import (
    MAX_CHAIN_CHARACTERS,
    agreement_sentences,
    config_tables,
    environment_table,
    evaluation_groups,
    files_table,
    hash_table,
    rounds_table,
    search_tables,
)
from cpo_fast.report.text import visible
from cpo_fast.report.trees import trees_payload

REPORT, REPORT_OF_SEVERAL = "report.html", "report-compared.html"  # in the folder of the first run
MAX_BYTES = 4_800_000  # of the page, below the 5 MB that mail and reviews take; trees have what the rest leaves
MIN_TREES_BYTES = 200_000  # a few trees, whatever the rest takes

_HERE = Path(__file__).parent
_STATIC = _HERE / "static"
SCRIPTS = ("uPlot.iife.min.js", "page.js", "tree_parts.js", "trees.js")
STYLES = ("uPlot.min.css", "page.css", "trees.css")
# what ends a script element, or a line of JavaScript, inside JSON
_IN_SCRIPT = {ord(character): f"\\u{ord(character):04x}" for character in "<>&\u2028\u2029"}
_SURROGATE = re.compile("[\ud800-\udfff]")


def write_report(paths: Sequence[str | Path], target: str | Path | None = None) -> tuple[Path, list[str]]:
    """Write the report of the run folders `paths` to `target`, or into the first of them: `report.html`, and
    `report-compared.html` where there are several, so that its own report stays.

    Returns:
        Where it is, and sentences on what of the runs was left out.

    Raises:
        ConfigError: a path is no folder, or the target is one. DataError: a folder is no run.
    """
    runs = read_runs(paths)
    name = REPORT if len(runs) == 1 else REPORT_OF_SEVERAL
    file = runs[0].path / name if target is None else Path(target)
    if file.is_dir():
        raise ConfigError(f"{file} is a folder; give a file to write, such as {file / REPORT}")
    text, notes = page(runs)
    write_atomic(file, text)
    return file, notes


def page(runs: Sequence[Run]) -> tuple[str, list[str]]:
    """The whole page as text without lone surrogates, and the sentences on what was left out that it has."""
    drawn = curves(runs)
    shown, others = figures(drawn)
    values: dict[str, Any] = {
        "version": __version__,
        "written": datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        "runs": [(run, summary(run)) for run in runs],
        "figures": shown,
        "other_figures": others,
        "curves": drawn,
        "rounds": [table for run in runs if (table := rounds_table(run)) is not None],
        "asked": evaluation_groups(runs),
        "agreements": agreement_sentences(runs),
        "searches": search_tables(runs),
        "config": config_tables(runs),
        "environment": environment_table(runs),
        "hashes": hash_table(runs),
        "files": files_table(runs),
        "notes": [note for each in runs for run in each.all for note in run.notes],
        "charts_data": json_text(drawing(drawn, [*shown, *others])) if drawn else None,
        "licence": (_STATIC / "uPlot.LICENSE.txt").read_text(encoding="utf-8"),
    }
    size = len(_rendered(values, None).encode())
    searched = [run for each in runs for run in each.all if run.votes is not None]
    share = max(MIN_TREES_BYTES, MAX_BYTES - size) // max(1, len(searched))
    found = [
        {"name": run.name, "trees": payload} for run in searched if (payload := _trees(run, share, values["notes"]))
    ]
    return _rendered(values, json_text({"runs": found}) if found else None), values["notes"]


def _trees(run: Run, budget_bytes: int, notes: list[str]) -> dict[str, Any] | None:
    """The payload of the tree browser, None without whole trees, which `notes` then says."""
    try:
        payload = trees_payload(run.path, budget_bytes)
    except CpoFastError as error:
        notes.append(f"{run.name}: the trees cannot be browsed: {error}")
        return None
    if payload is not None and payload["num_damaged"]:
        count, first = payload["num_damaged"], payload["damaged"][0]
        what = "a line that is" if count == 1 else f"{count} lines that are"
        notes.append(
            f"{run.name}: trees.jsonl has {what} no whole tree and not shown; {'the first, ' * (count > 1)}{first}"
        )
    return payload


def json_text(value: Any) -> Markup:
    """JSON that is harmless inside a script element. Raises ValueError on NaN."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False).translate(_IN_SCRIPT)
    return Markup(_SURROGATE.sub(lambda match: f"\\u{ord(match[0]):04x}", text))


def _rendered(values: dict[str, Any], trees_data: Markup | None) -> str:
    scripts = [_inlined(name) for name in SCRIPTS]
    styles = [_inlined(name) for name in STYLES]
    policy = (
        f"default-src 'none'; script-src {_hashes(scripts)}; style-src {_hashes(styles)}; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
    page = _templates().get_template("page.html.j2")
    return page.render(values, scripts=scripts, styles=styles, policy=policy, trees_data=trees_data)


def _inlined(name: str) -> Markup:
    return Markup((_STATIC / name).read_text(encoding="utf-8"))


def _hashes(texts: Sequence[str]) -> str:
    digests = (base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in texts)
    return " ".join(f"'sha256-{digest}'" for digest in digests)


def _templates() -> Environment:
    templates = Environment(
        loader=FileSystemLoader(_HERE / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: visible(value) if type(value) is str else value,
    )
    templates.filters["isolated"] = _isolated
    templates.filters["breakable"] = _breakable
    templates.globals["chain"] = _chain
    return templates


def _isolated(text: str, max_characters: int = 600) -> Markup:
    """Text of a model or a file, whose direction does not reach what stands around it."""
    return Markup("<bdi>{}</bdi>").format(escape(visible(text, max_characters)))


def _breakable(text: str) -> Markup:
    """As `_isolated`, and names and paths may go on in the next line."""
    escaped = str(escape(visible(text, 600)))  # without a tag, and no entity holds either of both
    return Markup("<bdi>" + re.sub("([/_])", r"\1<wbr>", escaped) + "</bdi>")


def _chain(result: QuestionResult) -> Markup:
    return _isolated(result.chain.strip() or "(nothing)", MAX_CHAIN_CHARACTERS)
