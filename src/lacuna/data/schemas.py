"""Rows → conversations and texts: what the columns mean. Nothing here imports torch."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lacuna.data.formats import Broken, Conversation, Example, Message, Row, Text
from lacuna.errors import DataError


@dataclass(frozen=True)
class Schema:
    """How a row becomes an example, and why we think so."""

    name: str
    reason: str
    convert: Callable[[Row], Example]
    unused_columns: list[str]


class RowError(ValueError):
    """A row does not have the shape that its schema says."""


def detect_schema(rows: Sequence[Row], wanted: str, text_column: str, where: str) -> Schema:
    """Find the schema from the columns of the first rows, or check the one that the user gave.

    wanted: "auto" or a schema's name. Raises DataError that lists the columns found and what each schema needs.
    """
    columns = dict.fromkeys(column for row in rows for column in row.values)
    conversations = next((row.values["conversations"] for row in rows if row.values.get("conversations")), None)
    turn = conversations[0] if isinstance(conversations, list) else None
    openai_style = isinstance(turn, Mapping) and "role" in turn
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
    if tools and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise RowError("tools is not a list of objects")
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
        if not isinstance(calls, list):
            raise RowError(f"{name}.tool_calls is {type(calls).__name__}, not a list")
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
        speaker = turn.get("from") if isinstance(turn, Mapping) else turn
        if not isinstance(turn, Mapping) or not isinstance(speaker, str) or speaker not in SHAREGPT_ROLES:
            raise RowError(f"conversations[{index}].from is {speaker!r}; known: {', '.join(SHAREGPT_ROLES)}")
        content = _text(turn.get("value"), f"conversations[{index}].value")
        messages.append({"role": SHAREGPT_ROLES[speaker], "content": content})
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
