"""What can be wrong with a run's config and needs no trainer to see: values, paths, data. Nothing is imported.

A problem is one line that a user can act on: run, path, what, what to do.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from lacuna.config.files import check
from lacuna.config.finetune import FinetuneConfig
from lacuna.config.names import parameters, value_problem
from lacuna.config.trees import MISSING, get
from lacuna.data.find import find_files
from lacuna.data.formats import peek, read_file
from lacuna.data.schemas import detect_schema
from lacuna.errors import DataError, MissingExtraError, Problem
from lacuna.torchtune.checks import check_values


def check_run(trainer: str, run: str, values: Mapping[str, Any], gpus: int) -> Iterator[Problem]:
    """Everything that is wrong with one run's config as far as it shows without the trainer."""
    for name, parameter in parameters(trainer).items():
        for path in parameter.paths:
            value = get(values, path)
            if value is not MISSING and (wrong := value_problem(trainer, path, value)):
                yield Problem(run, path, f"is {wrong}", f"{name} takes another kind of value: correct it")
    found = check_values(values, gpus) if trainer == "torchtune" else _our_data(*_flat(trainer, values))
    yield from (replace(problem, run=run) for problem in found)


SPLITS = {"dataset_split": "train", "validation_split": "validation"}


def _flat(trainer: str, values: Mapping[str, Any]) -> tuple[Mapping[str, Any], Mapping[str, str]]:
    """A config's values under the names of our own loop, and where the config has them."""
    if trainer != "finetune":
        return values, {}
    return check(FinetuneConfig, values, {}).model_dump(), FinetuneConfig.spelling


def _our_data(values: Mapping[str, Any], places: Mapping[str, str]) -> Iterator[Problem]:
    """Files that are not there, and first rows that fit no schema."""
    kind = values.get("dataset_format", "auto")
    for name, split in (("dataset", "dataset_split"), ("validation_dataset", "validation_split")):
        place, wanted_split = places.get(name, name), values.get(split, SPLITS[split])
        try:
            files = find_files(values[name], kind, wanted_split) if isinstance(values.get(name), str) else None
        except DataError as error:
            yield Problem("", place, str(error), "correct the path", "here")
            continue
        try:
            first, _ = peek(row for file in files or () for row in read_file(file, kind))
            if first:
                wanted, column = values.get("dataset_schema", "text"), values.get("text_column", "text")
                detect_schema(first, wanted, column, values[name])
        except MissingExtraError:
            continue
        except DataError as error:
            schema = places.get("dataset_schema", "dataset_schema")
            yield Problem("", place, str(error), f"correct the file, or {schema}", "start")
    template = values.get("chat_template")
    if isinstance(template, str) and not Path(template).is_file():
        place = places.get("chat_template", "chat_template")
        yield Problem("", place, f"there is no file {template}", "correct the path", "here")
