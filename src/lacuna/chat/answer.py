"""What every model that can be talked to takes and gives. Nothing here imports torch."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

from lacuna.chat.settings import Settings
from lacuna.data.formats import Message

Say = Callable[[str], None]
"""Takes each piece of an answer's text as it comes; the pieces make up the text."""
End = Literal["stop", "max_tokens", "context", "interrupted"]
"""Why an answer ended: the model ended it, or what cut it off."""
CUT_OFF = {
    "max_tokens": "cut off after max_tokens",
    "context": "cut off where the context is full",
    "interrupted": "stopped",
}


@dataclass(frozen=True)
class Answer:
    """tokens are None where nobody counted them. left_out: the oldest messages, which the context had no room for.

    first: seconds to the first text, None where there was none. seconds: to the end.
    """

    text: str
    end: End
    prompt_tokens: int | None = None
    answer_tokens: int | None = None
    left_out: int = 0
    first: float | None = None
    seconds: float = 0.0

    def notes(self) -> list[str]:
        """What the user must know beside the text."""
        left_out = f"the context is full: the oldest {self.left_out} messages were left out"
        return [left_out] * (self.left_out > 0) + [CUT_OFF.get(self.end, "")] * (self.end in CUT_OFF)


class Model(Protocol):
    """Something that answers: a model on this machine, or an endpoint."""

    @property
    def name(self) -> str: ...

    @property
    def is_chat(self) -> bool:
        """Whether it takes conversations; otherwise it continues the last message as plain text."""

    def answer(self, messages: Sequence[Message], settings: Settings, seed: int, say: Say) -> Answer:
        """Raises LacunaError where there is none, KeyboardInterrupt where the user stops it."""


def ask(model: Model, messages: Sequence[Message], settings: Settings, seed: int, say: Say) -> Answer:
    """The model's answer to a conversation that ends with the user's words, and when it came."""
    start = time.perf_counter()
    first: list[float] = []

    def say_timed(piece: str) -> None:
        first.append(time.perf_counter() - start)
        say(piece)

    answer = model.answer(messages, settings, seed, say_timed)
    seconds = round(time.perf_counter() - start, 4)
    return replace(answer, first=round(first[0], 4) if first else None, seconds=seconds)


def without_oldest(messages: Sequence[Message]) -> list[Message] | None:
    """The conversation without its first turn, the system message kept; None where no other turn is left."""
    kept = [message for message in messages[:1] if message["role"] in ("system", "developer")]
    turns = list(messages[len(kept) :])
    later = next((place for place, message in enumerate(turns) if place and message["role"] == "user"), None)
    return None if later is None else kept + turns[later:]
