"""`lacuna slurm`: batch scripts for an experiment, its run mapping, or one config, and their submission."""

import os
import re
import shlex
import subprocess
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lacuna.config.files import read_layer
from lacuna.config.slurm import SlurmSettings, load_slurm
from lacuna.errors import ClusterError, ConfigError, Problem
from lacuna.experiment.folder import warning_lines
from lacuna.experiment.generator import generate
from lacuna.files import digest, write_whole
from lacuna.launch.batch_script import Job, batch_script
from lacuna.launch.start import config_trainer, processes_of
from lacuna.preflight.ready import problems_of, refuse, refuse_config
from lacuna.runs.jobs import Submission, add_submission, read_submissions, spans
from lacuna.runs.mapping import MAPPING, RunMapping, read_mapping

MOST_TASKS = 1001
"""SLURM's MaxArraySize, where it has not been changed."""

OF_A_JOB = ("SLURM_ARRAY_", "SLURM_RESTART_COUNT")
"""Variables that a job submitted from within another would take for its own."""


@dataclass(frozen=True)
class Written:
    """Scripts, and the job that each is of. notes: to be said aloud."""

    scripts: list[Path]
    jobs: list[Job]
    settings: SlurmSettings
    notes: list[str]

    def commands(self) -> list[str]:
        """What submits them by hand; where runs are counted, an array waits for the one before it."""
        if not self._is_chain:
            return [shlex.join(["sbatch", str(script)]) for script in self.scripts]
        first, *rest = (shlex.quote(str(script)) for script in self.scripts)
        chained = [f'job=$(sbatch --parsable "--dependency=afterany:${{job%%;*}}" {script})' for script in rest]
        return [f"job=$(sbatch --parsable {first})", *chained]

    @property
    def _is_chain(self) -> bool:
        return self.settings.parallel is not None and len(self.scripts) > 1

    def submit(self) -> list[str]:
        """The ids of the jobs, which are written down. Raises ClusterError where SLURM refuses, or has them already."""
        folder, target = self.scripts[0].parent, self.jobs[0].target
        wanted = {(job.offset or 0) + task for job in self.jobs for task in job.tasks}
        active = _active_tasks()
        busy = [
            done.job
            for done in read_submissions(target, folder)
            if done.target == str(target)
            and any(
                done.offset + task in wanted and not active.isdisjoint((done.job, f"{done.job}_{task}"))
                for task in done.numbers()
            )
        ]
        if busy:
            raise ClusterError(
                f"{target}: job {', '.join(busy)} of it is still queued or running: wait for it, or scancel it first"
            )
        ids: list[str] = []
        for script, job in zip(self.scripts, self.jobs, strict=True):
            after = [f"--dependency=afterany:{ids[-1]}"] if self._is_chain and ids else []
            ids.append(_call(["sbatch", "--parsable", *after, str(script)]).strip().partition(";")[0])
            place = (str(script), str(job.logs))
            done = Submission(ids[-1], str(target), job.sha256, job.offset or 0, spans(job.tasks), *place, time.time())
            add_submission(done, target, folder)
        return ids


def with_configs(
    target: str | Path, configs: str, force: bool, torchtune_python: str | None
) -> tuple[str, list[str], list[Problem] | None]:
    """What an experiment's configs were written to, the notes on that, and what keeps its runs from starting here.

    Another target as it is, without notes, and None: nobody has looked whether its runs can start.
    """
    file = Path(target)
    if not file.is_file() or file.name == MAPPING or "experiment_name" not in read_layer(file).values:
        return str(target), [], None
    done = generate(file, configs, force=force, torchtune_python=torchtune_python)
    return done.output, [*done.notes, f"configs: {done.output}/ ({len(done.runs)} runs)"], done.warnings


def write_scripts(
    target: str,
    cluster: str | None = None,
    output: str = "slurm",
    configs: str = "configs",
    force: bool = False,
    torchtune_python: str | None = None,
    runs: Collection[int] | None = None,
    submits: bool = False,
) -> Written:
    """Write a batch script, or for a large experiment several, into a folder.

    target: an experiment, whose configs go into the folder `configs`; a run mapping or its folder; or one config.
    cluster: a file of settings, under the experiment's `slurm:` section. Runs of a mapping start in its
    directory, a config's in the working directory.
    force: replace the configs of another experiment there. runs: of the mapping, if not all.
    submits: refuse runs that could not start here; otherwise that is in the notes of an experiment.
    Raises ConfigError with all problems; what `generate` wrote stays then.
    """
    target, notes, problems = with_configs(target, configs, force, torchtune_python)
    if Path(target).name == MAPPING or Path(target).is_dir():
        mapping = read_mapping(target)
        section = mapping.head["experiment"].get("slurm", {})
        settings = load_slurm(cluster, section, f"{mapping.file}: slurm")
        chosen = range(len(mapping.items)) if runs is None else runs
        if submits:
            found = problems_of(mapping, chosen, torchtune_python) if problems is None else problems
            refuse(found, [mapping.ids[index] for index in chosen])
        notes += warning_lines(problems or [], mapping.head["trainer"])
        jobs = _jobs_of_mapping(mapping, settings, Path(output).absolute(), torchtune_python, chosen)
    else:
        settings = load_slurm(cluster, {}, "")
        jobs = [_job_of_config(Path(target), settings, Path(output).absolute())]
        if submits:
            refuse_config(Path(target))
    _check_setup(settings)
    texts = [batch_script(job, settings) for job in jobs]
    names = [job.name if len(jobs) == 1 else f"{job.name}_{job.offset}" for job in jobs]
    scripts = [Path(output).absolute() / f"{name}.sh" for name in names]
    try:
        jobs[0].logs.mkdir(parents=True, exist_ok=True)
        for script, text in zip(scripts, texts, strict=True):
            write_whole(script, text)
    except OSError as error:
        raise ConfigError(f"--output {output}: cannot be written: {error.strerror}") from None
    return Written(scripts, jobs, settings, notes)


def _jobs_of_mapping(
    mapping: RunMapping, settings: SlurmSettings, output: Path, torchtune_python: str | None, runs: Collection[int]
) -> list[Job]:
    head = mapping.head
    is_torchtune = head["trainer"] == "torchtune"
    configs = distinct_configs(mapping)
    processes = head["gpus"] if is_torchtune else max(map(processes_of, configs))
    gpus = _gpus(settings, processes, read_layer(configs[0]).values)
    if settings.nodes > 1 and "single_device" in str(head.get("recipe")):
        raise ConfigError(
            f"slurm: nodes is {settings.nodes}, but {head['recipe']} is for one device: set gpus: 2 or more"
        )
    size = settings.max_array_size or _max_array_size()
    arrays: dict[int, list[int]] = {}
    for run in sorted(runs):
        arrays.setdefault(run // size * size, []).append(run % size)
    name = _file_name(head["experiment"]["experiment_name"])
    directory = Path(os.path.abspath(mapping.directory))
    return [
        Job(
            name, mapping.file, mapping.sha256, directory, output / "logs", offset, tuple(tasks), gpus,
            not is_torchtune, torchtune_python if is_torchtune else None,
        )
        for offset, tasks in arrays.items()
    ]  # fmt: skip


def _file_name(text: str) -> str:
    return re.sub(r"[^\w.-]", "_", text)


def distinct_configs(mapping: RunMapping) -> list[Path]:
    """The first config, and all of them where processes or devices vary: reading all takes its time."""
    first = mapping.run(0)
    varies = any(name.rpartition(".")[2] in ("gpus", "device") for name in first.settings)
    return [mapping.run(index).config for index in range(len(mapping.items))] if varies else [first.config]


def _job_of_config(config: Path, settings: SlurmSettings, output: Path) -> Job:
    config_trainer(config)
    gpus = _gpus(settings, processes_of(config), read_layer(config).values)
    facts = (_file_name(config.stem), config.absolute(), digest(config.read_bytes()), Path.cwd(), output / "logs")
    return Job(*facts, offset=None, tasks=(0,), gpus=gpus, resumes=True)


def _gpus(settings: SlurmSettings, processes: int, values: dict[str, Any]) -> int:
    """To request on each node. Raises ConfigError where these are fewer than the processes."""
    is_on_cpu = values.get("device") == "cpu"
    wanted = settings.gpus if settings.gpus is not None else 0 if is_on_cpu else processes
    if 0 < wanted < processes:
        raise ConfigError(f"slurm: gpus is {wanted}, but a run has {processes} processes on a node")
    if wanted == 0 and settings.gpu_type is not None:
        raise ConfigError(f"slurm: gpu_type is {settings.gpu_type!r}, but the runs are on the CPU: leave it out")
    return wanted


def _check_setup(settings: SlurmSettings) -> None:
    problems = []
    for line in settings.setup:
        checked = subprocess.run(["bash", "-n"], input=line.encode(), capture_output=True, check=False)
        if checked.returncode != 0 or checked.stderr:
            message = checked.stderr.decode(errors="replace").strip().splitlines()[0]
            problems.append(f"slurm: setup line {line!r} is not valid bash: {message}")
    if problems:
        raise ConfigError(problems)


def _max_array_size() -> int:
    try:
        answer = _call(["scontrol", "show", "config"])
    except ClusterError:
        return MOST_TASKS
    found = re.search(r"^MaxArraySize\s*=\s*(\d+)", answer, re.MULTILINE)
    return max(1, int(found[1])) if found is not None else MOST_TASKS


def _active_tasks() -> set[str]:
    """Ids of the user's jobs that wait or run: `12`, and in an array `12_3`."""
    return set(_call(["squeue", "--me", "--array", "--noheader", "--format=%i"]).split())


def _call(words: Sequence[str]) -> str:
    ours = {name: value for name, value in os.environ.items() if not name.startswith(OF_A_JOB)}
    try:
        return subprocess.run(words, capture_output=True, text=True, check=True, env=ours).stdout
    except FileNotFoundError:
        raise ClusterError(
            f"{words[0]} is not on this machine: --submit works where SLURM is, such as on a login node; without it "
            "scripts are only written"
        ) from None
    except subprocess.CalledProcessError as error:
        reason = error.stderr.strip() or f"exit code {error.returncode}"
        raise ClusterError(f"{words[0]} refused: {' '.join(reason.split())}") from None
