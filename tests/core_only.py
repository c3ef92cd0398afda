"""Where an environment finds the core and what it needs, and nothing else."""

from pathlib import Path

import pytest

SITE_PACKAGES = Path(pytest.__file__).parent.parent
SOURCE = Path(__file__).parents[1] / "src"
CORE_ONLY = (
    "click", "numpy", "numpy.libs", "pydantic", "pydantic_core", "annotated_types", "typing_extensions.py",
    "typing_inspection", "psutil", "yaml", "_yaml", "tomli_w", "simpleeval.py", "rich", "pygments", "markdown_it",
    "mdurl",
)  # fmt: skip
"""Packages of the core and what they need, as folder or file names."""
