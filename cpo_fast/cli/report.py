"""`cpo-fast report RUN [RUN ...]`: what runs measured, searched and were set to, as one HTML file."""

import click


@click.command("report")
@click.argument("runs", metavar="RUN [RUN ...]", nargs=-1, required=True, type=click.Path())
@click.option(
    "-o", "--output", "output_path", type=click.Path(), help="File to write; default RUN/report.html, of the first."
)
def report_command(runs: tuple[str, ...], output_path: str | None) -> None:
    """Write one HTML file about run folders: curves, evaluations, rounds, search trees, configuration and hashes.

    It opens from disk, without a network. Several runs share its charts and tables, and are tested against each other on
    the questions that they have in common.
    """
    from cpo_fast.report.page import write_report

    file, notes = write_report(runs, output_path)
    for note in notes:
        click.echo(note, err=True)
    click.echo(f"report: {file}")
