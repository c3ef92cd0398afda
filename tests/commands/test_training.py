"""Whole runs through the commands: they learn, add up, resume and leave what they promise."""

import json
import os
import re
import shlex
import signal
import time
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from conftest import Outcome, Process, Run, spawn
from fixtures import make_model, write_chat, write_texts
from lacuna.runs.metrics import read_metrics
from lacuna.train.kept import damage

TIMES = {"tokens_per_second", "data_wait", "peak_memory_gib"}
Settings = dict[str, Any]


@pytest.fixture
def settings(model_folder: Path, chat_file: Path) -> Settings:
    """A run of a second: about 30 rows of 64 tokens, 8 in a step, 2 in a forward pass."""
    return {
        "model_name": model_folder, "dataset": chat_file, "validation_share": 0.2, "steps": 20, "batch_size": 8,
        "micro_batch_size": 2, "sequence_length": 96, "learning_rate": 1e-2, "save_every": 5, "log_every": 1,
    }  # fmt: skip


@pytest.fixture
def pretrain_settings(settings: Settings, text_file: Path) -> Settings:
    without_validation = {name: value for name, value in settings.items() if name != "validation_share"}
    return {**without_validation, "dataset": text_file, "sequence_length": 32}


def results(folder: Path) -> list[dict[str, Any]]:
    """The metrics without what a clock decides."""
    return [{name: value for name, value in line.items() if name not in TIMES} for line in read_metrics(folder)]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "final" / "model.safetensors")


def assert_same_run(first: Path, second: Path) -> None:
    assert results(first) == results(second)
    ours, theirs = weights(first), weights(second)
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name


def must(outcome: Outcome) -> Outcome:
    assert outcome.code == 0, outcome.output
    return outcome


def kill_at(process: Process, condition: Path, number: int = signal.SIGKILL) -> str:
    """Send the signal as soon as a file exists; returns what the process had printed."""
    process.wait_until(condition.exists)
    return process.stop(number)


def test_all_seeds_are_measured_on_the_same_documents_and_copies_are_on_one_side(
    run: Run, settings: Settings, tmp_path: Path
) -> None:
    """The untrained model has one loss, whatever the seed; what `lacuna data` shows is what is trained on."""
    rows = Path(settings["dataset"]).read_text().splitlines(keepends=True)
    settings |= {"dataset": tmp_path / "copied.jsonl", "steps": 1, "batch_size": 4}
    settings["dataset"].write_text("".join(rows + rows[:20]))
    said = ""
    for name, more in {"a": {"seed": 1}, "b": {"seed": 2}, "c": {"split_seed": 2}}.items():
        said = must(run("sft", **settings, **more, output_dir=tmp_path / name)).output
        assert "also in the training data" not in said
    first, second, other = (results(tmp_path / name)[0]["validation_loss"] for name in "abc")
    assert first == second != other
    shown = must(run("lacuna", "data", "--config", tmp_path / "c" / "config.toml", "--json")).output
    parts = {part["name"]: part["documents"] for part in json.loads(shown)["parts"]}
    for name, documents in parts.items():
        assert f"{name}: {documents} documents" in said
    assert sum(parts.values()) == 60
    assert not any(found["is_held_out"] for found in json.loads(shown)["copies"])


def test_sft_learns_and_says_so(run: Run, settings: Settings, tmp_path: Path) -> None:
    output = must(run("sft", **settings, output_dir=tmp_path / "a")).output
    losses = [line["validation_loss"] for line in results(tmp_path / "a") if "validation_loss" in line]
    assert losses[-1] < losses[0] - 1
    assert f"validation loss: {losses[-1]:.4f} (before: {losses[0]:.4f})" in output
    assert re.search(r"step 20/20 \| loss \d\.\d+ \| lr \S+ \| grad \S+ \| [\d,]+ tok/s \| ETA 0s", output)
    assert f"model: {tmp_path / 'a' / 'final'}" in output
    status = json.loads((tmp_path / "a" / "status.json").read_text())
    assert (status["state"], status["step"], status["total_steps"]) == ("finished", 20, 20)


def test_pretrain_learns(run: Run, pretrain_settings: Settings, tmp_path: Path) -> None:
    must(run("pretrain", **pretrain_settings, output_dir=tmp_path / "a"))
    losses = [line["loss"] for line in results(tmp_path / "a")]
    assert losses[-1] < losses[0] - 1


def test_batch_1_times_8_equals_8_times_1(run: Run, settings: Settings, tmp_path: Path) -> None:
    """Documents have different numbers of supervised tokens, so a mean of means would differ."""
    for micro in (1, 8):
        must(run("sft", **{**settings, "micro_batch_size": micro}, output_dir=tmp_path / str(micro)))
    one, eight = results(tmp_path / "1"), results(tmp_path / "8")
    assert [line.get("targets") for line in one] == [line.get("targets") for line in eight]
    np.testing.assert_allclose(
        [line.get("loss", line.get("validation_loss")) for line in one],
        [line.get("loss", line.get("validation_loss")) for line in eight],
        atol=2e-4,
    )
    first = [next(line["loss"] for line in lines if "loss" in line) for lines in (one, eight)]
    assert first[0] == pytest.approx(first[1], abs=1e-6)


def test_packed_and_padded_rows_give_the_same_validation_loss(run: Run, settings: Settings, tmp_path: Path) -> None:
    losses = []
    for packing in ("true", "false"):
        must(run("sft", **{**settings, "steps": 1}, packing=packing, output_dir=tmp_path / packing))
        losses.append(results(tmp_path / packing)[0]["validation_loss"])
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


@pytest.mark.parametrize("option", [{"activation_checkpointing": "true"}, {"attention": "eager"}])
def test_what_saves_memory_or_time_leaves_the_losses(
    run: Run, settings: Settings, tmp_path: Path, option: Settings
) -> None:
    must(run("sft", **settings, output_dir=tmp_path / "plain"))
    must(run("sft", **settings, **option, output_dir=tmp_path / "other"))
    plain, other = (
        [line["loss"] for line in results(tmp_path / name) if "loss" in line] for name in ("plain", "other")
    )
    np.testing.assert_allclose(plain, other, atol=1e-4)


def test_compiled_blocks_give_the_same_losses(run: Run, settings: Settings, tmp_path: Path) -> None:
    folder = make_model(tmp_path / "one", layers=1)
    settings = {**settings, "steps": 3, "model_name": folder}
    must(run("sft", **settings, output_dir=tmp_path / "plain"))
    assert "compilation on" in must(run("sft", **settings, compile="true", output_dir=tmp_path / "compiled")).output
    plain, compiled = (
        [line["loss"] for line in results(tmp_path / n) if "loss" in line] for n in ("plain", "compiled")
    )
    np.testing.assert_allclose(plain, compiled, atol=1e-4)


@pytest.mark.parametrize(
    "case",
    [
        {"kill": 10},
        {"kill": 5, "batch_size": 6, "micro_batch_size": 4 - 1},
        {"kill": 10, "model": "dropout"},
        {"kill": 10, "precision": "bf16"},
    ],
    ids=["epoch border", "accumulation of 2", "dropout", "bf16"],
)
def test_a_killed_run_goes_on_bit_for_bit(
    run: Run, settings: Settings, tmp_path: Path, model_folder: Path, case: Settings
) -> None:
    """20 steps of 8 rows pass 6 times over about 25 rows, so every case crosses epochs."""
    case = dict(case)
    kill = case.pop("kill")
    if case.pop("model", None):
        folder = make_model(tmp_path / "dropout")
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "attention_dropout": 0.2}))
        settings = {**settings, "model_name": folder}
    settings = {**settings, **case}
    must(run("sft", **settings, output_dir=tmp_path / "straight"))
    epochs = {line["epoch"] for line in results(tmp_path / "straight") if "epoch" in line}
    assert len(epochs) > 1
    process = spawn("sft", **settings, output_dir=tmp_path / "killed")
    kill_at(process, tmp_path / "killed" / "checkpoints" / f"step-{kill:08d}")
    assert process.popen.returncode == -signal.SIGKILL
    output = must(run("sft", **settings, output_dir=tmp_path / "killed")).output
    assert re.search(r"resuming from \S+step-0*(5|10|15) ", output)
    assert_same_run(tmp_path / "straight", tmp_path / "killed")


def test_streaming_goes_on_bit_for_bit_in_the_middle_of_a_window(
    run: Run, pretrain_settings: Settings, tmp_path: Path
) -> None:
    """120 documents stream in windows of 30 rows or more; 20 steps of 8 rows use several windows and epochs."""
    dataset = write_texts(tmp_path / "stream.jsonl", rows=200)
    more = {**pretrain_settings, "dataset": dataset, "streaming": "true", "streaming_window": 30, "steps": 40}
    must(run("pretrain", **more, output_dir=tmp_path / "straight"))
    process = spawn("pretrain", **more, output_dir=tmp_path / "killed")
    kill_at(process, tmp_path / "killed" / "checkpoints" / "step-00000010")
    state = json.loads((tmp_path / "killed" / "checkpoints" / "step-00000010" / "state.json").read_text())
    assert state["position"]["row"] > 0
    must(run("pretrain", **more, output_dir=tmp_path / "killed"))
    assert_same_run(tmp_path / "straight", tmp_path / "killed")


def test_killed_again_and_again_at_any_moment(run: Run, settings: Settings, tmp_path: Path) -> None:
    """A save at every step, killed at five arbitrary moments after the first: what has a name is whole."""
    settings = {**settings, "save_every": 1, "steps": 60, "keep_last": 3}
    must(run("sft", **settings, output_dir=tmp_path / "straight"))
    killed = tmp_path / "killed"
    for round_number in range(5):
        process = spawn("sft", **settings, output_dir=killed)
        process.wait_until(lambda lines=4 + 18 * round_number: len(read_metrics(killed)) >= lines)
        time.sleep(0.0137 * round_number)
        process.stop()
        named = sorted((killed / "checkpoints").glob("step-*"))
        assert named or round_number == 0
        assert [damage(path) for path in named] == [None] * len(named)
    must(run("sft", **settings, output_dir=killed))
    assert_same_run(tmp_path / "straight", killed)
    assert not list((killed / "checkpoints").glob(".*"))


def test_a_signal_saves_and_prints_the_command_that_resumes(settings: Settings, tmp_path: Path) -> None:
    """Each signal in turn; the command that was printed before starts the next process."""
    folder = tmp_path / "a"
    settings = {**settings, "steps": 400, "save_every": 400}
    process, seen = spawn("sft", **settings, output_dir=folder), 0
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        process.wait_until(lambda lines=seen + 5: len(read_metrics(folder)) >= lines)
        output = process.stop(number)
        assert process.popen.returncode == 128 + number
        stopped = re.search(r"stopped after step (\d+), which is saved; go on with: (.*)", output)
        assert stopped is not None, output
        assert "Traceback" not in output
        assert ("resuming from" in output) == (seen > 0)
        status = json.loads((folder / "status.json").read_text())
        assert status["state"] == "interrupted"
        assert status["reason"] == f"stopped after step {stopped[1]}, which is saved"
        seen = len(read_metrics(folder))
        process = Process(*shlex.split(stopped[2]))
    process.wait_until(lambda: f"resuming from {tmp_path}" in process.output())
    process.stop()


def test_a_signal_in_the_middle_of_a_validation_changes_nothing(run: Run, settings: Settings, tmp_path: Path) -> None:
    """The best checkpoint is the one at whose validation the run was stopped: its loss comes with the resume."""
    validation = write_chat(tmp_path / "validation.jsonl", rows=1500, seed=3)
    settings = {
        **settings, "validation_share": "none", "validation_dataset": validation, "steps": 12, "save_every": 6,
        "learning_rate": 3.0, "warmup_share": 0.6, "final_weights": "best", "keep_last": 1,
    }  # fmt: skip
    must(run("sft", **settings, output_dir=tmp_path / "straight"))
    process = spawn("sft", **settings, output_dir=tmp_path / "stopped")
    process.wait_until(lambda: any("loss" in line and line["step"] == 6 for line in read_metrics(tmp_path / "stopped")))
    output = process.stop(signal.SIGTERM)
    assert "stopped after step 6, which is saved" in output
    assert {"step": 6} not in [{"step": line["step"]} for line in results(tmp_path / "stopped") if "loss" not in line]
    must(run("sft", **settings, output_dir=tmp_path / "stopped"))
    assert_same_run(tmp_path / "straight", tmp_path / "stopped")


def test_evaluate_every_may_be_rarer_than_saves(run: Run, settings: Settings, tmp_path: Path) -> None:
    must(run("sft", **settings, evaluate_every=15, output_dir=tmp_path / "a"))
    assert [line["step"] for line in results(tmp_path / "a") if "validation_loss" in line] == [0, 15, 20]


def test_a_crash_before_the_first_checkpoint_leaves_no_line_twice(run: Run, settings: Settings, tmp_path: Path) -> None:
    settings = {**settings, "save_every": 20}
    process = spawn("sft", **settings, output_dir=tmp_path / "a")
    process.wait_until(lambda: len(read_metrics(tmp_path / "a")) > 3)
    process.stop()
    must(run("sft", **settings, output_dir=tmp_path / "a"))
    lines = [(line["step"], "loss" in line) for line in results(tmp_path / "a")]
    assert len(lines) == len(set(lines))


def test_a_signal_while_loading_stops_at_once(settings: Settings, tmp_path: Path) -> None:
    process = spawn("sft", **settings, output_dir=tmp_path / "a")
    output = kill_at(process, tmp_path / "a" / "status.json", signal.SIGTERM)
    assert process.popen.returncode == 128 + signal.SIGTERM
    assert "go on with:" in output
    assert "Traceback" not in output


def test_the_final_folder_is_plain_hugging_face(run: Run, settings: Settings, tmp_path: Path) -> None:
    """Plain transformers, one document at a time and without our loss, finds the validation loss that we logged."""
    must(run("sft", **{**settings, "validation_dataset": settings["dataset"], "validation_share": "none"},
             output_dir=tmp_path / "a"))  # fmt: skip
    final = tmp_path / "a" / "final"
    model = AutoModelForCausalLM.from_pretrained(final)
    tokenizer = AutoTokenizer.from_pretrained(final)
    total, count = 0.0, 0
    for line in Path(settings["dataset"]).read_text().splitlines():
        messages = json.loads(line)["messages"]
        ids, labels = [], []
        for index, message in enumerate(messages):
            turn = f"<|im_start|>{message['role']}\n{message['content']}<|im_end|>\n"
            pieces = turn.partition("assistant\n") if message["role"] == "assistant" else (turn, "", "")
            for piece, learned in ((pieces[0] + pieces[1], False), (pieces[2].removesuffix("\n"), True)):
                tokens = tokenizer(piece)["input_ids"]
                ids += tokens
                labels += tokens if learned else [-100] * len(tokens)
            newline = tokenizer("\n")["input_ids"] if message["role"] == "assistant" else []
            ids += newline
            labels += [-100] * len(newline)
            assert index % 2 == (message["role"] == "assistant")
        if len(ids) > settings["sequence_length"]:
            continue
        with torch.no_grad():
            learned_tokens = sum(label != -100 for label in labels)
            loss = model(torch.tensor([ids]), labels=torch.tensor([labels])).loss
        total += float(loss) * learned_tokens
        count += learned_tokens
    logged = [line["validation_loss"] for line in results(tmp_path / "a") if "validation_loss" in line]
    assert total / count == pytest.approx(logged[-1], abs=1e-5)
    end_of_turn = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert model.generation_config.eos_token_id[0] == end_of_turn
    assert tokenizer.chat_template is not None


def test_best_checkpoint_is_kept_and_can_be_the_final_one(run: Run, settings: Settings, tmp_path: Path) -> None:
    """A learning rate far too high at the end makes an early checkpoint the best."""
    settings = {**settings, "learning_rate": 3.0, "steps": 30, "warmup_share": 0.9, "keep_last": 1}
    must(run("sft", **settings, final_weights="best", output_dir=tmp_path / "a"))
    losses = {line["step"]: line["validation_loss"] for line in results(tmp_path / "a") if "validation_loss" in line}
    best = min((step for step in losses if step), key=losses.__getitem__)
    assert best < 30
    names = sorted(path.name for path in (tmp_path / "a" / "checkpoints").iterdir())
    assert names == [f"step-{best:08d}", "step-00000030"]
    (shard,) = (tmp_path / "a" / "checkpoints" / names[0]).glob("*.safetensors")
    saved = load_file(shard)
    for name, tensor in weights(tmp_path / "a").items():
        assert torch.equal(tensor, saved[f"model.{name}"])


def test_the_written_config_runs_again_and_gives_the_same(run: Run, settings: Settings, tmp_path: Path) -> None:
    must(run("sft", **settings, output_dir=tmp_path / "a"))
    must(run("sft", "@", tmp_path / "a" / "config.toml", output_dir=tmp_path / "b"))
    assert_same_run(tmp_path / "a", tmp_path / "b")
    first, second = (tomllib.loads((tmp_path / name / "config.toml").read_text()) for name in "ab")
    assert first | {"output_dir": ""} == second | {"output_dir": ""}
    provenance = json.loads((tmp_path / "b" / "provenance.json").read_text())["starts"][0]
    assert provenance["command"][1:3] == ["@", str(tmp_path / "a" / "config.toml")]
    assert provenance["packages"]["torch"].startswith(torch.__version__)
    assert len(provenance["data_sha256"]) == 64


def test_a_finished_run_is_left_alone(run: Run, settings: Settings, tmp_path: Path) -> None:
    must(run("sft", **settings, output_dir=tmp_path / "a"))
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "a").rglob("*") if path.name != ".lock"}
    assert "already finished" in must(run("sft", **settings, output_dir=tmp_path / "a")).output
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "a").rglob("*") if path.name != ".lock"} == before


def test_epochs_see_every_row_and_end_with_a_short_batch(run: Run, pretrain_settings: Settings, tmp_path: Path) -> None:
    more = {name: value for name, value in pretrain_settings.items() if name != "steps"}
    output = must(run("pretrain", **more, epochs=2, output_dir=tmp_path / "a")).output
    found = re.search(r"([\d,]+) tokens .* ([\d,]+) rows of 32", output)
    assert found is not None
    tokens, rows = (int(number.replace(",", "")) for number in found.groups())
    last = results(tmp_path / "a")[-1]
    assert last["tokens"] == 2 * tokens
    assert last["step"] == -(-2 * rows // 8)


def test_random_initialisation_ignores_the_weights(run: Run, settings: Settings, tmp_path: Path) -> None:
    for seed in (1, 2):
        must(run("sft", **{**settings, "steps": 1}, initialise="random", seed=seed, output_dir=tmp_path / str(seed)))
    assert results(tmp_path / "1")[0] != results(tmp_path / "2")[0]


def leveldb_records(content: bytes) -> list[bytes]:
    """W&B's offline file: a header of 7 bytes, then LevelDB's log format, in which large records come in parts.

    # ref: https://github.com/google/leveldb/blob/main/doc/log_format.md
    """
    records, parts, at = [], b"", 7
    while at + 7 <= len(content):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        length, kind = int.from_bytes(content[at + 4 : at + 6], "little"), content[at + 6]
        parts += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            records.append(parts)
            parts = b""
    return records


def test_wandb_offline_holds_the_metrics(run: Run, settings: Settings, tmp_path: Path) -> None:
    from wandb.proto import wandb_internal_pb2

    must(run("sft", **settings, tracker="wandb", tracker_project="proof", output_dir=tmp_path / "a"))
    (file,) = (tmp_path / "a").glob("wandb/offline-run-*/*.wandb")
    losses, projects = {}, set()
    for data in leveldb_records(file.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.WhichOneof("record_type") == "run":
            projects.add(record.run.project)
        items = {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        if "loss" in items:
            losses[items["_step"]] = items["loss"]
    assert projects == {"proof"}
    assert losses == {line["step"]: line["loss"] for line in results(tmp_path / "a") if "loss" in line}


def test_tensorboard_holds_the_metrics_once_also_after_a_kill(run: Run, settings: Settings, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    settings = {**settings, "tracker": "tensorboard", "steps": 40}
    process = spawn("sft", **settings, output_dir=tmp_path / "a")
    kill_at(process, tmp_path / "a" / "checkpoints" / "step-00000010")
    time.sleep(1)
    must(run("sft", **settings, output_dir=tmp_path / "a"))
    events = EventAccumulator(str(tmp_path / "a" / "tensorboard"))
    events.Reload()
    logged = {line["step"]: line["loss"] for line in results(tmp_path / "a") if "loss" in line}
    assert [event.step for event in events.Scalars("loss")] == sorted(logged)
    np.testing.assert_allclose([event.value for event in events.Scalars("loss")], [logged[s] for s in sorted(logged)])


def test_no_secret_reaches_the_run_folder(run: Run, settings: Settings, tmp_path: Path) -> None:
    os.environ["HF_TOKEN"] = "hf_secretsecret"
    os.environ["WANDB_API_KEY"] = "f" * 40
    try:
        must(run("sft", **{**settings, "steps": 1}, tracker="wandb", output_dir=tmp_path / "a"))
    finally:
        del os.environ["HF_TOKEN"], os.environ["WANDB_API_KEY"]
    for path in (tmp_path / "a").rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            assert b"hf_secretsecret" not in content, path
            assert b"f" * 40 not in content, path
