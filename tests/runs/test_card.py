"""The card in final/: what it says is so, and its lines of code talk to the weights."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from conftest import Run
from fixtures import make_model, write_chat, write_texts
from lacuna.config.yaml_format import parse_yaml

FLAT = {
    "model_name": "model", "steps": 4, "batch_size": 4, "micro_batch_size": 2, "sequence_length": 96, "save_every": 2,
    "learning_rate": 1e-3, "log_every": 1, "device": "cpu", "validation_share": 0.25,
}  # fmt: skip


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    make_model(Path("model"))
    write_chat(Path("chat.jsonl"))
    write_texts(Path("texts.jsonl"))
    return tmp_path


def card(folder: Path) -> tuple[dict[str, Any], dict[str, str], str]:
    """Of a final folder: what a hub reads, the table, and the code."""
    text = (folder / "README.md").read_text()
    head = re.match(r"---\n(.*?)\n---\n", text, re.S)
    assert head is not None
    values, _ = parse_yaml(head[1], "card")
    table = dict(re.findall(r"^\| (\S[^|]*?) \| (.*) \|$", text, re.M))
    (code,) = re.findall(r"```python\n(.*?)```", text, re.S)
    return values, table, code


def spoken(code: str, folder: Path, capfd: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """What the card's code leaves, run on its folder."""
    names: dict[str, Any] = {}
    exec(code.replace('"FOLDER"', repr(str(folder))).replace("200", "8"), names)
    capfd.readouterr()
    return names


@pytest.mark.parametrize("trainer", ["sft", "pretrain"])
def test_of_a_model(run: Run, here: Path, trainer: str, capfd: pytest.CaptureFixture[str]) -> None:
    data = "chat.jsonl" if trainer == "sft" else "texts.jsonl"
    outcome = run(trainer, **FLAT, dataset=here / data, output_dir="out", final_weights="best")
    assert outcome.code == 0, outcome.output
    values, table, code = card(here / "out" / "final")
    assert values == {"library_name": "transformers", "tags": ["lacuna", trainer]}
    best = re.search(r"final weights: out/checkpoints/step-0*(\d)", outcome.output)
    assert best is not None
    assert table["weights"] == f"of step {best[1]} of 4"
    state = json.loads((here / "out" / "checkpoints" / f"step-{int(best[1]):08d}" / "state.json").read_bytes())
    assert table["validation loss"].endswith(f"{state['validation_loss']:.4f} with these weights")
    assert table["validation data"] == "0.25 of it, by split_seed 42"
    assert re.fullmatch(rf"1 file: `{data}` [0-9a-f]{{12}}", table["training data"])
    assert re.fullmatch(r"`model`: `config.json` \w{12}, `model.safetensors` \w{12}", table["base model"])
    text = (here / "out" / "final" / "README.md").read_text()
    assert f'dataset = "~/{data}"' in text
    assert str(here) not in text
    assert spoken(code, here / "out" / "final", capfd)["model"].num_parameters() > 0


def test_of_an_adapter_and_of_what_it_is_merged_into(run: Run, here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Through PEFT's own class an answer stops where a turn ends, by the call that the card shows."""
    settings = {
        "model": {"path": "model"}, "dataset": {"path": "chat.jsonl", "validation_share": 0}, "device": "cpu",
        "training": {"max_steps": 2, "sequence_length": 96, "output_dir": "out"},
    }  # fmt: skip
    Path("config.yaml").write_text(json.dumps(settings))
    assert run("finetune", config="config.yaml").code == 0
    values, table, code = card(here / "out" / "final")
    assert values == {"library_name": "peft", "tags": ["lacuna", "finetune"]}
    assert "validation data" not in table
    assert "validation loss" not in table
    names = spoken(code, here / "out" / "final", capfd)
    end = names["tokenizer"].convert_tokens_to_ids("<|im_end|>")
    assert end in names["model"].generation_config.eos_token_id
    assert run("lacuna", "merge", "out", output="merged").code == 0
    values, table, code = card(here / "merged")
    assert (values["tags"], table["adapter"]) == (["lacuna", "merged"], "`out/final`")
    assert "its logits differ from base plus adapter by" in table["proof"]
    assert end in spoken(code, here / "merged", capfd)["model"].generation_config.eos_token_id
