"""Data files in, rows out. Nothing here imports torch.

A row keeps its origin (`file:line`) until it is tokens, so that every complaint can name it.
"""

import csv
import glob
import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lacuna.errors import DataError, MissingExtraError
from lacuna.words import did_you_mean

ENDINGS = {".jsonl": "jsonl", ".json": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text", ".md": "text"}
SHOWN_PROBLEMS = 10
SPLIT_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
"""What files of a split are called. # ref: https://huggingface.co/docs/hub/datasets-file-names-and-splits"""

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


def find_files(dataset: str, kind: str = "auto", split: str = "train") -> list[Path] | None:
    """The files that a data set's name stands for, sorted; None where it is the name of a hub data set.

    kind: "auto" goes by the endings. split: of a folder whose files are named by split, such as train.jsonl.
    Raises DataError: nothing there, an unknown ending, no such split, or a folder with several kinds of files.
    """
    path = Path(dataset).expanduser()
    if path.is_file():
        file_kind(path, kind)
        return [path]
    if path.is_dir():
        endings = [ending for ending, its_kind in ENDINGS.items() if kind in ("auto", its_kind)]
        files = sorted(p for p in path.rglob("*") if p.is_file() and p.suffix in endings and _is_data(p, path))
        if not files:
            raise DataError(f"{dataset}: the folder holds no {', '.join(endings)} files")
        files = _of_split(files, path, split)
    elif any(character in dataset for character in "*?["):
        files = sorted(Path(p) for p in glob.glob(str(path), recursive=True) if Path(p).is_file())
        if not files:
            raise DataError(f"{dataset}: no file matches")
    elif (
        path.suffix in ENDINGS
        or dataset.startswith(("/", ".", "~"))
        or not re.fullmatch(r"[\w.\-]+(/[\w.\-]+)?", dataset)
    ):
        nearby = [str(p) for p in path.parent.glob("*")] if path.parent.is_dir() else []
        hint = did_you_mean(str(path), nearby)
        if not path.suffix:
            hint += (
                f"; to download data into it: hf download OWNER/{path.name} --repo-type dataset --local-dir {dataset}"
            )
        raise DataError(f"{dataset}: no such file or folder{hint}")
    else:
        return None
    kinds = sorted({file_kind(file, kind) for file in files})
    if len(kinds) > 1:
        raise DataError(
            f"{dataset}: several kinds of files ({', '.join(kinds)}); choose one with a glob such as {path}/*.jsonl"
        )
    return files


def _of_split(files: list[Path], folder: Path, split: str) -> list[Path]:
    """Those whose names say that they belong to the split; all where no name says anything of splits."""
    wanted = SPLIT_WORDS.get(split, (split,))
    known = [*wanted, *(word for words in SPLIT_WORDS.values() for word in words)]
    parts = {file: re.split(r"[^a-z0-9]+", file.relative_to(folder).as_posix().lower()) for file in files}
    named = [file for file in files if any(word.lower() in parts[file] for word in known)]
    chosen = [file for file in named if any(word.lower() in parts[file] for word in wanted)]
    if not chosen and (named or split not in SPLIT_WORDS):
        shown = ", ".join(str(file.relative_to(folder)) for file in files[:SHOWN_PROBLEMS])
        raise DataError(f"{folder}: no file is named for the split {split!r}; there are: {shown}")
    return chosen or files


def _is_data(file: Path, folder: Path) -> bool:
    """Neither hidden nor the card of a data set that was downloaded."""
    return file.name != "README.md" and not any(part.startswith(".") for part in file.relative_to(folder).parts)


def file_kind(path: Path, kind: str = "auto") -> str:
    """How a file is read. Raises DataError for an ending that says nothing of it."""
    if kind == "auto" and path.suffix not in ENDINGS:
        raise DataError(f"{path}: unknown ending {path.suffix!r}; known: {', '.join(ENDINGS)}{EXAMPLES}")
    return ENDINGS[path.suffix] if kind == "auto" else kind


def read_file(path: Path, kind: str = "auto") -> Iterator[Row | Broken]:
    """Rows of one file; a text file is one row. Origins count lines from 1, items of json and parquet from 1 too.

    Raises DataError where the file as a whole cannot be read.
    """
    reader = {"jsonl": _read_jsonl, "json": _read_json, "csv": _read_csv, "parquet": _read_parquet, "text": _read_text}
    try:
        yield from reader[file_kind(path, kind)](path)
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error


def _read_jsonl(path: Path) -> Iterator[Row | Broken]:
    with path.open("rb") as file:
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
        reader = csv.reader(file, strict=True)
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
                    yield Row(values, f"{path}: row {number}")
    except pyarrow.ArrowException as error:
        raise DataError(f"{path}: not a readable parquet file: {error}") from None


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
