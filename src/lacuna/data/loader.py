"""From a config's data settings to batches, with a position that restarts the same sequence exactly.

The order is a pure function of (seed, epoch): the position is two integers. stream.py is for data too large for memory.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lacuna.config.training import TrainingConfig
from lacuna.data.chat import Renderer
from lacuna.data.documents import (
    Documents,
    Part,
    Report,
    Source,
    fit,
    open_source,
    read_documents,
    refuse_unread,
    training_source,
    validation_source,
)
from lacuna.data.duplicates import find_copies
from lacuna.data.find import find_files
from lacuna.data.packing import pack
from lacuna.data.samples import Sample
from lacuna.data.split import PREPARATION, divide, row_order
from lacuna.errors import DataError, LacunaError

COUNTED = 1024
"""Documents whose targets are counted together."""
PackedRow = list[Sample]
Position = dict[str, Any]


@dataclass(frozen=True)
class PackedRows:
    """Documents in memory, and which of them share a row."""

    tokens: NDArray[np.int32]
    """[tokens] all documents one after another."""
    supervised: NDArray[np.bool_]
    """[tokens] whether a token is one to learn."""
    starts: NDArray[np.int64]
    """[documents + 1] where each document starts."""
    members: NDArray[np.int64]
    """[documents] document numbers, those of one row together."""
    row_starts: NDArray[np.int64]
    """[rows + 1] where each row starts in members."""

    def __len__(self) -> int:
        return len(self.row_starts) - 1

    def row(self, index: int) -> PackedRow:
        documents = self.members[self.row_starts[index] : self.row_starts[index + 1]]
        spans = [slice(self.starts[document], self.starts[document + 1]) for document in documents]
        return [Sample(self.tokens[span], self.supervised[span]) for span in spans]

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """[rows] tokens of each row."""
        return self._over_rows(np.diff(self.starts))

    @cached_property
    def targets(self) -> NDArray[np.int64]:
        """[rows] tokens of each row that are learned from the ones before them: a document's first never is."""
        documents = len(self.starts) - 1
        counted = [self._targets_of(first, min(first + COUNTED, documents)) for first in range(0, documents, COUNTED)]
        return self._over_rows(np.concatenate([np.empty(0, dtype=np.int64), *counted]))

    def _targets_of(self, first: int, last: int) -> NDArray[np.int64]:
        """[last - first] targets of these documents."""
        starts = self.starts[first : last + 1] - self.starts[first]
        before = np.cumsum(self.supervised[self.starts[first] : self.starts[last]], dtype=np.int64)
        targets: NDArray[np.int64] = before[starts[1:] - 1] - before[starts[:-1]]
        return targets

    def _over_rows(self, of_documents: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.add.reduceat(of_documents[self.members], self.row_starts[:-1]) if len(self) else of_documents

    def fingerprint(self) -> str:
        """SHA-256 of what will be trained on, packing included."""
        digest = hashlib.sha256()
        for array in (self.tokens, self.supervised, self.starts, self.members, self.row_starts):
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()


Place = tuple[PackedRows, int]
"""A row by its number."""


@dataclass(frozen=True)
class Batch:
    """Where the rows of one optimizer step are, of which a process takes its own, and the position after it."""

    places: list[Place]
    position: Position

    @property
    def rows(self) -> list[PackedRow]:
        return [packed.row(index) for packed, index in self.places]

    @property
    def tokens(self) -> int:
        return sum(int(packed.lengths[index]) for packed, index in self.places)

    @property
    def targets(self) -> int:
        """Tokens that are learned from the ones before them."""
        return sum(int(packed.targets[index]) for packed, index in self.places)


def pack_samples(samples: Sequence[Sample], sequence_length: int, packing: bool) -> PackedRows:
    """Put samples of at most sequence_length tokens into rows: packed, or one in each."""
    return _packed(
        np.concatenate([sample.tokens for sample in samples] or [np.empty(0, dtype=np.int32)]),
        np.concatenate([sample.supervised for sample in samples] or [np.empty(0, dtype=np.bool_)]),
        np.array([len(sample.tokens) for sample in samples], dtype=np.int64),
        sequence_length,
        packing,
    )


def pack_part(part: Part, config: TrainingConfig) -> PackedRows:
    """Put pieces into rows: packed, or one in each."""
    documents, pieces = part.documents, part.pieces
    spans = [slice(start, end) for start, end in zip(pieces.starts.tolist(), pieces.ends.tolist(), strict=True)]
    return _packed(
        np.concatenate([documents.tokens[span] for span in spans]),
        np.concatenate([documents.supervised[span] for span in spans]),
        pieces.lengths,
        config.sequence_length,
        config.packs_rows,
    )


def _packed(
    tokens: NDArray[np.int32], supervised: NDArray[np.bool_], lengths: NDArray[np.int64], capacity: int, packing: bool
) -> PackedRows:
    row_of = pack(lengths, capacity) if packing else np.arange(len(lengths))
    members = np.argsort(row_of, kind="stable")
    rows = int(row_of.max()) + 1 if len(lengths) else 0
    return PackedRows(
        tokens=tokens,
        supervised=supervised,
        starts=np.concatenate([[0], np.cumsum(lengths)]),
        members=members,
        row_starts=np.searchsorted(row_of[members], np.arange(rows + 1)),
    )


def batches(
    rows: PackedRows, batch_size: int, seed: int, position: Position | None, total_rows: int | None = None
) -> Iterator[Batch]:
    """Batches, each epoch in an order of its own; a batch may span two epochs.

    total_rows: end after so many rows since the start of the run, with a short batch if they do not divide evenly;
    None goes on for ever.
    """
    epoch, used = (position["epoch"], position["row"]) if position else (0, 0)
    batch: list[Place] = []
    while total_rows is None or epoch * len(rows) + used < total_rows:
        for index in row_order(seed, epoch, len(rows))[used:].tolist():
            batch.append((rows, index))
            used += 1
            if len(batch) == batch_size or epoch * len(rows) + used == total_rows:
                yield Batch(batch, {"epoch": epoch, "row": used})
                batch = []
                if epoch * len(rows) + used == total_rows:
                    return
        epoch, used = epoch + 1, 0


def load_rows(
    config: TrainingConfig, renderer: Renderer, report: Report, preparation: str = PREPARATION,
    devices: int | None = None,
) -> tuple[PackedRows, PackedRows | None]:  # fmt: skip
    """Read, render, check, split and pack all data of a config: training rows and validation rows.

    preparation: the version by which the run was begun. devices: if not gpus.
    Raises DataError with what is wrong in which file and line.
    """

    def documents_of(source: Source) -> Documents:
        schema, rows = open_source(source, report)
        refuse_unread(config, schema, source.dataset)
        return read_documents(source, schema, rows, renderer, report)

    training, validation = make_parts(config, documents_of, report, preparation)
    for copies in find_copies(training, *([] if validation is None else [validation])):
        report(str(copies))
    rows = pack_part(training, config)
    _describe(rows, training.name, config.sequence_length, report)
    refuse_few_rows(config, len(rows), devices)
    if validation is None:
        return rows, None
    validation_rows = pack_part(validation, config)
    _describe(validation_rows, validation.name, config.sequence_length, report)
    return rows, validation_rows


def make_parts(
    config: TrainingConfig,
    documents_of: Callable[[Source], Documents],
    report: Report,
    preparation: str = PREPARATION,
) -> tuple[Part, Part | None]:
    """What is trained on and what is held out, cut to the config's lengths but not packed. Raises DataError."""
    documents = documents_of(training_source(config))
    training = Part(documents, fit(documents, config, config.dataset, report), config.dataset)
    if config.validation_share:
        return divide(training, config, preparation)
    if (source := validation_source(config)) is None:
        return training, None
    held_out = documents_of(source)
    return training, Part(held_out, fit(held_out, config, source.dataset, report), source.dataset)


def refuse_few_rows(config: TrainingConfig, rows: int, devices: int | None = None) -> None:
    """Raise DataError where the data do not fill one batch. devices: if not gpus."""
    wanted = config.rows_in_step(devices)
    if wanted > rows and not config.packs_rows:
        raise DataError(
            f"{config.dataset}: {config.spelled('batch_size')} is {wanted} samples, but there are only "
            f"{rows}: lower {config.flag('batch_size')}"
        )
    if wanted > rows:
        raise DataError(
            f"{config.dataset}: {config.spelled('batch_size')} is {wanted} rows, but the data fill only "
            f"{rows} of {config.sequence_length} tokens: lower {config.flag('batch_size')} or "
            f"{config.flag('sequence_length')}"
        )


def _describe(rows: PackedRows, name: str, sequence_length: int, report: Report) -> None:
    tokens, documents = len(rows.tokens), len(rows.starts) - 1
    in_rows = f", {len(rows):,} rows of {sequence_length} ({tokens / (len(rows) * sequence_length):.1%} full)"
    report(
        f"{name}: {documents:,} documents, {tokens:,} tokens ({rows.supervised.mean():.0%} learned)"
        f"{in_rows if len(rows) < documents else ''}"
    )


def check_data_settings(config: TrainingConfig) -> None:
    """Settings that the data, being files or a hub data set, do not read are refused, before anything is loaded."""
    problems: list[str] = []
    places = [(config.dataset, "dataset_split", config.dataset_split)]
    if config.validation_dataset is not None:
        places.append((config.validation_dataset, "validation_split", config.validation_split))
    for dataset, setting, split in places:
        try:
            files = find_files(dataset, config.dataset_format, split)
        except LacunaError as error:
            problems += error.problems
            continue
        if files is None:
            if config.changed_from_default("dataset_format"):
                name = config.spelled("dataset_format")
                problems.append(f"{name} is for files, but {dataset} is a hub data set")
            continue
        if setting == "dataset_split" and config.changed_from_default("dataset_subset"):
            name = config.spelled("dataset_subset")
            problems.append(f"{name} is for hub data sets, but {dataset} is a file or folder")
        if not Path(dataset).expanduser().is_dir() and config.changed_from_default(setting):
            name = config.spelled(setting)
            problems.append(f"{name} is for hub data sets and folders, but {dataset} is a file")
    if problems:
        raise DataError(problems)
