"""What was found of one thing on this machine, and how a list of such findings is shown."""

import os
from dataclasses import dataclass
from typing import Literal

import click

State = Literal["ok", "warning", "failed", "skipped"]
MARKS = {"ok": ("✓", "green"), "warning": ("!", "yellow"), "failed": ("✗", "red"), "skipped": ("-", "bright_black")}
SECRET = {"TOKEN", "KEY", "SECRET", "PASSWORD"}
"""Words in the names of environment variables whose values nobody is to see."""


@dataclass(frozen=True)
class Check:
    """found: what there is. mend: the command that mends it, or what to do. needed: without it nothing can go on."""

    name: str
    state: State
    found: str
    mend: str = ""
    needed: bool = False


@dataclass(frozen=True)
class Examination:
    """healthy: nothing that is needed has failed."""

    healthy: bool
    checks: list[Check]


def without_secrets(text: str) -> str:
    """What libraries said, without the values of this process' secret variables."""
    for name, value in os.environ.items():
        if len(value) > 5 and not SECRET.isdisjoint(name.upper().split("_")):
            text = text.replace(value, "***")
    return text


def as_text(examination: Examination) -> str:
    """A line for each check, coloured, and below it what mends it."""
    width = max(len(check.name) for check in examination.checks)
    lines: list[str] = []
    for check in examination.checks:
        mark, colour = MARKS[check.state]
        if check.state == "failed" and not check.needed:
            colour = "yellow"
        lines.append(f"{click.style(mark, fg=colour)} {check.name:{width}}  {check.found}")
        if check.mend:
            lines.append(f"  {'':{width}}  {click.style('→ ' + check.mend, fg='cyan')}")
    failed = list(dict.fromkeys(check.name for check in examination.checks if check.state == "failed" and check.needed))
    optional = [check.name for check in examination.checks if check.state == "failed" and not check.needed]
    if failed:
        lines.append(click.style(f"\nnot ready: {', '.join(failed)}", fg="red"))
    else:
        lines.append(click.style("\nready" + (f", without {', '.join(optional)}" if optional else ""), fg="green"))
    return "\n".join(lines)
