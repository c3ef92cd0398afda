"""`lacuna run` by the real command: runs that start once, go on where they were, and fail alone."""

import errno
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from io import StringIO
from pathlib import Path
from typing import Any

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

import lacuna
from conftest import Process, Run, spawn
from lacuna.config.yaml_format import dump_yaml
from lacuna.errors import ConfigError, RunError
from lacuna.launch import lease
from lacuna.launch.board import Board, seconds_left
from lacuna.launch.devices import shares, visible_devices
from lacuna.launch.selection import missing_and_finished
from lacuna.runs.folder import locked, write_status
from lacuna.runs.jobs import Submission, spans
from lacuna.runs.mapping import GeneratedRun, read_mapping
from lacuna.runs.metrics import read_metrics
from lacuna.runs.status import table
from torchtune_fixture import TORCHTUNE_PYTHON, make_llama, tiny_controls, write_rows

Experiment = dict[str, Any]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory, and no SLURM."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in [name for name in os.environ if name.startswith(("SLURM", "CUDA"))]:
        monkeypatch.delenv(name)
    return tmp_path


@pytest.fixture
def study(here: Path, model_folder: Path, chat_file: Path) -> Experiment:
    """Three runs of SFT, of which the second diverges, in runs/; written to e.yaml, and returned to be changed."""
    base = {
        "trainer": "sft", "model_name": str(model_folder), "dataset": str(chat_file), "output_dir": "ignored",
        "sequence_length": 64, "batch_size": 2, "micro_batch_size": 2, "steps": 4, "device": "cpu", "log_every": 1,
    }  # fmt: skip
    Path("base.yaml").write_text(dump_yaml(base))
    return write("e.yaml", variables={"learning_rate": [1e-3, 1e38, 2e-3]})


def write(file: str, base: str = "base.yaml", **changes: Any) -> Experiment:
    own = {"experiment_name": "study", "base_config_file": base, "controls": {"output_dir": "runs"}}
    Path(file).write_text(dump_yaml({**own, **changes}))
    return {**own, **changes}


def step(run: str) -> int:
    """The last logged one."""
    return max((line["step"] for line in read_metrics(Path("runs", run))), default=0)


def losses(folder: Path) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in read_metrics(folder) if "loss" in line}


def starts(run: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(Path("runs", run, "provenance.json").read_text())["starts"]
    return found


def contents(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Time of change and bytes of every file."""
    files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
    return {str(file): (file.stat().st_mtime_ns, file.read_bytes()) for file in files}


def child_of(caller: Process) -> int:
    """The process of the run that a caller has started."""
    (child,) = psutil.Process(caller.popen.pid).children()
    return child.pid


def test_two_callers_start_each_run_once_and_a_failure_stops_no_other(run: Run, study: Experiment, here: Path) -> None:
    callers = [spawn("lacuna", "run", "e.yaml") for _ in range(2)]
    outputs = [caller.wait() for caller in callers]
    assert [caller.popen.returncode for caller in callers] == [1, 1], outputs
    rows = {row.run: row for row in table("configs")}
    assert [rows[f"run_00{number}"].state for number in range(3)] == ["finished", "failed", "finished"], outputs
    assert [len(starts(f"run_00{number}")) for number in range(3)] == [1, 1, 1]
    for output in outputs:
        assert "\n3 runs: 2 finished, 1 failed\n" in output
        assert "run_001 failed: step 2: the " in output
        assert "  log: runs/run_001/output.log" in output
        assert "start the others again with: lacuna run configs\n" in output
    both = "".join(outputs)
    for number, setting in enumerate(("0.001", "1e+38", "0.002")):
        assert both.count(f"run_00{number} started (learning_rate={setting})\n") == 1
    assert both.count(f"run_000 finished, loss {rows['run_000'].loss:.4f}") >= 1
    assert "lower learning_rate" in Path("runs/run_001/output.log").read_text()

    os.chdir("/")
    assert [row.state for row in table(here / "configs")] == ["finished", "failed", "finished"]
    assert lacuna.run(here / "configs", only="run_002").exit_code == 0
    assert [run.state for run in lacuna.report(here / "configs").runs] == ["finished", "failed", "finished"]
    os.chdir(here)

    whole = json.loads(Path("runs/run_000/status.json").read_text())
    Path("runs/run_000/status.json").write_text("{")
    assert table("configs")[0].state == "died"
    assert run("lacuna", "run", "configs", "--only", "run_000").code == 0
    mended = json.loads(Path("runs/run_000/status.json").read_text())
    assert [mended[name] for name in ("state", "step", "total_steps")] == ["finished", 4, whole["total_steps"]]
    assert len(starts("run_000")) == 1

    before = contents(Path("runs"))
    began = time.monotonic()
    done = lacuna.run("e.yaml", only=["run_000", "run_002"])
    assert time.monotonic() - began < 2
    assert (done.exit_code, [row.state for row in done.rows], done.configs) == (0, ["finished"] * 2, "configs")
    outcome = run("lacuna", "run", "configs", "--only", "run_002", "--only", "run_000, run_002")
    assert (outcome.code, outcome.output.strip()) == (0, "already finished: 2 of 2 runs")
    assert contents(Path("runs")) == before

    write("e.yaml", variables={"learning_rate": [5e-3, 1e38, 6e-3]})
    assert "pass --force" in run("lacuna", "run", "e.yaml").output
    (Path("runs/run_001").rename("moved"))
    Path("runs/run_001").mkdir()
    Path("runs/run_001/notes.txt").touch()
    outcome = run("lacuna", "run", "e.yaml", "--force")
    assert outcome.code == 2
    for number, change in ((0, "was 0.001, now 0.005"), (2, "was 0.002, now 0.006")):
        assert f"run_00{number}: the run in runs/run_00{number} has other settings (learning_rate {change})" in (
            outcome.output
        )
    assert "move that folder away, or give the experiment another output_dir" in outcome.output
    assert "run_001: output_dir runs/run_001 is not empty and not a run folder (it holds notes.txt)" in outcome.output
    shutil.rmtree("runs/run_001")
    assert contents(Path("runs")) == {name: held for name, held in before.items() if "run_001" not in name}


def test_an_adapter_run_that_was_killed_with_its_caller_goes_on_alone(
    run: Run, here: Path, model_folder: Path, chat_file: Path
) -> None:
    training = {
        "learning_rate": 1e-2, "lora_r": 4, "sequence_length": 128, "max_steps": 60, "logging_steps": 1,
        "batch_size": 2, "gradient_accumulation_steps": 1,
    }  # fmt: skip
    base = {"model": {"path": str(model_folder)}, "dataset": {"path": str(chat_file)}, "device": "cpu"}
    Path("adapter.yaml").write_text(dump_yaml({**base, "training": training}))
    twins = {"training.save_steps": [10, 20]}  # of the same losses
    write("e.yaml", "adapter.yaml", variables=twins, controls={"output_dir": "runs", "training.lora_alpha": 8})
    caller = spawn("lacuna", "run", "e.yaml")
    caller.wait_until(lambda: step("run_000") >= 15)
    child = child_of(caller)
    caller.stop()
    assert psutil.pid_exists(child)
    assert lease.take(Path("runs/run_000")) is None
    psutil.Process(child).kill()
    end = time.monotonic() + 20
    while lease.is_leased(Path("runs/run_000")):
        assert time.monotonic() < end
        time.sleep(0.05)
    assert [row.state for row in table("configs")] == ["died", "not submitted"]

    outcome = run("lacuna", "run", "configs", "--jobs", "2")
    assert outcome.code == 0, outcome.output
    assert "2 runs: 2 finished" in outcome.output
    assert [len(starts("run_000")), len(starts("run_001"))] == [2, 1]
    assert Path("runs/run_000/output.log").read_text().count("resuming from") == 1
    assert losses(Path("runs/run_000")) == losses(Path("runs/run_001"))
    assert len(losses(Path("runs/run_001"))) == 60


def test_ctrl_c_saves_all_runs_and_the_next_call_goes_on(
    run: Run, here: Path, model_folder: Path, text_file: Path
) -> None:
    base = {
        "trainer": "pretrain", "model_name": str(model_folder), "dataset": str(text_file), "output_dir": "ignored",
        "sequence_length": 64, "batch_size": 4, "micro_batch_size": 4, "steps": 100_000, "device": "cpu",
        "initialise": "random", "log_every": 1, "save_every": 50_000,
    }  # fmt: skip
    Path("base.yaml").write_text(dump_yaml(base))
    write("e.yaml", seeds=[1, 2, 3])
    caller = spawn("lacuna", "run", "e.yaml", "--jobs", "2")
    caller.wait_until(lambda: step("run_000") >= 5 and step("run_001") >= 5)
    output = caller.stop(signal.SIGINT)
    assert caller.popen.returncode == 130, output
    assert "stopping: 2 running, which save what they have\n" in output
    assert "\n3 runs: 2 interrupted, 1 not started\n" in output
    assert "stopped; 2 runs are saved; go on with: lacuna run configs --jobs 2\n" in output
    stopped = step("run_000")
    assert 5 <= stopped < 100_000
    for number in (0, 1):
        log = Path(f"runs/run_00{number}/output.log").read_text()
        assert log.count("stopped after step") == 1
        assert any(Path(f"runs/run_00{number}/checkpoints").iterdir())
    assert not Path("runs/run_002").exists()

    again = spawn("lacuna", "run", "configs", "--only", "run_000")
    again.wait_until(lambda: step("run_000") > stopped)
    child = child_of(again)
    os.kill(child, signal.SIGSTOP)  # so that it cannot save
    again.popen.send_signal(signal.SIGINT)
    again.wait_until(lambda: "stopping: 1 running" in again.output())
    output = again.stop(signal.SIGINT)
    assert again.popen.returncode == 130, output
    assert not psutil.pid_exists(child)
    assert "resuming from" in Path("runs/run_000/output.log").read_text()


@pytest.mark.skipif(not Path(TORCHTUNE_PYTHON).exists(), reason="no .venv-torchtune here: make torchtune")
def test_torchtunes_runs_begin_again_and_are_left_alone_when_finished(
    run: Run, here: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    llama, rows = make_llama(here / "llama"), write_rows(here / "rows.jsonl")
    controls = {**tiny_controls(llama, rows, "lora_llama3_2"), "output_dir": "runs", "max_steps_per_epoch": 4}
    del controls["seed"]
    experiment = {"experiment_name": "tune", "base_config": "llama3_2/1B_lora_single_device", "seeds": [1, 2]}
    (here / "runs" / "run_001").mkdir(parents=True)
    write_status(here / "runs" / "run_001", "failed", 0, None, reason="before")
    done = lacuna.run({**experiment, "controls": controls}, jobs=2, torchtune_python=TORCHTUNE_PYTHON)
    logs = "".join(file.read_text() for file in here.glob("runs/*/output.log"))
    assert "run_001 begins again: torchtune cannot go on where it stopped\n" in capfd.readouterr().out
    assert (done.exit_code, [row.state for row in done.rows]) == (0, ["finished", "finished"]), logs
    outcome = run("lacuna", "run", "configs")
    assert outcome.output.strip() == "already finished: 2 of 2 runs"
    recorded = here / "runs" / "run_000" / "config.yaml"
    recorded.write_text("seed: 5\n")
    outcome = run("lacuna", "run", "configs")
    assert outcome.code == 2
    assert "run_000: the run in runs/run_000 has another config (see there): move that" in outcome.output


# Before anything starts.


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["--only", "run_0001"], "--only run_0001: "),
        (["--only", "run_0001"], "; did you mean 'run_001'?"),
        (["--only", "run_000,nothing,none"], "--only none: "),
        (["--jobs", "0"], "--jobs 0: at least 1"),
        (["--jobs", "2", "--slurm"], "--jobs is for runs here; with --slurm, `parallel`"),
        (["--cluster", "c.yaml"], "--cluster and --output are for --slurm"),
        (["--output", "o"], "--cluster and --output are for --slurm"),
    ],
)
def test_what_cannot_be_asked_is_refused(run: Run, study: Experiment, words: list[str], problem: str) -> None:
    outcome = run("lacuna", "run", "e.yaml", *words)
    assert outcome.code == 2
    assert problem in outcome.output
    assert not Path("runs").exists()


def test_targets_that_are_no_experiment_are_refused(run: Run, study: Experiment) -> None:
    assert "base.yaml: not as `lacuna generate` wrote it" in run("lacuna", "run", "base.yaml").output
    assert "none.yaml: cannot be read" in run("lacuna", "run", "none.yaml").output
    lacuna.generate(study, "configs")
    assert "--configs and --force are for an experiment" in run("lacuna", "run", "configs", "--force").output
    Path("configs/run_001.yaml").write_text("steps: 5\n")
    Path("configs/run_002.yaml").unlink()
    outcome = run("lacuna", "run", "configs")
    assert outcome.code == 2
    assert "configs/run_001.yaml: was changed since it was generated" in outcome.output
    assert "configs/run_002.yaml: cannot be read" in outcome.output
    assert not Path("runs").exists()


def test_a_run_without_a_folder_is_refused(study: Experiment) -> None:
    lacuna.generate(study, "configs")
    mapping = read_mapping("configs")
    items = [item.replace("output_dir: runs/run_000", "output_dir: null") for item in mapping.items]
    changed = type(mapping)(mapping.file, mapping.sha256, mapping.head, items)
    with pytest.raises(ConfigError, match="run_000: it has no output_dir, by which it could be known again"):
        missing_and_finished(changed, [0, 1])


def test_another_thread_cannot_start_runs(study: Experiment) -> None:
    with ThreadPoolExecutor() as pool, pytest.raises(RunError, match="from a program's main thread"):
        pool.submit(lacuna.run, study).result()


def test_a_folder_that_cannot_be_written_fails_alone_and_is_told(run: Run, study: Experiment) -> None:
    Path("runs").touch()
    outcome = run("lacuna", "run", "e.yaml", "--only", "run_000")
    assert outcome.code == 1
    assert "run_000 failed: output_dir runs/run_000: cannot be written: Not a directory" in outcome.output


def test_a_run_that_dies_before_it_can_say_so_is_told_by_its_log(run: Run, study: Experiment, here: Path) -> None:
    """An environment in which the trainer cannot even be imported."""
    (here / "broken" / "torch").mkdir(parents=True)
    (here / "broken" / "torch" / "__init__.py").write_text("raise ImportError('no such luck')\n")
    os.environ["PYTHONPATH"] = f"{here / 'broken'}:{before}" if (before := os.environ.get("PYTHONPATH")) else "broken"
    try:
        outcome = run("lacuna", "run", "e.yaml", "--only", "run_000")
    finally:
        os.environ["PYTHONPATH"] = before or ""
    assert outcome.code == 1
    assert "run_000 failed: ImportError: no such luck" in outcome.output
    assert table("configs")[0].reason == "ImportError: no such luck"

    caller = spawn("lacuna", "run", "e.yaml", "--only", "run_002")
    caller.wait_until(lambda: "run_002 started" in caller.output())
    caller.wait_until(lambda: psutil.Process(caller.popen.pid).children())
    psutil.Process(child_of(caller)).kill()
    assert "run_002 failed: killed by SIGKILL (the system does that when memory runs out)" in caller.wait()
    assert table("configs")[2].state == "failed"


# The lease.


def test_a_lease_holds_until_both_the_caller_and_its_child_are_gone(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    held = lease.take(folder)
    assert held is not None
    assert lease.take(folder) is None
    child = subprocess.Popen(["sleep", "60"], pass_fds=[held])
    os.close(held)
    assert lease.take(folder) is None
    assert lease.is_leased(folder)
    child.kill()
    child.wait()
    assert not lease.is_leased(folder)
    again = lease.take(folder)
    assert again is not None
    os.close(again)
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert lease.take(folder) is None
    assert not lease.is_leased(tmp_path / "none")


def test_a_folder_that_cannot_be_locked_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(RunError, match=r"run: its file system has no locks: No locks available"):
        lease.take(tmp_path / "run")


# Devices.


def test_runs_at_the_same_time_get_devices_of_their_own() -> None:
    visible = "CUDA_VISIBLE_DEVICES"
    assert shares(2, 2, "auto", ["0", "1", "2", "3", "4"], 8, {}) == [{visible: "0,1"}, {visible: "2,3"}]
    assert shares(1, 2, "cuda", ["0", "1"], 8, {}) == [{}]
    assert shares(3, 1, "auto", [], 8, {}) == [{"OMP_NUM_THREADS": "2"}] * 3
    assert shares(2, 8, "cpu", [], 8, {}) == [{"OMP_NUM_THREADS": "1"}] * 2
    assert shares(2, 1, "cpu", ["0"], 8, {"OMP_NUM_THREADS": "5"}) == [{}, {}]
    with pytest.raises(ConfigError, match="--jobs 3: runs of 2 devices each need 6 in all, and 4 can be seen here"):
        shares(3, 2, "cuda", ["0", "1", "2", "3"], 8, {})
    with pytest.raises(ConfigError, match="--jobs 2: runs of 1 device each need 2 in all, and none can be seen here"):
        shares(2, 1, "cuda", [], 8, {})
    with pytest.raises(ConfigError, match="--jobs 1: runs of 2 devices"):
        shares(1, 2, "cuda", ["0"], 8, {})


@given(st.integers(1, 6), st.integers(1, 4), st.integers(0, 12))
def test_no_device_is_given_twice(jobs: int, gpus: int, devices: int) -> None:
    names = [f"GPU-{number}" for number in range(devices)]
    try:
        found = shares(jobs, gpus, "cuda", names, 4, {})
    except ConfigError:
        assert jobs * gpus > devices
        return
    given_away = [name for share in found for name in share.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    assert len(found) == jobs
    assert len(set(given_away)) == len(given_away) == (jobs * gpus if jobs > 1 else 0)


def test_devices_are_found_without_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert visible_devices({"CUDA_VISIBLE_DEVICES": "GPU-a, 3"}) == ["GPU-a", "3"]
    assert visible_devices({"CUDA_VISIBLE_DEVICES": ""}) == visible_devices({"CUDA_VISIBLE_DEVICES": "-1"}) == []
    monkeypatch.setenv("PATH", str(tmp_path))
    assert visible_devices({}) == []
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\n[ \"$1\" = --query-gpu=index ] && printf '0\\n1\\n'\n")
    program.chmod(0o755)
    assert visible_devices({}) == ["0", "1"]
    program.write_text("#!/bin/sh\nexit 9\n")
    assert visible_devices({}) == []


def test_what_runs_the_runs_does_without_torch() -> None:
    code = "import sys, lacuna\nlacuna.run\nprint({'torch', 'transformers', 'datasets'} & sys.modules.keys())"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"


# What is shown.


def test_time_that_is_left() -> None:
    assert seconds_left([], [(5.0, 0.0, 0.0)], 3, 1) is None
    assert seconds_left([10.0, 20.0], [], 3, 1) == 45.0
    assert seconds_left([], [(10.0, 0.0, 0.5), (30.0, 0.5, 0.75)], 0, 2) == 30.0
    assert seconds_left([], [(10.0, 0.0, 0.5)], 4, 2) == 45.0
    assert seconds_left([10.0], [], 0, 1) == 0.0


def planned(tmp_path: Path, count: int) -> list[GeneratedRun]:
    return [
        GeneratedRun(
            id=f"run_{number:03d}",
            settings={"rank": number},
            seed=1,
            output_dir=str(tmp_path / f"run_{number:03d}"),
            index=number,
            trainer="sft",
            config=tmp_path,
            sha256="",
            directory=tmp_path,
        )
        for number in range(count)
    ]


def test_a_terminal_shows_one_table_that_does_not_grow_with_the_experiment(tmp_path: Path) -> None:
    runs = planned(tmp_path, 1000)
    console = Console(file=StringIO(), force_terminal=True, width=120)
    with Board(runs[1:], runs[:1], 1, console) as board:
        board.started(runs[1], again=False)
        runs[1].folder.mkdir()
        write_status(runs[1].folder, "running", 5, 10, loss=1.25, tokens_per_second=1234.5)
        for run in runs[2:40]:
            board.started(run, again=False)
            board.ended(run, "failed", "no\nmemory")
        shown = Console(file=StringIO(), width=120)
        shown.print(board.render())
    assert isinstance(shown.file, StringIO)
    lines = [" ".join(line.split()) for line in shown.file.getvalue().splitlines()]
    assert lines[0] == "run settings seed state step loss tokens/s reason"
    assert lines[1] == "run_030 rank=30 1 failed no memory"
    assert lines[11] == "run_001 rank=1 1 running 5/10 1.2500 1,234"
    assert lines[12].startswith("1000 runs: 38 failed, 1 finished, 1 running, 960 waiting"), lines
    assert len(lines) == 13


# Arrays of some runs.


@given(st.sets(st.integers(0, 60), min_size=1))
def test_tasks_are_written_as_slurm_reads_them(numbers: set[int]) -> None:
    assert Submission("7", "m", "s", 0, spans(numbers), "a.sh", "l", 1.0).numbers() == sorted(numbers)


def test_runs_that_slurm_or_another_process_has_are_not_submitted(
    run: Run, study: Experiment, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write("e.yaml", seeds=[0, 1, 2, 3, 4, 5, 6, 7])
    bin = here / "bin"
    bin.mkdir()
    (bin / "sbatch").write_text("#!/bin/sh\necho 17\n")
    (bin / "squeue").write_text('#!/bin/sh\n[ "$3" = "--noheader" ] && true\n')
    for program in bin.iterdir():
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{bin}:/usr/bin:/bin")
    outcome = run("lacuna", "run", "e.yaml", "--slurm", "--only", "run_000,run_001,run_004")
    assert (outcome.code, "submitted: job 17, 3 runs" in outcome.output) == (0, True), outcome.output
    assert "#SBATCH --array=0-1,4\n" in Path("slurm/study.sh").read_text()
    states = [row.state for row in table("configs")]
    assert states == ["submitted", "submitted", "not submitted", "not submitted", "submitted", *["not submitted"] * 3]
    assert [row.job for row in table("configs")][4:6] == ["17_4", None]

    held = lease.take(Path("runs/run_007"))
    assert held is not None
    Path("c.yaml").write_text("time: 10\n")
    outcome = run("lacuna", "run", "configs", "--slurm", "--cluster", "c.yaml", "--output", "other")
    assert "note: run_004 is submitted in SLURM's job 17_4: left to it" in outcome.output
    assert "note: run_007 runs in another process: left to it" in outcome.output
    script = Path("other/study.sh").read_text()
    assert "#SBATCH --array=2-3,5-6\n" in script
    assert "#SBATCH --time=10\n" in script
    os.close(held)
    with locked(Path("runs/run_007")):
        outcome = run("lacuna", "run", "configs", "--slurm", "--only", "run_007")
    assert "note: run_007 runs in another process: left to it" in outcome.output
    outcome = run("lacuna", "run", "configs", "--slurm", "--only", "run_000,run_001")
    assert "nothing to submit: all runs are finished, or run or wait already" in outcome.output
    outcome = run("lacuna", "run", "configs", "--only", "run_000")
    assert (outcome.code, "already finished: 0 of 1 runs" in outcome.output) == (1, True)
