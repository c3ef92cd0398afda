"""The files of a model's weights as far as their first bytes tell. Nothing here imports torch."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lacuna.config.training import TrainingConfig
from lacuna.errors import ModelError

POINTER = b"version https://git-lfs"
"""How a file begins that stands for one that git-lfs has not fetched. # ref: https://git-lfs.com, pointer files"""
LONGEST_HEADER = 100_000_000
"""Bytes that safetensors allows. # ref: https://huggingface.co/docs/safetensors"""
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"


def check_weights(config: TrainingConfig) -> None:
    """Raise ModelError for what is wrong with the files in a model's folder, all of it."""
    folder = Path(config.model_name)
    if config.initialise == "pretrained" and (problems := list(weight_problems(folder))):
        raise ModelError(problems)


def check_vocabulary(config: TrainingConfig, model_config: Any, tokens: int) -> None:
    """Raise ModelError where the tokenizer has tokens that the model has no embedding for."""
    vocabulary = model_config.get_text_config().vocab_size
    if tokens > vocabulary:
        raise ModelError(
            f"{config.model_name}: the tokenizer has {tokens} tokens, the model only {vocabulary} embeddings"
        )


def weight_problems(folder: Path) -> Iterator[str]:
    """A sentence each: files that are pointers, cut off, or not there. Nothing for other kinds of files."""
    if (folder / INDEX).is_file():
        yield from _problems_of_shards(folder)
    elif (folder / SINGLE).is_file() and (problem := _problem_of(folder / SINGLE)) is not None:
        yield problem


def _problems_of_shards(folder: Path) -> Iterator[str]:
    try:
        weight_map: Mapping[str, str] = json.loads((folder / INDEX).read_bytes())["weight_map"]
        names = sorted(set(weight_map.values()))
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        yield f"{folder / INDEX}: no index of weights: {error}"
        return
    for name in names:
        file = folder / Path(name).name
        if not file.is_file():
            yield f"{file}: is not there, but {INDEX} names it: download it"
        elif (problem := _problem_of(file)) is not None:
            yield problem


def _problem_of(file: Path) -> str | None:
    """What is wrong with a safetensors file by its header; None where it has all the bytes that this promises."""
    size = file.stat().st_size
    with file.open("rb") as opened:
        beginning = opened.read(len(POINTER))
        if beginning == POINTER:
            return f"{file}: is a pointer of git-lfs, not the weights: git lfs pull, or hf download"
        length = int.from_bytes(beginning[:8], "little")
        if size < 8 or length > LONGEST_HEADER:
            return f"{file}: is no safetensors file"
        opened.seek(8)
        header = opened.read(length)
    try:
        tensors = json.loads(header)
        end = max((entry["data_offsets"][1] for name, entry in tensors.items() if name != "__metadata__"), default=0)
    except (ValueError, LookupError, TypeError, AttributeError):
        return f"{file}: its header cannot be read: is it cut off? Download it again"
    if size != 8 + length + end:
        return f"{file}: has {size:,} bytes instead of {8 + length + end:,}: download it again"
    return None
