"""Every command. Nothing here imports torch before a command needs it."""

import json
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from typing import Any, Literal, cast, get_args, get_origin

import click
from pydantic import TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from lacuna import __version__
from lacuna.config.files import Layer, check, did_you_mean, flag_name, merge_layers, read_layer, without_subject
from lacuna.config.training import ALTERNATIVES, TRAINERS, TrainingConfig
from lacuna.errors import ConfigError, Interrupted, LacunaError, MissingExtraError

FLAGS = "the command line"
YIELDING_THREADS = ("OMP_WAIT_POLICY", "PASSIVE")
"""On a CPU that others use too, OpenMP's threads otherwise spin while they wait: up to five times slower."""


def config_options(model: type[TrainingConfig]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """One flag for every setting, with its documentation and default."""

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        for name, field in reversed(model.model_fields.items()):
            if name == "trainer":
                continue
            default = "required" if field.is_required() else f"default: {_shown(field.default)}"
            text = f"{field.description}  [{default}]"
            command = click.option(flag_name(name), name, metavar=_metavar(field), help=text)(command)
        return command

    return decorate


def _shown(value: Any) -> str:
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _metavar(field: FieldInfo) -> str:
    alternatives = get_args(field.annotation) or (field.annotation,)
    words = [word for part in alternatives for word in (get_args(part) if get_origin(part) is Literal else ())]
    words += [] if get_origin(field.annotation) is not Literal else list(alternatives)
    if bool in alternatives:
        words += ["true", "false"]
    if words:
        return f"[{'|'.join(words)}]"
    kinds = str(field.annotation)
    return "INTEGER" if "int" in kinds else "NUMBER" if "float" in kinds else "TEXT"


def config_files(tokens: Sequence[str]) -> list[str]:
    """`@ a.toml @ b.toml` or `@a.toml` → the files. Raises ConfigError for anything else."""
    files: list[str] = []
    expects_file = False
    for token in tokens:
        if expects_file:
            files.append(token)
            expects_file = False
        elif token == "@":
            expects_file = True
        elif token.startswith("@"):
            files.append(token[1:])
        else:
            raise ConfigError(f"{token!r} is not a flag; a config file is given as '@ {token}'")
    if expects_file:
        raise ConfigError("a config file must follow '@'")
    return files


def flag_layer(model: type[TrainingConfig], flags: dict[str, str | None]) -> Layer:
    """The flags that were given, as values of their settings' types. `none` unsets an optional setting."""
    values: dict[str, Any] = {}
    problems: list[str] = []
    for name, text in flags.items():
        if text is None:
            continue
        field = model.model_fields[name]
        try:
            optional = "None" in str(field.annotation)
            adapter: TypeAdapter[Any] = TypeAdapter(cast(Any, field.annotation))
            values[name] = None if optional and text.lower() == "none" else adapter.validate_strings(text)
        except ValidationError as error:
            message = error.errors()[-1]["msg"]
            problems.append(f"{flag_name(name)} {text!r}: {without_subject(message)}")
    if problems:
        raise ConfigError(problems)
    return Layer(FLAGS, values)


def resolve(
    model: type[TrainingConfig], files: Sequence[str], flags: dict[str, str | None]
) -> tuple[TrainingConfig, dict[str, Layer]]:
    """Files under flags, later over earlier: the checked config, and the layer of each value that is no default."""
    layers = [*(read_layer(file) for file in files), flag_layer(model, flags)]
    for layer in layers:
        wanted = layer.values.get("trainer")
        if isinstance(wanted, str) and wanted in TRAINERS and TRAINERS[wanted] is not model:
            raise ConfigError(f"{layer.where('trainer')}: this is a config for {wanted!r}: use `lacuna {wanted}`")
    values, origins = merge_layers(layers, ALTERNATIVES)
    return check(model, values, origins), origins


def run_trainer(name: str, files: tuple[str, ...], flags: dict[str, str | None]) -> None:
    config, _ = resolve(TRAINERS[name], config_files(files), flags)
    from lacuna.data.hub import stay_offline_if_unreachable

    stay_offline_if_unreachable(config)
    os.environ.setdefault(*YIELDING_THREADS)
    try:
        from lacuna.train.start import train
    except ModuleNotFoundError as error:
        raise MissingExtraError("train", error.name or "torch") from error
    train(config, [*sys.argv])


HELP = {"max_content_width": 110}


@click.group(context_settings=HELP)
@click.version_option(__version__, prog_name="lacuna")
@click.option("--verbose", is_flag=True, help="Show the traceback of an error.")
def lacuna(verbose: bool) -> None:
    """Train language models, and know that the run was the one you asked for."""


@lacuna.command(context_settings=HELP)
@click.argument("files", nargs=-1, metavar="[@ FILE]...")
@config_options(TRAINERS["pretrain"])
@click.option("--verbose", is_flag=True, help="Show the traceback of an error.")
def pretrain(files: tuple[str, ...], verbose: bool, **flags: str | None) -> None:
    """Next-token prediction on plain text.

    Settings come from TOML or YAML files, each after an @, and from flags; later ones win.
    """
    run_trainer("pretrain", files, flags)


@lacuna.command(context_settings=HELP)
@click.argument("files", nargs=-1, metavar="[@ FILE]...")
@config_options(TRAINERS["sft"])
@click.option("--verbose", is_flag=True, help="Show the traceback of an error.")
def sft(files: tuple[str, ...], verbose: bool, **flags: str | None) -> None:
    """Supervised fine-tuning: the loss is on the assistant's tokens only.

    Settings come from TOML or YAML files, each after an @, and from flags; later ones win.
    """
    run_trainer("sft", files, flags)


@lacuna.command(context_settings={**HELP, "ignore_unknown_options": True})
@click.argument("arguments", nargs=-1, required=True, metavar="CONFIG... [--SETTING VALUE]...")
@click.option("--trainer", type=click.Choice(list(TRAINERS)), help="Where no file says it by its `trainer` key.")
@click.option("--verbose", is_flag=True, help="Show the traceback of an error.")
def explain(arguments: tuple[str, ...], trainer: str | None, verbose: bool) -> None:
    """Print every setting of CONFIG..., and the file and line, flag or default that it came from."""
    first_flag = next((i for i, token in enumerate(arguments) if token.startswith("--")), len(arguments))
    files = [token.lstrip("@") for token in arguments[:first_flag] if token != "@"]
    given = [layer.values.get("trainer") for layer in map(read_layer, files)]
    named = [name for name in given if isinstance(name, str) and name in TRAINERS]
    if not files:
        raise ConfigError("explain needs a config file, and files come before flags")
    if trainer is None and not named:
        raise ConfigError(f"{', '.join(files)}: no `trainer` key says what this is for; pass --trainer pretrain or sft")
    command = {"pretrain": pretrain, "sft": sft}[trainer or named[-1]]
    flags = command.make_context("explain", list(arguments[first_flag:])).params
    stray = flags.pop("files")
    if stray:
        raise ConfigError(f"{stray[0]!r}: files come before flags")
    del flags["verbose"]
    config, origins = resolve(TRAINERS[trainer or named[-1]], files, flags)
    rows = [(name, _shown(value), _origin(name, origins)) for name, value in config.model_dump().items()]
    widths = [max(len(str(row[column])) for row in rows) for column in (0, 1)]
    for name, value, origin in rows:
        click.echo(f"{name:{widths[0]}}  {value!s:{widths[1]}}  {origin}")


def _origin(name: str, origins: dict[str, Layer]) -> str:
    if name not in origins:
        return "default"
    return flag_name(name) if origins[name].name == FLAGS else origins[name].where(name)


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
        shown = ", ".join(f"{name}={_shown(value)}" for name, value in settings.items())
        click.echo(f"  - {os.path.join(done.output, run.id)}.yaml{f' ({shown})' if shown else ''}")
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


def run(command: click.Command) -> None:
    """Run a command; what the user can mend ends in one message and exit code 2."""
    debug = "--verbose" in sys.argv or os.environ.get("LACUNA_DEBUG") == "1"
    try:
        command()
    except LacunaError as error:
        if debug:
            sys.excepthook(type(error), error, error.__traceback__)
        for problem in error.problems:
            click.echo(f"error: {problem}", err=True)
        sys.exit(2)
    except Interrupted as interruption:
        click.echo(f"\n{interruption}", err=True)
        sys.exit(128 + interruption.signal_number)


def main() -> None:
    run(lacuna)


def main_pretrain() -> None:
    run(pretrain)


def main_sft() -> None:
    run(sft)
