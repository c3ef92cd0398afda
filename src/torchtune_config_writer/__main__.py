"""`python -m torchtune_config_writer generate experiment.yaml`."""

import click

from lacuna.cli import generate, recipes, run

run(click.Group("torchtune_config_writer", {"generate": generate, "recipes": recipes}))
