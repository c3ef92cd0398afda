"""Every setting of finetune changes something that can be observed besides the record of itself.

Each by a run of a few steps beside one that has all but this setting; `part` says where the difference must be, so that
a setting that reaches adapter_config.json but not the training is found too.
"""

import hashlib
import json
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import pytest

from conftest import Run
from fixtures import CHATML, make_model, make_tokenizer, write_chat, write_texts
from lacuna.config.files import setting_paths
from lacuna.config.finetune import FinetuneConfig

pytest.importorskip("trl", reason="lacuna[finetune]")

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM
from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP

from lacuna.config import load_config
from lacuna.finetune.adapters import AdapterModel
from lacuna.finetune.trainer import make_adapter_optimizer, optimizer_name

TIMES = {"tokens_per_second", "data_wait", "peak_memory_gib"}
Settings = dict[str, Any]
Seen = dict[str, Any]


@dataclass(frozen=True)
class Change:
    """part: of what is observed. beside: what the run without the setting has too, where the setting needs it."""

    part: str
    to: Any
    beside: Settings = field(default_factory=dict)


BASE: Settings = {
    "model.path": "model", "dataset.path": "chat.jsonl", "dataset.validation_share": 0.2, "training.max_steps": 3,
    "training.batch_size": 2, "training.gradient_accumulation_steps": 2, "training.learning_rate": 1e-2,
    "training.save_steps": 2, "training.logging_steps": 1, "training.sequence_length": 64, "training.output_dir": "run",
}  # fmt: skip
QLORA = {"training.method": "qlora"}
EVERY_STEP = {"training.save_steps": 1}
ENDS_BADLY = {"training.learning_rate": 3.0, "training.warmup_steps": 1, **EVERY_STEP, "training.sequence_length": 256}
"""The loss after the first step is lower than after the last."""

CHANGES: dict[str, Change] = {
    "model.path": Change("metrics", "other_model"),
    "model.base_model": Change("metrics", "other_tokenizer"),
    "model.revision": Change("output", "main"),
    "dataset.path": Change("metrics", "other.jsonl"),
    "dataset.format": Change("metrics", "jsonl", {"dataset.path": "chat.data"}),
    "dataset.type": Change("metrics", "text", {"dataset.path": "both.jsonl"}),
    "dataset.text_field": Change("metrics", "story", {"dataset.path": "stories.jsonl"}),
    "dataset.train_split": Change("metrics", "test", {"dataset.path": "splits"}),
    "dataset.subset": Change("output", "part"),
    "dataset.validation_path": Change("metrics", "other.jsonl", {"dataset.validation_share": 0}),
    "dataset.validation_split": Change(
        "metrics", "test", {"dataset.validation_path": "splits", "dataset.validation_share": 0}
    ),
    "dataset.validation_share": Change("metrics", 0.4),
    "dataset.split_seed": Change("metrics", 1),
    "dataset.unreadable_share": Change("metrics", 0.2, {"dataset.path": "broken.jsonl"}),
    "dataset.chat_template": Change("metrics", "other.jinja"),
    "dataset.too_long": Change("metrics", "truncate"),
    "training.method": Change("metrics", "qlora"),
    "training.output_dir": Change("folders", "elsewhere"),
    "training.lora_r": Change("metrics", 4),
    "training.lora_alpha": Change("metrics", 64),
    "training.lora_dropout": Change("metrics", 0.5),
    "training.target_modules": Change("metrics", ["q_proj", "v_proj"]),
    "training.bias": Change("metrics", "all", {"model.path": "biased"}),
    "training.quantization_bits": Change("metrics", 8, QLORA),
    "training.quantization_type": Change("metrics", "fp4", QLORA),
    "training.double_quantization": Change("metrics", False, QLORA),
    "training.quantization_compute_dtype": Change("metrics", "bf16", QLORA),
    "training.learning_rate": Change("metrics", 1e-3),
    "training.batch_size": Change("metrics", 4),
    "training.gradient_accumulation_steps": Change("metrics", 4),
    "training.num_epochs": Change("metrics", 1, {"training.max_steps": None, "dataset.path": "other.jsonl"}),
    "training.max_steps": Change("metrics", 2),
    "training.warmup_steps": Change("metrics", 2),
    "training.warmup_share": Change("metrics", 0.7),
    "training.scheduler": Change("metrics", "constant"),
    "training.weight_decay": Change("metrics", 0.9),
    "training.max_gradient_norm": Change("metrics", 1e-6),
    "training.sequence_length": Change("metrics", 48),
    "training.packing": Change("shapes", False),
    "training.gradient_checkpointing": Change("layer_calls", True),
    "training.attention": Change("attention", "eager"),
    "training.precision": Change("metrics", "bf16"),
    "training.seed": Change("metrics", 1),
    "training.logging_steps": Change("metrics", 3),
    "training.eval_steps": Change("metrics", 1),
    "training.save_steps": Change("checkpoints", 1),
    "training.keep_best": Change("checkpoints", 0, EVERY_STEP),
    "training.keep_last": Change("checkpoints", 2, {**EVERY_STEP, "training.keep_best": 0}),
    "training.final_weights": Change("weights", "best", ENDS_BADLY),
    "training.tracker": Change("files", "tensorboard"),
    "training.tracker_project": Change("project", "mine", {"training.tracker": "wandb"}),
    "device": Change("output", "cuda" if not torch.cuda.is_available() else "cpu"),
    "gpus": Change("output", 2),
    "max_restarts": Change("output", 0),
}
ELSEWHERE = {
    "trainer": "it has one value",
    "training.optimizer": "paged optimizers need CUDA: test_which_optimizer",
}
"""Settings without a run, and why."""

ONLY_REFUSED = {"model.revision", "dataset.subset", "gpus", "max_restarts"}
"""Settings of what comes from the hub: for a folder they are refused. tests/commands/test_hub.py has a hub."""


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the runs read, each in its own place."""
    folder = tmp_path_factory.mktemp("options")
    make_model(folder / "model")
    make_model(folder / "other_model", hidden=48)
    make_biased_model(folder)
    other_template = CHATML.replace("message['role'] +", "message['role'] + ' says' +")
    make_tokenizer(other_template).save_pretrained(folder / "other_tokenizer")
    (folder / "other.jinja").write_text(other_template)
    chat = write_chat(folder / "chat.jsonl").read_text()
    write_chat(folder / "other.jsonl", rows=24, seed=1)
    (folder / "chat.data").write_text(chat)
    (folder / "broken.jsonl").write_text(chat + "{broken\n")
    (folder / "splits").mkdir()
    for seed, split in enumerate(("train", "test", "validation")):
        write_chat(folder / "splits" / f"{split}.jsonl", seed=seed)
    texts = [json.loads(line)["text"] for line in write_texts(folder / "text.jsonl").read_text().splitlines()]
    write_rows(folder / "stories.jsonl", [{"text": text, "story": text[::-1]} for text in texts])
    write_rows(folder / "both.jsonl", [{"prompt": "Go", "completion": text[:40], "text": text} for text in texts])
    return folder


def make_biased_model(folder: Path) -> None:
    """Like `model`, with biases in its attention."""
    shape = Qwen3Config.from_pretrained(folder / "model")
    shape.attention_bias = True
    torch.manual_seed(0)
    Qwen3ForCausalLM(shape).save_pretrained(folder / "biased")
    make_tokenizer().save_pretrained(folder / "biased")


def write_rows(path: Path, rows: list[Settings]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Seen:
    """What the training passes through the model while it runs."""
    seen: Seen = {}
    model_forward, mlp_forward = AdapterModel.forward, Qwen3MLP.forward

    def watched_model(self: Any, input_ids: Any, *more: Any, **named: Any) -> Any:
        if torch.is_grad_enabled():
            seen["shapes"].append(tuple(input_ids.shape))
        seen["attention"].add(self.causal_lm.config._attn_implementation)
        return model_forward(self, input_ids, *more, **named)

    def watched_mlp(self: Any, hidden: Any) -> Any:
        seen["layer_calls"] += 1
        return mlp_forward(self, hidden)

    monkeypatch.setattr(AdapterModel, "forward", watched_model)
    monkeypatch.setattr(Qwen3MLP, "forward", watched_mlp)
    return seen


def observe(run: Run, watched: Seen, settings: Settings) -> Seen:
    """One run in the working directory, without what a clock or a process decides."""
    watched.update(shapes=[], attention=set(), layer_calls=0)
    values = {name: value for name, value in settings.items() if value != BASE.get(name)}
    words = [word for name, value in values.items() for word in ("--set", f"{name}={json.dumps(value)}")]
    outcome = run("finetune", "--config", "base.json.yaml", *words)
    folder = Path(settings["training.output_dir"])
    tracked = [path for path in folder.rglob("*") if path.suffix == ".wandb" and path.is_file()]
    return {
        "output": (outcome.code, re.sub(r"[\d,]+ tok/s|ETA: \S+( \d+s)?", "", outcome.output)),
        "metrics": metrics_of(folder),
        "files": sorted({without_clock(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}),
        "folders": sorted(str(path.parent) for path in Path().glob("*/status.json")),
        "checkpoints": sorted(path.name for path in folder.glob("checkpoints/step-*")),
        "weights": [hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("final/*.safetensors")],
        "project": [b"mine" in path.read_bytes() for path in tracked],
        **watched,
    }


def metrics_of(folder: Path) -> list[Settings]:
    path = folder / "metrics.jsonl"
    lines = map(json.loads, path.read_text().splitlines()) if path.exists() else ()
    return [{name: value for name, value in line.items() if name not in TIMES} for line in lines]


def without_clock(path: Path) -> str:
    return re.sub(r"\d{8}_\d+|run-\w+|tfevents.*|\d+\.log", "", str(path))


@pytest.fixture(scope="module")
def before() -> dict[str, Seen]:
    """Runs without a setting that were made already, because many settings need the same one beside them."""
    return {}


@pytest.fixture
def place(workshop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for path in workshop.iterdir():
        (tmp_path / path.name).symlink_to(path)
    sections: dict[str, Settings] = {}
    for path_of, value in BASE.items():
        section, _, name = path_of.partition(".")
        sections.setdefault(section, {})[name] = value
    (tmp_path / "base.json.yaml").write_text(json.dumps(sections))
    return tmp_path


def test_the_table_names_every_setting() -> None:
    assert CHANGES.keys() | ELSEWHERE.keys() == set(setting_paths(FinetuneConfig))
    assert not CHANGES.keys() & ELSEWHERE.keys()


@pytest.mark.parametrize("name", CHANGES)
def test_setting_changes_something(name: str, run: Run, place: Path, watched: Seen, before: dict[str, Seen]) -> None:
    change = CHANGES[name]
    without = {**BASE, **change.beside}
    key = json.dumps(change.beside, sort_keys=True)
    if key not in before:
        before[key] = dict(observe(run, watched, without))
        shutil.rmtree(place / "run", ignore_errors=True)
    assert without.get(name) != change.to
    now = observe(run, watched, {**without, name: change.to})
    assert (now["output"][0] == 0) == (name not in ONLY_REFUSED), now["output"]
    assert now[change.part] != before[key][change.part], (before[key], now)


def test_the_same_settings_observe_the_same(run: Run, place: Path, watched: Seen) -> None:
    """Otherwise the test above could not fail."""
    first = dict(observe(run, watched, BASE))
    shutil.rmtree(place / "run")
    assert observe(run, watched, BASE) == first
    assert first["output"][0] == 0


@pytest.mark.parametrize(
    ("wanted", "method", "on_cuda"),
    [
        ("auto", "lora", "adamw"),
        ("auto", "qlora", "paged_adamw_32bit"),
        ("adamw", "qlora", "adamw"),
        ("paged_adamw_32bit", "lora", "paged_adamw_32bit"),
    ],
)
def test_which_optimizer(wanted: str, method: str, on_cuda: str, place: Path) -> None:
    """By the functions that decide: paged optimizers move between a GPU's memory and the host's."""
    settings = {"training.optimizer": wanted, "training.method": method, "training.weight_decay": 0.3}
    config = load_config("base.json.yaml", settings=settings)
    assert optimizer_name(config, "cuda") == on_cuda
    assert [optimizer_name(config, device) for device in ("cpu", "mps")] == ["adamw", "adamw"]
    made = make_adapter_optimizer(config, cast(Any, torch.nn.Linear(4, 4)), "cuda")
    assert type(made).__name__ == {"adamw": "AdamW", "paged_adamw_32bit": "PagedAdamW32bit"}[on_cuda]
    assert [group["weight_decay"] for group in made.param_groups] == [0.3, 0.0]
    assert {group["lr"] for group in made.param_groups} == {1e-2}
