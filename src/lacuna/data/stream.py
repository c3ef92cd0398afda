"""Batches from data too large for memory: a window of rows is read, packed and shuffled at a time.

The position names where the window began and how many of its rows are used up.
"""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from itertools import islice
from pathlib import Path
from queue import Empty, Queue
from threading import Event, Thread
from typing import Any, cast

from transformers import PreTrainedTokenizerFast

from lacuna.config.training import PretrainConfig, TrainingConfig
from lacuna.data.chat import Renderer
from lacuna.data.documents import Report, pieces
from lacuna.data.find import find_files, say_left_out
from lacuna.data.formats import Broken, Row, Text, read_file, within_limit
from lacuna.data.hub import RowsWithState, hub_beginning, hub_rows
from lacuna.data.loader import Batch, PackedRows, Place, Position, pack_samples
from lacuna.data.samples import Sample, Unusable
from lacuna.data.schemas import Schema, detect_schema, to_examples
from lacuna.data.split import row_order
from lacuna.errors import DataError

STREAMING_CHUNK = 64
FINGERPRINT_BYTES = 2**20
READER_PATIENCE = 2.0
"""Seconds that the end of a stream waits for the thread that reads it."""


def stream(config: PretrainConfig, renderer: Renderer, report: Report, position: Position | None) -> Iterator[Batch]:
    """Batches without end from data too large for memory; the next window is read while this one is trained on."""
    batch: list[Place] = []
    used = position["row"] if position else 0
    for rows, window in _read_ahead(_windows(config, renderer, report, position)):
        for index in row_order(config.seed, window["window"], len(rows))[used:].tolist():
            batch.append((rows, index))
            used += 1
            if len(batch) == config.batch_size:
                yield Batch(batch, {**window, "row": used})
                batch = []
        used = 0


def _read_ahead(windows: Iterator[tuple[PackedRows, Position]]) -> Iterator[tuple[PackedRows, Position]]:
    """The same windows, made in a thread that is left behind where a read hangs, as from a hub that does not answer."""
    ready: Queue[tuple[PackedRows, Position] | BaseException] = Queue(1)
    closed = Event()

    def read() -> None:
        try:
            for window in windows:
                ready.put(window)
                if closed.is_set():
                    return
        except BaseException as error:
            ready.put(error)

    reader = Thread(target=read, daemon=True)
    reader.start()
    try:
        while True:
            window = ready.get()
            if isinstance(window, BaseException):
                raise window
            yield window
    finally:
        closed.set()
        with suppress(Empty):
            ready.get_nowait()
        reader.join(READER_PATIENCE)


def _windows(
    config: PretrainConfig, renderer: Renderer, report: Report, position: Position | None
) -> Iterator[tuple[PackedRows, Position]]:
    """Packed windows and the position at which each began; a window ends with a chunk of documents or an epoch."""
    beginning = _beginning(config, position)
    start = position or {"epoch": 0, "window": 0, "source": beginning}
    epoch, number, source = start["epoch"], start["window"], start["source"]
    enough = config.streaming_window * config.sequence_length

    def window(samples: list[Sample]) -> tuple[PackedRows, Position]:
        packed = pack_samples(samples, config.sequence_length, config.packing)
        return packed, {"epoch": epoch, "window": number, "source": source}

    while True:
        examples = _stream_examples(config, source, report)
        samples: list[Sample] = []
        tokens = empty = 0
        while chunk := list(islice(examples, STREAMING_CHUNK)):
            texts = renderer.texts([text for text, _ in chunk])
            found = [
                piece for text in texts if isinstance(text, Sample) for piece in pieces(text, config.sequence_length)
            ]
            samples += found
            tokens += sum(len(sample.tokens) for sample in found)
            empty += sum(isinstance(text, Unusable) for text in texts)
            if tokens >= enough:
                yield window(samples)
                number, source, samples, tokens = number + 1, chunk[-1][1](), [], 0
        if samples:
            yield window(samples)
            number += 1
        elif source == beginning:
            raise DataError(f"{config.dataset}: there is no text in it")
        if empty:
            report(f"{empty} texts are empty and left out")
        epoch, source = epoch + 1, beginning


def _beginning(config: PretrainConfig, position: Position | None) -> Any:
    """The source's state before its first row: None for files, for a hub data set the commit that the run reads."""
    if find_files(config.dataset, config.dataset_format, config.dataset_split) is not None:
        return None
    return hub_beginning(config, config.dataset, position["source"] if position else None)


def stream_fingerprint(config: TrainingConfig, tokenizer: PreTrainedTokenizerFast) -> str:
    """SHA-256 of the tokenizer and of names, sizes and both ends of the files; hub data are pinned by their commit."""
    digest = hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode())
    for path in find_files(config.dataset, config.dataset_format, config.dataset_split) or []:
        size = path.stat().st_size
        digest.update(f"{path} {size}\n".encode())
        with path.open("rb") as file:
            digest.update(file.read(FINGERPRINT_BYTES))
            file.seek(max(size - FINGERPRINT_BYTES, 0))
            digest.update(file.read())
    return digest.hexdigest()


def check_stream(config: TrainingConfig, report: Report) -> None:
    """Read the first text of a stream, so that a source that cannot be read is known before a model is loaded."""
    if not isinstance(config, PretrainConfig) or not config.streaming:
        return
    say_left_out(config.dataset, config.dataset_format, config.dataset_split, report)
    if next(_stream_examples(config, None, report), None) is None:
        raise DataError(f"{config.dataset}: there is no text in it")


def _stream_examples(config: PretrainConfig, state: Any, report: Report) -> Iterator[tuple[Text, Callable[[], Any]]]:
    """Texts, each with a function that gives the source's state after it."""
    files = find_files(config.dataset, config.dataset_format, config.dataset_split)
    if files is not None:
        rows = _file_rows(files, config.dataset_format, state)
    else:
        rows = hub_rows(config.dataset_subset, config.dataset, config.dataset_split, state, streaming=True)
    schema: Schema | None = None

    def converted() -> Iterator[tuple[Text, Callable[[], Any]] | Broken]:
        nonlocal schema
        for row, state_after in rows:
            if isinstance(row, Row) and schema is None:
                schema = detect_schema([row], "text", config.text_column, config.dataset)
            example = row if isinstance(row, Broken) or schema is None else next(to_examples([row], schema))
            yield (example, state_after) if isinstance(example, Text) else cast(Broken, example)

    return within_limit(converted(), config.unreadable_share, report, collected=0)


def _file_rows(files: list[Path], kind: str, state: Any) -> RowsWithState:
    first_file, skip = state or (0, 0)
    for index in range(first_file, len(files)):
        for number, row in enumerate(read_file(files[index], kind)):
            if index > first_file or number >= skip:
                yield row, partial(list, (index, number + 1))
