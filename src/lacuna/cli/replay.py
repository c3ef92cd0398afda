"""The command that repeats a run. Nothing here imports torch."""

import sys
from pathlib import Path

import click

from lacuna.cli.flags import HELP, VERBOSE
from lacuna.errors import RunError


@click.command(context_settings=HELP)
@click.argument("run", metavar="RUN")
@click.option("--output", metavar="FILE", help="A new file for the config. Default: it is printed.")
@VERBOSE
def replay(run: str, output: str | None) -> None:
    """Write the config of RUN again, byte for byte, and say what has changed around it since."""
    from lacuna.reports.replay import repeat_command
    from lacuna.reports.replay import replay as look

    found = look(run)
    if output is None:
        sys.stdout.buffer.write(found.config)
        sys.stdout.flush()
    else:
        try:
            with Path(output).open("xb") as file:
                file.write(found.config)
        except FileExistsError:
            raise RunError(f"{output} is there already: nothing is written over it") from None
        except OSError as error:
            raise RunError(f"{output}: cannot be written: {error.strerror}") from None
        click.echo(f"{found.name} of {run}: {output}", err=True)
    for line in found.notes:
        click.echo(f"note: {line}", err=True)
    for line in found.differences or ["nothing has changed around it: packages, git, device, data, model, tokenizer"]:
        click.echo(line, err=True)
    again = repeat_command(found.start, output or str(found.kept), f"{run.rstrip('/')}_again")
    click.echo(f"repeat it: {again}", err=True)
