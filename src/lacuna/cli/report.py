"""The command `report`. Nothing here imports torch."""

from typing import Literal

import click

from lacuna.cli.flags import HELP, VERBOSE, json_option


@click.command(context_settings=HELP)
@click.argument("where", metavar="DIR")
@click.option("--metric", metavar="NAME", help="What to compare by. Default: validation_loss, else loss.")
@click.option("--goal", type=click.Choice(["lowest", "highest"]), help="What is better, where no name says it.")
@click.option("--html", metavar="FILE", help="Write the report as one page.")
@click.option("--csv", metavar="FILE", help="Write a row for each run.")
@json_option("Print the numbers as JSON.")
@VERBOSE
def report(
    where: str,
    metric: str | None,
    goal: Literal["lowest", "highest"] | None,
    html: str | None,
    csv: str | None,
    as_json: bool,
) -> None:
    """Compare the arms of an experiment: means over seeds, effects, differences, costs, and a verdict.

    DIR: a folder of generated configs, or its run_mapping.yaml. Metrics are those of metrics.jsonl, and the numbers
    that your own evaluation writes into RUN/evaluation.json.
    """
    from rich.console import Console

    from lacuna.reports.make import report as make

    made = make(where, metric, goal, html, csv)
    if as_json:
        from lacuna.reports.table import as_json as to_json

        click.echo(to_json(made))
        return
    from lacuna.reports.text import print_report

    print_report(made, Console(highlight=False, markup=False, emoji=False))
    for file in (csv, html):
        if file is not None:
            click.echo(f"written: {file}")
