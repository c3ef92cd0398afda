"""Runs on a real SLURM: arrays, what is submitted again, what is cancelled; long/test_slurm.py has the rest."""

import re
from pathlib import Path

from lacuna.config.slurm import SlurmSettings
from lacuna.config.yaml_format import dump_yaml
from lacuna.launch.batch_script import batch_script
from slurm_cluster import Cluster
from slurm_jobs import job, write_base
from slurm_project import Project


def test_sbatch_reads_back_what_was_written(cluster: Cluster, tmp_path: Path) -> None:
    folder = tmp_path / "a $b 'c' \"d\" %x #1"
    folder.mkdir()
    comment = 'it\'s "1" \\ $HOME #2 `x` ; é'
    settings = SlurmSettings(extra={"comment": comment, "exclusive": ""}, setup=["echo here; exit 3"])
    (tmp_path / "a.sh").write_text(batch_script(job(directory=folder, logs=folder, offset=None, gpus=0), settings))
    id = cluster.call("sbatch", "--parsable", tmp_path / "a.sh").strip()
    cluster.wait_for(id)
    assert (folder / f"{id}.log").read_text() == "here\n"
    shown = cluster.call("scontrol", "show", "job", id)
    assert f"\n   Comment={comment} \n" in shown
    assert f"\n   WorkDir={folder}\n" in shown
    assert "Requeue=1 " in shown


def test_what_is_missing_is_submitted_and_what_waits_is_not(project: Project) -> None:
    write_base(project.folder, **project.files, output_dir="ignored")
    experiment = {
        "experiment_name": "some", "base_config_file": "one.yaml", "seeds": [1, 2, 3, 4],
        "controls": {"output_dir": "runs", "steps": 3}, "slurm": {"lead": 60, "time": 10},
    }  # fmt: skip
    (project.folder / "some.yaml").write_text(dump_yaml(experiment))
    said = project.lacuna("run", "some.yaml", "--slurm", "--only", "run_001,run_003")
    (first,) = re.findall(r"^submitted: job (\d+), 2 runs$", said, re.MULTILINE)
    assert set(project.cluster.jobs()) <= {f"{first}_1", f"{first}_3"}
    said = project.lacuna("run", "configs", "--slurm")
    (second,) = re.findall(r"^submitted: job (\d+), 2 runs$", said, re.MULTILINE)
    assert f"left to it\nnote: run_003 is submitted in SLURM's job {first}_3: left to it" in said
    project.cluster.wait_for(first, second)
    rows = project.rows("configs")
    assert [row["state"] for row in rows] == ["finished"] * 4, project.logs()
    assert [row["job"] for row in rows] == [f"{second}_0", f"{first}_1", f"{second}_2", f"{first}_3"]
    assert "nothing to submit: all runs are finished" in project.lacuna("run", "configs", "--slurm")
    assert "already finished: 4 of 4 runs" in project.lacuna("run", "configs")


def test_a_cancelled_job_stays_cancelled(project: Project) -> None:
    write_base(project.folder, **project.files, steps=5000, output_dir="cancelled")
    id = project.submit("one.yaml")
    project.wait_for_step("cancelled", 5)
    assert f"job {id} of it is still queued or running" in project.lacuna("slurm", "one.yaml", "--submit", code=2)
    project.cluster.call("scancel", id)
    project.cluster.wait_for(id)
    (row,) = project.rows("cancelled")
    assert row["state"] == "cancelled"
    assert "requeued" not in project.logs()
    refused = project.lacuna("slurm", "one.yaml", "--cluster", "nowhere.yaml", code=2)
    assert "nowhere.yaml: no such config file" in refused
    (project.folder / "cluster.yaml").write_text("partition: nowhere\n")
    refused = project.lacuna("slurm", "one.yaml", "--cluster", "cluster.yaml", "--submit", code=2)
    assert "error: sbatch refused: " in refused
    assert "invalid partition specified: nowhere" in refused
