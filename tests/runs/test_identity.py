"""A run goes on, and counts as finished, only as what it was made of: rows, weights, tokenizer, template."""

import json
import os
import re
import shutil
import signal
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError

import lacuna
from conftest import Run, flags, spawn
from fixtures import make_model, write_chat, write_texts
from lacuna.config.yaml_format import dump_yaml
from lacuna.errors import RunError
from lacuna.runs.card import card_of
from lacuna.runs.identity import cached_sha256, changed_inputs, differences, file_entry, first_day_of
from lacuna.runs.metrics import read_metrics
from lacuna.runs.status import table
from lacuna.train.final import new_folder
from lacuna.train.kept import damage, manifest_text
from lacuna.train.session import is_of_folder

Settings = dict[str, Any]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model_folder: Path) -> Path:
    """A working directory with a model, data and validation data of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    shutil.copytree(model_folder, "model")
    write_chat(Path("chat.jsonl"))
    write_chat(Path("held_out.jsonl"), seed=5)
    return tmp_path


@pytest.fixture
def settings(here: Path) -> Settings:
    return {
        "model_name": "model", "dataset": "chat.jsonl", "validation_dataset": "held_out.jsonl", "steps": 4,
        "batch_size": 4, "micro_batch_size": 2, "sequence_length": 96, "learning_rate": 1e-3, "save_every": 2,
        "log_every": 1, "output_dir": "out", "device": "cpu",
    }  # fmt: skip


def flip(file: Path) -> None:
    """One bit of the last byte."""
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def stopped(command: str, *words: str, folder: Path = Path("out")) -> None:
    """A run that was told to stop after its first checkpoint."""
    process = spawn(command, *words)
    process.wait_until(lambda: any(folder.glob("checkpoints/step-*")))
    process.stop(signal.SIGTERM)


def test_a_run_goes_on_with_nothing_but_what_it_was_made_of(run: Run, settings: Settings, here: Path) -> None:
    settings |= {"steps": 3000}
    stopped("sft", *flags(**settings))
    before = sorted(path.name for path in Path("out/checkpoints").iterdir())
    changes = {
        "model/model.safetensors": "base model: model.safetensors has changed",
        "model/config.json": "base model: config.json has changed",
        "model/tokenizer_config.json": "tokenizer: tokenizer_config.json has changed",
        "model/chat_template.jinja": "chat template: text has changed",
        "chat.jsonl": "training data: other rows than it was trained on (chat.jsonl)",
        "held_out.jsonl": "validation data: rows has changed",
    }
    for name, said in changes.items():
        file = Path(name)
        kept = file.read_bytes()
        if file.suffix == ".jsonl":
            file.write_bytes(b"".join(kept.splitlines(keepends=True)[1:]))
        elif file.suffix == ".safetensors":
            flip(file)
        else:
            file.write_bytes(kept.replace(b"assistant", b"helper") if file.suffix == ".jinja" else kept + b"\n")
        outcome = run("sft", **settings)
        assert outcome.code == 2, name
        assert f"was made of something else: {said}" in outcome.output
        assert "restore what has changed to resume" in outcome.output
        file.write_bytes(kept)
    assert sorted(path.name for path in Path("out/checkpoints").iterdir()) == before
    process = spawn("sft", *flags(**settings))
    process.wait_until(lambda: "resuming from" in process.output())
    process.stop(signal.SIGTERM)


def test_an_adapter_does_not_go_on_over_other_base_weights(run: Run, here: Path) -> None:
    values = {
        "model": {"path": "model"}, "dataset": {"path": "chat.jsonl"}, "device": "cpu",
        "training": {
            "output_dir": "out", "max_steps": 3000, "save_steps": 1, "eval_steps": 1000, "batch_size": 2,
            "gradient_accumulation_steps": 1, "sequence_length": 96, "lora_r": 2,
        },
    }  # fmt: skip
    Path("f.yaml").write_text(dump_yaml(values))
    stopped("finetune", "--config", "f.yaml")
    flip(Path("model/model.safetensors"))
    outcome = run("finetune", "--config", "f.yaml")
    assert outcome.code == 2
    assert "was made of something else: base model: model.safetensors has changed" in outcome.output


def test_an_adapter_is_not_taken_over_another_base_by_accident(run: Run, here: Path) -> None:
    training = {"output_dir": "out", "max_steps": 2, "batch_size": 2, "gradient_accumulation_steps": 1, "lora_r": 2}
    values = {"model": {"path": "model"}, "dataset": {"path": "chat.jsonl"}, "device": "cpu"}
    Path("f.yaml").write_text(dump_yaml({**values, "training": {**training, "sequence_length": 96}}))
    assert run("finetune", "--config", "f.yaml").code == 0
    assert run("lacuna", "merge", "out", "--output", "same").code == 0
    flip(Path("model/model.safetensors"))
    Path("prompts.txt").write_text("hello\n")
    taken = {
        "merge": ["lacuna", "merge", "out", "--output", "merged"],
        "compare": ["lacuna", "compare", "out", "model", "--prompts", "prompts.txt", "--max-tokens", "2"],
    }
    for words in (*taken.values(), ["chat", "--model", "out/final", "--json"]):
        outcome = run(*words)
        assert outcome.code == 2
        assert (
            "its base model is not the one that it was trained over: model/model.safetensors changed" in outcome.output
        )
    for words in taken.values():
        assert run(*words, "--allow-changed-base").code == 0
    outcome = run("finetune", "--config", "f.yaml")
    assert (outcome.code, "out is finished, but was made of something else" in outcome.output) == (1, True)


def test_a_change_in_the_middle_of_a_streamed_file_is_seen(run: Run, settings: Settings, here: Path) -> None:
    write_texts(Path("texts.jsonl"), rows=400)
    streamed = {**settings, "dataset": "texts.jsonl", "streaming": "true", "steps": 3000, "sequence_length": 32}
    del streamed["validation_dataset"]
    stopped("pretrain", *flags(**streamed))
    content = bytearray(Path("texts.jsonl").read_bytes())
    middle = content.index(b"e", len(content) // 2)
    content[middle] = ord("a")
    Path("texts.jsonl").write_bytes(content)
    outcome = run("pretrain", **streamed)
    assert outcome.code == 2
    assert "was made of something else: streamed data: texts.jsonl has changed" in outcome.output


def test_a_checkpoint_from_before_identities_were_kept_still_goes_on(settings: Settings, here: Path) -> None:
    settings |= {"steps": 3000}
    stopped("sft", *flags(**settings))
    for checkpoint in Path("out/checkpoints").glob("step-*"):
        state = json.loads((checkpoint / "state.json").read_text())
        del state["identity"]
        (checkpoint / "state.json").write_text(json.dumps(state))
        files = json.loads((checkpoint / "manifest.json").read_text())["files"]
        entry = file_entry(checkpoint / "state.json", "state.json")
        files["state.json"] = {"bytes": entry["bytes"], "sha256": entry["sha256"]}
        (checkpoint / "manifest.json").write_text(manifest_text(files))
    process = spawn("sft", *flags(**settings))
    process.wait_until(lambda: "resuming from" in process.output())
    process.stop(signal.SIGTERM)


def test_a_finished_run_whose_files_changed_is_named_and_trained_anew_when_asked(
    run: Run, settings: Settings, here: Path
) -> None:
    assert run("sft", **settings).code == 0
    assert "already finished" in run("sft", **settings).output
    os.utime("chat.jsonl", (1, 1))
    again = run("sft", **settings)
    assert (again.code, "already finished" in again.output) == (0, True)
    weights = Path("out/final/model.safetensors").read_bytes()
    for name in ("model/model.safetensors", "chat.jsonl", "held_out.jsonl"):
        kept = Path(name).read_bytes()
        if name.startswith("model"):
            flip(Path(name))
        else:
            Path(name).write_bytes(b"".join(kept.splitlines(keepends=True)[1:]))
        outcome = run("sft", **settings)
        assert outcome.code == 1
        assert (
            f"error: out is finished, but was made of something else: {name} changed since; --again" in outcome.output
        )
        (row,) = table("out")
        assert (row.state, row.reason) == ("finished", f"made of something else than is there now: {name}")
        Path(name).write_bytes(kept)
    Path("chat.jsonl").write_bytes(b"".join(Path("chat.jsonl").read_bytes().splitlines(keepends=True)[1:]))
    outcome = run("sft", "--again", **settings)
    assert outcome.code == 0
    assert "the finished run is kept: out.before-1" in outcome.output
    assert Path("out.before-1/final/model.safetensors").read_bytes() == weights
    assert Path("out/final/model.safetensors").read_bytes() != weights
    assert "already finished" in run("sft", **settings).output
    (start,) = json.loads(Path("out/provenance.json").read_text())["starts"]
    assert "--again" not in start["command"]
    Path("chat.jsonl").unlink()
    assert changed_inputs(start) == []


def test_finished_runs_of_an_experiment_are_named_marked_and_trained_anew(run: Run, settings: Settings) -> None:
    base = {"trainer": "sft", **settings, "steps": 2}
    del base["validation_dataset"]
    Path("base.yaml").write_text(dump_yaml(base))
    own = {"experiment_name": "e", "base_config_file": "base.yaml", "controls": {"output_dir": "runs"}}
    Path("e.yaml").write_text(dump_yaml({**own, "seeds": [1, 2]}))
    assert run("lacuna", "run", "e.yaml").code == 0
    assert run("lacuna", "run", "configs").code == 0
    Path("chat.jsonl").write_bytes(b"".join(Path("chat.jsonl").read_bytes().splitlines(keepends=True)[1:]))
    outcome = run("lacuna", "run", "configs")
    assert outcome.code == 1
    assert (
        "2 runs (run_000 … run_001): finished, but made of something else: chat.jsonl changed since" in outcome.output
    )
    assert "2 of 2 finished runs: nothing was started; --again trains these anew" in outcome.output
    made = lacuna.report("configs")
    assert [note for note in made.notes if "made of something else" in note] == [
        "2 finished runs made of something else than is there now (chat.jsonl changed since): the numbers are those of "
        "then; `lacuna run --again` trains them anew"
    ]
    cut = Path("chat.jsonl").read_bytes()
    Path("chat.jsonl").write_bytes(b"{}\n")
    outcome = run("lacuna", "run", "configs", "--again")
    assert outcome.code == 2
    assert not list(Path("runs").glob("*.before-*"))
    Path("chat.jsonl").write_bytes(cut)
    outcome = run("lacuna", "run", "configs", "--again", "--only", "run_001")
    assert outcome.code == 0, outcome.output
    assert "note: run_001, finished, is kept: runs/run_001.before-1" in outcome.output
    assert [row.reason for row in table("configs")] == ["made of something else than is there now: chat.jsonl", ""]


@pytest.fixture
def best_is_early(run: Run, settings: Settings) -> tuple[Path, Settings]:
    """A finished run whose learning rate is far too high at the end, so that an early checkpoint is the best; and a
    copy in which it stands at that checkpoint."""
    settings |= {"learning_rate": 3.0, "steps": 30, "warmup_share": 0.9, "keep_last": 1, "final_weights": "best"}
    assert run("sft", **settings).code == 0
    shutil.copytree("out", "cut")
    shutil.rmtree("cut/final")
    shutil.rmtree("cut/checkpoints/step-00000030")
    (left,) = Path("cut/checkpoints").iterdir()
    assert left.name < "step-00000030"
    return left, {**settings, "output_dir": "cut"}


def test_a_lost_log_changes_neither_the_best_checkpoint_nor_the_final_weights(
    run: Run, best_is_early: tuple[Path, Settings]
) -> None:
    best, settings = best_is_early
    Path("cut/metrics.jsonl").write_bytes(bytes(2000))
    outcome = run("sft", **settings)
    assert outcome.code == 0
    assert "warning: cut/metrics.jsonl has lost lines, or is another one: it is not as it was at step" in outcome.output
    assert Path("cut/metrics.jsonl.before-1").read_bytes() == bytes(2000)
    assert f"final weights: {best}" in outcome.output
    assert best.is_dir()
    weights = [Path(folder, "final/model.safetensors").read_bytes() for folder in ("out", "cut")]
    assert weights[0] == weights[1]


def test_lines_that_are_missing_are_told_and_the_others_kept(run: Run, best_is_early: tuple[Path, Settings]) -> None:
    settings = best_is_early[1]
    lines = Path("cut/metrics.jsonl").read_bytes().splitlines(keepends=True)
    damaged = b"".join([lines[0], b"not JSON\n", *lines[3:]])
    Path("cut/metrics.jsonl").write_bytes(damaged)
    assert (
        "; what was there is kept as metrics.jsonl.before-1; curves of this run have gaps"
        in run("sft", **settings).output
    )
    assert Path("cut/metrics.jsonl.before-1").read_bytes() == damaged
    steps = {folder: [line["step"] for line in read_metrics(Path(folder))] for folder in ("out", "cut")}
    assert [step for step in steps["out"] if step not in steps["cut"]] == [json.loads(lines[1])["step"]]


def test_an_undamaged_log_goes_on_without_a_word(run: Run, best_is_early: tuple[Path, Settings]) -> None:
    best, settings = best_is_early
    shutil.copytree(best, best.with_name("step-00000001"))
    outcome = run("sft", **settings)
    assert "metrics.jsonl" not in outcome.output
    losses = [
        [(line["step"], line.get("loss"), line.get("validation_loss")) for line in read_metrics(Path(folder))]
        for folder in ("out", "cut")
    ]
    assert losses[0] == losses[1]
    assert not list(Path("cut").glob("metrics.jsonl.*"))
    names = [sorted(path.name for path in Path(folder, "checkpoints").iterdir()) for folder in ("out", "cut")]
    assert names[0] == names[1]


@pytest.mark.parametrize("trainer", ["sft", "finetune"])
def test_damaged_final_weights_are_noticed_and_made_again(
    run: Run, settings: Settings, here: Path, trainer: str
) -> None:
    """Emptied, cut, or one bit flipped: by chat, merge and the run itself."""
    adapter = {
        "output_dir": "out", "max_steps": 2, "batch_size": 2, "gradient_accumulation_steps": 1, "lora_r": 2,
        "sequence_length": 96,
    }  # fmt: skip
    values = {"model": {"path": "model"}, "dataset": {"path": "chat.jsonl"}, "device": "cpu", "training": adapter}
    Path("f.yaml").write_text(dump_yaml(values))
    words = ["finetune", "--config", "f.yaml"] if trainer == "finetune" else ["sft", *flags(**settings)]
    assert run(*words).code == 0
    weights = Path("out/final", "adapter_model.safetensors" if trainer == "finetune" else "model.safetensors")
    whole = weights.read_bytes()
    Path("usual").touch()
    assert {path.stat().st_mode for path in Path("out/final").iterdir()} == {Path("usual").stat().st_mode}
    for content, said in (
        (b"", f"{weights.name} is empty"), (whole[:1000], "has 1000 bytes instead of"), (None, "has changed since"),
    ):  # fmt: skip
        if content is None:
            flip(weights)
        else:
            weights.write_bytes(content)
        taking = [["chat", "--model", "out/final", "--json"]]
        taking += [["lacuna", "merge", "out", "--output", "merged"]] if trainer == "finetune" else []
        for command in taking:
            refused = run(*command)
            assert refused.code == 2
            assert f"out/final: damaged: {weights.name} " in refused.output
        outcome = run(*words)
        assert outcome.code == 0
        assert f"warning: out/final is damaged ({weights.name} " in outcome.output
        assert said in outcome.output
        assert weights.read_bytes() == whole
        assert "already finished" in run(*words).output
    assert len(list(Path("out").glob("damaged-final*"))) == 3
    Path("out/final/README.md").write_text("mine")
    assert "already finished" in run(*words).output
    flip(weights)
    shutil.rmtree("out/checkpoints")
    outcome = run(*words)
    assert outcome.code == 2
    assert "and no checkpoint is there to make it again from" in outcome.output


def test_a_finished_run_without_its_config_is_left_alone(run: Run, settings: Settings) -> None:
    assert run("sft", **settings).code == 0
    Path("out/config.toml").unlink()
    outcome = run("sft", **settings)
    assert outcome.code == 2
    assert "output_dir out holds a finished run without its config.toml" in outcome.output


def fail_in(final: Path, error: Exception) -> None:
    with new_folder(final) as partial:
        partial.mkdir()
        raise error


def test_a_folder_is_whole_or_not_there(tmp_path: Path) -> None:
    """Tokenizers raise a bare Exception where the disk is full, and safetensors a class of their own."""
    final = tmp_path / "final"
    for error in (OSError(28, "No space left on device"), SafetensorError("x"), Exception("full (os error 28)")):
        with pytest.raises(RunError, match=r"final: cannot be written: .*; make room"):
            fail_in(final, error)
    with pytest.raises(ValueError, match="other"):
        fail_in(final, ValueError("other"))
    assert not list(tmp_path.iterdir())
    mask = os.umask(0o027)
    try:
        with new_folder(final) as partial:
            (partial / "below").mkdir(parents=True)
            for name in ("a", "below/b"):
                (partial / name).write_text(name)
                (partial / name).chmod(0o600)
    finally:
        os.umask(mask)
    assert [(final / name).stat().st_mode & 0o777 for name in ("a", "below/b")] == [0o640, 0o640]


def test_what_differs_is_named_part_by_part() -> None:
    before = {"base model": {"a": "1", "b": "2"}, "chat template": {"text": "3"}}
    now = {"base model": {"a": "1", "b": "4", "c": "5"}, "tokenizer": {"d": "6"}}
    assert differences(before, now) == [
        "base model: b has changed, c was not there", "chat template: text is not there any more",
        "tokenizer: d was not there",
    ]  # fmt: skip
    assert differences(before, before) == differences({}, now) == []


def test_a_large_file_is_read_once_for_each_size_and_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    large, small = tmp_path / "large", tmp_path / "small"
    for file in (large, small):
        file.write_bytes(b"a" * (2**20 if file is large else 10))
        os.utime(file, ns=(10**18, 10**18))
    before = {file: cached_sha256(file) for file in (large, small)}
    for file in (large, small):
        flip(file)
        os.utime(file, ns=(10**18, 10**18))
    assert cached_sha256(large) == before[large]
    assert cached_sha256(small) != before[small]
    os.utime(large, ns=(10**18 + 1, 10**18 + 1))
    assert cached_sha256(large) != before[large]
    (tmp_path / "cache" / "lacuna" / "hashes.json").write_text("[")
    assert cached_sha256(large) != before[large]
    large.touch()
    flip(large)
    assert cached_sha256(large) == before[large]


def test_where_nothing_can_be_remembered_files_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cache").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    make_model(tmp_path / "model", hidden=256)
    weights = tmp_path / "model" / "model.safetensors"
    os.utime(weights, ns=(10**18, 10**18))
    first = cached_sha256(weights)
    flip(weights)
    os.utime(weights, ns=(10**18, 10**18))
    assert cached_sha256(weights) != first


def test_a_run_folder_that_vanishes_ends_the_run_with_a_sentence(settings: Settings, here: Path) -> None:
    process = spawn("sft", *flags(**{**settings, "steps": 3000}))
    process.wait_until(lambda: any(Path("out").glob("checkpoints/step-*")))
    Path("out").rename("gone")
    process.wait()
    assert process.popen.returncode == 2, process.output()
    assert "Traceback" not in process.output()
    assert re.search(r"error: .*out.*(then go on with: |run the same command)", process.output())


def test_an_error_of_the_run_folder_is_told_from_others(tmp_path: Path) -> None:
    inside, outside = OSError(13, "Permission denied", str(tmp_path / "a")), OSError(13, "Permission denied", "/else")
    assert [is_of_folder(error, tmp_path) for error in (inside, outside)] == [True, False]
    assert is_of_folder(OSError(5, "Input/output error"), tmp_path)
    assert is_of_folder(OSError(24, "Too many open files", "/elsewhere"), tmp_path)
    assert not is_of_folder(OSError(2, "No such file or directory"), tmp_path)


def test_what_a_run_folder_has_lost_is_made_up_for_or_named(run: Run, settings: Settings, here: Path) -> None:
    settings |= {"steps": 3000}
    stopped("sft", *flags(**settings))
    config, manifest = Path("out/config.toml"), next(Path("out").glob("checkpoints/*/manifest.json"))
    kept = config.read_bytes(), manifest.read_bytes()
    config.write_bytes(b"")
    outcome = run("sft", **settings)
    assert (outcome.code, "out/config.toml: names no trainer: it is damaged" in outcome.output) == (2, True)
    config.write_bytes(kept[0])
    manifest.write_text("null")
    assert damage(manifest.parent) == "manifest.json is missing or damaged"
    manifest.write_bytes(kept[1])
    Path("out/status.json").unlink()
    Path("out/.status.json.99.partial").write_text("half")
    process = spawn("sft", *flags(**settings))
    process.wait_until(lambda: "resuming from" in process.output())
    process.stop(signal.SIGTERM)
    assert not Path("out/.status.json.99.partial").exists()
    Path("out/provenance.json").unlink()
    with pytest.raises(RunError, match=r"provenance\.json: was taken away while the run went on; start it again"):
        card_of(Path("out"), 2)


def swap(first: Path, second: Path) -> None:
    kept = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(kept)


def loosen(file: Path) -> None:
    """More white space, the same rows."""
    file.write_bytes(file.read_bytes().replace(b'{"messages"', b'{ "messages"'))


def cut_off(file: Path) -> None:
    """One row less."""
    file.write_bytes(b"".join(file.read_bytes().splitlines(keepends=True)[1:]))


def reword(file: Path) -> None:
    file.write_bytes(file.read_bytes().replace(b"assistant", b"helper"))


CHANGES: dict[str, tuple[Callable[[], None], int, int, str]] = {
    "training rows": (lambda: cut_off(Path("data/a.jsonl")), 2, 1, "data data/a.jsonl: was"),
    "order of files": (lambda: swap(Path("data/a.jsonl"), Path("data/b.jsonl")), 2, 1, "data data/a.jsonl: was"),
    "validation rows": (lambda: cut_off(Path("held_out.jsonl")), 2, 1, "data held_out.jsonl: was"),
    "white space": (lambda: loosen(Path("data/b.jsonl")), 0, 1, "data data/b.jsonl: was"),
    "weights": (lambda: flip(Path("model/model.safetensors")), 2, 1, "weights_fingerprint: was"),
    "tokenizer": (lambda: loosen_json(Path("model/tokenizer_config.json")), 2, 1, "tokenizer_sha256: was"),
    "template": (lambda: reword(Path("model/chat_template.jinja")), 2, 1, "tokenizer_sha256: was"),
    "a file's time": (lambda: os.utime("data/a.jsonl", (1e9, 1e9)), 0, 0, "nothing has changed around it"),
    "a file that is gone": (lambda: Path("held_out.jsonl").unlink(), 2, 0, "the config cannot be used here"),
}
"""What changes: exit code of a resume, of the same command when the run has finished, and what replay says."""


def loosen_json(file: Path) -> None:
    file.write_bytes(file.read_bytes() + b"\n")


def test_what_a_change_does(run: Run, settings: Settings, here: Path) -> None:
    """The table of docs/run_folder.md, row by row."""
    Path("data").mkdir()
    write_chat(Path("data/a.jsonl"))
    write_chat(Path("data/b.jsonl"), seed=3)
    settings |= {"dataset": "data", "dataset_split": "train"}
    assert run("sft", **settings).code == 0
    shutil.copytree(here, here.with_name("kept"), ignore=shutil.ignore_patterns("cache"))
    for name, (change, resumed, again, said) in CHANGES.items():
        shutil.rmtree(here, ignore_errors=True)
        shutil.copytree(here.with_name("kept"), here)
        os.chdir(here)
        change()
        finished = run("sft", **settings)
        assert finished.code == again, (name, finished.output)
        assert said in run("lacuna", "replay", "out").output, name
        assert ("made of something else" in run("lacuna", "status", "out").output) == (again == 1), name
        shutil.rmtree("out/final")
        shutil.rmtree("out/checkpoints/step-00000004")
        outcome = run("sft", **settings)
        assert outcome.code == resumed, (name, outcome.output)
        assert ("resuming from out/checkpoints/step-00000002" in outcome.output) == (resumed == 0), name


DATED = "{%- if strftime_now is defined %}{{ 'Today: ' + strftime_now('%d %b %Y') + '\n' }}{%- endif %}"


def test_a_template_that_writes_the_date_writes_the_day_of_the_first_start(
    run: Run, settings: Settings, here: Path
) -> None:
    """A run that is stopped today goes on tomorrow: on another day than was kept, its rows are other ones."""
    template = Path("model/chat_template.jinja")
    template.write_text(DATED + template.read_text())
    settings |= {"steps": 3000}
    stopped("sft", *flags(**settings))
    provenance = json.loads(Path("out/provenance.json").read_text())
    assert provenance["starts"][0]["template_date"] == date.today().isoformat()
    process = spawn("sft", *flags(**settings))
    process.wait_until(lambda: "resuming from" in process.output())
    said = process.stop(signal.SIGTERM)
    assert f"the chat template writes the date: {date.today()} in all of this run" in said
    provenance["starts"][0]["template_date"] = "2026-01-31"
    Path("out/provenance.json").write_text(json.dumps(provenance))
    assert first_day_of(Path("out"), "auto") == date(2026, 1, 31)
    outcome = run("sft", **settings)
    assert (outcome.code, "training data: other rows than it was trained on" in outcome.output) == (2, True)
    assert "none of its files has changed: was one added, or is this another version of lacuna?" in outcome.output
    assert "the chat template writes the date: 2026-01-31 in all of this run" in outcome.output


def test_which_day_a_run_keeps(tmp_path: Path) -> None:
    assert first_day_of(tmp_path, "auto") is None
    starts = [{"time": "2026-03-01T23:00:00Z"}, {"time": "2026-03-02T01:00:00Z", "template_date": "2026-03-01"}]
    (tmp_path / "provenance.json").write_text(json.dumps({"starts": starts}))
    assert first_day_of(tmp_path, "auto") == date(2026, 3, 1)
    assert first_day_of(tmp_path, "never") is None
    assert first_day_of(Path("elsewhere"), str(tmp_path / "checkpoints" / "step-00000002")) == date(2026, 3, 1)
