"""`python -m torchtune_config_writer generate experiment.yaml`."""

import click

from lacuna.cli import run
from lacuna.cli_experiment import generate, recipes

run(click.Group("torchtune_config_writer", {"generate": generate, "recipes": recipes}))
