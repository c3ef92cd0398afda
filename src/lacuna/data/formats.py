"""Data files in, rows out. Nothing here imports torch.

A row keeps its origin (`file:line`) until it is tokens, so that every complaint can name it.
"""

import csv
import gzip
import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lacuna.errors import DataError, MissingExtraError

ENDINGS = {
    ".jsonl": "jsonl", ".jsonl.gz": "jsonl", ".json": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet",
    ".arrow": "arrow", ".txt": "text", ".md": "text",
}  # fmt: skip
SEPARATORS = ",;\t|"
SHOWN_PROBLEMS = 10

EXAMPLES = """
    .jsonl    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}
    .json     [{"instruction": "Add 1 and 2", "output": "3"}]
    .csv      prompt,completion\\nHi,Hello
    .parquet  a column `text`, or the columns of the others
    .txt .md  plain text, one document a file"""
"""What a file of each kind may hold."""

Message = dict[str, Any]
"""OpenAI's chat message: role, content, and what else the template reads (tool_calls, name, …)."""


@dataclass(frozen=True)
class Row:
    values: dict[str, Any]
    origin: str


@dataclass(frozen=True)
class Broken:
    """A row that cannot be used, and why."""

    origin: str
    reason: str


@dataclass(frozen=True)
class Conversation:
    messages: list[Message]
    tools: list[Any] | None
    origin: str


UNREADABLE_FLAG = "--unreadable-share"


@dataclass(frozen=True)
class Text:
    text: str
    origin: str


Example = Conversation | Text


def ending_of(path: Path) -> str:
    """`.jsonl`, or `.jsonl.gz`."""
    return "".join(path.suffixes[-2:]) if path.suffix == ".gz" else path.suffix


def file_kind(path: Path, kind: str = "auto") -> str:
    """How a file is read. Raises DataError for an ending that says nothing of it."""
    ending = ending_of(path)
    if kind == "auto" and ending not in ENDINGS:
        raise DataError(f"{path}: unknown ending {ending!r}; known: {', '.join(ENDINGS)}{EXAMPLES}")
    return ENDINGS[ending] if kind == "auto" else kind


def read_file(path: Path, kind: str = "auto") -> Iterator[Row | Broken]:
    """Rows of one file; a text file is one row. Origins count lines from 1, items of json and parquet from 1 too.

    Raises DataError where the file as a whole cannot be read.
    """
    reader = {
        "jsonl": _read_jsonl, "json": _read_json, "csv": _read_csv, "parquet": _read_parquet, "arrow": _read_arrow,
        "text": _read_text,
    }  # fmt: skip
    try:
        yield from reader[file_kind(path, kind)](path)
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error


def _read_jsonl(path: Path) -> Iterator[Row | Broken]:
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            origin = f"{path}:{number}"
            try:
                values = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except (ValueError, RecursionError) as error:
                yield Broken(origin, f"not valid JSON: {error}")
                continue
            yield _object(values, origin)


def _read_json(path: Path) -> Iterator[Row | Broken]:
    try:
        items = json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        hint = "; is it one object a line? Then it ends in .jsonl" if error.msg == "Extra data" else ""
        raise DataError(f"{path}:{error.lineno}: not valid JSON: {error.msg}{hint}") from None
    except RecursionError:
        raise DataError(f"{path}: not readable: nested too deeply") from None
    if not isinstance(items, list):
        raise DataError(f"{path}: a .json data file is one list of objects, this is a {type(items).__name__}")
    for number, values in enumerate(items, 1):
        origin = f"{path}: item {number}"
        yield _object(values, origin)


def _object(values: Any, origin: str) -> Row | Broken:
    """JSON can spell half of a UTF-16 pair, which is no character and which no tokenizer takes."""
    if not isinstance(values, dict):
        return Broken(origin, "not a JSON object")
    try:
        json.dumps(values, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        return Broken(origin, f"{error.object[error.start]!r} is half a character (an unpaired surrogate)")
    return Row(values, origin)


def _read_csv(path: Path) -> Iterator[Row | Broken]:
    csv.field_size_limit(2**31 - 1)
    with path.open(encoding="utf-8-sig", newline="") as file:
        separator = _separator(file.readline())
        file.seek(0)
        reader = csv.reader(file, strict=True, delimiter=separator)
        line = 1
        try:
            header = next(reader, [])
            if twice := [name for name in dict.fromkeys(header) if header.count(name) > 1]:
                raise DataError(f"{path}:1: the header has {', '.join(map(repr, twice))} twice: keep one of them")
            line = reader.line_num + 1
            for fields in reader:
                origin, line = f"{path}:{line}", reader.line_num + 1
                if len(fields) == len(header):
                    yield Row(dict(zip(header, fields, strict=True)), origin)
                elif fields:
                    yield Broken(origin, f"{len(fields)} fields, but the header has {len(header)}")
        except csv.Error as error:
            raise DataError(f"{path}:{line}: not valid CSV: {error}") from None


def _separator(header: str) -> str:
    """A comma; or what else stands in the first line, where no comma does."""
    return next((candidate for candidate in SEPARATORS if candidate in header), ",")


def _read_parquet(path: Path) -> Iterator[Row | Broken]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise MissingExtraError("train", "pyarrow") from None
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches(batch_size=1024):
                for values in batch.to_pylist():
                    number += 1
                    yield Row(of_arrow(values), f"{path}: row {number}")
    except pyarrow.ArrowException as error:
        raise DataError(f"{path}: not a readable parquet file: {error}") from None


def _read_arrow(path: Path) -> Iterator[Row | Broken]:
    """A file of a folder that `save_to_disk` wrote."""
    try:
        import pyarrow
    except ImportError:
        raise MissingExtraError("train", "pyarrow") from None
    try:
        with pyarrow.memory_map(str(path)) as source, pyarrow.ipc.open_stream(source) as stream:
            number = 0
            for batch in stream:
                for values in batch.to_pylist():
                    number += 1
                    yield Row(of_arrow(values), f"{path}: row {number}")
    except pyarrow.ArrowException as error:
        raise DataError(f"{path}: not a readable Arrow file: {error}") from None


def of_arrow(values: dict[str, Any]) -> dict[str, Any]:
    """A row without the nulls below its columns: all structs of a column have the keys of all rows, and what a row does
    not have is null there."""
    return {name: _without_nulls(value) for name, value in values.items()}


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_nulls(inner) for name, inner in value.items() if inner is not None}
    if isinstance(value, list):
        return [_without_nulls(inner) for inner in value]
    return value


def _read_text(path: Path) -> Iterator[Row | Broken]:
    yield Row({"text": path.read_text(encoding="utf-8-sig")}, str(path))


def within_limit(
    rows: Iterable[Any | Broken], share: float, report: Callable[[str], None], collected: int = SHOWN_PROBLEMS,
    flag: str = UNREADABLE_FLAG,
) -> Iterator[Any]:  # fmt: skip
    """Pass on what is not Broken.

    Raises DataError naming the first broken rows once more than `share` of at least 1,000 rows, or of all, are
    broken; otherwise the number left out is reported at the end.
    collected: so many broken rows are waited for, to be named together; 0 where the end may never come.
    flag: by which the user allows more of them, for messages.
    """
    broken: list[Broken] = []
    total = 0
    for row in rows:
        total += 1
        if isinstance(row, Broken):
            broken.append(row)
        if total >= 1000 and len(broken) > max(share * total, collected):
            judge_broken(broken, total, share, report, flag)
        if not isinstance(row, Broken):
            yield row
    judge_broken(broken, total, share, report, flag)


def judge_broken(
    broken: list[Broken], total: int, share: float, report: Callable[[str], None], flag: str = UNREADABLE_FLAG
) -> None:
    """Report the rows left out. flag: by which the user allows more of them.

    Raises DataError naming the first of them where they are more than the share."""
    if len(broken) > share * total:
        lines = [f"{row.origin}: {row.reason}" for row in broken[:SHOWN_PROBLEMS]]
        if len(broken) > SHOWN_PROBLEMS:
            lines.append(f"… and {len(broken) - SHOWN_PROBLEMS} more broken rows")
        lines.append(f"{len(broken)} of {total} rows cannot be used: mend them, or allow a share with {flag}")
        raise DataError(lines)
    if broken:
        report(f"{len(broken)} of {total} rows are broken and left out; the first: {broken[0].origin}")


def peek(rows: Iterator[Row | Broken], count: int = 100) -> tuple[list[Row], Iterator[Row | Broken]]:
    """The good ones of the first rows, at least one where there is any, and an iterator over all rows."""
    first: list[Row | Broken] = []
    for row in rows:
        first.append(row)
        if len(first) >= count and isinstance(row, Row):
            break

    def all_rows() -> Iterator[Row | Broken]:
        yield from first
        yield from rows

    return [row for row in first if isinstance(row, Row)], all_rows()
