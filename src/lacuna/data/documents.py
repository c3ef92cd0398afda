"""A data set as documents of tokens, each of them whole, and the pieces of them that are trained on."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lacuna.config.training import SFTConfig, TrainingConfig
from lacuna.data.chat import Renderer
from lacuna.data.find import find_files, say_left_out
from lacuna.data.formats import Broken, Example, Row, peek, read_file, within_limit
from lacuna.data.hub import hub_rows
from lacuna.data.samples import EMPTY_TEXT, Sample, Unusable, stop_on_unusable
from lacuna.data.schemas import Schema, detect_schema, to_examples
from lacuna.errors import DataError

Report = Callable[[str], None]


@dataclass(frozen=True)
class Source:
    """What decides the documents of a data set, besides the tokenizer and its chat template."""

    dataset: str
    split: str
    kind: str
    subset: str | None
    schema: str
    text_column: str
    unreadable_share: float
    whose: type[TrainingConfig] = TrainingConfig
    """The kind of config, by whose spelling messages name settings."""
    streaming: bool = False
    """Of a hub data set: read what is asked for, instead of downloading all of it."""


def training_source(config: TrainingConfig) -> Source:
    return _source(config, config.dataset, config.dataset_split)


def validation_source(config: TrainingConfig) -> Source | None:
    """None where there is no validation, or only a share of the training data."""
    if config.validation_dataset is None:
        return None
    return _source(config, config.validation_dataset, config.validation_split)


def _source(config: TrainingConfig, dataset: str, split: str) -> Source:
    schema = config.dataset_schema if isinstance(config, SFTConfig) else "text"
    return Source(
        dataset, split, config.dataset_format, config.dataset_subset, schema, config.text_column,
        config.unreadable_share, type(config),
    )  # fmt: skip


@dataclass(frozen=True)
class Documents:
    """All that a data set holds, rendered."""

    is_text: bool
    """Plain texts, no conversations."""
    tokens: NDArray[np.int32]
    """[tokens] all documents one after another."""
    supervised: NDArray[np.bool_]
    """[tokens] whether a token is one to learn."""
    starts: NDArray[np.int64]
    """[documents + 1] where each document starts."""
    origins: list[str]
    """[documents] `file:line` of each."""
    empty: list[Unusable]
    unusable: list[Unusable]
    total: int
    """Documents, with those that are empty or unusable."""
    notes: dict[str, list[str]] = field(default_factory=dict)
    """What is to be said of some documents, with the origin of each."""

    def __len__(self) -> int:
        return len(self.origins)

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """[documents] tokens of each."""
        return np.diff(self.starts)

    @cached_property
    def _supervised_before(self) -> NDArray[Any]:
        size = np.int32 if len(self.tokens) < 2**31 else np.int64
        return np.cumsum(np.concatenate([[False], self.supervised]), dtype=size)

    def targets(self, pieces: "Pieces") -> NDArray[np.int64]:
        """[pieces] tokens of each that are learned from the ones before them: its first never is."""
        before = self._supervised_before
        targets: NDArray[np.int64] = before[pieces.ends] - before[pieces.starts + 1]
        return targets.astype(np.int64)


@dataclass(frozen=True)
class Pieces:
    """Documents as they are trained on: whole, cut off, or cut into several."""

    documents: NDArray[np.int64]
    """[pieces] which document each is of, ascending."""
    starts: NDArray[np.int64]
    """[pieces] where each starts among the tokens of all documents."""
    ends: NDArray[np.int64]

    @property
    def lengths(self) -> NDArray[np.int64]:
        return self.ends - self.starts

    @property
    def used(self) -> NDArray[np.int64]:
        """[used] the documents that have a piece, ascending."""
        return self.documents[np.diff(self.documents, prepend=-1) > 0]

    def where(self, kept: NDArray[np.bool_]) -> "Pieces":
        """kept: [pieces]"""
        return Pieces(self.documents[kept], self.starts[kept], self.ends[kept])


@dataclass(frozen=True)
class Part:
    """What is trained on, or what is held out."""

    documents: Documents
    pieces: Pieces
    name: str


def open_source(source: Source, report: Report) -> tuple[Schema, Iterator[Row | Broken]]:
    """The schema, found from the first rows, and all rows. Raises DataError where there is no row that can be used."""
    dataset, kind = source.dataset, source.kind
    files = find_files(dataset, kind, source.split)
    if files is not None:
        say_left_out(dataset, kind, source.split, report)
        rows: Iterator[Row | Broken] = (row for file in files for row in read_file(file, kind))
    else:
        rows = (row for row, _ in hub_rows(source.subset, dataset, source.split, None, source.streaming))
    first, rows = peek(rows)
    if not first:
        list(within_limit(rows, source.unreadable_share, report, flag=source.whose.flag("unreadable_share")))
        raise DataError(f"{dataset}: there are no rows in it")
    return detect_schema(first, source.schema, source.text_column, dataset), rows


def refuse_unread(config: TrainingConfig, schema: Schema, where: str) -> None:
    """Raise DataError for settings that data of this schema do not read."""
    for_the_other = ["text_column"] if schema.name != "text" else ["chat_template", "too_long"]
    if given := config.changed_from_default(*(name for name in for_the_other if name in type(config).model_fields)):
        names = ", ".join(map(config.spelled, given))
        raise DataError(f"{where}: {names} would have no effect, because the data's schema is {schema.reason}")


def render(examples: Iterable[Example], renderer: Renderer, is_text: bool) -> Documents:
    """Render and tokenise everything; what cannot be trained on is kept apart."""
    examples = iter(examples)
    tokens: list[NDArray[np.int32]] = [np.empty(0, dtype=np.int32)]
    supervised: list[NDArray[np.bool_]] = [np.empty(0, dtype=np.bool_)]
    origins: list[str] = []
    empty: list[Unusable] = []
    unusable: list[Unusable] = []
    notes: dict[str, list[str]] = {}
    total = 0
    while chunk := list(islice(examples, 1000)):
        total += len(chunk)
        found: list[Sample] = []
        for example, result in zip(chunk, renderer.examples(chunk), strict=True):
            if isinstance(result, Sample):
                found.append(result)
                origins.append(example.origin)
                if result.note:
                    notes.setdefault(result.note, []).append(example.origin)
            else:
                (empty if result.kind == EMPTY_TEXT else unusable).append(result)
        tokens += [sample.tokens for sample in found]
        supervised += [sample.supervised for sample in found]
    starts = np.cumsum([len(part) for part in tokens], dtype=np.int64)
    return Documents(
        is_text, np.concatenate(tokens), np.concatenate(supervised), starts, origins, empty, unusable, total, notes
    )


def refuse_unusable(documents: Documents, source: Source, report: Report) -> None:
    """Raise DataError for documents that would teach the wrong thing, or where there are none; empty ones are said."""
    stop_on_unusable(documents.unusable, documents.total, source.whose.flag("chat_template"))
    if not len(documents):
        raise DataError(f"{source.dataset}: all {documents.total} texts in it are empty")
    for note, origins in documents.notes.items():
        of_all = f"{len(origins):,} of {documents.total:,} conversations"
        report(f"{source.dataset}: {of_all}: {note}; the first: {origins[0]}")
    if empty := documents.empty:
        report(f"{len(empty)} of {documents.total} texts are empty and left out; the first: {empty[0].origin}")


def read_documents(
    source: Source, schema: Schema, rows: Iterator[Row | Broken], renderer: Renderer, report: Report
) -> Documents:
    """Read, check and render an opened data set. Raises DataError with what is wrong in which file and line."""
    unused = f"; columns not used: {', '.join(schema.unused_columns)}" if schema.unused_columns else ""
    report(f"{source.dataset}: schema {schema.reason}{unused}")
    flag = source.whose.flag("unreadable_share")
    examples = within_limit(to_examples(rows, schema), source.unreadable_share, report, flag=flag)
    documents = render(examples, renderer, schema.name == "text")
    refuse_unusable(documents, source, report)
    return documents


def cut_texts(lengths: NDArray[np.int64], limit: int) -> Pieces:
    """Texts, one after another, in pieces of at most limit tokens; a last piece of one token has nothing to predict
    and is left out."""
    counts = np.maximum(-((1 - lengths) // limit), 0)
    documents = np.repeat(np.arange(len(lengths)), counts)
    number = np.arange(len(documents)) - np.repeat(np.cumsum(counts) - counts, counts)
    ends = np.cumsum(lengths)
    starts = (ends - lengths)[documents] + number * limit
    return Pieces(documents, starts, np.minimum(starts + limit, ends[documents]))


def pieces(sample: Sample, limit: int) -> list[Sample]:
    """One text, cut as cut_texts does."""
    cut = cut_texts(np.array([len(sample.tokens)]), limit)
    spans = [slice(start, end) for start, end in zip(cut.starts, cut.ends, strict=True)]
    return [Sample(sample.tokens[span], sample.supervised[span]) for span in spans]


def fit(documents: Documents, config: TrainingConfig, name: str, report: Report) -> Pieces:
    """Texts are cut into pieces of sequence_length; for conversations, too_long decides. Raises DataError."""
    limit, lengths = config.sequence_length, documents.lengths
    if documents.is_text or not isinstance(config, SFTConfig):
        return cut_texts(lengths, limit)
    whole = Pieces(np.arange(len(documents)), documents.starts[:-1], documents.starts[1:])
    too_long = lengths > limit
    count = int(np.count_nonzero(too_long))
    if not count:
        return whole
    longer = f"longer than {config.spelled('sequence_length')} {limit}"
    found = f"{name}: {count:,} of {len(documents):,} conversations are {longer}"
    found += f" (the longest has {int(lengths.max()):,} tokens)"
    if config.too_long == "stop":
        raise DataError(
            f"{found}: raise {config.flag('sequence_length')}, or choose {config.flag('too_long')} drop or truncate"
        )
    if config.too_long == "truncate":
        cut = Pieces(whole.documents, whole.starts, np.minimum(whole.ends, whole.starts + limit))
        kept = cut.where(documents.targets(cut) > 0)
        lost = len(documents) - len(kept.documents)
        report(f"{found}: cut off; {lost:,} of them had nothing left to learn and are left out")
    else:
        kept = whole.where(~too_long)
        report(f"{found}: left out ({config.spelled('too_long')} = 'drop')")
    if not len(kept.documents):
        raise DataError(f"{found}: nothing is left to train on; raise {config.flag('sequence_length')}")
    return kept
