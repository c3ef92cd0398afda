"""Files of weights that would stop a run are known before it loads them: by its dry run and by the doctor too."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from conftest import Run
from lacuna.train.weights import weight_problems

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:aaaa\nsize 10229248\n"


@pytest.fixture
def model(model_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model_folder, tmp_path / "model"))


def in_shards(model: Path) -> list[Path]:
    """The model's weights in several files."""
    loaded = AutoModelForCausalLM.from_pretrained(model)
    (model / "model.safetensors").unlink()
    loaded.save_pretrained(model, max_shard_size="30KB")
    shards = sorted(model.glob("model-*.safetensors"))
    assert len(shards) > 1
    return shards


def pointer(model: Path) -> str:
    (model / "model.safetensors").write_text(POINTER)
    return "model.safetensors: is a pointer of git-lfs, not the weights: git lfs pull, or hf download"


def cut(model: Path) -> str:
    file = model / "model.safetensors"
    size = file.stat().st_size
    os.truncate(file, size - 100)
    return f"model.safetensors: has {size - 100:,} bytes instead of {size:,}: download it again"


def cut_in_the_header(model: Path) -> str:
    os.truncate(model / "model.safetensors", 40)
    return "model.safetensors: its header cannot be read: is it cut off? Download it again"


def no_safetensors(model: Path) -> str:
    (model / "model.safetensors").write_bytes(b"\xff" * 64)
    return "model.safetensors: is no safetensors file"


def a_shard_less(model: Path) -> str:
    gone = in_shards(model)[-1]
    gone.unlink()
    return f"{gone.name}: is not there, but model.safetensors.index.json names it: download it"


def no_index(model: Path) -> str:
    in_shards(model)
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": None}))
    return "model.safetensors.index.json: no index of weights"


def more_tokens(model: Path) -> str:
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_tokens([f"<|tool {number}|>" for number in range(200)])
    tokenizer.save_pretrained(model)
    return f"model: the tokenizer has {len(tokenizer)} tokens, the model only 400 embeddings"


KINDS = [pointer, cut, cut_in_the_header, no_safetensors, a_shard_less, no_index, more_tokens]


@pytest.mark.parametrize("damage", KINDS)
def test_what_would_stop_the_run_is_known_before(
    run: Run, model: Path, chat_file: Path, monkeypatch: pytest.MonkeyPatch, damage: Callable[[Path], str]
) -> None:
    monkeypatch.chdir(model.parent)
    said = damage(model)
    settings = {"model_name": "model", "dataset": chat_file, "output_dir": "out", "steps": 2, "sequence_length": 64}
    for words in ((), ("--dry-run",)):
        outcome = run("sft", *words, **settings, batch_size=2, micro_batch_size=2, device="cpu")
        assert outcome.code == (1 if words else 2), outcome.output
        assert said in outcome.output
    config = {
        "model": {"path": "model"}, "dataset": {"path": str(chat_file)}, "training": {"sequence_length": 256},
        "device": "cpu",
    }  # fmt: skip
    Path("finetune.yaml").write_text(json.dumps(config))
    outcome = run("finetune", "--dry-run", config="finetune.yaml")
    assert (outcome.code, said in outcome.output) == (1, True), outcome.output
    if damage in (pointer, a_shard_less, more_tokens):
        outcome = run("lacuna", "doctor", "finetune.yaml")
        assert (outcome.code, said in outcome.output) == (1, True), outcome.output


def test_whole_weights_are_passed(model: Path, tmp_path: Path) -> None:
    assert list(weight_problems(model)) == []
    in_shards(model)
    assert list(weight_problems(model)) == []
    assert list(weight_problems(tmp_path / "nothing")) == []
