"""From a config's data settings to batches, with a position that restarts the same sequence exactly.

The order is a pure function of (seed, epoch): the position is two integers. stream.py is for data too large for memory.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lacuna.config.training import SFTConfig, TrainingConfig
from lacuna.data.chat import EMPTY_TEXT, Renderer, Sample, Unusable, stop_on_unusable
from lacuna.data.formats import (
    Broken,
    Row,
    find_files,
    peek,
    read_file,
    within_limit,
)
from lacuna.data.hub import hub_rows
from lacuna.data.packing import pack
from lacuna.data.schemas import Schema, detect_schema, to_examples
from lacuna.errors import DataError, LacunaError

COUNTED = 1024
"""Documents whose targets are counted together."""
PackedRow = list[Sample]
Position = dict[str, Any]
Report = Callable[[str], None]


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
    lengths = np.array([len(sample.tokens) for sample in samples], dtype=np.int64)
    row_of = pack(lengths, sequence_length) if packing else np.arange(len(samples))
    members = np.argsort(row_of, kind="stable")
    rows = int(row_of.max()) + 1 if len(samples) else 0
    return PackedRows(
        tokens=np.concatenate([sample.tokens for sample in samples] or [np.empty(0, dtype=np.int32)]),
        supervised=np.concatenate([sample.supervised for sample in samples] or [np.empty(0, dtype=np.bool_)]),
        starts=np.concatenate([[0], np.cumsum(lengths)]),
        members=members,
        row_starts=np.searchsorted(row_of[members], np.arange(rows + 1)),
    )


def row_order(seed: int, epoch: int, rows: int) -> NDArray[np.int64]:
    """[rows] the order of an epoch, a pure function of its arguments."""
    return np.random.Generator(np.random.PCG64([seed, epoch])).permutation(rows)


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


def load_rows(config: TrainingConfig, renderer: Renderer, report: Report) -> tuple[PackedRows, PackedRows | None]:
    """Read, render, check, split and pack all data of a config: training rows and validation rows.

    Raises DataError with what is wrong in which file and line.
    """
    documents = _documents(config, config.dataset, config.dataset_split, renderer, report)
    validation: list[list[Sample]] | None = None
    if config.validation_share is not None:
        order = row_order(config.seed, 0, len(documents))
        count = max(round(config.validation_share * len(documents)), 1)
        if count >= len(documents):
            raise DataError(
                f"{config.dataset}: {len(documents)} documents are too few to keep {config.validation_share:.0%} of "
                "them for validation: give --validation-dataset, or no validation"
            )
        validation = [documents[index] for index in sorted(order[:count].tolist())]
        documents = [documents[index] for index in sorted(order[count:].tolist())]
    elif config.validation_dataset is not None:
        validation = _documents(config, config.validation_dataset, config.validation_split, renderer, report)
    rows = pack_samples(list(chain.from_iterable(documents)), config.sequence_length, config.packing)
    _describe(rows, config.dataset, config.sequence_length, report)
    if config.batch_size > len(rows) and not config.packing:
        raise DataError(
            f"{config.dataset}: batch_size is {config.batch_size} samples, but there are only {len(rows)}: lower "
            "--batch-size"
        )
    if config.batch_size > len(rows):
        raise DataError(
            f"{config.dataset}: batch_size is {config.batch_size} rows, but the data fill only {len(rows)} of "
            f"{config.sequence_length} tokens: lower --batch-size or --sequence-length"
        )
    if validation is None:
        return rows, None
    validation_rows = pack_samples(list(chain.from_iterable(validation)), config.sequence_length, config.packing)
    _describe(validation_rows, config.validation_dataset or "validation share", config.sequence_length, report)
    return rows, validation_rows


def _describe(rows: PackedRows, name: str, sequence_length: int, report: Report) -> None:
    tokens, documents = len(rows.tokens), len(rows.starts) - 1
    in_rows = f", {len(rows):,} rows of {sequence_length} ({tokens / (len(rows) * sequence_length):.1%} full)"
    report(
        f"{name}: {documents:,} documents, {tokens:,} tokens ({rows.supervised.mean():.0%} learned)"
        f"{in_rows if len(rows) < documents else ''}"
    )


def _documents(
    config: TrainingConfig, dataset: str, split: str, renderer: Renderer, report: Report
) -> list[list[Sample]]:
    """Every document as the pieces that it is trained in: all of a document's are on one side of a split."""
    files = find_files(dataset, config.dataset_format, split)
    if files is not None:
        rows: Iterator[Row | Broken] = (row for file in files for row in read_file(file, config.dataset_format))
    else:
        rows = (row for row, _ in hub_rows(config, dataset, split, None, streaming=False))
    first, rows = peek(rows)
    schema = _schema(config, first, dataset, report) if first else None
    examples = within_limit(to_examples(rows, schema) if schema else rows, config.unreadable_share, report)
    samples: list[Sample] = []
    unusable: list[Unusable] = []
    empty: list[Unusable] = []
    total = 0
    while chunk := list(islice(examples, 1000)):
        total += len(chunk)
        for result in renderer.examples(chunk):
            if isinstance(result, Sample):
                samples.append(result)
            else:
                (empty if result.kind == EMPTY_TEXT else unusable).append(result)
    stop_on_unusable(unusable, total)
    if not samples:
        raise DataError(f"{dataset}: {f'all {total} texts in it are empty' if total else 'there are no rows in it'}")
    if empty:
        report(f"{len(empty)} of {total} texts are empty and left out; the first: {empty[0].origin}")
    assert schema is not None
    return _fit(samples, schema, config, dataset, report)


def _schema(config: TrainingConfig, rows: list[Row], where: str, report: Report) -> Schema:
    wanted = config.dataset_schema if isinstance(config, SFTConfig) else "text"
    schema = detect_schema(rows, wanted, config.text_column, where)
    for_the_other = ["text_column"] if schema.name != "text" else ["chat_template", "too_long"]
    if given := config.changed_from_default(*(name for name in for_the_other if name in type(config).model_fields)):
        raise DataError(
            f"{where}: {', '.join(given)} would have no effect, because the data's schema is {schema.reason}"
        )
    unused = f"; columns not used: {', '.join(schema.unused_columns)}" if schema.unused_columns else ""
    report(f"{where}: schema {schema.reason}{unused}")
    return schema


def _fit(
    samples: list[Sample], schema: Schema, config: TrainingConfig, name: str, report: Report
) -> list[list[Sample]]:
    """Texts are cut into pieces of sequence_length; for conversations, too_long decides."""
    limit = config.sequence_length
    if schema.name == "text" or not isinstance(config, SFTConfig):
        return [pieces(sample, limit) for sample in samples]
    too_long = [sample for sample in samples if len(sample.tokens) > limit]
    if not too_long:
        return [[sample] for sample in samples]
    found = f"{name}: {len(too_long):,} of {len(samples):,} conversations are longer than sequence_length {limit}"
    found += f" (the longest has {max(len(sample.tokens) for sample in too_long):,} tokens)"
    if config.too_long == "stop":
        raise DataError(f"{found}: raise --sequence-length, or choose --too-long drop or truncate")
    if config.too_long == "truncate":
        cut = [Sample(sample.tokens[:limit], sample.supervised[:limit]) for sample in samples]
        kept = [sample for sample in cut if sample.supervised[1:].any()]
        report(f"{found}: cut off; {len(cut) - len(kept):,} of them had nothing left to learn and are left out")
    else:
        kept = [sample for sample in samples if len(sample.tokens) <= limit]
        report(f"{found}: left out (too_long = 'drop')")
    if not kept:
        raise DataError(f"{found}: nothing is left to train on; raise --sequence-length")
    return [[sample] for sample in kept]


def pieces(sample: Sample, limit: int) -> list[Sample]:
    """A text in pieces of at most limit tokens; a last piece of one token has nothing to predict and is left out."""
    starts = range(0, len(sample.tokens), limit)
    cut = [Sample(sample.tokens[start : start + limit], sample.supervised[start : start + limit]) for start in starts]
    return [piece for piece in cut if len(piece.tokens) > 1]


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
                problems.append(f"dataset_format is for files, but {dataset} is a hub data set")
            continue
        if setting == "dataset_split" and config.changed_from_default("dataset_subset"):
            problems.append(f"dataset_subset is for hub data sets, but {dataset} is a file or folder")
        if not Path(dataset).expanduser().is_dir() and config.changed_from_default(setting):
            problems.append(f"{setting} is for hub data sets and folders, but {dataset} is a file")
    if problems:
        raise DataError(problems)
