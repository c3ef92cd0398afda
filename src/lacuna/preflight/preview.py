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


def preview(config: TrainingConfig, renderer: Renderer, files: Sequence[str], samples: int) -> Preview:
    """Look at the config's data, or at files instead: the first as training data, others as held out beside it."""
    found = _Collected()
    if files:
        config = config.model_copy(update={"dataset": files[0]})
    if len(files) > 1:
        config = config.model_copy(update={"validation_dataset": None, "validation_share": None})
        others: list[Source | None] = [replace(training_source(config), dataset=file) for file in files[1:]]
    else:
        if not files:
            found.attempt(lambda: check_data_settings(config))
        others = [validation_source(config)]
    is_stream = isinstance(config, PretrainConfig) and config.streaming
    training = _read(replace(training_source(config), streaming=is_stream), config, renderer, found)
    readings = [training, *(_read(source, config, renderer, found) for source in others if source is not None)]
    parts = [(_part(reading, config, found), reading) for reading in readings if reading is not None]
    dropped = [len(part.documents) - len(part.pieces.used) for part, _ in parts]
    if config.validation_share and training is not None:
        undivided = parts[0][0]
        if (divided := found.attempt(lambda: divide(undivided, config))) is not None:
            kept, held_out = divided
            parts = [(kept, training), (held_out, replace(training, broken=0, empty=0, unusable=[]))]
            dropped.append(0)
    copies = find_copies(*(part for part, _ in parts)) if training is not None else []
    looked_at = [
        _describe(part, reading, left_out, config, renderer, samples)
        for (part, reading), left_out in zip(parts, dropped, strict=True)
    ]
    if training is not None and (rows := looked_at[0].rows) is not None:
        found.attempt(lambda: refuse_few_rows(config, rows))
    return Preview(looked_at, copies, found.notes, found.problems)


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


def _part(reading: _Reading, config: TrainingConfig, found: _Collected) -> Part:
    """Cut as for training; whole where that would stop the run."""
    documents, name = reading.documents, reading.source.dataset
    pieces = found.attempt(lambda: fit(documents, config, name, found.notes.append))
    whole = Pieces(np.arange(len(documents)), documents.starts[:-1], documents.starts[1:])
    return Part(documents, whole if pieces is None else pieces, name)


def _describe(
    part: Part, reading: _Reading, dropped: int, config: TrainingConfig, renderer: Renderer, samples: int
) -> PartPreview:
    documents, pieces = part.documents, part.pieces
    used, lengths = pieces.used, pieces.lengths
    whole = documents.lengths[used] if len(used) else documents.lengths
    can_pack = int(lengths.max()) <= config.sequence_length and not reading.source.streaming
    rows = (count_rows(lengths, config.sequence_length) if config.packs_rows else len(lengths)) if can_pack else None
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
        dropped=dropped,
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


def _format(source: Source) -> str:
    files = find_files(source.dataset, source.kind, source.split)
    if files is None:
        return "hub data set"
    return f"{file_kind(files[0], source.kind)} ({'by its ending' if source.kind == 'auto' else 'given'})"


def spread(count: int, wanted: int) -> list[int]:
    """At most so many of the numbers 0 … count - 1, evenly over them."""
    wanted = min(wanted, count)
    return [(2 * index + 1) * count // (2 * wanted) for index in range(wanted)]


def histogram(lengths: NDArray[np.int64]) -> list[tuple[int, int, int]]:
    """Bins of one round width over all but the longest hundredth, which the last bin holds."""
    shortest, usual, longest = (int(np.quantile(lengths, share, method="higher")) for share in (0, 0.99, 1))
    needed = -(-(usual - shortest + 1) // BINS)
    width = next(size * 10**power for power in range(20) for size in (1, 2, 5) if size * 10**power >= needed)
    first, last = (shortest - 1) // width, (usual - 1) // width
    counts = np.bincount(np.minimum((lengths - 1) // width, last) - first).tolist()
    ends = [*((first + number + 1) * width for number in range(len(counts) - 1)), max((last + 1) * width, longest)]
    return [
        ((first + number) * width + 1, end, count) for number, (end, count) in enumerate(zip(ends, counts, strict=True))
    ]


def _shown(part: Part, piece: int, renderer: Renderer) -> Shown:
    documents, pieces = part.documents, part.pieces
    span = slice(pieces.starts[piece], pieces.ends[piece])
    ids, learned = documents.tokens[span].tolist(), documents.supervised[span].tolist()
    learned[:1] = [False]
    spelled = renderer.tokenizer.convert_ids_to_tokens(ids)
    control = set(renderer.control_tokens)
    return Shown(
        documents.origins[pieces.documents[piece]],
        [
            Token(id, token, is_learned, token in control)
            for id, token, is_learned in zip(ids, spelled, learned, strict=True)
        ],
    )
