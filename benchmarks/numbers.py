"""Whether the documents say what was measured; `make numbers` and `make numbers-quick` run it.

    python -m benchmarks.numbers --quick     # documents against benchmarks/results and docs/log.md, in a second
    python -m benchmarks.numbers             # that, then measure again what this machine can, and compare
    python -m benchmarks.numbers --table     # every figure with its command, machine and date, in Markdown

A claim (`benchmarks/number_claims.py`) is a passage of a document in which every figure is a placeholder, and where the
figures come from. Its formats are the rounding rule: the passage is written out with the figures of the record, and must
stand in the document word for word, whatever the line breaks. Three things are wrong, a sentence each:

* the document says another figure than the record;
* the document has no such passage;
* the document has a measured figure (a number with a unit, an interval, a power of ten, a table's cell) that no claim
  covers and that is not on the list of exempt definitions, or that list has a passage that the document lacks.

To add a number: let the benchmark record it (`harness.record`), write a claim with the passage and the figures, and run
`--quick`. A figure is a value and how near a new measurement must come: `exactly` for counts, `ratio` for what another
machine should show too, `here` for seconds and bytes, which belong to a machine and are not compared. A figure that no
record has may be quoted from docs/log.md (`Logged`), which has its command, machine and date beside it; it is not
measured again. What is measured again is written to a folder of its own (`CPO_FAST_RESULTS`), never to the results.
"""

import argparse
import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.claim import LOG, Claim, Figure, Logged, Recorded, Unfounded
from benchmarks.number_claims import CLAIMS, EXEMPT

PAGE = """# Figures

Every measured figure of the documents, in the order of its passage, with what measures it again, where and when it was
measured. `make numbers-table` writes this page, `make numbers-quick` compares the documents with it, and `make numbers`
measures again.

"""
ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
NUMBER = r"(?<![\w.])[-+]?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?"
PLACEHOLDER = re.compile(r"\{[^{}]*\}")
UNITS = r"times|x|×|%|(?:CPU |wall )?seconds?|s|ms|minutes?|hours?|[KMGT]i?B|fewer|faster|slower|tokens|parameters"
# a number with a unit, both ends of an interval, a power of ten, a cell of a table that begins with a number
MEASURED = re.compile(
    rf"{NUMBER}(?= ?(?:{UNITS})(?!\w))|(?<=\[){NUMBER}(?=, ?[-+]?\d)|(?<=, ){NUMBER}(?=\])"
    r"|(?<![\w.])\d(?:\.\d+)?e-?\d+|(?<=\| )[-+]?\d[\d,]*(?:\.\d+)?(?= [|(\[])"
)


def squeezed(text: str) -> str:
    """Text with every run of white space as one blank: passages may be broken into lines anywhere."""
    return re.sub(r"\s+", " ", text).strip()


def pattern(passage: str) -> re.Pattern[str]:
    """What finds a passage whatever its figures are; they are the groups."""
    words = PLACEHOLDER.split(squeezed(passage))
    return re.compile(f"({NUMBER})".join(map(re.escape, words)))


def figures(claim: Claim, results: Path, root: Path) -> tuple[list[Figure], list[str]]:
    """A claim's figures, and as the document must write them.

    Raises:
        Unfounded: no record fits, or docs/log.md has no such line.
    """
    formats = PLACEHOLDER.findall(claim.passage)
    if isinstance(claim.source, Recorded):
        found = list(claim.source.figures(claim.source.record(results)))
    else:
        match = pattern(claim.source.passage).search(squeezed((root / LOG).read_text(encoding="utf-8")))
        if match is None:
            raise Unfounded(f'{LOG} has no passage like "{claim.source.passage}"')
        numbers = match.groups()
        if claim.source.figures is None:
            found = [Figure(number) for number in numbers]
        else:
            found = list(claim.source.figures(*(float(number.replace(",", "")) for number in numbers)))
    if len(found) != len(formats):
        raise Unfounded(f"the passage has {len(formats)} placeholders, its source gives {len(found)} figures")
    return found, [form.format(one.value) for form, one in zip(formats, found, strict=True)]


def wrong_claims(claims: Iterable[Claim], results: Path = RESULTS, root: Path = ROOT) -> list[str]:
    """What documents say unlike the records, a sentence a claim."""
    wrong = []
    for claim in claims:
        again = f"; measure again by `{claim.command}`"
        document = squeezed((root / claim.document).read_text(encoding="utf-8"))
        try:
            _, written = figures(claim, results, root)
        except (Unfounded, KeyError, IndexError, StopIteration) as error:
            wrong.append(f"{claim.name}: {claim.source.name} does not tell the figures ({error}){again}")
            continue
        said = [match.groups() for match in pattern(claim.passage).finditer(document)]
        if tuple(written) in said:
            continue
        told = f"{claim.source.name} says {' '.join(written)}"
        if said:
            wrong.append(f"{claim.name}: {claim.document} says {' '.join(said[0])}, {told}{again}")
        else:
            wrong.append(f'{claim.name}: {claim.document} has no passage like "{claim.passage}"; {told}')
    return wrong


def uncovered(document: str, claims: Iterable[Claim], exempt: Iterable[str], root: Path = ROOT) -> list[str]:
    """Measured figures of a document that neither a claim nor an exempt passage covers, and exempt passages it lacks.

    A table between `<!-- models -->` and `<!-- end of models -->` is made by a command of its own and is left out.
    """
    text = (root / document).read_text(encoding="utf-8")
    text = squeezed(re.sub(r"<!-- models -->.*?<!-- end of models -->", "", text, flags=re.DOTALL))
    spans = [
        match.span() for one in claims if one.document == document for match in pattern(one.passage).finditer(text)
    ]
    wrong = []
    for passage in exempt:
        found = [match.span() for match in re.finditer(re.escape(squeezed(passage)), text)]
        spans += found
        if not found:
            wrong.append(
                f'{document} has no passage "{passage}", which benchmarks/number_claims.py exempts; take it out'
            )
    for match in MEASURED.finditer(text):
        if not any(start <= match.start() and match.end() <= end for start, end in spans):
            around = text[max(0, match.start() - 40) : match.end() + 30]
            wrong.append(
                f'{document} says {match.group()} in "...{around}...", which no claim covers; add one, or exempt it'
            )
    return wrong


def far_off(claim: Claim, old: Sequence[Figure], new: Sequence[Figure]) -> list[str]:
    """Figures of a new measurement that are further from the recorded ones than the claim allows."""
    wrong = []
    for before, after in zip(old, new, strict=True):
        if before.within is None:
            continue
        same = before.value == after.value
        if not same and (before.within == 0 or abs(after.value / before.value - 1) > before.within):
            allowed = f"within {before.within:.0%}" if before.within else "exactly"
            wrong.append(
                f"{claim.name}: {before.value} was expected {allowed}, measured again {after.value}: `{claim.command}`"
            )
    return wrong


def measured_again(claims: Sequence[Claim], folder: Path, run: Callable[..., Any] = subprocess.run) -> list[str]:
    """Run the command of every recorded claim that this machine can measure, once each, and compare what it records."""
    wrong: list[str] = []
    mine = [claim for claim in claims if claim.measured_here and isinstance(claim.source, Recorded)]
    failed = set()
    for command in dict.fromkeys(claim.command for claim in mine):
        sys.stdout.write(f"{command}\n")
        sys.stdout.flush()
        words = [sys.executable if word == "python" else word for word in shlex.split(command)]
        path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
        environment = os.environ | {"CPO_FAST_RESULTS": str(folder), "PYTHONPATH": path}
        code = run(words, cwd=ROOT, env=environment).returncode
        if code:
            failed.add(command)
            wrong.append(f"`{command}` ended with exit code {code}")
    for claim in mine:
        if claim.command in failed:
            continue
        try:
            wrong += far_off(claim, figures(claim, RESULTS, ROOT)[0], figures(claim, folder, ROOT)[0])
        except (Unfounded, KeyError, IndexError, StopIteration) as error:
            wrong.append(f"{claim.name}: `{claim.command}` did not tell the figures ({error})")
    return wrong


def table(claims: Iterable[Claim], results: Path = RESULTS, root: Path = ROOT) -> str:
    """Markdown: claim, figures, command, machine, date of every claim."""
    rows = ["| claim | figures | command | machine | date |", "|---|---|---|---|---|"]
    for claim in claims:
        _, written = figures(claim, results, root)
        if isinstance(claim.source, Recorded):
            record = claim.source.record(results)
            stamp = record.get("environment", record)  # the first records have it all at the top
            machine, date = stamp.get("processor") or stamp.get("machine"), stamp["date"][:10]
            command = stamp["command"]
            if stamp.get("gpu"):
                machine = stamp["gpu"]["name"]
            elif stamp.get("num_threads"):
                machine += f", {stamp['num_threads']} thread{'s' if stamp['num_threads'] > 1 else ''}"
        else:
            machine, date, command = "as the log says", _log_date(claim.source, root), claim.command
        cells = [claim.name, " ".join(written), f"`{command}`", str(machine), date]
        rows.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join(rows) + "\n"


def _log_date(source: Logged, root: Path) -> str:
    text = squeezed((root / LOG).read_text(encoding="utf-8"))
    match = pattern(source.passage).search(text)
    assert match is not None
    return re.findall(r"## (\d{4}-\d\d-\d\d): ", text[: match.start()])[-1]


def main(argv: Sequence[str] | None = None) -> int:
    """Check, measure again or tabulate; 1 if anything is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="measure nothing again")
    parser.add_argument("--table", action="store_true", help="print every figure with command, machine and date")
    parser.add_argument("--only", default="", help="claims whose name or command has this in it")
    arguments = parser.parse_args(argv)
    chosen = [claim for claim in CLAIMS if arguments.only in claim.name or arguments.only in claim.command]
    if arguments.table:
        sys.stdout.write(PAGE + table(chosen))
        return 0
    wrong = wrong_claims(chosen)
    if not arguments.only:
        for document, exempt in EXEMPT.items():
            wrong += uncovered(document, CLAIMS, exempt)
    if not arguments.quick:
        with tempfile.TemporaryDirectory() as folder:
            wrong += measured_again(chosen, Path(folder))
    sys.stdout.write("".join(f"{sentence}\n" for sentence in wrong))
    sys.stdout.write(f"{len(chosen)} claims, {len(wrong)} wrong\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
