"""What can be wrong with a run's config and needs no trainer to see: values, paths, data. Nothing is imported.

A problem is one line that a user can act on: run, path, what, what to do.
"""

import csv
import itertools
import json
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from lacuna.config.files import did_you_mean
from lacuna.data.formats import Broken, find_files, peek, read_file
from lacuna.data.schemas import detect_schema
from lacuna.errors import DataError, LacunaError, MissingExtraError
from lacuna.experiment.merge import MISSING, get, leaves
from lacuna.experiment.parameters import parameters, value_problem

FILES = ("path", "merges_file", "vocab_path", "merges_path", "special_tokens_path")
"""Arguments of torchtune's tokenizers that name a file."""
PLACES = (*FILES, "output_dir", "log_dir", "checkpoint_dir", "data_files")
SOURCES = ("json", "csv", "parquet", "text")
TURNS = {"openai": "role", "sharegpt": "from"}
"""What a turn of a conversation has in each of torchtune's styles."""
SMALL = 2**24
"""Bytes of data that are counted to the end, to know how many packed rows they can fill at most."""
TEMPLATE = 64
"""Tokens that a prompt template and a tokenizer may add to a row, at most; a token is at least a byte."""
LARGEST_JSON = 512 * 2**20
"""Bytes; a larger .json file is not read before the run."""


@dataclass(frozen=True)
class Problem:
    """is_local: about this machine's files, which may be right on another one."""

    run: str
    path: str
    what: str
    todo: str
    is_local: bool = False


def check_run(trainer: str, run: str, values: Mapping[str, Any], gpus: int) -> Iterator[Problem]:
    """Everything that is wrong with one run's config as far as it shows without the trainer."""
    for name, parameter in parameters(trainer).items():
        for path in parameter.paths:
            value = get(values, path)
            if value is not MISSING and (wrong := value_problem(trainer, path, value)):
                yield Problem(run, path, f"is {wrong}", f"{name} takes another kind of value: correct it")
    found = _torchtune(values, gpus) if trainer == "torchtune" else _our_data(values)
    yield from (replace(problem, run=run) for problem in found)


def _our_data(values: Mapping[str, Any]) -> Iterator[Problem]:
    """Files that are not there, and first rows that fit no schema."""
    for name in ("dataset", "validation_dataset"):
        try:
            files = find_files(values[name]) if isinstance(values.get(name), str) else None
        except DataError as error:
            yield Problem("", name, str(error), "correct the path", is_local=True)
            continue
        try:
            first, _ = peek(row for file in files or () for row in read_file(file))
            if first:
                wanted, column = values.get("dataset_schema", "text"), values.get("text_column", "text")
                detect_schema(first, wanted, column, values[name])
        except MissingExtraError:
            continue
        except DataError as error:
            yield Problem("", name, str(error), "correct the file, or dataset_schema")
    template = values.get("chat_template")
    if isinstance(template, str) and not Path(template).is_file():
        yield Problem("", "chat_template", f"there is no file {template}", "correct the path", is_local=True)


def _torchtune(values: Mapping[str, Any], gpus: int) -> Iterator[Problem]:
    if isinstance(dtype := values.get("dtype"), str) and dtype not in ("bf16", "fp16", "fp32"):
        yield Problem("", "dtype", f"is {dtype!r}, which torchtune does not know", "write bf16 or fp32")
    for section, node in values.items():
        if isinstance(node, dict) and section.endswith("checkpointer"):
            yield from _checkpointer(values, section, node)
        elif isinstance(node, dict) and section == "tokenizer":
            for name in FILES:
                if isinstance(file := _resolved(values, node.get(name)), str) and not Path(file).is_file():
                    yield Problem(
                        "", f"tokenizer.{name}", f"there is no file {file}", "download it, or correct it", True
                    )
    data = values.get("dataset")
    for index, part in enumerate(data if isinstance(data, list) else [data]):
        place = f"dataset.{index}" if isinstance(data, list) else "dataset"
        found = _dataset(values, part, gpus) if isinstance(part, dict) else ()
        yield from (replace(problem, path=problem.path.replace("dataset", place, 1)) for problem in found)
    for path, value in leaves(values):
        is_place = path.rpartition(".")[2] in PLACES and isinstance(value, str)
        if is_place and (value.startswith("~") or re.search(r"\$\w", value)):
            what = "begins with ~ or holds $NAME, which torchtune takes as it stands"
            yield Problem("", path, what, "write the whole path, or ${oc.env:NAME} for a variable")
    output = _resolved(values, values.get("output_dir"))
    if values.get("resume_from_checkpoint") is True and isinstance(output, str) and not _holds_something(output):
        what = f"there is nothing to resume in {output}, the folder of this run"
        yield Problem("", "resume_from_checkpoint", what, "set it to false", True)


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
        yield Problem("", f"{section}.checkpoint_files", what, "give both, or a list of files")
    folder = _resolved(values, node.get("checkpoint_dir"))
    output = _resolved(values, node.get("output_dir"))
    if not isinstance(folder, str):
        return
    if isinstance(output, str):
        inner, outer = Path(output).resolve(), Path(folder).resolve()
        if inner == outer or outer in inner.parents:
            yield Problem(
                "", f"{section}.output_dir", f"{output} is inside checkpoint_dir {folder}, which torchtune refuses",
                "choose an output_dir elsewhere",
            )  # fmt: skip
    if not Path(folder).is_dir():
        yield Problem("", f"{section}.checkpoint_dir", f"there is no folder {folder}", "download the model there", True)
        return
    for name in files if isinstance(files, list) else []:
        if isinstance(name, str) and not Path(folder, name).is_file():
            what = f"there is no file {Path(folder, name)}"
            yield Problem("", f"{section}.checkpoint_files", what, "correct the names or the folder", True)


def _dataset(values: Mapping[str, Any], data: Mapping[str, Any], gpus: int) -> Iterator[Problem]:
    component = str(data.get("_component_", "")).rpartition(".")[2]
    source, files, split = (_resolved(values, data.get(name)) for name in ("source", "data_files", "split"))
    columns = data.get("column_map")
    absent = [name for name in ("input", "output") if isinstance(columns, dict) and name not in columns]
    if component == "instruct_dataset" and absent:
        what = f"lacks {' and '.join(absent)}, which torchtune wants even where the name is the same"
        yield Problem("", "dataset.column_map", what, f"add {', '.join(f'{name}: {name}' for name in absent)}")
        return
    if component == "chat_dataset" and data.get("conversation_style") not in ("openai", "sharegpt", None):
        what = f"is {data['conversation_style']!r}"
        yield Problem("", "dataset.conversation_style", what, "write openai (messages) or sharegpt (conversations)")
    if isinstance(source, str) and Path(source).is_file():
        kind = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}.get(
            Path(source).suffix, "text"
        )
        yield Problem("", "dataset.source", f"{source} is a file", f"write source: {kind} and data_files: {source}")
    if files is None or not isinstance(files, str | list | dict):
        return
    if isinstance(source, str) and Path(source).is_dir():
        return
    if source not in SOURCES:
        default = "the component's own hub data set" if source is None else repr(source)
        what = f"names files, but the source is {default}"
        yield Problem("", "dataset.data_files", what, "add source: json (or csv, parquet, text) beside it")
        return
    if isinstance(split, str) and not isinstance(files, dict) and not split.startswith("train"):
        what = f"is {split!r}, but files without a name are all 'train'"
        yield Problem("", "dataset.split", what, f"write train, or data_files: {{{split}: …}}")
    listed = [files] if isinstance(files, str) else files if isinstance(files, list) else list(files.values())
    yield from _rows(values, data, component, str(source), [file for file in listed if isinstance(file, str)], gpus)


def _rows(
    values: Mapping[str, Any], data: Mapping[str, Any], component: str, source: str, files: list[str], gpus: int
) -> Iterator[Problem]:
    if not isinstance(data.get("field"), str | None):
        yield Problem("", "dataset.field", f"is {data['field']!r}", "write the name of the list in the file")
        return
    local = [file for file in files if "://" not in file and not any(mark in file for mark in "*?[")]
    absent = [file for file in local if not Path(file).exists()]
    for file in absent:
        yield Problem("", "dataset.data_files", f"there is no file {file}", "correct the path", True)
    if absent or local != files or source not in SOURCES:
        return
    batch, accumulation = values.get("batch_size"), values.get("gradient_accumulation_steps", 1)
    sizes = [batch, accumulation] if type(batch) is int and type(accumulation) is int else [1, 1]
    needed = max(1, sizes[0] * sizes[1] * gpus)
    part = re.fullmatch(r"train(?:\[(\d*):(\d*)(%?)\])?", str(data.get("split", "train")))
    is_packed = data.get("packed") is True and isinstance(length := get(values, "tokenizer.max_seq_len"), int)
    size = sum(Path(file).stat().st_size for file in local)
    limit = sys.maxsize if (part and part[0] != "train") or (is_packed and size < SMALL) else needed
    count = 0
    for file in local:
        stat = Path(file).stat()
        rows, problem = sample_rows(file, source, data.get("field"), limit - count, (stat.st_mtime_ns, stat.st_size))
        if rows is None:
            return
        if problem is not None:
            path, what, todo = problem
            yield Problem("", f"dataset.{path}", what, todo)
            return
        count += len(rows)
        if rows and not isinstance(rows[0], dict):
            yield Problem("", "dataset.data_files", f"{file} holds {rows[0]!r} where a row should be", "write objects")
            return
        if rows and (unknown := [name for name in needed_columns(component, data) if name not in rows[0]]):
            what = f"{file} has no column {unknown[0]!r}; it has {', '.join(map(repr, rows[0]))}"
            what += did_you_mean(unknown[0], [*map(str, rows[0])])
            setting = {"chat_dataset": "conversation_column", "text_completion_dataset": "column"}
            yield Problem(
                "", "dataset.data_files", what, f"set {setting.get(component, 'column_map')}, or another dataset"
            )
            return
        style = str(data.get("conversation_style"))
        turns = rows[0].get(data.get("conversation_column")) if rows and style in TURNS else None
        if turns and not (isinstance(turns[0], dict) and TURNS[style] in turns[0]):
            what = f"is {style}, but the turns of {file} have no {TURNS[style]!r}"
            yield Problem(
                "", "dataset.conversation_style", what, "write openai (role, content) or sharegpt (from, value)"
            )
            return
        if count >= limit:
            return
    if is_packed and size < SMALL and source != "parquet":
        count = min(count, 2 * (size + TEMPLATE * count) // length + 1)
    if part is None or isinstance(data.get("data_files"), dict) or (data.get("split_across_pack") and count):
        return
    unit = count / 100 if part[3] else 1
    count = max(0, min(count, int(int(part[2] or sys.maxsize) * unit)) - int(int(part[1] or 0) * unit))
    if count < needed:
        found = f"{count} rows" if count else f"0 rows of {', '.join(local)}"
        step = f"{sizes[0]} × {sizes[1]} accumulated" + (f" × {gpus} devices" if gpus > 1 else "")
        what = f"{found} are fewer than one step of {step}: no step at all"
        yield Problem("", "batch_size", what, "lower batch_size or gradient_accumulation_steps")


def needed_columns(component: str, data: Mapping[str, Any]) -> list[str]:
    """The columns that a dataset component of torchtune reads."""
    columns = data.get("column_map") or {}
    if component in ("chat_dataset", "text_completion_dataset"):
        name = data.get("conversation_column") if component == "chat_dataset" else data.get("column", "text")
        return [name] if isinstance(name, str) else []
    wanted = {
        "instruct_dataset": ("input", "output"),
        "alpaca_dataset": ("instruction", "output"),
        "alpaca_cleaned_dataset": ("instruction", "output"),
        "preference_dataset": ("chosen", "rejected"),
    }.get(component, ())
    return [str(columns.get(name, name)) for name in wanted] if isinstance(columns, dict) else []


@cache
def sample_rows(
    file: str, source: str, field: str | None, limit: int, version: tuple[int, int]
) -> tuple[list[Any] | None, tuple[str, str, str] | None]:
    """The first rows as datasets.load_dataset would read them, or path, what and what to do; None: not looked at.

    version: tells a file that has changed from the one that was read before.
    """
    if field is not None and source != "json":
        return [], ("field", f"{source} files have none", "leave field out")
    try:
        if source == "csv":
            with open(file, encoding="utf-8-sig", newline="") as lines:
                return list(itertools.islice(csv.DictReader(lines), limit)), None
        if source == "text":
            with open(file, encoding="utf-8") as lines:
                return [{"text": line} for line in itertools.islice(lines, limit)], None
        if source == "parquet":
            with open(file, "rb") as start:
                if start.read(4) != b"PAR1":
                    return [], ("data_files", f"{file} is not readable parquet", "correct `source`")
            if Path(file).suffix != ".parquet":
                return None, None
            rows = itertools.islice(read_file(Path(file)), limit)
            return [row.values for row in rows if not isinstance(row, Broken)], None
        return _json_rows(file, field, limit)
    except (OSError, ValueError, csv.Error, LacunaError) as error:
        return [], ("data_files", f"{file} is not readable {source}: {error}", "correct the file, or `source`")


def _json_rows(file: str, field: str | None, limit: int) -> tuple[list[Any] | None, tuple[str, str, str] | None]:
    with open(file, encoding="utf-8-sig") as text:
        first = next((line for line in text if line.strip()), "")
        lines = itertools.chain([first], text)
        is_list = first.lstrip().startswith("[")
        if not first:
            return [], None
        if field is None and not is_list:
            try:
                json.loads(first)
            except ValueError:
                if not first.lstrip().startswith("{"):
                    return [], ("data_files", f"{file} is no JSON: it begins with {first[:30]!r}", "correct `source`")
                what = f"{file} is one object over several lines, no rows"
                return [], ("data_files", what, "name the list in it, as field: train")
            return [json.loads(line) for line in itertools.islice(filter(str.strip, lines), limit)], None
        if Path(file).stat().st_size > LARGEST_JSON:
            return None, None
        whole = json.loads(first + text.read())
    if field is None:
        return whole[:limit], None
    if not isinstance(whole, dict):
        return [], ("field", f"is {field!r}, but {file} is a plain list of rows", "delete field")
    if not isinstance(whole.get(field), list):
        return [], ("field", f"{file} has no list {field!r}; it has {', '.join(map(repr, whole))}", "correct field")
    return whole[field][:limit], None
