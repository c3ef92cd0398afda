"""The card of final weights: README.md, as model hubs show it. Nothing here imports torch."""

import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lacuna.config.yaml_format import dump_yaml
from lacuna.errors import RunError
from lacuna.files import without_home
from lacuna.runs.folder import starts_of
from lacuna.runs.identity import FIRST_PREPARATION
from lacuna.runs.metrics import validation_losses
from lacuna.visible import visible

LOAD_ADAPTER = """\
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer, GenerationConfig

folder = "FOLDER"
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoPeftModelForCausalLM.from_pretrained(folder)
model.generation_config = GenerationConfig.from_pretrained(folder)  # the base's own may not stop where a turn ends
"""
LOAD_MODEL = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "FOLDER"
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder)
"""
ASK = """\

messages = [{"role": "user", "content": "Hello"}]
prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
answer = model.generate(**prompt, max_new_tokens=200)
print(tokenizer.decode(answer[0][prompt["input_ids"].shape[1] :], skip_special_tokens=True))
"""
CONTINUE = """\

prompt = tokenizer("Once", return_tensors="pt")
print(tokenizer.decode(model.generate(**prompt, max_new_tokens=200)[0]))
"""


def card_of(folder: Path, step: int) -> str:
    """Of the weights that a run has at a step: what they are, what they were made of, and how they are loaded.

    folder: of the run, in which config.toml, provenance.json and metrics.jsonl are there already. Raises RunError where
    nothing says any more how it was started.
    """
    config = without_home((folder / "config.toml").read_text())
    starts = starts_of(folder)
    if not starts:
        raise RunError(f"{folder / 'provenance.json'}: was taken away while the run went on; start it again")
    start = starts[-1]
    is_adapter = start["trainer"] == "finetune"
    facts = {
        "made by": f"lacuna {start['packages'].get('lacuna')}, `{start['trainer']}`",
        "base model": _base(start),
        "training data": _files(start, "training"),
        "validation data": _files(start, "validation") or _share(tomllib.loads(config), start),
        "weights": f"of step {step:,} of {start['total_steps']:,}",
        "validation loss": _losses(validation_losses(folder), step),
        "seed": str(start["seed"]),
    }
    kind = "An adapter" if is_adapter else "A model"
    has_template = start.get("chat_template_sha256") is not None
    return "\n".join(
        [
            *_head(start["model"], "peft" if is_adapter else "transformers", start["trainer"]),
            f"# {visible(folder.resolve().name)}",
            "",
            f"{kind} that was trained from `{_cell(start['model'])}`.",
            "",
            *_table({name: value for name, value in facts.items() if value}),
            "",
            *_usage(LOAD_ADAPTER if is_adapter else LOAD_MODEL, has_template and start["trainer"] != "pretrain"),
            "",
            "## Settings",
            "",
            "```toml",
            visible(config).strip(),
            "```",
            "",
        ]
    )


def merged_card(adapter: Path, base: str, proof: str, has_template: bool) -> str:
    """Of an adapter merged into its base. proof: what was compared."""
    facts = {"base model": f"`{_cell(base)}`", "adapter": f"`{_cell(str(adapter))}`", "proof": _cell(proof)}
    return "\n".join(
        [
            *_head(base, "transformers", "merged"),
            f"# {visible(adapter.resolve().parent.name)}, merged",
            "",
            *_table(facts),
            "",
            *_usage(LOAD_MODEL, has_template),
            "",
        ]
    )


def _head(base: str, library: str, tag: str) -> list[str]:
    """What a hub reads. A folder of this machine is no model that it knows."""
    values: dict[str, Any] = {"library_name": library, "tags": ["lacuna", tag]}
    if not Path(base).exists() and base.count("/") == 1:
        values["base_model"] = base
    return ["---", dump_yaml(values).strip(), "---", ""]


def _table(facts: Mapping[str, str]) -> list[str]:
    return ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in facts.items())]


def _usage(load: str, is_chat: bool) -> list[str]:
    return ["## Use", "", "FOLDER: where this file is.", "", "```python", f"{load}{ASK if is_chat else CONTINUE}```"]


def _base(start: Mapping[str, Any]) -> str:
    if start.get("initialise") == "random":
        return f"the shape of `{_cell(start['model'])}`, with random weights"
    if start.get("model_commit"):
        return f"`{_cell(start['model'])}`, commit {start['model_commit']}"
    return f"`{_cell(start['model'])}`{_hashes(start.get('model_files') or [])}"


def _files(start: Mapping[str, Any], use: str) -> str:
    entries = [entry for entry in start["data_files"] if entry["use"] == use]
    if not entries:
        return ""
    if "hub" in entries[0]:
        named = (f"`{_cell(entry['hub'])}` ({entry['split']}), commit {entry['commit']}" for entry in entries)
        return ", ".join(named)
    return f"{len(entries):,} file{'s' * (len(entries) > 1)}{_hashes(entries)}"


def _share(config: Mapping[str, Any], start: Mapping[str, Any]) -> str:
    """What is held out of the training data. An older version of lacuna drew it by the seed."""
    settings = config.get("dataset", config) if start["trainer"] == "finetune" else config
    share, is_older = settings.get("validation_share"), start["data_preparation"] == FIRST_PREPARATION
    if not share:
        return ""
    return f"{share:.3g} of it, by " + ("seed" if is_older else f"split_seed {settings['split_seed']}")


def _hashes(entries: Sequence[Mapping[str, Any]], shown: int = 5) -> str:
    """: name and the beginning of its SHA-256, of the first few."""
    named = [f"`{_cell(Path(entry['path']).name)}` {str(entry['sha256'] or '')[:12]}".strip() for entry in entries]
    more = f" and {len(named) - shown:,} more" if len(named) > shown else ""
    return f": {', '.join(named[:shown])}{more}" if named else ""


def _losses(losses: Mapping[int, float], step: int) -> str:
    if step not in losses:
        return ""
    before = f"{losses[0]:.4f} before the first step, " if 0 in losses and step else ""
    return f"{before}{losses[step]:.4f} with these weights"


def _cell(text: str) -> str:
    return visible(text).replace("|", "/").replace("`", "'")
