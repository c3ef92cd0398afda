"""Options of commands, and the settings of the flat configs as flags."""

from collections.abc import Callable, Sequence
from typing import Any, Literal, cast, get_args, get_origin

import click
from pydantic import TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from lacuna.config.files import Layer, check, flag_name, merge_layers, read_layer, without_subject
from lacuna.config.training import TrainingConfig
from lacuna.errors import ConfigError
from lacuna.words import shown

FLAGS = "the command line"
HELP = {"max_content_width": 110}
"""How click lays out a command's help."""
VERBOSE = click.option("--verbose", is_flag=True, expose_value=False, help="Show the traceback of an error.")
"""Each command takes it; who runs the command looks for it (lacuna.cli.main)."""


def json_option(help: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """`--json`, which the command gets as `as_json`."""
    return click.option("--json", "as_json", is_flag=True, help=help)


def config_options(model: type[TrainingConfig]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """One flag for every setting, with its documentation and default."""

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        for name, field in reversed(model.model_fields.items()):
            if name == "trainer":
                continue
            default = "required" if field.is_required() else f"default: {shown(field.default)}"
            text = f"{field.description}  [{default}]"
            command = click.option(flag_name(name), name, metavar=_metavar(field), help=text)(command)
        return command

    return decorate


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
    from lacuna.config.trainers import CONFIGS, trainer_of

    layers = [*(read_layer(file) for file in files), flag_layer(model, flags)]
    for layer in layers:
        wanted = trainer_of(layer.values)
        if isinstance(wanted, str) and wanted in CONFIGS and CONFIGS[wanted] is not model:
            raise ConfigError(f"{layer.where('trainer')}: this is a config for {wanted!r}: use `lacuna {wanted}`")
    values, origins = merge_layers(layers, model.alternatives)
    return check(model, values, origins), origins
