"""What every model that can be talked to takes and gives. Nothing here imports torch."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Protocol

from pydantic import BaseModel, ConfigDict, Field

from lacuna.data.formats import Message

Say = Callable[[str], None]
"""Takes each piece of an answer's text as it comes; the pieces make up the text."""
End = Literal["stop", "max_tokens", "context", "interrupted"]
"""Why an answer ended: the model ended it, or what cut it off."""
CUT_OFF = {
    "max_tokens": "cut off after --max-tokens",
    "context": "cut off: the context is full",
    "interrupted": "stopped",
}


class Settings(BaseModel):
    """How answers are drawn."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)

    temperature: Annotated[float, Field(ge=0, le=10)] = 0.7
    """0 takes the likeliest token every time."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Draw among the likeliest tokens that make up this share."""
    max_tokens: Annotated[int, Field(gt=0)] = 512
    """Longest answer, in tokens."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """The same seed gives the same answer to the same conversation."""


@dataclass(frozen=True)
class Reply:
    """tokens are None where an endpoint does not count them. left_out: messages that the context had no room for."""

    text: str
    end: End
    prompt_tokens: int | None
    answer_tokens: int | None
    left_out: int = 0


@dataclass(frozen=True)
class Answer:
    """A reply and when it came. first: seconds to its first text, None where there was none."""

    reply: Reply
    first: float | None
    seconds: float

    def facts(self) -> dict[str, Any]:
        """For a line of JSON."""
        return {
            "answer": self.reply.text,
            "end": self.reply.end,
            "prompt_tokens": self.reply.prompt_tokens,
            "answer_tokens": self.reply.answer_tokens,
            "left_out": self.reply.left_out,
            "seconds_to_first": None if self.first is None else round(self.first, 4),
            "seconds": round(self.seconds, 4),
        }


class Model(Protocol):
    """Something that answers: a model on this machine, or an endpoint."""

    @property
    def name(self) -> str: ...

    @property
    def is_chat(self) -> bool:
        """Whether it takes conversations; otherwise it continues the last message as plain text."""

    def reply(self, messages: Sequence[Message], settings: Settings, seed: int, say: Say) -> Reply:
        """Raises LacunaError where there is no answer, KeyboardInterrupt where the user stops it."""


def ask(model: Model, messages: Sequence[Message], settings: Settings, seed: int, say: Say) -> Answer:
    """The model's answer to a conversation that ends with the user's words."""
    start = time.perf_counter()
    first: list[float] = []

    def say_timed(piece: str) -> None:
        first.append(time.perf_counter() - start) if not first else None
        say(piece)

    reply = model.reply(messages, settings, seed, say_timed)
    return Answer(reply, first[0] if first else None, time.perf_counter() - start)


def notes(reply: Reply) -> list[str]:
    """What the user must know beside the text."""
    found = [f"the context is full: the oldest {reply.left_out} messages were left out"] if reply.left_out else []
    return found + ([CUT_OFF[reply.end]] if reply.end in CUT_OFF else [])


def without_oldest(messages: Sequence[Message]) -> list[Message] | None:
    """The conversation without its first turn, the system message kept; None where no other turn is left."""
    kept = [message for message in messages[:1] if message["role"] in ("system", "developer")]
    turns = list(messages[len(kept) :])
    later = next((place for place, message in enumerate(turns) if place and message["role"] == "user"), None)
    return None if later is None else kept + turns[later:]
