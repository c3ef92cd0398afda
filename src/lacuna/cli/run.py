"""`lacuna run`. Nothing here imports torch."""

import sys

import click

from lacuna.cli.flags import HELP, VERBOSE


@click.command(context_settings=HELP)
@click.argument("target", metavar="EXPERIMENT.yaml|DIR|MAPPING")
@click.option("--configs", metavar="DIR", help="Where an experiment's configs go.  [default: configs]")
@click.option("--force", is_flag=True, help="Replace the configs of another experiment there.")
@click.option("--only", metavar="RUN,...", multiple=True, help="These runs, such as run_003,run_005.")
@click.option("--jobs", metavar="N", type=int, help="Runs at the same time.  [default: 1]")
@click.option("--slurm", is_flag=True, help="Submit the runs as an array, instead of running them here.")
@click.option("--cluster", metavar="FILE", help="With --slurm: settings; an experiment's slurm section goes over them.")
@click.option("--output", metavar="DIR", help="With --slurm: where scripts and logs go.  [default: slurm]")
@click.option(
    "--again",
    is_flag=True,
    help="Train those anew that are finished, but whose data or model have changed since; their folders are kept.",
)
@click.option("--torchtune-python", metavar="PYTHON", help="The Python of torchtune's environment.")
@VERBOSE
def run(
    target: str,
    configs: str | None,
    force: bool,
    only: tuple[str, ...],
    jobs: int | None,
    slurm: bool,
    cluster: str | None,
    output: str | None,
    again: bool,
    torchtune_python: str | None,
) -> None:
    """Run what is missing or unfinished of an experiment; a second call goes on, and leaves finished runs alone.

    Ends with 0 where all are finished, 1 where some failed or are missing.
    """
    from lacuna.launch.experiment import run as execute

    outcome = execute(
        target,
        configs=configs,
        force=force,
        only=only,
        jobs=jobs,
        slurm=slurm,
        cluster=cluster,
        output=output,
        torchtune_python=torchtune_python,
        again=again,
    )
    sys.exit(outcome.exit_code)
