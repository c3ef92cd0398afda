"""Whether torchtune's data set can be read, has the columns that its component reads, and is enough for one step."""

import csv
import itertools
import json
import re
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, Literal

from lacuna.config.trees import get
from lacuna.data.formats import Broken, read_file
from lacuna.errors import LacunaError
from lacuna.words import did_you_mean

KINDS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}
SOURCES = ("json", "csv", "parquet", "text")
TURNS = {"openai": "role", "sharegpt": "from"}
"""What a turn of a conversation has in each of torchtune's styles."""
SMALL = 2**24
"""Bytes of data whose rows are counted to the end; of more, only a step's rows are looked at."""
BYTES_OF_A_TOKEN = 4
"""Of English text, about."""
TEMPLATE = 64
"""Tokens that a prompt template and a tokenizer may add to a row, at most; a token is at least a byte."""
LARGEST_JSON = 512 * 2**20
"""Bytes; a larger .json file is not read before the run."""

Found = tuple[str, str, str, Literal["wrong", "start", "here", "unsure"]]
"""Path below the section, what, what to do, and the kind of problem, as in checks.py."""
SPLIT = re.compile(r"train(?:\[(\d*):(\d*)(%?)\])?")


def check_dataset(values: Mapping[str, Any], data: Mapping[str, Any], gpus: int) -> Iterator[Found]:
    """data: a dataset section of the config, its texts already looked up. gpus: how many share a step."""
    component = str(data.get("_component_", "")).rpartition(".")[2]
    source, files, split = (data.get(name) for name in ("source", "data_files", "split"))
    columns = data.get("column_map")
    absent = [name for name in ("input", "output") if isinstance(columns, dict) and name not in columns]
    if component == "instruct_dataset" and absent:
        what = f"lacks {' and '.join(absent)}, which torchtune wants even where the name is the same"
        yield "column_map", what, f"add {', '.join(f'{name}: {name}' for name in absent)}", "start"
        return
    if component == "chat_dataset" and data.get("conversation_style") not in (*TURNS, None):
        what = f"is {data['conversation_style']!r}"
        yield "conversation_style", what, "write openai (messages) or sharegpt (conversations)", "start"
    if isinstance(source, str) and Path(source).is_file():
        kind = KINDS.get(Path(source).suffix, "text")
        yield "source", f"{source} is a file", f"write source: {kind} and data_files: {source}", "start"
    if not isinstance(files, str | list | dict) or (isinstance(source, str) and Path(source).is_dir()):
        return
    if source not in SOURCES:
        default = "the component's own hub data set" if source is None else repr(source)
        advice = "add source: json (or csv, parquet, text) beside it"
        yield "data_files", f"names files, but the source is {default}", advice, "start"
        return
    if isinstance(split, str) and not isinstance(files, dict) and not split.startswith("train"):
        what = f"is {split!r}, but files without a name are all 'train'"
        yield "split", what, f"write train, or data_files: {{{split}: …}}", "start"
    listed = [files] if isinstance(files, str) else files if isinstance(files, list) else list(files.values())
    yield from _files(values, data, component, [file for file in listed if isinstance(file, str)], gpus)


def _files(
    values: Mapping[str, Any], data: Mapping[str, Any], component: str, files: list[str], gpus: int
) -> Iterator[Found]:
    source, field = data["source"], data.get("field")
    if not isinstance(field, str | None):
        yield "field", f"is {field!r}", "write the name of the list in the file", "wrong"
        return
    local = [file for file in files if "://" not in file and not any(mark in file for mark in "*?[")]
    absent = [file for file in local if not Path(file).exists()]
    yield from (("data_files", f"there is no file {file}", "correct the path", "here") for file in absent)
    if absent or local != files:
        return
    stats = [Path(file).stat() for file in local]
    size = sum(stat.st_size for stat in stats)
    limit = sys.maxsize if size < SMALL else _rows_of_a_step(values, gpus)
    count = 0
    for file, stat in zip(local, stats, strict=True):
        rows, problem = sample_rows(file, source, field, limit - count, (stat.st_mtime_ns, stat.st_size))
        if rows is None:
            return
        found = [problem] if problem else list(_shape(component, data, file, rows[0])) if rows else []
        if found:
            yield from ((*part, "start") for part in found)
            return
        count += len(rows)
        if count >= limit:
            return
    if not isinstance(data["data_files"], dict):
        yield from _enough(values, data, count, size, gpus, ", ".join(local))


def _rows_of_a_step(values: Mapping[str, Any], gpus: int) -> int:
    batch, accumulation = values.get("batch_size"), values.get("gradient_accumulation_steps", 1)
    return max(1, batch * accumulation * gpus) if type(batch) is int and type(accumulation) is int else 1


def _shape(component: str, data: Mapping[str, Any], file: str, row: Any) -> Iterator[tuple[str, str, str]]:
    """What keeps the component from reading this row."""
    if not isinstance(row, dict):
        yield "data_files", f"{file} holds {row!r} where a row should be", "write objects"
        return
    for name in needed_columns(component, data):
        if name not in row:
            setting = {"chat_dataset": "conversation_column", "text_completion_dataset": "column"}
            hint = did_you_mean(name, [*map(str, row)])
            what = f"{file} has no column {name!r}; it has {', '.join(map(repr, row))}{hint}"
            yield "data_files", what, f"set {setting.get(component, 'column_map')}, or another dataset"
            return
    style = str(data.get("conversation_style"))
    turns = row.get(data.get("conversation_column")) if style in TURNS else None
    if turns and not (isinstance(turns[0], dict) and TURNS[style] in turns[0]):
        what = f"is {style}, but the turns of {file} have no {TURNS[style]!r}"
        yield "conversation_style", what, "write openai (role, content) or sharegpt (from, value)"


def _enough(
    values: Mapping[str, Any], data: Mapping[str, Any], count: int, size: int, gpus: int, names: str
) -> Iterator[Found]:
    """torchtune ends with exit code 0 and no step taken where the rows do not fill one.

    count, size: rows and bytes of all files, whose names are given for the message.
    """
    part = SPLIT.fullmatch(str(data.get("split", "train")))
    if part is None:
        return
    total, unit = max(1, count), count / 100 if part[3] else 1
    count = max(0, min(count, int(int(part[2] or sys.maxsize) * unit)) - int(int(part[1] or 0) * unit))
    fewest = most = count
    needed = _rows_of_a_step(values, gpus)
    length = get(values, "tokenizer.max_seq_len")
    if data.get("packed") is True and isinstance(length, int) and data["source"] != "parquet":
        share = size * count // total
        most = 2 * (share + TEMPLATE * count) // length + 1
        is_cut = str(data.get("_component_")).endswith("text_completion_dataset")
        most = most if is_cut and count else min(count, most)
        fewest = min(most, share // BYTES_OF_A_TOKEN // length + 1)
    if fewest < needed:
        batch, accumulation = values.get("batch_size"), values.get("gradient_accumulation_steps", 1)
        packed = f"{count} samples may be packed into {fewest} row{'s' * (fewest > 1)}, which"
        found = packed if most >= needed else f"{most} rows" if count else f"0 rows of {names}"
        step = f"{batch} × {accumulation} accumulated" + (f" × {gpus} devices" if gpus > 1 else "")
        what = f"{found} are fewer than one step of {step}: no step at all"
        advice = "lower batch_size or gradient_accumulation_steps"
        yield "/batch_size", what, advice, "wrong" if most < needed else "unsure"
        return
    epochs, most_steps = values.get("epochs"), values.get("max_steps_per_epoch")
    steps = min(most // needed, most_steps if type(most_steps) is int else sys.maxsize)
    steps *= epochs if type(epochs) is int else 1
    warmup = get(values, "lr_scheduler.num_warmup_steps")
    if type(warmup) is int and warmup >= steps:
        what = f"{warmup} steps of warmup are no less than the run's {steps}: the learning rate never gets to its peak"
        yield "/lr_scheduler.num_warmup_steps", what, "lower it", "unsure"


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
