"""What a run refuses, each time with one clear message, exit code 2 and nothing lost."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import SCRIPTS, Run, flags, spawn
from fixtures import make_model, make_tokenizer, write_chat
from lacuna.config.training import SFTConfig
from lacuna.errors import RunError
from lacuna.runs.folder import locked
from lacuna.runs.metrics import read_metrics
from lacuna.runs.provenance import write_provenance
from lacuna.train.kept import damage, manifest_text, newest_whole
from lacuna.train.session import resume_now

Settings = dict[str, Any]


@pytest.fixture
def settings(model_folder: Path, chat_file: Path, tmp_path: Path) -> Settings:
    return {
        "model_name": model_folder, "dataset": chat_file, "steps": 4, "batch_size": 4, "micro_batch_size": 2,
        "sequence_length": 96, "learning_rate": 1e-2, "save_every": 2, "log_every": 1, "output_dir": tmp_path / "out",
    }  # fmt: skip


@pytest.fixture(scope="module")
def stopped_run(model_folder: Path, chat_file: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Settings]:
    """A run with checkpoints 2 and 4 or later ones, stopped before its end; copy it before use."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    settings = {
        "model_name": model_folder, "dataset": chat_file, "steps": 2000, "batch_size": 4, "micro_batch_size": 2,
        "sequence_length": 96, "learning_rate": 1e-3, "save_every": 2, "log_every": 1,
    }  # fmt: skip
    process = spawn("sft", **settings, output_dir=folder)
    process.wait_until(lambda: len(list(folder.glob("checkpoints/step-*"))) == 2)
    process.stop(signal.SIGTERM)
    return folder, settings


@pytest.fixture
def stopped(stopped_run: tuple[Path, Settings], tmp_path: Path) -> tuple[Path, Settings]:
    folder, settings = stopped_run
    shutil.copytree(folder, tmp_path / "run")
    return tmp_path / "run", {**settings, "output_dir": tmp_path / "run"}


def assert_refused(outcome: Any, *expected: str) -> None:
    assert outcome.code == 2, outcome.output
    assert "Traceback" not in outcome.output
    for words in expected:
        assert words in outcome.output


def test_all_cheap_problems_are_told_at_once(run: Run, settings: Settings) -> None:
    wrong = {**settings, "model_name": "./nowhere", "dataset": "missing.jsonl", "resume": "runs/gone/step-00000001"}
    assert_refused(
        run("sft", **wrong),
        "model_name ./nowhere: no such folder",
        "missing.jsonl: no such file or folder",
        "resume runs/gone/step-00000001: there is no checkpoint",
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"device": "cuda"}, "device 'cuda' is not available here (available: cpu); try --device auto"),
        ({"sequence_length": 4096}, "sequence_length 4096 is more than the 512 positions of"),
        ({"warmup_steps": 4}, "warmup takes 4 of 4 steps, so the learning rate would never reach its peak"),
        ({"batch_size": 400}, "batch_size is 400 rows, but the data fill only"),
        ({"chat_template": "none.jinja"}, "chat_template none.jinja: No such file"),
        ({"resume": "nowhere/step-00000002"}, "resume nowhere/step-00000002: there is no checkpoint"),
        ({"output_dir": "/proc/lacuna"}, "output_dir /proc/lacuna: cannot be written"),
    ],
)
def test_settings_that_cannot_work(run: Run, settings: Settings, change: Settings, message: str) -> None:
    assert_refused(run("sft", **{**settings, **change}), message)


def test_a_model_revision_is_for_the_hub(run: Run, settings: Settings) -> None:
    assert_refused(run("sft", **settings, model_revision="main"), "model_revision is for hub models, but")


def test_a_tokenizer_without_chat_template(run: Run, settings: Settings, tmp_path: Path) -> None:
    folder = make_model(tmp_path / "base")
    make_tokenizer(chat_template=None).save_pretrained(folder)
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    wrong = {**settings, "model_name": folder}
    assert_refused(run("sft", **wrong), "the tokenizer has no chat template, and the data are conversations")
    (tmp_path / "template.jinja").write_text(make_tokenizer().chat_template)
    outcome = run("sft", **wrong, chat_template=tmp_path / "template.jinja")
    assert outcome.code == 0, outcome.output
    assert (tmp_path / "out" / "final" / "chat_template.jinja").exists()


def test_a_tokenizer_larger_than_the_model(run: Run, settings: Settings, tmp_path: Path) -> None:
    folder = make_model(tmp_path / "small", vocabulary=300)
    assert_refused(
        run("sft", **{**settings, "model_name": folder}), "the tokenizer has", "the model only 300 embeddings"
    )


def test_a_folder_without_tokenizer_or_model(run: Run, settings: Settings, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    outcome = run("sft", **{**settings, "model_name": tmp_path / "empty"})
    assert_refused(outcome, "no tokenizer could be loaded", "no model could be found")


def test_a_slow_tokenizer(run: Run, settings: Settings, tmp_path: Path) -> None:
    folder = make_model(tmp_path / "canine")
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "CanineTokenizer"}')
    assert_refused(run("sft", **{**settings, "model_name": folder}), "only fast tokenizers")


def test_weights_that_lack_something(run: Run, settings: Settings, tmp_path: Path) -> None:
    folder = make_model(tmp_path / "holes")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    message = "the weights lack model.layers.1.mlp.up_proj.weight, which would start at random"
    assert_refused(run("sft", **{**settings, "model_name": folder}), message)


def test_pickled_weights_are_not_loaded(run: Run, settings: Settings, tmp_path: Path) -> None:
    folder = make_model(tmp_path / "pickle")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert_refused(run("sft", **{**settings, "model_name": folder}), "its weights cannot be loaded")


def test_a_diverging_loss_stops_before_the_optimizer_moves(run: Run, settings: Settings, tmp_path: Path) -> None:
    wild = {**settings, "learning_rate": 1e25, "steps": 20, "save_every": 1, "keep_last": 20, "warmup_share": 0}
    outcome = run("sft", **wild, max_gradient_norm=1e9)
    assert_refused(outcome, "The optimizer has not moved", "whose first row begins", "lower learning_rate (now 1e+25)")
    status = json.loads((tmp_path / "out" / "status.json").read_text())
    assert status["state"] == "failed"
    assert "The optimizer has not moved" in status["reason"]
    for checkpoint in (tmp_path / "out" / "checkpoints").glob("step-*"):
        (shard,) = checkpoint.glob("*.safetensors")
        assert all(tensor.isfinite().all() for tensor in load_file(shard).values() if tensor.is_floating_point())


def test_a_full_disk_keeps_the_checkpoints_before(settings: Settings, tmp_path: Path) -> None:
    """A limit on the size of written files stands in for the disk: the write fails in the same place."""
    process = spawn("sft", **{**settings, "steps": 1000})
    process.wait_until(lambda: list(tmp_path.glob("out/checkpoints/step-*")))
    resource.prlimit(process.popen.pid, resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
    output = process.wait()
    assert process.popen.returncode == 2, output
    assert "could not be written" in output
    assert "File too large" in output
    assert "make room on the disk" in output
    assert "Traceback" not in output
    named = list(tmp_path.glob("out/checkpoints/step-*"))
    assert named
    assert [damage(path) for path in named] == [None] * len(named)
    assert not list(tmp_path.glob("out/checkpoints/.*"))


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
def test_a_disk_too_small_is_refused_before_training(run: Run, settings: Settings, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)], check=True)
    try:
        outcome = run("sft", **{**settings, "output_dir": disk / "out"})
    finally:
        subprocess.run(["umount", str(disk)], check=True)
    assert_refused(outcome, "one checkpoint and the final model take 0.00 GiB, but only 0.00 GiB are free")


def test_a_folder_that_is_no_run_is_left_alone(run: Run, settings: Settings, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    assert_refused(run("sft", **settings), "is not empty and not a run folder (it holds thesis.tex)")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.tex"]


def test_an_output_dir_that_is_a_file(run: Run, settings: Settings, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    assert_refused(run("sft", **settings), "is a file")


def test_a_run_in_use_is_not_entered_twice(run: Run, settings: Settings, tmp_path: Path) -> None:
    script = "import sys, time; from pathlib import Path; from lacuna.runs.folder import locked\n"
    script += "with locked(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
    words = [sys.executable, "-c", script, str(tmp_path / "out")]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        assert_refused(run("sft", **settings), f"is being trained by process {holder.pid}")
        holder.kill()
        holder.wait()
    with locked(tmp_path / "out"):
        pass


def test_a_failed_start_can_be_mended_in_the_same_folder(run: Run, settings: Settings) -> None:
    assert run("sft", **{**settings, "dataset": "missing.jsonl"}).code == 2
    assert run("sft", **settings).code == 0


def test_other_settings_do_not_resume_a_run(run: Run, stopped: tuple[Path, Settings]) -> None:
    folder, settings = stopped
    before = sorted(path.name for path in folder.glob("checkpoints/*"))
    outcome = run("sft", **{**settings, "learning_rate": 2e-3, "seed": 7})
    assert_refused(outcome, "learning_rate was 0.001, now 0.002", "seed was 42, now 7", "choose another --output-dir")
    assert sorted(path.name for path in folder.glob("checkpoints/*")) == before


def test_resume_never_does_not_overwrite(run: Run, stopped: tuple[Path, Settings]) -> None:
    folder, settings = stopped
    before = (folder / "metrics.jsonl").read_bytes()
    assert_refused(run("sft", **settings, resume="never"), "holds a run already, and resume is 'never'")
    assert (folder / "metrics.jsonl").read_bytes() == before


def test_a_pretraining_run_is_no_sft_run(run: Run, stopped: tuple[Path, Settings], text_file: Path) -> None:
    _, settings = stopped
    assert_refused(run("pretrain", **{**settings, "dataset": text_file}), "holds a sft run")


def test_what_a_run_began_from_is_for_its_first_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint to begin from, or never, must not keep a run from going on when it is started again."""
    values = {"model_name": "m", "dataset": "d", "output_dir": str(tmp_path), "steps": 1}
    begun, anew = (SFTConfig(**values, resume=resume) for resume in ("elsewhere/step-00000002", "never"))
    assert [resume_now(config, tmp_path) for config in (begun, anew)] == [begun.resume, "never"]
    for config in (begun, anew):
        write_provenance(tmp_path, ["sft"], {"resume": config.resume})
    assert [resume_now(config, tmp_path) for config in (begun, anew)] == ["auto", "never"]
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert resume_now(anew, tmp_path) == "auto"


def test_an_older_checkpoint_resumes_only_elsewhere(run: Run, stopped: tuple[Path, Settings], tmp_path: Path) -> None:
    folder, settings = stopped
    older, newest = sorted(folder.glob("checkpoints/step-*"))
    assert_refused(run("sft", **settings, resume=older), f"already holds {newest.name}, which is newer")
    process = spawn("sft", **{**settings, "output_dir": tmp_path / "fork"}, resume=older)
    process.wait_until(lambda: len(read_metrics(tmp_path / "fork")) >= 2)
    assert "go on with:" in (output := process.stop(signal.SIGTERM))
    assert output.rstrip().endswith("--resume auto")
    first = read_metrics(tmp_path / "fork")[0]["step"]
    assert first == int(older.name.removeprefix("step-")) + 1


def test_changed_data_do_not_resume(run: Run, stopped: tuple[Path, Settings], tmp_path: Path) -> None:
    _, settings = stopped
    other = write_chat(tmp_path / "other.jsonl", seed=1)
    original = Path(settings["dataset"]).read_bytes()
    Path(settings["dataset"]).write_bytes(other.read_bytes())
    try:
        assert_refused(
            run("sft", **settings), "was made of something else: training data: other rows than it was trained on"
        )
    finally:
        Path(settings["dataset"]).write_bytes(original)


def test_another_precision_does_not_resume(run: Run, stopped: tuple[Path, Settings]) -> None:
    """precision is the same word, but this device computes otherwise than the checkpoint's did."""
    folder, settings = stopped
    for checkpoint in folder.glob("checkpoints/step-*"):
        state = json.loads((checkpoint / "state.json").read_text())
        rewrite(checkpoint, "state.json", json.dumps({**state, "precision": "torch.bfloat16"}).encode())
    assert_refused(run("sft", **settings), "was trained in torch.bfloat16, this would be torch.float32")


def rewrite(checkpoint: Path, name: str, content: bytes) -> None:
    """Change a file together with its line in the manifest."""
    import hashlib

    (checkpoint / name).write_bytes(content)
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    manifest["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (checkpoint / "manifest.json").write_text(manifest_text(manifest["files"]))


def delete(path: Path) -> None:
    path.unlink()


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("harm", [delete, truncate, flip_a_bit])
@pytest.mark.parametrize("name", ["manifest.json", "state.json", "shard-00001-model-00001-of-00001.safetensors"])
def test_a_harmed_checkpoint_is_put_aside_for_the_one_before(
    stopped: tuple[Path, Settings], harm: Any, name: str
) -> None:
    folder, _ = stopped
    older, newest = sorted(folder.glob("checkpoints/step-*"))
    harm(newest / name)
    warnings: list[str] = []
    assert newest_whole(folder / "checkpoints", warnings.append) == older
    assert len(warnings) == 1
    assert f"{newest} is damaged ({name}" in warnings[0]
    assert (folder / "checkpoints" / f"damaged-{newest.name}").is_dir()


def test_a_checkpoint_cut_off_at_any_file_is_never_picked_up(stopped: tuple[Path, Settings]) -> None:
    """Every state of a copy that stopped half way: after each file, and in the middle of each."""
    folder, _ = stopped
    older, newest = sorted(folder.glob("checkpoints/step-*"))
    files = {path.name: path.read_bytes() for path in sorted(newest.iterdir())}
    for count in range(len(files)):
        for half in (False, True):
            shutil.rmtree(newest, ignore_errors=True)
            newest.mkdir()
            for index, (name, content) in enumerate(files.items()):
                if index < count or (half and index == count):
                    (newest / name).write_bytes(content if index < count else content[: len(content) // 2])
            assert newest_whole(folder / "checkpoints", lambda warning: None) == older
    assert len(list(folder.glob("checkpoints/damaged-*"))) == 2 * len(files)


def test_the_command_resumes_from_the_checkpoint_before_a_harmed_one(run: Run, stopped: tuple[Path, Settings]) -> None:
    folder, settings = stopped
    older, newest = sorted(folder.glob("checkpoints/step-*"))
    truncate(newest / "state.json")
    process = spawn("sft", **settings)
    process.wait_until(lambda: f"resuming from {older}" in process.output())
    output = process.stop(signal.SIGTERM)
    assert f"warning: {newest} is damaged (state.json has" in output
    assert f"resuming from {older}" in output
    steps = [line["step"] for line in read_metrics(folder)]
    assert steps == sorted(set(steps))


def test_no_whole_checkpoint_is_an_error_not_a_fresh_start(run: Run, stopped: tuple[Path, Settings]) -> None:
    folder, settings = stopped
    for checkpoint in folder.glob("checkpoints/step-*"):
        truncate(checkpoint / "manifest.json")
    with pytest.raises(RunError, match="every checkpoint is damaged"):
        newest_whole(folder / "checkpoints", lambda warning: None)
    assert_refused(run("sft", **settings), "every checkpoint is damaged")


def test_without_torch_the_missing_extra_is_named(tmp_path: Path) -> None:
    """A virtual environment with the core's dependencies only; what the user must type is the last line."""
    core = tmp_path / "core"
    core.mkdir()
    site = next(Path(path) for path in sys.path if path.endswith("site-packages"))
    wanted = (
        "click", "pydantic", "pydantic_core", "yaml", "_yaml", "tomli_w", "numpy", "numpy.libs", "annotated_types",
        "typing_extensions.py", "typing_inspection",
    )  # fmt: skip
    for name in wanted:
        if (site / name).exists():
            (core / name).symlink_to(site / name)
    source = Path(__file__).parents[2] / "src"
    program = "from lacuna.cli import main as cli; import sys; sys.argv = ['sft', *sys.argv[1:]]; cli.main_sft()"
    words = [sys.executable, "-S", "-c", program, *flags(model_name="m", dataset="d", output_dir="o", steps=1)]
    environment = {**os.environ, "PYTHONPATH": f"{source}:{core}"}
    outcome = subprocess.run(words, env=environment, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert outcome.returncode == 2, outcome.stderr
    assert "pip install 'lacuna[train]'" in outcome.stderr
    shipped = source.parent / "configs" / "sft_qwen.toml"
    explained = subprocess.run(
        [sys.executable, "-S", "-c", "from lacuna.cli import main as cli; cli.main()", "explain", str(shipped)],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert explained.returncode == 0, explained.stderr


def test_without_a_wandb_account_the_run_is_logged_offline(settings: Settings, tmp_path: Path) -> None:
    """In a process of its own, because W&B remembers its mode."""
    settings = {**settings, "tracker": "wandb"}
    environment = {**os.environ, "WANDB_MODE": "online", "HOME": str(tmp_path)}
    environment.pop("WANDB_API_KEY", None)
    words = [str(SCRIPTS / "sft"), *flags(**settings)]
    outcome = subprocess.run(
        words, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    assert outcome.returncode == 0, outcome.stderr
    assert "warning: W&B: No API key configured" in outcome.stdout
    assert "logged offline" in outcome.stdout
    assert list(Path(str(settings["output_dir"])).glob("wandb/offline-run-*/*.wandb"))


def test_a_missing_tracker_is_named_with_its_extra(settings: Settings, tmp_path: Path) -> None:
    """All installed packages but TensorBoard, as links in a folder."""
    packages = tmp_path / "packages"
    packages.mkdir()
    site = next(Path(path) for path in sys.path if path.endswith("site-packages"))
    for entry in site.iterdir():
        if not entry.name.startswith("tensorboard"):
            (packages / entry.name).symlink_to(entry)
    source = Path(__file__).parents[2] / "src"
    program = "from lacuna.cli import main as cli; import sys; sys.argv = ['sft', *sys.argv[1:]]; cli.main_sft()"
    words = [sys.executable, "-S", "-c", program, *flags(**settings, tracker="tensorboard")]
    environment = {**os.environ, "PYTHONPATH": f"{source}:{packages}"}
    outcome = subprocess.run(words, env=environment, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert outcome.returncode == 2, outcome.stderr
    assert "needs 'tensorboard', which is not installed: pip install 'lacuna[track]'" in outcome.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
def test_a_disk_that_fills_up_during_training_ends_in_one_message(settings: Settings, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)], check=True)
    try:
        process = spawn("sft", **{**settings, "output_dir": disk / "out", "steps": 20000, "save_every": 20000})
        process.wait_until(lambda: len(read_metrics(disk / "out")) > 5)
        subprocess.run(["dd", "if=/dev/zero", f"of={disk}/filler", "bs=4k"], capture_output=True, check=False)
        output = process.wait()
        assert process.popen.returncode == 2, output
        assert "No space left on device" in output
        assert "make room, then go on with:" in output
        assert "Traceback" not in output
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_config_file_of_the_users_own_is_not_overwritten(run: Run, settings: Settings, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.toml").write_text("seed = 1  # my notes\n")
    outcome = run("sft", "@", tmp_path / "out" / "config.toml", **settings)
    assert_refused(outcome, "is not empty and not a run folder (it holds config.toml)")
    assert (tmp_path / "out" / "config.toml").read_text() == "seed = 1  # my notes\n"


def test_a_refused_command_leaves_the_status_of_a_finished_run(run: Run, settings: Settings, tmp_path: Path) -> None:
    assert run("sft", **settings).code == 0
    before = (tmp_path / "out" / "status.json").read_text()
    assert run("sft", **{**settings, "learning_rate": 1e-3}).code == 2
    assert (tmp_path / "out" / "status.json").read_text() == before
    (tmp_path / "out" / "status.json").write_text(before.replace("finished", "running"))
    assert run("sft", **settings).code == 0
    assert json.loads((tmp_path / "out" / "status.json").read_text())["state"] == "finished"


def test_a_damaged_older_checkpoint_does_not_stop_the_run(run: Run, stopped: tuple[Path, Settings]) -> None:
    folder, settings = stopped
    older, newest = sorted(folder.glob("checkpoints/step-*"))
    (older / "state.json").write_text("{")
    process = spawn("sft", **settings)
    process.wait_until(lambda: len(list(folder.glob("checkpoints/step-*"))) and not older.exists())
    output = process.stop(signal.SIGTERM)
    assert f"resuming from {newest}" in output
    assert "Traceback" not in output


def test_changed_streamed_files_do_not_resume(run: Run, settings: Settings, text_file: Path, tmp_path: Path) -> None:
    dataset = tmp_path / "stream.jsonl"
    lines = text_file.read_text().splitlines(keepends=True)
    dataset.write_text("".join(lines))
    streamed = {**settings, "dataset": dataset, "streaming": "true", "steps": 3000, "sequence_length": 32}
    process = spawn("pretrain", **streamed)
    process.wait_until(lambda: list(tmp_path.glob("out/checkpoints/step-*")))
    process.stop(signal.SIGTERM)
    dataset.write_text("".join(reversed(lines)))
    assert_refused(
        run("pretrain", **streamed), "was made of something else: training data: other rows than it was trained on"
    )


def test_a_generation_config_that_could_not_be_saved_is_mended(run: Run, settings: Settings, tmp_path: Path) -> None:
    folder = make_model(tmp_path / "sampling")
    (folder / "generation_config.json").write_text('{"temperature": 0.6, "top_p": 0.9, "eos_token_id": 0}')
    assert run("sft", **{**settings, "model_name": folder}).code == 0
    saved = json.loads((tmp_path / "out" / "final" / "generation_config.json").read_text())
    assert (saved["do_sample"], saved["temperature"], saved["top_p"]) == (True, 0.6, 0.9)


def test_truncated_weights_are_not_reported_as_a_full_disk(run: Run, settings: Settings, tmp_path: Path) -> None:
    folder = make_model(tmp_path / "cut")
    truncate(folder / "model.safetensors")
    outcome = run("sft", **{**settings, "model_name": folder})
    assert_refused(outcome, "instead of", "download it again")
    assert "make room" not in outcome.output


def test_positions_are_found_under_an_older_name(run: Run, settings: Settings, text_file: Path, tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=400, n_embd=16, n_layer=1, n_head=2, n_positions=64, eos_token_id=0)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    make_tokenizer().save_pretrained(tmp_path / "gpt2")
    outcome = run("pretrain", **{**settings, "model_name": tmp_path / "gpt2", "dataset": text_file})
    assert_refused(outcome, "sequence_length 96 is more than the 64 positions")


def test_brackets_in_names_are_printed_as_they_are(run: Run, settings: Settings, tmp_path: Path) -> None:
    outcome = run("sft", **{**settings, "output_dir": tmp_path / "o[/h]"})
    assert outcome.code == 0, outcome.output
    assert f"model: {tmp_path / 'o[/h]' / 'final'}" in outcome.output


def test_a_home_folder_is_expanded(run: Run, settings: Settings, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert run("sft", **{**settings, "output_dir": "~/runs/a"}).code == 0
    assert (tmp_path / "runs" / "a" / "final").is_dir()


def test_what_changes_no_result_is_replaced_and_said(
    run: Run, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    outcome = run("sft", **settings, compile="true", attention="flash_attention_2")
    assert outcome.code == 0, outcome.output
    assert "compile needs a C compiler (gcc or clang), and there is none: nothing is compiled" in outcome.output
    assert "flash_attention_2 is not there" in outcome.output
    assert "attention sdpa" in outcome.output
    assert "compilation off" in outcome.output


def test_settings_without_effect_on_the_data_are_refused(run: Run, settings: Settings, text_file: Path) -> None:
    assert_refused(run("sft", **settings, text_column="body"), "text_column would have no effect")
    plain = {**settings, "dataset": text_file}
    assert_refused(run("sft", **plain, too_long="stop"), "too_long would have no effect")


def test_a_broken_template_is_named_with_its_line(run: Run, settings: Settings, tmp_path: Path) -> None:
    (tmp_path / "broken.jinja").write_text("{% for message in messages %}\n{{ message['content'] \n{% endfor %}")
    outcome = run("sft", **settings, chat_template=tmp_path / "broken.jinja")
    assert_refused(outcome, "the chat template is broken in its line")


def test_a_folder_with_a_model_but_no_tokenizer(run: Run, settings: Settings, tmp_path: Path) -> None:
    folder = make_model(tmp_path / "bare")
    for path in folder.glob("*token*"):
        path.unlink()
    assert_refused(run("sft", **{**settings, "model_name": folder}), "no tokenizer could be loaded")


def test_memory_that_is_not_there_names_the_settings_to_lower(run: Run, settings: Settings, tmp_path: Path) -> None:
    """An embedding of 1.3 TB."""
    folder = make_model(tmp_path / "huge")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": 10**10}))
    outcome = run("sft", **{**settings, "model_name": folder}, initialise="random")
    assert_refused(outcome, "out of memory: a step takes about ", "--micro-batch-size 1 (the batch stays as it is): ")
