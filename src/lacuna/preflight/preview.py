"""What a model will see of data files, and everything in them that would stop a run, found without stopping."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from lacuna.config.training import PretrainConfig, TrainingConfig
from lacuna.data.chat import Renderer
from lacuna.data.documents import (
    Documents,
    Part,
    Pieces,
    Source,
    fit,
    open_source,
    refuse_unread,
    refuse_unusable,
    render,
    training_source,
    validation_source,
)
from lacuna.data.duplicates import Copies, find_copies
from lacuna.data.find import find_files
from lacuna.data.formats import Broken, file_kind, judge_broken
from lacuna.data.loader import check_data_settings, refuse_few_rows
from lacuna.data.packing import count_rows
from lacuna.data.samples import Unusable
from lacuna.data.schemas import Schema, to_examples
from lacuna.data.split import divide
from lacuna.errors import LacunaError

STREAMED_ROWS = 10_000
"""Rows of a stream that are looked at."""
BINS = 8
Result = TypeVar("Result")


@dataclass(frozen=True)
class Token:
    id: int
    token: str
    """As the vocabulary spells it."""
    learned: bool
    special: bool
    """A control token of the tokenizer."""


@dataclass(frozen=True)
class Shown:
    """A piece of a document, as it is trained on."""

    origin: str
    tokens: list[Token]


@dataclass(frozen=True)
class PartPreview:
    """One of the data sets, or the share that is kept for validation."""

    name: str
    format: str
    """Of the files, or that it is a hub data set."""
    schema: str
    """And why it is thought to be this one."""
    unused_columns: list[str]
    documents: int
    """That are used."""
    tokens: int
    targets: int
    """Tokens that are learned from the ones before them."""
    dropped: int
    """Conversations left out for their length."""
    truncated: int
    """Conversations cut off, among those used."""
    empty: int
    broken: int
    """Rows that cannot be read."""
    unusable: dict[str, list[str]]
    """Why documents would teach the wrong thing, and where each of them is."""
    median: int
    longest: int
    """Tokens of a document, before anything is cut."""
    histogram: list[tuple[int, int, int]]
    """Documents with so many tokens: from, to, how many."""
    rows: int | None
    """Packed rows, or samples; None where they cannot be known."""
    fill: float | None
    """Share of packed rows that is tokens; None where nothing is packed."""
    samples: list[Shown]


@dataclass(frozen=True)
class Preview:
    parts: list[PartPreview]
    copies: list[Copies]
    notes: list[str]
    problems: list[str]
    """What would stop a run."""


@dataclass(frozen=True)
class _Reading:
    source: Source
    schema: Schema
    documents: Documents
    broken: int
    empty: int
    unusable: list[Unusable]


class _Collected:
    """Problems that do not stop the look at the rest."""

    def __init__(self) -> None:
        self.problems: list[str] = []
        self.notes: list[str] = []

    def attempt(self, work: Callable[[], Result]) -> Result | None:
        try:
            return work()
        except LacunaError as error:
            self.problems += [problem for problem in error.problems if problem not in self.problems]
            return None


@dataclass(frozen=True)
class _Cut:
    """A data set as it is trained on."""

    reading: _Reading
    part: Part
    dropped: int
    """Documents left out for their length."""


def preview(config: TrainingConfig, renderer: Renderer, files: Sequence[str], samples: int) -> Preview:
    """Look at the config's data, or at files instead: the first as training data, others as held out beside it."""
    found = _Collected()
    config = _with_files(config, files)
    if not files:
        found.attempt(lambda: check_data_settings(config))
    readings = [_read(source, config, renderer, found) for source in _sources(config, files)]
    cut = [_cut(reading, config, found) for reading in readings if reading is not None]
    has_training = readings[0] is not None
    if has_training and config.validation_share:
        cut = _divided(cut[0], config, found)
    copies = find_copies(*(each.part for each in cut)) if has_training else []
    looked_at = [_describe(each, config, renderer, samples) for each in cut]
    rows = looked_at[0].rows if has_training else None
    if rows is not None:
        found.attempt(lambda: refuse_few_rows(config, rows))
    return Preview(looked_at, copies, found.notes, found.problems)


def _with_files(config: TrainingConfig, files: Sequence[str]) -> TrainingConfig:
    """With the first file as training data; with more of them nothing else is held out."""
    if not files:
        return config
    if len(files) == 1:
        return config.model_copy(update={"dataset": files[0]})
    return config.model_copy(update={"dataset": files[0], "validation_dataset": None, "validation_share": None})


def _sources(config: TrainingConfig, files: Sequence[str]) -> list[Source]:
    """The training data, and what is held out beside them."""
    is_stream = isinstance(config, PretrainConfig) and config.streaming
    training = replace(training_source(config), streaming=is_stream)
    if len(files) > 1:
        return [training, *(replace(training, dataset=file, streaming=False) for file in files[1:])]
    validation = validation_source(config)
    return [training] if validation is None else [training, validation]


def _read(source: Source, config: TrainingConfig, renderer: Renderer, found: _Collected) -> _Reading | None:
    """Everything of a data set that can be used; None where nothing can be."""
    opened = found.attempt(lambda: open_source(source, found.notes.append))
    if opened is None:
        return None
    schema, rows = opened
    found.attempt(lambda: refuse_unread(config, schema, source.dataset))
    if source.streaming:
        found.notes.append(f"{source.dataset}: a stream; its first {STREAMED_ROWS:,} rows are looked at")
        rows = islice(rows, STREAMED_ROWS)
    broken: list[Broken] = []
    examples = _set_aside(to_examples(rows, schema), broken)
    documents = found.attempt(lambda: render(examples, renderer, schema.name == "text"))
    if documents is None:
        return None
    total = documents.total + len(broken)
    flag = source.whose.flag("unreadable_share")
    found.attempt(lambda: judge_broken(broken, total, source.unreadable_share, found.notes.append, flag))
    found.attempt(lambda: refuse_unusable(documents, source, found.notes.append))
    if not len(documents):
        return None
    return _Reading(source, schema, documents, len(broken), len(documents.empty), documents.unusable)


def _set_aside(rows: Iterable[Any | Broken], broken: list[Broken]) -> Iterator[Any]:
    for row in rows:
        if isinstance(row, Broken):
            broken.append(row)
        else:
            yield row


def _cut(reading: _Reading, config: TrainingConfig, found: _Collected) -> _Cut:
    """Cut as for training; whole where that would stop the run."""
    documents, name = reading.documents, reading.source.dataset
    pieces = found.attempt(lambda: fit(documents, config, name, found.notes.append))
    if pieces is None:
        pieces = Pieces(np.arange(len(documents)), documents.starts[:-1], documents.starts[1:])
    return _Cut(reading, Part(documents, pieces, name), dropped=len(documents) - len(pieces.used))


def _divided(cut: _Cut, config: TrainingConfig, found: _Collected) -> list[_Cut]:
    """What is left to train on, and the share that is held out, which counts nothing a second time."""
    parts = found.attempt(lambda: divide(cut.part, config))
    if parts is None:
        return [cut]
    kept, held_out = parts
    without_losses = replace(cut.reading, broken=0, empty=0, unusable=[])
    return [replace(cut, part=kept), _Cut(without_losses, held_out, dropped=0)]


def _describe(cut: _Cut, config: TrainingConfig, renderer: Renderer, samples: int) -> PartPreview:
    part, reading = cut.part, cut.reading
    documents, pieces = part.documents, part.pieces
    used, lengths = pieces.used, pieces.lengths
    whole = documents.lengths[used] if len(used) else documents.lengths
    rows = None if reading.source.streaming else _count_rows(lengths, config)
    tokens = int(lengths.sum())
    unusable: dict[str, list[str]] = {}
    for item in reading.unusable:
        unusable.setdefault(item.kind, []).append(item.origin)
    return PartPreview(
        name=part.name,
        format=_format(reading.source),
        schema=reading.schema.reason,
        unused_columns=reading.schema.unused_columns,
        documents=len(used),
        tokens=tokens,
        targets=int(documents.targets(pieces).sum()),
        dropped=cut.dropped,
        truncated=0 if documents.is_text else int((lengths < documents.lengths[pieces.documents]).sum()),
        empty=reading.empty,
        broken=reading.broken,
        unusable=unusable,
        median=int(np.median(whole)),
        longest=int(whole.max()),
        histogram=histogram(whole),
        rows=rows,
        fill=tokens / (rows * config.sequence_length) if rows and config.packs_rows else None,
        samples=[_shown(part, piece, renderer) for piece in spread(len(lengths), samples)],
    )


def _count_rows(lengths: NDArray[np.int64], config: TrainingConfig) -> int | None:
    """Rows that pieces of these lengths fill; None where one of them fits in no row."""
    if int(lengths.max()) > config.sequence_length:
        return None
    return count_rows(lengths, config.sequence_length) if config.packs_rows else len(lengths)


def _format(source: Source) -> str:
    files = find_files(source.dataset, source.kind, source.split)
    if files is None:
        return "hub data set"
    reason = "by its ending" if source.kind == "auto" else "given"
    return f"{file_kind(files[0], source.kind)} ({reason})"


def spread(count: int, wanted: int) -> list[int]:
    """At most so many of the numbers 0 … count - 1, evenly over them."""
    wanted = min(wanted, count)
    return [(2 * index + 1) * count // (2 * wanted) for index in range(wanted)]


def histogram(lengths: NDArray[np.int64]) -> list[tuple[int, int, int]]:
    """Bins of one round width over all but the longest hundredth, which the last bin holds."""
    shortest, usual, longest = (int(np.quantile(lengths, share, method="higher")) for share in (0, 0.99, 1))
    needed = -(-(usual - shortest + 1) // BINS)
    round_numbers = (size * 10**power for power in range(20) for size in (1, 2, 5))
    width = next(number for number in round_numbers if number >= needed)
    first, last = (shortest - 1) // width, (usual - 1) // width
    counts = np.bincount(np.minimum((lengths - 1) // width, last) - first).tolist()
    bins = []
    for number, count in enumerate(counts, start=first):
        bins.append((number * width + 1, (number + 1) * width, count))
    start, end, count = bins[-1]
    return [*bins[:-1], (start, max(end, longest), count)]


def _shown(part: Part, piece: int, renderer: Renderer) -> Shown:
    documents, pieces = part.documents, part.pieces
    span = slice(pieces.starts[piece], pieces.ends[piece])
    ids, learned = documents.tokens[span].tolist(), documents.supervised[span].tolist()
    learned[:1] = [False]
    spelled = renderer.tokenizer.convert_ids_to_tokens(ids)
    control = set(renderer.control_tokens)
    tokens = [
        Token(id, token, is_learned, token in control)
        for id, token, is_learned in zip(ids, spelled, learned, strict=True)
    ]
    return Shown(documents.origins[pieces.documents[piece]], tokens)
