"""The commands around the machine. Nothing here imports torch."""

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from lacuna.cli.flags import HELP, VERBOSE, json_option
from lacuna.errors import MissingExtraError, needs_extra
from lacuna.words import aligned

if TYPE_CHECKING:
    from lacuna.machine.detect import Device


def _devices() -> "list[Device]":
    from lacuna.machine.detect import accelerators

    with needs_extra("train", "torch"):
        return accelerators()


def with_preset(files: Sequence[str]) -> list[str]:
    """`auto` among the files replaced by the preset that fits this machine; which one, and why, is said."""
    from lacuna.machine.presets import AUTO, replace_auto

    if AUTO not in files:
        return list(files)
    chosen, why = replace_auto(files, _devices())
    if os.environ.get("RANK", "0") == "0":
        click.echo(why)
    return chosen


@click.command(context_settings=HELP)
@json_option("Print them as JSON.")
@VERBOSE
def presets(as_json: bool) -> None:
    """List the shipped configs, what each is for, and which one `finetune --config auto` takes here."""
    from lacuna.machine.presets import Choice, choose_preset, list_presets

    rows = list_presets()
    try:
        choice = choose_preset(_devices())
    except MissingExtraError as error:
        choice = Choice(None, str(error))
    if as_json:
        click.echo(json.dumps({"presets": [asdict(row) for row in rows], "auto": asdict(choice)}, ensure_ascii=False))
        return
    for line in aligned([(row.file, row.trainer, row.purpose) for row in rows]):
        click.echo(line)
    click.echo(f"\nfinetune --config auto takes {choice.file or 'none of them here'}: {choice.reason}")


@click.command(context_settings=HELP)
@click.argument("configs", nargs=-1, metavar="[CONFIG]...")
@json_option("Print everything as one JSON object.")
@VERBOSE
def doctor(configs: tuple[str, ...], as_json: bool) -> None:
    """Try what training needs on this machine, and say how to mend what does not work.

    With CONFIG (of any trainer, torchtune's too), or a folder of generated configs: also whether that run, or these,
    could start here. The exit code is 1 where they could not.
    """
    from lacuna.preflight.check import as_text
    from lacuna.preflight.doctor import examine

    examination = examine(configs)
    text = json.dumps(asdict(examination), ensure_ascii=False) if as_json else as_text(examination)
    click.echo(text, color=False if os.environ.get("NO_COLOR") else None)
    sys.exit(0 if examination.healthy else 1)
