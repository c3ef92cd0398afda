"""lacuna plan. Nothing here imports torch."""

import json
import sys
from dataclasses import asdict

import click

from lacuna.cli.flags import HELP, VERBOSE, json_option
from lacuna.errors import needs_extra


@click.command(context_settings=HELP)
@click.argument("sources", nargs=-1, required=True, metavar="CONFIG...|EXPERIMENT")
@click.option("--device", metavar="NAME", help="Instead of this machine's: h100, a100, 4090, m4-32gb, cpu, …")
@click.option("--mfu", type=click.FloatRange(0, 1, min_open=True), help="Model FLOPs utilisation to take for the time.")
@click.option("--trace", is_flag=True, help="Count the memory in the real step, run on tensors without data (seconds).")
@click.option("--torchtune", "torchtune_python", metavar="PYTHON", help="Python of torchtune's environment.")
@json_option("Print everything as one JSON object.")
@VERBOSE
def plan(
    sources: tuple[str, ...], device: str | None, mfu: float | None, trace: bool, torchtune_python: str | None,
    as_json: bool,
) -> None:  # fmt: skip
    """Memory, time, tokens and disk of a run, or of all runs of an experiment, before anything is trained.

    CONFIG...: of one run, later ones win. EXPERIMENT: its file, or the folder that generate wrote. Needs no GPU and no
    weights: a model's config.json is enough. The exit code is 1 where a run does not fit.
    """
    from lacuna.preflight.command import make_plans
    from lacuna.preflight.show import show, show_all

    with needs_extra("finetune" if trace else "train", "torch"):
        name, plans, notes = make_plans(sources, device, mfu, trace, torchtune_python)
    if as_json:
        dumped = [{**asdict(one), "peak": one.peak, "gpu_hours": one.gpu_hours} for one in plans]
        click.echo(json.dumps({"name": name, "runs": dumped, "notes": notes}, ensure_ascii=False))
    else:
        for line in show(plans[0]) if len(plans) == 1 else show_all(name, plans):
            click.echo(line)
        for note in notes:
            click.echo(f"note: {note}")
    sys.exit(1 if any(one.fits is False for one in plans) else 0)
