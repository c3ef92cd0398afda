"""The turns of a conversation as files write them → OpenAI's messages. Nothing here imports torch."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from lacuna.data.formats import Message
from lacuna.data.written import thought_of

ROLES = ("system", "developer", "user", "assistant", "tool")
SHAREGPT_ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "model": "assistant",
    "system": "system", "tool": "tool", "observation": "tool", "function_response": "tool",
    "function_call": "assistant", "tool_call": "assistant",
}  # fmt: skip
CALLERS = ("function_call", "tool_call")
"""Whose words are a call, as JSON."""
FLAGS = ("weight", "train", "loss")
"""Whether an assistant's turn is learned: 0 or 1, false or true."""
UNCLEAR_FLAGS = ("mask", "label")
"""Programs do not agree on what they mean."""
OF_A_TURN = ("from", "role", "value", *FLAGS, *UNCLEAR_FLAGS)


class RowError(ValueError):
    """A row does not have the shape that its schema says."""


def text_of(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise RowError(f"{name} is {type(value).__name__}, not text")
    return value


def decoded(value: Any, subject: str) -> Any:
    """What JSON text says, also where it was encoded twice; anything else as it is. subject: of the message."""
    for _ in range(2):
        if not isinstance(value, str) or not value.lstrip().startswith(("[", "{", '"')):
            return value
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise RowError(f"{subject} not valid JSON: {error}") from None
    return value


def messages_of(value: Any, name: str) -> list[Message]:
    """OpenAI's form, also as JSON text, whole or message by message."""
    items = decoded(value, f"{name} is")
    if not isinstance(items, list) or not items:
        raise RowError(f"{name} is not a list of messages, or is empty")
    return [_message(item, f"{name}[{index}]") for index, item in enumerate(items)]


def turns_of(value: Any, name: str) -> list[Message]:
    """ShareGPT's form: who speaks stands under `from` or `role`, what is said under `value`."""
    turns = decoded(value, f"{name} is")
    if not isinstance(turns, list) or not turns:
        raise RowError(f"{name} is not a list of turns, or is empty")
    return [_turn(turn, f"{name}[{index}]") for index, turn in enumerate(turns)]


def tools_of(value: Any) -> list[Any] | None:
    """A list of objects, of JSON texts, or all of it as JSON text; None without any."""
    tools = decoded(value, "tools is") if value else None
    if not tools:
        return None
    if not isinstance(tools, list):
        raise RowError("tools is not a list of objects")
    found = [decoded(tool, f"tools[{index}] is") for index, tool in enumerate(tools)]
    if not all(isinstance(tool, dict) for tool in found):
        raise RowError("tools is not a list of objects")
    return found


def with_system(messages: list[Message], system: Any) -> list[Message]:
    """Behind the text of a column `system`, which stands before the conversation."""
    if not system:
        return messages
    text = text_of(system, "system")
    if messages and messages[0]["role"] == "system":
        if messages[0]["content"] != text:
            raise RowError("the column system says something else than the first message, which is a system message")
        return messages
    return [{"role": "system", "content": text}, *messages]


def unlearned(messages: Sequence[Message]) -> list[Message]:
    """The same, of which nothing is learned: the prompt of a completion may hold answers of an example."""
    return [{**message, "weight": 0} if message["role"] == "assistant" else message for message in messages]


def _message(item: Any, name: str) -> Message:
    item = decoded(item, f"{name} is")
    if not isinstance(item, Mapping):
        raise RowError(f"{name} is {type(item).__name__}, not an object with role and content")
    message = {key: value for key, value in item.items() if value is not None}
    if message.get("role") == "function":
        message["role"] = "tool"
    if message.get("role") not in ROLES:
        raise RowError(f"{name}.role is {message.get('role')!r}; known roles: {', '.join(ROLES)}")
    message = {key: value for key, value in message.items() if key not in FLAGS} | _weight(message, name)
    if (call := message.pop("function_call", None)) is not None:
        message["tool_calls"] = [{"type": "function", "function": call}]
    if calls := message.get("tool_calls"):
        if not isinstance(calls, list):
            raise RowError(f"{name}.tool_calls is {type(calls).__name__}, not a list")
        message["tool_calls"] = [_tool_call(call, f"{name}.tool_calls") for call in calls]
        message.setdefault("content", "")
    message["content"] = _content(message.get("content"), f"{name}.content")
    return _unlearned_if_empty(message)


def _content(content: Any, name: str) -> str:
    if not isinstance(content, list):
        return text_of(content, name)
    if not all(isinstance(part, Mapping) and part.get("type") == "text" for part in content):
        raise RowError(f"{name} has parts that are not text")
    return "".join(text_of(part.get("text"), name) for part in content)


def _turn(turn: Any, name: str) -> Message:
    is_object = isinstance(turn, Mapping)
    key = "role" if is_object and "from" not in turn and "role" in turn else "from"
    speaker = turn.get(key) if is_object else turn
    if not is_object or not isinstance(speaker, str) or speaker not in SHAREGPT_ROLES:
        raise RowError(f"{name}.{key} is {speaker!r}; known: {', '.join(SHAREGPT_ROLES)}")
    value = turn.get("value")
    message: Message = {"role": SHAREGPT_ROLES[speaker], **_weight(turn, name)}
    if speaker not in CALLERS:
        return _unlearned_if_empty({**message, "content": text_of(value, f"{name}.value")})
    calls = decoded(value, f"{name}.value is")
    entries = calls if isinstance(calls, list) else [calls]
    message["tool_calls"] = [_tool_call({"type": "function", "function": call}, f"{name}.value") for call in entries]
    return {**message, "content": ""}


def _weight(turn: Mapping[str, Any], name: str) -> Message:
    """What the flags of a turn say, as `weight`; nothing where there is none. Raises RowError where they disagree."""
    if unclear := [flag for flag in UNCLEAR_FLAGS if turn.get(flag) is not None]:
        raise RowError(f"{name}.{unclear[0]}: programs disagree on what it means: write weight 0 or 1")
    given = {flag: turn[flag] for flag in FLAGS if turn.get(flag) is not None}
    for flag, value in given.items():
        if value not in (0, 1):
            raise RowError(f"{name}.{flag} is {value!r}; it is 0 or 1")
    weights = {int(value) for value in given.values()}
    if len(weights) > 1:
        raise RowError(f"{name}: {' and '.join(given)} disagree on whether the turn is learned")
    return {"weight": weights.pop()} if weights else {}


def _unlearned_if_empty(message: Message) -> Message:
    """A turn without a word or a call would teach to answer nothing."""
    says = message["content"].strip() or message.get("tool_calls") or thought_of(message)
    return message if says or message["role"] != "assistant" else {**message, "weight": 0}


def _tool_call(call: Any, name: str) -> dict[str, Any]:
    """OpenAI writes a call's arguments as JSON text, the templates expect the object itself."""
    call = decoded(call, f"{name} is")
    if not isinstance(call, Mapping) or not isinstance(call.get("function"), Mapping):
        raise RowError(f"{name} has an entry without a function")
    function = dict(call["function"])
    arguments = decoded(function.get("arguments") or {}, f"{name}: the arguments are")
    if not isinstance(arguments, Mapping):
        raise RowError(f"{name}: the arguments are {type(arguments).__name__}, not an object")
    return {**call, "function": {**function, "arguments": arguments}}
