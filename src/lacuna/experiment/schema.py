"""experiment.yaml: what varies, what stays, and from which config."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from lacuna.config.files import Layer, check, read_layer
from lacuna.config.slurm import SlurmSettings
from lacuna.config.trees import leaves

MOST_RUNS = 100_000
Named = Annotated[str, Field(min_length=1)]


class Experiment(BaseModel):
    """One question asked of N runs: the full product of the variables over one base config."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, use_attribute_docstrings=True, defer_build=True)

    experiment_name: Named
    """Names the experiment in mapping and report."""
    base_config: Named | None = None
    """A torchtune config by name, such as llama3_2/1B_lora_single_device. Or give base_config_file."""
    base_config_file: Named | None = None
    """Your own torchtune config, or a lacuna config (its `trainer` key says which); from the working directory, else
    from the experiment file's."""
    recipe: Named | None = None
    """The torchtune recipe of an own config file, such as lora_finetune_single_device; without it, the nearest one."""
    gpus: Annotated[int, Field(gt=0)] | None = None
    """Devices of a torchtune run: more than one takes the distributed recipe."""
    question: str | None = None
    """What the experiment asks."""
    hypothesis: str | None = None
    """What you expect."""
    researcher: str | None = None
    """Who asks."""
    tags: list[str] = []
    """For sorting."""
    variables: dict[str, list[Any]] = {}
    """Name or dotted path to its values; every combination is a run."""
    paired: list[dict[str, Any]] = []
    """Settings that vary together, as one variable."""
    seeds: list[Annotated[int, Field(ge=0)]] = []
    """Every combination runs once with each."""
    controls: dict[str, Any] = {}
    """Name, dotted path or nested mapping to the value that all runs share."""
    derived: dict[str, str] = {}
    """Name or dotted path to arithmetic over the other names, such as 2 * lora_rank."""
    exclude: list[dict[str, Any]] = []
    """Combinations to leave out: every run that agrees with all settings of one entry."""
    slurm: SlurmSettings | None = None
    """What a cluster has to know, for `lacuna slurm`; no run's config changes by it."""

    @field_validator("variables", mode="before")
    @classmethod
    def _have_values(cls, variables: Any) -> Any:
        if not isinstance(variables, dict):
            return variables
        problems = []
        variables = dict(leaves(variables))
        for name, values in variables.items():
            if not isinstance(values, list) or not values:
                problems.append(f"{name!r} needs a list of values, not {values!r}; a fixed value goes under controls")
            elif (twice := _first_repeated(values)) is not None:
                problems.append(f"{name!r} has {twice[0]!r} twice: the runs would be the same")
        if problems:
            raise ValueError("\n".join(f"variables: {problem}" for problem in problems))
        return variables

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        problems = []
        if (self.base_config is None) == (self.base_config_file is None):
            problems.append("give either base_config (a torchtune config's name) or base_config_file (a path)")
        if len(set(self.seeds)) < len(self.seeds):
            problems.append("seeds: the same seed twice gives the same run twice")
        if any(set(pair) != set(self.paired[0]) or not pair for pair in self.paired):
            problems.append("paired: every entry sets the same names")
        if any(pair in self.paired[:i] for i, pair in enumerate(self.paired)):
            problems.append("paired: the same entry twice gives the same run twice")
        sizes = [*map(len, self.variables.values()), len(self.paired) or 1, len(self.seeds) or 1]
        if math.prod(sizes) > MOST_RUNS:
            problems.append(f"variables: {math.prod(sizes)} combinations; the limit is {MOST_RUNS}")
        if not all(self.exclude):
            problems.append("exclude: an empty entry would leave out every run")
        if problems:
            raise ValueError("\n".join(problems))
        return self


def _first_repeated(values: list[Any]) -> tuple[Any] | None:
    seen = set()
    for value in values:
        is_plain = isinstance(value, str | int | float | None)
        key = (type(value) is bool, value) if is_plain else (None, repr(value))
        if key in seen:
            return (value,)
        seen.add(key)
    return None


def read_experiment(source: str | Path | Mapping[str, Any]) -> tuple[Experiment, Layer]:
    """From a file or a mapping; the layer knows the line of every setting. Raises ConfigError with all problems."""
    layer = Layer("the experiment", dict(source)) if isinstance(source, Mapping) else read_layer(source)
    section = layer.values.get("slurm")
    names = [*layer.values, *(f"slurm.{name}" for name in (section if isinstance(section, dict) else {}))]
    return check(Experiment, layer.values, dict.fromkeys(names, layer), flag=None), layer
