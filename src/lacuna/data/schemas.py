"""Rows → conversations and texts: what the columns mean. Nothing here imports torch."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lacuna.data.formats import Broken, Conversation, Example, Message, Row, Text
from lacuna.data.messages import OF_A_TURN, RowError, messages_of, text_of, tools_of, turns_of, unlearned, with_system
from lacuna.errors import DataError


@dataclass(frozen=True)
class Schema:
    """How a row becomes an example, and why we think so."""

    name: str
    reason: str
    convert: Callable[[Row], Example]
    unused_columns: list[str]


def detect_schema(rows: Sequence[Row], wanted: str, text_column: str, where: str) -> Schema:
    """Find the schema from the columns of the first rows, or check the one that the user gave.

    wanted: "auto" or a schema's name. Raises DataError that lists the columns found and what each schema needs.
    """
    columns = dict.fromkeys(column for row in rows for column in row.values)
    conversations = next((row.values["conversations"] for row in rows if row.values.get("conversations")), None)
    turn = conversations[0] if isinstance(conversations, list) else None
    openai_style = isinstance(turn, Mapping) and "role" in turn and "content" in turn
    chat_column = "conversations" if "messages" not in columns and openai_style else "messages"
    candidates: dict[str, tuple[list[str], list[str], Callable[[Row], Example]]] = {
        "chat": ([chat_column], ["system", "tools"], lambda row: _chat(row, chat_column)),
        "sharegpt": (["conversations"], ["system", "tools"], _sharegpt),
        "prompt_completion": (["prompt", "completion"], ["system", "tools"], _prompt_completion),
        "instruction": (["instruction", "output"], ["input", "system", "tools"], _instruction),
        "text": ([text_column], [], lambda row: Text(text_of(row.values[text_column], text_column), row.origin)),
    }
    for name, (needed, optional, convert) in candidates.items():
        if wanted in ("auto", name) and all(column in columns for column in needed):
            given = "given" if wanted == name else "found"
            unused = [column for column in columns if column not in needed + optional]
            unused += _unused_of_turns(rows) if name == "sharegpt" else []
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


def _chat(row: Row, column: str) -> Conversation:
    messages = messages_of(row.values[column], column)
    return _conversation(row, messages)


def _sharegpt(row: Row) -> Conversation:
    return _conversation(row, turns_of(row.values["conversations"], "conversations"))


def _prompt_completion(row: Row) -> Conversation:
    """The completion is learned, and nothing of the prompt."""
    prompt = _as_messages(row.values["prompt"], "prompt", "user")
    return _conversation(row, [*unlearned(prompt), *_as_messages(row.values["completion"], "completion", "assistant")])


def _as_messages(value: Any, column: str, role: str) -> list[Message]:
    if isinstance(value, list):
        return messages_of(value, column)
    return [{"role": role, "content": text_of(value, column)}]


def _instruction(row: Row) -> Conversation:
    question = text_of(row.values["instruction"], "instruction")
    if row.values.get("input"):
        question += "\n\n" + text_of(row.values["input"], "input")
    answer = text_of(row.values["output"], "output")
    return _conversation(row, [{"role": "user", "content": question}, {"role": "assistant", "content": answer}])


def _conversation(row: Row, messages: list[Message]) -> Conversation:
    """With the system message and the tools that stand in columns of their own."""
    with_all = with_system(messages, row.values.get("system"))
    return Conversation(with_all, tools_of(row.values.get("tools")), row.origin)


def _unused_of_turns(rows: Sequence[Row]) -> list[str]:
    """Keys that ShareGPT's turns have and nothing reads."""
    turns = [turn for row in rows for turn in row.values.get("conversations") or () if isinstance(turn, Mapping)]
    keys = dict.fromkeys(key for turn in turns for key, value in turn.items() if value is not None)
    return [f"conversations[].{key}" for key in keys if key not in OF_A_TURN]
