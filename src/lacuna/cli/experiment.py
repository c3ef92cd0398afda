"""The commands around experiments and clusters. Nothing here imports torch."""

import json
import os
import shlex
import sys

import click

from lacuna.cli.flags import HELP, VERBOSE, json_option
from lacuna.errors import ConfigError
from lacuna.words import aligned, did_you_mean, varies

SHOWN_RUNS = 20


@click.command(context_settings=HELP)
@click.argument("experiment", metavar="EXPERIMENT.yaml")
@click.option("--output", metavar="DIR", default="configs", show_default=True, help="Where the configs go.")
@click.option("--force", is_flag=True, help="Replace the configs of another experiment there.")
@click.option("--no-validate", is_flag=True, help="Write configs that nobody has checked.")
@click.option("--strict", is_flag=True, help="Refuse what could not start here: otherwise that is a warning.")
@click.option("--torchtune-python", metavar="PYTHON", help="The Python of torchtune's environment.")
@json_option("Print what was written as JSON.")
@VERBOSE
def generate(
    experiment: str,
    output: str,
    force: bool,
    no_validate: bool,
    strict: bool,
    torchtune_python: str | None,
    as_json: bool,
) -> None:
    """Write a complete config for each run of an experiment, and run_mapping.yaml.

    Runs may be for another machine: what is not on this one, and what would be refused when a run starts, are warnings.
    """
    from lacuna.experiment.folder import REPORT, warning_lines
    from lacuna.experiment.generator import generate as write

    if not output:
        raise ConfigError("--output is empty: name a folder")
    done = write(
        experiment,
        output,
        force=force,
        validate=not no_validate,
        strict=strict,
        torchtune_python=torchtune_python,
    )
    for note in done.notes:
        click.echo(f"note: {note}", err=True)
    warnings = warning_lines(done.warnings, done.mapping["trainer"])
    for warning in warnings:
        click.echo(f"warning: {warning}", err=True)
    if as_json:
        said = {"output": done.output, "notes": done.notes, "warnings": warnings}
        click.echo(json.dumps({**said, **done.mapping}, ensure_ascii=False))
        return
    click.echo(f"✓ Loaded base config: {done.base}")
    click.echo(f"✓ Generated {len(done.runs)} config{'s' * (len(done.runs) != 1)} in {done.output.rstrip('/')}/")
    for run in done.runs[:SHOWN_RUNS]:
        varied = varies(run.settings if run.seed is None else {**run.settings, "seed": run.seed})
        click.echo(f"  - {os.path.join(done.output, run.id)}.yaml{f' ({varied})' if varied else ''}")
    if len(done.runs) > SHOWN_RUNS:
        click.echo(f"  … and {len(done.runs) - SHOWN_RUNS} more, to {done.runs[-1].id}.yaml")
    click.echo("✓ Created run_mapping.yaml")
    if not warnings:
        click.echo(f"start one: {shlex.join(done.command)}", err=True)
    else:
        report = os.path.join(done.output, REPORT)
        click.echo(f"before a run starts, mend what is warned of; each run's warnings: {report}", err=True)


@click.command(context_settings=HELP)
@click.argument("pattern", default="")
@click.option("--torchtune-python", metavar="PYTHON", help="The Python of torchtune's environment.")
@VERBOSE
def recipes(pattern: str, torchtune_python: str | None) -> None:
    """List torchtune's configs: name, model, method, devices, recipe. PATTERN: part of a name, or with * and ?."""
    from lacuna.torchtune.environment import list_recipes

    found = list_recipes(pattern, torchtune_python)
    if not found:
        known = [recipe.config for recipe in list_recipes("", torchtune_python)]
        hint = did_you_mean(pattern, [*known, *(name.partition("/")[0] for name in known)])
        raise ConfigError(f"no config of torchtune's matches {pattern!r}{hint}; `lacuna recipes` lists all")
    rows = [(r.config, r.model, r.method, "several" if r.distributed else "one", r.recipe) for r in found]
    rows.insert(0, ("config", "model", "method", "devices", "recipe"))
    for line in aligned(rows):
        click.echo(line)


@click.command(context_settings=HELP)
@click.argument("target", metavar="EXPERIMENT.yaml|CONFIG|DIR")
@click.option("--cluster", metavar="FILE", help="Settings of the cluster; an experiment's slurm section goes over it.")
@click.option("--output", metavar="DIR", default="slurm", show_default=True, help="Where scripts and logs go.")
@click.option(
    "--configs", metavar="DIR", default="configs", show_default=True, help="Where an experiment's configs go."
)
@click.option("--force", is_flag=True, help="Replace the configs of another experiment there.")
@click.option("--submit", is_flag=True, help="Submit the scripts by sbatch.")
@click.option("--torchtune-python", metavar="PYTHON", help="The Python of torchtune's environment.")
@VERBOSE
def slurm(
    target: str,
    cluster: str | None,
    output: str,
    configs: str,
    force: bool,
    submit: bool,
    torchtune_python: str | None,
) -> None:
    """Write batch scripts: one array for an experiment or a folder of generated configs, one job for one config."""
    from lacuna.launch.slurm import write_scripts

    written = write_scripts(target, cluster, output, configs, force, torchtune_python, submits=submit)
    for note in written.notes:
        click.echo(f"note: {note}", err=True)
    for script, job in zip(written.scripts, written.jobs, strict=True):
        runs = f"runs {job.offset} to {job.offset + job.tasks[-1]}" if job.offset is not None else "one run"
        click.echo(f"{os.path.relpath(script)}: {runs} of {os.path.relpath(job.target)}")
    if submit:
        for id in written.submit():
            click.echo(f"submitted: job {id}")
        return
    click.echo("submit with --submit, or by:\n  " + "\n  ".join(written.commands()), err=True)


@click.command(context_settings=HELP)
@click.argument("target", metavar="MAPPING|CONFIG")
@click.argument("index", type=int, required=False)
@click.option("--sha256", help="What the mapping, or the config, must have.")
@click.option("--torchtune-python", metavar="PYTHON", help="The Python of torchtune's environment.")
@VERBOSE
def start(target: str, index: int | None, sha256: str | None, torchtune_python: str | None) -> None:
    """Become run INDEX of a run_mapping.yaml, or the run of one config: what a SLURM job calls."""
    from lacuna.launch.start import start as become

    sys.exit(become(target, index, sha256, torchtune_python))


@click.command(context_settings=HELP)
@click.argument("where", metavar="DIR")
@json_option("Print the rows as JSON.")
@VERBOSE
def status(where: str, as_json: bool) -> None:
    """Every run's state, step, loss, speed, restarts, job and reason of failure.

    DIR: a run folder, a folder of run folders, or a folder of generated configs (its run_mapping.yaml).
    """
    from lacuna.runs import status as runs

    rows = runs.table(where)
    click.echo(runs.as_json(rows) if as_json else runs.as_text(rows))
