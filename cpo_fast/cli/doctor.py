"""`cpo-fast doctor`: what is installed, what is missing, and the line that installs it."""

import json
import os
import platform
import shutil
import sys
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

import click
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cpo_fast import __version__
from cpo_fast.errors import CpoFastError, EnvironmentProblem, first_line
from cpo_fast.ranks import find_ranks

GIB = 1 << 30
OPTIONAL_EXTRAS = {"data": "for parquet files and the hub", "demo": "for `cpo-fast demo --model smollm2`"}


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        wrong: what does not work and how to mend it; empty where all is well.
        optional: how to add what is missing and needed for something special alone.
    """

    what: str
    found: str
    wrong: str = ""
    optional: str = ""


@click.command("doctor")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of a table.")
def doctor_command(as_json: bool) -> None:
    """Show versions, devices and what is missing, with the line that installs it. Exit code 5 if something is."""
    findings = [*_machine(), *_libraries(), *_devices()]
    wrong = [finding for finding in findings if finding.wrong]
    if as_json:
        click.echo(json.dumps([asdict(finding) for finding in findings]))
    else:
        table = Table(title=f"cpo-fast {__version__}")
        for column in ("", "found", "to mend"):
            table.add_column(column, overflow="fold")
        for finding in findings:
            table.add_row(
                finding.what, finding.found, escape(finding.wrong or finding.optional)
            )  # `[demo]` is no markup
        Console().print(table)
    if wrong:
        raise EnvironmentProblem(f"{len(wrong)} thing(s) to mend: {', '.join(finding.what for finding in wrong)}")


def _machine() -> list[Finding]:
    free = shutil.disk_usage(Path.cwd()).free / GIB
    low = "" if free >= 1 else "free some space: a run writes adapters, checkpoints and logs"
    findings = [
        Finding("Python", f"{platform.python_version()} ({sys.executable})"),
        Finding("machine", f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs"),
        Finding("free disk here", f"{free:.1f} GiB", low),
    ]
    try:
        ranks = find_ranks()
        place = f"rank {ranks.rank} of {ranks.world_size} ({ranks.launcher})" if ranks.launcher else "none"
        findings.append(Finding("launcher", place))
    except CpoFastError as error:
        findings.append(Finding("launcher", "variables that do not fit", str(error)))
    return findings


def _libraries() -> list[Finding]:
    """Every library that cpo-fast names, beside the range it was tested in."""
    from packaging.requirements import Requirement

    findings = []
    for text in metadata.requires("cpo-fast") or []:
        requirement = Requirement(text)
        extra = _extra(text)
        if extra and extra not in OPTIONAL_EXTRAS:
            continue
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": extra}):
            continue
        wanted = f"{requirement.name}{requirement.specifier}"
        install = f"pip install 'cpo-fast[{extra}]'" if extra else f"pip install '{wanted}'"
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            use = OPTIONAL_EXTRAS.get(extra)
            missing = Finding(requirement.name, "not installed", optional=f"{use}: {install}")
            findings.append(missing if use else Finding(requirement.name, "missing", install))
            continue
        fits = requirement.specifier.contains(version, prereleases=True)
        findings.append(
            Finding(requirement.name, version, "" if fits else f"wanted {requirement.specifier}: {install}")
        )
    return findings


def _extra(requirement: str) -> str:
    """The extra that brings a requirement, from its marker `extra == 'demo'`."""
    _, found, name = requirement.partition("extra ==")
    return name.strip(" '\"") if found else ""


def _devices() -> list[Finding]:
    try:
        import torch
    except ImportError:
        return []  # it is among the missing libraries
    findings = []
    try:
        import cpo_kernels  # noqa: F401  (its C++ part is loaded)

        findings.append(Finding("cpo_kernels", "its C++ extension loads"))
    except ImportError as error:
        findings.append(
            Finding("cpo_kernels", first_line(error), "install again: pip install --force-reinstall --no-deps cpo-fast")
        )
    if not torch.cuda.is_available():
        built = f"torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "torch is built without CUDA"
        findings.append(Finding("GPU", f"none that torch sees ({built}); everything runs on the CPU, slowly"))
        return findings
    for index in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(index)
        old = "" if card.major >= 8 else "the Triton kernels need compute capability 8.0: set CPO_KERNELS_IMPL=eager"
        found = f"{card.name}, {card.total_memory / GIB:.0f} GiB, compute capability {card.major}.{card.minor}"
        findings.append(Finding(f"cuda:{index}", found, old))
    return findings
