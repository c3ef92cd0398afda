"""Files and hub data sets in, conversations and texts out. Nothing here imports torch.

A row keeps its origin (`file:line`) until it is tokens, so that every complaint can name it.
"""

import csv
import glob
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from lacuna.config.files import did_you_mean
from lacuna.errors import DataError, MissingExtraError

ENDINGS = {".jsonl": "jsonl", ".json": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text", ".md": "text"}
SHOWN_PROBLEMS = 10

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


@dataclass(frozen=True)
class Text:
    text: str
    origin: str


Example = Conversation | Text


@dataclass(frozen=True)
class Schema:
    """How a row becomes an example, and why we think so."""

    name: str
    reason: str
    convert: Callable[[Row], Example]
    unused_columns: list[str]


class RowError(ValueError):
    """A row does not have the shape that its schema says."""


def find_files(dataset: str) -> list[Path] | None:
    """The files that a data set's name stands for, sorted; None where it is the name of a hub data set.

    Raises DataError: nothing there, an unknown ending, or a folder with several kinds of files.
    """
    path = Path(dataset).expanduser()
    if path.is_file():
        _ending(path)
        return [path]
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.is_file() and p.suffix in ENDINGS and _is_visible(p, path))
        if not files:
            raise DataError(f"{dataset}: the folder holds no {', '.join(ENDINGS)} files")
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
        raise DataError(f"{dataset}: no such file or folder{did_you_mean(str(path), nearby)}")
    else:
        return None
    kinds = sorted({_ending(file) for file in files})
    if len(kinds) > 1:
        raise DataError(
            f"{dataset}: several kinds of files ({', '.join(kinds)}); choose one with a glob such as {path}/*.jsonl"
        )
    return files


def _is_visible(file: Path, folder: Path) -> bool:
    return not any(part.startswith(".") for part in file.relative_to(folder).parts)


def _ending(path: Path) -> str:
    if path.suffix not in ENDINGS:
        raise DataError(f"{path}: unknown ending {path.suffix!r}; known: {', '.join(ENDINGS)}")
    return ENDINGS[path.suffix]


def read_file(path: Path) -> Iterator[Row | Broken]:
    """Rows of one file; a text file is one row. Origins count lines from 1, items of json and parquet from 1 too.

    Raises DataError where the file as a whole cannot be read.
    """
    reader = {"jsonl": _read_jsonl, "json": _read_json, "csv": _read_csv, "parquet": _read_parquet, "text": _read_text}
    try:
        yield from reader[_ending(path)](path)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error


def _read_jsonl(path: Path) -> Iterator[Row | Broken]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            origin = f"{path}:{number}"
            try:
                values = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except ValueError as error:
                yield Broken(origin, f"not valid JSON: {error}")
                continue
            yield Row(values, origin) if isinstance(values, dict) else Broken(origin, "not a JSON object")


def _read_json(path: Path) -> Iterator[Row | Broken]:
    try:
        items = json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{error.lineno}: not valid JSON: {error.msg}") from None
    if not isinstance(items, list):
        raise DataError(f"{path}: a .json data file is one list of objects, this is a {type(items).__name__}")
    for number, values in enumerate(items, 1):
        origin = f"{path}: item {number}"
        yield Row(values, origin) if isinstance(values, dict) else Broken(origin, "not a JSON object")


def _read_csv(path: Path) -> Iterator[Row | Broken]:
    csv.field_size_limit(2**31 - 1)
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, strict=True)
        header = next(reader, [])
        for fields in reader:
            origin = f"{path}:{reader.line_num}"
            if len(fields) == len(header):
                yield Row(dict(zip(header, fields, strict=True)), origin)
            elif fields:
                yield Broken(origin, f"{len(fields)} fields, but the header has {len(header)}")


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


def within_limit(rows: Iterable[Any | Broken], share: float, report: Callable[[str], None]) -> Iterator[Any]:
    """Pass on what is not Broken.

    Raises DataError naming the first broken rows once more than `share` of at least 1,000 rows, or of all, are
    broken; otherwise the number left out is reported at the end.
    """
    broken: list[Broken] = []
    total = 0

    def stop() -> None:
        lines = [f"{row.origin}: {row.reason}" for row in broken[:SHOWN_PROBLEMS]]
        if len(broken) > SHOWN_PROBLEMS:
            lines.append(f"… and {len(broken) - SHOWN_PROBLEMS} more broken rows")
        lines.append(
            f"{len(broken)} of {total} rows cannot be used: mend them, or allow a share with --unreadable-share"
        )
        raise DataError(lines)

    for row in rows:
        total += 1
        if not isinstance(row, Broken):
            yield row
            continue
        broken.append(row)
        if total >= 1000 and len(broken) > max(share * total, SHOWN_PROBLEMS):
            stop()
    if len(broken) > share * total:
        stop()
    if broken:
        report(f"{len(broken)} of {total} rows are broken and left out; the first: {broken[0].origin}")


def detect_schema(rows: Sequence[Row], wanted: str, text_column: str, where: str) -> Schema:
    """Find the schema from the columns of the first rows, or check the one that the user gave.

    wanted: "auto" or a schema's name. Raises DataError that lists the columns found and what each schema needs.
    """
    columns = dict.fromkeys(column for row in rows for column in row.values)
    conversations = next((row.values["conversations"] for row in rows if row.values.get("conversations")), None)
    openai_style = isinstance(conversations, list) and bool(conversations) and "role" in conversations[0]
    chat_column = "conversations" if "messages" not in columns and openai_style else "messages"
    candidates: dict[str, tuple[list[str], list[str], Callable[[Row], Example]]] = {
        "chat": ([chat_column], ["tools"], lambda row: _chat(row, chat_column)),
        "sharegpt": (["conversations"], ["system", "tools"], _sharegpt),
        "prompt_completion": (["prompt", "completion"], ["tools"], _prompt_completion),
        "instruction": (["instruction", "output"], ["input", "system"], _instruction),
        "text": ([text_column], [], lambda row: Text(_text(row.values[text_column], text_column), row.origin)),
    }
    for name, (needed, optional, convert) in candidates.items():
        if wanted in ("auto", name) and all(column in columns for column in needed):
            given = "given" if wanted == name else "found"
            unused = [column for column in columns if column not in needed + optional]
            return Schema(name, f"{name} ({given}: column {' and '.join(needed)})", convert, unused)
    needs = [
        f"{name}: {' and '.join(needed)}" for name, (needed, _, _) in candidates.items() if wanted in ("auto", name)
    ]
    raise DataError(f"{where}: the columns are {', '.join(columns) or '(none)'}; needed are {'; or '.join(needs)}")


def to_examples(rows: Iterable[Row | Broken], schema: Schema) -> Iterator[Example | Broken]:
    """Convert rows; one that does not fit its schema becomes Broken."""
    for row in rows:
        if isinstance(row, Broken):
            yield row
            continue
        try:
            yield schema.convert(row)
        except KeyError as error:
            yield Broken(row.origin, f"the column {error} is missing")
        except RowError as error:
            yield Broken(row.origin, str(error))


def peek(rows: Iterator[Row | Broken], count: int = 100) -> tuple[list[Row], Iterator[Row | Broken]]:
    """The good ones of the first rows, and an iterator over all of them."""
    first = list(islice(rows, count))

    def all_rows() -> Iterator[Row | Broken]:
        yield from first
        yield from rows

    return [row for row in first if isinstance(row, Row)], all_rows()


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise RowError(f"{name} is {type(value).__name__}, not text")
    return value


ROLES = ("system", "developer", "user", "assistant", "tool")
SHAREGPT_ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "model": "assistant",
    "system": "system", "tool": "tool", "observation": "tool",
}  # fmt: skip


def _chat(row: Row, column: str) -> Conversation:
    return Conversation(_messages(row.values[column], column), _tools(row), row.origin)


def _tools(row: Row) -> list[Any] | None:
    tools = row.values.get("tools")
    try:
        tools = json.loads(tools) if isinstance(tools, str) and tools else tools
    except ValueError as error:
        raise RowError(f"tools is not valid JSON: {error}") from None
    if tools is not None and not isinstance(tools, list):
        raise RowError("tools is not a list")
    return tools or None


def _messages(value: Any, name: str) -> list[Message]:
    if not isinstance(value, list) or not value:
        raise RowError(f"{name} is not a list of messages, or is empty")
    return [_message(item, f"{name}[{index}]") for index, item in enumerate(value)]


def _message(item: Any, name: str) -> Message:
    if not isinstance(item, Mapping):
        raise RowError(f"{name} is {type(item).__name__}, not an object with role and content")
    message = {key: value for key, value in item.items() if value is not None}
    if message.get("role") not in ROLES:
        raise RowError(f"{name}.role is {message.get('role')!r}; known roles: {', '.join(ROLES)}")
    if message.get("weight", 1) not in (0, 1):
        raise RowError(f"{name}.weight is {message['weight']!r}; it is 0 or 1")
    if calls := message.get("tool_calls"):
        message["tool_calls"] = [_tool_call(call, f"{name}.tool_calls") for call in calls]
        message.setdefault("content", "")
    content = message.get("content")
    if isinstance(content, list):
        if not all(isinstance(part, Mapping) and part.get("type") == "text" for part in content):
            raise RowError(f"{name}.content has parts that are not text")
        content = "".join(_text(part.get("text"), f"{name}.content") for part in content)
    message["content"] = _text(content, f"{name}.content")
    return message


def _tool_call(call: Any, name: str) -> dict[str, Any]:
    """OpenAI writes a call's arguments as JSON text, the templates expect the object itself."""
    if not isinstance(call, Mapping) or not isinstance(call.get("function"), Mapping):
        raise RowError(f"{name} has an entry without a function")
    function = dict(call["function"])
    if isinstance(function.get("arguments"), str):
        try:
            function["arguments"] = json.loads(function["arguments"])
        except ValueError as error:
            raise RowError(f"{name}: the arguments are not valid JSON: {error}") from None
    return {**call, "function": function}


def _sharegpt(row: Row) -> Conversation:
    turns = row.values["conversations"]
    if not isinstance(turns, list) or not turns:
        raise RowError("conversations is not a list of turns, or is empty")
    messages = _system(row)
    for index, turn in enumerate(turns):
        if not isinstance(turn, Mapping) or turn.get("from") not in SHAREGPT_ROLES:
            speaker = turn.get("from") if isinstance(turn, Mapping) else turn
            raise RowError(f"conversations[{index}].from is {speaker!r}; known: {', '.join(SHAREGPT_ROLES)}")
        content = _text(turn.get("value"), f"conversations[{index}].value")
        messages.append({"role": SHAREGPT_ROLES[turn["from"]], "content": content})
    return Conversation(messages, _tools(row), row.origin)


def _system(row: Row) -> list[Message]:
    system = row.values.get("system")
    return [{"role": "system", "content": _text(system, "system")}] if system else []


def _prompt_completion(row: Row) -> Conversation:
    messages: list[Message] = []
    for column, role in (("prompt", "user"), ("completion", "assistant")):
        value = row.values[column]
        plain = [{"role": role, "content": _text(value, column)}] if not isinstance(value, list) else []
        messages += plain or _messages(value, column)
    return Conversation(messages, _tools(row), row.origin)


def _instruction(row: Row) -> Conversation:
    question = _text(row.values["instruction"], "instruction")
    if row.values.get("input"):
        question += "\n\n" + _text(row.values["input"], "input")
    answer = _text(row.values["output"], "output")
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return Conversation(_system(row) + turns, None, row.origin)
