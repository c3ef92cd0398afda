"""What torchtune prints and logs of a run, as lacuna's metrics. Nothing here imports torch."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

NAMES = {"lr": "learning_rate", "grad_norm": "gradient_norm", "peak_memory_alloc": "peak_memory_gib"}
"""torchtune's names and ours; what has none here keeps torchtune's."""
PER_DEVICE = "tokens_per_second_per_gpu"
LINE = re.compile(r"Step (\d+) \| (.*)\n")
BAR = re.compile(r"(?:\d+\|(\d+)\|Loss: ([^\s:|]+):\s+)?\d+%\|[^|\r\n]*\| *(\d+)/(\d+) \[")
SEED = re.compile(r"Setting manual seed to local seed (\d+)\.")


@dataclass(frozen=True)
class Bar:
    """A state of the progress bar. step: over all epochs; None before the first one. done: in this epoch."""

    step: int | None
    loss: float | None
    done: int
    steps_per_epoch: int


def parse_lines(text: str, devices: int) -> Iterator[tuple[int, dict[str, float]]]:
    """(step, values) of each whole line of torchtune's loggers to disk and to standard output."""
    for step, rest in LINE.findall(text):
        pairs = (pair.partition(":") for pair in rest.split())
        values = {name: number for name, _, value in pairs if (number := _number(value)) is not None}
        if PER_DEVICE in values:
            values["tokens_per_second"] = values.pop(PER_DEVICE) * devices
        yield int(step), {NAMES.get(name, name): value for name, value in values.items()}


def parse_bars(text: str) -> Iterator[Bar]:
    """Each state of the progress bar, whose end is in the text."""
    for step, loss, done, total in BAR.findall(text):
        yield Bar(int(step) if step else None, _number(loss), int(done), int(total))


def seed_in(text: str) -> int | None:
    """What torchtune says it draws by."""
    found = SEED.search(text)
    return int(found[1]) if found else None


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
