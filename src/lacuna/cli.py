"""Every command. Nothing here imports torch before a command needs it."""

import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, Literal, cast, get_args, get_origin

import click
from pydantic import TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from lacuna import __version__
from lacuna.config.files import Layer, check, flag_name, merge_layers, read_layer, without_subject
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
