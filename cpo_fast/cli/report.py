"""`cpo-fast report RUN [RUN ...]`: what runs measured, searched and were set to, as one HTML file."""

from pathlib import Path

import click

from cpo_fast.errors import first_line


@click.command("report")
@click.argument("runs", metavar="RUN [RUN ...]", nargs=-1, required=True, type=click.Path())
@click.option(
    "-o",
    "--output",
    "output_path",
    type=click.Path(),
    help="File to write; default RUN/report.html, of several runs report-compared.html in the first.",
)
def report_command(runs: tuple[str, ...], output_path: str | None) -> None:
    """Write one HTML file about run folders: curves, evaluations, rounds, search trees, configuration and hashes.

    It opens from disk, without a network. Several runs share its charts and tables, and are tested against each other on
    the questions that they have in common.
    """
    from cpo_fast.report.page import write_report
    from cpo_fast.report.text import visible

    file, notes = write_report(runs, output_path)
    for note in notes:
        click.echo(visible(note), err=True)
    click.echo(f"report: {file}")


def written_report(run: str | Path) -> str:
    """Write the report of a run at the end of another command, and say where it is or why there is none."""
    try:
        from cpo_fast.report.page import write_report

        return f"report: {write_report([run])[0]}"
    except ModuleNotFoundError as error:
        return f"no report: {error.name} is missing; install it: pip install {error.name}"
    except Exception as error:  # what has been made and said is not lost for it
        return f"no report: {first_line(error)}; `cpo-fast report {run}` writes it"
