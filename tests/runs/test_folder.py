"""The run folder, the same for every trainer: provenance, time, torchtune's runs, evaluation, replay; and seeds."""

import hashlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from conftest import SCRIPTS, Process, Run
from fixtures import make_model, write_chat, write_texts
from forked import COMMANDS
from lacuna.config.yaml_format import dump_yaml
from lacuna.errors import RunError
from lacuna.experiment.generator import generate
from lacuna.files import without_home, write_json
from lacuna.launch.start import command, find_launch
from lacuna.runs.folder import read_status, starts_of, write_status
from lacuna.runs.metrics import read_evaluation, read_metrics
from lacuna.runs.provenance import FIELDS, _git_state, _is_checkout, hub_facts, slurm_facts, weights_fingerprint
from lacuna.torchtune.run import run_torchtune
from torchtune_fixture import TORCHTUNE_PYTHON, make_llama, tiny_controls, write_rows

ROOT = Path(__file__).parents[2]
SECRETS = {"HF_TOKEN": "hf_secret_of_the_test", "WANDB_API_KEY": "wandb_secret_of_the_test"}
SMALL: dict[str, Any] = {
    "sequence_length": 64, "batch_size": 4, "micro_batch_size": 4, "steps": 3, "learning_rate": 1e-2, "log_every": 1,
    "device": "cpu",
}  # fmt: skip


def sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def lacuna(*words: str | Path) -> None:
    """A command of lacuna's, in this process."""
    command, *rest = map(str, words)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [str(SCRIPTS / command), *rest])
        with pytest.raises(SystemExit) as end:
            COMMANDS[command]()
    assert not end.value.code


def edit(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A working directory with a model, data, and secrets in the environment."""
    folder = tmp_path_factory.mktemp("home")
    make_model(folder / "tiny")
    write_chat(folder / "chat.jsonl", rows=12)
    write_texts(folder / "text.jsonl", rows=12)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name, value in SECRETS.items():
            patch.setenv(name, value)
        yield folder


def experiment(base: str, output: str, **settings: Any) -> dict[str, Any]:
    return {
        "experiment_name": output,
        "base_config_file": base,
        "controls": {"output_dir": f"runs/{output}"},
        **settings,
    }


@pytest.fixture(scope="module")
def runs(home: Path) -> Path:
    """For each trainer: seeds 1 and 2 as runs of an experiment, and seed 1 again. SFT starts from a pretrained run."""
    pretrain = {"model_name": "tiny", "initialise": "random", "dataset": "text.jsonl", **SMALL}
    sft = {"model_name": "runs/pretrain/run_000/final", "dataset": "chat.jsonl", "validation_dataset": "chat.jsonl"}
    training = {"batch_size": 4, "gradient_accumulation_steps": 1, "max_steps": 3, "sequence_length": 64, "lora_r": 4}
    adapter = {"model": {"path": "tiny"}, "dataset": {"path": "chat.jsonl"}, "training": training, "device": "cpu"}
    configs = {"pretrain": pretrain, "sft": {**sft, **SMALL}, "finetune": adapter}
    for trainer, values in configs.items():
        base = home / f"{trainer}.yaml"
        own = {"output_dir": "o"} if trainer != "finetune" else {}
        base.write_text(dump_yaml({"trainer": trainer, **values, **own}))
        generate(experiment(base.name, trainer, seeds=[1, 2]), trainer)
        before = ["--config"] if trainer == "finetune" else ["@"]
        again = ["--set", "training.output_dir="] if trainer == "finetune" else ["--output-dir", ""]
        again[-1] += f"runs/{trainer}/again"
        lacuna(trainer, *before, f"{trainer}/run_000.yaml")
        lacuna(trainer, *before, f"{trainer}/run_001.yaml")
        lacuna(trainer, *before, f"{trainer}/run_000.yaml", *again)
    return home / "runs"


# Provenance.


def test_every_start_holds_the_fields_of_the_page(runs: Path) -> None:
    page = (ROOT / "docs" / "run_folder.md").read_text().partition("## provenance.json")[2].partition("\n## ")[0]
    documented = [
        name for row in re.findall(r"^\| (`.+?) \|", page, re.MULTILINE) for name in re.findall(r"`(\w+)`", row)
    ]
    assert len(FIELDS) >= 25
    assert sorted(documented) == sorted(FIELDS)
    for trainer in ("pretrain", "sft", "finetune"):
        (start,) = starts_of(runs / trainer / "run_000")
        assert list(start) == list(FIELDS)


def test_provenance_names_what_a_run_was_made_of(runs: Path, home: Path) -> None:
    (start,) = starts_of(runs / "sft" / "run_000")
    parent = runs / "pretrain" / "run_000"
    found = (home / "chat.jsonl").stat()
    chat = {
        "path": "chat.jsonl", "bytes": found.st_size, "modified": found.st_mtime_ns,
        "sha256": sha256(home / "chat.jsonl"),
    }  # fmt: skip
    mapping = (home / "sft" / "run_mapping.yaml").read_bytes().partition(b"\n")[2]
    assert start["trainer"] == "sft"
    assert start["config_files"] == [{"path": "sft/run_000.yaml", "sha256": sha256(home / "sft" / "run_000.yaml")}]
    assert start["config_sha256"] == sha256(runs / "sft" / "run_000" / "config.toml")
    assert start["data_files"] == [{"use": "training", **chat}, {"use": "validation", **chat}]
    assert start["weights_fingerprint"] == weights_fingerprint(parent / "final")
    assert start["parent_run"] == {
        "folder": "runs/pretrain/run_000", "config_sha256": sha256(parent / "config.toml"), "step": 3
    }  # fmt: skip
    assert start["experiment"] == {
        "name": "sft", "run": "run_000", "params": {}, "seed": 1, "mapping": str(home / "sft" / "run_mapping.yaml"),
        "mapping_sha256": hashlib.sha256(mapping).hexdigest(),
    }  # fmt: skip
    assert (start["seed"], start["total_steps"], start["devices"], start["device"]) == (1, 3, 1, "CPU")
    assert (start["precision"], start["compile"], start["activation_checkpointing"]) == ("float32", False, False)
    assert start["parameters"] == start["trained_parameters"] == 31424
    assert start["cores"] >= 1
    assert start["host_memory"] > 2**30
    assert all(len(start[name]) == 64 for name in ("data_sha256", "tokenizer_sha256", "chat_template_sha256"))
    (adapter,) = starts_of(runs / "finetune" / "run_000")
    assert 0 < adapter["trained_parameters"] < adapter["parameters"]
    (random,) = starts_of(parent)
    assert random["weights_fingerprint"] is random["parent_run"] is None


def test_provenance_names_the_state_of_lacunas_own_source(tmp_path: Path) -> None:
    source, other = tmp_path / "lacuna", tmp_path / ".venv" / "lacuna"
    for folder in (source, other):
        folder.mkdir(parents=True)
        (folder / "__init__.py").touch()
    assert not _is_checkout(source)
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], ["add", "lacuna"], ["commit", "-qm", "first"]):
        subprocess.run([*git, *words], check=True)
    assert (_is_checkout(source), _is_checkout(other)) == (True, False)
    commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    clean = {"commit": commit, "uncommitted_changes": True, "diff_sha256": None}  # .venv is new
    assert _git_state(source) == clean
    (source / "__init__.py").write_text("changed")
    assert (_git_state(source) or {})["diff_sha256"] is not None


def test_no_secret_and_no_host_name_is_in_a_run_folder(runs: Path, tune: Path) -> None:
    host = re.compile(rb"\b%s\b" % re.escape(socket.gethostname().encode()))
    files = [file for place in (runs, tune / "runs") for file in place.rglob("*") if file.is_file()]
    assert len(files) > 100
    for file in files:
        content = file.read_bytes()
        assert not any(secret.encode() in content for secret in SECRETS.values()), file
        assert file.suffix in (".safetensors", ".pt") or not host.search(content), file


def test_slurm_is_counted_and_not_named() -> None:
    environment = {
        "SLURM_JOB_ID": "12", "SLURM_ARRAY_JOB_ID": "10", "SLURM_ARRAY_TASK_ID": "3", "SLURM_NNODES": "2",
        "SLURM_JOB_NODELIST": "gpu[1-2]", "SLURM_JOB_PARTITION": "long", "SLURM_RESTART_COUNT": "1",
    }  # fmt: skip
    found = {"job": "10", "array_task": "3", "nodes": "2", "restarts": "1", "partition": "long"}
    assert slurm_facts(environment) == found
    assert slurm_facts({}) is None


def test_the_home_folder_does_not_name_the_user() -> None:
    home = str(Path.home())
    assert without_home(f"{home}/a.jsonl") == "~/a.jsonl"
    assert without_home(f"training.output_dir={home}/runs") == "training.output_dir=~/runs"
    assert without_home(f"{home}stead/a") == f"{home}stead/a"
    assert without_home(f"/scratch{home}/a") == f"/scratch{home}/a"


def test_other_weights_have_another_fingerprint(tmp_path: Path) -> None:
    content = bytes(range(256)) * 2**14
    (tmp_path / "a.bin").write_bytes(content)
    before = weights_fingerprint(tmp_path)
    for change in (content[:-1] + b"x", b"x" + content[1:], content + b"x"):
        (tmp_path / "a.bin").write_bytes(change)
        assert weights_fingerprint(tmp_path) != before
    (tmp_path / "a.bin").write_bytes(content)
    assert weights_fingerprint(tmp_path) == before


def test_a_hub_data_set_that_cannot_be_asked_has_no_commit() -> None:
    found = {"hub": "nobody/nothing", "subset": None, "split": "train", "commit": None}
    assert hub_facts("nobody/nothing", None, "train") == found


# Status and evaluation.


def test_seconds_add_up_over_starts_and_leave_out_the_time_between(tmp_path: Path) -> None:
    def shift(**changes: Any) -> None:
        status = read_status(tmp_path) or {}
        write_json(tmp_path / "status.json", {**status, **changes, "time": status["time"] - 100})

    def seconds() -> int:
        return round((read_status(tmp_path) or {})["seconds"])

    write_status(tmp_path, "starting", 0, 9)
    shift()
    write_status(tmp_path, "running", 3, 9)
    assert seconds() == 100
    shift(process=1)  # was killed; a new process begins a hundred seconds later
    write_status(tmp_path, "starting", 3, 9)
    assert seconds() == 100
    shift()
    write_status(tmp_path, "finished", 9, 9)
    assert seconds() == 200


def test_runs_say_their_seconds(runs: Path, tune: Path) -> None:
    for folder in (runs / "sft" / "run_000", runs / "finetune" / "run_000", tune / "runs" / "lora" / "run_000"):
        assert 0 < (read_status(folder) or {})["seconds"] < 120


def test_an_evaluation_is_one_object_of_numbers(tmp_path: Path) -> None:
    assert read_evaluation(tmp_path) == {}
    file = tmp_path / "evaluation.json"
    file.write_text('{"accuracy": 0.5, "correct": 12}')
    assert read_evaluation(tmp_path) == {"accuracy": 0.5, "correct": 12.0}
    for text, problem in {
        "[0.5]": "should be one JSON object of numbers",
        '{"accuracy": "0.5", "right": true, "loss": NaN}': "'right' is True, which is no finite number",
        '{"accuracy": 0.5': "cannot be read as JSON",
    }.items():
        file.write_text(text)
        with pytest.raises(RunError, match=re.escape(problem)):
            read_evaluation(tmp_path)


# Replay.


def test_replay_writes_the_generated_config_again_byte_for_byte(runs: Path, home: Path, run: Run) -> None:
    for trainer in ("pretrain", "sft", "finetune"):
        done = run("lacuna", "replay", f"runs/{trainer}/run_000", output=f"{trainer}_again.yaml")
        assert done.code == 0
        assert "nothing has changed around it" in done.output
        assert (home / f"{trainer}_again.yaml").read_bytes() == (home / trainer / "run_000.yaml").read_bytes()
    assert "repeat it: finetune --config finetune_again.yaml --set training.output_dir=runs/finetune/run_000_again" in (
        done.output
    )
    assert run("lacuna", "replay", "runs/sft/run_000", output="sft_again.yaml").code == 2


def test_replay_prints_the_resolved_config_where_flags_were_given(
    runs: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    lacuna("lacuna", "replay", "runs/sft/again")
    printed = capfdbinary.readouterr()
    assert printed.out == (runs / "sft" / "again" / "config.toml").read_bytes()
    assert b"note: the run was started with other settings over run_000.yaml" in printed.err
    assert b"repeat it: sft @ runs/sft/again/config.toml --output-dir runs/sft/again_again" in printed.err


def test_replay_says_what_has_changed(runs: Path, home: Path, run: Run) -> None:
    folder = home / "moved"
    shutil.copytree(runs / "sft" / "run_000", folder)
    provenance = json.loads((folder / "provenance.json").read_text())
    start = provenance["starts"][0]
    torch = start["packages"]["torch"]
    start["packages"]["torch"] = "1.0"
    start["python"], start["weights_fingerprint"], start["git"] = "3.0", "w", {"commit": "c", "diff_sha256": None}
    start["data_files"] = [{"use": "training", "path": "gone.jsonl", "bytes": 1, "sha256": "s"}]
    write_json(folder / "provenance.json", provenance)
    done = run("lacuna", "replay", folder)
    assert done.code == 0
    for line in (
        f"package torch: was 1.0, is {torch}", "python: was 3.0", "weights_fingerprint: was w", "git commit: was c",
        "data gone.jsonl: was s, is not found here", "data chat.jsonl: was not there",
    ):  # fmt: skip
        assert line in done.output
    other = {**start, "python": "2.0", "from_step": 2}
    write_json(folder / "provenance.json", {"starts": [start, {**start, "python": "1.0"}, other]})
    said = run("lacuna", "replay", folder).output
    assert "python: was 3.0" not in said, "the run began again behind this start"
    for line in (r"python: was 1\.0, is \S+ \(start 1 of 2\)", r"python: was 2\.0, is \S+ \(start 2 of 2\)"):
        assert re.search(line, said), said
    assert f"package torch: was 1.0, is {torch} (start" not in said
    write_json(folder / "provenance.json", {"starts": [{**other, "resume": "runs/x/checkpoints/step-00000002"}]})
    said = run("lacuna", "replay", folder).output
    assert "the first 2 steps are another run's: it began from runs/x/checkpoints/step-00000002" in said
    (home / "chat.jsonl").rename(home / "elsewhere.jsonl")
    assert "the config cannot be used here: chat.jsonl: no such file" in run("lacuna", "replay", folder).output
    (home / "elsewhere.jsonl").rename(home / "chat.jsonl")


def test_replay_refuses_what_is_no_run_or_was_edited(runs: Path, home: Path, run: Run) -> None:
    assert "not a run folder" in run("lacuna", "replay", "tiny").output
    folder = home / "edited"
    shutil.copytree(runs / "sft" / "run_000", folder)
    done = run("lacuna", "replay", folder, output="no/such/folder.toml")
    assert (done.code, "cannot be written: No such file" in done.output) == (2, True)
    edit(folder / "config.toml", "seed = 1", "seed = 3")
    done = run("lacuna", "replay", folder)
    assert (done.code, "was edited since the run started" in done.output) == (2, True)
    old = {name: value for name, value in starts_of(folder)[-1].items() if name != "git"}
    write_json(folder / "provenance.json", {"starts": [old]})
    done = run("lacuna", "replay", folder)
    assert (done.code, "says nothing of git: it cannot be compared" in done.output) == (2, True)
    (folder / "provenance.json").unlink()
    done = run("lacuna", "replay", folder)
    assert (done.code, "holds no hash of the config" in done.output) == (2, True)


# Seeds.


@pytest.mark.parametrize("trainer", ["pretrain", "sft", "finetune"])
def test_a_seed_gives_the_same_bits_and_another_gives_another_model(runs: Path, trainer: str) -> None:
    file = "adapter_model.safetensors" if trainer == "finetune" else "model.safetensors"
    one, two, again = (sha256(runs / trainer / run / "final" / file) for run in ("run_000", "run_001", "again"))
    assert one == again != two
    first_loss = [
        next(line["loss"] for line in read_metrics(runs / trainer / run) if "loss" in line)
        for run in ("run_000", "run_001", "again")
    ]
    assert first_loss[0] == first_loss[2] != first_loss[1]


def test_the_order_of_the_data_and_dropout_each_follow_the_seed(home: Path) -> None:
    """The weights to begin with are given. Of one row there is one order, so what differs is dropout's doing."""
    write_chat(home / "one.jsonl", rows=1)
    shutil.copytree("tiny", "dropout")
    config = json.loads((home / "dropout" / "config.json").read_text())
    write_json(home / "dropout" / "config.json", {**config, "attention_dropout": 0.5})
    found = {}
    for model, data in (("tiny", "one"), ("dropout", "one"), ("tiny", "chat")):
        for seed in (1, 2):
            settings = {**SMALL, "batch_size": 1, "micro_batch_size": 1, "steps": 2, "seed": seed, "attention": "eager"}
            folder = f"alone/{model}_{data}_{seed}"
            words = [word for name, value in settings.items() for word in (f"--{name.replace('_', '-')}", str(value))]
            lacuna("sft", "--model-name", model, "--dataset", f"{data}.jsonl", "--output-dir", folder, *words)
            found[model, data, seed] = sha256(home / folder / "final" / "model.safetensors")
    assert found["tiny", "one", 1] == found["tiny", "one", 2]
    assert found["dropout", "one", 1] != found["dropout", "one", 2]
    assert found["tiny", "chat", 1] != found["tiny", "chat", 2]


# torchtune.


def tune_runs(folder: Path, name: str, base: str, seeds: list[int], controls: dict[str, Any]) -> None:
    """Generate, and start all runs at once."""
    controls = {**controls, "output_dir": f"runs/{name}"}
    controls.pop("seed")
    words = {"experiment_name": name, "base_config": base, "seeds": seeds, "controls": controls}
    generate(words, folder / name, validate=False, torchtune_python=TORCHTUNE_PYTHON)
    started = [start(folder, name, index) for index in range(len(seeds))]
    for process in started:
        assert process.wait() is not None


def start(folder: Path, name: str, index: int) -> Process:
    words = ["start", str(folder / name), str(index), "--torchtune-python", TORCHTUNE_PYTHON]
    return Process(str(SCRIPTS / "lacuna"), *words)


@pytest.fixture(scope="module")
def tune(home: Path) -> Path:
    """LoRA by seeds 1 and 2, and full fine-tuning by the same, on real torchtune."""
    if not Path(TORCHTUNE_PYTHON).exists():
        pytest.skip("no .venv-torchtune here: make torchtune")
    model, rows = make_llama(home / "llama"), write_rows(home / "rows.jsonl")
    lora = {**tiny_controls(model, rows, "lora_llama3_2"), "learning_rate": 1e-2, "clip_grad_norm": 1.0}
    full = {
        **tiny_controls(model, rows, "llama3_2"), "optimizer": {"_component_": "torch.optim.AdamW", "lr": 1e-2},
        "optimizer_in_bwd": False, "max_steps_per_epoch": 4, "epochs": 2, "log_every_n_steps": 2,
        "metric_logger": {"_component_": "torchtune.training.metric_logging.StdoutLogger"},
    }  # fmt: skip
    tune_runs(home, "lora", "llama3_2/1B_lora_single_device", [1, 2], lora)
    tune_runs(home, "full", "llama3_2/1B_full_single_device", [1, 2], {**full, "~metric_logger.log_dir": None})
    return home


def weights(run: Path, file: str) -> str:
    return sha256(run / "epoch_0" / file)


def test_torchtune_leaves_the_same_run_folder(tune: Path) -> None:
    folder = tune / "runs" / "lora" / "run_000"
    status = read_status(folder) or {}
    lines = read_metrics(folder)
    assert (status["state"], status["step"], status["total_steps"], status["restarts"]) == ("finished", 8, 8, 0)
    assert [line["step"] for line in lines] == [*range(1, 9)]
    assert set(lines[0]) == {"step", "loss", "learning_rate", "tokens_per_second", "gradient_norm"}
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert status["loss"] == lines[-1]["loss"]
    assert (folder / "config.yaml").read_bytes() == (tune / "lora" / "run_000.yaml").read_bytes()
    (entry,) = starts_of(folder)
    assert list(entry) == list(FIELDS)
    assert (entry["trainer"], entry["recipe"], entry["seed"]) == ("torchtune", "lora_finetune_single_device", 1)
    assert entry["packages"]["torchtune"] == "0.6.1"
    assert entry["experiment"]["run"] == "run_000"
    assert entry["data_files"][0]["sha256"] == sha256(tune / "rows.jsonl")
    assert entry["weights_fingerprint"] == weights_fingerprint(tune / "llama")
    assert (entry["precision"], entry["device"], entry["total_steps"]) == ("float32", "CPU", 8)


def test_torchtunes_logger_to_standard_output_is_read_too(tune: Path) -> None:
    folder = tune / "runs" / "full" / "run_000"
    status = read_status(folder) or {}
    assert [line["step"] for line in read_metrics(folder)] == [2, 4, 6, 8]
    assert (status["step"], status["total_steps"]) == (8, 8)


def test_the_final_folder_holds_the_merged_weights_without_the_adapter(tune: Path) -> None:
    """transformers would apply an adapter that lies beside merged weights a second time."""
    for name, epoch in (("lora", "epoch_0"), ("full", "epoch_1")):
        folder = tune / "runs" / name / "run_000"
        model: Any = AutoModelForCausalLM.from_pretrained(folder / "final", dtype="float32")
        (file,) = (folder / epoch).glob("model-*.safetensors")
        merged = load_file(file)
        loaded = model.state_dict()
        assert all((loaded[name] == tensor).all() for name, tensor in merged.items())
        assert not [path for path in (folder / "final").iterdir() if path.name.startswith("adapter_")]
        assert (folder / "final" / file.name).stat().st_ino == file.stat().st_ino


def test_a_seed_changes_torchtunes_adapters_and_nothing_of_full_fine_tuning(tune: Path) -> None:
    """torchtune's sampler shuffles by 0 whatever the seed is: the losses of full fine-tuning are the same to the bit,
    so the order of the data is too, and its runs are equal."""
    lora, full = ([tune / "runs" / name / f"run_00{index}" for index in (0, 1)] for name in ("lora", "full"))
    assert weights(lora[0], "adapter_model.safetensors") != weights(lora[1], "adapter_model.safetensors")
    curves = [[line["loss"] for line in read_metrics(folder)] for folder in (*lora, *full)]
    assert curves[0][0] == curves[1][0]
    assert curves[0] != curves[1]
    assert curves[2] == curves[3]
    assert sha256(*(full[0] / "final").glob("*.safetensors")) == sha256(*(full[1] / "final").glob("*.safetensors"))


def test_a_torchtune_run_begun_again_is_the_same_to_the_bit_and_not_mixed_up(tune: Path) -> None:
    """Its first start was killed, after it had logged what must not be read again."""
    folder = tune / "runs" / "lora" / "run_000"
    before = weights(folder, "adapter_model.safetensors"), [line["loss"] for line in read_metrics(folder)]
    write_json(folder / "status.json", {**(read_status(folder) or {}), "state": "running", "seconds": 1000.0})
    (folder / "logs" / "log_1.txt").write_text("Step 99 | loss:1.0 \n")
    (folder / "metrics.jsonl").write_text('{"step": 99, "loss": 1.0}\n')
    process = start(tune, "lora", 0)
    process.wait_until(lambda: (read_status(folder) or {}).get("state") == "running")
    process.wait()
    after = weights(folder, "adapter_model.safetensors"), [line["loss"] for line in read_metrics(folder)]
    status = read_status(folder) or {}
    assert after == before
    assert (status["state"], status["restarts"]) == ("finished", 1)
    assert status["seconds"] > 1000
    assert len(starts_of(folder)) == 2
    assert len(list((folder / "logs").glob("log_*.txt"))) == 1
    assert "already finished" in start(tune, "lora", 0).wait()


def test_damaged_final_weights_of_torchtune_are_made_again_or_refused(tune: Path) -> None:
    folder = tune / "runs" / "lora" / "run_001"
    (file,) = (folder / "final").glob("*.safetensors")
    kept = file.read_bytes()
    file.unlink()
    assert f"is damaged ({file.name} is missing): it is made again from the last epoch" in start(tune, "lora", 1).wait()
    assert file.read_bytes() == kept
    file.write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))  # the epoch's file is the same one
    said = start(tune, "lora", 1).wait()
    assert f"{file.name} has changed since it was written, and so is the last epoch's folder" in said
    file.write_bytes(kept)
    assert "already finished" in start(tune, "lora", 1).wait()


def test_torchtune_without_a_step_is_a_failed_run(tune: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """torchtune ends with 0 where a step needs more rows than there are; so `lacuna start` does not start it."""
    values = {**tiny_controls(tune / "llama", tune / "rows.jsonl", "lora_llama3_2"), "batch_size": 65}
    tune_runs(tune, "none", "llama3_2/1B_lora_single_device", [1], values)
    status = read_status(tune / "runs" / "none" / "run_000") or {}
    assert (status["state"], status["step"]) == ("failed", 0)
    assert "batch_size 64 rows are fewer than one step of 65 × 1 accumulated: no step at all" in status["reason"]
    words = command(find_launch(str(tune / "none"), 0, None), {}, TORCHTUNE_PYTHON)
    assert run_torchtune(words, tune / "none" / "run_000.yaml", 1, "runs/none/run_000") == 1
    assert "error: torchtune trained no step" in capfd.readouterr().err
    status = read_status(tune / "runs" / "none" / "run_000") or {}
    assert (status["state"], status["step"]) == ("failed", 0)
    assert "torchtune trained no step: batch_size × gradient_accumulation_steps" in status["reason"]
    assert not (tune / "runs" / "none" / "run_000" / "final").exists()


def test_replay_of_a_torchtune_run(tune: Path, run: Run) -> None:
    done = run("lacuna", "replay", "runs/lora/run_001", output="tune_again.yaml")
    assert done.code == 0
    assert (tune / "tune_again.yaml").read_bytes() == (tune / "lora" / "run_001.yaml").read_bytes()
    assert "nothing has changed around it" in done.output
    assert "--config tune_again.yaml output_dir=runs/lora/run_001_again" in done.output
    edit(tune / "llama" / "special_tokens.json", "python_tag", "python_tags")
    assert "tokenizer_sha256: was" in run("lacuna", "replay", "runs/lora/run_001").output
    edit(tune / "llama" / "special_tokens.json", "python_tags", "python_tag")


@dataclass
class Pretended:
    """A `tune` that prints what it is told, for what no tiny real run shows."""

    folder: Path

    def __call__(self, script: str, recipe: str = "lora_finetune_single_device", **values: Any) -> int:
        (self.folder / "c.yaml").write_text(dump_yaml({"output_dir": "run", "device": "cpu", "epochs": 1, **values}))
        tune = self.folder / "tune"
        tune.write_text(f"#!{sys.executable}\nimport os, signal, sys, time\n{script}")
        tune.chmod(0o755)
        return run_torchtune([str(tune), "run", recipe, "--config", "c.yaml"], self.folder / "c.yaml", 2, "run")

    def status(self) -> dict[str, Any]:
        return read_status(self.folder / "run") or {}


BAR = r'print("\r1|{0}|Loss: {1}: 50%|##  | {0}/4 [00:00<00:00]", end="", file=sys.stderr, flush=True)'
WANDB = {"metric_logger": {"_component_": "torchtune.training.metric_logging.WandBLogger", "project": "p"}}


@pytest.fixture
def pretended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Pretended:
    monkeypatch.chdir(tmp_path)
    return Pretended(tmp_path)


def test_of_a_logger_to_elsewhere_the_progress_bars_losses_are_kept(pretended: Pretended) -> None:
    """And of a null seed, the one that torchtune drew."""
    script = "print('Setting manual seed to local seed 77. Local seed', file=sys.stderr)\n"
    script += "\n".join(BAR.format(step, 5 - step) for step in (1, 2, 2, 3, 4))
    assert pretended(script, seed=None, **WANDB) == 0
    assert read_metrics(Path("run")) == [{"step": step, "loss": 5.0 - step} for step in (1, 2, 3, 4)]
    assert (pretended.status()["state"], pretended.status()["total_steps"]) == ("finished", 4)
    assert starts_of(Path("run"))[0]["seed"] == 77


def test_the_status_follows_while_torchtune_runs(pretended: Pretended) -> None:
    """The speed of two devices is the sum of both; a line that is not whole yet is left for later."""
    script = (
        "import json, pathlib\nlogs = pathlib.Path('run/logs'); logs.mkdir(); log = (logs / 'log_2.txt').open('w')\n"
    )
    script += (
        "log.write('Step 1 | loss:4.5 lr:0.1 tokens_per_second_per_gpu:10.0 peak_memory_alloc:2.5 \\nStep 2 | lo')\n"
    )
    script += "log.flush()\nfor _ in range(600):\n    status = json.load(open('run/status.json'))\n"
    script += "    if status['step'] == 1: break\n    time.sleep(0.02); print('.', flush=True)\n"
    script += "assert status['loss'] == 4.5\n"
    script += "log.write('ss:4.0 lr:0.1 \\n'); log.flush()\n"
    disk = {"_component_": "torchtune.training.metric_logging.DiskLogger", "log_dir": "${output_dir}/logs"}
    assert pretended(script, metric_logger=disk) == 0
    assert read_metrics(Path("run")) == [
        {"step": 1, "loss": 4.5, "learning_rate": 0.1, "tokens_per_second": 20.0, "peak_memory_gib": 2.5},
        {"step": 2, "loss": 4.0, "learning_rate": 0.1},
    ]


def test_the_loss_of_a_status_is_that_of_its_step_where_the_bar_is_ahead_of_the_log(pretended: Pretended) -> None:
    script = f"print('Step 1 | loss:4.0 ')\n{BAR.format(2, 3.0)}\ntime.sleep(1)\nprint('Step 2 | loss:3.0 ')\n"
    out = {"metric_logger": {"_component_": "torchtune.training.metric_logging.StdoutLogger"}}
    assert pretended(script, **out) == 0
    assert (pretended.status()["step"], pretended.status()["loss"]) == (2, 3.0)


def test_a_resumed_torchtune_run_replaces_the_steps_that_it_takes_again(pretended: Pretended) -> None:
    out = {"metric_logger": {"_component_": "torchtune.training.metric_logging.StdoutLogger"}}
    lines = "".join(f"print('Step {step} | loss:{step}.0 ')\n" for step in (1, 2, 3))
    assert pretended(lines + "sys.exit('RuntimeError: power')", resume_from_checkpoint=True, **out) == 1
    assert (pretended.status()["state"], pretended.status()["reason"]) == ("failed", "RuntimeError: power")
    assert pretended("print('Step 3 | loss:9.0 ')\n", resume_from_checkpoint=True, **out) == 0
    assert [line["loss"] for line in read_metrics(Path("run"))] == [1.0, 2.0, 9.0]


def test_a_loss_that_is_no_number_fails_the_run_though_torchtune_goes_on(
    pretended: Pretended, capfd: pytest.CaptureFixture[str]
) -> None:
    assert pretended("\n".join([BAR.format(1, 4.0), BAR.format(2, "nan"), BAR.format(3, "nan")]), **WANDB) == 1
    assert pretended.status()["reason"].startswith("step 2: the loss is not a number")
    assert read_metrics(Path("run")) == [{"step": 1, "loss": 4.0}, {"step": 2}, {"step": 3}]
    assert "error: step 2: the loss is not a number" in capfd.readouterr().err


def test_a_stopped_torchtune_run_is_interrupted(pretended: Pretended) -> None:
    assert pretended("os.kill(os.getppid(), signal.SIGTERM)\ntime.sleep(60)", **WANDB) == 128 + signal.SIGTERM
    assert pretended.status()["state"] == "interrupted"


def test_torchtune_does_not_run_on_where_its_folder_cannot_be_written(pretended: Pretended) -> None:
    script = "os.remove('run/status.json'); os.mkdir('run/status.json'); open('pid', 'w').write(str(os.getpid()))\n"
    with pytest.raises(IsADirectoryError):
        pretended(f"{script}{BAR.format(1, 4.0)}\ntime.sleep(60)", **WANDB)
    with pytest.raises(ProcessLookupError):
        os.kill(int((pretended.folder / "pid").read_text()), 0)


def test_a_folder_of_something_else_is_refused_and_stays(pretended: Pretended) -> None:
    assert pretended("sys.exit('KeyError: a mistake')", recipe="own.py", seed=2) == 1
    assert pretended("pass", recipe="own.py") == 0
    assert pretended.status()["state"] == "finished"
    with pytest.raises(RunError, match="holds a run of another config"):
        pretended("pass", recipe="own.py", seed=3)
    (pretended.folder / "run" / "status.json").unlink()
    with pytest.raises(RunError, match="not empty and not a run folder"):
        pretended("pass", recipe="own.py")
    assert (pretended.folder / "run" / "config.yaml").exists()


def test_torchtune_and_lacunas_trainers_do_not_write_into_each_others_runs(
    runs: Path, home: Path, pretended: Pretended, run: Run
) -> None:
    assert pretended("pass", recipe="own.py") == 0
    done = run("sft", "--model-name", home / "tiny", "--dataset", home / "chat.jsonl", **{**SMALL, "output_dir": "run"})
    assert (done.code, "holds a torchtune run" in done.output) == (2, True)
    shutil.rmtree("run")
    shutil.copytree(runs / "sft" / "run_000", "run")
    with pytest.raises(RunError, match="holds a run of another config"):
        pretended("pass", recipe="own.py")


def test_of_several_nodes_only_the_first_writes(pretended: Pretended, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_NODEID", "1")
    assert pretended("print('here')") == 0
    assert not (pretended.folder / "run").exists()
