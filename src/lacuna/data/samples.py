"""What becomes of a conversation or a text: tokens to learn, or why they would teach the wrong thing."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lacuna.data.formats import SHOWN_PROBLEMS
from lacuna.errors import DataError

EMPTY_TEXT = "empty text"
EARLIER_THOUGHTS = "the template does not write the thoughts of earlier turns; these turns are not learned"
ADVICE = {
    "nothing to learn": "no assistant message with text in it (or all have weight 0); leave them out",
    "everything is learned": "the mask covers the prompt too; check the chat template's generation marks",
    "doubled BOS": "the text begins with the BOS token that the tokenizer adds too; remove one",
    "no end of turn": "the model would never learn to stop; the template must write its end-of-turn token after the "
    "assistant's words, and inside its generation marks where it has them",
    "control tokens in the text": "they would steer the model as if the template had written them; remove them",
    "refused by the template": "the chat template does not accept this sequence of messages",
    "left out by the template": "the chat template does not write this message, so the model would never see it; "
    "remove it, or pass a template that writes it",
    "assistant's words not found": "the template rewrites what the assistant says; put {% generation %} marks into it "
    "and pass it",
}
BY_A_TEMPLATE = {"left out by the template", "assistant's words not found"}
"""Kinds that another template mends."""
TEMPLATE_FLAG = "--chat-template"


@dataclass(frozen=True)
class Sample:
    """tokens: [length] ids; supervised: [length] whether the token is one that the model must learn to say."""

    tokens: NDArray[np.int32]
    supervised: NDArray[np.bool_]
    note: str = ""
    """What is to be said of it, with the number of samples of which it is true."""


@dataclass(frozen=True)
class Unusable:
    """A sample that would teach the wrong thing."""

    kind: str
    origin: str
    detail: str = ""


def stop_on_unusable(unusable: Sequence[Unusable], total: int, template_flag: str = TEMPLATE_FLAG) -> None:
    """Raise one DataError that counts every kind and names the first sample of each."""
    problems = []
    for kind in dict.fromkeys(item.kind for item in unusable):
        found = [item for item in unusable if item.kind == kind]
        detail = f" ({found[0].detail})" if found[0].detail else ""
        others = f" (also {', '.join(item.origin for item in found[1:SHOWN_PROBLEMS])})" if found[1:] else ""
        advice = f"{ADVICE[kind]} with {template_flag}" if kind in BY_A_TEMPLATE else ADVICE[kind]
        problems.append(f"{found[0].origin}: {kind}{detail}; {len(found)} of {total} samples{others}: {advice}")
    if problems:
        raise DataError(problems)


Spans = list[tuple[int, int]]
"""[start, end) characters of a text."""


@dataclass(frozen=True)
class Rendered:
    """spans: that the assistant says, of those turns that are learned. note: see Sample."""

    text: str
    spans: Spans
    note: str
