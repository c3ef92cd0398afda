"""lacuna: one experiment file in, trained, resumable, comparable language models out."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lacuna.experiment.generator import generate

__all__ = ["__version__", "generate"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """`lacuna.generate` is imported when it is asked for, so that `lacuna --help` need not wait."""
    if name != "generate":
        raise AttributeError(f"module 'lacuna' has no attribute {name!r}")
    from lacuna.experiment.generator import generate

    return generate
