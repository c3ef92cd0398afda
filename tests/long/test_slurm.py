"""Runs on a real SLURM of two nodes: several at a time, time limits, requeues, a lost node, several nodes."""

import json
import os
import subprocess
from typing import Any

from safetensors.torch import load_file

from conftest import SCRIPTS
from lacuna.config.yaml_format import dump_yaml
from slurm_jobs import write_base
from slurm_project import ROOT, Project

ONE_HOST = {"MASTER_ADDR": "127.0.0.1", "PET_LOCAL_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"}
"""Both nodes are this machine."""


def test_six_runs_of_which_one_fails_two_at_a_time(project: Project) -> None:
    write_base(project.folder, **project.files, output_dir="ignored")
    experiment = {
        "experiment_name": "grid", "base_config_file": "one.yaml",
        "variables": {"learning_rate": [1e-4, 1e38, 1e-3], "warmup_steps": [0, 1]}, "exclude": [],
        "controls": {"output_dir": "runs", "steps": 3}, "slurm": {"parallel": 2, "lead": 60, "time": 10},
    }  # fmt: skip
    (project.folder / "grid.yaml").write_text(dump_yaml(experiment))
    id = project.submit("grid.yaml")
    assert [row["state"] for row in project.rows("configs")][-1] == "pending"
    refused = project.lacuna("slurm", "configs", "--submit", code=2)
    assert f"job {id} of it is still queued or running: wait for it, or scancel it first" in refused
    most = 0

    def are_over() -> bool:
        nonlocal most
        states = list(project.cluster.jobs().values())
        most = max(most, states.count("RUNNING"))
        return not states

    project.cluster.wait_until(are_over, 300)
    assert most == 2
    rows = project.rows("configs")
    assert [row["state"] for row in rows] == ["finished", "finished", "failed", "failed", "finished", "finished"], rows
    assert [row["job"] for row in rows] == [f"{id}_{index}" for index in range(6)]
    assert "the loss is nan" in rows[2]["reason"]
    assert all((project.folder / "runs" / f"run_00{index}" / "final").is_dir() for index in (0, 1, 4, 5))


def test_a_run_outlives_the_time_limit_a_requeue_and_its_node(project: Project) -> None:
    """Its weights are then those of a run that nothing has disturbed, to the bit."""
    steps = {"steps": 600, "save_every": 50}
    undisturbed = write_base(project.folder, **project.files, **steps, output_dir="calm")
    undisturbed.rename(project.folder / "calm.yaml")
    write_base(project.folder, **project.files, **steps, output_dir="rough")
    id = project.submit("one.yaml")
    project.wait_for_step("rough", 20)
    project.cluster.call("scancel", "--signal=USR1", "--batch", id)
    project.wait_for_requeue(id)
    first = project.step("rough")
    project.wait_for_step("rough", first + 20)
    project.cluster.call("scontrol", "requeue", id)
    project.wait_for_requeue(id)
    second = project.step("rough")
    assert project.rows("rough")[0]["restarts"] == 1
    project.wait_for_step("rough", second + 20)
    node = project.cluster.call("squeue", "--noheader", "--format=%N", "-j", id).strip()
    project.cluster.kill_node(node)
    project.cluster.wait_until(lambda: project.cluster.jobs().get(id) == "PENDING", 120)
    assert project.rows("rough")[0]["state"] == "requeued"
    project.cluster.start_now(id)
    calm = project.submit("calm.yaml")
    project.cluster.wait_until(lambda: project.cluster.jobs().get(id) == "RUNNING", 60)
    assert project.cluster.call("squeue", "--noheader", "--format=%N", "-j", id).strip() != node
    project.cluster.start_node(node)
    project.cluster.wait_for(id, calm)
    (row,) = project.rows("rough")
    assert (row["state"], row["step"], row["restarts"]) == ("finished", 600, 3), project.logs()
    log = (project.folder / "slurm" / "logs" / f"{id}.log").read_text()
    assert log.count("resuming from") == 3
    assert f"lacuna: stopped, and requeued as {id}" in log
    ours, theirs = (load_file(project.folder / run / "final" / "model.safetensors") for run in ("rough", "calm"))
    assert ours.keys() == theirs.keys()
    assert all(ours[name].equal(theirs[name]) for name in ours)


def write_finetune(project: Project, output_dir: str, **training: Any) -> None:
    values = {
        "model": {"path": project.files["model"]}, "dataset": {"path": project.files["data"]}, "device": "cpu",
        "training": {
            "output_dir": output_dir, "learning_rate": 1e-2, "lora_r": 4, "logging_steps": 1, "sequence_length": 128,
            **training,
        },
    }  # fmt: skip
    (project.folder / "adapter.yaml").write_text(dump_yaml(values))


def test_a_run_over_two_nodes_is_saved_and_resumed(project: Project) -> None:
    write_base(project.folder, **project.files, output_dir="two", steps=120, save_every=500, sharding="hybrid")
    (project.folder / "cluster.yaml").write_text(dump_yaml({"nodes": 2, "environment": ONE_HOST}))
    id = project.submit("one.yaml", "--cluster", "cluster.yaml")
    project.wait_for_step("two", 10)
    project.cluster.call("scancel", "--signal=USR1", "--batch", id)
    project.wait_for_requeue(id)
    (row,) = project.rows("two")
    assert row["reason"].startswith("stopped after step ") or row["state"] in ("requeued", "restarting")
    assert row["step"] < 120
    project.cluster.wait_for(id)
    (row,) = project.rows("two")
    assert (row["state"], row["step"], row["restarts"]) == ("finished", 120, 1), project.logs()
    assert project.logs().count("resuming from") == 1
    (start, again) = json.loads((project.folder / "two" / "provenance.json").read_text())["starts"]
    assert start["devices"] == again["devices"] == 2


def test_the_script_for_use_by_hand_runs_over_two_nodes(project: Project) -> None:
    write_finetune(project, "hand", max_steps=4)
    environment = {
        **project.cluster.environment, **ONE_HOST, "HEAD_NODE": "127.0.0.1", "PYTHONPATH": str(ROOT / "src"),
        "PATH": f"{SCRIPTS}:{os.environ['PATH']}",
    }  # fmt: skip
    words = ["sbatch", "--parsable", "-N2", str(ROOT / "scripts" / "slurm.sh"), "finetune", "--config", "adapter.yaml"]
    done = subprocess.run(words, cwd=project.folder, env=environment, capture_output=True, text=True, check=True)
    project.cluster.wait_for(done.stdout.strip())
    log = (project.folder / f"slurm-{done.stdout.strip()}.out").read_text()
    (row,) = project.rows("hand")
    assert row["state"] == "finished", log
