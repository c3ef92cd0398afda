"""`python -m torchtune_config_writer generate experiment.yaml`."""

import click

from lacuna.cli.experiment import generate, recipes
from lacuna.cli.main import run

run(click.Group("torchtune_config_writer", {"generate": generate, "recipes": recipes}))
