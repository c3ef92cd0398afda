"""What can be wrong with a config of torchtune's and needs no torchtune to see."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lacuna.config.trees import MISSING, get, leaves
from lacuna.errors import Problem
from lacuna.torchtune.dataset import check_dataset
from lacuna.torchtune.templates import loses_line_breaks

DTYPES = ("bf16", "fp16", "fp32")
FILES = ("path", "merges_file", "vocab_path", "merges_path", "special_tokens_path")
"""Arguments of torchtune's tokenizers that name a file."""
PLACES = (*FILES, "output_dir", "log_dir", "checkpoint_dir", "data_files")


def check_values(values: Mapping[str, Any], gpus: int) -> Iterator[Problem]:
    """Values, paths and data, without the run's name. gpus: that the run has."""
    yield from _dtype(values)
    for section, node in values.items():
        if isinstance(node, dict) and section.endswith("checkpointer"):
            yield from _checkpointer(values, section, node)
        elif isinstance(node, dict) and section == "tokenizer":
            yield from _tokenizer(values, node)
    yield from _data(values, gpus)
    yield from _template(values)
    yield from _places(values)
    yield from _resume(values)


def _dtype(values: Mapping[str, Any]) -> Iterator[Problem]:
    dtype = values.get("dtype")
    if isinstance(dtype, str) and dtype not in DTYPES:
        yield Problem("", "dtype", f"is {dtype!r}, which torchtune does not know", "write bf16 or fp32", "start")


def _tokenizer(values: Mapping[str, Any], node: Mapping[str, Any]) -> Iterator[Problem]:
    for name in FILES:
        file = _resolved(values, node.get(name))
        if isinstance(file, str) and not Path(file).is_file():
            what = f"there is no file {file}"
            yield Problem("", f"tokenizer.{name}", what, "download it, or correct the path", "here")


def _data(values: Mapping[str, Any], gpus: int) -> Iterator[Problem]:
    """Of the data set, or of each part of several."""
    data = values.get("dataset")
    parts = {"dataset": data}
    if isinstance(data, list):
        parts = {f"dataset.{index}": part for index, part in enumerate(data)}
    for place, part in parts.items():
        looked_up: dict[str, Any] = {}
        if isinstance(part, dict):
            looked_up = {key: _resolved(values, value) for key, value in part.items()}
        for below, what, todo, kind in check_dataset(values, looked_up, gpus):
            path = below[1:] if below.startswith("/") else f"{place}.{below}"
            yield Problem("", path, what, todo, kind)


def _template(values: Mapping[str, Any]) -> Iterator[Problem]:
    if loses_line_breaks(values):
        what = (
            "has line breaks or spaces next to the text, which torchtune's Llama 3 tokenizer strips: no model sees them"
        )
        todo = "leave them out, or write them into the data"
        yield Problem("", "tokenizer.prompt_template", what, todo, "unsure")


def _places(values: Mapping[str, Any]) -> Iterator[Problem]:
    """Paths that a shell would complete."""
    for path, value in leaves(values):
        if path.rpartition(".")[2] not in PLACES or not isinstance(value, str):
            continue
        if value.startswith("~") or re.search(r"\$\w", value):
            what = "begins with ~ or holds $NAME, which torchtune takes as it stands"
            yield Problem("", path, what, "write the whole path, or ${oc.env:NAME} for a variable")


def _resume(values: Mapping[str, Any]) -> Iterator[Problem]:
    output = _resolved(values, values.get("output_dir"))
    if values.get("resume_from_checkpoint") is not True or not isinstance(output, str):
        return
    if not _holds_something(output):
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
