"""lacuna: one experiment file in, trained, resumable, comparable language models out."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lacuna.version import __version__

if TYPE_CHECKING:
    from lacuna.experiment.generator import generate
    from lacuna.launch.experiment import run
    from lacuna.reports.make import report

__all__ = ["__version__", "generate", "report", "run"]

PLACES = {
    "generate": "lacuna.experiment.generator",
    "run": "lacuna.launch.experiment",
    "report": "lacuna.reports.make",
}


def __getattr__(name: str) -> Any:
    """What is here is imported when it is asked for, so that `lacuna --help` need not wait."""
    if name not in PLACES:
        raise AttributeError(f"module 'lacuna' has no attribute {name!r}")
    return getattr(import_module(PLACES[name]), name)
