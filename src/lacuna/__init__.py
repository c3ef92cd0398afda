"""lacuna: one experiment file in, trained, resumable, comparable language models out."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lacuna.experiment.generator import generate
    from lacuna.reports.make import report

__all__ = ["__version__", "generate", "report"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """`lacuna.generate` and others are imported when they are asked for, so that `lacuna --help` need not wait."""
    if name == "generate":
        from lacuna.experiment.generator import generate

        return generate
    if name == "report":
        from lacuna.reports.make import report

        return report
    raise AttributeError(f"module 'lacuna' has no attribute {name!r}")
