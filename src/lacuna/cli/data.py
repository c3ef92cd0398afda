"""The commands around what goes into a training and what comes out of it. Nothing here imports torch."""

import sys

import click

from lacuna.cli.chat import CHANGED_BASE
from lacuna.cli.flags import HELP, VERBOSE, json_option
from lacuna.errors import needs_extra


@click.command(context_settings=HELP)
@click.argument("run_folder", metavar="RUN")
@click.option("--output", metavar="DIR", required=True, help="Where the merged model goes; a new folder.")
@CHANGED_BASE
@VERBOSE
def merge(run_folder: str, output: str, allow_changed_base: bool) -> None:
    """Write the model of RUN (a run, its final folder or any adapter) with the adapter merged into its weights."""
    with needs_extra("finetune", "peft"):
        from lacuna.finetune.merge import merge as write
    click.echo(write(run_folder, output, allow_changed_base))


@click.command(context_settings=HELP)
@click.argument("files", nargs=-1, metavar="[FILE]...")
@click.option(
    "--config", "configs", metavar="CONFIG", multiple=True, required=True, help="Of any trainer; later ones win."
)
@click.option("--show", "samples", type=click.IntRange(0), default=2, show_default=True, help="Samples of each file.")
@json_option("Print all of it as one JSON object.")
@VERBOSE
def data(files: tuple[str, ...], configs: tuple[str, ...], samples: int, as_json: bool) -> None:
    """Show what the model will see of CONFIG's data, or of FILE... instead: the first as training data, others as
    validation data.

    Ends with 1 where a run would stop.
    """
    from lacuna.config.trainers import load_trainer_config
    from lacuna.data.hub import stay_offline_if_unreachable

    config = load_trainer_config(configs)
    stay_offline_if_unreachable(config)
    with needs_extra("train", "transformers"):
        from lacuna.preflight.preview_text import look
    if look(config, files, samples, as_json):
        sys.exit(1)
