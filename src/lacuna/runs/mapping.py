"""A run of an experiment, and run_mapping.yaml, which lists them.

Runs are cut out of the text and parsed one by one: all of 10,000 would take two seconds.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from lacuna.config.yaml_format import parse_yaml
from lacuna.errors import ConfigError
from lacuna.files import digest
from lacuna.words import varies

PLAIN = re.compile(r"[A-Za-z_./][\w./=+ -]*[\w/]")
"""Text that YAML writes without quotes and that is surely no number, date or null when it has a slash or digits."""


@dataclass(frozen=True)
class Run:
    """A run of an experiment, whoever looks at it.

    settings: what varies, under the user's names, without the experiment's seeds (in the mapping: `params`).
    output_dir: as its config has it; None where that names none.
    """

    id: str
    settings: Mapping[str, Any]
    seed: int | None
    output_dir: str | None

    @property
    def varies(self) -> str:
        """Its settings, as `learning_rate=0.001, lora_rank=8`."""
        return varies(self.settings)


@dataclass(frozen=True)
class GeneratedRun(Run):
    """An entry of a mapping. config: its file, which had this sha256. directory: where it starts."""

    index: int
    trainer: str
    config: Path
    sha256: str
    directory: Path

    @cached_property
    def folder(self) -> Path:
        """The run folder. Raises ConfigError where nothing says where it is."""
        if self.output_dir is None:
            raise ConfigError("it has no output_dir, by which it could be known again: give the experiment one")
        return self.directory / Path(self.output_dir).expanduser()


@dataclass(frozen=True)
class RunMapping:
    """file: absolute. sha256: of all but the first line, which holds it. items: the text of each run."""

    file: Path
    sha256: str
    head: dict[str, Any]
    items: list[str]

    def run(self, index: int) -> GeneratedRun:
        """Raises ConfigError where there is no such run."""
        if not 0 <= index < len(self.items):
            raise ConfigError(f"{self.file}: there is no run {index}: it has runs 0 to {len(self.items) - 1}")
        entry = parse_yaml(f"runs:\n{self.items[index]}", str(self.file))[0]["runs"][0]
        return GeneratedRun(
            id=entry["id"],
            settings=entry["params"],
            seed=entry["seed"],
            output_dir=entry["output_dir"],
            index=index,
            trainer=self.head["trainer"],
            config=self.file.with_name(entry["config"]),
            sha256=entry["sha256"],
            directory=self.directory,
        )

    @cached_property
    def directory(self) -> Path:
        """Where its runs start, from which relative paths in its configs are: that of `lacuna generate`.

        As it is called from the working directory, which it is itself where the other is not there any more.
        """
        found = self.file.parent / Path(self.head.get("directory", self.file)).expanduser()
        return Path(os.path.relpath(found.resolve())) if found.is_dir() else Path()

    @cached_property
    def folders(self) -> dict[str, Path | None]:
        """The run folder of every run, by its id; None where nothing says where it is."""
        pairs = [
            (re.search(r"^- id: (.*)$", item, re.MULTILINE), re.search(r"^  output_dir: (.*)$", item, re.MULTILINE))
            for item in self.items
        ]
        written = {_scalar(id[1]) or "": _scalar(output_dir[1]) for id, output_dir in pairs if id and output_dir}
        return {
            id: None if output_dir is None else self.directory / Path(output_dir).expanduser()
            for id, output_dir in written.items()
        }

    @cached_property
    def ids(self) -> list[str]:
        """Of every run, in the order of their indices."""
        return list(self.folders)


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


MAPPING = "run_mapping.yaml"
SEAL = b"# generated by lacuna; sha256 of what follows: "


def seal(text: str) -> str:
    """The mapping with a first line by which it is known again, unless someone has changed it."""
    return f"{SEAL.decode()}{digest(text.encode())}\n{text}"
