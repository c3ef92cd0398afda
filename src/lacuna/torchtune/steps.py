"""Tokens, samples, rows and steps of torchtune runs, counted by torchtune's own tokenizers and data sets."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lacuna.config.trees import get
from lacuna.torchtune.environment import Environment, ask
from lacuna.torchtune.model import TorchtuneModel


@dataclass(frozen=True)
class Counts:
    """Of an epoch's data, and what a run makes of it."""

    samples: int
    rows: int
    """Of a batch: packs of samples, or samples."""
    tokens: int
    learned: int
    """Tokens that the loss is taken on."""
    longest: int
    """Tokens of the longest row."""
    truncated: int
    """Samples that max_seq_len cuts."""
    steps_per_epoch: int
    steps: int
    tokens_seen: int
    """Over the run; an average's where a step's rows do not divide the data."""


def torchtune_counts(environment: Environment, runs: Sequence[tuple[Mapping[str, Any], int]]) -> list[Counts | str]:
    """For each config, with its number of GPUs, the counts; or, as a sentence, why there are none.

    One process of torchtune's environment reads each different data set once, with torchtune's own tokenizer and data
    set. Raises ConfigError where that environment is broken.
    """
    asked: dict[str, int] = {}
    keys = []
    for config, _ in runs:
        parts = {name: config.get(name) for name in ("tokenizer", "dataset")}
        text = json.dumps(parts, default=str)
        keys.append(json.dumps(dict(config), default=str) if "${" in text else text)
        asked.setdefault(keys[-1], len(asked))
    answers = ask(environment, Path(__file__).with_name("inside_counts.py"), {"runs": [*map(json.loads, asked)]})
    found = (answers[asked[key]] for key in keys)
    return [
        data if isinstance(data, str) else _counts(data, config, gpus)
        for data, (config, gpus) in zip(found, runs, strict=True)
    ]


def _counts(data: Mapping[str, int], config: Mapping[str, Any], gpus: int) -> Counts | str:
    """By the recipes' rule: ranks share the rows evenly, what does not fill a batch or a step is left out."""
    names = ("batch_size", "gradient_accumulation_steps", "epochs")
    batch, accumulation, epochs = (config.get(name, 1) for name in names)
    if any(type(number) is not int or number < 1 for number in (batch, accumulation, epochs)):
        return f"{', '.join(names)} should be whole numbers above 0"
    steps = -(-data["rows"] // gpus) // batch // accumulation
    limit = config.get("max_steps_per_epoch")
    steps = steps if limit is None else min(steps, limit)
    seen = min(1, steps * batch * accumulation * gpus / data["rows"]) if data["rows"] else 0
    return Counts(
        **data, steps_per_epoch=steps, steps=epochs * steps, tokens_seen=round(epochs * seen * data["tokens"])
    )


def step_length(model: TorchtuneModel, config: Mapping[str, Any], counts: Counts | str) -> tuple[int, str]:
    """Tokens of the longest row that memory is planned for, and where that number is from."""
    limit = get(config, "tokenizer.max_seq_len")
    if not isinstance(counts, str):
        return counts.longest, "the longest row of the data"
    if type(limit) is int:
        return limit, "tokenizer.max_seq_len"
    return model.longest, "the model's longest sequence, as max_seq_len is null and the data are not counted"
