"""A tiny Llama with tokenizer and data as torchtune reads them, configs for it, and configs with a fault each."""

import base64
import json
import os
import random
import re
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from lacuna.config.files import read_layer
from lacuna.config.trees import MISSING, get, merge, nested, without
from lacuna.config.yaml_format import dump_yaml
from lacuna.errors import Problem
from lacuna.experiment.checks import check_run
from lacuna.torchtune import environment as torchtune
from lacuna.torchtune.recipe import check_recipe

ROOT = Path(__file__).parent.parent
TORCHTUNE_PYTHON = str(ROOT / ".venv-torchtune" / "bin" / "python")
SPECIAL_TOKENS = (
    "begin_of_text", "end_of_text", "reserved_special_token_0", "reserved_special_token_1", "finetune_right_pad_id",
    "step_id", "start_header_id", "end_header_id", "eom_id", "eot_id", "python_tag", "image", "video",
)  # fmt: skip
SHAPE = {
    "vocab_size": 272, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "embed_dim": 64, "max_seq_len": 512,
    "intermediate_dim": 128,
}  # fmt: skip
DELETE = "<deleted>"
Changes = dict[str, Any]
"""Dotted path to new value, or DELETE."""


def make_llama(folder: Path) -> Path:
    """Random weights of 91,456 parameters under Hugging Face's names, with a tokenizer of bytes."""
    folder.mkdir()
    tokens = "".join(f"{base64.b64encode(bytes([byte])).decode()} {byte}\n" for byte in range(256))
    (folder / "tokenizer.model").write_text(tokens)
    added = [{"content": f"<|{name}|>", "id": 256 + index} for index, name in enumerate(SPECIAL_TOKENS)]
    (folder / "special_tokens.json").write_text(json.dumps({"added_tokens": added}))
    sizes = {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 272, "tie_word_embeddings": True,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **sizes}))
    generator = torch.Generator().manual_seed(0)
    weights = {"model.embed_tokens.weight": (272, 64), "model.norm.weight": (64,)}
    for layer in range(2):
        rows = {"self_attn.q": (64, 64), "self_attn.k": (32, 64), "self_attn.v": (32, 64), "self_attn.o": (64, 64)}
        rows |= {"mlp.gate": (128, 64), "mlp.up": (128, 64), "mlp.down": (64, 128)}
        weights |= {f"model.layers.{layer}.{name}_proj.weight": shape for name, shape in rows.items()}
        for norm in ("input", "post_attention"):
            weights[f"model.layers.{layer}.{norm}_layernorm.weight"] = (64,)
    tensors = {
        name: torch.randn(shape, generator=generator) * 0.05 if len(shape) == 2 else torch.ones(shape)
        for name, shape in weights.items()
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def write_rows(path: Path, rows: int = 64) -> Path:
    """`input`, `output` as jsonl: a word and the same in capitals."""
    chosen = random.Random(0).choices(["alpha", "bravo", "charlie", "delta", "echo"], k=rows)
    path.write_text("".join(json.dumps({"input": f"Shout: {word}", "output": word.upper()}) + "\n" for word in chosen))
    return path


def tiny_controls(model: Path, data: Path, builder: str) -> dict[str, Any]:
    """What makes a shipped Llama config one for the tiny model on a CPU: 8 steps of 4 rows, the first a warmup."""
    tokenizer = {"path": str(model / "tokenizer.model"), "special_tokens_path": str(model / "special_tokens.json")}
    lora = {"lora_rank": 4, "lora_alpha": 8, "num_warmup_steps": 1} if "lora" in builder else {}
    return {
        **lora,
        "model": {"_component_": f"torchtune.models.llama3_2.{builder}", **SHAPE},
        "tokenizer": {**tokenizer, "max_seq_len": 64},
        "checkpoint_dir": str(model),
        "dataset": {
            "_component_": "torchtune.datasets.instruct_dataset",
            "source": "json",
            "data_files": str(data),
            "split": "train",
        },
        "batch_size": 4,
        "gradient_accumulation_steps": 1,
        "max_steps_per_epoch": 8,
        "seed": 1,
        "device": "cpu",
        "dtype": "fp32",
        "enable_activation_checkpointing": False,
        "log_peak_memory_stats": False,
    }


GLOO = """
import os, runpy, sys, torch.distributed as dist, torchtune, torchtune.training as training
start = dist.init_process_group
dist.init_process_group = lambda *arguments, **settings: start("gloo")
training.get_memory_stats = lambda *arguments, **settings: {}
training.log_memory_stats = lambda *arguments, **settings: None
training.cleanup_before_training = lambda: None
packages = os.path.dirname(os.path.dirname(torchtune.__file__))
runpy.run_path(os.path.join(packages, "recipes", "lora_finetune_distributed.py"), run_name="__main__")
"""
"""torchtune's distributed recipe asks for NCCL and a GPU's memory; here it runs on CPUs."""


def train(*commands: list[str], cwd: Path | None = None) -> None:
    """Run torchtune, all commands at once; every one must end well."""
    surroundings = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    pipe = subprocess.PIPE
    runs = [
        subprocess.Popen(command, stdout=pipe, stderr=subprocess.STDOUT, text=True, env=surroundings, cwd=cwd)
        for command in commands
    ]
    for run in runs:
        output = run.communicate(timeout=120)[0]
        assert run.returncode == 0, output


def losses(output_dir: str | None) -> list[float]:
    """By step, as torchtune's logger left them below a run's folder."""
    (log,) = Path(str(output_dir), "logs").glob("log_*.txt")
    return [float(loss) for loss in re.findall(r"loss:(\S+)", log.read_text())]


def find_problems(
    folder: Path, environment: torchtune.Environment, cases: list[tuple[str, Changes]]
) -> list[list[Problem]]:
    """For each case, a shipped config's name and changes: what the checks find in it as an own file, and where an
    experiment sets these paths (`run` is own, set). Missing files are left out, unless a change names them."""
    requests, found = [], []
    for index, (name, changes) in enumerate(cases):
        recipe = torchtune.find_recipe(environment, name, "")
        values = changed(read_layer(recipe.file).values, changes)
        file = folder / f"{index}.yaml"
        file.write_text(dump_yaml(values))
        for mode, touched in (("own", []), ("set", list(changes))):
            id = f"{index} {mode}"
            requests.append({"id": id, "file": str(file), "recipe": recipe.recipe, "touched": touched})
            found += [p for p in check_run("torchtune", id, values, 1) if p.kind != "here" or p.path in changes]
            facts = torchtune.facts_of(environment, recipe.recipe)
            found += [replace(p, run=id) for p in check_recipe(facts, values, touched, is_shipped=mode == "set")]
    found += torchtune.validate(environment, requests)
    by_case: list[list[Problem]] = [[] for _ in cases]
    for problem in found:
        index, mode = problem.run.split()
        by_case[int(index)].append(replace(problem, run=mode))
    return by_case


def changed(values: dict[str, Any], changes: Changes) -> dict[str, Any]:
    for path, value in changes.items():
        values = without(values, path) if get(values, path) is not MISSING else values
        values = values if value == DELETE else merge(values, nested(path, value))
    return values
