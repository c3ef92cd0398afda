"""The environment that runs, and the commands of make, uv or pip that add to it: of whichever made it."""

import sys
from pathlib import Path

ENVIRONMENT = Path(sys.prefix)
CHECKOUT = Path(__file__).parents[2]
"""The folder of pyproject.toml, where lacuna runs from a checkout."""


def install_command(extra: str, environment: Path = ENVIRONMENT, checkout: Path = CHECKOUT) -> str:
    """What installs one of lacuna's extras: in the environment of a checkout, by its own tool."""
    is_its_own = environment.resolve() == (checkout / ".venv").resolve()
    if is_its_own and _is_made_by_uv(environment):
        return f"uv sync --extra {extra}"
    if is_its_own and (environment / "installed").is_file():
        return "make install --always-make"
    return pip_command("install", f"'lacuna[{extra}]'", environment)


def pip_command(verb: str, arguments: str, environment: Path = ENVIRONMENT) -> str:
    """pip's command, or uv's where uv made the environment: it has no pip."""
    if _is_made_by_uv(environment):
        return f"uv pip {verb} --python {environment} {arguments}"
    return f"pip {verb} {arguments}"


def _is_made_by_uv(environment: Path) -> bool:
    """Whether uv run, uv venv or uv tool made it."""
    settings = environment / "pyvenv.cfg"
    return settings.is_file() and any(line.startswith("uv = ") for line in settings.read_text().splitlines())
