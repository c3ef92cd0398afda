"""A real SLURM of two nodes on this host, in a folder of its own; the machine's own SLURM stays as it is."""

import os
import pwd
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, suppress
from pathlib import Path

import pytest

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "squeue", "scontrol", "srun", "munged", "munge")
CONF = """\
ClusterName=lacuna
SlurmctldHost={host}
SlurmctldPort={ports[0]}
SlurmUser={user}
AuthType=auth/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MaxArraySize=9
SlurmdTimeout=10
KillWait=20
SchedulerParameters=sched_interval=2,batch_sched_delay=0,sched_min_interval=0
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=1 RealMemory=1000
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=1 RealMemory=1000
PartitionName=debug Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
"""


class Cluster:
    """Its daemons, and what the tests ask of it. Started daemons end with `stop`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "state").mkdir()
        host = socket.gethostname().partition(".")[0]
        _make_resolvable(host)
        text = CONF.format(host=host, user=pwd.getpwuid(os.getuid()).pw_name, ports=_free_ports(3), folder=folder)
        (folder / "slurm.conf").write_text(text)
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SBATCH"))},
            "SLURM_CONF": str(folder / "slurm.conf"),
            "XDG_CACHE_HOME": str(folder / "cache"),
        }
        self.call("slurmctld")
        for node in ("n1", "n2"):
            self.start_node(node)
        self.wait_until(lambda: self.nodes() == {"n1": "idle", "n2": "idle"}, 60)

    def call(self, *words: str | Path, cwd: Path | None = None) -> str:
        """Run a program against this cluster; it must end well."""
        done = subprocess.run(
            [*map(str, words)], env=self.environment, cwd=cwd, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, f"{words}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def start_node(self, node: str) -> None:
        self.call("slurmd", "-N", node)

    def kill_node(self, node: str) -> None:
        """As a power cut would: the daemon and everything that it started."""
        jobs = [pid for pid in _processes() if self._is_on(node, _environment_of(pid))]
        parents = [parent for pid in jobs if _name_of(parent := _parent_of(pid)) == "slurmstepd"]
        for pid in [int((self.folder / f"slurmd-{node}.pid").read_text()), *parents, *jobs]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def _is_on(self, node: str, environment: dict[str, str]) -> bool:
        mine = environment.get("SLURM_CONF") == self.environment["SLURM_CONF"]
        return mine and environment.get("SLURMD_NODENAME") == node

    def nodes(self) -> dict[str, str]:
        lines = self.call("sinfo", "--Node", "--noheader", "--format=%N %t").split("\n")
        return dict(line.split() for line in lines if line)

    def jobs(self) -> dict[str, str]:
        """Those that wait or run, by id (`12` or `12_3`)."""
        lines = self.call("squeue", "--array", "--noheader", "--format=%i %T").split("\n")
        return dict(line.split() for line in lines if line)

    def wait_until(self, condition: Callable[[], object], seconds: float) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, f"it did not come to that; jobs: {self.jobs()}, nodes: {self.nodes()}"
            time.sleep(0.2)

    def wait_for(self, *jobs: str, seconds: float = 300) -> None:
        """Until these are no longer in the queue. What was requeued starts at once, not after SLURM's two minutes."""

        def are_over() -> bool:
            found = {job: state for job, state in self.jobs().items() if job.partition("_")[0] in jobs}
            for job, state in found.items():
                if state == "PENDING" and "BeginTime" in self.call("squeue", "--noheader", "--format=%r", "-j", job):
                    self.start_now(job)
            return not found

        self.wait_until(are_over, seconds)

    def start_now(self, job: str) -> None:
        """Without the two minutes that SLURM waits; within a second, a node refuses a job that it had to kill."""
        time.sleep(2)
        self.call("scontrol", "update", f"JobId={job}", "StartTime=now")

    def stop(self) -> None:
        subprocess.run(["scancel", f"--user={os.getuid()}"], env=self.environment, capture_output=True, check=False)
        time.sleep(1)
        for file in sorted(self.folder.glob("*.pid")):
            with suppress(ProcessLookupError):
                os.kill(int(file.read_text()), signal.SIGTERM)


def start_cluster(factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    if missing or os.getuid() != 0:
        pytest.skip(f"a SLURM for tests needs root and slurm-wlm and munge: {', '.join(missing) or 'not root'}")
    if not _munge_answers():
        subprocess.run(["service", "munge", "start"], capture_output=True, check=False)
    if not _munge_answers():
        pytest.skip("munged does not start: service munge start")
    cluster = Cluster(factory.mktemp("slurm"))
    try:
        yield cluster
    finally:
        cluster.stop()


def _munge_answers() -> bool:
    command = "munge -n | unmunge"
    return subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, check=False).returncode == 0


def _make_resolvable(host: str) -> None:
    try:
        socket.gethostbyname(host)
    except OSError:
        with open("/etc/hosts", "a") as hosts:
            hosts.write(f"127.0.0.1 {host}\n")


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(closing(socket.socket())) for _ in range(count)]
        for opened in sockets:
            opened.bind(("127.0.0.1", 0))
        return [opened.getsockname()[1] for opened in sockets]


def _processes() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def _environment_of(pid: int) -> dict[str, str]:
    try:
        words = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return {}
    return {name.decode(): value.decode() for name, _, value in (word.partition(b"=") for word in words)}


def _parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def _name_of(pid: int) -> str:
    return Path(f"/proc/{pid}/comm").read_text().strip()
