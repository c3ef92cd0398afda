"""Every command. Nothing here imports torch before a command needs it."""

import gc
import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import click

from lacuna.cli import chat as chat_commands
from lacuna.cli import data as data_commands
from lacuna.cli import experiment as experiment_commands
from lacuna.cli import plan as plan_commands
from lacuna.cli import platform as platform_commands
from lacuna.cli import replay as replay_commands
from lacuna.cli import report as report_commands
from lacuna.cli import run as run_commands
from lacuna.cli.flags import FLAGS, HELP, VERBOSE, config_files, config_options, resolve
from lacuna.config.files import Layer, flag_name, read_layer
from lacuna.config.training import FLAT, TrainingConfig
from lacuna.config.trees import leaves
from lacuna.errors import ConfigError, Interrupted, LacunaError, needs_extra
from lacuna.version import __version__
from lacuna.visible import visible
from lacuna.words import aligned, shown

FILES = "YAML or TOML; later ones win. auto: the shipped preset that fits this machine."

DRY_RUN = click.option(
    "--dry-run", is_flag=True, help="Show every setting, the plan, and what would stop the run; train nothing."
)
AGAIN = click.option("--again", is_flag=True, help="Train a finished run anew; its folder is kept beside the new one.")

YIELDING_THREADS = ("OMP_WAIT_POLICY", "PASSIVE")
"""On a CPU that others use too, OpenMP's threads otherwise spin while they wait: up to five times slower."""


@contextmanager
def fast_imports() -> Iterator[None]:
    """Keep the garbage collector from what is imported here: torch and transformers make half a million objects that
    stay, and to look through them again and again takes a fifth of the import, and part of the run after it."""
    if "torch" in sys.modules:
        yield
        return
    gc.disable()
    try:
        yield
        gc.freeze()
    finally:
        gc.enable()


def run_trainer(name: str, files: tuple[str, ...], flags: dict[str, str | None], dry_run: bool, again: bool) -> None:
    paths = config_files(files)
    config, origins = resolve(FLAT[name], paths, flags)
    if dry_run:
        print_settings(config.written(), origins)
    elif starts_processes(config.gpus):
        launch_processes(name, config)
        return
    from lacuna.data.hub import stay_offline_if_unreachable

    stay_offline_if_unreachable(config)
    os.environ.setdefault(*YIELDING_THREADS)
    with needs_extra("train", "torch"), fast_imports():
        from lacuna.train.start import train
    if dry_run:
        show_dry_run(config, ())
    else:
        train(config, _without_again(sys.argv), paths, again)


def _without_again(words: list[str]) -> list[str]:
    """The command that goes on with a run, which was put aside once."""
    return [word for word in words if word != "--again"]


def show_dry_run(config: TrainingConfig, problems: Iterable[str]) -> None:
    """Show what is known before training, and end with exit code 1 where something would stop it."""
    from lacuna.preflight.dry_run import dry_run

    click.echo()
    would_stop = False
    for line, stops in dry_run(config, problems):
        click.echo(line)
        would_stop |= stops
    sys.exit(1 if would_stop else 0)


def starts_processes(gpus: int) -> bool:
    """Whether this command is to start the processes that train; under torchrun it is one of them."""
    return gpus > 1 and "LOCAL_RANK" not in os.environ


def launch_processes(name: str, config: TrainingConfig) -> None:
    with needs_extra("train", "torch"):
        from lacuna.launch.local import launch
    words = sys.argv[1:] if Path(sys.argv[0]).stem in ("lacuna", "__main__") else [name, *sys.argv[1:]]
    launch(words, config.gpus, config.max_restarts, config.device, config.run_folder)


@click.group(context_settings=HELP)
@click.version_option(__version__, prog_name="lacuna")
@VERBOSE
def lacuna() -> None:
    """Train language models, and know that the run was the one you asked for."""


@lacuna.command(context_settings=HELP)
@click.argument("files", nargs=-1, metavar="[@ FILE]...")
@config_options(FLAT["pretrain"])
@DRY_RUN
@AGAIN
@VERBOSE
def pretrain(files: tuple[str, ...], dry_run: bool, again: bool, **flags: str | None) -> None:
    """Next-token prediction on plain text.

    Settings come from TOML or YAML files, each after an @, and from flags; later ones win.
    """
    run_trainer("pretrain", files, flags, dry_run, again)


@lacuna.command(context_settings=HELP)
@click.argument("files", nargs=-1, metavar="[@ FILE]...")
@config_options(FLAT["sft"])
@DRY_RUN
@AGAIN
@VERBOSE
def sft(files: tuple[str, ...], dry_run: bool, again: bool, **flags: str | None) -> None:
    """Supervised fine-tuning: the loss is on the assistant's tokens only.

    Settings come from TOML or YAML files, each after an @, and from flags; later ones win.
    """
    run_trainer("sft", files, flags, dry_run, again)


@lacuna.command(context_settings=HELP)
@click.option("--config", "files", metavar="FILE", multiple=True, required=True, help=FILES)
@click.option("--device", type=click.Choice(["auto", "cuda", "mps", "cpu"]), help="Instead of the config's.")
@click.option("--resume", metavar="PATH|auto", help="A run folder, one of its checkpoints, or the newest run.")
@click.option("--set", "words", metavar="A.B=C", multiple=True, help="A setting by its dotted path, over all files.")
@DRY_RUN
@AGAIN
@click.option("--verbose", "-v", is_flag=True, help="Show every step's metrics, and the traceback of an error.")
def finetune(
    files: tuple[str, ...],
    device: str | None,
    resume: str | None,
    words: tuple[str, ...],
    dry_run: bool,
    again: bool,
    verbose: bool,
) -> None:
    """LoRA and QLoRA: train an adapter on a frozen, or quantised, model."""
    from lacuna.config.finetune import default_output_dir
    from lacuna.config.layers import load_finetune, parse_settings

    settings = parse_settings(words)
    if device is not None and "device" in settings:
        raise ConfigError("--device and --set device are both given: keep one of them")
    if device is not None:
        settings["device"] = device
    paths = platform_commands.with_preset(files)
    config, origins = load_finetune(paths, settings)
    if dry_run:
        print_settings(dict(leaves(config.written())), origins)
    from lacuna.data.hub import stay_offline_if_unreachable

    stay_offline_if_unreachable(config)
    if starts_processes(config.gpus) and not dry_run:
        if resume is None and config.output_dir is None:
            config = config.in_folder(default_output_dir(config.model_name, time.strftime("%Y%m%d-%H%M%S")))
            sys.argv += ["--set", f"training.output_dir={config.output_dir}"]
        launch_processes("finetune", config)
        return
    os.environ.setdefault(*YIELDING_THREADS)
    with needs_extra("finetune", "trl"), fast_imports():
        from lacuna.finetune.start import finetune as train
        from lacuna.finetune.start import with_folder
    if dry_run:
        show_dry_run(*with_folder(config, resume))
    else:
        train(config, resume, verbose, _without_again(sys.argv), paths, again)


@lacuna.command(context_settings={**HELP, "ignore_unknown_options": True})
@click.argument("arguments", nargs=-1, required=True, metavar="CONFIG... [--SETTING VALUE]...")
@click.option("--trainer", type=click.Choice([*FLAT, "finetune"]), help="Where no file says it by its `trainer` key.")
@VERBOSE
def explain(arguments: tuple[str, ...], trainer: str | None) -> None:
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
        settings = config.written()
    else:
        stray = flags.pop("files")
        if stray:
            raise ConfigError(f"{stray[0]!r}: files come before flags")
        del flags["dry_run"], flags["again"]
        flat, origins = resolve(FLAT[name], files, flags)
        settings = flat.written()
    print_settings(dict(leaves(settings)), origins)


def print_settings(settings: Mapping[str, object], origins: Mapping[str, Layer]) -> None:
    """Each setting, its value, and where that came from."""
    for line in aligned([(name, shown(value), _origin(name, origins)) for name, value in settings.items()]):
        click.echo(line)


def _origin(name: str, origins: Mapping[str, Layer]) -> str:
    if name not in origins:
        return "default"
    places = {FLAGS: flag_name(name), "--set": f"--set {name}"}
    return places.get(origins[name].name) or origins[name].where(name)


for around in (
    chat_commands.chat,
    chat_commands.compare,
    data_commands.merge,
    data_commands.data,
    plan_commands.plan,
    experiment_commands.generate,
    experiment_commands.recipes,
    run_commands.run,
    experiment_commands.slurm,
    experiment_commands.start,
    experiment_commands.status,
    report_commands.report,
    platform_commands.presets,
    platform_commands.doctor,
    replay_commands.replay,
):
    lacuna.add_command(around)


SHORT_HELP = {
    "chat": "Talk to a model: a run, a folder, or behind an endpoint.",
    "compare": "Several models' answers to the same prompts.",
    "data": "Show what the model will see of the data.",
    "doctor": "Try what training needs here, and say how to mend it.",
    "explain": "Where each setting of a config comes from.",
    "finetune": "LoRA and QLoRA: train an adapter.",
    "generate": "Write the config of every run of an experiment.",
    "merge": "Merge an adapter into the weights of its model.",
    "plan": "Memory, time, tokens and disk, before the run.",
    "presets": "List the shipped configs.",
    "pretrain": "Next-token prediction on plain text.",
    "recipes": "List torchtune's configs.",
    "replay": "Write a run's config again, and say what has changed.",
    "report": "Compare the arms of an experiment, with a verdict.",
    "run": "Run what is missing of an experiment.",
    "sft": "Supervised fine-tuning on conversations.",
    "slurm": "Write and submit batch scripts.",
    "start": "Become one run: what a SLURM job calls.",
    "status": "Every run's state, step, loss and speed.",
}
for name, text in SHORT_HELP.items():
    lacuna.commands[name].short_help = text


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
            click.echo(f"error: {visible(problem)}", err=True)
        sys.exit(error.exit_code)
    except Interrupted as interruption:
        if (message := str(interruption)) and os.environ.get("RANK", "0") == "0":
            click.echo(f"\n{visible(message)}", err=True)
        sys.stdout.flush()
        sys.stderr.flush()
        # All is saved and closed, but a thread of pyarrow may still read a stream, and abort at the interpreter's end.
        # ref: https://github.com/huggingface/datasets/issues/7357
        os._exit(128 + interruption.signal_number)


def main() -> None:
    run(lacuna)


def main_pretrain() -> None:
    run(pretrain)


def main_sft() -> None:
    run(sft)


def main_finetune() -> None:
    run(finetune)


def main_chat() -> None:
    run(chat_commands.chat)
