"""What runs will read, counted before any of them starts. Nothing here imports torch before it reads.

Many runs of an experiment share their data: each data set is read, rendered and tokenised once, and each way of
cutting, dividing and packing it is worked out once.
"""

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from lacuna.config.training import PretrainConfig, SFTConfig, TrainingConfig
from lacuna.data.packing import count_rows
from lacuna.errors import LacunaError

if TYPE_CHECKING:
    from lacuna.data.chat import Renderer
    from lacuna.data.documents import Documents, Part, Source
    from lacuna.data.schemas import Schema

Result = TypeVar("Result")


@dataclass(frozen=True)
class Counts:
    """What a run trains on. All but steps, epochs and what is left out is of one pass over the data."""

    documents: int
    """Trained on: without those left out or held out."""
    tokens: int
    targets: int
    """Tokens that are learned from the ones before them."""
    rows: int
    """Packed rows, or samples where nothing is packed."""
    fill: float | None
    """Share of the packed rows that is tokens, not padding; None where nothing is packed."""
    attention_pairs: int
    """Query-key pairs that causal attention within documents needs: n(n+1)/2 for each piece of n tokens."""
    longest: int
    """Tokens of the longest piece: no row of an adapter's forward pass is wider."""
    steps: int
    """Optimizer steps of the run."""
    epochs: float
    """Passes over the data that these steps make."""
    dropped: int
    """Conversations left out of the data set for their length."""
    truncated: int
    """Conversations cut off, among those kept."""
    empty: int
    """Texts of the data set without words."""
    validation_documents: int
    validation_rows: int
    validation_tokens: int


def count(configs: Mapping[str, TrainingConfig], report: Callable[[str], None]) -> dict[str, Counts | str]:
    """For each run what it will read, or why this is not known, or would stop the run, as a sentence.

    report: gets what reading finds, such as the schema, once for each data set.
    """
    from lacuna.data.hub import stay_offline_if_unreachable

    places = {(config.model_name, config.dataset, config.validation_dataset): config for config in configs.values()}
    for config in places.values():
        stay_offline_if_unreachable(config)
    once = _Once()
    counted: dict[str, Counts | str] = {}
    for name, config in configs.items():
        if isinstance(config, PretrainConfig) and config.streaming:
            counted[name] = f"{config.dataset}: streaming reads the data while it trains, so they are not counted"
            continue
        try:
            counted[name] = _count(config, once, report, report if len(configs) == 1 else _silent)
        except LacunaError as error:
            counted[name] = "; ".join(error.problems)
    return counted


class _Once:
    """Work that is done once for each key; where it failed, it fails again."""

    def __init__(self) -> None:
        self._done: dict[Hashable, Any] = {}

    def __call__(self, key: Hashable, work: Callable[[], Result]) -> Result:
        if key not in self._done:
            try:
                self._done[key] = work()
            except LacunaError as error:
                self._done[key] = error
        if isinstance(self._done[key], LacunaError):
            raise self._done[key].with_traceback(None)
        result: Result = self._done[key]
        return result


def _silent(_: str) -> None:
    """What many runs find when they cut and divide the same data is not said for each."""


def _count(config: TrainingConfig, once: _Once, report: Callable[[str], None], found: Callable[[str], None]) -> Counts:
    from lacuna.data.documents import Documents, Source, refuse_unread, training_source, validation_source
    from lacuna.data.loader import make_parts, refuse_few_rows
    from lacuna.data.split import PREPARATION
    from lacuna.runs.identity import preparation_of
    from lacuna.train.optimizer import check_warmup, count_steps

    sft = config if isinstance(config, SFTConfig) else None
    tokenizer = (config.model_name, config.model_revision, sft and sft.chat_template)
    renderer = once(tokenizer, lambda: _renderer(config, once))

    def documents_of(source: Source) -> Documents:
        schema, documents = once((renderer, source), lambda: _read(source, renderer, report))
        refuse_unread(config, schema, source.dataset)
        return documents

    sources = (training_source(config), validation_source(config))
    for source in filter(None, sources):
        documents_of(source)
    preparation = preparation_of(Path(config.run_folder).expanduser(), config.resume) or PREPARATION
    drawn_by = (config.split_seed, preparation, config.seed if preparation == "1" else None)
    held_out = (config.validation_share, drawn_by) if config.validation_share else None
    cut = (sft and sft.too_long, config.sequence_length, held_out, config.packs_rows)
    facts = once(
        (renderer, sources, cut), lambda: _facts(*make_parts(config, documents_of, found, preparation), config)
    )
    refuse_few_rows(config, facts["rows"])
    steps = count_steps(config, facts["rows"])
    check_warmup(config, steps)
    epochs = config.whole_epochs or steps * config.rows_in_step() / facts["rows"]
    return Counts(**facts, steps=steps, epochs=epochs)


def _renderer(config: TrainingConfig, once: _Once) -> "Renderer":
    """The same one for models that have the same tokenizer."""
    from lacuna.data.chat import Renderer
    from lacuna.train.loading import load_tokenizer

    tokenizer: Any = load_tokenizer(config)
    told_by = (tokenizer.backend_tokenizer.to_str(), str(tokenizer.chat_template), str(tokenizer.special_tokens_map))
    return once(("tokenizer", *told_by), lambda: Renderer(tokenizer, config.flag("chat_template")))


def _read(source: "Source", renderer: "Renderer", report: Callable[[str], None]) -> tuple["Schema", "Documents"]:
    from lacuna.data.documents import open_source, read_documents

    schema, rows = open_source(source, report)
    return schema, read_documents(source, schema, rows, renderer, report)


def _facts(training: "Part", validation: "Part | None", config: TrainingConfig) -> dict[str, Any]:
    """What Counts says of a pass over the data."""
    documents, pieces = training.documents, training.pieces
    lengths = pieces.lengths
    used = len(pieces.used)
    is_split = validation is not None and validation.documents is documents
    held_out = len(validation.pieces.used) if validation is not None else 0
    tokens, rows = int(lengths.sum()), _rows(training, config)
    return {
        "documents": used,
        "tokens": tokens,
        "targets": int(documents.targets(pieces).sum()),
        "rows": rows,
        "fill": tokens / (rows * config.sequence_length) if config.packs_rows else None,
        "attention_pairs": int((lengths * (lengths + 1) // 2).sum()),
        "longest": int(lengths.max()),
        "dropped": len(documents) - used - (held_out if is_split else 0),
        "truncated": 0 if documents.is_text else int((lengths < documents.lengths[pieces.documents]).sum()),
        "empty": len(documents.empty),
        "validation_documents": held_out,
        "validation_rows": _rows(validation, config) if validation is not None else 0,
        "validation_tokens": int(validation.pieces.lengths.sum()) if validation is not None else 0,
    }


def _rows(part: "Part", config: TrainingConfig) -> int:
    lengths = part.pieces.lengths
    return count_rows(lengths, config.sequence_length) if config.packs_rows else len(lengths)
