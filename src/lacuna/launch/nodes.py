"""torchrun on one of several nodes of a SLURM job: `srun python -m lacuna.launch.nodes sft @ config.toml`."""

import os
import sys
from collections.abc import Mapping

from lacuna.errors import ConfigError
from lacuna.processes import run_torchrun

SAVE_SECONDS = 600
"""How long torchrun waits for the other processes of a node when one has ended; otherwise it is 30."""


def rendezvous(processes: int, environment: Mapping[str, str]) -> list[str]:
    """torchrun's flags on this node. processes: on each node. Raises ConfigError outside a job's step."""
    names = ("SLURM_NNODES", "SLURM_NODEID", "SLURM_JOB_ID", "MASTER_ADDR", "MASTER_PORT")
    if missing := [name for name in names if name not in environment]:
        raise ConfigError(
            f"{', '.join(missing)}: not set; on several nodes a run is started by a script of `lacuna slurm`, or by "
            "scripts/slurm.sh"
        )
    flags = {
        "nnodes": environment["SLURM_NNODES"],
        "nproc-per-node": str(processes),
        "rdzv-id": f"{environment['SLURM_JOB_ID']}.{environment.get('SLURM_RESTART_COUNT', '0')}",
        "rdzv-backend": "c10d",
        "rdzv-endpoint": f"{environment['MASTER_ADDR']}:{environment['MASTER_PORT']}",
        "rdzv-conf": f"is_host={'true' if environment['SLURM_NODEID'] == '0' else 'false'}",
        "shutdown-timeout": str(SAVE_SECONDS),
    }
    return [word for name, value in flags.items() for word in (f"--{name}", value)]


def torchrun(trainer: list[str], processes: int, environment: Mapping[str, str]) -> list[str]:
    """trainer: the words of a lacuna command, such as `sft @ config.toml`."""
    flags = rendezvous(processes, environment)
    return [sys.executable, "-m", "torch.distributed.run", *flags, "-m", "lacuna", *trainer]


if __name__ == "__main__":
    gpus = int(os.environ.get("SLURM_GPUS_ON_NODE", 1))
    sys.exit(run_torchrun(torchrun(sys.argv[1:], gpus, os.environ)))
