"""lacuna: one experiment file in, trained, resumable, comparable language models out."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lacuna.experiment.generator import generate
    from lacuna.launch.experiment import run

__all__ = ["__version__", "generate", "run"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """What is here is imported when it is asked for, so that `lacuna --help` need not wait."""
    if name == "generate":
        from lacuna.experiment.generator import generate

        return generate
    if name == "run":
        from lacuna.launch.experiment import run

        return run
    raise AttributeError(f"module 'lacuna' has no attribute {name!r}")
