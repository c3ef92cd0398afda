"""Conversation → the tokens that the model continues, as in training; what the user types stays text."""

import re
from collections.abc import Sequence
from itertools import pairwise

import jinja2

from lacuna.chat.answer import without_oldest
from lacuna.data.chat import SENTINEL, Renderer
from lacuna.data.formats import Message, Text
from lacuna.data.samples import Sample
from lacuna.errors import ModelError

ROOM = 4
"""Before older turns are kept, an answer gets up to this part of the context: a fourth."""


def plain_tokens(renderer: Renderer, text: str) -> list[int]:
    """Text to continue: what training makes of it, without the end."""
    (sample,) = renderer.texts([Text(text, "the prompt")])
    assert isinstance(sample, Sample)
    return [int(token) for token in sample.tokens[:-1]]


def chat_tokens(renderer: Renderer, messages: Sequence[Message]) -> list[int]:
    """A conversation up to where the assistant speaks.

    The name of a control token in a message is tokenised apart, as letters. Otherwise no text is cut but where an
    assistant's words begin, as in training. Raises ModelError where the template refuses or leaves out a message.
    """
    typed: list[str] = []

    def hide(found: re.Match[str]) -> str:
        typed.append(found[0])
        return SENTINEL.format(len(typed) - 1)

    names = [*filter(None, renderer.control_tokens), SENTINEL.partition("{")[0]]
    control = re.compile("|".join(map(re.escape, names)))
    hidden = [{**message, "content": control.sub(hide, message["content"])} for message in messages]
    try:
        text = renderer.render(hidden, prompt=True)
        turns = [place for place, message in enumerate(hidden) if place and message["role"] == "assistant"]
        prompts = [renderer.render(hidden[:place], prompt=True) for place in turns]
    except jinja2.TemplateError as error:
        raise ModelError(f"the chat template does not accept this conversation: {error}") from error
    for message in hidden:
        if message["role"] != "assistant" and message["content"].strip() not in text:
            raise ModelError(
                f"the chat template leaves out the {message['role']}'s words: the model would not see them"
            )
    starts = [len(prompt) for prompt in prompts if renderer.encodes_in_parts and text.startswith(prompt)]
    tokens: list[int] = []
    for start, end in pairwise([0, *starts, len(text)]):
        for place, part in enumerate(re.split(SENTINEL.format(r"(\d+)"), text[start:end])):
            is_typed = place % 2 == 1
            words = typed[int(part)] if is_typed else part
            encoding = renderer.tokenizer(words, add_special_tokens=False, split_special_tokens=is_typed)
            tokens += encoding["input_ids"]
    return tokens


def fitting_tokens(
    renderer: Renderer, messages: Sequence[Message], context: int | None, longest: int
) -> tuple[list[int], int]:
    """The tokens of the conversation, and how many of its oldest messages the context had no room for.

    context: the tokens that prompt and answer may have together. longest: of the answer. Raises ModelError where the
    last prompt alone fills the context.
    """
    kept = list(messages)
    while True:
        tokens = chat_tokens(renderer, kept)
        if context is None or len(tokens) + min(longest, context // ROOM) <= context:
            return tokens, len(messages) - len(kept)
        shorter = without_oldest(kept)
        if shorter is None:
            check_room(tokens, context)
            return tokens, len(messages) - len(kept)
        kept = shorter


def check_room(tokens: Sequence[int], context: int | None) -> None:
    if context is not None and len(tokens) >= context:
        raise ModelError(f"the prompt has {len(tokens)} tokens, and the context of this model only {context}")
