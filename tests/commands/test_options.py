"""Every option changes something that can be observed besides the record of itself."""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import pytest

from conftest import Run
from fixtures import CHATML, make_model, write_chat, write_texts
from lacuna.config.training import PretrainConfig, SFTConfig

TIMES = {"tokens_per_second", "data_wait", "peak_memory_gib"}
RECORDS = {"config.toml", "provenance.json", "status.json", ".lock", "metrics.jsonl"}
Settings = dict[str, Any]

SFT: dict[str, Settings] = {
    "model_name": {"model_name": "other_model"},
    "model_revision": {"model_revision": "main"},
    "initialise": {"initialise": "random"},
    "dataset": {"dataset": "other.jsonl"},
    "dataset_format": {"dataset_format": "text"},
    "dataset_subset": {"dataset_subset": "part"},
    "dataset_split": {"dataset_split": "test"},
    "validation_dataset": {"validation_dataset": "other.jsonl", "validation_share": "none"},
    "validation_split": {"validation_split": "test", "validation_dataset": "other.jsonl", "validation_share": "none"},
    "validation_share": {"validation_share": 0.4},
    "split_seed": {"split_seed": 1},
    "text_column": {"text_column": "story", "dataset": "stories.jsonl"},
    "unreadable_share": {"unreadable_share": 0.2, "dataset": "broken.jsonl"},
    "output_dir": {"output_dir": "elsewhere"},
    "sequence_length": {"sequence_length": 128},
    "packing": {"packing": "false"},
    "batch_size": {"batch_size": 8},
    "micro_batch_size": {"micro_batch_size": 1},
    "epochs": {"epochs": 1, "steps": "none"},
    "steps": {"steps": 5},
    "learning_rate": {"learning_rate": 1e-3},
    "final_learning_rate_share": {"final_learning_rate_share": 0.5, "warmup_share": 0},
    "warmup_share": {"warmup_share": 0.5},
    "warmup_steps": {"warmup_steps": 2},
    "weight_decay": {"weight_decay": 0.9},
    "adam_beta1": {"adam_beta1": 0.5},
    "adam_beta2": {"adam_beta2": 0.5},
    "max_gradient_norm": {"max_gradient_norm": 0.01},
    "seed": {"seed": 1},
    "device": {"device": "mps"},
    "gpus": {"gpus": 2},
    "max_restarts": {"max_restarts": 0},
    "sharding": {"sharding": "hybrid"},
    "precision": {"precision": "bf16"},
    "attention": {"attention": "eager"},
    "compile": {"compile": "true"},
    "activation_checkpointing": {"activation_checkpointing": "true"},
    "log_every": {"log_every": 4},
    "evaluate_every": {"evaluate_every": 1},
    "save_every": {"save_every": 1},
    "keep_best": {"keep_best": 0},
    "keep_last": {"keep_last": 2, "keep_best": 0},
    "final_weights": {"final_weights": "best"},
    "resume": {"resume": "nowhere"},
    "tracker": {"tracker": "tensorboard"},
    "tracker_project": {"tracker_project": "mine", "tracker": "wandb"},
    "dataset_schema": {"dataset_schema": "text"},
    "chat_template": {"chat_template": "other.jinja"},
    "too_long": {"too_long": "truncate"},
}
PRETRAIN: dict[str, Settings] = {
    "streaming": {"streaming": "true"},
    "streaming_window": {"streaming_window": 2, "streaming": "true", "dataset": "many.jsonl"},
}
COMPARED_WITH: dict[str, Settings] = {
    "validation_split": {"validation_dataset": "other.jsonl", "validation_share": "none"},
    "text_column": {"dataset": "stories.jsonl"},
    "unreadable_share": {"dataset": "broken.jsonl"},
    "tracker_project": {"tracker": "wandb"},
    "streaming_window": {"streaming": "true", "dataset": "many.jsonl"},
    "final_learning_rate_share": {"warmup_share": 0},
    "keep_last": {"keep_best": 0},
}
"""Where an option needs another one, the run beside which it must make a difference."""


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("options")
    make_model(folder / "model")
    make_model(folder / "other_model", hidden=48)
    write_chat(folder / "chat.jsonl")
    write_chat(folder / "other.jsonl", rows=12, seed=1)
    good = (folder / "chat.jsonl").read_text()
    (folder / "broken.jsonl").write_text(good + "{broken\n")
    write_texts(folder / "text.jsonl")
    write_texts(folder / "many.jsonl", rows=300)
    texts = [json.loads(line)["text"] for line in (folder / "text.jsonl").read_text().splitlines()]
    (folder / "stories.jsonl").write_text("".join(json.dumps({"story": text}) + "\n" for text in texts))
    (folder / "other.jinja").write_text(CHATML.replace("message['role'] +", "message['role'] + ' says' +"))
    return folder


BASE = {
    "steps": 4, "batch_size": 4, "micro_batch_size": 2, "sequence_length": 64, "save_every": 2, "log_every": 1,
    "keep_last": 1, "model_name": "model", "output_dir": "run", "adam_beta2": 0.99,
}  # fmt: skip
SFT_BASE = {**BASE, "dataset": "chat.jsonl", "validation_share": 0.2, "learning_rate": 3.0, "warmup_share": 0.7}
PRETRAIN_BASE = {**BASE, "dataset": "text.jsonl", "learning_rate": 1e-2}


def observe(run: Run, command: str, settings: Settings, workshop: Path, place: Path) -> str:
    """Output, metrics and written files, without what a clock, a process or the record of the settings decides."""
    for path in workshop.iterdir():
        (place / path.name).symlink_to(path)
    outcome = run(command, **{name: value for name, value in settings.items() if value != "none"})
    folder = place / str(settings["output_dir"])
    seen = [re.sub(r"[\d,]+ tok/s|ETA \S+( \d+s)?|process \d+", "", outcome.output), str(outcome.code)]
    metrics = folder / "metrics.jsonl"
    for line in metrics.read_text().splitlines() if metrics.exists() else []:
        seen.append(json.dumps({name: value for name, value in json.loads(line).items() if name not in TIMES}))
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name not in RECORDS and path.suffix != ".json":
            in_wandb = "wandb" in path.parts
            name = re.sub(r"\d{8}_\d+|run-\w+|tfevents.*|\d+\.log", "", str(path.relative_to(folder)))
            project = str(b"mine" in path.read_bytes()) if in_wandb and path.suffix == ".wandb" else ""
            exact = path.parent.name == "final"
            content = hashlib.sha256(path.read_bytes()).hexdigest() if exact else project
            seen.append(f"{name} {content}")
    return "\n".join(seen)


def test_the_tables_name_every_option() -> None:
    assert SFT.keys() == SFTConfig.model_fields.keys() - {"trainer"}
    assert PRETRAIN.keys() == PretrainConfig.model_fields.keys() - SFTConfig.model_fields.keys()


@pytest.fixture(scope="module")
def before() -> dict[str, str]:
    """What runs without an option showed, because many options need the same run beside them."""
    return {}


@pytest.mark.parametrize("option", [*SFT, *PRETRAIN])
def test_option_changes_something(
    option: str,
    run: Run,
    workshop: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    before: dict[str, str],
) -> None:
    command, base = ("sft", SFT_BASE) if option in SFT else ("pretrain", PRETRAIN_BASE)

    def seen(name: str, change: Settings) -> str:
        place = tmp_path / name
        place.mkdir()
        monkeypatch.chdir(place)
        settings = {**base, **change}
        if "warmup_steps" in change:
            del settings["warmup_share"]
        return observe(run, command, settings, workshop, place).replace(str(place), "")

    beside = COMPARED_WITH.get(option, {})
    key = json.dumps([command, beside])
    if key not in before:
        before[key] = seen("without", beside)
    assert seen("with", (SFT | PRETRAIN)[option]) != before[key], before[key]


def test_the_same_settings_observe_the_same(
    run: Run, workshop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise the test above could not fail."""
    seen = []
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        seen.append(observe(run, "sft", SFT_BASE, workshop, tmp_path / name))
    assert seen[0] == seen[1]
