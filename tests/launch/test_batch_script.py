"""Batch scripts, what they start, and the table of runs; test_slurm.py in commands/ and long/ has a real SLURM."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from conftest import SCRIPTS, Run, spawn
from lacuna import generate
from lacuna.config.slurm import SlurmSettings, load_slurm, seconds_of
from lacuna.config.yaml_format import dump_yaml, parse_yaml
from lacuna.errors import ConfigError, RunError
from lacuna.experiment.schema import Experiment
from lacuna.files import digest
from lacuna.launch.batch_script import batch_script
from lacuna.launch.nodes import rendezvous
from lacuna.launch.slurm import write_scripts
from lacuna.launch.start import command, find_launch
from lacuna.processes import run_torchrun, run_watched
from lacuna.runs.folder import job_of, locked, patience, read_status, write_status
from lacuna.runs.jobs import Submission, add_submission
from lacuna.runs.logs import last_words
from lacuna.runs.mapping import read_mapping, seal
from lacuna.runs.queue import JobState, Queue, read_past, read_queue
from lacuna.runs.status import Watched, _status_of, as_text, table
from slurm_jobs import job, write_base
from torchtune_fixture import TORCHTUNE_PYTHON, make_llama, tiny_controls, write_rows


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a blank in its name, and no SLURM but that of the test."""
    folder = tmp_path / "my project"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in [name for name in os.environ if name.startswith("SLURM")]:
        monkeypatch.delenv(name)
    return folder


ROOT = Path(__file__).parents[2]
ROW = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'


def write_mapping(folder: Path, slurm: dict[str, Any] | None = None, **changes: Any) -> Path:
    write_base(folder, **changes)
    experiment = {
        "experiment_name": "my study", "base_config_file": "one.yaml", "seeds": [1, 2, 3],
        "controls": {"output_dir": "runs/a b"}, **({"slurm": slurm} if slurm is not None else {}),
    }  # fmt: skip
    generate(experiment, folder / "configs")
    return folder / "configs"


# The settings.

ALL_SETTINGS: dict[str, Any] = {
    "partition": "gpu,long", "account": "me", "qos": "high", "time": "1-02:30", "nodes": 2, "gpus": 4,
    "gpu_type": "h100", "cpus_per_node": 8, "memory": "64G", "constraint": "a&b", "exclude": "n[1-3]", "parallel": 2,
    "lead": 600, "requeue": False, "max_requeues": 3, "modules": ["cuda/12.4", "gcc"], "venv": "/e/my venv",
    "conda": "train", "setup": ["ulimit -c 0", "export A=$HOME"], "container": "/images/a b.sif",
    "python": "/e/bin/python", "environment": {"OMP_NUM_THREADS": 4, "TOKEN": "a'b"},
    "extra": {"mail-type": "END", "exclusive": True}, "max_array_size": 2,
}  # fmt: skip


def test_every_setting_changes_the_script(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    assert ALL_SETTINGS.keys() == SlurmSettings.model_fields.keys()
    configs = write_mapping(here, device="cuda")

    def scripts(values: dict[str, Any]) -> list[str]:
        Path("c.yaml").write_text(dump_yaml(values))
        return [script.read_text() for script in write_scripts(str(configs), "c.yaml").scripts]

    plain = scripts({})
    for name, value in ALL_SETTINGS.items():
        changed = scripts({name: value})
        assert changed != plain, name
        for words in [value] if isinstance(value, str | int) and value is not False else []:
            assert str(words) in "".join(changed) or name == "max_array_size", name


def test_the_section_goes_over_the_file_and_leaves_the_configs_alone(here: Path) -> None:
    before = {path.name: path.read_bytes() for path in write_mapping(here).glob("run_0*")}
    for path in (here / "configs").iterdir():
        path.unlink()
    section = {"time": 90, "environment": {"A": 1}}
    configs = write_mapping(here, slurm=section)
    assert {path.name: path.read_bytes() for path in configs.glob("run_0*")} == before
    assert read_mapping(configs).head["experiment"]["slurm"] == {"time": "90", "environment": {"A": "1"}}
    Path("cluster.toml").write_text('time = "10"\nlead = 60\npartition = "p"\n[environment]\nB = "2"\n')
    found = load_slurm("cluster.toml", section, "section")
    assert (found.time, found.partition, found.environment) == ("90", "p", {"B": "2", "A": "1"})
    (script,) = write_scripts(str(configs), "cluster.toml").scripts
    assert "#SBATCH --time=90\n" in script.read_text()


@pytest.mark.parametrize(
    ("time", "seconds"),
    [("90", 5400), ("1:30", 90), ("2:00:00", 7200), ("1-2", 93600), ("1-2:30", 95400), ("1-0:0:5", 86405)],
)
def test_times_are_read_as_slurm_does(time: str, seconds: int) -> None:
    assert seconds_of(time) == seconds


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"partitoin": "x"}, "c.yaml:1: unknown setting 'partitoin'; did you mean 'partition'?"),
        ({"time": "tomorrow"}, "c.yaml:1: is no time of SLURM's: write minutes, minutes:seconds"),
        ({"time": "0"}, "c.yaml:1: is no time of SLURM's"),
        ({"account": "a\nb"}, "c.yaml:1: a line break or another control character cannot stand"),
        ({"conda": "--help"}, "c.yaml:1: begins with a dash"),
        ({"memory": "lots"}, "c.yaml:1: 'memory' is 'lots' (str)"),
        ({"setup": ["a\0b"]}, "a shell cannot hold a null character"),
        ({"extra": {"Mail": "x"}}, "c.yaml:2: is no option of sbatch's: write its long name"),
        ({"extra": {"mem": "1"}}, "--mem cannot be given in extra: the setting memory is for it"),
        ({"extra": {"outp": "x"}}, "--output cannot be given in extra: lacuna writes it itself"),
        ({"venv": "a", "conda": "b"}, "venv and conda: each brings a Python of its own; keep one"),
        ({"gpu_type": "h100", "gpus": 0}, "gpu_type needs GPUs, and gpus is 0"),
        ({"time": "5", "lead": 300}, "lead 300 s is not shorter than the time limit 5"),
        ({"requeue": False, "max_requeues": 2}, "max_requeues has nothing to count, as requeue is false"),
        ({"setup": ["if true"]}, "slurm: setup line 'if true' is not valid bash: "),
        ({"setup": ["cat <<END"]}, "slurm: setup line 'cat <<END' is not valid bash: "),
        ({"gpus": 1}, "slurm: gpus is 1, but a run has 2 processes on a node"),
        ({"gpus": 0, "gpu_type": None}, ""),
    ],
)
def test_settings_that_cannot_be_are_refused(run: Run, here: Path, values: dict[str, Any], problem: str) -> None:
    write_base(here, device="auto", gpus=2)
    Path("c.yaml").write_text(dump_yaml(values))
    outcome = run("lacuna", "slurm", "one.yaml", cluster="c.yaml")
    assert outcome.code == (2 if problem else 0), outcome.output
    assert problem in outcome.output
    assert Path("slurm").exists() == (not problem)


def test_a_wrong_section_is_named_by_its_line(run: Run, here: Path) -> None:
    write_base(here)
    text = "experiment_name: a\nbase_config_file: one.yaml\nseeds: [1]\nslurm:\n  lead: 0\n  partitoin: a\n"
    Path("e.yaml").write_text(text)
    output = run("lacuna", "slurm", "e.yaml").output
    assert "e.yaml:5: 'slurm.lead' is 0 (int): should be greater than or equal to 1" in output
    assert "e.yaml:6: unknown setting 'slurm.partitoin'; did you mean 'slurm.partition'?" in output


def test_a_gpu_type_is_refused_for_runs_on_the_cpu(here: Path) -> None:
    write_base(here)
    Path("c.yaml").write_text("gpu_type: h100\n")
    with pytest.raises(ConfigError, match="gpu_type is 'h100', but the runs are on the CPU"):
        write_scripts("one.yaml", "c.yaml")


# The scripts.

NASTY = st.text(st.characters(codec="utf-8"), max_size=12) | st.text(" '\"\\$`!#\n;&|<>(){}[]*?~%=-a", max_size=12)


def accepted(values: dict[str, Any]) -> dict[str, Any]:
    """Without what the settings refuse by themselves."""
    kept: dict[str, Any] = {}
    for name, value in values.items():
        try:
            SlurmSettings(**{name: value})
        except ValidationError:
            continue
        kept[name] = value
    return kept


@given(
    st.fixed_dictionaries(dict.fromkeys(("partition", "account", "constraint", "exclude", "python", "conda"), NASTY)),
    st.lists(NASTY, max_size=2),
    st.dictionaries(st.sampled_from(["A", "B_1"]), NASTY),
    st.dictionaries(st.sampled_from(["comment", "mail-user"]), NASTY),
    st.text(st.characters(codec="utf-8", exclude_categories=["Cc"], exclude_characters="\\/"), min_size=1, max_size=9),
    st.sampled_from([1, 2]),
)
@settings(suppress_health_check=[HealthCheck.too_slow])
def test_no_value_breaks_out_of_its_line(
    texts: dict[str, str], lists: list[str], variables: dict[str, str], extra: dict[str, str], folder: str, nodes: int
) -> None:
    values = accepted({**texts, "modules": lists, "environment": variables, "extra": extra, "setup": lists})
    script = batch_script(job(directory=Path("/", folder), offset=None), SlurmSettings(nodes=nodes, **values))
    checked = subprocess.run(["bash", "-n"], input=script.encode(), capture_output=True, check=False)
    assert (checked.returncode, checked.stderr) == (0, b"")
    plain = batch_script(job(offset=None), SlurmSettings(nodes=nodes))
    directives = [line for line in script.split("\n") if line.startswith("#SBATCH")]
    given = sum(values.get(name) is not None for name in ("partition", "account", "constraint", "exclude"))
    assert len(directives) == plain.count("\n#SBATCH") + given + len(values.get("extra", {}))
    exports = "\n".join(re.findall(r"^export (?:A|B_1)=(?:.|\n)*? \|\| fail 'export \w+'$", script, re.MULTILINE))
    names = list(values.get("environment", {}))
    shown = "".join(f'printf "%s\\0" "${name}"\n' for name in names)
    found = subprocess.run(["bash", "-c", f"{exports}\n{shown}"], capture_output=True, check=True).stdout
    assert found.decode().split("\0")[:-1] == list(values.get("environment", {}).values())


@pytest.mark.parametrize("folder", ["a\\b", "a\nb"])
def test_a_folder_that_slurm_cannot_use_is_refused(folder: str) -> None:
    with pytest.raises(ConfigError, match="SLURM cannot use a folder with a backslash or a line break"):
        batch_script(job(directory=Path("/", folder)), SlurmSettings())


def run_script(
    here: Path, text: str, programs: dict[str, str], **environment: str
) -> "subprocess.CompletedProcess[str]":
    """A batch script as SLURM runs it, with some programs of the cluster pretended."""
    (here / "bin").mkdir(exist_ok=True)
    for name, body in programs.items():
        (here / "bin" / name).write_text(f"#!/bin/bash\n{body}\n")
        (here / "bin" / name).chmod(0o755)
    surroundings = {**os.environ, "PATH": f"{here / 'bin'}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", **environment}
    words = ["bash", "-c", text]
    return subprocess.run(words, env=surroundings, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize(
    ("values", "trainer", "restarts", "code", "said"),
    [
        ({}, "exit 0", 0, 0, ""),
        ({}, "exit 3", 0, 3, ""),
        ({}, "kill -USR1 $PPID; sleep 0.2; exit 138", 0, 0, "stopped, and requeued as 7\nscontrol requeue 7"),
        ({}, "trap '' USR1; kill -USR1 $PPID; sleep 0.2; exit 0", 0, 0, ""),
        ({}, "kill -TERM $PPID; sleep 0.2; exit 143", 0, 143, ""),
        ({}, "exit 143", 0, 0, "scontrol requeue 7"),
        ({}, "kill -USR1 $PPID; sleep 0.2; exit 138", 20, 138, "not requeued after 20 restarts (max_requeues)"),
        ({"requeue": False}, "kill -USR1 $PPID; sleep 0.2; exit 138", 0, 138, "not requeued: requeue is false"),
        ({"setup": ["set -eu", "true"]}, "exit 3", 0, 3, ""),
        ({"setup": ["set -eu"]}, "kill -USR1 $PPID; sleep 0.2; exit 138", 0, 0, "scontrol requeue 7"),
        ({"setup": ["false"]}, "echo started", 0, 1, "lacuna: this failed: false"),
        ({"modules": ["cuda"]}, "exit 0", 0, 1, "lacuna: this failed: cuda"),
        ({"venv": "/no where"}, "exit 0", 0, 1, "lacuna: this failed: /no where"),
        ({"environment": {"UID": "3"}}, "exit 0", 0, 1, "lacuna: this failed: export UID"),
        ({"setup": ["kill -USR1 $$"]}, "echo started", 0, 0, "scontrol requeue 7"),
    ],
)
def test_how_a_job_ends(here: Path, values: dict[str, Any], trainer: str, restarts: int, code: int, said: str) -> None:
    text = batch_script(job(offset=None), SlurmSettings(python="trainer", **values))
    programs = {"trainer": trainer, "scontrol": 'echo scontrol "$@" >&2'}
    done = run_script(here, text, programs, SLURM_RESTART_COUNT=str(restarts))
    assert done.returncode == code, done.stderr
    assert said in done.stderr
    assert said or not done.stderr, done.stderr
    assert "started" not in done.stdout


def test_a_signal_reaches_the_trainer_once_it_runs(here: Path) -> None:
    """It is asked by the script, and what it does until it ends is waited for."""
    waits = "trap 'sleep 0.5; echo saved; exit 138' USR1; kill -USR1 $PPID; while true; do sleep 0.1; done"
    text = batch_script(job(), SlurmSettings(python="trainer"))
    array = {"SLURM_ARRAY_JOB_ID": "5", "SLURM_ARRAY_TASK_ID": "2"}
    done = run_script(here, text, {"trainer": waits, "scontrol": 'echo scontrol "$@"'}, **array)
    assert done.stdout == "saved\nscontrol requeue 5_2\n"


def test_environments_are_activated_and_containers_entered(here: Path) -> None:
    (here / "env" / "bin").mkdir(parents=True)
    (here / "env" / "bin" / "activate").write_text("export ACTIVATED=yes\n")
    show = {"python": 'echo "$ACTIVATED:$CONDA:$A" "$@"', "conda": "echo 'conda() { CONDA=$2; export CONDA; }'"}
    show["apptainer"] = 'echo apptainer "$@"'
    show["module"] = "true"
    ours = ["start", "--sha256", "5" * 64, "/c/run_mapping.yaml", "6"]
    for values, words in (
        ({"venv": "env", "environment": {"A": "$HOME"}}, ["yes::$HOME", "-m", "lacuna", *ours]),
        ({"conda": "mine", "setup": ["export A=$((1+1))"], "modules": ["x"]}, [":mine:2", "-m", "lacuna", *ours]),
        (
            {"container": "a b.sif"},
            [
                "apptainer",
                "exec",
                "--nv",
                "--bind",
                "/d",
                "--bind",
                "/c",
                "a",
                "b.sif",
                "python",
                "-m",
                "lacuna",
                *ours,
            ],
        ),
    ):
        text = batch_script(job(offset=4), SlurmSettings(**values))
        done = run_script(here, text, show, SLURM_ARRAY_JOB_ID="5", SLURM_ARRAY_TASK_ID="2")
        assert done.stdout.split() == words, done.stderr


def test_an_experiment_becomes_one_array(run: Run, here: Path) -> None:
    write_base(here, device="cuda")
    Path("d.jsonl").write_text(ROW)
    Path("m").mkdir()
    values = {"experiment_name": "a/b c", "base_config_file": "one.yaml", "seeds": [1, 2, 3]}
    section = {"gpus": 2, "gpu_type": "h100", "parallel": 2, "max_array_size": 2}
    Path("e.yaml").write_text(dump_yaml({**values, "slurm": section}))
    outcome = run("lacuna", "slurm", "e.yaml", output="sc ripts", configs="made")
    assert outcome.code == 0, outcome.output
    assert "sc ripts/a_b_c_0.sh: runs 0 to 1 of made/run_mapping.yaml" in outcome.output
    assert "sc ripts/a_b_c_2.sh: runs 2 to 2 of made/run_mapping.yaml" in outcome.output
    first, second = (here / "sc ripts" / f"a_b_c_{offset}.sh" for offset in (0, 2))
    assert (
        f"job=$(sbatch --parsable '{first}') "
        f"job=$(sbatch --parsable \"--dependency=afterany:${{job%%;*}}\" '{second}')" in outcome.output
    )
    assert "#SBATCH --array=0-1%2\n" in first.read_text()
    assert "#SBATCH --array=0%2\n" in second.read_text()
    assert '"$((SLURM_ARRAY_TASK_ID + 2))" &' in second.read_text()
    for line in (
        "--gpus-per-node=h100:2", f'--chdir="{here}"', f'--output="{here}/sc ripts/logs/%A_%a.log"',
        "--open-mode=append", "--requeue", "--signal=B:USR1@300", "--nodes=1",
    ):  # fmt: skip
        assert f"#SBATCH {line}\n" in first.read_text()


def test_the_largest_of_the_runs_decides_about_gpus(here: Path) -> None:
    entries = []
    for index, gpus in enumerate((1, 4, 2)):
        text = dump_yaml({"trainer": "sft", "gpus": gpus}).encode()
        Path(f"run_{index}.yaml").write_bytes(text)
        facts = {"seed": None, "sha256": digest(text), "output_dir": None}
        entries.append({"id": f"run_{index}", "params": {"gpus": gpus}, "config": f"run_{index}.yaml", **facts})
    head = {"experiment": {"experiment_name": "n"}, "trainer": "sft", "runs": entries}
    Path("run_mapping.yaml").write_text(seal(dump_yaml(head)))
    (script,) = write_scripts(".").scripts
    assert "#SBATCH --gpus-per-node=4\n" in script.read_text()


def test_another_experiments_configs_are_replaced_when_asked(run: Run, here: Path) -> None:
    write_mapping(here)
    values = {"experiment_name": "b", "base_config_file": "one.yaml", "seeds": [7]}
    Path("e.yaml").write_text(dump_yaml(values))
    Path("d.jsonl").write_text(ROW)
    Path("m").mkdir()
    assert "pass --force" in run("lacuna", "slurm", "e.yaml").output
    assert run("lacuna", "slurm", "e.yaml", "--force").code == 0


def test_the_page_names_every_setting_and_its_example_holds() -> None:
    page = (ROOT / "docs" / "slurm.md").read_text()
    for name in SlurmSettings.model_fields:
        assert f"`{name}`" in page, name
    (example,) = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    Experiment.model_validate(parse_yaml(example, "slurm.md")[0])


def test_a_script_cannot_be_written_into_a_file(here: Path) -> None:
    write_base(here)
    Path("slurm").write_text("")
    with pytest.raises(ConfigError, match="--output slurm: cannot be written: "):
        write_scripts("one.yaml")


# What a job starts.


def test_a_run_of_the_mapping_is_found_and_nothing_may_have_changed(here: Path) -> None:
    configs = write_mapping(here)
    task = find_launch("configs", 1, None)
    assert (task.trainer, task.config, task.gpus) == ("sft", configs / "run_001.yaml", 1)
    assert command(task, {}, None) == [sys.executable, "-m", "lacuna", "sft", "@", str(configs / "run_001.yaml")]
    for index, sha256, problem in (
        (3, None, "there is no run 3: it has runs 0 to 2"),
        (-1, None, "there is no run -1"),
        (None, None, "configs: which run of it? lacuna start configs 0"),
        (1, "0", "run_mapping.yaml: was changed since it was generated or submitted: do that again"),
    ):
        with pytest.raises(ConfigError, match=re.escape(problem)):
            find_launch("configs", index, sha256)
    (configs / "run_001.yaml").write_text("")
    with pytest.raises(ConfigError, match=r"run_001\.yaml: was changed since"):
        find_launch("configs", 1, None)
    (configs / "run_001.yaml").unlink()
    with pytest.raises(ConfigError, match=r"run_001\.yaml: cannot be read: No such file"):
        find_launch("configs", 1, None)
    mapping = configs / "run_mapping.yaml"
    mapping.write_text(mapping.read_text() + "\n")
    with pytest.raises(ConfigError, match="not as `lacuna generate` wrote it: generate it again"):
        find_launch("configs", 1, None)


def test_one_config_is_started_by_its_trainer(here: Path) -> None:
    write_base(here)
    assert find_launch("one.yaml", None, None).trainer == "sft"
    with pytest.raises(ConfigError, match=r"one\.yaml is one config, and has no run 0"):
        find_launch("one.yaml", 0, None)
    with pytest.raises(ConfigError, match="was changed since it was generated or submitted"):
        find_launch("one.yaml", None, "0")
    Path("f.yaml").write_text("model: {path: m}\ndataset: {path: d}\ntraining: {}\n")
    assert command(find_launch("f.yaml", None, None), {}, None)[3:5] == ["finetune", "--config"]
    Path("x.yaml").write_text("a: 1\ntrainer: stf\n")
    with pytest.raises(
        ConfigError, match=r"x\.yaml:2: .*not 'stf'; did you mean 'sft'\?; an experiment has experiment_"
    ):
        find_launch("x.yaml", None, None)
    with pytest.raises(ConfigError, match=r"run_mapping\.yaml: cannot be read: No such file"):
        find_launch(str(here), 0, None)


def test_on_several_nodes_it_is_torchrun(here: Path) -> None:
    write_base(here, gpus=8)
    task = find_launch("one.yaml", None, None)
    surroundings = {"SLURM_NNODES": "2", "SLURM_NODEID": "1", "SLURM_JOB_ID": "9", "SLURM_RESTART_COUNT": "3"}
    with pytest.raises(ConfigError, match="MASTER_ADDR, MASTER_PORT: not set; on several nodes a run is started by"):
        command(task, surroundings, None)
    words = command(task, {**surroundings, "MASTER_ADDR": "n1", "MASTER_PORT": "15009"}, None)
    assert words == [
        sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "8", "--rdzv-id", "9.3",
        "--rdzv-backend", "c10d", "--rdzv-endpoint", "n1:15009", "--rdzv-conf", "is_host=false",
        "--shutdown-timeout", "600", "-m", "lacuna", "sft", "@", str(here / "one.yaml"),
    ]  # fmt: skip
    assert "is_host=true" in rendezvous(1, {**surroundings, "SLURM_NODEID": "0", "MASTER_ADDR": "", "MASTER_PORT": ""})


def send_soon(number: int, seconds: float = 0.5) -> None:
    subprocess.Popen(["bash", "-c", f"sleep {seconds}; kill -{number} {os.getpid()}"])


def test_a_childs_end_and_last_words_are_known(capfd: pytest.CaptureFixture[str]) -> None:
    code, errors = run_watched(["bash", "-c", "echo going on >&2; echo 'ValueError: no' >&2; echo ===== >&2; exit 4"])
    assert (code, last_words(errors)) == (4, "ValueError: no")
    assert capfd.readouterr().err == "going on\nValueError: no\n=====\n"
    assert run_watched(["bash", "-c", "kill -9 $$"])[0] == 137
    send_soon(signal.SIGUSR1)
    assert run_watched(["bash", "-c", "trap 'exit 1' USR1; while true; do sleep 0.1; done"])[0] == 128 + signal.SIGUSR1
    assert last_words("a\rb c\n\n---\n") == "b c"
    assert last_words("") == ""


def test_torchrun_does_not_see_the_signal_that_its_processes_get(tmp_path: Path) -> None:
    """Also one that comes before these have said what to do at it."""
    unblock = "import signal, sys, time; time.sleep(1); signal.signal(10, lambda *_: sys.exit(3)); "
    worker = unblock + "signal.pthread_sigmask(signal.SIG_UNBLOCK, [10]); time.sleep(20)"
    (tmp_path / "worker.py").write_text(worker)
    agent = "import os, subprocess, sys; os.kill(os.getpid(), 10); "
    agent += f"sys.exit(subprocess.Popen([sys.executable, '{tmp_path}/worker.py']).wait() - 2)"
    send_soon(signal.SIGUSR1)
    started = time.monotonic()
    assert run_torchrun([sys.executable, "-c", agent]) == 128 + signal.SIGUSR1
    assert time.monotonic() - started < 15
    assert run_torchrun(["bash", "-c", "exit 5"]) == 5


# The run folder.


def test_a_status_names_the_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert job_of({}) == {}
    assert job_of({"SLURM_JOB_ID": "7"}) == {"job": "7"}
    array = {"SLURM_JOB_ID": "9", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "3"}
    assert job_of(array) == {"job": "7_3"}
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    write_status(tmp_path, "running", 1, 2, loss=0.5, restarts=1)
    write_status(tmp_path, "failed", 1, 2, reason="why")
    status = read_status(tmp_path)
    assert status is not None
    assert (status["job"], status["loss"], status["restarts"], status["reason"]) == ("7", 0.5, 1, "why")
    (tmp_path / "status.json").write_text("{")
    assert read_status(tmp_path) is None


def test_a_restarted_job_waits_for_the_run_folder(tmp_path: Path) -> None:
    assert patience({}) == patience({"SLURM_RESTART_COUNT": "0"}) == 0.5
    assert patience({"SLURM_RESTART_COUNT": "1"}) == 600
    hold = "import sys, time; from pathlib import Path; from lacuna.runs.folder import locked\n"
    hold += "with locked(Path(sys.argv[1])): print('held', flush=True); time.sleep(1.5)"
    with subprocess.Popen([sys.executable, "-c", hold, str(tmp_path)], stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        with pytest.raises(RunError, match=f"is being trained by process {holder.pid}"), locked(tmp_path, 0.2):
            pass
        with locked(tmp_path, 30):
            assert holder.wait(5) == 0


# Status.


def write_run(folder: Path, state: str = "finished", **facts: Any) -> Path:
    folder.mkdir(parents=True)
    measured = {"loss": 1.25, "tokens_per_second": 1234.5}
    status = {"state": state, "step": 5, "total_steps": 10, "process": 1, "time": 1.0, **measured, **facts}
    (folder / "status.json").write_text(json.dumps(status))
    return folder


PENDING, RUNNING = JobState("PENDING", "Resources"), JobState("RUNNING")


@pytest.mark.parametrize(
    ("status", "alive", "now", "past", "state", "reason"),
    [
        ("finished", False, None, None, "finished", ""),
        ("running", True, None, None, "running", ""),
        ("running", False, RUNNING, None, "running", ""),
        ("running", False, PENDING, None, "requeued", "Resources"),
        ("running", False, None, None, "died", "process 1 is gone, and did not say why"),
        ("running", False, None, "NODE_FAIL", "node failed", "why"),
        ("starting", False, None, "OUT_OF_MEMORY", "out of memory", "the node's memory: raise memory"),
        ("running", False, None, "TIMEOUT", "timeout", "the time limit came before the save was over"),
        ("interrupted", False, PENDING, None, "requeued", "Resources"),
        ("interrupted", False, RUNNING, None, "restarting", ""),
        ("interrupted", False, None, None, "interrupted", "why"),
        ("interrupted", False, None, "CANCELLED", "cancelled", "why"),
        ("failed", False, None, "FAILED", "failed", "why"),
        ("failed", False, PENDING, None, "requeued", "Resources"),
        (None, False, PENDING, None, "pending", "Resources"),
        (None, False, RUNNING, None, "starting", ""),
        (None, False, None, "CANCELLED", "cancelled", "job 7_2 is over, and has left no log at "),
        (None, False, None, None, "failed", "job 7_2 is over, and has left no log at "),
    ],
)
def test_what_is_said_about_a_run(
    tmp_path: Path, status: str | None, alive: bool, now: JobState | None, past: str | None, state: str, reason: str
) -> None:
    said = {"reason": "why"} if status in ("failed", "interrupted") or past == "NODE_FAIL" else {}
    folder = write_run(tmp_path / "run", status, job="7_2", **said) if status is not None else tmp_path / "run"
    done = Submission("7", "m", "s", 0, "0-2", "a.sh", str(tmp_path), 1.0)
    queue = Queue({"7_2": now} if now is not None else {}, 2.0)
    watched = Watched("run", folder, done, 2)
    row = _status_of(watched, read_status(folder), alive, queue, {"7_2": JobState(past)} if past is not None else {})
    assert (row.state, row.job) == (state, "7_2")
    assert row.reason.startswith(reason)
    assert reason or not row.reason


def test_the_table_of_a_folder_a_run_and_a_mapping(run: Run, here: Path) -> None:
    write_run(here / "runs" / "b" / "deep", "running", restarts=2, job="5")
    write_run(here / "runs" / "a", "failed", reason="no\nmemory")
    (here / "runs" / "data").mkdir()
    assert table("runs/a")[0].run == "a"
    rows = json.loads(run("lacuna", "status", "runs", "--json").output)
    assert [row["run"] for row in rows] == ["a", "b/deep"]
    assert rows[1] == {
        "run": "b/deep", "folder": "runs/b/deep", "state": "died", "step": 5, "total_steps": 10, "loss": 1.25,
        "tokens_per_second": 1234.5, "restarts": 2, "job": "5",
        "reason": "process 1 is gone, and did not say why",
    }  # fmt: skip
    shown = as_text(table("runs")).splitlines()
    assert shown[0].split() == ["run", "state", "step", "loss", "tokens/s", "restarts", "job", "reason"]
    assert shown[1].split() == ["a", "failed", "5/10", "1.2500", "1,234", "no", "memory"]
    assert shown[3] == "2 runs: 1 failed, 1 died"
    with locked(here / "runs" / "b" / "deep"):
        held = subprocess.run([SCRIPTS / "lacuna", "status", "runs"], capture_output=True, text=True, check=True)
        assert "2 runs: 1 failed, 1 running" in held.stdout
    configs = write_mapping(here)
    write_run(here / "runs" / "a b" / "run_001")
    assert [row.state for row in table(configs)] == ["not submitted", "finished", "not submitted"]
    assert table(configs / "run_mapping.yaml") == table(configs)


def test_nothing_to_tell_is_an_error(run: Run, here: Path) -> None:
    assert "error: runs: no such folder; status takes a run folder" in run("lacuna", "status", "runs").output
    Path("runs").mkdir()
    outcome = run("lacuna", "status", "runs")
    assert (outcome.code, outcome.output.strip()) == (2, "error: runs: no run is in it, and no run_mapping.yaml")


def test_ten_thousand_runs_take_less_than_a_second(here: Path) -> None:
    count = 10_000
    config = write_mapping(here) / "run_000.yaml"
    values = [{"id": f"run_{i:05d}", "params": {"learning_rate": i * 1e-7}, "seed": i, "config": config.name,
               "sha256": "0" * 64, "output_dir": f"runs/a b/run_{i:05d}"} for i in range(count)]  # fmt: skip
    head = read_mapping("configs").head
    Path("configs", "run_mapping.yaml").write_text(seal(dump_yaml({**head, "runs": values})))
    for i in range(count):
        write_run(here / "runs" / "a b" / f"run_{i:05d}", "running" if i % 2 else "finished")
        (here / "runs" / "a b" / f"run_{i:05d}" / ".lock").touch()
    for where in ("runs/a b", "configs"):

        def seconds(where: str = where) -> float:
            started = time.process_time()
            assert as_text(table(where)).endswith("10000 runs: 5000 finished, 5000 died")
            return time.process_time() - started

        assert any(seconds() < 1 for _ in range(5))
    started = time.process_time()
    assert read_mapping("configs").run(9_999).id == "run_09999"
    assert time.process_time() - started < 0.5


def pretend(folder: Path, monkeypatch: pytest.MonkeyPatch, **programs: str) -> Path:
    """Programs of the cluster that count their calls in a file, which is returned."""
    (folder / "bin").mkdir()
    for name, body in programs.items():
        (folder / "bin" / name).write_text(f'#!/bin/bash\necho {name} "$@" >> {folder}/calls\n{body}\n')
        (folder / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder / 'bin'}:/usr/bin:/bin")
    return folder / "calls"


def test_slurm_is_asked_once_in_half_a_minute(tmp_path: Path, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    states = "7_0|PENDING|Resources\\n7_1|RUNNING|None\\n7_2|TIMEOUT|TimeLimit\\n"
    past = "7_3|CANCELLED by 0\\n7_4|OUT_OF_MEMORY\\n7_5|RUNNING\\n"
    calls = pretend(tmp_path, monkeypatch, squeue=f"printf '{states}'", sacct=f"printf '{past}'")
    mapping = read_mapping(write_mapping(here))
    done = Submission("7", str(mapping.file), mapping.sha256, 0, "0-2", "a.sh", str(here), 1.0)
    add_submission(done, mapping.file, here)
    for number, state in enumerate(("running", "running", "interrupted", "running", "running", "running")):
        write_run(here / "runs" / "a b" / f"run_{number:03d}", state, job=f"7_{number}", time=0)
    assert [row.state for row in table("configs")] == ["requeued", "running", "timeout"]
    states_by_folder = ["requeued", "running", "timeout", "cancelled", "out of memory", "died"]
    assert [row.state for row in table("runs/a b")] == states_by_folder
    assert [row.state for row in table("runs/a b")] == states_by_folder
    words = [line.split()[0] for line in calls.read_text().splitlines()]
    assert sorted(words) == ["sacct", "squeue"]
    assert "--jobs=7" in calls.read_text()
    for file in (tmp_path / "cache" / "lacuna").iterdir():
        kept = json.loads(file.read_text())
        file.write_text(json.dumps({**kept, "time": kept["time"] - 31}))
    table("configs")
    assert calls.read_text().count("squeue") == 2
    (tmp_path / "cache" / "lacuna").rename(tmp_path / "elsewhere")
    (tmp_path / "cache" / "lacuna").touch()
    assert read_queue().jobs["7_1"] == JobState("RUNNING")


def test_without_slurm_or_its_accounting_there_is_still_a_table(
    tmp_path: Path, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_run(here / "run", "running", job="7")
    pretend(tmp_path, monkeypatch, squeue="exit 1", sacct="exit 1")
    assert read_queue() == Queue({}, None)
    assert read_past(["7"]) == {}
    assert read_past([]) == {}
    assert table("run")[0].state == "died"


# Submitting.


def test_sbatch_is_needed_to_submit(run: Run, here: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    write_base(here)
    (here / "d.jsonl").write_text('{"messages": [{"role": "user", "content": "a"}]}\n')
    pretend(tmp_path, monkeypatch, squeue="true")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    outcome = run("lacuna", "slurm", "one.yaml", "--submit")
    assert outcome.code == 2
    assert "error: sbatch is not on this machine: --submit works where SLURM is" in outcome.output
    assert (here / "slurm" / "one.sh").exists()


def test_arrays_wait_for_each_other_where_runs_are_counted(
    here: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    calls = pretend(tmp_path, monkeypatch, squeue="true", sbatch="echo '17;cluster'", scontrol="echo MaxArraySize = 2")
    write_mapping(here)
    assert [row.state for row in table("configs")] == ["not submitted"] * 3
    assert write_scripts("configs").submit() == ["17", "17"]
    assert "--dependency" not in calls.read_text()
    Path("c.yaml").write_text("parallel: 1\n")
    assert len(write_scripts("configs", "c.yaml").submit()) == 2
    assert calls.read_text().count("--dependency=afterany:17") == 1
    assert [done["offset"] for done in json.loads(Path("configs/slurm_jobs.json").read_text())] == [0, 2, 0, 2]
    assert [row.state for row in table("configs")] == ["submitted"] * 3


# torchtune.


@pytest.fixture(scope="module")
def tune_experiment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    if not Path(TORCHTUNE_PYTHON).exists():
        pytest.skip("no .venv-torchtune here: make torchtune")
    folder = tmp_path_factory.mktemp("tune")
    llama, rows = make_llama(folder / "llama"), write_rows(folder / "rows.jsonl")
    controls = {**tiny_controls(llama, rows, "lora_llama3_2"), "output_dir": str(folder / "runs")}
    return {
        "experiment_name": "tune", "base_config": "llama3_2/1B_lora_single_device", "seeds": [1], "controls": controls,
    }  # fmt: skip


def test_torchtunes_runs_are_told_about_too(tune_experiment: dict[str, Any], run: Run, here: Path) -> None:
    del tune_experiment["controls"]["seed"]
    done = generate(tune_experiment, "configs")
    Path("c.yaml").write_text("nodes: 2\n")
    with pytest.raises(ConfigError, match="nodes is 2, but lora_finetune_single_device is for one device"):
        write_scripts("configs", "c.yaml")
    (script,) = write_scripts("configs").scripts
    assert "not requeued: torchtune would begin again" in script.read_text()
    good = spawn("lacuna", "start", "configs", "0")
    text = json.loads(json.dumps(tune_experiment))
    text["controls"]["checkpoint_dir"] = str(here / "none")
    text["controls"]["output_dir"] = str(here / "runs")
    generate(text, "bad")
    failing = spawn("lacuna", "start", "bad", "0")
    good.wait()
    failing.wait()
    assert (good.popen.returncode, failing.popen.returncode) == (0, 2), good.output() + failing.output()
    assert table("configs")[0].state == "finished"
    row = table("bad")[0]
    assert row.state == "failed"
    assert row.reason.startswith(f"run_000: checkpointer.checkpoint_dir there is no folder {here / 'none'}"), row.reason
    assert "Traceback" not in failing.output()
    assert "already finished" in run("lacuna", "start", "configs", "0").output
    surroundings = {
        "SLURM_NNODES": "2",
        "SLURM_NODEID": "0",
        "SLURM_JOB_ID": "9",
        "MASTER_ADDR": "h",
        "MASTER_PORT": "1",
    }
    words = command(find_launch("configs", 0, None), surroundings, None)
    assert words[1:4] == ["run", "--nnodes", "2"]
    assert words[-2:] == ["--config", str(here / "configs" / f"{done.runs[0].id}.yaml")]
