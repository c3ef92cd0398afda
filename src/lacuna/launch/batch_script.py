"""The text of a batch script: pure, from a job and the cluster's settings."""

import re
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

from lacuna.config.slurm import SlurmSettings
from lacuna.errors import ConfigError
from lacuna.runs.jobs import spans

PRELUDE = """\
fail() {{ echo "lacuna: this failed: $1" >&2; exit 1; }}
stop= child=
pass_on() {{ stop=$1; [ -z "$child" ] || kill -s "$1" "$child" 2> /dev/null || true; }}
trap 'pass_on USR1' USR1
trap {on_term} TERM
"""
PASS_TERM_ON = "'pass_on TERM'"
KEEP_TERM = "'stop=TERM'"
"""On several nodes: SLURM tells the step itself, and srun would end it at once."""
RENDEZVOUS = """\
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((15000 + SLURM_JOB_ID % 15000))
export MASTER_ADDR MASTER_PORT
"""
WAITING = """\
code=143
if [ -z "$stop" ]; then
    {command} &
    child=$!
    [ -z "$stop" ] || pass_on "$stop"
    while kill -0 "$child" 2> /dev/null; do wait "$child" || true; done  # a signal ends a wait, not the run
    code=0
    wait "$child" || code=$?
fi
sleep 1  # where the whole job is cancelled, the script is told a moment after the run
case "$stop:$code" in
    *:0 | *:2 | TERM:*) exit "$code" ;;  # finished; an error to mend; or cancelled, or requeued by SLURM itself
    USR1:* | :138 | :143) ;;  # the time limit is near; or the run alone was told to stop, as before preemption
    *) exit "$code" ;;  # its own fault
esac
"""
REQUEUEING = """\
if [ "${{SLURM_RESTART_COUNT:-0}}" -ge {bound} ]; then
    echo "lacuna: stopped, and not requeued after ${{SLURM_RESTART_COUNT:-0}} restarts (max_requeues)" >&2
    exit "$code"
fi
job={id}
echo "lacuna: stopped, and requeued as $job" >&2
scontrol requeue "$job" || fail "scontrol requeue $job"
"""
NOT_REQUEUEING = """\
echo "lacuna: stopped, and not requeued: {reason}" >&2
exit "$code"
"""


@dataclass(frozen=True)
class Job:
    """One script. target: a run mapping, or one config; absolute, as directory and logs are. sha256: of the target.

    offset and tasks: task k of the array is run offset + k of the mapping; of a config None, and one task. gpus: to
    request on each node.
    resumes: whether its trainer goes on where it stopped.
    """

    name: str
    target: Path
    sha256: str
    directory: Path
    logs: Path
    offset: int | None
    tasks: tuple[int, ...]
    gpus: int
    resumes: bool
    torchtune_python: str | None = None

    @property
    def log(self) -> str:
        """SLURM's pattern of the log's name."""
        return "%A_%a.log" if self.offset is not None else "%j.log"


def batch_script(job: Job, settings: SlurmSettings) -> str:
    """A script for sbatch, which passes `bash -n` whatever the settings are. Raises ConfigError for an odd path."""
    command = _in_environment(job, settings)
    if settings.nodes > 1:
        cores = [f"--cpus-per-task={settings.cpus_per_node}"] if settings.cpus_per_node is not None else []
        wait = ["--kill-on-bad-exit=0", f"--wait={settings.lead}"]
        command = ["srun", "--mpi=none", "--cpu-bind=none", *wait, *cores, *command]
    index = f' "$((SLURM_ARRAY_TASK_ID + {job.offset}))"' if job.offset is not None else ""
    if not job.resumes:
        ending = NOT_REQUEUEING.format(reason="torchtune would begin again")
    elif settings.requeue:
        ending = REQUEUEING.format(
            bound=settings.max_requeues,
            id="${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID" if job.offset is not None else "$SLURM_JOB_ID",
        )
    else:
        ending = NOT_REQUEUEING.format(reason="requeue is false")
    return "\n".join(
        [
            "#!/bin/bash",
            *_options(job, settings),
            "",
            PRELUDE.format(on_term=KEEP_TERM if settings.nodes > 1 else PASS_TERM_ON),
            *([RENDEZVOUS] if settings.nodes > 1 else []),
            *_activation(settings),
            "",
            WAITING.format(command=shlex.join(command) + index).rstrip(),
            ending,
        ]
    )


def _options(job: Job, settings: SlurmSettings) -> list[str]:
    kind = f"{settings.gpu_type}:" if settings.gpu_type is not None else ""
    tasks = spans(job.tasks) + (f"%{settings.parallel}" if settings.parallel is not None else "")
    given: dict[str, object] = {
        "job-name": job.name,
        "chdir": _path(job.directory),
        "output": f"{_path(job.logs).replace('%', '%%')}/{job.log}",
        "open-mode": "append",
        "array": tasks if job.offset is not None else None,
        "partition": settings.partition,
        "account": settings.account,
        "qos": settings.qos,
        "time": settings.time,
        "nodes": settings.nodes,
        "ntasks-per-node": 1,
        "gpus-per-node": f"{kind}{job.gpus}" if job.gpus else None,
        "cpus-per-task": settings.cpus_per_node,
        "mem": settings.memory,
        "constraint": settings.constraint,
        "exclude": settings.exclude,
        "signal": f"B:USR1@{settings.lead}",
        "requeue" if settings.requeue else "no-requeue": "",
        **settings.extra,
    }
    return [_option(name, str(value)) for name, value in given.items() if value is not None]


def _option(name: str, value: str) -> str:
    """A line that sbatch reads back to just this value: within quotes, a backslash keeps what follows as it is."""
    if not re.fullmatch(r"[A-Za-z0-9_./:,%@+=-]*", value):
        value = '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    return f"#SBATCH --{name}" + (f"={value}" if value else "")


def _path(path: Path) -> str:
    if re.search(r"[\x00-\x1f\x7f\\]", str(path)):
        raise ConfigError(
            f"{str(path)!r}: SLURM cannot use a folder with a backslash or a line break in its name: choose another"
        )
    return str(path)


def _activation(settings: SlurmSettings) -> list[str]:
    lines = []
    if settings.modules:
        lines.append("command -v module > /dev/null || . /etc/profile")
        lines += [_checked(f"module load {shlex.quote(name)}", name) for name in settings.modules]
    if settings.venv is not None:
        activate = Path(settings.venv).expanduser().absolute() / "bin" / "activate"
        lines.append(_checked(f". {shlex.quote(str(activate))}", settings.venv))
    if settings.conda is not None:
        lines.append(_checked('eval "$(conda shell.bash hook)"', "conda shell.bash hook"))
        lines.append(_checked(f"conda activate {shlex.quote(settings.conda)}", settings.conda))
    lines += [
        _checked(f"export {name}={shlex.quote(value)}", f"export {name}")
        for name, value in settings.environment.items()
    ]
    return lines + [_checked(f"eval {shlex.quote(line)}", line) for line in settings.setup]


def _checked(command: str, what: str) -> str:
    return f"{command} || fail {shlex.quote(what)}"


def _in_environment(job: Job, settings: SlurmSettings) -> list[str]:
    brings_python = settings.venv or settings.conda or settings.container
    python = settings.python or ("python" if brings_python else sys.executable)
    torchtune = ["--torchtune-python", job.torchtune_python] if job.torchtune_python is not None else []
    command = [python, "-m", "lacuna", "start", "--sha256", job.sha256, *torchtune, str(job.target)]
    if settings.container is None:
        return command
    binds = [word for path in (job.directory, job.target.parent) for word in ("--bind", str(path))]
    nvidia = ["--nv"] if job.gpus else []
    return ["apptainer", "exec", *nvidia, *binds, settings.container, *command]
