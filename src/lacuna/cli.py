"""Every command. Nothing here imports torch before a command needs it."""

import json
import os
import shlex
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import click

from lacuna import __version__
from lacuna.config.files import Layer, did_you_mean, flag_name, read_layer
from lacuna.config.training import FLAT, TrainingConfig
from lacuna.errors import ConfigError, Interrupted, LacunaError, MissingExtraError
from lacuna.experiment.merge import leaves
from lacuna.flags import FLAGS, config_files, config_options, resolve, shown

YIELDING_THREADS = ("OMP_WAIT_POLICY", "PASSIVE")
"""On a CPU that others use too, OpenMP's threads otherwise spin while they wait: up to five times slower."""


def run_trainer(name: str, files: tuple[str, ...], flags: dict[str, str | None]) -> None:
    config, _ = resolve(FLAT[name], config_files(files), flags)
    if starts_processes(config.gpus):
        launch_processes(name, config)
        return
    from lacuna.data.hub import stay_offline_if_unreachable

    stay_offline_if_unreachable(config)
    os.environ.setdefault(*YIELDING_THREADS)
    try:
        from lacuna.train.start import train
    except ModuleNotFoundError as error:
        raise MissingExtraError("train", error.name or "torch") from error
    train(config, [*sys.argv])


def starts_processes(gpus: int) -> bool:
    """Whether this command is to start the processes that train; under torchrun it is one of them."""
    return gpus > 1 and "LOCAL_RANK" not in os.environ


def launch_processes(name: str, config: TrainingConfig) -> None:
    try:
        from lacuna.launch.local import launch
    except ModuleNotFoundError as error:
        raise MissingExtraError("train", error.name or "torch") from error
    words = sys.argv[1:] if Path(sys.argv[0]).stem in ("lacuna", "__main__") else [name, *sys.argv[1:]]
    launch(words, config.gpus, config.max_restarts, config.device, config.output_dir)


HELP = {"max_content_width": 110}


@click.group(context_settings=HELP)
@click.version_option(__version__, prog_name="lacuna")
@click.option("--verbose", is_flag=True, help="Show the traceback of an error.")
def lacuna(verbose: bool) -> None:
    """Train language models, and know that the run was the one you asked for."""


@lacuna.command(context_settings=HELP)
@click.argument("files", nargs=-1, metavar="[@ FILE]...")
@config_options(FLAT["pretrain"])
@click.option("--verbose", is_flag=True, help="Show the traceback of an error.")
def pretrain(files: tuple[str, ...], verbose: bool, **flags: str | None) -> None:
    """Next-token prediction on plain text.

    Settings come from TOML or YAML files, each after an @, and from flags; later ones win.
    """
    run_trainer("pretrain", files, flags)


@lacuna.command(context_settings=HELP)
@click.argument("files", nargs=-1, metavar="[@ FILE]...")
@config_options(FLAT["sft"])
@click.option("--verbose", is_flag=True, help="Show the traceback of an error.")
def sft(files: tuple[str, ...], verbose: bool, **flags: str | None) -> None:
    """Supervised fine-tuning: the loss is on the assistant's tokens only.

    Settings come from TOML or YAML files, each after an @, and from flags; later ones win.
    """
    run_trainer("sft", files, flags)


@lacuna.command(context_settings=HELP)
@click.option("--config", "files", metavar="FILE", multiple=True, required=True, help="YAML or TOML; later ones win.")
@click.option("--device", type=click.Choice(["auto", "cuda", "mps", "cpu"]), help="Instead of the config's.")
@click.option("--resume", metavar="PATH|auto", help="A run folder, one of its checkpoints, or the newest run.")
@click.option("--set", "words", metavar="A.B=C", multiple=True, help="A setting by its dotted path, over all files.")
@click.option("--dry-run", is_flag=True, help="Show the configuration and what would stop it; train nothing.")
@click.option("--verbose", "-v", is_flag=True, help="Show every step's metrics, and the traceback of an error.")
def finetune(
    files: tuple[str, ...], device: str | None, resume: str | None, words: tuple[str, ...], dry_run: bool, verbose: bool
) -> None:
    """LoRA and QLoRA: train an adapter on a frozen, or quantised, model."""
    from lacuna.config.finetune import default_output_dir
    from lacuna.config.layers import load_finetune, parse_settings

    settings = parse_settings(words)
    if device is not None and "device" in settings:
        raise ConfigError("--device and --set device are both given: keep one of them")
    if device is not None:
        settings["device"] = device
    config, origins = load_finetune(files, settings)
    if dry_run:
        print_settings(dict(leaves(config.model_dump())), origins)
    from lacuna.data.hub import stay_offline_if_unreachable

    stay_offline_if_unreachable(config.as_sft())
    if starts_processes(config.gpus) and not dry_run:
        if resume is None and config.training.output_dir is None:
            config = config.with_output_dir(default_output_dir(config.model.path, time.strftime("%Y%m%d-%H%M%S")))
            sys.argv += ["--set", f"training.output_dir={config.training.output_dir}"]
        launch_processes("finetune", config.as_sft())
        return
    os.environ.setdefault(*YIELDING_THREADS)
    try:
        from lacuna.finetune.start import dry_run as check_only
        from lacuna.finetune.start import finetune as train
    except ModuleNotFoundError as error:
        raise MissingExtraError("finetune", error.name or "trl") from error
    if dry_run:
        check_only(config, resume)
    else:
        train(config, resume, verbose, [*sys.argv])


@lacuna.command(context_settings=HELP)
@click.argument("run_folder", metavar="RUN")
@click.option("--output", metavar="DIR", required=True, help="Where the merged model goes; a new folder.")
@click.option("--verbose", is_flag=True, help="Show the traceback of an error.")
def merge(run_folder: str, output: str, verbose: bool) -> None:
    """Write the model of RUN (a run, its final folder or any adapter) with the adapter merged into its weights."""
    try:
        from lacuna.finetune.merge import merge as write
    except ModuleNotFoundError as error:
        raise MissingExtraError("finetune", error.name or "peft") from error
    click.echo(write(run_folder, output))


@lacuna.command(context_settings={**HELP, "ignore_unknown_options": True})
@click.argument("arguments", nargs=-1, required=True, metavar="CONFIG... [--SETTING VALUE]...")
@click.option("--trainer", type=click.Choice([*FLAT, "finetune"]), help="Where no file says it by its `trainer` key.")
@click.option("--verbose", is_flag=True, help="Show the traceback of an error.")
def explain(arguments: tuple[str, ...], trainer: str | None, verbose: bool) -> None:
    """Print every setting of CONFIG..., and the file and line, flag or default that it came from."""
    from lacuna.config.layers import load_finetune, parse_settings
    from lacuna.config.trainers import CONFIGS, trainer_of

    first_flag = next((i for i, token in enumerate(arguments) if token.startswith("--")), len(arguments))
    files = [token.lstrip("@") for token in arguments[:first_flag] if token != "@"]
    if not files:
        raise ConfigError("explain needs a config file, and files come before flags")
    given = [trainer_of(layer.values) for layer in map(read_layer, files)]
    named = [name for name in given if isinstance(name, str) and name in CONFIGS]
    if trainer is None and not named:
        raise ConfigError(
            f"{', '.join(files)}: no `trainer` key says what this is for; pass --trainer {', '.join(CONFIGS)}"
        )
    name = trainer or named[-1]
    command = {"pretrain": pretrain, "sft": sft, "finetune": finetune}[name]
    config_flags = [word for file in files for word in ("--config", file)] if name == "finetune" else []
    flags = command.make_context("explain", [*config_flags, *arguments[first_flag:]]).params
    if name == "finetune":
        device = {"device": flags["device"]} if flags["device"] is not None else {}
        config, origins = load_finetune(flags["files"], {**parse_settings(flags["words"]), **device})
        settings = config.model_dump()
    else:
        stray = flags.pop("files")
        if stray:
            raise ConfigError(f"{stray[0]!r}: files come before flags")
        del flags["verbose"]
        flat, origins = resolve(FLAT[name], files, flags)
        settings = flat.model_dump()
    print_settings(dict(leaves(settings)), origins)


def print_settings(settings: Mapping[str, object], origins: Mapping[str, Layer]) -> None:
    """Each setting, its value, and where that came from."""
    rows = [(name, shown(value), _origin(name, origins)) for name, value in settings.items()]
    widths = [max(len(str(row[column])) for row in rows) for column in (0, 1)]
    for name, value, origin in rows:
        click.echo(f"{name:{widths[0]}}  {value!s:{widths[1]}}  {origin}")


def _origin(name: str, origins: Mapping[str, Layer]) -> str:
    if name not in origins:
        return "default"
    places = {FLAGS: flag_name(name), "--set": f"--set {name}"}
    return places.get(origins[name].name) or origins[name].where(name)


SHOWN_RUNS = 20


@lacuna.command(context_settings=HELP)
@click.argument("experiment", metavar="EXPERIMENT.yaml")
@click.option("--output", metavar="DIR", default="configs", show_default=True, help="Where the configs go.")
@click.option("--force", is_flag=True, help="Replace the configs of another experiment there.")
@click.option("--no-validate", is_flag=True, help="Write configs that nobody has checked.")
@click.option(
    "--paths",
    type=click.Choice(["check", "skip"]),
    default="check",
    show_default=True,
    help="skip: files that are missing here are notes, for runs on another machine.",
)
@click.option("--torchtune-python", metavar="PYTHON", help="The Python of torchtune's environment.")
@click.option("--json", "as_json", is_flag=True, help="Print what was written as JSON.")
@click.option("--verbose", is_flag=True, help="Show the traceback of an error.")
def generate(
    experiment: str,
    output: str,
    force: bool,
    no_validate: bool,
    paths: str,
    torchtune_python: str | None,
    as_json: bool,
    verbose: bool,
) -> None:
    """Write a complete config for each run of an experiment, and run_mapping.yaml."""
    from lacuna.experiment.generator import generate as write

    if not output:
        raise ConfigError("--output is empty: name a folder")
    done = write(
        experiment,
        output,
        force=force,
        validate=not no_validate,
        check_paths=paths == "check",
        torchtune_python=torchtune_python,
    )
    for note in done.notes:
        click.echo(f"note: {note}", err=True)
    if as_json:
        click.echo(json.dumps({"output": done.output, "notes": done.notes, **done.mapping}, ensure_ascii=False))
        return
    click.echo(f"✓ Loaded base config: {done.base}")
    click.echo(f"✓ Generated {len(done.runs)} config{'s' * (len(done.runs) != 1)} in {done.output.rstrip('/')}/")
    for run in done.runs[:SHOWN_RUNS]:
        settings = {**run.settings, **({"seed": run.seed} if run.seed is not None else {})}
        varied = ", ".join(f"{name}={shown(value)}" for name, value in settings.items())
        click.echo(f"  - {os.path.join(done.output, run.id)}.yaml{f' ({varied})' if varied else ''}")
    if len(done.runs) > SHOWN_RUNS:
        click.echo(f"  … and {len(done.runs) - SHOWN_RUNS} more, to {done.runs[-1].id}.yaml")
    click.echo("✓ Created run_mapping.yaml")
    click.echo(f"start one: {shlex.join(done.command)}", err=True)


@lacuna.command(context_settings=HELP)
@click.argument("pattern", default="")
@click.option("--torchtune-python", metavar="PYTHON", help="The Python of torchtune's environment.")
@click.option("--verbose", is_flag=True, help="Show the traceback of an error.")
def recipes(pattern: str, torchtune_python: str | None, verbose: bool) -> None:
    """List torchtune's configs: name, model, method, devices, recipe. PATTERN: part of a name, or with * and ?."""
    from lacuna.experiment.torchtune import list_recipes

    found = list_recipes(pattern, torchtune_python)
    if not found:
        known = [recipe.config for recipe in list_recipes("", torchtune_python)]
        hint = did_you_mean(pattern, [*known, *(name.partition("/")[0] for name in known)])
        raise ConfigError(f"no config of torchtune's matches {pattern!r}{hint}; `lacuna recipes` lists all")
    rows = [(r.config, r.model, r.method, "several" if r.distributed else "one", r.recipe) for r in found]
    rows.insert(0, ("config", "model", "method", "devices", "recipe"))
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    for row in rows:
        click.echo("  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip())


@lacuna.command(context_settings=HELP)
@click.argument("target", metavar="EXPERIMENT.yaml|CONFIG|DIR")
@click.option("--cluster", metavar="FILE", help="Settings of the cluster; an experiment's slurm section goes over it.")
@click.option("--output", metavar="DIR", default="slurm", show_default=True, help="Where scripts and logs go.")
@click.option(
    "--configs", metavar="DIR", default="configs", show_default=True, help="Where an experiment's configs go."
)
@click.option("--force", is_flag=True, help="Replace the configs of another experiment there.")
@click.option("--submit", is_flag=True, help="Submit the scripts by sbatch.")
@click.option("--torchtune-python", metavar="PYTHON", help="The Python of torchtune's environment.")
@click.option("--verbose", is_flag=True, help="Show the traceback of an error.")
def slurm(
    target: str,
    cluster: str | None,
    output: str,
    configs: str,
    force: bool,
    submit: bool,
    torchtune_python: str | None,
    verbose: bool,
) -> None:
    """Write batch scripts: one array for an experiment or a folder of generated configs, one job for one config."""
    from lacuna.launch.slurm import write_scripts

    written = write_scripts(target, cluster, output, configs, force, torchtune_python)
    for note in written.notes:
        click.echo(f"note: {note}", err=True)
    for script, job in zip(written.scripts, written.jobs, strict=True):
        runs = f"runs {job.offset} to {job.offset + job.count - 1}" if job.offset is not None else "one run"
        click.echo(f"{os.path.relpath(script)}: {runs} of {os.path.relpath(job.target)}")
    if submit:
        for id in written.submit():
            click.echo(f"submitted: job {id}")
        return
    click.echo("submit with --submit, or by:\n  " + "\n  ".join(written.commands()), err=True)


@lacuna.command(context_settings=HELP)
@click.argument("target", metavar="MAPPING|CONFIG")
@click.argument("index", type=int, required=False)
@click.option("--sha256", help="What the mapping, or the config, must have.")
@click.option("--torchtune-python", metavar="PYTHON", help="The Python of torchtune's environment.")
@click.option("--verbose", is_flag=True, help="Show the traceback of an error.")
def start(target: str, index: int | None, sha256: str | None, torchtune_python: str | None, verbose: bool) -> None:
    """Become run INDEX of a run_mapping.yaml, or the run of one config: what a SLURM job calls."""
    from lacuna.launch.start import start as become

    sys.exit(become(target, index, sha256, torchtune_python))


@lacuna.command(context_settings=HELP)
@click.argument("where", metavar="DIR")
@click.option("--json", "as_json", is_flag=True, help="Print the rows as JSON.")
@click.option("--verbose", is_flag=True, help="Show the traceback of an error.")
def status(where: str, as_json: bool, verbose: bool) -> None:
    """Every run's state, step, loss, speed, restarts, job and reason of failure.

    DIR: a run folder, a folder of run folders, or a folder of generated configs (its run_mapping.yaml).
    """
    from lacuna.runs import status as runs

    rows = runs.table(where)
    click.echo(runs.as_json(rows) if as_json else runs.as_text(rows))


def run(command: click.Command) -> None:
    """Run a command; what the user can mend ends in one message and exit code 2."""
    debug = not {"--verbose", "-v"}.isdisjoint(sys.argv) or os.environ.get("LACUNA_DEBUG") == "1"
    try:
        command()
    except LacunaError as error:
        if debug:
            sys.excepthook(type(error), error, error.__traceback__)
        speaks = not error.is_shared or os.environ.get("RANK", "0") == "0"
        for problem in error.problems if speaks else ():
            click.echo(f"error: {problem}", err=True)
        sys.exit(error.exit_code)
    except Interrupted as interruption:
        if (message := str(interruption)) and os.environ.get("RANK", "0") == "0":
            click.echo(f"\n{message}", err=True)
        sys.exit(128 + interruption.signal_number)


def main() -> None:
    run(lacuna)


def main_pretrain() -> None:
    run(pretrain)


def main_sft() -> None:
    run(sft)


def main_finetune() -> None:
    run(finetune)
