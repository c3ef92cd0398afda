"""The finetune config: read, layered, checked, shown, and everything that the command refuses about it."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from conftest import Outcome, Run
from fixtures import make_model, write_chat, write_texts
from lacuna.config import load_config
from lacuna.config.files import setting_paths
from lacuna.config.finetune import BATCH, FinetuneConfig
from lacuna.config.layers import load_finetune, parse_settings
from lacuna.cost.shape import model_shape
from lacuna.errors import ConfigError
from lacuna.train.optimizer import warmup_steps

ROOT = Path(__file__).parents[2]
SHIPPED = sorted(
    path for path in ROOT.glob("configs/*.yaml") if path.name in ("finetune.yaml",) or "training_config" in path.name
)
SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
MINIMAL = "model: {path: tiny}\ndataset: {path: chat.jsonl}\n"
SMALL = """model:
  path: tiny
dataset:
  path: chat.jsonl
training:
  output_dir: out
  max_steps: 3
  batch_size: 2
  gradient_accumulation_steps: 2
  learning_rate: 1e-2
  save_steps: 2
  logging_steps: 1
  sequence_length: 256
"""
"""Lines are counted in tests below."""

SEED_004 = """# config/finetune.yaml
model:
  path: "./models/gpt2"           # Path to downloaded model
  base_model: "gpt2"               # Optional: HF repo ID for tokenizer loading

dataset:
  path: "./data/my-dataset"        # Path to downloaded dataset
  format: "auto"                   # auto, json, csv, jsonl
  text_field: "text"               # Field name containing training text
  train_split: "train"             # Dataset split to use

training:
  method: "lora"                   # lora or qlora
  output_dir: "./checkpoints/gpt2-finetuned"  # Optional, defaults to ./checkpoints/<model>-<timestamp>

  # LoRA/QLoRA parameters
  lora_r: 16                       # LoRA rank
  lora_alpha: 32                   # LoRA alpha
  lora_dropout: 0.05               # LoRA dropout
  target_modules:                  # Modules to apply LoRA (optional, auto-detected if omitted)
    - "q_proj"
    - "v_proj"

  # QLoRA specific (only used if method: qlora)
  quantization_bits: 4             # 4 or 8

  # Training hyperparameters
  learning_rate: 3e-4
  batch_size: 4
  gradient_accumulation_steps: 4
  num_epochs: 3
  warmup_steps: 100
  weight_decay: 0.01

  # Checkpointing
  save_steps: 500                  # Save checkpoint every N steps
  max_steps: null                  # Optional: override epoch-based training

# Hardware
device: "cuda"                     # cuda or cpu
"""
"""The YAML of seed 004, character by character."""

SEED_004_VALUES = {
    "model.path": "./models/gpt2", "model.base_model": "gpt2", "dataset.path": "./data/my-dataset",
    "dataset.format": "auto", "dataset.text_field": "text", "dataset.train_split": "train", "training.method": "lora",
    "training.output_dir": "./checkpoints/gpt2-finetuned", "training.lora_r": 16, "training.lora_alpha": 32,
    "training.lora_dropout": 0.05, "training.target_modules": ["q_proj", "v_proj"], "training.quantization_bits": 4,
    "training.learning_rate": 3e-4, "training.batch_size": 4, "training.gradient_accumulation_steps": 4,
    "training.num_epochs": 3, "training.warmup_steps": 100, "training.weight_decay": 0.01, "training.save_steps": 500,
    "training.max_steps": None, "device": "cuda",
}  # fmt: skip
PRESETS = {
    "model.path": "mistralai/Mistral-7B-Instruct-v0.3", "dataset.path": "data/processed/train.jsonl",
    "dataset.type": "chat", "dataset.validation_path": "data/processed/val.jsonl", "training.method": "qlora",
    "training.quantization_bits": 4, "training.quantization_type": "nf4", "training.double_quantization": True,
    "training.quantization_compute_dtype": "bf16", "training.lora_r": 16, "training.lora_alpha": 32,
    "training.lora_dropout": 0.05, "training.bias": "none", "training.target_modules": SEVEN,
    "training.num_epochs": 3, "training.max_steps": None, "training.learning_rate": 2e-4,
    "training.scheduler": "cosine", "training.warmup_share": 0.03, "training.warmup_steps": None,
    "training.weight_decay": 0.01, "training.max_gradient_norm": 0.3, "training.precision": "bf16",
    "training.gradient_checkpointing": True, "training.logging_steps": 10, "training.eval_steps": 100,
    "training.save_steps": 500, "training.keep_best": 3, "training.final_weights": "best",
}  # fmt: skip
"""What seed 002 asks of both machines."""
H100 = {
    "training.sequence_length": 4096, "training.batch_size": 4, "training.gradient_accumulation_steps": 4,
    "training.optimizer": "paged_adamw_32bit", "training.attention": "flash_attention_2", "training.tracker": "wandb",
    "device": "cuda",
}  # fmt: skip
M4 = {
    "training.sequence_length": 2048, "training.batch_size": 1, "training.gradient_accumulation_steps": 16,
    "training.optimizer": "adamw", "training.attention": "sdpa", "training.tracker": "tensorboard", "device": "mps",
}  # fmt: skip


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text)
    return path


def problems_of(*files: Path, **settings: Any) -> list[str]:
    with pytest.raises(ConfigError) as error:
        load_config(*files, settings={name.replace("__", "."): value for name, value in settings.items()})
    return error.value.problems


def set_words(settings: Mapping[str, object]) -> list[str]:
    """`{"training.lora_r": 8}` → `--set training.lora_r=8`."""
    return [word for name, value in settings.items() for word in ("--set", f"{name}={value}")]


@pytest.fixture
def project(model_folder: Path, chat_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, with a model, data and c.yaml, whose paths are short because they are relative."""
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "tiny").symlink_to(model_folder)
    shutil.copy(chat_file, folder / "chat.jsonl")
    write(folder, "c.yaml", SMALL)
    monkeypatch.chdir(folder)
    return folder


Finetune = Callable[..., Outcome]


@pytest.fixture
def finetune(run: Run, project: Path) -> Finetune:
    """`finetune --config c.yaml` with more words and settings."""

    def call(*words: object, **settings: object) -> Outcome:
        return run(
            "finetune",
            "--config",
            "c.yaml",
            *words,
            *set_words({name.replace("__", "."): v for name, v in settings.items()}),
        )

    return call


@pytest.fixture(scope="module")
def trained_run(model_folder: Path, chat_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of c.yaml; copy it before use."""
    from lacuna.finetune.start import finetune as train

    folder = tmp_path_factory.mktemp("trained")
    (folder / "tiny").symlink_to(model_folder)
    shutil.copy(chat_file, folder / "chat.jsonl")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        train(load_config(write(folder, "c.yaml", SMALL)), None, False, ["finetune", "--config", "c.yaml"])
    return folder / "out"


@pytest.fixture
def finished(trained_run: Path, project: Path) -> Path:
    """The run folder `out` of c.yaml, finished."""
    shutil.copytree(trained_run, project / "out")
    return Path("out")


@pytest.fixture
def unfinished(finished: Path) -> Path:
    """The run folder `out` as it is after its last checkpoint."""
    shutil.rmtree(finished / "final")
    return finished


def assert_refused(outcome: Outcome, *expected: str) -> None:
    assert outcome.code == 2, outcome.output
    assert "Traceback" not in outcome.output
    assert "error: " in outcome.output
    for words in expected:
        assert words in outcome.output, outcome.output


# Reading


def test_a_later_file_is_merged_into_an_earlier_one(tmp_path: Path) -> None:
    base = write(tmp_path, "base.yaml", SMALL)
    over = write(tmp_path, "over.yaml", "training: {lora_r: 4, target_modules: [q_proj]}\nmodel: {base_model: other}\n")
    last = write(tmp_path, "last.toml", "[training]\nlora_r = 2\n")
    config = load_config(base, str(over), last)
    assert (config.lora_r, config.target_modules) == (2, ["q_proj"])
    assert (config.model_name, config.base_model, config.steps) == ("tiny", "other", 3)


def test_lists_are_replaced_not_joined(tmp_path: Path) -> None:
    base = write(tmp_path, "base.yaml", MINIMAL + "training: {target_modules: [q_proj, k_proj]}\n")
    over = write(tmp_path, "over.yaml", "training: {target_modules: [v_proj]}\n")
    assert load_config(base, over).target_modules == ["v_proj"]


def test_settings_go_over_all_files(tmp_path: Path) -> None:
    file = write(tmp_path, "c.yaml", SMALL)
    config = load_config(file, settings={"training.lora_r": 2, "device": "cpu", "model.base_model": "b"})
    assert (config.lora_r, config.device, config.base_model) == (2, "cpu", "b")


def test_a_value_by_its_dotted_path(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, "c.yaml", SMALL))
    assert config.get("training.lora_r") == 16
    assert config.get("device") == "auto"
    assert config.get("model") == {"path": "tiny", "base_model": None, "revision": None}
    assert {path: config.get(path) for path in setting_paths(FinetuneConfig)}["training.learning_rate"] == 1e-2


@pytest.mark.parametrize("path", ["training.lora_rr", "training.lora_r.x", "trainin.lora_r"])
def test_an_unknown_path_names_the_nearest(path: str, tmp_path: Path) -> None:
    config = load_config(write(tmp_path, "c.yaml", SMALL))
    with pytest.raises(ConfigError, match=rf"no setting '{path}'; did you mean 'training.lora_r'\?"):
        config.get(path)


@pytest.mark.parametrize("name", ["lora_r", "seed", "bias", "method"])
def test_a_setting_without_its_section_is_asked_about(name: str, tmp_path: Path) -> None:
    (problem,) = problems_of(write(tmp_path, "c.yaml", SMALL), **{name: 3})
    assert problem == f"--set: unknown setting '{name}'; did you mean 'training.{name}'?"


def test_a_config_is_read_without_torch(tmp_path: Path) -> None:
    """Editors, generators and schedulers read many configs, on machines that cannot train."""
    file = write(tmp_path, "c.yaml", SMALL)
    script = (
        "import sys; from lacuna.config import load_config; "
        f"print(load_config({str(file)!r}, settings={{'training.lora_r': 3}}).get('training.lora_r')); "
        "print(sorted({'torch', 'transformers', 'peft', 'trl', 'datasets'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:2] == ["3", "[]"]


def test_the_defaults(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, "c.yaml", MINIMAL))
    assert config.settings()[BATCH] == 16
    assert warmup_steps(config, 100) == 3
    assert config.run_folder.startswith("./checkpoints/tiny-")
    assert config.validation_share == 0.1


# Alternatives


@pytest.mark.parametrize(
    ("first", "second", "gone"),
    [
        ("training: {warmup_share: 0.1}", "training: {warmup_steps: 5}", "training.warmup_share"),
        ("training: {warmup_steps: 5}", "training: {warmup_share: 0.1}", "training.warmup_steps"),
        ("dataset: {validation_share: 0.2}", "dataset: {validation_path: v.jsonl}", "dataset.validation_share"),
        ("dataset: {validation_path: v.jsonl}", "dataset: {validation_share: 0.2}", "dataset.validation_path"),
    ],
)
def test_a_later_alternative_replaces_an_earlier_one(first: str, second: str, gone: str, tmp_path: Path) -> None:
    base = write(tmp_path, "base.yaml", MINIMAL)
    below, above = write(tmp_path, "below.yaml", first + "\n"), write(tmp_path, "above.yaml", second + "\n")
    assert load_config(base, below, above).get(gone) in (None, 0.0)
    section, name, value = re.findall(r"[\w.]+", second)
    settings = parse_settings([f"{section}.{name}={value}"])
    assert load_config(base, below, settings=settings).get(gone) in (None, 0.0)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (
            MINIMAL + "training:\n  warmup_share: 0.1\n  warmup_steps: 5\n",
            "give training.warmup_share or training.warmup_steps, not both",
        ),
        (
            "model: {path: m}\ndataset:\n  path: d\n  validation_share: 0.1\n  validation_path: v\n",
            "give dataset.validation_path or dataset.validation_share, not both",
        ),
    ],
)
def test_alternatives_in_one_file_are_refused(text: str, problem: str, tmp_path: Path) -> None:
    (found,) = problems_of(write(tmp_path, "c.yaml", text))
    assert found.startswith(f"{tmp_path}/c.yaml:")
    assert found.endswith(f": {problem}")


def test_alternatives_on_one_command_line_are_refused(finetune: Finetune) -> None:
    outcome = finetune(training__warmup_steps=1, training__warmup_share=0.1)
    assert_refused(outcome, "give training.warmup_share or training.warmup_steps, not both")


def test_a_warmup_of_nothing(tmp_path: Path) -> None:
    file = write(tmp_path, "c.yaml", MINIMAL)
    assert warmup_steps(load_config(file, settings={"training.warmup_steps": 0}), 100) == 0
    assert warmup_steps(load_config(file, settings={"training.warmup_share": 0.0}), 100) == 0


# Messages

BROKEN = """model:
  path: tiny
  pat: tiny
dataset:
  path: chat.jsonl
  format: xml
training:
  lora_r: 0
  lora_dropuot: 0.1
  batch_size: two
  learning_rate: "3e-4"
  target_modules: [q_proj, 7]
device: gpu
trainr: finetune
"""


def test_every_problem_is_told_at_once_with_its_line(tmp_path: Path) -> None:
    file = write(tmp_path, "c.yaml", BROKEN)
    assert sorted(problem.removeprefix(str(file)) for problem in problems_of(file)) == sorted(
        [
            ":3: unknown setting 'model.pat'; did you mean 'model.path'?",
            ":6: 'dataset.format' is 'xml' (str): should be 'auto', 'jsonl', 'json', 'csv', 'parquet' or 'text'",
            ":8: 'training.lora_r' is 0 (int): should be greater than 0",
            ":9: unknown setting 'training.lora_dropuot'; did you mean 'training.lora_dropout'?",
            ":10: 'training.batch_size' is 'two' (str): should be a valid integer",
            ":11: 'training.learning_rate' is '3e-4' (str): should be a valid number",
            ":12: 'training.target_modules' is 7 (int): should be a valid string",
            ":13: 'device' is 'gpu' (str): should be 'auto', 'cuda', 'mps' or 'cpu'",
            ":14: unknown setting 'trainr'; did you mean 'trainer'?",
        ]
    )


def test_each_problem_names_the_file_that_it_came_from(tmp_path: Path) -> None:
    base = write(tmp_path, "base.yaml", SMALL.replace("max_steps: 3", "max_steps: -3"))
    over = write(tmp_path, "over.toml", '[training]\nlora_r = 2\nlora_alpha = "x"\n')
    found = problems_of(base, over, training__seed=-1)
    assert [problem.partition(": ")[0] for problem in sorted(found)] == ["--set", f"{base}:7", f"{over}:3"]


def test_a_typo_hides_no_disagreement(tmp_path: Path) -> None:
    text = SMALL + "  lora_dropuot: 0.1\n  tracker_project: mine\n  eval_steps: 1\n"
    file = write(tmp_path, "c.yaml", text.replace("path: chat.jsonl", "path: chat.jsonl\n  validation_share: 0"))
    found = "\n".join(problems_of(file))
    assert "training.lora_dropuot" in found
    assert "training.tracker_project" in found
    assert "there is no validation" in found


DISAGREEING = [
    ({"training.warmup_steps": 1, "training.warmup_share": 0.1}, "training.warmup_share"),
    ({"training.tracker_project": "mine"}, "training.tracker_project"),
    ({"training.target_modules": ["lm_head"]}, "training.target_modules"),
    ({"training.method": "qlora", "training.bias": "all"}, "training.bias"),
    (
        {"training.method": "qlora", "training.quantization_bits": 8, "training.quantization_type": "fp4"},
        "training.quantization_type",
    ),
    ({"dataset.validation_split": "test"}, "dataset.validation_split"),
    ({"dataset.validation_share": 0.0, "training.eval_steps": 5}, "training.eval_steps"),
    ({"dataset.validation_share": 0.0, "training.final_weights": "best"}, "training.final_weights"),
    ({"dataset.validation_share": 0.0, "training.keep_best": 2}, "training.keep_best"),
]


def as_yaml(settings: dict[str, Any]) -> str:
    """c.yaml with more settings, each on a line of its own at the end of its section."""
    sections: dict[str, list[str]] = {}
    for block in re.split(r"^(?=\w)", SMALL, flags=re.MULTILINE)[1:]:
        name, _, rest = block.partition(":\n")
        sections[name] = rest.splitlines()
    for path, value in settings.items():
        section, _, name = path.partition(".")
        sections[section].append(f"  {name}: {json.dumps(value)}")
    return "".join(f"{name}:\n" + "".join(f"{line}\n" for line in lines) for name, lines in sections.items())


@pytest.mark.parametrize(("settings", "named"), DISAGREEING)
def test_settings_that_disagree_are_refused_by_their_names(
    settings: dict[str, Any], named: str, run: Run, project: Path
) -> None:
    write(project, "wrong.yaml", as_yaml(settings))
    outcome = run("finetune", "--config", "wrong.yaml")
    assert_refused(outcome, named)
    assert not (project / "out").exists()


@pytest.mark.parametrize(("settings", "named"), DISAGREEING)
def test_settings_that_disagree_are_refused_with_the_line_of_one_of_them(
    settings: dict[str, Any], named: str, tmp_path: Path
) -> None:
    file = write(tmp_path, "wrong.yaml", as_yaml(settings))
    lines = file.read_text().splitlines()
    places = [
        f"{file}:{number}: "
        for number, line in enumerate(lines, 1)
        if any(line.strip().startswith(path.partition(".")[2] + ":") for path in settings)
    ]
    (found,) = problems_of(file)
    assert found.startswith(tuple(places)), (found, places)


def test_settings_that_disagree_on_the_command_line_are_not_laid_on_a_file(finetune: Finetune) -> None:
    outcome = finetune(training__method="qlora", training__bias="all")
    assert_refused(outcome, "--set")
    assert "c.yaml" not in outcome.output


def test_what_is_missing_is_named_as_it_is_given(run: Run, project: Path) -> None:
    write(project, "half.yaml", "training: {lora_r: 3}\nmodel: {base_model: x}\ndataset: {format: csv}\n")
    outcome = run("finetune", "--config", "half.yaml")
    assert_refused(
        outcome,
        "half.yaml: 'model.path' is missing: add it, or pass --set model.path=…",
        "half.yaml: 'dataset.path' is missing: add it, or pass --set dataset.path=…",
    )


def test_a_missing_section_is_asked_for_by_what_must_be_in_it(run: Run, project: Path) -> None:
    write(project, "none.yaml", "training: {lora_r: 3}\n")
    assert_refused(run("finetune", "--config", "none.yaml"), "--set model.path=…", "--set dataset.path=…", "none.yaml")


def test_files_that_are_no_config(run: Run, project: Path) -> None:
    assert_refused(run("finetune", "--config", "cc.yaml"), "cc.yaml: no such config file; did you mean 'c.yaml'?")
    write(project, "c.json", "{}")
    assert_refused(run("finetune", "--config", "c.json"), "a config file ends in .toml, .yaml or .yml")
    write(project, "twice.yaml", SMALL + "model: {path: x}\n")
    assert_refused(run("finetune", "--config", "twice.yaml"), "twice.yaml:14: the key 'model' is already on line 1")
    write(project, "torn.yaml", "model: {path: x\n")
    assert_refused(run("finetune", "--config", "torn.yaml"), "torn.yaml:2: not valid YAML")
    write(project, "flat.yaml", "model: tiny\ndataset: chat.jsonl\n")
    assert_refused(
        run("finetune", "--config", "flat.yaml"),
        "flat.yaml:1: 'model' is 'tiny' (str): should be a mapping of settings",
    )


def test_configs_of_the_other_trainers_are_sent_there(run: Run, project: Path) -> None:
    for trainer in ("sft", "pretrain"):
        write(project, "other.yaml", f"trainer: {trainer}\nmodel_name: tiny\ndataset: chat.jsonl\nsteps: 3\n")
        outcome = run("finetune", "--config", "other.yaml")
        assert_refused(outcome, f"other.yaml:1: this is a config for '{trainer}': use `lacuna {trainer}`")
        outcome = run("lacuna", trainer, "@", "c.yaml")
        assert_refused(outcome, "c.yaml: this is a config for 'finetune': use `lacuna finetune`")
    write(project, "named.yaml", f"trainer: finetune\n{SMALL}")
    assert_refused(run("sft", "@", "named.yaml"), "named.yaml:1: this is a config for 'finetune'")


def test_a_trainer_that_is_no_name_is_refused(run: Run, project: Path) -> None:
    text = (project / "c.yaml").read_text()
    (project / "listed.yaml").write_text(f"trainer: [sft]\n{text}")
    for words in (("finetune", "--config", "listed.yaml"), ("lacuna", "data", "--config", "listed.yaml")):
        outcome = run(*words)
        assert (outcome.code, "listed.yaml:1" in outcome.output) == (2, True), outcome.output


def test_another_trainers_config_without_its_key_is_not_understood(run: Run, project: Path) -> None:
    write(project, "other.yaml", "model_name: tiny\ndataset: chat.jsonl\nsteps: 3\n")
    assert_refused(
        run("finetune", "--config", "other.yaml"),
        "other.yaml:1: unknown setting 'model_name'; did you mean 'model.path'?",
    )


# --set


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("x.y=3e-4", 3e-4),
        ("x.y=3", 3),
        ("x.y=text", "text"),
        ("x.y=[a, b]", ["a", "b"]),
        ("x.y={a: 1}", {"a": 1}),
        ("x.y=null", None),
        ("x.y=", None),
        ("x.y=true", True),
        ("x.y=on", "on"),
        ("x.y='3'", "3"),
        ("x.y=a=b", "a=b"),
        ("x.y=../runs/a b", "../runs/a b"),
        ("x.y=C:/models", "C:/models"),
    ],
)
def test_a_set_value_is_yaml(word: str, value: object) -> None:
    assert parse_settings([word]) == {"x.y": value}
    assert type(parse_settings([word])["x.y"]) is type(value)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["training.lora_r"], "--set 'training.lora_r': write it as --set training.lora_r=32"),
        (["=3"], "--set '=3': write it as --set training.lora_r=32"),
        (["training.lora_r=1", "training.lora_r=2"], "--set training.lora_r is given twice: keep one of them"),
        (["training.lora_r=[1"], "--set training.lora_r=[1"),
        (["model.path=a: b"], "--set model.path=a: b: 'a: b' is no value in YAML"),
        (["training=3", "training.lora_r=3"], "--set training.lora_r: 'training' has a value already"),
        (["training.lorar=3"], "--set: unknown setting 'training.lorar'; did you mean 'training.lora_r'?"),
        (["training=3"], "--set: 'training' is 3 (int): should be a mapping of settings"),
        (["training.lora_r=2.5"], "--set: 'training.lora_r' is 2.5 (float): should be a valid integer"),
        (["training.lora_r="], "--set: 'training.lora_r' is None"),
        (["training.quantization_bits=5"], "--set: 'training.quantization_bits' is 5 (int): should be 4 or 8"),
        (["training.method=dora"], "--set: 'training.method' is 'dora' (str): should be 'lora' or 'qlora'"),
        (["training.target_modules=[]"], "--set: 'training.target_modules' is []"),
        (["training.learning_rate=.nan"], "'training.learning_rate' is nan (float): should be a finite number"),
        (["trainer=sft"], "--set: 'trainer' is 'sft' (str): should be 'finetune'"),
    ],
)
def test_a_bad_set_is_refused(words: list[str], message: str, finetune: Finetune) -> None:
    assert_refused(finetune(*(part for word in words for part in ("--set", word))), message)


def test_broken_yaml_in_a_set_has_no_line_number(finetune: Finetune) -> None:
    """A command line has one line: `[1:2:` reads as if it were part of the value."""
    outcome = finetune("--set", "training.lora_r=[1")
    assert_refused(outcome)
    assert not re.search(r"\[1'?:\d", outcome.output), outcome.output


def test_a_wrong_device_is_refused(finetune: Finetune) -> None:
    assert finetune("--device", "gpu").code == 2


# The command's own flags


def test_the_device_flag_goes_over_the_config(run: Run, finetune: Finetune, project: Path) -> None:
    write(project, "cuda.yaml", f"{SMALL}device: cuda\n")
    outcome = run("finetune", "--config", "cuda.yaml", "--device", "cpu", "--dry-run")
    assert outcome.code == 0, outcome.output
    assert "not available" not in outcome.output
    assert "would stop" not in outcome.output


def test_a_device_that_is_given_twice_is_named_as_it_was_given(finetune: Finetune) -> None:
    assert_refused(finetune("--device", "cpu", device="cuda"), "--device")


def test_verbose_is_no_setting(finetune: Finetune) -> None:
    """It shows every step of this start; the run stays what its file says."""
    outcome = finetune("--dry-run", "-v")
    assert re.search(r"training\.logging_steps \d+ (c\.yaml:\d+|default)", outcome.output)


@pytest.mark.parametrize("command", [["finetune"], ["lacuna", "finetune"]])
def test_verbose_shows_every_step(command: list[str], run: Run, project: Path) -> None:
    """In both ways to call the command, and whatever a file says."""
    write(project, "rare.yaml", "training: {logging_steps: 9}\n")
    logged = {}
    for folder, flag in (("quiet", []), ("loud", ["-v"])):
        words = set_words({"training.output_dir": folder, "dataset.validation_share": 0})
        outcome = run(*command, "--config", "c.yaml", "--config", "rare.yaml", *words, *flag)
        assert outcome.code == 0, outcome.output
        logged[folder] = [json.loads(line)["step"] for line in Path(folder, "metrics.jsonl").read_text().splitlines()]
    assert logged == {"quiet": [1, 3], "loud": [1, 2, 3]}


def test_a_run_without_output_dir_is_named_for_model_and_time(finetune: Finetune) -> None:
    outcome = finetune(training__output_dir="null")
    assert outcome.code == 0, outcome.output
    assert re.search(r"adapter: checkpoints/tiny-\d{8}-\d{6}/final", outcome.output)


def test_an_empty_output_dir_is_refused_or_none(finetune: Finetune) -> None:
    outcome = finetune(training__output_dir="''")
    assert outcome.code == 2 or re.search(r"checkpoints/tiny-\d{8}", outcome.output), outcome.output


@pytest.mark.parametrize("name", ["model.path", "model.base_model", "dataset.path"])
def test_an_empty_path_is_refused_by_its_name(name: str, finetune: Finetune) -> None:
    assert_refused(finetune("--set", f"{name}=''"), name)


def test_a_model_in_the_home_folder(finetune: Finetune, project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(project))
    outcome = finetune(model__path="~/tiny", dataset__path="~/chat.jsonl", training__output_dir="~/home")
    assert outcome.code == 0, outcome.output
    assert (project / "home" / "final").is_dir()


# Seeds and shipped configs


def test_the_yaml_of_seed_004_has_the_values_that_it_says(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, "finetune.yaml", SEED_004))
    assert {path: config.get(path) for path in SEED_004_VALUES} == SEED_004_VALUES
    assert config.settings()[BATCH] == 16
    assert (config.epochs, config.steps, config.warmup_steps, config.warmup_share) == (3, None, 100, None)
    assert warmup_steps(config, 1000) == 100


def test_the_yaml_of_seed_004_trains(run: Run, project: Path) -> None:
    write(project, "finetune.yaml", SEED_004)
    (project / "models").mkdir()
    make_model(project / "models" / "gpt2")
    (project / "gpt2").symlink_to("models/gpt2")
    (project / "data/my-dataset").mkdir(parents=True)
    texts = write_texts(project / "t.jsonl").read_text().splitlines()
    rows = ["text", *(json.loads(line)["text"] for line in texts)]
    write(project / "data/my-dataset", "train.csv", "\n".join(rows) + "\n")
    few = {"training.max_steps": 2, "training.warmup_steps": 1, "training.sequence_length": 128}
    outcome = run("finetune", "--config", "finetune.yaml", *set_words(few))
    assert outcome.code == 0, outcome.output
    assert "warning: device 'cuda' is not available here" in outcome.output
    adapter = json.loads((project / "checkpoints/gpt2-finetuned/final/adapter_config.json").read_text())
    assert (adapter["r"], adapter["lora_alpha"], adapter["lora_dropout"]) == (16, 32, 0.05)
    assert set(adapter["target_modules"]) == {"q_proj", "v_proj"}
    assert adapter["task_type"] == "CAUSAL_LM"


def test_the_shipped_finetune_yaml_is_seed_004s() -> None:
    """But for the layers: those are GPT-2's, which has no q_proj."""
    config = load_config(ROOT / "configs/finetune.yaml")
    expected = {**SEED_004_VALUES, "training.target_modules": ["c_attn", "c_proj"]}
    assert {path: config.get(path) for path in expected} == expected


@pytest.mark.parametrize(("name", "machine"), [("h100", H100), ("m4", M4)])
def test_the_presets_have_the_values_of_seed_002(name: str, machine: dict[str, Any]) -> None:
    config = load_config(ROOT / f"configs/training_config_{name}.yaml")
    expected = PRESETS | machine
    assert {path: config.get(path) for path in expected} == expected
    assert config.settings()[BATCH] == 16
    assert config.final_learning_rate_share == 0.0
    assert config.validation_share == 0.0


def test_a_preset_without_validation_file_keeps_a_tenth_of_the_rows(tmp_path: Path) -> None:
    preset = (ROOT / "configs/training_config_h100.yaml").read_text()
    text = "".join(line for line in preset.splitlines(keepends=True) if "validation_path:" not in line)
    config = load_config(write(tmp_path, "c.yaml", text))
    assert (config.validation_dataset, config.validation_share) == (None, 0.1)


def test_the_presets_differ_only_in_what_the_machine_decides() -> None:
    one, other = (load_config(ROOT / f"configs/training_config_{name}.yaml") for name in ("h100", "m4"))
    different = {path for path in setting_paths(FinetuneConfig) if one.get(path) != other.get(path)}
    assert different == {*M4, "training.output_dir"}


def test_all_shipped_configs_are_tested_here() -> None:
    assert [path.name for path in SHIPPED] == [
        "finetune.yaml",
        "training_config_h100.yaml",
        "training_config_m4.yaml",
    ]


def assert_shows_every_setting(output: str, file: Path) -> None:
    """Each with its origin: the line where the file has it, else `default`."""
    _, origins = load_finetune([str(file)], {})
    paths = setting_paths(FinetuneConfig)
    assert len(paths) > 45
    for path, after in zip(paths, [*paths[1:], None], strict=True):
        end = re.escape(f" {after} ") if after is not None else "$| warning| would stop"
        shown = re.search(rf"(?<![\w.]){re.escape(path)} (.*?)(?:{end})", output)
        assert shown is not None, path
        origin = origins[path].where(path) if path in origins else "default"
        assert f" {origin} " in f"{shown[1]} ", (path, shown[1])


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.stem)
def test_a_dry_run_of_a_shipped_config_says_what_is_missing(file: Path, run: Run, project: Path) -> None:
    outcome = run("finetune", "--config", file, "--dry-run")
    assert outcome.code == 1, outcome.output
    assert_shows_every_setting(outcome.output, file)
    config = load_config(file)
    assert f"would stop: model.path {config.model_name}: no such folder" in outcome.output
    assert re.search(rf"hf download \S*{Path(config.model_name).name}", outcome.output)
    assert f"would stop: {config.dataset}: no such file or folder" in outcome.output
    assert sorted(path.name for path in project.iterdir()) == ["c.yaml", "chat.jsonl", "tiny"]


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.stem)
def test_explain_shows_a_shipped_config(file: Path, run: Run) -> None:
    outcome = run("lacuna", "explain", file, "--set", "training.seed=7")
    assert outcome.code == 0, outcome.output
    assert "training.seed 7 --set training.seed" in outcome.output
    unchanged = run("lacuna", "explain", file)
    assert_shows_every_setting(unchanged.output, file)


def test_explain_follows_layers(run: Run, project: Path) -> None:
    write(project, "over.yaml", "# more\ntraining:\n  lora_r: 4\n  warmup_steps: 2\n")
    outcome = run("lacuna", "explain", "c.yaml", "over.yaml", "--set", "training.lora_alpha=8", "--device", "cpu")
    assert outcome.code == 0, outcome.output
    for words in (
        "training.lora_r 4 over.yaml:3", "training.warmup_steps 2 over.yaml:4", "training.max_steps 3 c.yaml:7",
        "training.lora_alpha 8 --set training.lora_alpha", "training.bias none default", "device cpu --",
    ):  # fmt: skip
        assert words in outcome.output
    assert_refused(run("lacuna", "explain", "c.yaml", "--set", "training.lorar=8"), "did you mean 'training.lora_r'?")


# Dry run


def test_a_dry_run_says_what_would_happen_and_writes_nothing(finetune: Finetune, project: Path) -> None:
    outcome = finetune("--dry-run")
    assert outcome.code == 0, outcome.output
    assert "would stop" not in outcome.output
    assert re.search(r"data +36 documents, [\d,]+ tokens \(\d+% learned\), 4 to validate", outcome.output)
    assert re.search(r"steps +3, [\d,]+ tokens", outcome.output)
    assert "at the peak of a step: fits" in outcome.output
    assert sorted(path.name for path in project.iterdir()) == ["c.yaml", "chat.jsonl", "tiny"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"training__batch_size": 100}, "gradient_accumulation_steps is 200"),
        ({"training__warmup_steps": 3}, "warmup takes 3 of 3 steps"),
        ({"training__sequence_length": 4096}, "training.sequence_length 4096 is more than the 512 positions"),
        ({"model__path": "./gone"}, "hf download OWNER/gone --local-dir ./gone"),
        ({"training__target_modules": "[q_prj]"}, "has no linear layer 'q_prj'"),
        ({"training__output_dir": "tiny"}, "training.output_dir tiny is not empty and not a run folder"),
    ],
)
def test_a_dry_run_says_what_would_stop_the_run(
    settings: dict[str, object], message: str, finetune: Finetune, project: Path
) -> None:
    outcome = finetune("--dry-run", **settings)
    assert outcome.code == 1, outcome.output
    assert "would stop: " in outcome.output
    assert message in outcome.output.partition("would stop: ")[2]


def test_a_dry_run_looks_at_what_it_would_resume(finetune: Finetune) -> None:
    assert "neither a run folder nor a checkpoint" in finetune("--dry-run", "--resume", "nowhere").output


# Memory


def test_the_plan_counts_the_adapters_weights(trained_run: Path, model_folder: Path) -> None:
    from safetensors.torch import load_file

    shape = model_shape(json.loads((model_folder / "config.json").read_text()))
    assert shape is not None
    tensors = load_file(trained_run / "final" / "adapter_model.safetensors")
    assert shape.adapter_parameters(16) == sum(tensor.numel() for tensor in tensors.values())


# Refusals of the command

REFUSED: list[tuple[dict[str, object], list[str]]] = [
    (
        {"model__path": "./models/gone"},
        ["model.path ./models/gone: no such folder", "hf download OWNER/gone --local-dir ./models/gone"],
    ),
    ({"model__path": "some/model"}, ["model.path some/model: no such folder", "hf download some/model"]),
    (
        {"dataset__path": "./data/gone"},
        ["./data/gone: no such file or folder", "hf download OWNER/gone --repo-type dataset"],
    ),
    ({"dataset__path": "chta.jsonl"}, ["chta.jsonl: no such file or folder; did you mean 'chat.jsonl'?"]),
    ({"dataset__path": "tiny"}, ["tiny/config.json: a .json data file is one list of objects, this is a dict"]),
    ({"dataset__validation_path": "gone.jsonl"}, ["gone.jsonl: no such file or folder"]),
    ({"training__target_modules": "[q_prj, k_proj]"}, ["has no linear layer 'q_prj'; did you mean 'q_proj'?"]),
    ({"training__target_modules": "[lm_head]"}, ["training.target_modules: the head takes no adapter here"]),
    ({"training__target_modules": "[embed_out]"}, ["training.target_modules: the head takes no adapter here"]),
    (
        {"training__method": "qlora", "training__bias": "lora_only"},
        ["training.bias: bitsandbytes rounds the biases of its layers; with qlora it is none"],
    ),
    (
        {
            "training__method": "qlora",
            "training__quantization_bits": 8,
            "training__quantization_type": "fp4",
            "training__double_quantization": "false",
            "training__quantization_compute_dtype": "fp32",
        },
        [
            "training.quantization_type, training.double_quantization, training.quantization_compute_dtype: "
            "only 4-bit weights have it"
        ],
    ),
    (
        {"dataset__validation_share": 0, "training__eval_steps": 2, "training__final_weights": "best"},
        ["training.eval_steps, training.final_weights: there is no validation; give dataset.validation_path"],
    ),
    ({"training__tracker_project": "mine"}, ["training.tracker_project is W&B's: it needs tracker: wandb"]),
    ({"dataset__validation_split": "x"}, ["dataset.validation_split is a split of dataset.validation_path"]),
    (
        {"dataset__validation_share": 0, "dataset__split_seed": 1},
        ["dataset.split_seed decides what dataset.validation_share keeps"],
    ),
    ({"training__batch_size": 100}, ["training.batch_size × gradient_accumulation_steps is 200"]),
    ({"training__sequence_length": 4096}, ["training.sequence_length 4096 is more than the 512 positions of tiny"]),
    ({"training__warmup_steps": 3}, ["warmup takes 3 of 3 steps", "training.warmup_steps"]),
    ({"dataset__text_field": "story"}, ["dataset.text_field would have no effect"]),
    ({"dataset__type": "text"}, ["chat.jsonl"]),
    ({"dataset__train_split": "x", "dataset__path": "folder"}, ["no file is named for the split 'x'"]),
    ({"dataset__chat_template": "gone.jinja"}, ["dataset.chat_template gone.jinja: No such file"]),
    ({"dataset__validation_share": 0.99}, ["40 distinct documents are too few to keep 99% of them"]),
    ({"model__revision": "main"}, ["model.revision is for hub models, but tiny is a folder"]),
    ({"training__output_dir": "c.yaml"}, ["training.output_dir c.yaml is a file"]),
    ({"training__output_dir": "/proc/lacuna"}, ["training.output_dir /proc/lacuna: cannot be written"]),
    ({"training__output_dir": "tiny"}, ["training.output_dir tiny is not empty and not a run folder"]),
    (
        {"dataset__too_long": "stop", "training__sequence_length": 16},
        ["are longer than training.sequence_length 16", "dataset.too_long"],
    ),
    ({"training__sequence_length": 4}, ["nothing is left to train on; raise", "training.sequence_length"]),
]
FLAT_NAMES = re.compile(
    r"(?<![\w./])(model_name|model_revision|dataset_split|dataset_format|text_column|validation_dataset|"
    r"micro_batch_size|evaluate_every|log_every|save_every|activation_checkpointing|output_dir|sequence_length|"
    r"warmup_steps|chat_template|too_long|learning_rate)(?![\w/]|\.\w)|--(?!set|config|resume|local-dir|repo-type|device)\w"
)
"""Names of sft's settings, and its flags; in `training.sequence_length` it is this config's own."""


@pytest.mark.parametrize(("settings", "messages"), REFUSED)
def test_what_cannot_work_is_refused_in_this_configs_names(
    settings: dict[str, object], messages: list[str], finetune: Finetune, project: Path
) -> None:
    (project / "folder").mkdir()
    write_chat(project / "folder" / "train.jsonl")
    outcome = finetune(**settings)
    assert_refused(outcome, *messages)
    assert not FLAT_NAMES.search(outcome.output.partition("error: ")[2]), outcome.output


def test_what_is_said_before_training_is_in_this_configs_names(finetune: Finetune) -> None:
    outcome = finetune(training__sequence_length=64)
    assert outcome.code == 0, outcome.output
    assert "left out" in outcome.output
    assert not FLAT_NAMES.search(outcome.output), outcome.output


def test_names_of_files_are_left_as_they_are(finetune: Finetune, project: Path) -> None:
    """`chat_template.jinja` is a file of every model that this package writes."""
    outcome = finetune(training__output_dir="tiny")
    assert_refused(outcome, "(it holds chat_template.jinja, config.json,")


def test_data_named_like_a_setting_keep_their_name(finetune: Finetune, project: Path) -> None:
    write(project, "batch_size.jsonl", "{broken\n")
    assert_refused(finetune(dataset__path="batch_size.jsonl"), " batch_size.jsonl:1")


def test_data_of_an_unknown_kind_get_an_example_of_each_known_one(finetune: Finetune, project: Path) -> None:
    write(project, "data.xyz", "hi")
    outcome = finetune(dataset__path="data.xyz")
    assert_refused(
        outcome,
        "data.xyz: unknown ending '.xyz'",
        '{"messages": [{"role": "user"',
        "prompt,completion",
        "column `text`",
    )
    (project / "empty").mkdir()
    assert_refused(finetune(dataset__path="empty"), "empty: the folder holds no .jsonl")


def test_advice_on_too_little_data_is_about_the_batch(finetune: Finetune) -> None:
    """Samples are not packed into rows here: a shorter sequence_length makes no more of them."""
    outcome = finetune(training__batch_size=100)
    assert_refused(outcome, "gradient_accumulation_steps")
    assert "sequence_length" not in outcome.output.partition("error: ")[2], outcome.output


def test_advice_reads_as_a_command(finetune: Finetune) -> None:
    outcome = finetune(training__sequence_length=4096)
    assert_refused(outcome)
    assert "=… 512" not in outcome.output, outcome.output


def test_a_tokenizer_that_is_not_there_is_named_by_its_setting(finetune: Finetune) -> None:
    assert_refused(finetune(model__base_model="./gone"), "model.base_model ./gone: no such folder")


def test_a_warmup_by_its_share_is_not_advised_about_steps(finetune: Finetune) -> None:
    outcome = finetune(training__warmup_share=0.9)
    assert_refused(outcome, "warmup takes 3 of 3 steps", "training.warmup_share")


def test_everything_wrong_on_the_machine_is_told_at_once(finetune: Finetune) -> None:
    outcome = finetune(model__path="./gone", dataset__path="gone.jsonl", dataset__chat_template="gone.jinja")
    assert_refused(outcome, "model.path ./gone", "gone.jsonl: no such file")


def test_cuda_that_is_not_there_is_a_warning(finetune: Finetune) -> None:
    for words in (["--device", "cuda"], ["--set", "device=cuda", "--set", "training.output_dir=other"]):
        outcome = finetune(*words)
        assert outcome.code == 0, outcome.output
        assert "warning: device 'cuda' is not available here" in outcome.output
        assert "going on with the CPU" in outcome.output


def test_flash_attention_that_is_not_there_is_said(finetune: Finetune) -> None:
    outcome = finetune(training__attention="flash_attention_2")
    assert outcome.code == 0, outcome.output
    assert "flash_attention_2 is not there" in outcome.output
    assert "attention sdpa" in outcome.output


def test_weights_that_cannot_be_read(finetune: Finetune, project: Path) -> None:
    shutil.copytree(project / "tiny", project / "torn")
    (project / "torn" / "model.safetensors").write_bytes(b"\0" * 20)
    assert_refused(finetune(model__path="torn"), "torn/model.safetensors: its header cannot be read")


def test_quantisation_that_does_not_work_here(finetune: Finetune, monkeypatch: pytest.MonkeyPatch) -> None:
    advice = "set training.method: lora, which needs no quantisation"
    from bitsandbytes.nn.modules import Linear4bit

    with monkeypatch.context() as patch:
        patch.setattr(Linear4bit, "forward", lambda self, x: x * float("nan"))
        outcome = finetune(training__method="qlora")
    assert_refused(outcome, "training.method qlora: bitsandbytes gives no finite product on", advice)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "bitsandbytes.nn.modules", None)
        outcome = finetune(training__method="qlora")
    assert_refused(outcome, "training.method qlora: bitsandbytes does not work on", advice)


def test_a_diverging_loss_stops_in_this_configs_names(finetune: Finetune) -> None:
    outcome = finetune(
        training__learning_rate=1e25, training__max_steps=10, training__warmup_share=0, training__max_gradient_norm=1e9
    )
    assert_refused(outcome, "The optimizer has not moved", "training.learning_rate")
    assert not FLAT_NAMES.search(outcome.output.partition("error: ")[2]), outcome.output


def test_out_of_memory_says_what_each_smaller_setting_would_take(
    finetune: Finetune, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lacuna.finetune.trainer import AdapterTrainer

    def explode(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(AdapterTrainer, "training_step", explode)
    outcome = finetune()
    assert_refused(
        outcome, "out of memory: a step takes about", "GiB", "training.batch_size: 1 (change",
        "training.gradient_checkpointing: true", "training.method: qlora",
    )  # fmt: skip
    status = json.loads(Path("out/status.json").read_text())
    assert status["state"] == "failed"
    assert "out of memory" in status["reason"]


# Resuming


def test_resuming_from_what_is_no_run_is_refused(finetune: Finetune, finished: Path) -> None:
    for place in ("nowhere", "tiny", finished / "final", "c.yaml"):
        assert_refused(finetune("--resume", place), f"--resume {place}: neither a run folder nor a checkpoint of one")


def test_a_finished_run_is_not_trained_again(finetune: Finetune, finished: Path) -> None:
    before = (finished / "metrics.jsonl").read_bytes()
    for words in ([], ["--resume", "out"], ["--resume", "auto"]):
        outcome = finetune(*words)
        assert outcome.code == 0, outcome.output
        assert "already finished: out/final" in outcome.output
    assert (finished / "metrics.jsonl").read_bytes() == before


def test_other_settings_do_not_resume_a_run(finetune: Finetune, unfinished: Path) -> None:
    outcome = finetune(training__lora_r=8, training__scheduler="linear", training__batch_size=4)
    assert_refused(
        outcome, "training.lora_r was 16, now 8", "training.scheduler was 'cosine', now 'linear'",
        "training.batch_size × gradient_accumulation_steps was 4, now 8", "training.output_dir",
    )  # fmt: skip
    checkpoint = "out/checkpoints/step-00000003"
    outcome = finetune("--resume", checkpoint, training__lora_r=8, training__output_dir="fork")
    assert_refused(outcome, f"the checkpoint {checkpoint} has other settings (training.lora_r was 16, now 8)")


def test_the_same_batch_made_up_otherwise_resumes_a_run(finetune: Finetune, unfinished: Path) -> None:
    outcome = finetune(training__batch_size=1, training__gradient_accumulation_steps=4, training__logging_steps=2)
    assert outcome.code == 0, outcome.output
    assert "resuming from out/checkpoints/step-00000003 (step 3 of 3)" in outcome.output


def test_changed_data_do_not_resume_a_run(finetune: Finetune, unfinished: Path, project: Path) -> None:
    write_chat(project / "chat.jsonl", seed=1)
    assert_refused(
        finetune("--resume", "out"), "was made of something else: training data: other rows than it was trained on"
    )


def test_an_older_checkpoint_does_not_resume_in_its_own_folder(finetune: Finetune, unfinished: Path) -> None:
    outcome = finetune("--resume", "out/checkpoints/step-00000002")
    assert_refused(outcome, "already holds step-00000003, which is newer", "training.output_dir")


def test_an_older_checkpoint_resumes_in_another_folder(finetune: Finetune, unfinished: Path) -> None:
    outcome = finetune("--resume", "out/checkpoints/step-00000002", training__output_dir="fork")
    assert outcome.code == 0, outcome.output
    assert "resuming from out/checkpoints/step-00000002 (step 2 of 3)" in outcome.output
    assert Path("fork/final/adapter_config.json").is_file()


def test_a_run_given_to_resume_is_not_passed_over(finetune: Finetune, unfinished: Path) -> None:
    """Where output_dir is another folder, a run that starts at step 0 is not what was asked for."""
    outcome = finetune("--resume", "out", training__output_dir="other")
    assert outcome.code == 2 or "resuming from out/checkpoints" in outcome.output, outcome.output


def test_a_damaged_checkpoint_is_refused(finetune: Finetune, unfinished: Path) -> None:
    checkpoint = unfinished / "checkpoints/step-00000003"
    (shard,) = checkpoint.glob("*.safetensors")
    shard.write_bytes(shard.read_bytes()[:-8])
    assert_refused(finetune("--resume", checkpoint), str(checkpoint))


def test_an_sft_run_is_no_adapters_run(run: Run, finetune: Finetune, project: Path) -> None:
    settings = {"model_name": "tiny", "dataset": "chat.jsonl", "steps": 2, "batch_size": 2, "micro_batch_size": 2}
    outcome = run("sft", **settings, output_dir="sft_run", sequence_length=96)
    assert outcome.code == 0, outcome.output
    assert_refused(
        finetune("--resume", "sft_run", training__output_dir="sft_run"), "training.output_dir sft_run holds a sft run"
    )


def test_an_sft_runs_checkpoint_is_no_adapters(run: Run, finetune: Finetune, project: Path) -> None:
    settings = {"model_name": "tiny", "dataset": "chat.jsonl", "steps": 2, "batch_size": 2, "micro_batch_size": 2}
    assert run("sft", **settings, output_dir="sft_run", sequence_length=96).code == 0
    outcome = finetune("--resume", "sft_run/checkpoints/step-00000002", training__output_dir="fork")
    assert_refused(outcome, "sft_run/checkpoints/step-00000002")
    assert "None" not in outcome.output, outcome.output


def test_resume_auto_finds_the_newest_run_of_the_model(finetune: Finetune, unfinished: Path) -> None:
    for name in ("tiny-20260101-000000", "tiny-20260102-000000"):
        shutil.copytree(unfinished, f"checkpoints/{name}")
    older = Path("checkpoints/tiny-20260101-000000/status.json")
    older.write_text(older.read_text())
    outcome = finetune("--resume", "auto", training__output_dir="null")
    assert outcome.code == 0, outcome.output
    assert f"adapter: {older.parent}/final" in outcome.output


def test_the_batch_of_several_processes_resumes_in_one(finetune: Finetune, unfinished: Path) -> None:
    """Two processes × 2 samples × 1 pass are the batch of one process × 2 samples × 2 passes."""
    config = unfinished / "config.toml"
    by_two = config.read_text().replace("gradient_accumulation_steps = 2", "gradient_accumulation_steps = 1")
    config.write_text(by_two)
    provenance = unfinished / "provenance.json"
    provenance.write_text(provenance.read_text().replace('"devices": 1', '"devices": 2'))
    outcome = finetune("--resume", "out")
    assert outcome.code == 0, outcome.output


def test_an_adapters_run_is_no_sft_run(run: Run, unfinished: Path) -> None:
    settings = {"model_name": "tiny", "dataset": "chat.jsonl", "steps": 2, "sequence_length": 96}
    assert_refused(run("sft", **settings, output_dir="out"), "output_dir out holds a finetune run")


def test_resume_auto_is_not_misled_by_a_longer_name(finetune: Finetune, unfinished: Path) -> None:
    """gpt2 and gpt2-medium: the newest run may be of the other model."""
    names = ["tiny-20260101-000000", "tiny-large-20260102-000000"]
    for name in names:
        shutil.copytree(unfinished, f"checkpoints/{name}")
    newer = Path("checkpoints", names[1], "status.json")
    newer.write_text(newer.read_text())
    outcome = finetune("--resume", "auto", training__output_dir="null")
    assert outcome.code == 0, outcome.output
    assert f"adapter: checkpoints/{names[0]}/final" in outcome.output


# Merging


def test_merge_refuses_what_it_cannot_do(run: Run, finished: Path, project: Path) -> None:
    assert_refused(run("lacuna", "merge", "nowhere", "--output", "m"), "nowhere: no adapter there (adapter_config.json")
    assert_refused(run("lacuna", "merge", "tiny", "--output", "m"), "tiny: no adapter there")
    assert_refused(run("lacuna", "merge", "out", "--output", "tiny"), "--output tiny: is there already")
    (project / "tiny").unlink()
    assert_refused(run("lacuna", "merge", "out", "--output", "m"), "out/final: its base model tiny cannot be loaded")
    assert not (project / "m").exists()


def test_merge_writes_nothing_that_says_something_else(
    run: Run, finished: Path, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lacuna.finetune.merge.logits_of", lambda model, tokens: torch.rand(2, 24, 400))
    outcome = run("lacuna", "merge", "out", "--output", "m")
    assert_refused(outcome, "the merged model's logits differ from base plus adapter by", "nothing was written")
    assert sorted(path.name for path in project.iterdir()) == ["c.yaml", "chat.jsonl", "out", "tiny"]


@pytest.mark.parametrize(
    ("tied", "adapter", "said"),
    [
        (False, {"target_modules": ["embed_tokens", "q_proj"]}, "merged: "),
        (
            True,
            {"target_modules": ["embed_tokens", "q_proj"]},
            "the merged model's logits differ from base plus adapter",
        ),
        (True, {"target_modules": ["q_proj"], "trainable_token_indices": [3, 4]}, "merged: "),
        (True, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, "merged: "),
    ],
)
def test_adapters_on_the_embedding_are_merged_or_refused(
    run: Run, tmp_path: Path, tied: bool, adapter: dict[str, Any], said: str
) -> None:
    """PEFT merges an adapter of a tied embedding into the head as well, which had none: the proof by logits sees it."""
    base = make_model(tmp_path / "base", "qwen3" if tied else "llama")
    model = AutoModelForCausalLM.from_pretrained(base)
    assert model.config.tie_word_embeddings is tied
    torch.manual_seed(0)
    config = LoraConfig(task_type="CAUSAL_LM", r=2, base_model_name_or_path=str(base), **adapter)
    adapted: Any = get_peft_model(model, config)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn_like(parameter) * 0.1)
    adapted.save_pretrained(tmp_path / "adapter")
    outcome = run("lacuna", "merge", tmp_path / "adapter", "--output", tmp_path / "merged")
    assert said in outcome.output
    assert outcome.code == (0 if said == "merged: " else 2)
    assert (tmp_path / "merged").exists() == (outcome.code == 0)


def test_merge_says_that_a_folder_is_gone_not_that_the_hub_is(run: Run, finished: Path, project: Path) -> None:
    settings = json.loads((finished / "final/adapter_config.json").read_text())
    settings["base_model_name_or_path"] = "./models/tiny"
    write(finished / "final", "adapter_config.json", json.dumps(settings))
    assert_refused(run("lacuna", "merge", "out", "--output", "m"), "./models/tiny", "no such folder")


def test_merge_of_an_adapter_without_weights(run: Run, finished: Path) -> None:
    (finished / "final/adapter_model.safetensors").unlink()
    assert_refused(run("lacuna", "merge", "out", "--output", "m"), "out/final")


def test_merge_of_an_adapter_whose_config_is_torn(run: Run, finished: Path) -> None:
    (finished / "final/adapter_config.json").write_text("{")
    assert_refused(run("lacuna", "merge", "out", "--output", "m"), "out/final/adapter_config.json")


def test_merge_of_an_adapter_without_tokenizer_takes_the_bases(run: Run, finished: Path, project: Path) -> None:
    """Plain PEFT saves none, and `any adapter` is what merge says that it takes."""
    for path in (finished / "final").glob("token*"):
        path.unlink()
    outcome = run("lacuna", "merge", "out", "--output", "m")
    assert outcome.code == 0, outcome.output
    assert (project / "m" / "tokenizer.json").is_file()
