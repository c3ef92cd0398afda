"""SlurmSettings: what a cluster has to know about runs. The `slurm:` section of an experiment, or a file of its own."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, Field, model_validator

from lacuna.config.files import Layer, check, merge_layers, read_layer
from lacuna.config.training import STRICT, PositiveInt

TIME = re.compile(r"(?:(?P<days>\d+)-)?(?P<first>\d+)(?::(?P<second>\d+))?(?::(?P<third>\d+))?")
OWN_OPTIONS = {
    "partition": "partition", "account": "account", "qos": "qos", "time": "time", "nodes": "nodes",
    "gpus-per-node": "gpus", "cpus-per-task": "cpus_per_node", "mem": "memory", "constraint": "constraint",
    "exclude": "exclude", "array": "parallel", "signal": "lead", "requeue": "requeue", "no-requeue": "requeue",
    "job-name": "", "chdir": "", "output": "", "error": "", "open-mode": "", "ntasks-per-node": "", "ntasks": "",
    "dependency": "", "parsable": "", "wrap": "", "test-only": "", "help": "", "usage": "", "version": "",
}  # fmt: skip
"""sbatch's options that `extra` cannot set, and the setting to use instead, where there is one."""


def _as_text(value: Any) -> Any:
    return str(value) if type(value) in (int, float) else value


def _one_line(text: str) -> str:
    if re.search(r"[\x00-\x1f\x7f]", text):
        raise ValueError("a line break or another control character cannot stand in a batch script's option")
    return text


def _no_null(text: str) -> str:
    if "\0" in text:
        raise ValueError("a shell cannot hold a null character")
    return text


def _no_flag(text: str) -> str:
    if text.startswith("-"):
        raise ValueError("begins with a dash, and would be read as an option")
    return text


def _is_time(text: str) -> str:
    if not TIME.fullmatch(text) or seconds_of(text) == 0:
        raise ValueError(
            "is no time of SLURM's: write minutes, minutes:seconds, hours:minutes:seconds, days-hours, "
            'days-hours:minutes or days-hours:minutes:seconds, such as "04:00:00" or "2-12"'
        )
    return text


def _is_option(name: str) -> str:
    if not re.fullmatch(r"[a-z][a-z0-9-]*", name):
        raise ValueError("is no option of sbatch's: write its long name without dashes, such as mail-type")
    for own, setting in OWN_OPTIONS.items():
        if own.startswith(name):
            instead = f"the setting {setting} is for it" if setting else "lacuna writes it itself"
            raise ValueError(f"--{own} cannot be given in extra: {instead}")
    return name


Line = Annotated[str, BeforeValidator(_as_text), Field(min_length=1), AfterValidator(_one_line)]
Word = Annotated[Line, AfterValidator(_no_flag)]
ShellText = Annotated[str, BeforeValidator(_as_text), AfterValidator(_no_null)]
VariableName = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
OptionValue = Annotated[
    str, BeforeValidator(lambda value: "" if value is True else _as_text(value)), AfterValidator(_one_line)
]


class SlurmSettings(BaseModel):
    """Resources of one run, how its environment is made, and what happens at the time limit."""

    model_config = STRICT

    partition: Line | None = None
    """Partition, or several with commas."""
    account: Line | None = None
    """Account to charge."""
    qos: Line | None = None
    """Quality of service."""
    time: Annotated[Line, AfterValidator(_is_time)] | None = None
    """Time limit of one start, such as "04:00:00". A run that needs longer is saved, requeued and resumed."""
    nodes: PositiveInt = 1
    """Nodes of one run; on more than one, torchrun is started on each by srun."""
    gpus: Annotated[int, Field(ge=0)] | None = None
    """GPUs to request on each node. Default: a run's processes on a node, none on a CPU. 0: requested by extra.gres."""
    gpu_type: Annotated[Word, Field(pattern=r"^[A-Za-z0-9_.-]+$")] | None = None
    """Kind of GPU, as the cluster calls it: h100."""
    cpus_per_node: PositiveInt | None = None
    """Cores of a run on each node."""
    memory: Annotated[Line, Field(pattern=r"^\d+[KMGT]?B?$")] | None = None
    """Main memory on each node, such as 64G."""
    constraint: Line | None = None
    """Features that the nodes must have."""
    exclude: Line | None = None
    """Nodes to leave out."""
    parallel: PositiveInt | None = None
    """Runs of an experiment at the same time; all others wait."""
    lead: Annotated[int, Field(ge=1, le=65535)] = 300
    """Seconds before the time limit at which a run is told to save: longer than a step and a save."""
    requeue: bool = True
    """Go on after the time limit, preemption and node failure."""
    max_requeues: Annotated[int, Field(ge=0)] = 20
    """Restarts of a run, for whatever reason, after which it is no longer requeued at the time limit."""
    modules: list[Word] = []
    """Environment modules to load."""
    venv: Line | None = None
    """Folder of a Python virtual environment to activate."""
    conda: Word | None = None
    """Name or folder of a conda environment to activate."""
    setup: list[ShellText] = []
    """Lines of bash, run in order before the training; the first that fails ends the job."""
    container: Line | None = None
    """Image that Apptainer runs the training in, with lacuna installed."""
    python: Line | None = None
    """Python that has lacuna. Default: `python` of venv, conda or container, else the one that writes the scripts."""
    environment: dict[VariableName, ShellText] = {}
    """Variables to export, taken literally: `$HOME` stays `$HOME` (setup lines are expanded)."""
    extra: dict[Annotated[str, AfterValidator(_is_option)], OptionValue] = {}
    """Further options of sbatch by their long names: `mail-type: END`, `exclusive: true`."""
    max_array_size: PositiveInt | None = None
    """The cluster's MaxArraySize. Default: what `scontrol show config` says, else 1001."""

    @model_validator(mode="after")
    def _settings_agree(self) -> Self:
        problems = []
        environments = [name for name in ("venv", "conda", "container") if getattr(self, name) is not None]
        if len(environments) > 1:
            problems.append(f"{' and '.join(environments)}: each brings a Python of its own; keep one")
        if self.gpu_type is not None and self.gpus == 0:
            problems.append("gpu_type needs GPUs, and gpus is 0")
        if self.time is not None and self.lead >= seconds_of(self.time):
            problems.append(f"lead {self.lead} s is not shorter than the time limit {self.time}")
        if not self.requeue and "max_requeues" in self.model_fields_set:
            problems.append("max_requeues has nothing to count, as requeue is false")
        if problems:
            raise ValueError("\n".join(problems))
        return self


def seconds_of(time: str) -> int:
    """Seconds of a time as SLURM reads it: `90` are minutes, `1:30` minutes and seconds, `1-2` a day and two hours."""
    found = TIME.fullmatch(time)
    assert found is not None
    days, first, second, third = (int(part or 0) for part in found.group("days", "first", "second", "third"))
    if found["days"] is not None or found["third"] is not None:
        return ((days * 24 + first) * 60 + second) * 60 + third
    return first * 60 + second


def load_slurm(file: str | Path | None, section: Mapping[str, Any], name: str) -> SlurmSettings:
    """Settings of a file and, over it, of an experiment's `slurm:` section. Raises ConfigError with all problems.

    name: where the section stands, for messages.
    """
    layers = [*([read_layer(file)] if file is not None else []), Layer(name, dict(section))]
    values, origins = merge_layers(layers, [])
    return check(SlurmSettings, values, origins, flag=None)
