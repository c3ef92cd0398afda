"""Whether a chat template has written what a conversation holds. Nothing here imports torch."""

import json
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from lacuna.data.formats import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

THOUGHT = re.compile(r"<think>(?P<thought>.*?)</think>", re.S)
THOUGHTS = ("reasoning_content", "reasoning", "thinking")
"""Keys of a message under which a thought stands, by the server that wrote it down."""


def thought_of(message: Message) -> str:
    """What the assistant thought before it spoke; nothing where no key holds it."""
    found = (message[key] for key in THOUGHTS if isinstance(message.get(key), str))
    return next(found, "").strip()


def not_written(messages: Sequence[Message], tools: Sequence[Any] | None, text: str) -> str | None:
    """The first part of a conversation that is not in its text; None where all is. Thoughts are a matter of their own.

    Templates write words as they are, without the space around them, or as JSON.
    """
    for message in messages:
        if message["role"] != "assistant" and not _is_in(message["content"].strip(), text):
            return f"the {message['role']}'s words"
        for call in message.get("tool_calls") or ():
            if not _is_in(str(call["function"].get("name", "")), text):
                return "the assistant's call of a tool"
            if any(not _is_in(leaf, text) for leaf in _texts(call["function"]["arguments"])):
                return "the arguments of the assistant's call of a tool"
    for tool in tools or ():
        if not _is_in(str(_function(tool).get("name", "")), text):
            return "the tools"
    return None


def _function(tool: Any) -> dict[str, Any]:
    inner = tool.get("function")
    return inner if isinstance(inner, dict) else tool


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value.strip()
    elif isinstance(value, dict):
        for inner in value.values():
            yield from _texts(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _texts(inner)


def _is_in(words: str, text: str) -> bool:
    spellings = (words, json.dumps(words, ensure_ascii=False)[1:-1], json.dumps(words)[1:-1])
    return any(spelling in text for spelling in spellings)


def lacks_its_thought(turn: Message, words: str) -> bool:
    """Whether a turn that is to be learned had a thought, in a key of its own or in its words, that is not written."""
    if not turn.get("weight", 1):
        return False
    inline = THOUGHT.match(turn["content"].lstrip())
    thought = thought_of(turn) or (inline["thought"].strip() if inline else "")
    return bool(thought) and thought not in words


def without_weight(message: Message) -> Message:
    return {key: value for key, value in message.items() if key != "weight"}


def with_text_arguments(message: Message) -> Message:
    """Its calls in OpenAI's own form, whose arguments are JSON text."""
    if not message.get("tool_calls"):
        return message
    return {**message, "tool_calls": [_with_text(call) for call in message["tool_calls"]]}


def _with_text(call: dict[str, Any]) -> dict[str, Any]:
    function = call["function"]
    arguments = json.dumps(function["arguments"], ensure_ascii=False)
    return {**call, "function": {**function, "arguments": arguments}}


def takes_text_arguments(tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Whether a chat template fails at a call's arguments as an object, and does not where they are JSON text."""
    call = {"type": "function", "id": "call00001", "function": {"name": "f", "arguments": {"key": "value"}}}
    message: Message = {"role": "assistant", "content": "", "tool_calls": [call]}
    return _fails_at(tokenizer, message) and not _fails_at(tokenizer, with_text_arguments(message))


def _fails_at(tokenizer: "PreTrainedTokenizerBase", message: Message) -> bool:
    """By an error of its own: a template that raises one on purpose does not fail."""
    import jinja2

    probe: Any = [{"role": "user", "content": "question"}, message]
    try:
        tokenizer.apply_chat_template(probe, tokenize=False)
    except jinja2.TemplateError:
        return False
    except Exception:
        return True
    return False
