"""The commands that talk to models. Nothing here imports torch."""

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from lacuna.chat.settings import Settings
from lacuna.cli.flags import FLAGS, HELP, VERBOSE, json_option
from lacuna.errors import ConfigError, MissingExtraError, needs_extra
from lacuna.visible import visible
from lacuna.words import shown

if TYPE_CHECKING:
    from lacuna.chat.answer import Model
    from lacuna.chat.find import FoundModel


def setting_options(**defaults: float) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A flag for each of Settings, with its documentation. defaults: other ones than its own."""

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        for name, field in reversed(Settings.model_fields.items()):
            default = defaults.get(name, field.default)
            text = f"{field.description}  [default: {shown(default)}]"
            flag = f"--{name.replace('_', '-')}"
            command = click.option(flag, name, metavar="NUMBER", default=str(default), help=text)(command)
        return command

    return decorate


CHANGED_BASE = click.option(
    "--allow-changed-base", is_flag=True, help="Take an adapter whose base model has changed since it was trained."
)


def tell(text: str) -> None:
    click.echo(visible(text), err=True)


def load_local(found: "FoundModel") -> "Model":
    from lacuna.data.hub import models_on_the_hub, stay_offline

    stay_offline(models_on_the_hub(found.model))
    with needs_extra("chat", "torch"):
        from lacuna.chat.local import load
    tell(f"loading {found.name}{f' ({found.note})' if found.note else ''}")
    model = load(found, tell)
    tell(f"{model.name} on {model.execution.device.name}, {str(model.execution.dtype).removeprefix('torch.')}")
    if not model.is_chat:
        tell("it has no chat template: each prompt is continued as plain text, by itself")
    return model


@click.command(context_settings=HELP)
@click.option("--model", metavar="DIR|NAME", help="A run, its final folder, a checkpoint, an adapter, or a hub name.")
@click.option("--adapter", metavar="DIR", help="An adapter over the model.")
@click.option("--base-url", metavar="URL", help="An OpenAI-compatible endpoint that has --model.")
@click.option("--api-key-env", metavar="VARIABLE", help="The environment variable that holds the endpoint's key.")
@click.option("--system", metavar="TEXT", help="What the model is told first.")
@CHANGED_BASE
@setting_options()
@json_option("Answer lines of standard input, each by a line of JSON.")
@VERBOSE
def chat(
    model: str | None, adapter: str | None, base_url: str | None, api_key_env: str | None, system: str | None,
    allow_changed_base: bool, as_json: bool, **settings: str,
) -> None:  # fmt: skip
    """Talk to a model: by default, the newest finished run below runs/.

    Without a terminal, each line of standard input is a prompt and a conversation of its own.
    """
    from lacuna.chat.find import find_model
    from lacuna.chat.session import Session, check_settings

    session = Session(check_settings({**settings}, FLAGS), system)
    if base_url is None and api_key_env is not None:
        raise ConfigError("--api-key-env is for an endpoint: name it by --base-url")
    if base_url is not None and (model is None or adapter is not None):
        raise ConfigError("--base-url takes --model, the name of a model that the endpoint has, and no --adapter")
    try:
        from lacuna.chat.terminal import answer_lines, converse

        if base_url is not None:
            from lacuna.chat.endpoint import connect
    except ModuleNotFoundError as error:
        raise MissingExtraError("chat", error.name or "openai") from error
    if base_url is not None:
        assert model is not None
        partner: Model = connect(base_url, model, api_key_env)
    else:
        partner = load_local(find_model(model, adapter, allow_changed_base))
    if as_json or not (sys.stdin.isatty() and sys.stdout.isatty()):
        answer_lines(partner, session, sys.stdin.buffer, as_json)
    else:
        converse(partner, session)


@click.command(context_settings=HELP)
@click.argument("models", nargs=-1, required=True, metavar="RUN_A RUN_B...")
@click.option(
    "--prompts", metavar="FILE", required=True, help=".jsonl with messages or prompt, or .txt, a prompt a line."
)
@click.option("--output", metavar="FILE", help="A new file that gets the answers as jsonl.")
@CHANGED_BASE
@setting_options(temperature=0)
@VERBOSE
def compare(
    models: tuple[str, ...], prompts: str, output: str | None, allow_changed_base: bool, **settings: str
) -> None:
    """Answers of several models to the same prompts, side by side.

    A model is whatever `chat --model` takes. Answers that the prompts' file has are shown as the reference.
    """
    from lacuna.chat.find import find_model
    from lacuna.chat.session import check_settings

    drawn = check_settings({**settings}, FLAGS)
    found = [find_model(model, None, allow_changed_base) for model in models]
    names = [model.name for model in found]
    if len(names) < 2 or len(set(names)) < len(names):
        raise ConfigError(f"compare takes two models or more, each once; given: {', '.join(names)}")
    from lacuna.data.hub import models_on_the_hub, stay_offline

    stay_offline([name for model in found for name in models_on_the_hub(model.model)])
    with needs_extra("chat", "torch"):
        from lacuna.chat import compare as models_beside
    models_beside.check_output(output)
    asked = models_beside.read_prompts(prompts)
    models_beside.show(models_beside.compare(found, asked, drawn, output, tell))
