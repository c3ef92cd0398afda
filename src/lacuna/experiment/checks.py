"""What can be wrong with a run's config and needs no trainer to see: values, paths, data. Nothing is imported.

A problem is one line that a user can act on: run, path, what, what to do.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from lacuna.config.finetune import IN_SFT, FinetuneConfig
from lacuna.config.names import parameters, value_problem
from lacuna.config.trees import MISSING, get, leaves
from lacuna.data.formats import find_files, peek, read_file
from lacuna.data.schemas import detect_schema
from lacuna.errors import DataError, MissingExtraError, Problem
from lacuna.torchtune.dataset import check_dataset
from lacuna.torchtune.templates import loses_line_breaks

FILES = ("path", "merges_file", "vocab_path", "merges_path", "special_tokens_path")
"""Arguments of torchtune's tokenizers that name a file."""
PLACES = (*FILES, "output_dir", "log_dir", "checkpoint_dir", "data_files")


def check_run(trainer: str, run: str, values: Mapping[str, Any], gpus: int) -> Iterator[Problem]:
    """Everything that is wrong with one run's config as far as it shows without the trainer."""
    for name, parameter in parameters(trainer).items():
        for path in parameter.paths:
            value = get(values, path)
            if value is not MISSING and (wrong := value_problem(trainer, path, value)):
                yield Problem(run, path, f"is {wrong}", f"{name} takes another kind of value: correct it")
    found = _torchtune(values, gpus) if trainer == "torchtune" else _our_data(*_flat(trainer, values))
    yield from (replace(problem, run=run) for problem in found)


SPLITS = {"dataset_split": "train", "validation_split": "validation"}


def _flat(trainer: str, values: Mapping[str, Any]) -> tuple[Mapping[str, Any], Mapping[str, str]]:
    """A config's values under the names of our own loop, and where the config has them."""
    if trainer != "finetune":
        return values, {}
    return FinetuneConfig.model_validate(values).as_sft().model_dump(), IN_SFT


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


def _torchtune(values: Mapping[str, Any], gpus: int) -> Iterator[Problem]:
    if isinstance(dtype := values.get("dtype"), str) and dtype not in ("bf16", "fp16", "fp32"):
        yield Problem("", "dtype", f"is {dtype!r}, which torchtune does not know", "write bf16 or fp32", "start")
    for section, node in values.items():
        if isinstance(node, dict) and section.endswith("checkpointer"):
            yield from _checkpointer(values, section, node)
        elif isinstance(node, dict) and section == "tokenizer":
            for name in FILES:
                if isinstance(file := _resolved(values, node.get(name)), str) and not Path(file).is_file():
                    what = f"there is no file {file}"
                    yield Problem("", f"tokenizer.{name}", what, "download it, or correct the path", "here")
    data = values.get("dataset")
    for index, part in enumerate(data if isinstance(data, list) else [data]):
        place = f"dataset.{index}" if isinstance(data, list) else "dataset"
        looked_up = {key: _resolved(values, value) for key, value in part.items()} if isinstance(part, dict) else {}
        for below, what, todo, kind in check_dataset(values, looked_up, gpus):
            path = below[1:] if below.startswith("/") else f"{place}.{below}"
            yield Problem("", path, what, todo, kind)
    if loses_line_breaks(values):
        what = (
            "has line breaks or spaces next to the text, which torchtune's Llama 3 tokenizer strips: no model sees them"
        )
        todo = "leave them out, or write them into the data"
        yield Problem("", "tokenizer.prompt_template", what, todo, "unsure")
    for path, value in leaves(values):
        is_place = path.rpartition(".")[2] in PLACES and isinstance(value, str)
        if is_place and (value.startswith("~") or re.search(r"\$\w", value)):
            what = "begins with ~ or holds $NAME, which torchtune takes as it stands"
            yield Problem("", path, what, "write the whole path, or ${oc.env:NAME} for a variable")
    output = _resolved(values, values.get("output_dir"))
    if values.get("resume_from_checkpoint") is True and isinstance(output, str) and not _holds_something(output):
        what = f"there is nothing to resume in {output}, the folder of this run"
        yield Problem("", "resume_from_checkpoint", what, "set it to false", "here")


def _holds_something(folder: str) -> bool:
    return Path(folder).is_dir() and any(Path(folder).iterdir())


def _resolved(values: Mapping[str, Any], value: Any) -> Any:
    """The value with `${a.b}` looked up. What has other interpolations stays for OmegaConf: None."""
    for _ in range(8):
        if not isinstance(value, str) or "${" not in value:
            return value
        names = re.findall(r"\$\{([\w.]+)\}", value)
        if not names or any(isinstance(found := get(values, name), dict | list) or found is MISSING for name in names):
            return None
        value = re.sub(r"\$\{([\w.]+)\}", lambda found: str(get(values, found[1])), value)
    return None


def _checkpointer(values: Mapping[str, Any], section: str, node: Mapping[str, Any]) -> Iterator[Problem]:
    files = node.get("checkpoint_files")
    if isinstance(files, dict) and not {"filename_format", "max_filename"} <= set(files):
        what = f"is {files}, and needs filename_format and max_filename"
        yield Problem("", f"{section}.checkpoint_files", what, "give both, or a list of files", "start")
    folder = _resolved(values, node.get("checkpoint_dir"))
    output = _resolved(values, node.get("output_dir"))
    if not isinstance(folder, str):
        return
    if isinstance(output, str):
        inner, outer = Path(output).resolve(), Path(folder).resolve()
        if inner == outer or outer in inner.parents:
            yield Problem(
                "", f"{section}.output_dir", f"{output} is inside checkpoint_dir {folder}, which torchtune refuses",
                "choose an output_dir elsewhere", "start",
            )  # fmt: skip
    if not Path(folder).is_dir():
        what = f"there is no folder {folder}"
        yield Problem("", f"{section}.checkpoint_dir", what, "download the model there, or correct the path", "here")
        return
    for name in files if isinstance(files, list) else []:
        if isinstance(name, str) and not Path(folder, name).is_file():
            what = f"there is no file {Path(folder, name)}"
            yield Problem("", f"{section}.checkpoint_files", what, "correct the names or the folder", "here")
