"""run_mapping.yaml, read. Runs are cut out of the text and parsed one by one: all of 10,000 would take two seconds."""

import os
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from lacuna.config.yaml_format import parse_yaml
from lacuna.errors import ConfigError
from lacuna.experiment.folder import MAPPING, SEAL, digest

PLAIN = re.compile(r"[A-Za-z_./][\w./=+ -]*[\w/]")
"""Text that YAML writes without quotes and that is surely no number, date or null when it has a slash or digits."""


@dataclass(frozen=True)
class RunMapping:
    """file: absolute. sha256: of all but the first line, which holds it. items: the text of each run."""

    file: Path
    sha256: str
    head: dict[str, Any]
    items: list[str]

    def entry(self, index: int) -> dict[str, Any]:
        """A run's id, params, seed, config, sha256 and output_dir. Raises ConfigError where there is no such run."""
        if not 0 <= index < len(self.items):
            raise ConfigError(f"{self.file}: there is no run {index}: it has runs 0 to {len(self.items) - 1}")
        found: dict[str, Any] = parse_yaml(f"runs:\n{self.items[index]}", str(self.file))[0]["runs"][0]
        return found

    @cached_property
    def directory(self) -> Path:
        """Where its runs start, from which relative paths in its configs are: that of `lacuna generate`.

        As it is called from the working directory, which it is itself where the other is not there any more.
        """
        place = self.file.parent / Path(self.head.get("directory", self.file)).expanduser()
        return Path(os.path.relpath(place.resolve())) if place.is_dir() else Path()

    @cached_property
    def places(self) -> list[tuple[str, str | None]]:
        """Id and output_dir of every run."""
        pairs = [
            (re.search(r"^- id: (.*)$", item, re.MULTILINE), re.search(r"^  output_dir: (.*)$", item, re.MULTILINE))
            for item in self.items
        ]
        return [(_scalar(id[1]) or "", _scalar(place[1])) for id, place in pairs if id and place]

    def folder(self, index: int) -> Path | None:
        """The run folder of a run; None where nothing says where it is."""
        place = self.places[index][1]
        return self.directory / Path(place).expanduser() if place is not None else None


def read_mapping(path: str | Path) -> RunMapping:
    """A run_mapping.yaml, or the one of a folder. Raises ConfigError: not there, not generated, or changed since."""
    file = Path(path, MAPPING) if Path(path).is_dir() else Path(path)
    try:
        head, _, body = file.read_bytes().partition(b"\n")
    except OSError as error:
        wanted = "the folder or the run_mapping.yaml that `lacuna generate EXPERIMENT.yaml --output DIR` writes"
        raise ConfigError(f"{file}: cannot be read: {error.strerror}; it takes {wanted}") from None
    if head != SEAL + digest(body).encode():
        raise ConfigError(f"{file}: not as `lacuna generate` wrote it: generate it again")
    experiment, _, runs = body.decode().partition("\nruns:\n")
    items = re.split(r"^(?=- id: )", runs, flags=re.MULTILINE)[1:]
    return RunMapping(file.absolute(), digest(body), parse_yaml(experiment, str(file))[0], items)


def _scalar(text: str) -> str | None:
    if PLAIN.fullmatch(text) and ("/" in text or "_" in text):
        return text
    value = parse_yaml(f"value: {text}", "")[0]["value"]
    return None if value is None else str(value)
